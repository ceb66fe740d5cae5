"""The kinds this server knows from birth, and the little that their real admission adds to an object.

Each kind's fields come from the published schemas; only defaults and checks that clients notice are written here.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cgd_local.schema import Node, definition, definitions
from cgd_local.statuses import Cause, Json, duplicate, forbidden, required, unsupported, wrong

_TABLE = """
v1 namespaces Namespace cluster ns - status,nospec
v1 nodes Node cluster no - status,nospec
v1 pods Pod namespaced po all status,log,binding
v1 services Service namespaced svc all status,nospec
v1 configmaps ConfigMap namespaced cm - -
v1 secrets Secret namespaced - - -
v1 events Event namespaced ev - -
v1 serviceaccounts ServiceAccount namespaced sa - -
v1 persistentvolumeclaims PersistentVolumeClaim namespaced pvc - status,nospec
apps/v1 deployments Deployment namespaced deploy all status
apps/v1 replicasets ReplicaSet namespaced rs all status
apps/v1 statefulsets StatefulSet namespaced sts all status
apps/v1 daemonsets DaemonSet namespaced ds all status
batch/v1 jobs Job namespaced - all status
batch/v1 cronjobs CronJob namespaced cj all status
coordination.k8s.io/v1 leases Lease namespaced - - nospec
policy/v1 poddisruptionbudgets PodDisruptionBudget namespaced pdb - status
networking.k8s.io/v1 networkpolicies NetworkPolicy namespaced netpol - -
rbac.authorization.k8s.io/v1 roles Role namespaced - - -
rbac.authorization.k8s.io/v1 rolebindings RoleBinding namespaced - - -
rbac.authorization.k8s.io/v1 clusterroles ClusterRole cluster - - -
rbac.authorization.k8s.io/v1 clusterrolebindings ClusterRoleBinding cluster - - -
apiextensions.k8s.io/v1 customresourcedefinitions CustomResourceDefinition cluster crd,crds api-extensions status
"""
VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = rf"{_LABEL}(\.{_LABEL})*"
_STANDARD_FINALIZERS = {"orphan", "foregroundDeletion", "kubernetes"}
_WORD = r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]"


@dataclass(frozen=True, kw_only=True)
class Resource:
    """One served kind at one version."""

    group: str
    version: str
    plural: str
    singular: str
    kind: str
    namespaced: bool
    short: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    subresources: tuple[str, ...] = ()
    counted: bool = True  # has a generation
    custom: bool = False
    node: Node
    schema: Json = field(default_factory=dict)
    columns: tuple[Json, ...] = ()

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def full_name(self) -> str:
        """As error messages name it: `widgets.demo.example.com`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def has_status(self) -> bool:
        return "status" in self.subresources

    @property
    def unconditional(self) -> bool:
        """Whether a PUT may come without a resourceVersion."""
        return not self.custom and self.plural not in ("leases", "customresourcedefinitions")


def builtin_resources() -> list[Resource]:
    """The table above, each kind with the node of its published schema."""
    names = {
        (gvk["group"], gvk["version"], gvk["kind"]): name
        for name, raw in definitions().items()
        for gvk in raw.get("x-kubernetes-group-version-kind", [])
    }
    return [_builtin(line.split(), names) for line in _TABLE.strip().splitlines()]


def _builtin(words: list[str], names: dict[tuple[str, str, str], str]) -> Resource:
    api_version, plural, kind, scope, short, categories, traits = words
    group, _, version = api_version.rpartition("/")
    name = names[group, version, kind]
    has_spec = "spec" in definitions()[name]["properties"]
    parts = tuple(part for part in traits.split(",") if part not in ("-", "nospec"))
    return Resource(
        group=group,
        version=version,
        plural=plural,
        singular=kind.lower(),
        kind=kind,
        namespaced=scope == "namespaced",
        short=() if short == "-" else tuple(short.split(",")),
        categories=() if categories == "-" else tuple(categories.split(",")),
        subresources=parts,
        counted=has_spec and "nospec" not in traits,
        node=definition(name),
        schema={"$ref": f"#/$defs/{name}"},
    )


# --- defaults


def fill_in(resource: Resource, obj: Json) -> None:
    """Defaults of built-in kinds, in place: those that clients and controllers here read."""
    if resource.custom:
        return
    spec = obj.setdefault("spec", {}) if "spec" in resource.node.properties else {}
    if filler := _DEFAULTS.get(resource.plural):
        filler(obj, spec)
    if isinstance(template := spec.get("template"), dict):
        _pod_defaults(template.setdefault("spec", {}))


def _pod_defaults(spec: Json) -> None:
    spec.setdefault("restartPolicy", "Always")
    spec.setdefault("enableServiceLinks", True)
    spec.setdefault("terminationGracePeriodSeconds", 30)
    spec.setdefault("dnsPolicy", "ClusterFirst")
    spec.setdefault("schedulerName", "default-scheduler")
    spec.setdefault("securityContext", {})
    for container in spec.get("initContainers", []) + spec.get("containers", []):
        container.setdefault("terminationMessagePath", "/dev/termination-log")
        container.setdefault("terminationMessagePolicy", "File")
        latest = ":" not in container.get("image", "").rsplit("/", 1)[-1] or container["image"].endswith(":latest")
        container.setdefault("imagePullPolicy", "Always" if latest else "IfNotPresent")
        container.setdefault("resources", {})
        for port in container.get("ports", []):
            port.setdefault("protocol", "TCP")
        _requests_default(container["resources"])
        for env in container.get("env", []):
            if reference := env.get("valueFrom", {}).get("fieldRef"):
                reference.setdefault("apiVersion", "v1")
    for volume in spec.get("volumes", []):
        for source in ("configMap", "secret", "projected"):
            if source in volume:
                volume[source].setdefault("defaultMode", 420)


def _requests_default(resources: Json) -> None:
    """A limit without a request is its own request."""
    if limits := resources.get("limits"):
        resources["requests"] = limits | resources.get("requests", {})


def _job_defaults(_: Json, spec: Json) -> None:
    spec.setdefault("backoffLimit", 2**31 - 1 if "backoffLimitPerIndex" in spec else 6)
    if "completions" not in spec and "parallelism" not in spec:
        spec["completions"] = 1
    spec.setdefault("parallelism", 1)
    spec.setdefault("completionMode", "NonIndexed")
    spec.setdefault("suspend", False)
    spec.setdefault("manualSelector", False)
    spec.setdefault("podReplacementPolicy", "Failed" if "podFailurePolicy" in spec else "TerminatingOrFailed")


def _secret_defaults(obj: Json, _: Json) -> None:
    obj.setdefault("type", "Opaque")
    plain = obj.pop("stringData", {})
    if plain:
        encoded = {name: base64.b64encode(text.encode()).decode() for name, text in plain.items()}
        obj["data"] = obj.get("data", {}) | encoded


_DEFAULTS: dict[str, Callable[[Json, Json], None]] = {
    "pods": lambda _, spec: _pod_defaults(spec),
    "jobs": _job_defaults,
    "secrets": _secret_defaults,
    "services": lambda _, spec: spec.setdefault("type", "ClusterIP"),
    "namespaces": lambda _, spec: spec.setdefault("finalizers", ["kubernetes"]),
    "deployments": lambda _, spec: spec.setdefault("replicas", 1),
    "replicasets": lambda _, spec: spec.setdefault("replicas", 1),
    "statefulsets": lambda _, spec: spec.setdefault("replicas", 1),
    "cronjobs": lambda _, spec: (spec.setdefault("suspend", False), spec.setdefault("concurrencyPolicy", "Allow"))[1],
}
_FIRST_STATUS: dict[str, Json] = {
    "pods": {"phase": "Pending", "qosClass": "BestEffort"},
    "namespaces": {"phase": "Active"},
    "persistentvolumeclaims": {"phase": "Pending"},
    "services": {"loadBalancer": {}},
}


def prepare_create(resource: Resource, obj: Json) -> None:
    """What creation sets, in place: a first status, and for Jobs the labels by which their pods are found."""
    if resource.has_status and resource.plural != "nodes":
        obj.pop("status", None)
        if not resource.custom:
            obj["status"] = dict(_FIRST_STATUS.get(resource.plural, {}))
    if (resource.group, resource.plural) == ("", "namespaces"):
        labels = obj["metadata"].setdefault("labels", {})
        labels["kubernetes.io/metadata.name"] = obj["metadata"]["name"]
    if (resource.group, resource.plural) == ("batch", "jobs") and not obj["spec"].get("manualSelector"):
        _select_own_pods(obj)


def _select_own_pods(job: Json) -> None:
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    template = job["spec"].setdefault("template", {}).setdefault("metadata", {}).setdefault("labels", {})
    template |= {"batch.kubernetes.io/controller-uid": uid, "batch.kubernetes.io/job-name": name}
    template |= {"controller-uid": uid, "job-name": name}
    job["spec"]["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}


# --- checks


def check_name(resource: Resource, name: str) -> Iterator[Cause]:
    """The rule for names: a DNS subdomain, shorter and stricter where the kind's name becomes a host name."""
    if resource.group == "rbac.authorization.k8s.io":
        return
    label = resource.plural in ("namespaces", "services")
    if re.fullmatch(_LABEL if label else _SUBDOMAIN, name) and len(name) <= (63 if label else 253):
        return
    if len(name) > (63 if label else 253):
        yield wrong("metadata.name", name, f"must be no more than {63 if label else 253} characters")
        return
    what = "label" if label else "subdomain"
    allowed = "'-'" if label else "'-' or '.'"
    sample, pattern = ("'my-name',  or '123-abc'", _LABEL) if label else ("'example.com'", _SUBDOMAIN)
    yield wrong(
        "metadata.name",
        name,
        f"a lowercase RFC 1123 {what} must consist of lower case alphanumeric characters, {allowed}, and must start "
        f"and end with an alphanumeric character (e.g. {sample}, regex used for validation is '{pattern}')",
    )


def check_labels(labels: Json, path: str) -> Iterator[Cause]:
    for key, value in labels.items():
        prefix, _, name = key.rpartition("/")
        if not re.fullmatch(_WORD, name) or len(name) > 63 or (prefix and not re.fullmatch(_SUBDOMAIN, prefix)):
            yield wrong(path, key, "name part must consist of alphanumeric characters, '-', '_' or '.'")
        if len(value) > 63:
            yield wrong(path, value, "must be no more than 63 characters")
        elif value and not re.fullmatch(_WORD, value):
            yield wrong(
                path,
                value,
                "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and "
                "must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex "
                f"used for validation is '({_WORD})?')",
            )


def check(resource: Resource, new: Json, old: Json | None) -> Iterator[Cause]:
    """Checks beyond the schema, for what a controller author gets wrong: pods, job rules, immutable fields."""
    yield from check_labels(new["metadata"].get("labels") or {}, "metadata.labels")
    for name in new["metadata"].get("finalizers", []):
        if "/" not in name and name not in _STANDARD_FINALIZERS:
            yield wrong(
                "metadata.finalizers", name, "name is neither a standard finalizer name nor is it fully qualified"
            )
    if resource.custom:
        return
    if checker := _CHECKS.get(resource.plural):
        yield from checker(new, old)


def _check_pod(new: Json, old: Json | None) -> Iterator[Cause]:
    if old is None:
        yield from _check_pod_spec(new["spec"], "spec")
    elif _fixed(new["spec"]) != _fixed(old["spec"]):
        yield forbidden(
            "spec",
            "pod updates may not change fields other than `spec.containers[*].image`, `spec.initContainers[*].image`, "
            "`spec.activeDeadlineSeconds`, `spec.tolerations` (only additions to existing tolerations), "
            "`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)",
        )


def _fixed(spec: Json) -> Json:
    free = {"activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds", "nodeName"}
    fixed = {key: value for key, value in spec.items() if key not in free}
    for word in ("containers", "initContainers"):
        fixed[word] = [{k: v for k, v in item.items() if k != "image"} for item in spec.get(word, [])]
    return fixed


def _check_pod_spec(spec: Json, path: str) -> Iterator[Cause]:
    if not spec.get("containers"):
        yield required(f"{path}.containers")
    if (policy := spec.get("restartPolicy")) not in ("Always", "OnFailure", "Never"):
        yield unsupported(f"{path}.restartPolicy", policy, ["Always", "OnFailure", "Never"])
    volumes = [volume.get("name", "") for volume in spec.get("volumes", [])]
    yield from _names(volumes, f"{path}.volumes")
    for word in ("initContainers", "containers"):
        containers = spec.get(word, [])
        yield from _names([item.get("name", "") for item in containers], f"{path}.{word}")
        for index, container in enumerate(containers):
            yield from _check_container(container, volumes, f"{path}.{word}[{index}]")


def _names(names: list[str], path: str) -> Iterator[Cause]:
    for index, name in enumerate(names):
        where = f"{path}[{index}].name"
        if not name:
            yield required(where)
        elif not re.fullmatch(_LABEL, name) or len(name) > 63:
            yield wrong(
                where, name, "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-'"
            )
        elif name in names[:index]:
            yield duplicate(where, name)


def _check_container(container: Json, volumes: list[str], path: str) -> Iterator[Cause]:
    if not container.get("image"):
        yield required(f"{path}.image")
    for index, mount in enumerate(container.get("volumeMounts", [])):
        if mount["name"] not in volumes:
            message = f'Not found: "{mount["name"]}"'
            yield Cause(f"{path}.volumeMounts[{index}].name", "FieldValueNotFound", message)
    for index, env in enumerate(container.get("env", [])):
        if not re.fullmatch(r"[^=\x00-\x1f\x7f-\uffff]+", env.get("name", "")):
            yield wrong(f"{path}.env[{index}].name", env.get("name", ""), "a valid environment variable name is needed")
        if env.get("value") and "valueFrom" in env:
            yield wrong(f"{path}.env[{index}].valueFrom", "", "may not be specified when `value` is not empty")
    yield from _check_resources(container["resources"], f"{path}.resources")


def _check_resources(resources: Json, path: str) -> Iterator[Cause]:
    limits = resources.get("limits", {})
    for group in ("limits", "requests"):
        for name, amount in resources.get(group, {}).items():
            if (number := quantity(amount)) is None:
                yield wrong(
                    f"{path}.{group}[{name}]", amount, "a quantity is a number with a suffix such as m, k or Gi"
                )
            elif name in limits and number > (quantity(limits[name]) or number):
                why = f"must be less than or equal to {name} limit of {limits[name]}"
                yield wrong(f"{path}.{group}[{name}]", amount, why)


_SUFFIXES = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3}
_SUFFIXES |= {letter: 1000.0**power for power, letter in enumerate("kMGTPE", 1)}
_SUFFIXES |= {f"{letter}i": 1024.0**power for power, letter in enumerate("KMGTPE", 1)}


def quantity(amount: object) -> float | None:
    """A Kubernetes quantity as a number, None if it is none."""
    found = re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)([a-zA-Z]*)", str(amount))
    if not found or found[2] not in _SUFFIXES:
        return None
    return float(found[1]) * _SUFFIXES[found[2]]


def _check_job(new: Json, old: Json | None) -> Iterator[Cause]:
    spec = new["spec"]
    if old is not None:
        yield from _check_job_update(spec, old["spec"])
        return
    template = spec.get("template", {})
    yield from check_labels(template.get("metadata", {}).get("labels") or {}, "spec.template.labels")
    yield from _check_pod_spec(template.get("spec", {}), "spec.template.spec")
    policy = template.get("spec", {}).get("restartPolicy")
    if policy not in ("OnFailure", "Never"):
        why = 'Required value: valid values: "OnFailure", "Never"'
        bad = unsupported("spec.template.spec.restartPolicy", policy, ["OnFailure", "Never"])
        yield bad if policy != "Always" else Cause(bad.field, "FieldValueRequired", why)
    yield from _check_indexed(new, spec)
    if "podFailurePolicy" in spec and policy != "Never":
        where = "spec.template.spec.restartPolicy"
        yield wrong(where, policy, 'only "Never" is supported when podFailurePolicy is specified')
    for word in ("parallelism", "completions", "backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"):
        if spec.get(word, 0) < 0:
            yield wrong(f"spec.{word}", spec[word], "must be greater than or equal to 0")


def _check_indexed(job: Json, spec: Json) -> Iterator[Cause]:
    mode = spec["completionMode"]
    if mode not in ("Indexed", "NonIndexed"):
        yield unsupported("spec.completionMode", mode, ["Indexed", "NonIndexed"])
    if mode == "Indexed" and "completions" not in spec:
        yield required("spec.completions", "when completion mode is Indexed")
    last = f"{job['metadata']['name']}-{max(spec.get('completions', 1) - 1, 0)}"
    if mode == "Indexed" and (len(last) > 63 or not re.fullmatch(_LABEL, last)):
        yield wrong(
            "metadata.name",
            last,
            "will not able to create pod with invalid DNS label: must be no more than 63 characters",
        )
    if mode != "Indexed" and "backoffLimitPerIndex" in spec:
        yield wrong("spec.backoffLimitPerIndex", spec["backoffLimitPerIndex"], "requires indexed completion mode")
    if "maxFailedIndexes" in spec and "backoffLimitPerIndex" not in spec:
        yield required("spec.backoffLimitPerIndex", "when maxFailedIndexes is specified")


def _check_job_update(spec: Json, old: Json) -> Iterator[Cause]:
    may_scale = spec["completionMode"] == "Indexed" and spec.get("completions") == spec.get("parallelism")
    for word in ("completions", "selector", "template", "completionMode", "podFailurePolicy", "backoffLimitPerIndex"):
        if spec.get(word) != old.get(word) and not (word == "completions" and may_scale):
            yield wrong(f"spec.{word}", spec.get(word), "field is immutable")


def _check_data(new: Json, old: Json | None) -> Iterator[Cause]:
    for word in ("data", "binaryData"):
        for key in new.get(word) or {}:
            if not re.fullmatch(r"[-._a-zA-Z0-9]+", key) or len(key) > 253:
                yield wrong(
                    f"{word}[{key}]", key, "a valid config key must consist of alphanumeric characters, '-', '_' or '.'"
                )
    size = sum(len(text) for word in ("data", "binaryData") for text in (new.get(word) or {}).values())
    if size > 2**20:
        yield Cause("data", "FieldValueTooLong", "Too long: may not be more than 1048576 bytes")
    if old and old.get("immutable"):
        for word in ("data", "binaryData", "immutable"):
            if new.get(word) != old.get(word):
                yield forbidden(word, "field is immutable when `immutable` is set")


_CHECKS: dict[str, Callable[[Json, Json | None], Iterator[Cause]]] = {
    "pods": _check_pod,
    "jobs": _check_job,
    "configmaps": _check_data,
    "secrets": _check_data,
}
_FIELDS = {
    "pods": ("spec.nodeName", "spec.restartPolicy", "status.phase", "status.podIP"),
    "events": (
        *(f"involvedObject.{word}" for word in ("kind", "namespace", "name", "uid", "apiVersion", "resourceVersion")),
        *("involvedObject.fieldPath", "reason", "reportingComponent", "source", "type"),
    ),
    "jobs": ("status.successful",),
    "namespaces": ("status.phase",),
    "nodes": ("spec.unschedulable",),
    "secrets": ("type",),
}


def selectable_fields(resource: Resource) -> set[str]:
    """What a field selector may name for this kind."""
    return {"metadata.name", "metadata.namespace", *(() if resource.custom else _FIELDS.get(resource.plural, ()))}


def field_value(obj: Json, path: str) -> str:
    value: Any = obj
    for word in path.split("."):
        value = value.get(word) if isinstance(value, dict) else None
    return "" if value is None or value == {} else str(value)
