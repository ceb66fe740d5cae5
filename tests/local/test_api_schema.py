"""Definitions: pruning, defaults, validation, CEL rules, and what a definition itself must be."""

import pytest

CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
WIDGETS = "/apis/demo.example.com/v1/namespaces/default/widgets"
W = WIDGETS + "/w"


async def refused(client, make, **spec):
    """Field and message of every cause of a refused widget."""
    status = await client.post(WIDGETS, make.widget(**spec), code=422)
    return [(cause["field"], cause["message"]) for cause in status["details"]["causes"]]


async def test_defaults_are_filled_in_also_inside_defaults(widgets, make):
    spec = (await widgets.post(WIDGETS, make.widget(parts=[{"name": "a"}])))["spec"]
    assert spec == {"size": 3, "color": "red", "train": {"epochs": 3}, "parts": [{"name": "a", "count": 1}]}


async def test_unknown_fields_are_pruned(widgets, make):
    made = await widgets.post(WIDGETS, make.widget(foo=1, train={"bar": 2}))
    assert ("foo" in made["spec"], made["spec"]["train"]) == (False, {"epochs": 3})


async def test_unknown_fields_are_refused_where_the_client_is_strict(widgets, make):
    status = await widgets.post(WIDGETS + "?fieldValidation=Strict", make.widget(foo=1), code=400)
    assert 'strict decoding error: unknown field "spec.foo"' in status["message"]
    await widgets.post(WIDGETS + "?fieldValidation=Strict", make.widget())
    await widgets.patch(W + "?fieldValidation=Strict", {"spec": {"parts": [{"name": "a", "x": 1}]}}, code=400)


async def test_open_fields_keep_what_they_are_given(widgets, make):
    made = await widgets.post(WIDGETS, make.widget(extra={"any": [{"thing": 1}]}, labels={"a": "b"}))
    assert (made["spec"]["extra"], made["spec"]["labels"]) == ({"any": [{"thing": 1}]}, {"a": "b"})


async def test_a_null_where_none_may_be_is_a_field_that_is_left_out(widgets, make):
    spec = (await widgets.post(WIDGETS, make.widget(color=None, model=None, note=None, extra={"any": None})))["spec"]
    assert (spec["color"], "model" in spec, spec["note"], spec["extra"]) == ("red", False, None, {"any": None})


async def test_a_float_without_a_fraction_is_an_integer(widgets, make):
    assert (await widgets.post(WIDGETS, make.widget(size=4.0)))["spec"]["size"] == 4


async def test_an_integer_that_64_bits_do_not_hold_is_none(widgets, make):
    status = await widgets.post(WIDGETS, make.widget(size=2**63), code=422)
    assert 'must be of type integer: "number"' in status["message"]


@pytest.mark.parametrize(
    ("spec", "field", "message"),
    [
        ({"size": "x"}, "spec.size", 'Invalid value: "string": spec.size in body must be of type integer: "string"'),
        ({"size": 1.5}, "spec.size", 'Invalid value: "number": spec.size in body must be of type integer: "number"'),
        ({"size": 0}, "spec.size", "Invalid value: 0: spec.size in body should be greater than or equal to 1"),
        ({"size": 101}, "spec.size", "Invalid value: 101: spec.size in body should be less than or equal to 100"),
        ({"color": "blue"}, "spec.color", 'Unsupported value: "blue": supported values: "red", "green"'),
        ({"model": "A"}, "spec.model", "Invalid value: \"A\": spec.model in body should match '^[a-z]+$'"),
        (
            {"model": "a" * 21},
            "spec.model",
            f'Invalid value: "{"a" * 21}": spec.model in body should be at most 20 chars long',
        ),
        ({"tags": []}, "spec.tags", 'Invalid value: "array": spec.tags in body should have at least 1 items'),
        ({"tags": ["a", "a"]}, "spec.tags[1]", 'Duplicate value: "a"'),
        ({"parts": [{}]}, "spec.parts[0].name", "Required value"),
        ({"parts": [{"name": "a"}, {"name": "a"}]}, "spec.parts[1]", 'Duplicate value: {"name":"a"}'),
        (
            {"port": 1.5},
            "spec.port",
            'Invalid value: "number": spec.port in body must be of type integer or string: "number"',
        ),
        (
            {"labels": {"a": 1}},
            "spec.labels.a",
            'Invalid value: "integer": spec.labels.a in body must be of type string: "integer"',
        ),
    ],
)
async def test_a_field_out_of_its_bounds_is_named_with_the_bound(widgets, make, spec, field, message):
    assert (field, message) in await refused(widgets, make, **spec)


async def test_a_missing_field_is_named(widgets, make):
    body = make.widget()
    del body["spec"]["size"]
    status = await widgets.post(WIDGETS, body, code=422)
    assert status["message"] == 'Widget.demo.example.com "w" is invalid: spec.size: Required value'


async def test_all_faults_are_told_at_once(widgets, make):
    assert len(await refused(widgets, make, size=0, color="blue", model="A")) == 3


async def test_null_is_a_value_where_nullable_and_a_default_where_there_is_one(widgets, make):
    spec = (await widgets.post(WIDGETS, make.widget(note=None, color=None)))["spec"]
    assert (spec["note"], spec["color"]) == (None, "red")


async def test_a_port_may_be_a_number_or_a_name(widgets, make):
    await widgets.post(WIDGETS, make.widget("a", port=80))
    await widgets.post(WIDGETS, make.widget("b", port="http"))


async def test_a_rule_that_fails_says_its_message(widgets, make):
    assert await refused(widgets, make, size=1, color="green") == [
        ("spec", 'Invalid value: "object": a small widget is red')
    ]


async def test_a_transition_rule_guards_a_field_that_was_set(widgets, make):
    await widgets.post(WIDGETS, make.widget(model="a"))
    status = await widgets.patch(W, {"spec": {"model": "b"}}, code=422)
    assert "model is fixed" in status["message"]
    await widgets.patch(W, {"spec": {"model": None}}, code=422)
    await widgets.patch(W, {"spec": {"size": 9}})


async def test_what_has_not_changed_is_not_judged_again(client, make):
    """As with the real server's ratcheting: a rule that came later does not block changes of something else."""
    await client.post(CRDS, make.crd())
    await client.post(WIDGETS, make.widget(model="old"))
    name = f"{CRDS}/widgets.demo.example.com"
    stored = await client.get(name)
    root = stored["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    root["properties"]["model"]["x-kubernetes-validations"] = [{"rule": "self != 'old'", "message": "too old"}]
    await client.put(name, stored)
    await client.patch(W, {"spec": {"note": "x"}})
    assert "too old" in (await client.post(WIDGETS, make.widget("other", model="old"), code=422))["message"]


async def test_stored_objects_are_read_by_the_definition_that_is_there_now(client, make):
    """With its defaults, as the real server reads them from etcd: rules against changes compare with these."""
    await client.post(CRDS, make.crd())
    made = await client.post(WIDGETS, make.widget(model="old"))
    name = f"{CRDS}/widgets.demo.example.com"
    stored = await client.get(name)
    root = stored["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    del root["properties"]["model"]
    root["properties"]["mode"] = {"type": "string", "default": "slow"}
    root["x-kubernetes-validations"] = [{"rule": "self.mode == oldSelf.mode", "message": "it stays"}]
    await client.put(name, stored)
    read = await client.get(W)
    assert (read["spec"]["mode"], "model" in read["spec"]) == ("slow", False)
    assert read["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
    await client.patch(W, {"spec": {"size": 9}})
    assert "it stays" in (await client.patch(W, {"spec": {"mode": "fast"}}, code=422))["message"]


async def test_a_status_write_is_validated(widgets, make):
    await widgets.post(WIDGETS, make.widget())
    bad = {"status": {"conditions": [{"type": "Ready", "status": "Maybe"}]}}
    status = await widgets.patch(W + "/status", bad, code=422)
    assert status["details"]["causes"][0]["field"] == "status.conditions[0].status"


async def _widget_with_rule(client, make, rule, **spec):
    await client.post(CRDS, make.crd(rules=[{"message": "no"} | rule]))
    return await client.ask("POST", WIDGETS, make.widget(**spec), code=rule.get("code"))


@pytest.mark.parametrize(
    ("rule", "spec"),
    [
        ("size(self.model) == 2", {"model": "ab"}),
        ("self.model.size() < 3", {"model": "ab"}),
        ("self.model.matches('^a.*')", {"model": "abc"}),
        ("self.tags.all(t, t.startsWith('x'))", {"tags": ["xa", "xb"]}),
        ("self.parts.exists(p, p.name == 'a' && p.count == 1)", {"parts": [{"name": "a"}]}),
        ("double(self.note) > 0.0 && double(self.note) <= 1.0", {"note": "1e-6"}),
        ("has(self.model) != has(self.note)", {"model": "a"}),
        ("self.size in [3, 4] ? true : false", {}),
    ],
)
async def test_rules_that_hold_let_a_widget_pass(client, make, rule, spec):
    await _widget_with_rule(client, make, {"rule": rule}, **spec)


async def test_a_rule_chooses_its_path(client, make):
    rule = {"rule": "self.size > 3", "message": "no", "fieldPath": ".size"}
    await client.post(CRDS, make.crd(rules=[rule]))
    assert await refused(client, make) == [("spec.size", 'Invalid value: "object": no')]


async def test_a_rule_of_a_whole_object_reads_of_its_metadata_the_name_alone(client, make):
    body = make.crd()
    rules = [{"rule": "self.metadata.name != 'bad' && !has(self.metadata.labels)", "message": "no"}]
    body["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["x-kubernetes-validations"] = rules
    await client.post(CRDS, body)
    labelled = make.widget()
    labelled["metadata"]["labels"] = {"a": "b"}
    await client.post(WIDGETS, labelled)
    await client.post(WIDGETS, make.widget("bad"), code=422)


async def test_a_rule_that_cannot_be_evaluated_refuses(client, make):
    await client.post(CRDS, make.crd(rules=[{"rule": "self.model == 'a'"}]))
    assert "rule evaluation error" in (await refused(client, make))[0][1]


async def test_a_rule_that_does_not_compile_is_refused_with_its_definition(client, make):
    status = await client.post(CRDS, make.crd(rules=[{"rule": "self.size =="}]), code=422)
    assert "Syntax error" in status["message"]
    assert status["details"]["causes"][0]["field"].endswith("x-kubernetes-validations[2].rule")


async def test_a_definition_must_be_structural(client, make):
    body = make.crd()
    schema = body["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    del schema["properties"]["spec"]["properties"]["size"]["type"]
    status = await client.post(CRDS, body, code=422)
    assert "properties[size].type: Required value" in status["message"]


@pytest.mark.parametrize(
    ("default", "told"),
    [
        ({}, "rule evaluation error"),  # the default of a part is not there yet
        ({"size": 0}, "should be greater than or equal to 1"),
        ({"size": 9}, "too large"),
        ([], "must be of type object"),
    ],
)
async def test_a_default_must_keep_the_rules_of_its_schema_as_it_stands(client, make, default, told):
    size = {"type": "integer", "minimum": 1, "default": 1}
    rule = {"rule": "self.size < 5", "message": "too large"}
    box = {"type": "object", "properties": {"size": size}, "x-kubernetes-validations": [rule]}
    status = await client.post(CRDS, make.crd(box=box | {"default": default}), code=422)
    assert told in status["message"]
    assert status["details"]["causes"][0]["field"].endswith("properties[box].default")
    await client.post(CRDS, make.crd(box=box | {"default": {"size": 1}}))


async def test_what_this_server_cannot_serve_or_check_is_refused_with_its_definition(client, make):
    two, odd = make.crd(), make.crd(choice={"type": "object", "oneOf": [{"required": ["a"]}]})
    two["spec"]["versions"].append(two["spec"]["versions"][0] | {"name": "v2", "storage": False})
    assert "definitions of one version" in (await client.post(CRDS, two, code=422))["message"]
    assert "properties[choice].oneOf" in (await client.post(CRDS, odd, code=422))["message"]


async def test_a_definition_must_be_named_after_its_plural_and_group(client, make):
    body = make.crd()
    body["metadata"]["name"] = "widget.demo.example.com"
    assert "metadata.name" in (await client.post(CRDS, body, code=422))["message"]


async def test_a_definition_is_established_at_once(client, make):
    status = (await client.post(CRDS, make.crd()))["status"]
    assert {c["type"]: c["status"] for c in status["conditions"]} == {"NamesAccepted": "True", "Established": "True"}
    assert (status["storedVersions"], status["acceptedNames"]["listKind"]) == (["v1"], "WidgetList")


async def test_deleting_a_definition_deletes_its_objects_and_its_paths(widgets, make):
    body = make.widget()
    body["metadata"]["finalizers"] = ["demo.example.com/hold"]
    await widgets.post(WIDGETS, body)
    await widgets.post(WIDGETS, make.widget("free"))
    name = CRDS + "/widgets.demo.example.com"
    assert "deletionTimestamp" in (await widgets.delete(name))["metadata"]
    await widgets.get(WIDGETS + "/free", code=404)
    await widgets.patch(W, {"metadata": {"finalizers": []}})
    await widgets.get(name, code=404)
    await widgets.get(WIDGETS, code=404)
