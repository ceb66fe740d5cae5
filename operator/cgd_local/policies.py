"""ValidatingAdmissionPolicies: the requests that they match, and what they answer, in the real server's words.

Deviations: a policy with `paramKind` is refused, so no expression has `params`; there is no `authorizer`, and everybody
is anonymous; of an expression only the syntax is checked when the policy is written; Warn and Audit are silent; the
scheduler's binding of a pod and what a deleted namespace takes with it are not judged.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import cel

from cgd_local.kinds import Resource
from cgd_local.schema import EVALUATION_ERRORS, program
from cgd_local.selection import chooses
from cgd_local.statuses import ApiError, Cause, Json, required, wrong

if TYPE_CHECKING:
    from cgd_local.registry import Registry

GROUP = "admissionregistration.k8s.io"
POLICIES, BINDINGS = f"validatingadmissionpolicies.{GROUP}", f"validatingadmissionpolicybindings.{GROUP}"
_CODES = {"Unauthorized": 401, "Forbidden": 403, "RequestEntityTooLarge": 413, "Invalid": 422}
_LONGEST = 5 * 1024
"""Bytes of a message that an expression makes."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is about to be written. `old` is None for a creation, `new` for a deletion."""

    operation: Literal["CREATE", "UPDATE", "DELETE"]
    resource: Resource
    namespace: str
    name: str
    subresource: str = ""
    dry_run: bool = False
    new: Json | None = None
    old: Json | None = None

    def told(self) -> Json:
        """As expressions see it."""
        resource = self.resource
        kind = {"group": resource.group, "version": resource.version, "kind": resource.kind}
        plural = {"group": resource.group, "version": resource.version, "resource": resource.plural}
        return {
            "uid": str(uuid.uuid4()),
            **dict.fromkeys(("kind", "requestKind"), kind),
            **dict.fromkeys(("resource", "requestResource"), plural),
            **dict.fromkeys(("subResource", "requestSubResource"), self.subresource),
            "name": self.name,
            "namespace": self.namespace,
            "operation": self.operation,
            "userInfo": {"username": "system:anonymous", "groups": ["system:unauthenticated"]},
            "dryRun": self.dry_run,
        }


def judge(registry: Registry, request: Request) -> None:
    """Ask the policies that are bound.

    Raises:
        ApiError: with the first refusal's reason and code, 422 if the policy names none.
    """
    policies = registry.shelf(registry.resources[POLICIES]).within("")
    if not policies or request.resource.group == GROUP:  # else a policy could forbid its own removal
        return
    bindings = registry.shelf(registry.resources[BINDINGS]).within("")
    space = _namespace(registry, request)
    for policy in policies:
        if not _matches(policy["spec"]["matchConstraints"], request, space):
            continue
        for binding in bindings:
            spec, name = binding["spec"], policy["metadata"]["name"]
            bound = spec["policyName"] == name and "Deny" in spec["validationActions"]
            if not bound or not _matches(spec.get("matchResources", {}), request, space):
                continue
            for reason, message in _refusals(policy["spec"], request, space):
                with_binding = f"with binding '{binding['metadata']['name']}' denied request: {message}"
                raise _forbidden(request, f"ValidatingAdmissionPolicy '{name}' {with_binding}", reason)


def _namespace(registry: Registry, request: Request) -> Json | None:
    found = registry.shelf(registry.resources["namespaces"]).objects.get(("", request.namespace))
    return found if request.resource.namespaced else None


def _forbidden(request: Request, message: str, reason: str) -> ApiError:
    details = request.resource.details(request.name) | {"causes": [{"message": message}]}
    told = f'{request.resource.full_name} "{request.name}" is forbidden: {message}'
    return ApiError(_CODES[reason], told, reason=reason, details=details)


# --- what a policy, or a binding, is about


def _matches(about: Json, request: Request, space: Json | None) -> bool:
    own = [one["metadata"].get("labels", {}) for one in (request.new, request.old) if one]
    around = own[0] if request.resource.full_name == "namespaces" else space and space["metadata"].get("labels", {})
    if around is not None and not chooses(about.get("namespaceSelector", {}), around):
        return False
    if not any(chooses(about.get("objectSelector", {}), labels) for labels in own):
        return False
    if any(_names(rule, request) for rule in about.get("excludeResourceRules", [])):
        return False
    rules = about.get("resourceRules", [])
    return not rules or any(_names(rule, request) for rule in rules)


def _names(rule: Json, request: Request) -> bool:
    resource = request.resource
    scope = "Namespaced" if resource.namespaced else "Cluster"
    asked = {"operations": request.operation, "apiGroups": resource.group, "apiVersions": resource.version}
    return (
        all({"*", value} & set(rule.get(field, [])) for field, value in asked.items())
        and rule.get("scope", "*") in ("*", scope)
        and request.name in (rule.get("resourceNames") or [request.name])
        and any(_covers(one, request) for one in rule.get("resources", []))
    )


def _covers(pattern: str, request: Request) -> bool:
    """`cgdruns` is not `cgdruns/status`; `cgdruns/*` is both, and `*` is everything but subresources."""
    plural, _, subresource = pattern.partition("/")
    return plural in ("*", request.resource.plural) and subresource in ("*", request.subresource)


# --- what it says


class _Unevaluated(Exception):
    """An expression has no value."""


@dataclass(frozen=True)
class _Sight:
    """What expressions see. A variable without a value is an error where it is used, and nowhere else."""

    seen: Json
    failed: dict[str, str]

    @classmethod
    def of(cls, request: Request, space: Json | None) -> _Sight:
        seen = {"object": request.new, "oldObject": request.old, "request": request.told(), "namespaceObject": space}
        return cls({**seen, "variables": {}}, {})

    def define(self, variables: list[Json]) -> None:
        for one in variables:
            try:
                self.seen["variables"][one["name"]] = self.value(one["expression"])
            except _Unevaluated as error:
                self.failed[one["name"]] = f'composited variable "{one["name"]}" fails to evaluate: {error}'

    def value(self, expression: str) -> Any:
        try:
            return program(expression).execute(cel.Context(variables=self.seen))
        except KeyError as error:
            key = str(error.args[0])
            raise _Unevaluated(_told(expression, self.failed.get(key, f"no such key: {key}"))) from error
        except EVALUATION_ERRORS as error:
            raise _Unevaluated(_told(expression, str(error))) from error


def _told(expression: str, error: str) -> str:
    return f"expression '{expression.strip()}' resulted in error: {error}"


def _refusals(spec: Json, request: Request, space: Json | None) -> Iterator[tuple[str, str]]:
    """Reason and message of each; what cannot be evaluated refuses too, unless the policy says Ignore."""
    sight, fails = _Sight.of(request, space), spec["failurePolicy"] == "Fail"
    sight.define(spec.get("variables", []))
    try:
        if not _is_concerned(spec, sight):
            return
    except _Unevaluated as error:
        if fails:
            yield "Invalid", str(error)
        return
    for validation in spec.get("validations", []):
        try:
            if sight.value(validation["expression"]) is not True:
                yield validation.get("reason", "Invalid"), _message(validation, sight)
        except _Unevaluated as error:
            if fails:
                yield "Invalid", str(error)


def _is_concerned(spec: Json, sight: _Sight) -> bool:
    """A condition that does not hold decides, whatever becomes of the others."""
    unknown = None
    for condition in spec.get("matchConditions", []):
        try:
            if sight.value(condition["expression"]) is not True:
                return False
        except _Unevaluated as error:
            unknown = unknown or error
    if unknown:
        raise unknown
    return True


def _message(validation: Json, sight: _Sight) -> str:
    """What the expression for it makes, if that is one line; else the fixed text; else the expression that failed."""
    made: Any = None
    with suppress(_Unevaluated):
        made = sight.value(validation["messageExpression"]) if "messageExpression" in validation else None
    made = made.strip() if isinstance(made, str) else ""
    if made and "\n" not in made and len(made.encode()) <= _LONGEST:
        return str(made)
    fixed: str = validation.get("message", "").strip()
    return fixed or f"failed expression: {validation['expression'].strip()}"


# --- what is wrong with a policy


def causes(resource: Resource, obj: Json) -> Iterator[Cause]:
    """What the real server's own checks find, beyond the schema of a policy or a binding."""
    spec = obj.get("spec", {})
    if resource.full_name == POLICIES:
        yield from _wrong_policy(spec)
    if resource.full_name == BINDINGS and "paramRef" in spec:
        yield wrong("spec.paramRef", spec["paramRef"], "this server knows no parameters of policies")


def _wrong_policy(spec: Json) -> Iterator[Cause]:
    if not spec.get("matchConstraints", {}).get("resourceRules"):
        yield required("spec.matchConstraints.resourceRules")
    if not spec.get("validations") and not spec.get("auditAnnotations"):
        yield required("spec.validations", "validations or auditAnnotations must be contained")
    if "paramKind" in spec:
        yield wrong("spec.paramKind", spec["paramKind"], "this server knows no parameters of policies")
    for field in ("matchConditions", "variables", "validations"):
        for index, one in enumerate(spec.get(field, [])):
            for part in one.keys() & {"expression", "messageExpression"}:
                try:
                    program(one[part])
                except ValueError as error:
                    yield wrong(f"spec.{field}[{index}].{part}", one[part], f"compilation failed: {error}")
