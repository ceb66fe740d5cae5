"""ValidatingAdmissionPolicies: the requests that they match, and their answers, in the real server's words.

Deviations: the server refuses a policy with `paramKind`, so no expression has `params`; there is no `authorizer`, and
all users are anonymous; a write of a policy checks only the syntax of its expressions; Warn and Audit are silent; no
policy judges the scheduler's binding of a pod, or the objects that a deleted namespace takes with it.
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
"""The most bytes of a message from an expression."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A write that the policies judge. `old` is None for a creation, `new` for a deletion."""

    operation: Literal["CREATE", "UPDATE", "DELETE"]
    resource: Resource
    namespace: str
    name: str
    subresource: str = ""
    dry_run: bool = False
    new: Json | None = None
    old: Json | None = None

    def attributes(self) -> Json:
        """The variable `request` of expressions."""
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
    """Judge a request by the bound policies.

    Raises:
        ApiError: with the first refusal's reason and code, 422 if the policy names none.
    """
    policies = registry.shelf(registry.resources[POLICIES]).within("")
    if not policies or request.resource.group == GROUP:  # else a policy could forbid its own removal
        return
    bindings = registry.shelf(registry.resources[BINDINGS]).within("")
    home = registry.shelf(registry.resources["namespaces"]).objects.get(("", request.namespace))
    home = home if request.resource.namespaced else None
    for policy in policies:
        if not _matches(policy["spec"]["matchConstraints"], request, home):
            continue
        for binding in bindings:
            spec, name = binding["spec"], policy["metadata"]["name"]
            bound = spec["policyName"] == name and "Deny" in spec["validationActions"]
            if not bound or not _matches(spec.get("matchResources", {}), request, home):
                continue
            for reason, message in _refusals(policy["spec"], request, home):
                denied = f"with binding '{binding['metadata']['name']}' denied request: {message}"
                cause = f"ValidatingAdmissionPolicy '{name}' {denied}"
                details = request.resource.details(request.name) | {"causes": [{"message": cause}]}
                forbidden = f'{request.resource.full_name} "{request.name}" is forbidden: {cause}'
                raise ApiError(_CODES[reason], forbidden, reason=reason, details=details)


# --- which requests a policy, or a binding, matches


def _matches(constraints: Json, request: Request, home: Json | None) -> bool:
    states = [state["metadata"].get("labels", {}) for state in (request.new, request.old) if state]
    of_home = states[0] if request.resource.full_name == "namespaces" else home and home["metadata"].get("labels", {})
    if of_home is not None and not chooses(constraints.get("namespaceSelector", {}), of_home):
        return False
    if not any(chooses(constraints.get("objectSelector", {}), labels) for labels in states):
        return False
    if any(_names(rule, request) for rule in constraints.get("excludeResourceRules", [])):
        return False
    rules = constraints.get("resourceRules", [])
    return not rules or any(_names(rule, request) for rule in rules)


def _names(rule: Json, request: Request) -> bool:
    """Whether a rule names the request's resource: `cgdruns` is not `cgdruns/status`, `cgdruns/*` is both, and `*`
    is everything except subresources."""
    resource = request.resource
    scope = "Namespaced" if resource.namespaced else "Cluster"
    fields = {"operations": request.operation, "apiGroups": resource.group, "apiVersions": resource.version}
    patterns = [pattern.partition("/") for pattern in rule.get("resources", [])]
    return (
        all({"*", value} & set(rule.get(field, [])) for field, value in fields.items())
        and rule.get("scope", "*") in ("*", scope)
        and request.name in (rule.get("resourceNames") or [request.name])
        and any(p in ("*", resource.plural) and sub in ("*", request.subresource) for p, _, sub in patterns)
    )


# --- what a policy answers


class _Unevaluated(Exception):
    """An expression has no value; the message says why."""


@dataclass(frozen=True)
class _Scope:
    """The variables of expressions. A variable without a value is an error only where an expression uses it."""

    values: Json
    failed: dict[str, str]

    @classmethod
    def of(cls, request: Request, home: Json | None, variables: list[Json]) -> _Scope:
        states = {"object": request.new, "oldObject": request.old, "namespaceObject": home}
        scope = cls({**states, "request": request.attributes(), "variables": {}}, {})
        for variable in variables:
            name = variable["name"]
            try:
                scope.values["variables"][name] = scope.value(variable["expression"])
            except _Unevaluated as error:
                scope.failed[name] = f'composited variable "{name}" fails to evaluate: {error}'
        return scope

    def value(self, expression: str) -> Any:
        try:
            return program(expression).execute(cel.Context(variables=self.values))
        except EVALUATION_ERRORS as error:
            why = str(error)
            if isinstance(error, KeyError):
                key = str(error.args[0])
                why = self.failed.get(key, f"no such key: {key}")
            raise _Unevaluated(f"expression '{expression.strip()}' resulted in error: {why}") from error


def _refusals(spec: Json, request: Request, home: Json | None) -> Iterator[tuple[str, str]]:
    """Reason and message of each refusal. An expression without a value refuses, too, unless the policy says Ignore."""
    scope, fails = _Scope.of(request, home, spec.get("variables", [])), spec["failurePolicy"] == "Fail"
    try:
        if not _is_concerned(spec, scope):
            return
    except _Unevaluated as error:
        if fails:
            yield "Invalid", str(error)
        return
    for validation in spec.get("validations", []):
        try:
            if scope.value(validation["expression"]) is not True:
                yield validation.get("reason", "Invalid"), _message(validation, scope)
        except _Unevaluated as error:
            if fails:
                yield "Invalid", str(error)


def _is_concerned(spec: Json, scope: _Scope) -> bool:
    """Whether all match conditions hold. One that does not hold decides, even if another has no value."""
    failure = None
    for condition in spec.get("matchConditions", []):
        try:
            if scope.value(condition["expression"]) is not True:
                return False
        except _Unevaluated as error:
            failure = failure or error
    if failure:
        raise failure
    return True


def _message(validation: Json, scope: _Scope) -> str:
    """The value of the message's expression if it is one line; else the fixed text; else the expression that failed."""
    text: Any = None
    with suppress(_Unevaluated):
        text = scope.value(validation["messageExpression"]) if "messageExpression" in validation else None
    text = text.strip() if isinstance(text, str) else ""
    if text and "\n" not in text and len(text.encode()) <= _LONGEST:
        return str(text)
    fixed: str = validation.get("message", "").strip()
    return fixed or f"failed expression: {validation['expression'].strip()}"


# --- errors in a policy


def causes(resource: Resource, obj: Json) -> Iterator[Cause]:
    """The errors that the real server finds beyond the schema of a policy or a binding."""
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
        for index, entry in enumerate(spec.get(field, [])):
            for part in entry.keys() & {"expression", "messageExpression"}:
                try:
                    program(entry[part])
                except ValueError as error:
                    yield wrong(f"spec.{field}[{index}].{part}", entry[part], f"compilation failed: {error}")
