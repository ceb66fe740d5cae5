"""The real kubernetes client and the real kopf against the server."""

import asyncio
from contextlib import asynccontextmanager

import kopf
import pytest
import yaml
from kubernetes.aio import client as k8s
from kubernetes.aio import config, watch
from support.patience import PATIENCE

WIDGETS = "/apis/demo.example.com/v1/namespaces/default/widgets"
WHERE = ("demo.example.com", "v1", "default", "widgets")


@pytest.fixture
async def api(server):
    configuration = k8s.Configuration()
    await config.load_kube_config_from_dict(yaml.safe_load(server.kubeconfig()), client_configuration=configuration)
    async with k8s.ApiClient(configuration) as api:
        yield api


async def test_the_client_creates_reads_and_lists_jobs(api, make):
    batch = k8s.BatchV1Api(api)
    made = await batch.create_namespaced_job("default", make.job())
    assert made.spec.completions == 1
    assert (await batch.read_namespaced_job("j", "default")).metadata.uid == made.metadata.uid
    assert [job.metadata.name for job in (await batch.list_job_for_all_namespaces()).items] == ["j"]


async def test_the_client_writes_typed_objects(api):
    core = k8s.CoreV1Api(api)
    body = k8s.V1ConfigMap(metadata=k8s.V1ObjectMeta(name="c"), data={"a": "1"})
    await core.create_namespaced_config_map("default", body)
    done = await core.patch_namespaced_config_map("c", "default", {"data": {"b": "2"}})
    assert done.data == {"a": "1", "b": "2"}


async def test_the_client_patches_and_replaces_the_status_of_a_widget(api, widgets, make):
    custom = k8s.CustomObjectsApi(api)
    await custom.create_namespaced_custom_object(*WHERE, make.widget())
    live = await custom.get_namespaced_custom_object(*WHERE, "w")
    done = await custom.replace_namespaced_custom_object_status(*WHERE, "w", live | {"status": {"state": "x"}})
    assert done["status"] == {"state": "x"}


async def test_the_client_reads_the_reason_of_a_refusal(api, widgets, make):
    with pytest.raises(k8s.ApiException) as refused:
        await k8s.CustomObjectsApi(api).create_namespaced_custom_object(*WHERE, make.widget(size=0))
    assert refused.value.status == 422
    assert "spec.size" in refused.value.body


async def test_the_client_watches(api, widgets, make):
    core = k8s.CoreV1Api(api)
    await core.create_namespaced_pod("default", make.pod())
    async with watch.Watch() as stream:
        async for event in stream.stream(core.list_namespaced_pod, "default", timeout_seconds=5):
            assert (event["type"], event["object"].metadata.name) == ("ADDED", "p")
            break


async def test_the_client_deletes_with_options(api, make):
    batch = k8s.BatchV1Api(api)
    await batch.create_namespaced_job("default", make.job())
    await batch.delete_namespaced_job("j", "default", propagation_policy="Background")
    assert (await batch.list_namespaced_job("default")).items == []


@asynccontextmanager
async def running(registry, **settings):
    """A kopf operator in this loop, ready when the block begins."""
    stop, ready = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(
        kopf.operator(
            registry=registry, standalone=True, clusterwide=True, stop_flag=stop, ready_flag=ready, **settings
        )
    )
    await asyncio.wait_for(ready.wait(), PATIENCE)
    yield
    stop.set()
    await asyncio.wait_for(task, PATIENCE)


@pytest.fixture
def registry(server, tmp_path, monkeypatch):
    path = tmp_path / "kubeconfig"
    path.write_text(server.kubeconfig())
    monkeypatch.setenv("KUBECONFIG", str(path))
    registry = kopf.OperatorRegistry()
    kopf.on.login(registry=registry)(lambda **kwargs: kopf.login_with_kubeconfig(**kwargs))
    return registry


async def seen(queue, *wanted):
    """Wait until all of these events have come, in any company."""
    missing = set(wanted)
    while missing:
        missing.discard(await asyncio.wait_for(queue.get(), PATIENCE))


async def test_kopf_sees_what_exists_what_comes_and_what_goes(registry, widgets, make):
    queue = asyncio.Queue()
    kopf.on.event("demo.example.com", "v1", "widgets", registry=registry)(
        lambda name, event, **_: queue.put_nowait((event["type"], name))
    )
    await widgets.post(WIDGETS, make.widget("old"))
    async with running(registry):
        await seen(queue, (None, "old"))
        await widgets.post(WIDGETS, make.widget("new"))
        await widgets.patch(WIDGETS + "/old", {"spec": {"size": 9}})
        await seen(queue, ("ADDED", "new"), ("MODIFIED", "old"))
        await widgets.delete(WIDGETS + "/new")
        await seen(queue, ("DELETED", "new"))


async def test_kopf_writes_status_events_and_finalizers(registry, widgets, make, eventually):
    async def state():
        return (await widgets.get(WIDGETS + "/w")).get("status") == {"state": "made"}

    async def events():
        return (await widgets.get("/api/v1/namespaces/default/events"))["items"]

    async def gone():
        return not (await widgets.get(WIDGETS))["items"]

    done = asyncio.Queue()

    @kopf.on.create("demo.example.com", "v1", "widgets", registry=registry)
    async def create(body, patch, **_):
        patch.status["state"] = "made"
        kopf.info(body, reason="Made", message="by the test")

    @kopf.on.delete("demo.example.com", "v1", "widgets", registry=registry)
    async def delete(name, status, **_):
        done.put_nowait((name, status["state"]))

    async with running(registry):
        await widgets.post(WIDGETS, make.widget())
        await eventually(state)
        assert (await eventually(events))[0]["involvedObject"]["name"] == "w"
        assert (await widgets.get(WIDGETS + "/w"))["metadata"]["finalizers"]
        await widgets.delete(WIDGETS + "/w")
        assert await asyncio.wait_for(done.get(), PATIENCE) == ("w", "made")
        await eventually(gone)


async def test_kopf_survives_a_version_that_is_gone(registry, server, widgets, make):
    queue = asyncio.Queue()
    kopf.on.event("demo.example.com", "v1", "widgets", registry=registry)(
        lambda name, spec, **_: queue.put_nowait((name, spec["size"]))
    )
    async with running(registry):
        await widgets.post(WIDGETS, make.widget())
        await seen(queue, ("w", 3))
        await server.stop()
        server.registry.store.shelf("widgets.demo.example.com").forgotten = 10**6
        server.registry.store.version = 10**6
        await server.start(int(server.url.rsplit(":", 1)[1]))
        await widgets.patch(WIDGETS + "/w", {"spec": {"size": 55}})
        await seen(queue, ("w", 55))
