"""Patches of all four kinds, and the fields that managers own."""

import pytest

WIDGETS = "/apis/demo.example.com/v1/namespaces/default/widgets"
W = WIDGETS + "/w"
PODS = "/api/v1/namespaces/default/pods"
JOBS = "/apis/batch/v1/namespaces/default/jobs"


def owners(obj):
    """Manager and subresource -> the tree of fields."""
    entries = obj["metadata"]["managedFields"]
    return {(e["manager"], e["operation"], e.get("subresource", "")): e["fieldsV1"] for e in entries}


async def test_a_merge_patch_merges_objects_and_replaces_lists(widgets, make):
    await widgets.post(WIDGETS, make.widget(plain=[1, 2], labels={"a": "b", "c": "d"}))
    done = await widgets.patch(W, {"spec": {"plain": [3], "labels": {"a": None, "e": "f"}}})
    assert (done["spec"]["plain"], done["spec"]["labels"]) == ([3], {"c": "d", "e": "f"})


async def test_a_merge_patch_with_an_old_version_is_a_conflict(widgets, make):
    old = (await widgets.post(WIDGETS, make.widget()))["metadata"]["resourceVersion"]
    await widgets.patch(W, {"spec": {"size": 4}})
    await widgets.patch(W, {"metadata": {"resourceVersion": old}, "spec": {"size": 5}}, code=409)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ({"op": "add", "path": "/spec/plain/1", "value": 9}, [1, 9, 2]),
        ({"op": "add", "path": "/spec/plain/-", "value": 9}, [1, 2, 9]),
        ({"op": "remove", "path": "/spec/plain/0"}, [2]),
        ({"op": "replace", "path": "/spec/plain/0", "value": 9}, [9, 2]),
        ({"op": "copy", "from": "/spec/plain/0", "path": "/spec/plain/-"}, [1, 2, 1]),
        ({"op": "move", "from": "/spec/plain/0", "path": "/spec/plain/-"}, [2, 1]),
    ],
)
async def test_the_operations_of_a_json_patch(widgets, make, operation, expected):
    await widgets.post(WIDGETS, make.widget(plain=[1, 2]))
    assert (await widgets.patch(W, [operation], "json-patch+json"))["spec"]["plain"] == expected


async def test_a_json_pointer_may_hold_slashes(widgets, make):
    body = make.widget()
    body["metadata"]["annotations"] = {"a.b/c": "1"}
    await widgets.post(WIDGETS, body)
    change = [{"op": "replace", "path": "/metadata/annotations/a.b~1c", "value": "2"}]
    done = await widgets.patch(W, change, "json-patch+json")
    assert done["metadata"]["annotations"] == {"a.b/c": "2"}


@pytest.mark.parametrize(
    "operation",
    [
        {"op": "test", "path": "/metadata/resourceVersion", "value": "0"},
        {"op": "replace", "path": "/spec/nothing/here", "value": 1},
        {"op": "remove", "path": "/spec/plain"},
        {"op": "jump", "path": "/spec/size"},
    ],
)
async def test_a_json_patch_that_cannot_be_done_is_refused_whole(widgets, make, operation):
    made = await widgets.post(WIDGETS, make.widget())
    change = [{"op": "replace", "path": "/spec/size", "value": 9}, operation]
    status = await widgets.patch(W, change, "json-patch+json", code=422)
    assert status["reason"] == "Invalid"
    assert await widgets.get(W) == made


async def test_a_strategic_patch_merges_containers_by_name_and_env_by_name(client, make):
    container = {"name": "c", "image": "a", "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]}
    await client.post("/apis/apps/v1/namespaces/default/deployments", _deployment(container))
    change = {"name": "c", "image": "b", "env": [{"name": "B", "$patch": "delete"}, {"name": "C", "value": "3"}]}
    path = "/apis/apps/v1/namespaces/default/deployments/d"
    done = await client.patch(path, _template({"containers": [change]}), "strategic-merge-patch+json")
    [made] = done["spec"]["template"]["spec"]["containers"]
    assert (made["image"], made["env"]) == ("b", [{"name": "A", "value": "1"}, {"name": "C", "value": "3"}])


async def test_a_directive_that_is_not_known_is_refused(client, make):
    await client.post(PODS, make.pod())
    change = {"metadata": {"$deleteFromPrimitiveList/finalizers": ["a.example.com/x"]}}
    status = await client.patch(PODS + "/p", change, "strategic-merge-patch+json", code=400)
    assert "$deleteFromPrimitiveList/finalizers" in status["message"]


async def test_a_strategic_patch_of_job_conditions_merges_by_type(client, make):
    await client.post(JOBS, make.job())
    for kind in ("Suspended", "Failed"):
        change = {"status": {"conditions": [{"type": kind, "status": "True"}]}}
        done = await client.patch(JOBS + "/j/status", change, "strategic-merge-patch+json")
    assert [c["type"] for c in done["status"]["conditions"]] == ["Suspended", "Failed"]


async def test_custom_resources_know_no_strategic_patch(widgets, make):
    await widgets.post(WIDGETS, make.widget())
    status = await widgets.patch(W, {}, "strategic-merge-patch+json", code=415)
    assert status["reason"] == "UnsupportedMediaType"


async def test_the_creator_owns_what_it_wrote(widgets, make):
    made = await widgets.post(WIDGETS + "?fieldManager=me", make.widget(plain=[1]))
    assert owners(made)["me", "Update", ""]["f:spec"] == {
        "f:size": {},
        "f:color": {},
        "f:plain": {},
        "f:train": {"f:epochs": {}},
    }


async def test_a_later_writer_takes_what_it_changes_and_a_subresource_is_its_own(widgets, make):
    await widgets.post(WIDGETS + "?fieldManager=me", make.widget())
    await widgets.patch(W + "?fieldManager=you", {"spec": {"size": 9}})
    done = await widgets.patch(W + "/status?fieldManager=you", {"status": {"state": "x"}})
    assert "f:size" not in owners(done)["me", "Update", ""]["f:spec"]
    assert owners(done)["you", "Update", ""] == {"f:spec": {"f:size": {}}}
    assert owners(done)["you", "Update", "status"] == {"f:status": {"f:state": {}}}


async def test_a_put_without_owners_keeps_them_and_an_empty_list_forgets_them(widgets, make):
    made = await widgets.post(WIDGETS + "?fieldManager=me", make.widget())
    body = made | {"metadata": {"name": "w", "resourceVersion": made["metadata"]["resourceVersion"]}}
    assert await widgets.put(W, body) == made
    body["metadata"]["managedFields"] = []
    assert "managedFields" not in (await widgets.put(W, body))["metadata"]


async def test_apply_creates_what_is_missing_and_then_changes_nothing(widgets, make):
    made = await widgets.apply(W, make.widget(), code=201)
    assert owners(made)["me", "Apply", ""] == {"f:spec": {"f:size": {}}}
    assert made["spec"]["color"] == "red"
    assert await widgets.apply(W, make.widget(), code=200) == made


async def test_apply_removes_what_its_manager_no_longer_applies(widgets, make):
    await widgets.apply(W, make.widget(model="a", labels={"x": "1", "y": "2"}, train={"max-steps": 3}))
    await widgets.patch(W, {"spec": {"note": "mine"}})
    await widgets.apply(W, make.widget(labels={"y": "2"}), code=422)  # model is fixed
    spec = (await widgets.apply(W, make.widget(model="a", labels={"y": "2"})))["spec"]
    assert (spec["labels"], spec["note"], spec["train"]) == ({"y": "2"}, "mine", {"epochs": 3})


async def test_a_map_that_apply_empties_is_gone(widgets, make):
    await widgets.apply(W, make.widget(labels={"x": "1"}))
    assert "labels" not in (await widgets.apply(W, make.widget()))["spec"]


async def test_a_field_applied_by_two_stays_until_both_let_go(widgets, make):
    for manager in ("me", "you"):
        await widgets.apply(W, make.widget(note="x"), manager)
    assert (await widgets.apply(W, make.widget(), "me"))["spec"]["note"] == "x"
    assert "note" not in (await widgets.apply(W, make.widget(), "you"))["spec"]


async def test_applying_another_managers_field_is_a_conflict_that_names_it(widgets, make):
    await widgets.apply(W, make.widget(), "me")
    status = await widgets.apply(W, make.widget(size=9), "you", code=409)
    assert status["message"] == 'Apply failed with 1 conflict: conflict with "me": .spec.size'
    assert status["details"]["causes"] == [
        {"reason": "FieldManagerConflict", "message": 'conflict with "me"', "field": ".spec.size"}
    ]


async def test_conflicts_with_an_updater_tell_its_version(widgets, make):
    await widgets.post(WIDGETS + "?fieldManager=me", make.widget(note="a"))
    status = await widgets.apply(W, make.widget(size=9, note="b"), "you", code=409)
    assert 'Apply failed with 2 conflicts:\n- conflict with "me" using demo.example.com/v1' in status["message"]
    assert [cause["field"] for cause in status["details"]["causes"]] == [".spec.note", ".spec.size"]


async def test_force_takes_the_field_over(widgets, make):
    await widgets.apply(W, make.widget(), "me")
    done = await widgets.apply(W, make.widget(size=9), "you", force=True)
    assert done["spec"]["size"] == 9
    assert list(owners(done)) == [("you", "Apply", "")]


async def test_applying_the_same_value_shares_the_field(widgets, make):
    await widgets.apply(W, make.widget(), "me")
    done = await widgets.apply(W, make.widget(), "you")
    assert owners(done)["me", "Apply", ""] == owners(done)["you", "Apply", ""]


async def test_conditions_are_owned_by_their_type(widgets, make):
    await widgets.post(WIDGETS, make.widget())
    for manager in ("ready", "done"):
        condition = {"type": manager, "status": "True"}
        body = make.widget() | {"status": {"conditions": [condition]}}
        del body["spec"]
        done = await widgets.apply(W + "/status", body, manager)
    assert [c["type"] for c in done["status"]["conditions"]] == ["ready", "done"]
    tree = owners(done)["done", "Apply", "status"]["f:status"]["f:conditions"]
    assert tree == {'k:{"type":"done"}': {"f:type": {}, "f:status": {}}}
    empty = make.widget() | {"status": {}}
    done = await widgets.apply(W + "/status", empty, "ready")
    assert [c["type"] for c in done["status"]["conditions"]] == ["done"]


async def test_an_empty_list_in_an_application_empties_nobody_elses(widgets, make):
    await widgets.apply(W, make.widget(parts=[{"name": "a"}]), "me")
    done = await widgets.apply(W, make.widget(parts=[]), "you")
    assert [part["name"] for part in done["spec"]["parts"]] == ["a"]


async def test_an_item_that_others_own_a_part_of_keeps_its_key(widgets, make):
    await widgets.apply(W, make.widget(parts=[{"name": "a"}]), "me")
    await widgets.patch(W + "?fieldManager=you", {"spec": {"parts": [{"name": "a", "count": 5}]}})
    assert (await widgets.apply(W, make.widget(), "me"))["spec"]["parts"] == [{"name": "a", "count": 5}]


async def test_an_application_to_another_incarnation_is_a_conflict(widgets, make):
    await widgets.apply(W, make.widget())
    body = make.widget() | {"metadata": {"name": "w", "uid": "another"}}
    assert "Precondition failed: UID" in (await widgets.apply(W, body, code=409))["message"]


async def test_sets_are_owned_by_their_values(widgets, make):
    await widgets.apply(W, make.widget(tags=["a"]), "me")
    done = await widgets.apply(W, make.widget(tags=["b"]), "you")
    assert done["spec"]["tags"] == ["a", "b"]
    assert (await widgets.apply(W, make.widget(), "you"))["spec"]["tags"] == ["a"]


async def test_applying_an_unknown_field_is_refused(widgets, make):
    status = await widgets.apply(W, make.widget(foo=1), code=400)
    assert 'unknown field "spec.foo"' in status["message"]


async def test_apply_needs_a_kind(widgets):
    await widgets.apply(W, {"metadata": {"name": "w"}, "spec": {"size": 3}}, code=400)


async def test_applying_status_to_a_missing_object_is_not_found(widgets, make):
    await widgets.apply(W + "/status", make.widget() | {"status": {"state": "x"}}, code=404)


async def test_apply_to_the_main_endpoint_leaves_status_alone(widgets, make):
    await widgets.apply(W, make.widget())
    await widgets.patch(W + "/status", {"status": {"state": "x"}})
    done = await widgets.apply(W, make.widget(size=4) | {"status": {"state": "y"}})
    assert done["status"] == {"state": "x"}


def _template(spec):
    return {"spec": {"template": {"spec": spec}}}


def _deployment(container):
    labels = {"app": "d"}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [container]}}
    spec = {"selector": {"matchLabels": labels}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}, "spec": spec}
