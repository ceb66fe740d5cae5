"""The verbs of the API on stored objects: create, update, apply and delete, also of CRDs and namespaces.

All code here is synchronous, so each verb is one transaction of the event loop.
"""

from __future__ import annotations

import datetime as dt
import json
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
from cgd_local.statuses import ApiError, Cause, Json, bad_request, required, success, wrong
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
    """422 with a cause per field, worded so that kubectl prints its usual list."""
    lines = [f"{cause.field}: {cause.message}" for cause in causes]
    message = lines[0] if len(lines) == 1 else "[" + ", ".join(lines) + "]"
    subject = f"{resource.kind}.{resource.group}" if resource.group else resource.kind
    details = resource.details(name) | {"kind": resource.kind, "causes": [cause._asdict() for cause in causes]}
    return ApiError(422, f'{subject} "{name}" is invalid: {message}', details=details)


class Registry:
    """All served kinds over one store."""

    def __init__(self, history: int) -> None:
        self.store = Store(history)
        self.resources = {resource.full_name: resource for resource in builtin_resources()}

    def shelf(self, resource: Resource) -> Shelf:
        return self.store.shelf(resource.full_name)

    def get(self, resource: Resource, key: Key) -> Json:
        if obj := self.shelf(resource).objects.get(key):
            return obj
        raise _missing(resource, key[1])

    # --- creating

    def create(self, resource: Resource, namespace: str, body: Json, write: Write) -> Json:
        """Store a new object and return it as stored.

        Raises:
            ApiError: 400 if it cannot be decoded, 404 or 403 for its namespace, 403 if a plugin refuses a pod or a
                quota is full, 409 if it exists, 422 if it is invalid, and the code of a policy that refuses it.
        """
        obj = _decoded(resource, body, write)
        if resource.namespaced:
            home = self.get(self.resources["namespaces"], ("", namespace))
            if "deletionTimestamp" in home["metadata"]:
                why = f"unable to create new content in namespace {namespace} because it is being terminated"
                raise ApiError(403, f"{resource.full_name} is forbidden: {why}")
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
        default(resource.schema, obj)  # nobody owns a default status: it comes with reading the stored object
        return self._stored(resource, key, obj, write)

    def _judge(
        self,
        operation: Literal["CREATE", "UPDATE", "DELETE"],
        resource: Resource,
        key: Key,
        subresource: str = "",
        **more: Any,
    ) -> None:
        request = policies.Request(
            operation=operation, resource=resource, namespace=key[0], name=key[1], subresource=subresource, **more
        )
        policies.judge(self, request)

    def _stored(self, resource: Resource, key: Key, obj: Json, write: Write) -> Json:
        if write.dry_run:
            return obj
        if resource.full_name == _CRDS:
            served = custom_resource(obj)
            self.resources[served.full_name] = served
            self._read_anew(served)
        return self.store.put(self.shelf(resource), key, obj)

    def _read_anew(self, resource: Resource) -> None:
        """Read the stored objects of a kind by its definition, which may be another than they were stored by: with its
        defaults, and without fields that it does not have. What is stored stays, so no version changes."""
        shelf = self.shelf(resource)
        for key, stored in list(shelf.objects.items()):
            obj = json.loads(json.dumps(stored))
            prune(resource.schema, obj)
            default(resource.schema, obj)
            if obj != stored:
                shelf.replace(key, obj)

    # --- changing

    def update(self, resource: Resource, key: Key, change: Callable[[Json], Json], write: Write) -> Json:
        """Replace a stored object by the result of `change`; write nothing if nothing changes.

        `change` must not modify its argument. The server does not decode again the parts that it passes on."""
        old = self.get(resource, key)
        new = _decoded(resource, change(old), write, old)
        if "managedFields" not in new["metadata"]:  # a client that omits them keeps them; an empty list resets them
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
        """Server-side apply; the second value says whether it created the object."""
        head = {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": {"name": key[1]}}
        if any(config.get(word) != head[word] for word in ("apiVersion", "kind")):
            raise bad_request(f"apiVersion and kind must be set to {resource.api_version} and {resource.kind}")
        config = {"metadata": {}} | drop_nulls(config)
        identity = {word: config["metadata"][word] for word in ("uid", "resourceVersion") if word in config["metadata"]}
        _require_known(resource, prune(resource.schema, config))
        if "status" in resource.subresources and not write.subresource:
            config.pop("status", None)

        def change(live: Json) -> Json:
            applied = apply_patch(resource.schema, live, config, write, now())
            return applied | {"metadata": applied["metadata"] | identity}

        if key in self.shelf(resource).objects:
            return self.update(resource, key, change, write), False
        if write.subresource:
            raise _missing(resource, key[1])
        return self.create(resource, key[0], change(head), write), True

    # --- deleting

    def delete(self, resource: Resource, key: Key, options: Json) -> Json:
        """Delete an object now, or mark it for deletion if finalizers or a running pod hold it.

        Returns:
            The object if it still exists (and always for pods), a Status of success otherwise.
        """
        old = self.get(resource, key)
        meta, preconditions = old["metadata"], options.get("preconditions", {})
        _require_uid(resource, key, preconditions.get("uid", meta["uid"]), meta["uid"])
        expected, version = preconditions.get("resourceVersion", meta["resourceVersion"]), meta["resourceVersion"]
        if expected != version:
            why = f"ResourceVersion in precondition: {expected}, ResourceVersion in object meta: {version}"
            raise _conflict(resource, key[1], f"Precondition failed: {why}")
        self._judge("DELETE", resource, key, dry_run=bool(options.get("dryRun")), old=old)
        return old if options.get("dryRun") else self._deleted(resource, key, old, options)

    def _deleted(self, resource: Resource, key: Key, old: Json, options: Json) -> Json:
        new = _marked(resource, old, options)
        if self._is_over(resource, new):
            last = self._removed(resource, key, new)
            details = resource.details(key[1]) | {"uid": old["metadata"]["uid"]}
            return last if resource.plural == "pods" else success(details)
        if new != old:
            self.store.put(self.shelf(resource), key, new)
        for kind, inner in self._contents(resource, key[1]):
            if obj := self.shelf(kind).objects.get(inner):
                self._deleted(kind, inner, obj, {"propagationPolicy": "Background"})
        return self.shelf(resource).objects.get(key, new)

    def _contents(self, resource: Resource, name: str) -> list[tuple[Resource, Key]]:
        """The objects that disappear with a namespace or a CRD, and before it."""
        if resource.full_name == _CRDS:
            return [(self.resources[name], key) for key in self.shelf(self.resources[name]).objects]
        if resource.full_name == "namespaces":
            stored = [(kind, key) for kind in self.resources.values() for key in self.shelf(kind).objects]
            return [(kind, key) for kind, key in stored if key[0] == name]
        return []

    def _is_over(self, resource: Resource, obj: Json) -> bool:
        """Whether nothing holds a deleted object any more."""
        metadata = obj["metadata"]
        if "deletionTimestamp" not in metadata or metadata.get("finalizers"):
            return False
        return not metadata["deletionGracePeriodSeconds"] and not self._contents(resource, metadata["name"])

    def _removed(self, resource: Resource, key: Key, last: Json) -> Json:
        removed = self.store.remove(self.shelf(resource), key, last)
        if resource.full_name == _CRDS:
            self.shelf(self.resources.pop(key[1])).end()
        for kind, name in ((self.resources["namespaces"], key[0]), (self.resources[_CRDS], resource.full_name)):
            holder = self.shelf(kind).objects.get(("", name))
            if holder and self._is_over(kind, holder):
                self._removed(kind, ("", name), holder)
        return removed


# --- the checks and completion of a client's objects


def _decoded(resource: Resource, body: Json, write: Write, old: Json | None = None) -> Json:
    """A client's object with only the fields of the schema, and with defaults. Parts of the stored object already are
    so."""
    if not isinstance(body, dict) or not isinstance(body.get("metadata", {}), dict):
        raise bad_request("the body of the request is not an object with metadata")
    changed = {"metadata"} | ({"data"} if "stringData" in body else set())  # which becomes data, see fill_in
    kept = {word: value for word, value in body.items() if old and word not in changed and value is old.get(word)}
    sent = {word: value for word, value in body.items() if word not in kept}
    metadata = drop_nulls(sent.pop("metadata", {}))
    obj: Json = json.loads(json.dumps(sent)) if resource.custom else drop_nulls(sent)  # a copy, faster than deepcopy
    obj["metadata"] = metadata
    for word, expected in (("apiVersion", resource.api_version), ("kind", resource.kind)):
        if (value := obj.setdefault(word, expected)) != expected:
            raise bad_request(f"{word} in the data ({value}) does not match the expected one ({expected})")
    unknown = prune(resource.schema, obj)
    if write.strict:
        _require_known(resource, unknown)
    fill_in(resource, obj)
    default(resource.schema, obj)
    return obj | kept


def _require_known(resource: Resource, unknown: list[str]) -> None:
    if unknown:
        cannot = f'{resource.kind} in version "{resource.version}" cannot be handled as a {resource.kind}'
        fields = ", ".join(f'unknown field "{path}"' for path in unknown)
        raise bad_request(f"{cannot}: strict decoding error: {fields}")


def _named(resource: Resource, namespace: str, metadata: Json) -> Json:
    """The metadata of a new object, with its name and identity, and without other fields that the server sets."""
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
    """Require that the client means the stored object, and has read its latest version."""
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


def _require_uid(resource: Resource, key: Key, expected: object, actual: str) -> None:
    if expected != actual:
        why = f"Precondition failed: UID in precondition: {expected}, UID in object meta: {actual}"
        raise _conflict(resource, key[1], why)


def _set_owners(obj: Json, owners: list[Json]) -> None:
    obj["metadata"].pop("managedFields", None)
    obj["metadata"] |= {"managedFields": owners} if owners else {}


def _split(resource: Resource, old: Json, new: Json, subresource: str) -> Json:
    """The new object, with the stored value of each field that this endpoint must not change. A change outside metadata
    and status starts a new generation."""
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
    """The object with its deletion in its metadata."""
    metadata = dict(old["metadata"])
    finalizers = metadata.pop("finalizers", [])
    # Who deletes the dependents? Jobs keep their pods unless the client says otherwise: a famous trap, kept here.
    keeps_pods = resource.full_name == "jobs.batch" and "foregroundDeletion" not in finalizers
    policy = str(options.get("propagationPolicy", "Orphan" if keeps_pods else ""))
    if policy in _GC_FINALIZERS:
        others = [name for name in finalizers if name not in ("orphan", "foregroundDeletion")]
        finalizers = others + _GC_FINALIZERS[policy]
    metadata |= {"finalizers": finalizers} if finalizers else {}
    first, grace = "deletionTimestamp" not in metadata, 0
    if resource.plural == "pods":  # only a pod that runs on a node needs time to end
        has_ended = old.get("status", {}).get("phase") in ("Succeeded", "Failed")
        if "nodeName" in old["spec"] and not has_ended:
            grace = int(options.get("gracePeriodSeconds", old["spec"]["terminationGracePeriodSeconds"]))
    if first:
        metadata |= {"deletionTimestamp": now(grace), "deletionGracePeriodSeconds": grace}
    elif (shorter := metadata["deletionGracePeriodSeconds"] - grace) > 0:
        due = dt.datetime.fromisoformat(metadata["deletionTimestamp"]) - dt.timedelta(seconds=shorter)
        metadata |= {"deletionTimestamp": text_of(due), "deletionGracePeriodSeconds": grace}
    if first and resource.counted:
        metadata["generation"] += 1
    terminating = {"status": {"phase": "Terminating"}} if resource.full_name == "namespaces" else {}
    return old | {"metadata": metadata} | terminating
