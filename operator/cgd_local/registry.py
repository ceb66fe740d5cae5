"""The verbs of the API on stored objects: create, update, apply, delete, and what serving CRDs and namespaces adds.

Everything here is synchronous, so every verb is one transaction of the event loop.
"""

from __future__ import annotations

import copy
import datetime as dt
import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cgd_local.customs import crd_causes, crd_status, resources_of
from cgd_local.kinds import Resource, builtin_resources, check, check_name, fill_in, prepare_create
from cgd_local.patches import Writer, apply_patch, record_update
from cgd_local.schema import ABSENT, default, drop_nulls, prune, validate
from cgd_local.statuses import ApiError, Cause, Json, bad_request, forbidden, invalid, required, success, wrong
from cgd_local.store import Key, Shelf, Store

_LETTERS = "bcdfghjklmnpqrstvwxz2456789"
_KEPT = ("uid", "creationTimestamp", "generation", "deletionTimestamp", "deletionGracePeriodSeconds")
_GC_FINALIZERS = {"Orphan": "orphan", "Foreground": "foregroundDeletion"}
_CRDS = "customresourcedefinitions"


@dataclass(frozen=True, kw_only=True)
class Write:
    """How a write is meant: by whom, how strictly, for real or as a dry run."""

    writer: Writer
    validation: str = "Warn"
    dry_run: bool = False
    force: bool = False
    warnings: list[str] = field(default_factory=list)


def now(later: int = 0) -> str:
    moment = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=later)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def missing(resource: Resource, name: str) -> ApiError:
    details = {"name": name, "group": resource.group, "kind": resource.plural}
    return ApiError(404, f'{resource.full_name} "{name}" not found', details=details)


def conflict(resource: Resource, name: str, why: str) -> ApiError:
    details = {"name": name, "group": resource.group, "kind": resource.plural}
    message = f'Operation cannot be fulfilled on {resource.full_name} "{name}": {why}'
    return ApiError(409, message, details=details)


class Registry:
    """All served kinds over one store."""

    def __init__(self, history: int) -> None:
        self.store = Store(history)
        self.resources = {(r.group, r.version, r.plural): r for r in builtin_resources()}

    # --- reading

    def resource(self, group: str, version: str, plural: str) -> Resource:
        if found := self.resources.get((group, version, plural)):
            return found
        raise ApiError(404, "the server could not find the requested resource")

    def shelf(self, resource: Resource) -> Shelf:
        return self.store.shelf(resource.group, resource.plural)

    def get(self, resource: Resource, key: Key) -> Json:
        if found := self.shelf(resource).objects.get(key):
            return seen_as(resource, found)
        raise missing(resource, key[1])

    # --- creating

    def create(self, resource: Resource, namespace: str, body: Json, write: Write) -> Json:
        """Store a new object and return it as stored.

        Raises:
            ApiError: 400 if it cannot be decoded, 404 or 403 for its namespace, 409 if it exists, 422 if invalid.
        """
        obj = self._decoded(resource, body, write)
        self._require_namespace(resource, namespace)
        metadata = self._placed(resource, namespace, obj)
        metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": now()}
        for word in ("deletionTimestamp", "deletionGracePeriodSeconds", "selfLink", "resourceVersion", "generation"):
            metadata.pop(word, None)
        if resource.counted:
            metadata["generation"] = 1
        key = (namespace, metadata["name"])
        prepare_create(resource, obj)
        self._validate(resource, obj, None)
        if key in self.shelf(resource).objects:
            details = {"name": key[1], "group": resource.group, "kind": resource.plural}
            message = f'{resource.full_name} "{key[1]}" already exists'
            raise ApiError(409, message, reason="AlreadyExists", details=details)
        if write.writer.operation == "Update":
            _set_owners(metadata, record_update(resource.node, None, obj, write.writer, now()))
        return self._stored(resource, key, obj, write)

    def _decoded(self, resource: Resource, body: Json, write: Write) -> Json:
        """A client's object, stripped to what the schema knows, with defaults."""
        if not isinstance(body, dict) or not isinstance(body.get("metadata", {}) or {}, dict):
            raise bad_request(f"{_cannot(resource)}: not an object with metadata")
        obj = copy.deepcopy(body)
        for word, expected in (("apiVersion", resource.api_version), ("kind", resource.kind)):
            if (said := obj.setdefault(word, expected)) != expected:
                raise bad_request(f"{word} in the data ({said}) does not match the expected one ({expected})")
        obj["metadata"] = drop_nulls(obj.get("metadata") or {})
        obj = obj if resource.custom else drop_nulls(obj)
        self._judge_unknown(resource, prune(resource.node, obj), write)
        self._judge_types(resource, obj)
        if resource.custom:
            default(resource.node, obj)
        fill_in(resource, obj)
        return obj

    def _judge_types(self, resource: Resource, obj: Json) -> None:
        """What a Go decoder cannot read is a bad request, before any validation; in custom objects that is metadata."""
        node, part, path = resource.node, obj, ""
        if resource.custom:
            node, part, path = node.properties["metadata"], obj["metadata"], "metadata"
        causes = validate(node, part, path=path)
        if unreadable := [f"{c.field}: {c.message}" for c in causes if c.reason == "FieldValueTypeInvalid"]:
            raise bad_request(f"{_cannot(resource)}: {unreadable[0]}")

    def _judge_unknown(self, resource: Resource, unknown: list[str], write: Write) -> None:
        told = [f'unknown field "{path}"' for path in unknown]
        if told and write.writer.operation == "Apply":
            fields = ", ".join(f".{path}: field not declared in schema" for path in unknown)
            kind = f"{resource.api_version}, Kind={resource.kind}"
            raise ApiError(500, f"failed to create typed patch object ({kind}): {fields}", reason="")
        if told and write.validation == "Strict":
            raise bad_request(f"{_cannot(resource)}: strict decoding error: {', '.join(told)}")
        if write.validation == "Warn":
            write.warnings.extend(told)

    def _placed(self, resource: Resource, namespace: str, obj: Json) -> Json:
        """The object's metadata, with the namespace of the request and a generated name if need be."""
        metadata: Json = obj["metadata"]
        if metadata.get("namespace", namespace) != namespace:
            raise bad_request("the namespace of the provided object does not match the namespace sent on the request")
        if resource.namespaced:
            metadata["namespace"] = namespace
        if not metadata.get("name") and metadata.get("generateName"):
            suffix = "".join(random.choices(_LETTERS, k=5))  # noqa: S311  names are not secrets
            metadata["name"] = metadata["generateName"][:248] + suffix
        if not metadata.get("name"):
            cause = required("metadata.name", "name or generateName is required")
            raise invalid(resource.group, resource.kind, "", [cause])
        return metadata

    def _require_namespace(self, resource: Resource, namespace: str) -> None:
        if not resource.namespaced:
            return
        owner = self.store.shelf("", "namespaces").objects.get(("", namespace))
        if owner is None:
            details = {"name": namespace, "kind": "namespaces"}
            raise ApiError(404, f'namespaces "{namespace}" not found', details=details)
        if "deletionTimestamp" in owner["metadata"]:
            why = f"unable to create new content in namespace {namespace} because it is being terminated"
            cause = {"reason": "NamespaceTerminating", "message": why, "field": "metadata.namespace"}
            raise ApiError(403, f"{resource.full_name} is forbidden: {why}", details={"causes": [cause]})

    def _validate(self, resource: Resource, new: Json, old: Json | None) -> None:
        name = new["metadata"]["name"]
        causes: list[Cause] = list(check_name(resource, name)) if old is None else []
        causes += validate(resource.node, new, ABSENT if old is None else old)
        causes = causes or list(check(resource, new, old))
        if resource.plural == _CRDS and not causes:
            causes = crd_causes(new)
        if causes:
            raise invalid(resource.group, resource.kind, name, causes)

    def _stored(self, resource: Resource, key: Key, obj: Json, write: Write) -> Json:
        if resource.plural == _CRDS:
            obj["status"] = crd_status(obj, now())
        if write.dry_run:
            return obj
        stored = self.store.put(self.shelf(resource), key, obj)
        if resource.plural == _CRDS:
            self._serve(stored)
        return stored

    def _serve(self, crd: Json) -> None:
        self._withdraw(crd)
        for resource in resources_of(crd):
            self.resources[resource.group, resource.version, resource.plural] = resource

    def _withdraw(self, crd: Json) -> None:
        mine = (crd["spec"]["group"], crd["spec"]["names"]["plural"])
        self.resources = {key: r for key, r in self.resources.items() if (r.group, r.plural) != mine}

    # --- changing

    def update(self, resource: Resource, key: Key, change: Callable[[Json], Json], write: Write) -> Json:
        """Replace a stored object by what `change` makes of it; nothing is written if nothing changes.

        Args:
            change: gets a copy of the stored object.
        """
        old = self.get(resource, key)
        new = self._decoded(resource, change(copy.deepcopy(old)), write)
        if "managedFields" not in new["metadata"]:  # a client that leaves them out keeps them; an empty list resets
            _set_owners(new["metadata"], old["metadata"].get("managedFields"))
        self._require_same(resource, key, old, new)
        self._split(resource, old, new, write.writer.subresource)
        self._validate(resource, new, old)
        if write.writer.operation == "Update":
            _set_owners(new["metadata"], record_update(resource.node, old, new, write.writer, now()))
        return self._replaced(resource, key, old, new, write)

    def apply(self, resource: Resource, key: Key, config: Json, write: Write) -> tuple[Json, bool]:
        """Server-side apply; also tells whether the object had to be created."""
        config = self._configuration(resource, key, config, write)
        subresource = write.writer.subresource
        if key in self.shelf(resource).objects:

            def change(live: Json) -> Json:
                return apply_patch(resource.node, live, config, write.writer, force=write.force, now=now())

            return self.update(resource, key, change, write), False
        if subresource:
            raise missing(resource, key[1])
        if config["metadata"].get("uid"):
            raise conflict(resource, key[1], "uid mismatch: the provided object specified a uid, and none exists")
        bare = {"apiVersion": resource.api_version, "kind": resource.kind, "metadata": {"name": key[1]}}
        made = apply_patch(resource.node, bare, config, write.writer, force=True, now=now())
        return self.create(resource, key[0], made, write), True

    def _configuration(self, resource: Resource, key: Key, config: Json, write: Write) -> Json:
        """An applied configuration: complete enough, nothing unknown, and without the part of the other endpoint."""
        if not isinstance(config, dict):
            raise bad_request("an applied configuration is an object")
        if config.get("apiVersion") != resource.api_version or config.get("kind") != resource.kind:
            raise bad_request(f"apiVersion and kind must be set to {resource.api_version} and {resource.kind}")
        config = drop_nulls(config)
        metadata = config.setdefault("metadata", {})
        if metadata.setdefault("name", key[1]) != key[1]:
            raise bad_request(f"metadata.name ({metadata['name']}) does not match the name on the URL ({key[1]})")
        if metadata.pop("managedFields", None):
            raise bad_request("metadata.managedFields must be nil")
        self._judge_unknown(resource, prune(resource.node, config), write)
        if resource.has_status and not write.writer.subresource:
            config.pop("status", None)
        return config

    def _require_same(self, resource: Resource, key: Key, old: Json, new: Json) -> None:
        """The stored object must be the one the client means, unchanged since the client read it."""
        before, after = old["metadata"], new["metadata"]
        if after.get("name", key[1]) != key[1] or after.get("namespace", key[0]) != key[0]:
            raise bad_request("the name or namespace of the object does not match the name or namespace on the URL")
        after.setdefault("name", key[1])
        if after.get("uid", before["uid"]) != before["uid"]:
            why = f"Precondition failed: UID in precondition: {after['uid']}, UID in object meta: {before['uid']}"
            raise conflict(resource, key[1], why)
        if (version := after.get("resourceVersion")) and version != before["resourceVersion"]:
            why = "the object has been modified; please apply your changes to the latest version and try again"
            raise conflict(resource, key[1], why)
        if not version and not resource.unconditional:
            cause = wrong("metadata.resourceVersion", 0, "must be specified for an update")
            raise invalid(resource.group, resource.kind, key[1], [cause])
        added = set(after.get("finalizers", [])) - set(before.get("finalizers", []))
        if "deletionTimestamp" in before and added:
            why = f"no new finalizers can be added if the object is being deleted, found new finalizers {sorted(added)}"
            raise invalid(resource.group, resource.kind, key[1], [forbidden("metadata.finalizers", why)])

    def _split(self, resource: Resource, old: Json, new: Json, subresource: str) -> None:
        """Put back what this endpoint must not change, and count a new generation if the wish has changed."""
        if subresource == "status":
            owners = new["metadata"].get("managedFields")
            status = new.get("status", ABSENT)
            new.clear()
            new |= {word: value for word, value in old.items() if word != "status"}
            new["metadata"] = dict(old["metadata"])
            _set_owners(new["metadata"], owners)
            if status is not ABSENT:
                new["status"] = status
            return
        if resource.has_status:
            new.pop("status", None)
            new |= {"status": old["status"]} if "status" in old else {}
        for word in _KEPT:
            new["metadata"].pop(word, None)
        new["metadata"] |= {word: old["metadata"][word] for word in _KEPT if word in old["metadata"]}
        if "namespace" in old["metadata"]:
            new["metadata"]["namespace"] = old["metadata"]["namespace"]
        if resource.counted and _wish(old) != _wish(new):
            new["metadata"]["generation"] = old["metadata"].get("generation", 0) + 1

    def _replaced(self, resource: Resource, key: Key, old: Json, new: Json, write: Write) -> Json:
        new["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"]
        if resource.plural == _CRDS and not write.writer.subresource:
            new["status"] = crd_status(new, now())
        if new == old:
            return old
        if self._is_over(resource, new) and not write.dry_run:
            return self._removed(resource, key, new)
        return self._stored(resource, key, new, write)

    # --- deleting

    def delete(self, resource: Resource, key: Key, options: Json, *, dry_run: bool = False) -> Json:
        """Delete now, or mark for deletion what finalizers or a running pod still hold.

        Returns:
            The object if it is still there (and always for pods), a Status of success otherwise.
        """
        old = self.get(resource, key)
        self._preconditions(resource, key[1], old, options.get("preconditions") or {})
        if dry_run:
            return old
        new = self._marked(resource, old, options)
        if self._is_over(resource, new):
            last = self._removed(resource, key, new)
            details = {"name": key[1], "group": resource.group, "kind": resource.plural, "uid": old["metadata"]["uid"]}
            return last if resource.plural == "pods" else success(details)
        marked = new if new == old else self.store.put(self.shelf(resource), key, new)
        if (resource.group, resource.plural) == ("", "namespaces"):
            self._empty_namespace(key[1])
        if resource.plural == _CRDS:
            self._delete_customs(marked)
        return self.shelf(resource).objects.get(key, marked)

    def _preconditions(self, resource: Resource, name: str, old: Json, wanted: Json) -> None:
        for word, told in (("uid", "UID"), ("resourceVersion", "ResourceVersion")):
            found = old["metadata"][word]
            if wanted.get(word, found) != found:
                why = f"Precondition failed: {told} in precondition: {wanted[word]}, {told} in object meta: {found}"
                raise conflict(resource, name, why)

    def _marked(self, resource: Resource, old: Json, options: Json) -> Json:
        """The object with its deletion written into it."""
        metadata = dict(old["metadata"])
        finalizers = [f for f in metadata.get("finalizers", []) if f not in _GC_FINALIZERS.values()]
        if held := _GC_FINALIZERS.get(_policy(resource, old, options)):
            finalizers.append(held)
        metadata.pop("finalizers", None)
        metadata |= {"finalizers": finalizers} if finalizers else {}
        grace = _grace(resource, old, options)
        if "deletionTimestamp" not in metadata or grace < metadata.get("deletionGracePeriodSeconds", 0):
            first = "deletionTimestamp" not in metadata
            metadata |= {"deletionTimestamp": now(grace), "deletionGracePeriodSeconds": grace}
            if first and "generation" in metadata:
                metadata["generation"] += 1
        terminating = {"status": old.get("status", {}) | {"phase": "Terminating"}}
        return old | {"metadata": metadata} | (terminating if resource.plural == "namespaces" else {})

    def _is_over(self, resource: Resource, obj: Json) -> bool:
        """Whether nothing holds an object that is being deleted any more."""
        metadata = obj["metadata"]
        if "deletionTimestamp" not in metadata or metadata.get("finalizers"):
            return False
        if resource.plural == "pods":
            return not metadata.get("deletionGracePeriodSeconds")
        if (resource.group, resource.plural) == ("", "namespaces"):
            return not self._contents(metadata["name"])
        if resource.plural == _CRDS:
            spec = obj["spec"]
            return not self.store.shelf(spec["group"], spec["names"]["plural"]).objects
        return True

    def _removed(self, resource: Resource, key: Key, last: Json) -> Json:
        gone = self.store.remove(self.shelf(resource), key, last)
        if resource.plural == _CRDS:
            self._withdraw(last)
            self.store.close(last["spec"]["group"], last["spec"]["names"]["plural"])
        elif resource.custom:
            self._settle(self.resource("apiextensions.k8s.io", "v1", _CRDS), ("", resource.full_name))
        if resource.namespaced:
            self._settle(self.resource("", "v1", "namespaces"), ("", key[0]))
        return gone

    def _settle(self, resource: Resource, key: Key) -> None:
        """Finish the deletion of a namespace or CRD whose last content is gone."""
        holder = self.shelf(resource).objects.get(key)
        if holder and self._is_over(resource, holder):
            self._removed(resource, key, holder)

    def _contents(self, namespace: str) -> list[tuple[Resource, Key]]:
        kinds = {(r.group, r.plural): r for r in self.resources.values() if r.namespaced}
        return [(r, key) for r in kinds.values() for key, _ in self.shelf(r).selected(namespace)]

    def _empty_namespace(self, namespace: str) -> None:
        for resource, key in self._contents(namespace):
            if key in self.shelf(resource).objects:
                self.delete(resource, key, {"propagationPolicy": "Background"})

    def _delete_customs(self, crd: Json) -> None:
        shelf = self.store.shelf(crd["spec"]["group"], crd["spec"]["names"]["plural"])
        resource = next(r for r in self.resources.values() if self.shelf(r) is shelf)
        for key in list(shelf.objects):
            self.delete(resource, key, {})


def seen_as(resource: Resource, obj: Json) -> Json:
    """An object at the version it is asked for; CRDs here know no conversion but the name."""
    return obj if obj["apiVersion"] == resource.api_version else obj | {"apiVersion": resource.api_version}


def _cannot(resource: Resource) -> str:
    return f'{resource.kind} in version "{resource.version}" cannot be handled as a {resource.kind}'


def _wish(obj: Json) -> Json:
    """The part whose change counts as a new generation; a status with an endpoint of its own never differs here."""
    return {word: value for word, value in obj.items() if word not in ("metadata", "apiVersion")}


def _set_owners(metadata: Json, owners: list[Json] | None) -> None:
    metadata.pop("managedFields", None)
    if owners:
        metadata["managedFields"] = owners


def _policy(resource: Resource, old: Json, options: Json) -> str:
    """Who deletes the dependents. Jobs keep their pods unless the client says otherwise: a famous trap, kept here."""
    if said := options.get("propagationPolicy"):
        return str(said)
    if "orphanDependents" in options:
        return "Orphan" if options["orphanDependents"] else "Background"
    held = set(old["metadata"].get("finalizers", []))
    named = next((policy for policy, finalizer in _GC_FINALIZERS.items() if finalizer in held), None)
    return named or ("Orphan" if (resource.group, resource.plural) == ("batch", "jobs") else "Background")


def _grace(resource: Resource, old: Json, options: Json) -> int:
    """Seconds that a pod may take to end; only one that runs on a node needs any."""
    if resource.plural != "pods":
        return 0
    ended = old.get("status", {}).get("phase") in ("Succeeded", "Failed")
    if ended or not old["spec"].get("nodeName"):
        return 0
    said: Any = options.get("gracePeriodSeconds")
    return int(old["spec"]["terminationGracePeriodSeconds"] if said is None else said)
