"""The kinds that the server serves: built-in kinds and those of CRDs, and the fields that creation sets in objects.

Deviation: a CRD has exactly one version.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field

from cgd_local.published import METADATA, definitions
from cgd_local.statuses import Json

_TABLE = """
v1 Namespace namespaces cluster ns status
v1 Node nodes cluster no status
v1 Pod pods namespaced po all,status,log,binding,counted
v1 Service services namespaced svc all,status
v1 ConfigMap configmaps namespaced cm -
v1 Secret secrets namespaced - -
v1 Event events namespaced ev -
v1 ServiceAccount serviceaccounts namespaced sa -
v1 ResourceQuota resourcequotas namespaced quota status
v1 LimitRange limitranges namespaced limits -
scheduling.k8s.io/v1 PriorityClass priorityclasses cluster pc -
apps/v1 Deployment deployments namespaced deploy all,status,counted
batch/v1 Job jobs namespaced - all,status,counted
coordination.k8s.io/v1 Lease leases namespaced - -
policy/v1 PodDisruptionBudget poddisruptionbudgets namespaced pdb status,counted
networking.k8s.io/v1 NetworkPolicy networkpolicies namespaced netpol counted
rbac.authorization.k8s.io/v1 Role roles namespaced - -
rbac.authorization.k8s.io/v1 RoleBinding rolebindings namespaced - -
rbac.authorization.k8s.io/v1 ClusterRole clusterroles cluster - -
rbac.authorization.k8s.io/v1 ClusterRoleBinding clusterrolebindings cluster - -
admissionregistration.k8s.io/v1 ValidatingAdmissionPolicy validatingadmissionpolicies cluster - status,counted
admissionregistration.k8s.io/v1 ValidatingAdmissionPolicyBinding validatingadmissionpolicybindings cluster - counted
apiextensions.k8s.io/v1 CustomResourceDefinition customresourcedefinitions cluster crd status,counted
"""
_AGE: Json = {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}
_COLUMNS = {
    "namespaces": {"Status": ".status.phase"},
    "nodes": {"Ready": '.status.conditions[?(@.type=="Ready")].status'},
    "pods": {"Status": ".status.phase", "Restarts": ".status.containerStatuses[0].restartCount"},
    "jobs": {"Status": ".status.conditions[-1].type", "Active": ".status.active", "Succeeded": ".status.succeeded"},
    "events": {"Type": ".type", "Reason": ".reason", "Object": ".involvedObject.name", "Message": ".message"},
}


@dataclass(frozen=True, kw_only=True)
class Resource:
    """One served kind."""

    group: str
    version: str
    kind: str
    plural: str
    singular: str
    namespaced: bool
    short: list[str]
    categories: list[str]
    subresources: list[str]
    counted: bool = True  # has a generation
    custom: bool = False
    schema: Json
    schema_name: str
    columns: list[Json] = field(default_factory=lambda: [_AGE])

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def full_name(self) -> str:
        """The kind in error messages: `widgets.demo.example.com`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def details(self, name: str) -> Json:
        """The details of a Status about an object of this kind."""
        return {"name": name, "group": self.group, "kind": self.plural}


def builtin_resources() -> list[Resource]:
    """The table above, each kind with its published schema."""
    names = {
        (gvk["group"], gvk["version"], gvk["kind"]): name
        for name, raw in definitions().items()
        for gvk in raw.get("x-kubernetes-group-version-kind", [])
    }
    resources = []
    for line in _TABLE.strip().splitlines():
        api_version, kind, plural, scope, short, listed = line.split()
        group, _, version = api_version.rpartition("/")
        name, traits, columns = names[group, version, kind], listed.split(","), _COLUMNS.get(plural, {})
        resource = Resource(
            group=group,
            version=version,
            kind=kind,
            plural=plural,
            singular=kind.lower(),
            namespaced=scope == "namespaced",
            short=[short] if short != "-" else [],
            categories=["all"] if "all" in traits else [],
            subresources=[part for part in ("status", "log", "binding") if part in traits],
            counted="counted" in traits,
            schema=definitions()[name],
            schema_name=name,
            columns=[*({"name": head, "type": "string", "jsonPath": path} for head, path in columns.items()), _AGE],
        )
        resources.append(resource)
    return resources


def custom_resource(crd: Json) -> Resource:
    """The kind of a CRD, at its only version."""
    spec, names = crd["spec"], _names(crd["spec"])
    (version,) = spec["versions"]
    gvk = {"group": spec["group"], "version": version["name"], "kind": names["kind"]}
    raw = version["schema"]["openAPIV3Schema"]
    head = {word: {"type": "string", "description": f"The {word} of the object."} for word in ("apiVersion", "kind")}
    properties = raw.get("properties", {}) | head | {"metadata": {"$ref": f"#/$defs/{METADATA}"}}
    return Resource(
        **gvk,
        plural=names["plural"],
        singular=names["singular"],
        namespaced=spec["scope"] == "Namespaced",
        short=names.get("shortNames", []),
        categories=names.get("categories", []),
        subresources=["status"] if "status" in version.get("subresources", {}) else [],
        custom=True,
        schema=raw | {"properties": properties, "x-kubernetes-group-version-kind": [gvk]},
        schema_name=".".join([*reversed(spec["group"].split(".")), version["name"], names["kind"]]),
        columns=version.get("additionalPrinterColumns", [_AGE]),
    )


def fill_in(resource: Resource, obj: Json) -> None:
    """Set, in place, the defaults that a schema cannot express, before those of the schema."""
    match resource.full_name:
        case "jobs.batch":
            spec = obj.setdefault("spec", {})
            if "backoffLimitPerIndex" in spec:
                spec.setdefault("backoffLimit", 2**31 - 1)
            if "parallelism" not in spec:
                spec.setdefault("completions", 1)
        case "secrets":
            plain = obj.pop("stringData", {})
            encoded = {name: base64.b64encode(text.encode()).decode() for name, text in plain.items()}
            obj |= {"data": obj.get("data", {}) | encoded} if encoded else {}


def begin(resource: Resource, obj: Json, now: str) -> None:
    """Set, in place, what creation sets: a first status, and for Jobs the labels that select their pods."""
    if "status" in resource.subresources and resource.plural != "nodes":  # a node registers with its status
        obj.pop("status", None)
    match resource.full_name:
        case "pods":
            obj["status"] = {"phase": "Pending"}
        case "namespaces":
            labels = obj["metadata"].get("labels", {})
            obj["metadata"]["labels"] = labels | {"kubernetes.io/metadata.name": obj["metadata"]["name"]}
            obj["status"] = {"phase": "Active"}
        case "jobs.batch":
            name, uid = obj["metadata"]["name"], obj["metadata"]["uid"]
            labels = obj["spec"]["template"].setdefault("metadata", {}).setdefault("labels", {})
            labels |= {"batch.kubernetes.io/controller-uid": uid, "batch.kubernetes.io/job-name": name}
            labels |= {"controller-uid": uid, "job-name": name}
            obj["spec"]["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}
        case "customresourcedefinitions.apiextensions.k8s.io":  # the real server's controllers write it a moment later
            spec = obj["spec"]
            accepted = {"status": "True", "lastTransitionTime": now, "reason": "Accepted"}
            accepted["message"] = "the names are accepted"
            conditions = [{"type": kind} | accepted for kind in ("NamesAccepted", "Established")]
            versions = [version["name"] for version in spec["versions"]]
            obj["status"] = {"conditions": conditions, "acceptedNames": _names(spec), "storedVersions": versions}


def _names(spec: Json) -> Json:
    return {"singular": spec["names"]["kind"].lower(), "listKind": f"{spec['names']['kind']}List", **spec["names"]}
