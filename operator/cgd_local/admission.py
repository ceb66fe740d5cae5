"""Admission of new pods: what the API server's plugins ServiceAccount, Priority, LimitRanger and PodSecurity refuse, in
their words. Nothing is enforced but by objects that are there. ResourceQuotas judge every kind, see `quotas`.

Deviations: the ServiceAccount `default` is always there; LimitRanges count by container alone; of the Pod Security
Standards the fields that a template or an injected container usually meets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from cgd_local.quotas import containers, quantity
from cgd_local.statuses import ApiError, Json

if TYPE_CHECKING:
    from cgd_local.registry import Registry

ENFORCE = "pod-security.kubernetes.io/enforce"
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
CAPABILITIES = {
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "SETFCAP",
    "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
}  # fmt: skip
"""Those that `baseline` lets a container add."""


def admit(registry: Registry, pod: Json) -> None:
    """Judge a new pod, which gets the defaults of LimitRanges.

    Raises:
        ApiError: 403, as the plugin says it.
    """
    namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
    limits = [one for each in _there(registry, "limitranges", namespace) for one in each["spec"]["limits"]]
    limits = [one for one in limits if one["type"] == "Container"]
    _fill(pod, limits)
    troubles = (
        _service_account(registry, pod),
        _priority(registry, pod),
        _together(_beyond(pod, limits)),
        _insecure(registry, pod),
    )
    if trouble := next(filter(None, troubles), ""):
        raise ApiError(403, f'pods "{name}" is forbidden: {trouble}', details={"name": name, "kind": "pods"})


def _there(registry: Registry, resource: str, namespace: str) -> list[Json]:
    return list(registry.shelf(registry.resources[resource]).within(namespace))


def _service_account(registry: Registry, pod: Json) -> str:
    namespace, name = pod["metadata"]["namespace"], pod["spec"].get("serviceAccountName", "default")
    known = {"default"} | {one["metadata"]["name"] for one in _there(registry, "serviceaccounts", namespace)}
    missing = f'error looking up service account {namespace}/{name}: serviceaccount "{name}" not found'
    return "" if name in known else missing


def _priority(registry: Registry, pod: Json) -> str:
    name = pod["spec"].get("priorityClassName", "system-node-critical")
    known = {one["metadata"]["name"] for one in _there(registry, "priorityclasses.scheduling.k8s.io", "")}
    is_known = name in known | {"system-node-critical", "system-cluster-critical"}
    return "" if is_known else f"no PriorityClass with name {name} was found"


# --- LimitRange


def _fill(pod: Json, limits: list[Json]) -> None:
    """Requests and limits by default: of the API, a limit as the request; then of each LimitRange."""
    for container in containers(pod["spec"]):
        resources = container.setdefault("resources", {})
        for one in limits:
            most = one.get("max", {}) | one.get("default", {})
            resources["limits"] = most | resources.get("limits", {})
            least = one.get("min", {}) | one.get("default", {}) | one.get("defaultRequest", {})
            resources["requests"] = least | resources.get("requests", {})
        if asked := {**resources.get("limits", {}), **resources.get("requests", {})}:
            resources["requests"] = asked


def _beyond(pod: Json, limits: list[Json]) -> Iterator[str]:
    for container in containers(pod["spec"]):
        resources = container["resources"]
        for one in limits:
            for name, most in one.get("max", {}).items():
                limit = resources["limits"][name]
                if quantity(limit) > quantity(most):
                    yield f"maximum {name} usage per Container is {most}, but limit is {limit}"
            for name, least in one.get("min", {}).items():
                request = resources["requests"][name]
                if quantity(request) < quantity(least):
                    yield f"minimum {name} usage per Container is {least}, but request is {request}"


def _together(troubles: Iterable[str]) -> str:
    found = list(troubles)
    return f"[{', '.join(found)}]" if len(found) > 1 else "".join(found)


# --- Pod Security Standards


def _insecure(registry: Registry, pod: Json) -> str:
    space = registry.get(registry.resources["namespaces"], ("", pod["metadata"]["namespace"]))
    level = space["metadata"].get("labels", {}).get(ENFORCE, "privileged")
    troubles = [] if level == "privileged" else list(_baseline(pod["spec"]))
    if level == "restricted":
        troubles += _restricted(pod)
    return f'violates PodSecurity "{level}:latest": {", ".join(troubles)}' if troubles else ""


def _baseline(spec: Json) -> Iterator[str]:
    contexts = _contexts(spec)
    if hosts := [f"{one}=true" for one in ("hostNetwork", "hostPID", "hostIPC") if spec.get(one)]:
        yield f"host namespaces ({', '.join(hosts)})"
    if bad := [name for name, own in contexts.items() if own.get("privileged")]:
        yield f"privileged ({_named(bad)} must not set securityContext.privileged=true)"
    for name, own in contexts.items():
        for added in set(own.get("capabilities", {}).get("add", [])) - CAPABILITIES:
            why = f'must not include "{added}" in securityContext.capabilities.add'
            yield f"non-default capabilities ({_named([name])} {why})"
    for volume in spec.get("volumes", []):
        if "hostPath" in volume:
            yield f'hostPath volumes (volume "{volume["name"]}")'


def _restricted(pod: Json) -> Iterator[str]:
    spec, contexts = pod["spec"], _contexts(pod["spec"])
    whole = spec.get("securityContext") or {}
    if bad := [name for name, own in contexts.items() if own.get("allowPrivilegeEscalation") is not False]:
        must = "must set securityContext.allowPrivilegeEscalation=false"
        yield f"allowPrivilegeEscalation != false ({_named(bad)} {must})"
    if bad := [name for name, own in contexts.items() if "ALL" not in own.get("capabilities", {}).get("drop", [])]:
        yield f'unrestricted capabilities ({_named(bad)} must set securityContext.capabilities.drop=["ALL"])'
    for volume in spec.get("volumes", []):
        for kind in volume.keys() - VOLUMES - {"name"}:
            yield f'restricted volume types (volume "{volume["name"]}" uses restricted volume type "{kind}")'
    if bad := [name for name, own in contexts.items() if not own.get("runAsNonRoot", whole.get("runAsNonRoot"))]:
        yield f"runAsNonRoot != true (pod or {_named(bad)} must set securityContext.runAsNonRoot=true)"
    if bad := [name for name, own in contexts.items() if own.get("runAsUser", whole.get("runAsUser")) == 0]:
        yield f"runAsUser=0 ({_named(bad)} must not set runAsUser=0)"
    safe = ("RuntimeDefault", "Localhost")
    profiles = {name: own.get("seccompProfile", whole.get("seccompProfile", {})) for name, own in contexts.items()}
    if bad := [name for name, profile in profiles.items() if profile.get("type") not in safe]:
        must = 'must set securityContext.seccompProfile.type to "RuntimeDefault" or "Localhost"'
        yield f"seccompProfile (pod or {_named(bad)} {must})"


def _contexts(spec: Json) -> dict[str, Json]:
    return {one["name"]: one.get("securityContext") or {} for one in containers(spec)}


def _named(names: list[str]) -> str:
    return ("container " if len(names) == 1 else "containers ") + ", ".join(f'"{name}"' for name in names)
