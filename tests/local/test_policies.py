"""ValidatingAdmissionPolicies on the local API server: what they match, what they see, and the real server's words."""

from __future__ import annotations

from typing import Any

import pytest

Json = dict[str, Any]
POLICIES = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies"
BINDINGS = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings"
MAPS = "/api/v1/namespaces/default/configmaps"
WIDGETS = "/apis/demo.example.com/v1/namespaces/default/widgets"
RULE = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE", "UPDATE"], "resources": ["configmaps"]}


def named(**data: str) -> Json:
    return {"metadata": {"name": "m"}, "data": data}


async def bind(client: Any, *validations: Json, binding: Json | None = None, rules: Any = (RULE,), **spec: Any) -> None:
    constraints = {"resourceRules": list(rules)}
    body = {"matchConstraints": constraints, "validations": list(validations), **spec}
    await client.post(POLICIES, {"metadata": {"name": "p"}, "spec": body})
    spec = {"policyName": "p", "validationActions": ["Deny"], **(binding or {})}
    await client.post(BINDINGS, {"metadata": {"name": "b"}, "spec": spec})


async def refusal(client: Any, body: Json, code: int = 422) -> Json:
    """The answer, the same in earnest and as a dry run."""
    answers: list[Json] = [await client.post(path, body, code=code) for path in (MAPS, f"{MAPS}?dryRun=All")]
    assert answers[0] == answers[1]
    return answers[0]


async def message(client: Any, body: Json) -> str:
    first = "configmaps \"m\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request: "
    told = str((await refusal(client, body))["message"])
    assert told.startswith(first)
    return told.removeprefix(first)


async def test_a_refusal_has_the_real_servers_form(client: Any) -> None:
    await bind(client, {"expression": "object.data.size == 'small'"})
    told = (
        "ValidatingAdmissionPolicy 'p' with binding 'b' denied request: failed expression: object.data.size == 'small'"
    )
    assert await refusal(client, named(size="big")) == {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": f'configmaps "m" is forbidden: {told}',
        "reason": "Invalid",
        "details": {"name": "m", "group": "", "kind": "configmaps", "causes": [{"message": told}]},
        "code": 422,
    }
    await client.post(MAPS, named(size="small"))


async def test_kubectl_prints_it(kubectl: Any, client: Any) -> None:
    await bind(client, {"expression": "false", "message": "no maps", "reason": "Forbidden"})
    out = await kubectl("apply", "-f", "-", stdin={"apiVersion": "v1", "kind": "ConfigMap", **named()}, fails=True)
    assert "denied request: no maps" in out


@pytest.mark.parametrize(
    ("reason", "code"), [("Forbidden", 403), ("Unauthorized", 401), ("RequestEntityTooLarge", 413)]
)
async def test_a_validation_chooses_its_code(client: Any, reason: str, code: int) -> None:
    await bind(client, {"expression": "false", "reason": reason})
    assert (await refusal(client, named(), code))["reason"] == reason


@pytest.mark.parametrize(
    ("validation", "told"),
    [
        ({"message": " fixed "}, "fixed"),
        ({"message": "fixed", "messageExpression": "'size ' + object.data.size"}, "size big"),
        ({"message": "fixed", "messageExpression": "object.data.nothing"}, "fixed"),
        ({"message": "fixed", "messageExpression": "'two' + '\\n' + 'lines'"}, "fixed"),
        ({"message": "fixed", "messageExpression": "'  '"}, "fixed"),
        ({"messageExpression": "1"}, "failed expression: false"),
    ],
)
async def test_the_message_is_made_by_an_expression_if_that_makes_one(client: Any, validation: Json, told: str) -> None:
    await bind(client, {"expression": "false", **validation})
    assert await message(client, named(size="big")) == told


async def test_expressions_see_object_old_object_request_namespace_and_variables(client: Any) -> None:
    variables = [
        {"name": "first", "expression": "object.data.a"},
        {"name": "both", "expression": "variables.first + object.data.b"},
    ]
    seen = [
        "variables.both == 'xy'",
        "request.operation == 'CREATE' ? oldObject == null : oldObject.data.a == 'x'",
        "request.resource.resource == 'configmaps' && request.kind.kind == 'ConfigMap' && request.subResource == ''",
        "request.namespace == 'default' && request.name == 'm' && !request.dryRun",
        "namespaceObject.metadata.name == 'default'",
    ]
    await bind(client, *({"expression": one} for one in seen), variables=variables)
    await client.post(MAPS, named(a="x", b="y"))
    await client.patch(f"{MAPS}/m", {"data": {"c": "z"}})
    assert await refused(client.patch(f"{MAPS}/m", {"data": {"b": "z"}}, code=422))


async def refused(asked: Any) -> bool:
    return "denied request" in (await asked)["message"]


async def test_what_cannot_be_evaluated_refuses_unless_the_policy_ignores_it(client: Any) -> None:
    await bind(client, {"expression": "object.data.a == 'x'"})
    assert await message(client, named(b="y")) == (
        "expression 'object.data.a == 'x'' resulted in error: no such key: a"
    )
    await client.patch(f"{POLICIES}/p", {"spec": {"failurePolicy": "Ignore"}})
    await client.post(MAPS, named(b="y"))
    assert await refused(client.patch(f"{MAPS}/m", {"data": {"a": "y"}}, code=422))


async def test_a_variable_without_a_value_is_an_error_only_where_it_is_used(client: Any) -> None:
    variables = [{"name": "a", "expression": "object.data.a"}]
    await bind(client, {"expression": "!has(object.data.a) || variables.a == 'x'"}, variables=variables)
    await client.post(MAPS, named(b="y"))
    await client.patch(f"{POLICIES}/p", {"spec": {"validations": [{"expression": "variables.a == 'x'"}]}})
    told = (await client.patch(f"{MAPS}/m", {"data": {"b": "z"}}, code=422))["message"]
    assert 'composited variable "a" fails to evaluate' in told


async def test_a_condition_that_does_not_hold_decides_before_any_error(client: Any) -> None:
    conditions = [
        {"name": "error", "expression": "object.data.a == 'x'"},
        {"name": "never", "expression": "request.operation == 'DELETE'"},
    ]
    await bind(client, {"expression": "false"}, matchConditions=conditions)
    await client.post(MAPS, named())
    await client.patch(f"{POLICIES}/p", {"spec": {"matchConditions": conditions[:1]}})
    told = (await client.patch(f"{MAPS}/m", {"data": {"b": "z"}}, code=422))["message"]
    assert told.endswith("resulted in error: no such key: a")


@pytest.mark.parametrize(
    ("rule", "matches"),
    [
        ({"resources": ["*"]}, True),
        ({"resources": ["*/*"]}, True),
        ({"resources": ["configmaps/*"]}, True),
        ({"resources": ["configmaps/status"]}, False),
        ({"resources": ["secrets"]}, False),
        ({"apiGroups": ["*"], "apiVersions": ["*"], "operations": ["*"]}, True),
        ({"apiGroups": ["apps"]}, False),
        ({"operations": ["UPDATE"]}, False),
        ({"scope": "Namespaced"}, True),
        ({"scope": "Cluster"}, False),
        ({"resourceNames": ["m"]}, True),
        ({"resourceNames": ["other"]}, False),
    ],
)
async def test_a_rule_says_what_is_judged(client: Any, rule: Json, matches: bool) -> None:
    await bind(client, {"expression": "false"}, rules=[RULE | rule])
    await client.post(MAPS, named(), code=422 if matches else 201)


@pytest.mark.parametrize(
    ("binding", "matches"),
    [
        ({}, True),
        ({"validationActions": ["Audit", "Warn"]}, False),
        ({"policyName": "other"}, False),
        ({"matchResources": {"namespaceSelector": {"matchLabels": {"team": "a"}}}}, True),
        ({"matchResources": {"namespaceSelector": {"matchLabels": {"team": "b"}}}}, False),
        ({"matchResources": {"objectSelector": {"matchLabels": {"size": "big"}}}}, False),
        ({"matchResources": {"resourceRules": [RULE | {"operations": ["UPDATE"]}]}}, False),
        ({"matchResources": {"excludeResourceRules": [RULE]}}, False),
    ],
)
async def test_a_binding_says_where(client: Any, binding: Json, matches: bool) -> None:
    await client.patch("/api/v1/namespaces/default", {"metadata": {"labels": {"team": "a"}}})
    await bind(client, {"expression": "false"}, binding=binding)
    await client.post(MAPS, named(), code=422 if matches else 201)


@pytest.mark.parametrize(
    ("operator", "values", "chosen"),
    [
        ("In", ["a"], True),
        ("In", ["b"], False),
        ("NotIn", ["b"], True),
        ("Exists", [], True),
        ("DoesNotExist", [], False),
    ],
)
async def test_selectors_have_expressions(client: Any, operator: str, values: list[str], chosen: bool) -> None:
    await client.patch("/api/v1/namespaces/default", {"metadata": {"labels": {"team": "a"}}})
    expression = {"key": "team", "operator": operator, **({"values": values} if values else {})}
    binding = {"matchResources": {"namespaceSelector": {"matchExpressions": [expression]}}}
    await bind(client, {"expression": "false"}, binding=binding)
    await client.post(MAPS, named(), code=422 if chosen else 201)


async def test_a_deletion_is_judged_by_the_old_object_and_a_status_by_its_own_rule(widgets: Any, make: Any) -> None:
    rule = {"apiGroups": ["demo.example.com"], "apiVersions": ["v1"]}
    rules = [
        rule | {"operations": ["DELETE"], "resources": ["widgets"]},
        rule | {"operations": ["UPDATE"], "resources": ["widgets/status"]},
    ]
    allowed = "request.operation == 'DELETE' ? object == null && oldObject.spec.size < 5 : request.subResource == ''"
    await bind(widgets, {"expression": allowed}, rules=rules)
    await widgets.post(WIDGETS, make.widget("w", size=9))
    assert await refused(widgets.ask("DELETE", f"{WIDGETS}/w", code=422))
    assert await refused(widgets.patch(f"{WIDGETS}/w/status", {"status": {"state": "on"}}, code=422))
    await widgets.patch(f"{WIDGETS}/w", {"spec": {"size": 3}})
    await widgets.ask("DELETE", f"{WIDGETS}/w")


async def test_a_policy_that_forbids_everything_can_be_taken_away(client: Any) -> None:
    everything = {"apiGroups": ["*"], "apiVersions": ["*"], "operations": ["*"], "resources": ["*/*"]}
    await bind(client, {"expression": "false"}, rules=[everything])
    await client.post(MAPS, named(), code=422)
    await client.ask("DELETE", f"{BINDINGS}/b")
    await client.post(MAPS, named())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"validations": [{"expression": "object.("}]}, "spec.validations[0].expression"),
        ({"validations": [{"expression": "true", "messageExpression": "'"}]}, "spec.validations[0].messageExpression"),
        ({"variables": [{"name": "a", "expression": "("}]}, "spec.variables[0].expression"),
        ({"matchConditions": [{"name": "a", "expression": "("}]}, "spec.matchConditions[0].expression"),
        ({"matchConstraints": {}}, "spec.matchConstraints.resourceRules"),
        ({"validations": []}, "spec.validations"),
        ({"paramKind": {"apiVersion": "v1", "kind": "ConfigMap"}}, "spec.paramKind"),
    ],
)
async def test_a_wrong_policy_is_refused_with_the_field(client: Any, change: Json, field: str) -> None:
    spec = {"matchConstraints": {"resourceRules": [RULE]}, "validations": [{"expression": "true"}], **change}
    told = await client.post(POLICIES, {"metadata": {"name": "p"}, "spec": spec}, code=422)
    assert [one["field"] for one in told["details"]["causes"]] == [field]


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        ({}, {"spec.policyName", "spec.validationActions"}),
        ({"policyName": "p", "validationActions": ["Deny"], "paramRef": {"name": "x"}}, {"spec.paramRef"}),
    ],
)
async def test_a_wrong_binding_is_refused_with_the_field(client: Any, spec: Json, fields: set[str]) -> None:
    told = await client.post(BINDINGS, {"metadata": {"name": "b"}, "spec": spec}, code=422)
    assert {one["field"] for one in told["details"]["causes"]} == fields
