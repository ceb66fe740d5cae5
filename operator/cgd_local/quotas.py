"""Admission by ResourceQuotas, as the API server's plugin and its evaluators count and say it: objects of every kind by
`count/<plural>.<group>`, some by older names too, and of pods what they ask for. A quota with scopes is for the pods
that all of them match, and for nothing else.

Deviations: what is used is counted anew each time, where the real server believes the quota's status, which may be old;
the scopes CrossNamespacePodAffinity and VolumeAttributesClass match nothing; pods get no priority class by default.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

from cgd_local.statuses import ApiError, Json

if TYPE_CHECKING:
    from cgd_local.kinds import Resource
    from cgd_local.registry import Registry

Amounts = dict[str, float]

UNITS = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
ALIASES = ("configmaps", "resourcequotas", "secrets", "services")
"""Kinds that a quota may also name by their plural alone."""
NATIVE = ("cpu", "memory", "ephemeral-storage")
DEMANDED = tuple(prefix + name for prefix in ("", "requests.", "limits.") for name in ("cpu", "memory"))
"""What each container must name where a quota limits it."""


def charge(registry: Registry, resource: Resource, obj: Json) -> None:
    """Judge a new object by the quotas of its namespace.

    Raises:
        ApiError: 403, in the plugin's words.
    """
    namespace, is_pod = obj["metadata"].get("namespace", ""), resource.full_name == "pods"
    quotas = registry.shelf(registry.resources["resourcequotas"]).within(namespace) if resource.namespaced else []
    use = pod_use if is_pod else _count_of(resource)
    for quota in quotas:
        if not _is_for(quota, obj, is_pod=is_pod):
            continue
        hard: Json = quota["spec"].get("hard", {})
        asked = {name: amount for name, amount in use(obj).items() if name in hard}
        others = registry.shelf(resource).within(namespace) if asked else []
        held = [use(other) for other in others if _is_for(quota, other, is_pod=is_pod)]
        unsaid = _unsaid(obj["spec"], hard) if is_pod else ""
        if trouble := _demand(quota, unsaid) or _excess(quota, asked, held):
            name = obj["metadata"]["name"]
            raise ApiError(
                403, f'{resource.full_name} "{name}" is forbidden: {trouble}', details=resource.details(name)
            )


def _demand(quota: Json, unsaid: str) -> str:
    return f"failed quota: {quota['metadata']['name']}: must specify {unsaid}" if unsaid else ""


def _excess(quota: Json, asked: Amounts, held: list[Amounts]) -> str:
    name, hard = quota["metadata"]["name"], quota["spec"]["hard"]
    used = {what: sum(amounts.get(what, 0) for amounts in held) for what in asked}
    over = sorted(what for what in asked if used[what] + asked[what] > quantity(hard[what]))
    if not over:
        return ""
    limited = {what: quantity(hard[what]) for what in over}
    tables = [",".join(f"{what}={_text(what, amounts[what])}" for what in over) for amounts in (asked, used, limited)]
    return "exceeded quota: {}, requested: {}, used: {}, limited: {}".format(name, *tables)


def _count_of(resource: Resource) -> Callable[[Json], Amounts]:
    names = [f"count/{resource.full_name}", *([resource.full_name] if resource.full_name in ALIASES else [])]
    return lambda _: dict.fromkeys(names, 1.0)


# --- scopes


def _is_for(quota: Json, obj: Json, *, is_pod: bool) -> bool:
    selector = quota["spec"].get("scopeSelector", {}).get("matchExpressions", [])
    scopes = [{"scopeName": name, "operator": "Exists"} for name in quota["spec"].get("scopes", [])] + selector
    return all(is_pod and _matches(scope, obj["spec"]) for scope in scopes)


def _matches(scope: Json, spec: Json) -> bool:
    match scope["scopeName"]:
        case "Terminating":
            return "activeDeadlineSeconds" in spec
        case "NotTerminating":
            return "activeDeadlineSeconds" not in spec
        case "BestEffort":
            return _is_best_effort(spec)
        case "NotBestEffort":
            return not _is_best_effort(spec)
        case "PriorityClass":
            return _has_class(scope, spec.get("priorityClassName", ""))
    return False


def _has_class(scope: Json, name: str) -> bool:
    match scope["operator"]:
        case "Exists":
            return bool(name)
        case "DoesNotExist":
            return not name
        case "In":
            return name in scope["values"]
    return name not in scope["values"]


def _is_best_effort(spec: Json) -> bool:
    """No container asks for CPU or memory, or limits it."""
    both = [_amounts(container, sort) for container in containers(spec) for sort in ("requests", "limits")]
    return not any(amounts.get("cpu") or amounts.get("memory") for amounts in both)


# --- what pods use


def containers(spec: Json) -> list[Json]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def pod_use(pod: Json) -> Amounts:
    """What a pod counts for in every quota that there may be. One that is over is an object and nothing more."""
    use = {"count/pods": 1.0}
    if _is_over(pod):
        return use
    use["pods"] = 1.0
    for name, amount in together(pod["spec"], partial(_amounts, sort="requests")).items():
        is_native = name in NATIVE or name.startswith("hugepages-")
        use |= {f"requests.{name}": amount} | ({name: amount} if is_native else {})
    limits = together(pod["spec"], partial(_amounts, sort="limits"))
    return use | {f"limits.{name}": limits[name] for name in NATIVE if name in limits}


def _is_over(pod: Json) -> bool:
    meta = pod["metadata"]
    if pod["status"]["phase"] in ("Succeeded", "Failed"):
        return True
    if "deletionTimestamp" not in meta:
        return False
    due = datetime.fromisoformat(meta["deletionTimestamp"]).timestamp() + float(meta["deletionGracePeriodSeconds"])
    return time.time() > due


def together(spec: Json, amounts: Callable[[Json], Amounts]) -> Amounts:
    """What a whole pod has of what each container has: its containers and sidecars run together, each init container
    beside the sidecars before it."""
    sidecars: Amounts = {}
    most: Amounts = {}
    for container in spec.get("initContainers") or []:
        beside = _sum(sidecars, amounts(container))
        most = {name: max(beside.get(name, 0), most.get(name, 0)) for name in {*beside, *most}}
        if container.get("restartPolicy") == "Always":
            sidecars = beside
    total = sidecars
    for container in spec["containers"]:
        total = _sum(total, amounts(container))
    return {name: max(total.get(name, 0), most.get(name, 0)) for name in {*total, *most}}


def _amounts(container: Json, sort: str) -> Amounts:
    """`requests` or `limits`."""
    return {name: quantity(amount) for name, amount in container.get("resources", {}).get(sort, {}).items()}


def _sum(one: Amounts, other: Amounts) -> Amounts:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {*one, *other}}


def _unsaid(spec: Json, hard: Json) -> str:
    """What containers must name and do not, with their names."""
    demands = []
    for what in sorted(set(hard) & set(DEMANDED)):
        sort, _, name = what.rpartition(".")
        silent = [
            container["name"]
            for container in containers(spec)
            if name not in container.get("resources", {}).get(sort or "requests", {})
        ]
        if silent:
            demands.append(f"{what} for: {','.join(sorted(silent))}")
    return "; ".join(demands)


# --- quantities


def quantity(text: object) -> float:
    """`500m`, `2`, `16Gi`"""
    number = str(text)
    unit = next((suffix for suffix in UNITS if number.endswith(suffix)), "")
    return float(number.removesuffix(unit)) * UNITS.get(unit, 1.0)


def _text(what: str, amount: float) -> str:
    """A quantity with the largest unit that leaves a whole number: powers of two for memory and the like."""
    binary = any(word in what for word in ("memory", "storage", "hugepages"))
    for unit in (*(("Ti", "Gi", "Mi", "Ki") if binary else ()), "T", "G", "M", "k"):
        if amount and amount % UNITS[unit] == 0:
            return f"{amount / UNITS[unit]:.0f}{unit}"
    return f"{amount:.0f}" if amount == int(amount) else f"{amount * 1000:.0f}m"
