"""Admission by ResourceQuotas, with the counts and the words of the API server's plugin and its evaluators. A quota
counts objects of every kind by `count/<plural>.<group>`, of some kinds also by older names, and what pods request. A
quota with scopes applies only to pods that match all of them.

Deviations: each admission counts the use anew, where the real server trusts the quota's status, which may be old; the
scopes CrossNamespacePodAffinity and VolumeAttributesClass match nothing; pods get no default priority class.
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
"""Kinds that a quota may also name by their plural."""
NATIVE = ("cpu", "memory", "ephemeral-storage")
DEMANDED = tuple(prefix + name for prefix in ("", "requests.", "limits.") for name in ("cpu", "memory"))
"""The resources that each container must set if a quota limits them."""


def charge(registry: Registry, resource: Resource, obj: Json) -> None:
    """Judge a new object by the quotas of its namespace.

    Raises:
        ApiError: 403, in the plugin's words.
    """
    namespace, is_pod = obj["metadata"].get("namespace", ""), resource.full_name == "pods"
    quotas = registry.shelf(registry.resources["resourcequotas"]).within(namespace) if resource.namespaced else []
    full_name, name = resource.full_name, obj["metadata"]["name"]
    one_each = dict.fromkeys([f"count/{full_name}", *([full_name] if full_name in ALIASES else [])], 1.0)
    use: Callable[[Json], Amounts] = pod_use if is_pod else lambda _: one_each
    for quota in quotas:
        if not _is_for(quota, obj, is_pod=is_pod):
            continue
        hard: Json = quota["spec"].get("hard", {})
        requested = {what: amount for what, amount in use(obj).items() if what in hard}
        others = registry.shelf(resource).within(namespace) if requested else []
        held = [use(other) for other in others if _is_for(quota, other, is_pod=is_pod)]
        trouble = _excess(quota, requested, held)
        if is_pod and (missing := _missing(obj["spec"], hard)):
            trouble = f"failed quota: {quota['metadata']['name']}: must specify {missing}"
        if trouble:
            raise ApiError(403, f'{full_name} "{name}" is forbidden: {trouble}', details=resource.details(name))


def _excess(quota: Json, requested: Amounts, held: list[Amounts]) -> str:
    name, hard = quota["metadata"]["name"], quota["spec"].get("hard", {})
    used = {what: sum(amounts.get(what, 0) for amounts in held) for what in requested}
    over = sorted(what for what in requested if used[what] + requested[what] > quantity(hard[what]))
    if not over:
        return ""
    limited = {what: quantity(hard[what]) for what in over}
    lists = [
        ",".join(f"{what}={_text(what, amounts[what])}" for what in over) for amounts in (requested, used, limited)
    ]
    return "exceeded quota: {}, requested: {}, used: {}, limited: {}".format(name, *lists)


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
        case "BestEffort" | "NotBestEffort" as name:  # best effort: no container requests CPU or memory, or limits it
            both = [_amounts(container, sort) for container in containers(spec) for sort in ("requests", "limits")]
            is_limited = any(amounts.get("cpu") or amounts.get("memory") for amounts in both)
            return bool(is_limited == (name == "NotBestEffort"))
        case "PriorityClass":
            priority, operator = spec.get("priorityClassName", ""), scope["operator"]
            holds = bool(priority) if operator in ("Exists", "DoesNotExist") else priority in scope["values"]
            return bool(holds == (operator in ("Exists", "In")))
    return False


# --- what pods use


def containers(spec: Json) -> list[Json]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def pod_use(pod: Json) -> Amounts:
    """The use of a pod in every quota. A pod that is over counts only as an object."""
    use = {"count/pods": 1.0}
    meta, is_over = pod["metadata"], pod["status"]["phase"] in ("Succeeded", "Failed")
    if "deletionTimestamp" in meta:
        grace = float(meta["deletionGracePeriodSeconds"])
        is_over |= time.time() > datetime.fromisoformat(meta["deletionTimestamp"]).timestamp() + grace
    if is_over:
        return use
    use["pods"] = 1.0
    for name, amount in together(pod["spec"], partial(_amounts, sort="requests")).items():
        is_native = name in NATIVE or name.startswith("hugepages-")
        use |= {f"requests.{name}": amount} | ({name: amount} if is_native else {})
    limits = together(pod["spec"], partial(_amounts, sort="limits"))
    return use | {f"limits.{name}": limits[name] for name in NATIVE if name in limits}


def together(spec: Json, amounts: Callable[[Json], Amounts]) -> Amounts:
    """The amounts of a whole pod, from those of each container: containers and sidecars run together, each init
    container beside the sidecars before it."""
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


def _sum(left: Amounts, right: Amounts) -> Amounts:
    return {name: left.get(name, 0) + right.get(name, 0) for name in {*left, *right}}


def _missing(spec: Json, hard: Json) -> str:
    """The resources that containers must set and do not, with the names of the containers."""
    demands = []
    for what in sorted(set(hard) & set(DEMANDED)):
        sort, _, name = what.rpartition(".")
        names = [
            container["name"]
            for container in containers(spec)
            if name not in container.get("resources", {}).get(sort or "requests", {})
        ]
        if names:
            demands.append(f"{what} for: {','.join(sorted(names))}")
    return "; ".join(demands)


# --- quantities


def quantity(text: object) -> float:
    """`500m`, `2`, `16Gi`"""
    number = str(text)
    unit = next((suffix for suffix in UNITS if number.endswith(suffix)), "")
    return float(number.removesuffix(unit)) * UNITS.get(unit, 1.0)


def _text(what: str, amount: float) -> str:
    """A quantity with the largest unit that leaves a whole number: powers of two for memory and storage."""
    binary = any(word in what for word in ("memory", "storage", "hugepages"))
    for unit in (*(("Ti", "Gi", "Mi", "Ki") if binary else ()), "T", "G", "M", "k"):
        if amount and amount % UNITS[unit] == 0:
            return f"{amount / UNITS[unit]:.0f}{unit}"
    return f"{amount:.0f}" if amount == int(amount) else f"{amount * 1000:.0f}m"
