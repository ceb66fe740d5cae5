"""The verbs of the API on stored objects: create, update, apply, delete, and what serving CRDs and namespaces adds.

Everything here is synchronous, so every verb is one transaction of the event loop.
"""

from __future__ import annotations

import copy
import datetime as dt
import random
import uuid
from collections.abc import Callable
from typing import Any, Literal

from cgd_local import policies
from cgd_local.admission import admit
from cgd_local.kinds import Resource, begin, builtin_resources, custom_resource, fill_in
from cgd_local.ownership import Write, apply_patch, record_update
from cgd_local.quotas import charge
from cgd_local.schema import default, drop_nulls, prune, schema_causes, validate
from cgd_local.statuses import ApiError, Cause, Json, bad_request, invalid, required, success, wrong
from cgd_local.store import Key, Shelf, Store

_LETTERS = "bcdfghjklmnpqrstvwxz2456789"
_KEPT = ("uid", "creationTimestamp", "generation", "deletionTimestamp", "deletionGracePeriodSeconds")
_GC_FINALIZERS = {"Orphan": ["orphan"], "Foreground": ["foregroundDeletion"], "Background": []}
_CRDS = "customresourcedefinitions.apiextensions.k8s.io"


def now(later: int = 0) -> str:
    return text_of(dt.datetime.now(dt.UTC) + dt.timedelta(seconds=later))


def text_of(moment: dt.datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _missing(resource: Resource, name: str) -> ApiError:
    return ApiError(404, f'{resource.full_name} "{name}" not found', details=resource.details(name))


def _conflict(resource: Resource, name: str, why: str) -> ApiError:
    message = f'Operation cannot be fulfilled on {resource.full_name} "{name}": {why}'
    return ApiError(409, message, details=resource.details(name))


def _invalid(resource: Resource, name: str, *causes: Cause) -> ApiError:
    return invalid(resource.group, resource.kind, name, list(causes))


class Registry:
    """All served kinds over one store."""

    def __init__(self, history: int) -> None:
        self.store = Store(history)
        self.resources = {resource.full_name: resource for resource in builtin_resources()}

    def shelf(self, resource: Resource) -> Shelf:
        return self.store.shelf(resource.full_name)

    def get(self, resource: Resource, key: Key) -> Json:
        if found := self.shelf(resource).objects.get(key):
            return found
        raise _missing(resource, key[1])

    # --- creating

    def create(self, resource: Resource, namespace: str, body: Json, write: Write) -> Json:
        """Store a new object and return it as stored.

        Raises:
            ApiError: 400 if it cannot be decoded, 404 or 403 for its namespace, 403 if a pod is not admitted or
                a quota is full, 409 if it exists, 422 if invalid, and what a policy refuses with.
        """
        obj = _decoded(resource, body, write)
        if resource.namespaced:
            self._require_namespace(resource, namespace)
        obj["metadata"] = metadata = _named(resource, namespace, obj["metadata"])
        begin(resource, obj, now())
        _require_valid(resource, obj, None)
        if resource.full_name == "pods":
            admit(self, obj)
        key = (namespace, metadata["name"])
        self._judge("CREATE", resource, key, write.subresource, dry_run=write.dry_run, new=obj)
        charge(self, resource, obj)
        if key in self.shelf(resource).objects:
            message = f'{resource.full_name} "{key[1]}" already exists'
            raise ApiError(409, message, reason="AlreadyExists", details=resource.details(key[1]))
        if write.operation == "Update":
            _set_owners(obj, record_update(resource.schema, None, obj, write, now()))
        default(resource.schema, obj)  # a status by default comes with reading what is stored: nobody owns it
        return self._stored(resource, key, obj, write)

    def _judge(
        self,
        operation: Literal["CREATE", "UPDATE", "DELETE"],
        resource: Resource,
        key: Key,
        subresource: str = "",
        **more: Any,
    ) -> None:
        asked = policies.Request(
            operation=operation, resource=resource, namespace=key[0], name=key[1], subresource=subresource, **more
        )
        policies.judge(self, asked)

    def _require_namespace(self, resource: Resource, namespace: str) -> None:
        owner = self.get(self.resources["namespaces"], ("", namespace))
        if "deletionTimestamp" in owner["metadata"]:
            why = f"unable to create new content in namespace {namespace} because it is being terminated"
            raise ApiError(403, f"{resource.full_name} is forbidden: {why}")

    def _stored(self, resource: Resource, key: Key, obj: Json, write: Write) -> Json:
        if write.dry_run:
            return obj
        if resource.full_name == _CRDS:
            served = custom_resource(obj)
            self.resources[served.full_name] = served
        return self.store.put(self.shelf(resource), key, obj)

    # --- changing

    def update(self, resource: Resource, key: Key, change: Callable[[Json], Json], write: Write) -> Json:
        """Replace a stored object by what `change` makes of it; nothing is written if nothing changes.

        `change` must leave its argument as it is. The parts that it passes on are not read again."""
        old = self.get(resource, key)
        new = _decoded(resource, change(old), write, old)
        if "managedFields" not in new["metadata"]:  # a client that leaves them out keeps them; an empty list resets
            _set_owners(new, old["metadata"].get("managedFields", []))
        _require_same(resource, key, old["metadata"], new["metadata"])
        new = _split(resource, old, new, write.subresource)
        _require_valid(resource, new, old)
        self._judge("UPDATE", resource, key, write.subresource, dry_run=write.dry_run, new=new, old=old)
        if write.operation == "Update":
            _set_owners(new, record_update(resource.schema, old, new, write, now()))
        if new == old:
            return old
        if self._is_over(resource, new) and not write.dry_run:
            return self._removed(resource, key, new)
        return self._stored(resource, key, new, write)

    def apply(self, resource: Resource, key: Key, config: Json, write: Write) -> tuple[Json, bool]:
        """Server-side apply; also tells whether the object had to be created."""
        head = {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": {"name": key[1]}}
        if any(config.get(word) != head[word] for word in ("apiVersion", "kind")):
            raise bad_request(f"apiVersion and kind must be set to {resource.api_version} and {resource.kind}")
        config = {"metadata": {}} | drop_nulls(config)
        said = {word: config["metadata"][word] for word in ("uid", "resourceVersion") if word in config["metadata"]}
        _require_known(resource, prune(resource.schema, config))
        if "status" in resource.subresources and not write.subresource:
            config.pop("status", None)

        def change(live: Json) -> Json:
            applied = apply_patch(resource.schema, live, config, write, now())
            return applied | {"metadata": applied["metadata"] | said}

        if key in self.shelf(resource).objects:
            return self.update(resource, key, change, write), False
        if write.subresource:
            raise _missing(resource, key[1])
        return self.create(resource, key[0], change(head), write), True

    # --- deleting

    def delete(self, resource: Resource, key: Key, options: Json) -> Json:
        """Delete now, or mark for deletion what finalizers or a running pod still hold.

        Returns:
            The object if it is still there (and always for pods), a Status of success otherwise.
        """
        old = self.get(resource, key)
        _require(resource, key, old["metadata"], options.get("preconditions", {}))
        self._judge("DELETE", resource, key, dry_run=bool(options.get("dryRun")), old=old)
        return old if options.get("dryRun") else self._deleted(resource, key, old, options)

    def _deleted(self, resource: Resource, key: Key, old: Json, options: Json) -> Json:
        new = _marked(resource, old, options)
        if self._is_over(resource, new):
            last = self._removed(resource, key, new)
            return (
                last
                if resource.plural == "pods"
                else success(resource.details(key[1]) | {"uid": old["metadata"]["uid"]})
            )
        if new != old:
            self.store.put(self.shelf(resource), key, new)
        for part, inner in self._contents(resource, key[1]):
            if held := self.shelf(part).objects.get(inner):
                self._deleted(part, inner, held, {"propagationPolicy": "Background"})
        return self.shelf(resource).objects.get(key, new)

    def _contents(self, resource: Resource, name: str) -> list[tuple[Resource, Key]]:
        """What goes with a namespace or a definition, and before it."""
        if resource.full_name == _CRDS:
            return [(self.resources[name], key) for key in self.shelf(self.resources[name]).objects]
        if resource.full_name == "namespaces":
            held = [(kind, key) for kind in self.resources.values() for key in self.shelf(kind).objects]
            return [(kind, key) for kind, key in held if key[0] == name]
        return []

    def _is_over(self, resource: Resource, obj: Json) -> bool:
        """Whether nothing holds an object that is being deleted any more."""
        metadata = obj["metadata"]
        if "deletionTimestamp" not in metadata or metadata.get("finalizers"):
            return False
        return not metadata["deletionGracePeriodSeconds"] and not self._contents(resource, metadata["name"])

    def _removed(self, resource: Resource, key: Key, last: Json) -> Json:
        gone = self.store.remove(self.shelf(resource), key, last)
        if resource.full_name == _CRDS:
            self.shelf(self.resources.pop(key[1])).end()
        for kind, name in ((self.resources["namespaces"], key[0]), (self.resources[_CRDS], resource.full_name)):
            holder = self.shelf(kind).objects.get(("", name))
            if holder and self._is_over(kind, holder):
                self._removed(kind, ("", name), holder)
        return gone


# --- what a client sends, judged and completed


def _decoded(resource: Resource, body: Json, write: Write, old: Json | None = None) -> Json:
    """A client's object, stripped to what the schema knows, with defaults; what is the stored object's own is both."""
    if not isinstance(body, dict) or not isinstance(body.get("metadata", {}), dict):
        raise bad_request("the body of the request is not an object with metadata")
    kept = {word: value for word, value in body.items() if old and word != "metadata" and value is old.get(word)}
    told = {word: value for word, value in body.items() if word not in kept}
    obj = copy.deepcopy(told) if resource.custom else drop_nulls(told)
    for word, expected in (("apiVersion", resource.api_version), ("kind", resource.kind)):
        if (said := obj.setdefault(word, expected)) != expected:
            raise bad_request(f"{word} in the data ({said}) does not match the expected one ({expected})")
    obj["metadata"] = drop_nulls(obj.get("metadata", {}))
    unknown = prune(resource.schema, obj)
    if write.strict:
        _require_known(resource, unknown)
    fill_in(resource, obj)
    default(resource.schema, obj)
    return obj | kept


def _require_known(resource: Resource, unknown: list[str]) -> None:
    if unknown:
        cannot = f'{resource.kind} in version "{resource.version}" cannot be handled as a {resource.kind}'
        told = ", ".join(f'unknown field "{path}"' for path in unknown)
        raise bad_request(f"{cannot}: strict decoding error: {told}")


def _named(resource: Resource, namespace: str, metadata: Json) -> Json:
    """The metadata of a new object: with a name and an identity, and nothing else that the server sets."""
    metadata = {word: value for word, value in metadata.items() if word not in (*_KEPT, "resourceVersion")}
    if metadata.get("namespace", namespace) != namespace:
        raise bad_request("the namespace of the provided object does not match the namespace sent on the request")
    if "name" not in metadata and "generateName" in metadata:
        metadata["name"] = metadata["generateName"] + "".join(random.choices(_LETTERS, k=5))  # noqa: S311  no secret
    if "name" not in metadata:
        raise _invalid(resource, "", required("metadata.name", "name or generateName is required"))
    metadata |= {"namespace": namespace} if resource.namespaced else {}
    metadata |= {"generation": 1} if resource.counted else {}
    return metadata | {"uid": str(uuid.uuid4()), "creationTimestamp": now()}


def _require_valid(resource: Resource, new: Json, old: Json | None) -> None:
    causes = validate(resource.schema, new, old) or list(policies.causes(resource, new))
    if resource.full_name == _CRDS and not causes:
        raw = new["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        causes = list(schema_causes(raw, "spec.versions[0].schema.openAPIV3Schema"))
    if causes:
        raise _invalid(resource, new["metadata"]["name"], *causes)


def _require_same(resource: Resource, key: Key, before: Json, after: Json) -> None:
    """The stored object must be the one the client means, unchanged since the client read it."""
    if (after.setdefault("name", key[1]), after.get("namespace", key[0])) != (key[1], key[0]):
        raise bad_request("the name or namespace of the object does not match the name or namespace on the URL")
    _require_uid(resource, key, after.get("uid", before["uid"]), before["uid"])
    version = after.get("resourceVersion")
    if version and version != before["resourceVersion"]:
        why = "the object has been modified; please apply your changes to the latest version and try again"
        raise _conflict(resource, key[1], why)
    if not version and resource.custom:
        cause = wrong("metadata.resourceVersion", 0, "must be specified for an update")
        raise _invalid(resource, key[1], cause)


def _require_uid(resource: Resource, key: Key, wanted: object, found: str) -> None:
    if wanted != found:
        why = f"Precondition failed: UID in precondition: {wanted}, UID in object meta: {found}"
        raise _conflict(resource, key[1], why)


def _require(resource: Resource, key: Key, found: Json, preconditions: Json) -> None:
    _require_uid(resource, key, preconditions.get("uid", found["uid"]), found["uid"])
    wanted, version = preconditions.get("resourceVersion", found["resourceVersion"]), found["resourceVersion"]
    if wanted != version:
        told = f"ResourceVersion in precondition: {wanted}, ResourceVersion in object meta: {version}"
        raise _conflict(resource, key[1], f"Precondition failed: {told}")


def _set_owners(obj: Json, owners: list[Json]) -> None:
    obj["metadata"].pop("managedFields", None)
    obj["metadata"] |= {"managedFields": owners} if owners else {}


def _split(resource: Resource, old: Json, new: Json, subresource: str) -> Json:
    """The new object with what this endpoint must not change put back; a change of the wish is a new generation."""
    status, before = {"status": old["status"]} if "status" in old else {}, old["metadata"]
    if subresource == "status":
        status = {"status": new["status"]} if "status" in new else {}
        owners, new = new["metadata"].get("managedFields", []), old | {"metadata": dict(before)}
        _set_owners(new, owners)
    if "status" in resource.subresources:
        new = {word: value for word, value in new.items() if word != "status"} | status
    metadata = {word: value for word, value in new["metadata"].items() if word not in _KEPT}
    metadata |= {word: before[word] for word in (*_KEPT, "namespace", "resourceVersion") if word in before}
    if resource.counted and new | {"metadata": {}, "status": {}} != old | {"metadata": {}, "status": {}}:
        metadata["generation"] += 1
    return new | {"metadata": metadata}


def _marked(resource: Resource, old: Json, options: Json) -> Json:
    """The object with its deletion written into it."""
    metadata = dict(old["metadata"])
    finalizers = metadata.pop("finalizers", [])
    if (policy := _policy(resource, finalizers, options)) in _GC_FINALIZERS:
        own = [name for name in finalizers if name not in ("orphan", "foregroundDeletion")]
        finalizers = own + _GC_FINALIZERS[policy]
    metadata |= {"finalizers": finalizers} if finalizers else {}
    first, grace = "deletionTimestamp" not in metadata, _grace(resource, old, options)
    if first:
        metadata |= {"deletionTimestamp": now(grace), "deletionGracePeriodSeconds": grace}
    elif (shorter := metadata["deletionGracePeriodSeconds"] - grace) > 0:
        due = dt.datetime.fromisoformat(metadata["deletionTimestamp"]) - dt.timedelta(seconds=shorter)
        metadata |= {"deletionTimestamp": text_of(due), "deletionGracePeriodSeconds": grace}
    if first and resource.counted:
        metadata["generation"] += 1
    terminating = {"status": {"phase": "Terminating"}} if resource.full_name == "namespaces" else {}
    return old | {"metadata": metadata} | terminating


def _policy(resource: Resource, finalizers: list[str], options: Json) -> str:
    """Who deletes the dependents. Jobs keep their pods unless the client says otherwise: a famous trap, kept here."""
    unsaid = "Orphan" if resource.full_name == "jobs.batch" and "foregroundDeletion" not in finalizers else ""
    return str(options.get("propagationPolicy", unsaid))


def _grace(resource: Resource, old: Json, options: Json) -> int:
    """Seconds that a pod may take to end; only one that runs on a node needs any."""
    ended = old.get("status", {}).get("phase") in ("Succeeded", "Failed")
    if resource.plural != "pods" or ended or "nodeName" not in old["spec"]:
        return 0
    return int(options.get("gracePeriodSeconds", old["spec"]["terminationGracePeriodSeconds"]))
