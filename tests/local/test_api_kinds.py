"""Built-in kinds: what their admission adds, what it refuses, and how pods and namespaces end."""

import base64
import copy
import io
import json
from datetime import datetime, timedelta

import aiohttp
import pytest
from aiohttp import web

CORE = "/api/v1/namespaces/default/"
PODS = CORE + "pods"
JOBS = "/apis/batch/v1/namespaces/default/jobs"


def causes(status):
    return [cause["field"] for cause in status["details"]["causes"]]


def changed(body, path, value):
    """A copy of a body with one field set: `a.0.b` steps into lists."""
    body = copy.deepcopy(body)
    place = body
    *parents, last = path.split(".")
    for word in parents:
        place = place[int(word)] if isinstance(place, list) else place.setdefault(word, {})
    place[last] = value
    return body


async def test_a_pod_gets_the_defaults_that_clients_read(client, make):
    made = await client.post(PODS, make.pod())
    spec, container = made["spec"], made["spec"]["containers"][0]
    assert (spec["restartPolicy"], spec["terminationGracePeriodSeconds"]) == ("Always", 30)
    assert container["terminationMessagePath"] == "/dev/termination-log"
    assert made["status"]["phase"] == "Pending"


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("spec.containers", None, "spec.containers"),
        ("spec.containers", "c", "spec.containers"),
        ("spec.restartPolicy", "Sometimes", "spec.restartPolicy"),
        ("spec.containers.0.name", None, "spec.containers[0].name"),
        ("spec.containers.0.env", [{"name": "A"}, {"name": "A"}], "spec.containers[0].env[1]"),
        ("metadata.labels", {"a": "no spaces"}, "metadata.labels.a"),
    ],
)
async def test_a_pod_that_could_not_run_is_refused(client, make, path, value, field):
    status = await client.post(PODS, changed(make.pod(), path, value), code=422)
    assert field in causes(status)


async def test_an_unknown_field_of_a_builtin_kind_is_refused_where_strict(client, make):
    body = changed(make.pod(), "spec.containers.0.imagee", "x")
    status = await client.post(PODS + "?fieldValidation=Strict", body, code=400)
    assert 'unknown field "spec.containers[0].imagee"' in status["message"]


async def test_a_null_in_a_builtin_object_is_an_absent_field(client, make):
    made = await client.post(PODS, changed(make.pod(), "spec.nodeSelector", None))
    assert "nodeSelector" not in made["spec"]


async def test_a_binding_puts_a_pod_on_a_node_once(client, make):
    await client.post(PODS, make.pod())
    binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "p"}, "target": {"name": "n"}}
    await client.post(PODS + "/p/binding", binding, code=201)
    assert (await client.get(PODS + "?fieldSelector=spec.nodeName=n"))["items"][0]["spec"]["nodeName"] == "n"
    await client.post(PODS + "/p/binding", binding, code=409)


async def test_an_unbound_pod_vanishes_at_once_and_the_answer_is_the_pod(client, make):
    await client.post(PODS, make.pod())
    assert (await client.delete(PODS + "/p"))["kind"] == "Pod"
    await client.get(PODS + "/p", code=404)


async def test_a_running_pod_is_given_its_grace_and_ends_by_the_kubelets_word(client, make):
    await client.post(PODS, make.pod(nodeName="n"))
    meta = (await client.delete(PODS + "/p"))["metadata"]
    assert (meta["deletionGracePeriodSeconds"], "deletionTimestamp" in meta) == (30, True)
    shorter = (await client.delete(PODS + "/p", {"gracePeriodSeconds": 5}))["metadata"]
    assert shorter["deletionGracePeriodSeconds"] == 5
    first, second = (datetime.fromisoformat(one["deletionTimestamp"]) for one in (meta, shorter))
    assert first - second == timedelta(seconds=25), "the timestamp is the end of the grace period"
    assert (await client.delete(PODS + "/p", {"gracePeriodSeconds": 9}))["metadata"]["deletionGracePeriodSeconds"] == 5
    await client.delete(PODS + "/p?gracePeriodSeconds=0")
    await client.get(PODS + "/p", code=404)


async def test_a_finished_pod_needs_no_grace(client, make):
    await client.post(PODS, make.pod(nodeName="n"))
    await client.patch(PODS + "/p/status", {"status": {"phase": "Succeeded"}})
    await client.delete(PODS + "/p")
    await client.get(PODS + "/p", code=404)


async def test_a_pod_with_a_finalizer_stays_after_its_grace(client, make):
    await client.post(PODS, changed(make.pod(nodeName="n"), "metadata.finalizers", ["demo.example.com/hold"]))
    await client.delete(PODS + "/p", {"gracePeriodSeconds": 0})
    await client.patch(PODS + "/p", {"metadata": {"finalizers": None}})
    await client.get(PODS + "/p", code=404)


async def test_a_job_selects_its_own_pods(client, make):
    made = await client.post(JOBS, make.job())
    uid, labels = made["metadata"]["uid"], made["spec"]["template"]["metadata"]["labels"]
    assert made["spec"]["selector"] == {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}
    assert labels == {
        "batch.kubernetes.io/controller-uid": uid,
        "batch.kubernetes.io/job-name": "j",
        "controller-uid": uid,
        "job-name": "j",
    }


async def test_a_job_gets_its_defaults(client, make):
    spec = (await client.post(JOBS, make.job()))["spec"]
    assert {word: value for word, value in spec.items() if word not in ("template", "selector")} == {
        "parallelism": 1,
        "completions": 1,
        "backoffLimit": 6,
        "suspend": False,
        "completionMode": "NonIndexed",
    }


async def test_a_job_with_a_limit_per_index_has_no_limit_in_all(client, make):
    body = make.job(completionMode="Indexed", completions=2, backoffLimitPerIndex=1)
    assert (await client.post(JOBS, body))["spec"]["backoffLimit"] == 2**31 - 1


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("spec.template.spec.restartPolicy", "Always", "spec.template.spec.restartPolicy"),
        ("spec.parallelism", -1, "spec.parallelism"),
        ("spec.template.metadata.labels", {"a": "x" * 64}, "spec.template.metadata.labels.a"),
        ("spec.template.spec.containers", None, "spec.template.spec.containers"),
    ],
)
async def test_a_job_that_could_not_run_is_refused(client, make, path, value, field):
    assert field in causes(await client.post(JOBS, changed(make.job(), path, value), code=422))


async def test_a_jobs_template_is_fixed_and_its_parallelism_is_not(client, make):
    await client.post(JOBS, make.job())
    change = {"spec": {"template": {"spec": {"terminationGracePeriodSeconds": 1}}}}
    assert causes(await client.patch(JOBS + "/j", change, code=422)) == ["spec.template"]
    assert (await client.patch(JOBS + "/j", {"spec": {"parallelism": 2, "suspend": True}}))["metadata"][
        "generation"
    ] == 2


async def test_applying_a_job_again_changes_nothing(client, make):
    first = await client.apply(JOBS + "/j", make.job())
    assert await client.apply(JOBS + "/j", make.job()) == first


async def test_deleting_a_job_without_a_policy_orphans_its_pods(client, make):
    await client.post(JOBS, make.job())
    assert (await client.delete(JOBS + "/j"))["metadata"]["finalizers"] == ["orphan"]


async def test_deleting_a_job_in_the_background_is_done_at_once(client, make):
    await client.post(JOBS, make.job())
    assert (await client.delete(JOBS + "/j?propagationPolicy=Background"))["status"] == "Success"


async def test_a_secrets_plain_text_is_stored_encoded(client):
    body = {"metadata": {"name": "s"}, "stringData": {"key": "value"}}
    made = await client.post(CORE + "secrets", body)
    assert (made["data"], made["type"]) == ({"key": base64.b64encode(b"value").decode()}, "Opaque")
    assert "stringData" not in made


async def test_plain_text_that_a_patch_adds_to_a_secret_stands_beside_what_is_there(client):
    await client.post(CORE + "secrets", {"metadata": {"name": "s"}, "stringData": {"a": "1"}})
    patched = await client.patch(CORE + "secrets/s", {"stringData": {"b": "2"}})
    assert patched["data"] == {"a": "MQ==", "b": "Mg=="}


async def test_half_a_character_does_not_make_an_object_unreadable(client):
    await client.post(CORE + "configmaps", {"metadata": {"name": "c"}, "data": {"a": "\ud83d"}})
    assert (await client.get(CORE + "configmaps"))["items"][0]["data"] == {"a": "\ufffd"}


async def test_a_request_holds_at_most_three_mebibytes(client):
    body = json.dumps({"metadata": {"name": "c"}, "data": {"a": "x" * 3 * 2**20}})
    async with client.session.post(client.url + CORE + "configmaps", data=io.BytesIO(body.encode())) as answer:
        assert answer.status == 413


async def test_events_are_selected_by_what_they_are_about(client):
    for name in ("a", "b"):
        about = {"kind": "Widget", "name": name, "namespace": "default", "uid": name}
        body = {"metadata": {"generateName": "e-"}, "involvedObject": about, "reason": "Test", "type": "Normal"}
        await client.post(CORE + "events", body)
    query = "?fieldSelector=involvedObject.name=b,involvedObject.kind=Widget,reason=Test,type!=Warning"
    found = await client.get(CORE + "events" + query)
    assert [event["involvedObject"]["name"] for event in found["items"]] == ["b"]


async def test_a_node_registers_with_its_status(client):
    body = {"metadata": {"name": "n"}, "status": {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}]}}
    assert (await client.post("/api/v1/nodes", body))["status"] == body["status"]


async def test_a_namespace_takes_its_contents_along_and_takes_nothing_new(client, make):
    await client.post("/api/v1/namespaces", {"metadata": {"name": "team"}})
    pods = PODS.replace("default", "team")
    await client.post(pods, make.pod("free"))
    await client.post(pods, changed(make.pod("held"), "metadata.finalizers", ["demo.example.com/hold"]))
    assert (await client.delete("/api/v1/namespaces/team"))["status"]["phase"] == "Terminating"
    await client.get(pods + "/free", code=404)
    status = await client.post(pods, make.pod("late"), code=403)
    assert "because it is being terminated" in status["message"]
    await client.patch(pods + "/held", {"metadata": {"finalizers": None}})
    await client.get("/api/v1/namespaces/team", code=404)


async def test_an_empty_namespace_is_gone_at_once(client):
    await client.post("/api/v1/namespaces", {"metadata": {"name": "team"}})
    await client.delete("/api/v1/namespaces/team")
    await client.get("/api/v1/namespaces/team", code=404)


async def test_a_lease_is_taken_by_one_of_two(client):
    leases = "/apis/coordination.k8s.io/v1/namespaces/default/leases"
    made = await client.post(leases, {"metadata": {"name": "l"}, "spec": {"holderIdentity": "a"}})
    await client.put(leases + "/l", made | {"spec": {"holderIdentity": "b"}})
    await client.put(leases + "/l", made | {"spec": {"holderIdentity": "c"}}, code=409)


# --- logs, through a kubelet


@pytest.fixture
async def kubelet(client):
    """A node whose kubelet answers with what it was asked."""

    async def logs(request):
        if request.match_info["pod"] == "starting":
            raise web.HTTPBadRequest(text='container "c" in pod "starting" is waiting to start: ContainerCreating')
        return web.Response(text=f"{request.path_qs}\n")

    app = web.Application()
    app.router.add_get("/containerLogs/{ns}/{pod}/{container}", logs)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    status = {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}]}
    status |= {"daemonEndpoints": {"kubeletEndpoint": {"Port": port}}}
    await client.post("/api/v1/nodes", {"metadata": {"name": "n"}, "status": status})
    yield
    await runner.cleanup()


async def _log(client, name, query=""):
    async with client.session.get(f"{client.url}{PODS}/{name}/log{query}") as answer:
        return answer.status, await answer.text()


async def test_a_log_is_asked_from_the_pods_node(client, make, kubelet):
    await client.post(PODS, make.pod(nodeName="n"))
    assert await _log(client, "p", "?tailLines=2") == (200, "/containerLogs/default/p/c?tailLines=2\n")


async def test_the_kubelets_refusal_is_passed_on(client, make, kubelet):
    await client.post(PODS, make.pod("starting", nodeName="n"))
    status, text = await _log(client, "starting")
    assert (status, "is waiting to start" in text) == (400, True)


async def test_a_pod_without_a_node_has_an_empty_log(client, make):
    await client.post(PODS, make.pod())
    assert await _log(client, "p") == (200, "")


async def test_a_dead_kubelet_is_an_internal_error(client, make, unused_tcp_port):
    status = {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}]}
    status |= {"daemonEndpoints": {"kubeletEndpoint": {"Port": unused_tcp_port}}}
    await client.post("/api/v1/nodes", {"metadata": {"name": "n"}, "status": status})
    await client.post(PODS, make.pod(nodeName="n"))
    assert (await _log(client, "p"))[0] == 500


# --- the server itself


async def test_the_server_tells_its_version_and_health(client):
    assert (await client.get("/version"))["major"] == "1"
    for word in ("healthz", "readyz", "livez"):
        async with client.session.get(f"{client.url}/{word}") as answer:
            assert await answer.text() == "ok"


async def test_protobuf_is_refused_with_advice(client):
    status = await client.ask("POST", PODS, {}, kind="application/vnd.kubernetes.protobuf", code=415)
    assert "this server does not speak protobuf" in status["message"]


async def test_a_body_that_is_no_object_is_a_bad_request(client):
    for body in ("[", "[]", "5"):
        async with client.session.post(client.url + PODS, data=body) as answer:
            assert answer.status == 400


async def test_a_fault_of_a_test_is_the_answer(server, client):
    server.fault = lambda request: web.Response(status=503) if request.method == "POST" else None
    async with client.session.post(client.url + PODS, json={}) as answer:
        assert answer.status == 503
    await client.get(PODS)


async def test_a_fault_may_wait_and_let_pass(server, client):
    async def fault(request):
        return None

    server.fault = fault
    await client.get(PODS)
    assert server.requests[-1] == ("GET", PODS)


async def test_a_bug_is_an_internal_error_and_is_logged(server, client, caplog):
    server.registry.get = None
    status = await client.get(PODS + "/p", code=500)
    assert "NoneType" in status["message"]
    assert "GET /api/v1/namespaces/default/pods/p" in caplog.text


async def test_many_servers_live_in_one_process(server, client, make):
    other = type(server)()
    await other.start()
    await client.post(PODS, make.pod())
    async with aiohttp.ClientSession() as session, session.get(other.url + PODS) as answer:
        assert (await answer.json())["items"] == []
    await other.stop()
