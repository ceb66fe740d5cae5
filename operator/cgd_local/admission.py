"""Admission of new pods: what the API server's plugins ServiceAccount, Priority, LimitRanger and PodSecurity refuse, in
their words. Only objects that exist are enforced. `quotas` holds the ResourceQuotas, which judge every kind.

Deviations: the ServiceAccount `default` always exists; LimitRanges apply to containers only; the Pod Security Standards
cover the fields that a template or an injected container usually sets.
"""

from __future__ import annotations

from collections.abc import Iterator
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
"""The capabilities that `baseline` lets a container add."""


def admit(registry: Registry, pod: Json) -> None:
    """Judge a new pod, and give it the defaults of LimitRanges.

    Raises:
        ApiError: 403, in the plugin's words.
    """
    namespace, name, spec = pod["metadata"]["namespace"], pod["metadata"]["name"], pod["spec"]
    ranges = [limit for limits in _list(registry, "limitranges", namespace) for limit in limits["spec"]["limits"]]
    ranges = [limit for limit in ranges if limit["type"] == "Container"]
    _fill(pod, ranges)
    account, priority = spec.get("serviceAccountName", "default"), spec.get("priorityClassName", "system-node-critical")
    accounts = {"default"} | {item["metadata"]["name"] for item in _list(registry, "serviceaccounts", namespace)}
    classes = {item["metadata"]["name"] for item in _list(registry, "priorityclasses.scheduling.k8s.io", "")}
    trouble = ""
    if account not in accounts:
        trouble = f'error looking up service account {namespace}/{account}: serviceaccount "{account}" not found'
    elif priority not in classes | {"system-node-critical", "system-cluster-critical"}:
        trouble = f"no PriorityClass with name {priority} was found"
    elif violations := list(_beyond(pod, ranges)):
        trouble = f"[{', '.join(violations)}]" if len(violations) > 1 else violations[0]
    else:
        home = registry.get(registry.resources["namespaces"], ("", namespace))
        level = home["metadata"].get("labels", {}).get(ENFORCE, "privileged")
        violations = [] if level == "privileged" else list(_baseline(spec))
        violations += _restricted(pod) if level == "restricted" else []
        if violations:
            trouble = f'violates PodSecurity "{level}:latest": {", ".join(violations)}'
    if trouble:
        raise ApiError(403, f'pods "{name}" is forbidden: {trouble}', details={"name": name, "kind": "pods"})


def _list(registry: Registry, resource: str, namespace: str) -> list[Json]:
    return list(registry.shelf(registry.resources[resource]).within(namespace))


# --- LimitRange


def _fill(pod: Json, ranges: list[Json]) -> None:
    """Set default requests and limits: those of each LimitRange, and the API's, which takes a limit for a request."""
    for container in containers(pod["spec"]):
        resources = container.setdefault("resources", {})
        for limit in ranges:
            most = limit.get("max", {}) | limit.get("default", {})
            resources["limits"] = most | resources.get("limits", {})
            least = limit.get("min", {}) | limit.get("default", {}) | limit.get("defaultRequest", {})
            resources["requests"] = least | resources.get("requests", {})
        if requests := {**resources.get("limits", {}), **resources.get("requests", {})}:
            resources["requests"] = requests


def _beyond(pod: Json, ranges: list[Json]) -> Iterator[str]:
    for container in containers(pod["spec"]):
        resources = container["resources"]
        for bounds in ranges:
            for name, most in bounds.get("max", {}).items():
                limit = resources["limits"][name]
                if quantity(limit) > quantity(most):
                    yield f"maximum {name} usage per Container is {most}, but limit is {limit}"
            for name, least in bounds.get("min", {}).items():
                request = resources["requests"][name]
                if quantity(request) < quantity(least):
                    yield f"minimum {name} usage per Container is {least}, but request is {request}"


# --- Pod Security Standards


def _baseline(spec: Json) -> Iterator[str]:
    contexts = _contexts(spec)
    if hosts := [f"{field}=true" for field in ("hostNetwork", "hostPID", "hostIPC") if spec.get(field)]:
        yield f"host namespaces ({', '.join(hosts)})"
    if names := [name for name, context in contexts.items() if context.get("privileged")]:
        yield f"privileged ({_named(names)} must not set securityContext.privileged=true)"
    for name, context in contexts.items():
        for added in set(context.get("capabilities", {}).get("add", [])) - CAPABILITIES:
            why = f'must not include "{added}" in securityContext.capabilities.add'
            yield f"non-default capabilities ({_named([name])} {why})"
    for volume in spec.get("volumes", []):
        if "hostPath" in volume:
            yield f'hostPath volumes (volume "{volume["name"]}")'


def _restricted(pod: Json) -> Iterator[str]:
    spec, contexts = pod["spec"], _contexts(pod["spec"])
    of_pod = spec.get("securityContext") or {}
    if names := [name for name, context in contexts.items() if context.get("allowPrivilegeEscalation") is not False]:
        must = "must set securityContext.allowPrivilegeEscalation=false"
        yield f"allowPrivilegeEscalation != false ({_named(names)} {must})"
    if names := [
        name for name, context in contexts.items() if "ALL" not in context.get("capabilities", {}).get("drop", [])
    ]:
        yield f'unrestricted capabilities ({_named(names)} must set securityContext.capabilities.drop=["ALL"])'
    for volume in spec.get("volumes", []):
        for kind in volume.keys() - VOLUMES - {"name"}:
            yield f'restricted volume types (volume "{volume["name"]}" uses restricted volume type "{kind}")'
    if names := [
        name for name, context in contexts.items() if not context.get("runAsNonRoot", of_pod.get("runAsNonRoot"))
    ]:
        yield f"runAsNonRoot != true (pod or {_named(names)} must set securityContext.runAsNonRoot=true)"
    if names := [name for name, context in contexts.items() if context.get("runAsUser", of_pod.get("runAsUser")) == 0]:
        yield f"runAsUser=0 ({_named(names)} must not set runAsUser=0)"
    safe = ("RuntimeDefault", "Localhost")
    profiles = {
        name: context.get("seccompProfile", of_pod.get("seccompProfile", {})) for name, context in contexts.items()
    }
    if names := [name for name, profile in profiles.items() if profile.get("type") not in safe]:
        must = 'must set securityContext.seccompProfile.type to "RuntimeDefault" or "Localhost"'
        yield f"seccompProfile (pod or {_named(names)} {must})"


def _contexts(spec: Json) -> dict[str, Json]:
    return {container["name"]: container.get("securityContext") or {} for container in containers(spec)}


def _named(names: list[str]) -> str:
    return ("container " if len(names) == 1 else "containers ") + ", ".join(f'"{name}"' for name in names)
