"""Watches: what a client is told, from when on, and what it is told when that is too long ago."""

import asyncio

import pytest
from support.patience import PATIENCE

WIDGETS = "/apis/demo.example.com/v1/namespaces/default/widgets"
W = WIDGETS + "/w"


def told(events):
    return [(event["type"], event["object"]["metadata"].get("name")) for event in events]


async def test_a_watch_from_a_version_tells_every_later_write(widgets, make):
    since = (await widgets.get(WIDGETS))["metadata"]["resourceVersion"]
    await widgets.post(WIDGETS, make.widget())
    await widgets.patch(W, {"spec": {"size": 4}})
    await widgets.delete(W)
    events = await widgets.watch(WIDGETS, 3, resourceVersion=since)
    assert told(events) == [("ADDED", "w"), ("MODIFIED", "w"), ("DELETED", "w")]


async def test_a_watch_without_a_version_begins_with_what_exists(widgets, make):
    await widgets.post(WIDGETS, make.widget())
    assert told(await widgets.watch(WIDGETS, 1)) == [("ADDED", "w")]
    assert told(await widgets.watch(WIDGETS, 1, resourceVersion="0")) == [("ADDED", "w")]


async def test_the_version_of_a_write_is_the_version_of_its_event(widgets, make):
    since = (await widgets.get(WIDGETS))["metadata"]["resourceVersion"]
    await widgets.post(WIDGETS, make.widget())
    patched = await widgets.patch(W, {"spec": {"size": 4}})
    events = await widgets.watch(WIDGETS, 2, resourceVersion=since)
    assert events[1]["object"] == patched


async def test_a_deletion_event_has_a_version_of_its_own(widgets, make):
    made = await widgets.post(WIDGETS, make.widget())
    await widgets.delete(W)
    since = made["metadata"]["resourceVersion"]
    event = (await widgets.watch(WIDGETS, 1, resourceVersion=since))[0]
    assert int(event["object"]["metadata"]["resourceVersion"]) == int(since) + 1


async def test_a_write_that_changes_nothing_makes_no_event(widgets, make):
    made = await widgets.post(WIDGETS, make.widget())
    await widgets.patch(W, {"spec": {"size": 3}})
    await widgets.post(WIDGETS, make.widget("next"))
    events = await widgets.watch(WIDGETS, 1, resourceVersion=made["metadata"]["resourceVersion"])
    assert told(events) == [("ADDED", "next")]


async def test_an_object_that_leaves_the_selection_is_deleted_for_the_watcher(widgets, make):
    since = (await widgets.get(WIDGETS))["metadata"]["resourceVersion"]
    body = make.widget()
    await widgets.post(WIDGETS, body)
    await widgets.patch(W, {"metadata": {"labels": {"on": "yes"}}})
    last = await widgets.patch(W, {"metadata": {"labels": {"on": "no"}}})
    events = await widgets.watch(WIDGETS, 2, resourceVersion=since, labelSelector="on=yes")
    assert told(events) == [("ADDED", "w"), ("DELETED", "w")]
    assert events[1]["object"]["metadata"]["labels"] == {"on": "yes"}
    assert events[1]["object"]["metadata"]["resourceVersion"] == last["metadata"]["resourceVersion"]


async def test_a_watch_of_one_namespace_does_not_tell_of_another(widgets, make):
    since = (await widgets.get(WIDGETS))["metadata"]["resourceVersion"]
    await widgets.post(WIDGETS.replace("default", "kube-system"), make.widget("there"))
    await widgets.post(WIDGETS, make.widget("here"))
    assert told(await widgets.watch(WIDGETS, 1, resourceVersion=since)) == [("ADDED", "here")]


async def test_bookmarks_come_to_those_who_allow_them(widgets):
    event = (await widgets.watch(WIDGETS, 1, allowWatchBookmarks="true"))[0]
    assert (event["type"], event["object"]["kind"]) == ("BOOKMARK", "Widget")
    assert event["object"]["metadata"]["resourceVersion"]


async def test_a_watch_list_ends_its_beginning_with_a_marked_bookmark(widgets, make):
    await widgets.post(WIDGETS, make.widget())
    query = {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan", "allowWatchBookmarks": "true"}
    added, bookmark = await widgets.watch(WIDGETS, 2, **query)
    assert added["type"] == "ADDED"
    assert bookmark["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}


async def test_a_watch_ends_when_its_time_is_over(widgets):
    assert await widgets.watch(WIDGETS, 1, timeoutSeconds="1") == []


async def test_a_version_older_than_the_history_is_gone(widgets, make):
    since = (await widgets.get(WIDGETS))["metadata"]["resourceVersion"]
    await widgets.post(WIDGETS, make.widget())
    for size in range(201):
        await widgets.patch(W, {"spec": {"size": 4 + size % 2}})
    event = (await widgets.watch(WIDGETS, 1, resourceVersion=since))[0]
    assert (event["type"], event["object"]["code"], event["object"]["reason"]) == ("ERROR", 410, "Expired")


async def test_a_busy_kind_does_not_age_the_versions_of_a_quiet_one(widgets, make):
    since = (await widgets.get("/api/v1/namespaces/default/pods"))["metadata"]["resourceVersion"]
    await widgets.post(WIDGETS, make.widget())
    for size in range(201):
        await widgets.patch(W, {"spec": {"size": 4 + size % 2}})
    await widgets.post("/api/v1/namespaces/default/pods", make.pod())
    assert told(await widgets.watch("/api/v1/namespaces/default/pods", 1, resourceVersion=since)) == [("ADDED", "p")]


async def test_a_version_from_the_future_is_refused(widgets):
    event = (await widgets.watch(WIDGETS, 1, resourceVersion="9999"))[0]
    assert (event["type"], event["object"]["code"]) == ("ERROR", 504)
    event = (await widgets.watch(WIDGETS, 1, resourceVersion="x"))[0]
    assert event["object"]["code"] == 400


async def test_a_client_that_leaves_takes_its_feed_along(server, widgets, eventually):
    async def forgotten():
        return not server.registry.store.shelf("widgets.demo.example.com").feeds

    await widgets.watch(WIDGETS, 1, allowWatchBookmarks="true")
    await eventually(forgotten)


async def test_deleting_a_definition_ends_the_watches_of_its_kind(widgets, watched):
    watching = asyncio.create_task(widgets.watch(WIDGETS, 1))
    await watched()
    await widgets.delete("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/widgets.demo.example.com")
    assert await asyncio.wait_for(watching, PATIENCE) == []


async def test_stopping_the_server_ends_watches_and_starting_it_keeps_the_objects(server, widgets, make, watched):
    await widgets.post(WIDGETS, make.widget())
    watching = asyncio.create_task(widgets.watch(WIDGETS, 2))
    await watched()
    await server.stop()
    assert told(await asyncio.wait_for(watching, PATIENCE)) == [("ADDED", "w")]
    await server.start(int(server.url.rsplit(":", 1)[1]))
    assert (await widgets.get(W))["spec"]["size"] == 3


@pytest.mark.parametrize("word", ["true", "1", "True"])
async def test_every_spelling_of_watch_is_understood(widgets, make, word):
    await widgets.post(WIDGETS, make.widget())
    async with widgets.session.get(f"{widgets.url}{WIDGETS}?watch={word}&timeoutSeconds=1") as answer:
        assert b'"ADDED"' in await answer.content.readline()
