"""Objects and their bookkeeping: names, versions, generations, status, conflicts, deletion, lists."""

import asyncio
import re

WIDGETS = "/apis/demo.example.com/v1/namespaces/default/widgets"
W = WIDGETS + "/w"


async def test_a_created_object_has_an_identity_and_the_first_generation(widgets, make):
    made = await widgets.post(WIDGETS, make.widget(), code=201)
    meta = made["metadata"]
    assert re.fullmatch(r"[0-9a-f-]{36}", meta["uid"])
    assert meta["generation"] == 1
    assert meta["namespace"] == "default"
    assert await widgets.get(W) == made


async def test_generate_name_makes_names_that_differ(widgets, make):
    body = make.widget() | {"metadata": {"generateName": "w-"}}
    names = {(await widgets.post(WIDGETS, body))["metadata"]["name"] for _ in range(3)}
    assert len(names) == 3
    assert all(re.fullmatch(r"w-[a-z0-9]{5}", name) for name in names)


async def test_a_second_object_of_the_same_name_already_exists(widgets, make):
    await widgets.post(WIDGETS, make.widget())
    status = await widgets.post(WIDGETS, make.widget(), code=409)
    assert (status["reason"], status["message"]) == ("AlreadyExists", 'widgets.demo.example.com "w" already exists')


async def test_a_name_that_is_no_dns_name_is_refused_with_the_rule(widgets, make):
    status = await widgets.post(WIDGETS, make.widget("Bad_Name"), code=422)
    assert status["details"]["causes"][0]["field"] == "metadata.name"
    assert "metadata.name in body should match" in status["message"]


async def test_a_label_value_that_is_too_long_is_refused(widgets, make):
    body = make.widget()
    body["metadata"]["labels"] = {"run": "x" * 64}
    assert (
        "metadata.labels.run in body should be at most 63 chars long"
        in (await widgets.post(WIDGETS, body, code=422))["message"]
    )


async def test_an_object_for_a_missing_namespace_is_refused(widgets, make):
    status = await widgets.post(WIDGETS.replace("default", "nowhere"), make.widget(), code=404)
    assert status["message"] == 'namespaces "nowhere" not found'


async def test_an_object_of_another_namespace_than_the_url_is_refused(widgets, make):
    body = make.widget()
    body["metadata"]["namespace"] = "kube-system"
    await widgets.post(WIDGETS, body, code=400)


async def test_an_object_of_another_kind_than_the_url_is_refused(widgets, make):
    await widgets.post(WIDGETS, make.job(), code=400)


async def test_versions_grow_by_one_counter_across_kinds(widgets, make):
    first = await widgets.post(WIDGETS, make.widget())
    second = await widgets.post("/apis/batch/v1/namespaces/default/jobs", make.job())
    assert int(second["metadata"]["resourceVersion"]) == int(first["metadata"]["resourceVersion"]) + 1


async def test_a_change_of_the_spec_counts_a_generation(widgets, make):
    await widgets.post(WIDGETS, make.widget())
    assert (await widgets.patch(W, {"spec": {"size": 4}}))["metadata"]["generation"] == 2


async def test_labels_and_status_count_no_generation(widgets, make):
    await widgets.post(WIDGETS, make.widget())
    await widgets.patch(W, {"metadata": {"labels": {"a": "b"}}})
    assert (await widgets.patch(W + "/status", {"status": {"state": "x"}}))["metadata"]["generation"] == 1


async def test_the_main_endpoint_does_not_write_status(widgets, make):
    made = await widgets.post(WIDGETS, make.widget() | {"status": {"state": "x"}})
    assert "status" not in made
    assert "status" not in await widgets.patch(W, {"status": {"state": "x"}, "spec": {"size": 5}})


async def test_the_status_endpoint_writes_nothing_but_status(widgets, make):
    await widgets.post(WIDGETS, make.widget())
    change = {"spec": {"size": 9}, "metadata": {"labels": {"a": "b"}}, "status": {"state": "x"}}
    done = await widgets.patch(W + "/status", change)
    assert (done["spec"]["size"], done["status"], "labels" in done["metadata"]) == (3, {"state": "x"}, False)


async def test_a_stale_version_is_a_conflict(widgets, make):
    old = await widgets.post(WIDGETS, make.widget())
    await widgets.patch(W, {"spec": {"size": 4}})
    status = await widgets.put(W, old, code=409)
    assert status["reason"] == "Conflict"
    assert "the object has been modified; please apply your changes to the latest version" in status["message"]


async def test_a_put_of_a_custom_object_needs_a_version(widgets, make):
    await widgets.post(WIDGETS, make.widget())
    status = await widgets.put(W, make.widget(size=5), code=422)
    assert "metadata.resourceVersion" in status["message"]


async def test_a_put_of_another_incarnation_is_a_conflict(widgets, make):
    made = await widgets.post(WIDGETS, make.widget())
    made["metadata"]["uid"] = "another"
    assert "Precondition failed: UID" in (await widgets.put(W, made, code=409))["message"]


async def test_a_write_that_changes_nothing_makes_no_version(widgets, make):
    made = await widgets.post(WIDGETS, make.widget())
    assert await widgets.put(W, made) == made
    assert await widgets.patch(W, {"spec": {"size": 3}}) == made


async def test_a_dry_run_stores_nothing(widgets, make):
    made = await widgets.post(WIDGETS + "?dryRun=All", make.widget())
    assert made["spec"]["color"] == "red"
    await widgets.get(W, code=404)


async def test_server_owned_metadata_cannot_be_changed(widgets, make):
    made = await widgets.post(WIDGETS, make.widget())
    await widgets.patch(W, {"metadata": {"creationTimestamp": "2020-01-01T00:00:00Z", "generation": 9}})
    meta = (await widgets.get(W))["metadata"]
    assert (meta["creationTimestamp"], meta["generation"]) == (made["metadata"]["creationTimestamp"], 1)


async def test_what_is_missing_is_not_found_by_name(widgets):
    status = await widgets.get(WIDGETS + "/nope", code=404)
    assert status["message"] == 'widgets.demo.example.com "nope" not found'
    assert status["details"] == {"name": "nope", "group": "demo.example.com", "kind": "widgets"}


async def test_unknown_paths_and_methods_are_told_apart(client):
    await client.get("/apis/nothing.example.com/v1/things", code=404)
    await client.post("/api/v1/pods", {}, code=405)


async def test_deletion_answers_success_and_the_object_is_gone(widgets, make):
    made = await widgets.post(WIDGETS, make.widget())
    status = await widgets.delete(W)
    assert (status["status"], status["details"]["uid"]) == ("Success", made["metadata"]["uid"])
    await widgets.get(W, code=404)


async def test_finalizers_hold_an_object_until_they_are_removed(widgets, make):
    body = make.widget()
    body["metadata"]["finalizers"] = ["demo.example.com/hold"]
    await widgets.post(WIDGETS, body)
    assert "deletionTimestamp" in (await widgets.delete(W))["metadata"]
    await widgets.patch(W, {"metadata": {"finalizers": []}})
    await widgets.get(W, code=404)


async def test_foreground_and_orphan_deletion_wait_for_the_garbage_collector(widgets, make):
    for policy, finalizer in (("Foreground", "foregroundDeletion"), ("Orphan", "orphan")):
        await widgets.post(WIDGETS, make.widget())
        held = await widgets.delete(W, {"propagationPolicy": policy})
        assert held["metadata"]["finalizers"] == [finalizer]
        await widgets.patch(W, {"metadata": {"finalizers": None}})


async def test_a_deletion_with_another_uid_is_a_conflict(widgets, make):
    await widgets.post(WIDGETS, make.widget())
    await widgets.delete(W, {"preconditions": {"uid": "another"}}, code=409)
    await widgets.get(W)


async def _names(client, query):
    return [item["metadata"]["name"] for item in (await client.get(f"{WIDGETS}?{query}"))["items"]]


async def test_label_selectors_in_all_their_forms(widgets, make):
    for name, labels in (("a", {"x": "1"}), ("b", {"x": "2", "y": ""}), ("c", {})):
        body = make.widget(name)
        body["metadata"]["labels"] = labels
        await widgets.post(WIDGETS, body)
    expected = {
        "x=1": ["a"],
        "x!=1": ["b", "c"],
        "x in (1, 2),y": ["b"],
        "!x": ["c"],
        "x notin (2)": ["a", "c"],
        "x": ["a", "b"],
    }
    assert {text: await _names(widgets, f"labelSelector={text}") for text in expected} == expected


async def test_an_object_is_chosen_by_the_labels_that_it_has_now(widgets, make):
    for name in ("a", "b"):
        body = make.widget(name)
        body["metadata"]["labels"] = {"x": "1", "y": "1"}
        await widgets.post(WIDGETS, body)
    await widgets.patch(f"{WIDGETS}/a", {"metadata": {"labels": {"x": "2"}}})
    await widgets.delete(f"{WIDGETS}/b")
    assert [await _names(widgets, f"labelSelector={text}") for text in ("x=1", "x=2", "x=2,y=1")] == [[], ["a"], ["a"]]


async def test_a_selector_that_cannot_be_read_is_a_bad_request(widgets):
    await widgets.get(WIDGETS + "?labelSelector=x in 1", code=400)
    await widgets.get(WIDGETS + "?fieldSelector==1", code=400)


async def test_field_selectors_by_name(widgets, make):
    for name in ("a", "b"):
        await widgets.post(WIDGETS, make.widget(name))
    assert await _names(widgets, "fieldSelector=metadata.name=b,metadata.namespace=default") == ["b"]


async def test_a_list_over_all_namespaces_sees_all(widgets, make):
    await widgets.post(WIDGETS, make.widget())
    await widgets.post(WIDGETS.replace("default", "kube-system"), make.widget())
    assert len((await widgets.get("/apis/demo.example.com/v1/widgets"))["items"]) == 2


async def test_a_list_comes_in_pages_that_hold_every_object_once(widgets, make):
    for number in range(7):
        await widgets.post(WIDGETS, make.widget(f"w{number}"))
        await widgets.post(WIDGETS.replace("default", "kube-system"), make.widget(f"w{number}"))
    seen, token, left = [], "", []
    while True:
        page = await widgets.get(f"/apis/demo.example.com/v1/widgets?limit=4&continue={token}")
        seen += [(one["metadata"]["namespace"], one["metadata"]["name"]) for one in page["items"]]
        left.append(page["metadata"].get("remainingItemCount", 0))
        if not (token := page["metadata"].get("continue")):
            break
    assert seen == sorted({(space, f"w{number}") for space in ("default", "kube-system") for number in range(7)})
    assert left == [10, 6, 2, 0]


async def test_what_is_created_behind_a_page_is_on_the_next(widgets, make):
    for name in ("a", "b", "d"):
        await widgets.post(WIDGETS, make.widget(name))
    token = (await widgets.get(f"{WIDGETS}?limit=2"))["metadata"]["continue"]
    await widgets.post(WIDGETS, make.widget("c"))
    await widgets.delete(f"{WIDGETS}/a")
    assert await _names(widgets, f"limit=2&continue={token}") == ["c", "d"]


async def test_a_token_that_is_not_the_servers_is_a_bad_request(widgets):
    await widgets.get(f"{WIDGETS}?limit=2&continue=nonsense", code=400)


async def test_two_writers_with_one_version_have_one_winner(widgets, make):
    made = await widgets.post(WIDGETS, make.widget())

    async def write(size):
        async with widgets.session.put(widgets.url + W, json=made | {"spec": {"size": size}}) as answer:
            return answer.status

    assert sorted(await asyncio.gather(write(4), write(5))) == [200, 409]
