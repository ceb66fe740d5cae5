"""The node: what a container finds, how it ends, and what the pod's status says of it."""

import asyncio
import base64
from pathlib import Path

import pytest
from support.local_world import KUBECTL, condition, container, containers_below, eventually
from support.patience import PATIENCE

from cgd_local.node import requests_of
from cgd_local.pods import pod_namespace
from cgd_local.sandbox import Sandbox, expand, rewrite
from cgd_operator.kube.client import Object
from cgd_operator.kube.kinds import CONFIGMAP, NODE, POD, SECRET, ApiError
from cgd_operator.planning.manifests import LISTENS

pytestmark = pytest.mark.asyncio(loop_scope="session")

WAIT = "sleep 60"
UNTIL_END = 'while [ ! -e "$HOME/end" ]; do sleep 0.02; done'


def ended(pod: Object) -> Object:
    return pod["status"]["containerStatuses"][0]["state"]["terminated"]


def waiting(pod: Object) -> Object:
    return (pod["status"].get("containerStatuses") or [{}])[0].get("state", {}).get("waiting", {})


# --- the environment


async def test_a_container_has_the_pods_environment_and_nothing_of_ours(world, monkeypatch):
    monkeypatch.setenv("OF_THE_NODE", "1")
    env = [{"name": "A", "value": "1"}, {"name": "B", "value": "$(A)2 $(C) $$(A)"}]
    await world.pod(containers=[container("env", env=env)])
    await world.ended()
    lines = dict(line.split("=", 1) for line in (world.log()).splitlines())
    assert set(lines) - {"PWD", "SHLVL", "_", "OLDPWD"} == {"A", "B", "HOME", "HOSTNAME", "PATH", "TMPDIR"}
    assert (lines["A"], lines["B"], lines["HOSTNAME"]) == ("1", "12 $(C) $(A)", "p")
    assert lines["TMPDIR"] == str(world.folder() / "tmp")


async def test_environment_comes_from_secrets_config_maps_and_fields(world):
    secret = {"key": base64.b64encode(b"hidden").decode()}
    await world.make(SECRET, "s", data=secret)
    await world.make(CONFIGMAP, "c", data={"color": "red"})
    ref = {"fieldRef": {"fieldPath": "metadata.labels['app']"}}
    env = [
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s", "key": "key"}}},
        {"name": "COLOR", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "color"}}},
        {"name": "NONE", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "absent", "optional": True}}},
        {"name": "APP", "valueFrom": ref},
        {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
    ]
    source = [{"prefix": "C_", "configMapRef": {"name": "c"}}, {"secretRef": {"name": "no", "optional": True}}]
    script = 'echo "$KEY $COLOR ${NONE-unset} $APP $POD $C_color"'
    await world.pod(containers=[container(script, env=env, envFrom=source)], metadata={"labels": {"app": "x"}})
    await world.ended()
    assert world.log() == "hidden red unset x p red\n"


async def test_a_missing_secret_holds_the_container_until_it_is_there(world):
    env = [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "late", "key": "key"}}}]
    await world.pod(containers=[container('echo "$KEY"', env=env)])
    pod = await world.until(POD, "p", lambda pod: waiting(pod).get("reason") == "CreateContainerConfigError")
    assert (waiting(pod)["message"], pod["status"]["phase"]) == ('secret "late" not found', "Pending")
    await world.make(SECRET, "late", stringData={"key": "here"})
    await world.ended()
    assert world.log() == "here\n"


async def test_a_missing_key_is_named(world):
    await world.make(CONFIGMAP, "c", data={})
    env = [{"name": "X", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "x"}}}]
    await world.pod(containers=[container("true", env=env)])
    pod = await world.until(POD, "p", lambda pod: waiting(pod).get("reason") == "CreateContainerConfigError")
    assert waiting(pod)["message"] == f"couldn't find key x in ConfigMap {world.namespace}/c"


@pytest.mark.parametrize("own_names", [True, False])
async def test_the_address_of_a_master_is_this_machine_where_pods_have_no_names(tmp_path, own_names):
    pod = {"metadata": {"name": "p", "namespace": "n"}, "spec": {"containers": [{"name": "main"}]}}
    sandbox = Sandbox(None, pod, tmp_path / "pod", own_names=own_names)
    env = await sandbox.environment({"name": "main", "env": [{"name": "MASTER_ADDR", "value": "t-master-0"}]}, {})
    assert env["MASTER_ADDR"] == ("t-master-0" if own_names else "127.0.0.1")


# --- volumes


async def test_volumes_are_found_where_environment_and_arguments_say(world):
    await world.make(CONFIGMAP, "c", data={"task.json": "{}", "other": "x"})
    await world.make(SECRET, "s", stringData={"token": "t0k"})
    sources = [{"configMap": {"name": "c", "items": [{"key": "other", "path": "deep/o"}]}}, {"secret": {"name": "s"}}]
    volumes = [
        {"name": "conf", "configMap": {"name": "c"}},
        {"name": "both", "projected": {"sources": sources}},
        {"name": "store", "emptyDir": {}},
    ]
    mounts = [
        {"name": "conf", "mountPath": "/etc/cgd"},
        {"name": "both", "mountPath": "/both"},
        {"name": "store", "mountPath": "/store"},
    ]
    script = 'cat "$TASK" "$1" "$2" > "$0/out"; ls "$ALL"'
    command = {"command": ["sh", "-c", script], "args": ["/store", "/both/deep/o", "/both/token"]}
    env = [{"name": "TASK", "value": "/etc/cgd/task.json"}, {"name": "ALL", "value": "/etc/cgd"}]
    await world.pod(containers=[{**container(""), **command, "env": env, "volumeMounts": mounts}], volumes=volumes)
    await world.ended()
    assert world.log() == "other\ntask.json\n"
    assert (world.folder() / "volumes/store/out").read_text() == "{}xt0k"


async def test_a_missing_volume_is_told_and_waited_for(world):
    volumes = [{"name": "v", "secret": {"secretName": "late"}}]
    await world.pod(volumes=volumes)
    event = await world.event("FailedMount")
    assert event["message"] == 'MountVolume.SetUp failed for volume "v" : secret "late" not found'
    pod = await world.until(POD, "p", lambda pod: pod["status"].get("containerStatuses"))
    assert waiting(pod)["reason"] == "ContainerCreating"
    await world.make(SECRET, "late", stringData={"a": "b"})
    assert (await world.ended())["status"]["phase"] == "Succeeded"


# --- how containers end


@pytest.mark.parametrize(
    ("script", "phase", "code", "reason"),
    [
        ("true", "Succeeded", 0, "Completed"),
        ("exit 3", "Failed", 3, "Error"),
        ("sh -c 'kill -9 $$$$'; exit $?", "Failed", 137, "Error"),
    ],
)
async def test_exit_codes_are_reported(world, script, phase, code, reason):
    await world.pod(script)
    pod = await world.ended()
    assert pod["status"]["phase"] == phase
    assert (ended(pod)["exitCode"], ended(pod)["reason"]) == (code, reason)
    assert ended(pod)["startedAt"] <= ended(pod)["finishedAt"]


async def test_a_command_that_does_not_exist_is_named_in_the_last_words(world):
    policy = {"terminationMessagePolicy": "FallbackToLogsOnError"}
    await world.pod(containers=[{"name": "main", "image": "local", "command": ["no-such-program"], **policy}])
    state = ended(await world.ended())
    assert (state["exitCode"], state["message"]) == (128, "exec 'no-such-program': No such file or directory\n")


async def test_a_container_without_a_command_waits_and_says_why(world):
    await world.pod(containers=[{"name": "main", "image": "local"}])
    pod = await world.until(POD, "p", lambda pod: waiting(pod).get("reason") == "CreateContainerConfigError")
    assert "the container must set its command" in waiting(pod)["message"]


async def test_the_last_words_come_from_the_file(world):
    script = 'printf "%05000d" 1 > "$LAST"; echo noise; exit 1'
    env = [{"name": "LAST", "value": "/dev/termination-log"}]
    await world.pod(containers=[container(script, env=env, terminationMessagePolicy="FallbackToLogsOnError")])
    assert ended(await world.ended())["message"] == "0" * 4096


async def test_the_last_words_fall_back_to_the_end_of_the_log(world):
    script = "for i in $(seq 100); do echo line $i; done; exit 1"
    await world.pod(containers=[container(script, terminationMessagePolicy="FallbackToLogsOnError")])
    lines = ended(await world.ended())["message"].splitlines()
    assert (len(lines), lines[0], lines[-1]) == (80, "line 21", "line 100")


async def test_a_container_that_fails_is_restarted_after_a_pause(world):
    await world.pod("exit 1", restartPolicy="Always")
    pod = await world.until(POD, "p", lambda pod: waiting(pod).get("reason") == "CrashLoopBackOff")
    status = (await world.until(POD, "p", lambda pod: pod["status"]["containerStatuses"][0]["restartCount"] > 2))[
        "status"
    ]
    assert status["phase"] == "Running"
    assert status["containerStatuses"][0]["lastState"]["terminated"]["exitCode"] == 1
    assert waiting(pod)["message"] == "back-off 0.05s restarting failed container"


async def test_a_running_pod_is_ready_and_a_finished_one_is_not(world):
    await world.pod(UNTIL_END)
    pod = await world.until(POD, "p", lambda pod: condition(pod, "Ready").get("status") == "True")
    assert pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"]
    (world.folder() / "end").touch()
    assert condition(await world.ended(), "Ready")["reason"] == "PodCompleted"


# --- several containers


def state(pod: Object, name: str) -> Object:
    """The state of one of its containers, as soon as there is any."""
    statuses = [*pod["status"].get("initContainerStatuses", []), *pod["status"].get("containerStatuses", [])]
    return next((one["state"] for one in statuses if one["name"] == name), {})


def exit_codes(pod: Object, which: str = "containerStatuses") -> dict[str, int]:
    return {one["name"]: one["state"]["terminated"]["exitCode"] for one in pod["status"][which]}


async def test_init_containers_run_one_after_another_before_the_others(world):
    say = 'sleep 0.1; echo "$0" >> $HOME/order'
    first = [{**container(""), "name": name, "command": ["sh", "-c", say, name]} for name in ("a", "b")]
    await world.pod('echo main >> $HOME/order; cat "$HOME/order"', initContainers=first)
    pod = await world.ended()
    assert (world.folder() / "order").read_text() == "a\nb\nmain\n"
    assert exit_codes(pod, "initContainerStatuses") == {"a": 0, "b": 0}


async def test_a_pod_waits_for_its_init_containers(world):
    await world.pod(initContainers=[container(UNTIL_END, "first")])
    pod = await world.until(POD, "p", lambda pod: "running" in state(pod, "first"))
    assert (pod["status"]["phase"], waiting(pod)["reason"]) == ("Pending", "PodInitializing")
    (world.folder() / "end").touch()
    assert (await world.ended())["status"]["phase"] == "Succeeded"


async def test_an_init_container_that_fails_fails_a_pod_that_is_not_restarted(world):
    await world.pod("touch $HOME/ran", initContainers=[container("exit 7", "first"), container("true", "second")])
    pod = await world.ended()
    assert pod["status"]["phase"] == "Failed"
    assert state(pod, "first")["terminated"]["exitCode"] == 7
    assert waiting(pod)["reason"] == "PodInitializing"
    assert not (world.folder() / "ran").exists()


async def test_an_init_container_that_fails_is_tried_again_where_the_pod_is_restarted(world):
    first = container('[ -e "$HOME/again" ] || { touch "$HOME/again"; exit 1; }', "first")
    await world.pod(initContainers=[first], restartPolicy="OnFailure")
    pod = await world.ended()
    assert (pod["status"]["phase"], pod["status"]["initContainerStatuses"][0]["restartCount"]) == ("Succeeded", 1)


async def test_a_native_sidecar_runs_beside_the_container_and_ends_after_it(world):
    serve = "trap 'echo served > $HOME/bye; exit 0' TERM; touch $HOME/up; while :; do sleep 0.02; done"
    sidecar = container(serve, "proxy", restartPolicy="Always")
    await world.pod('until [ -e "$HOME/up" ]; do sleep 0.02; done; exit 3', initContainers=[sidecar])
    pod = await world.ended()
    assert exit_codes(pod) == {"main": 3}
    assert exit_codes(pod, "initContainerStatuses") == {"proxy": 0}
    assert (world.folder() / "bye").read_text() == "served\n"


async def test_a_native_sidecar_that_ends_is_started_again(world):
    sidecar = container('echo again >> "$HOME/starts"', "proxy", restartPolicy="Always")
    main = 'until [ "$(grep -c again $HOME/starts)" -gt 1 ]; do sleep 0.02; done'
    await world.pod(main, initContainers=[sidecar])
    pod = await world.ended()
    assert pod["status"]["phase"] == "Succeeded"
    assert pod["status"]["initContainerStatuses"][0]["restartCount"] > 0


async def test_a_sidecar_among_the_containers_keeps_the_pod(world):
    await world.pod(containers=[container(UNTIL_END, "proxy"), container("exit 3")])
    pod = await world.until(POD, "p", lambda pod: "terminated" in state(pod, "main"))
    assert (pod["status"]["phase"], list(state(pod, "proxy"))) == ("Running", ["running"])
    (world.folder() / "end").touch()
    pod = await world.ended()
    assert (pod["status"]["phase"], exit_codes(pod)) == ("Failed", {"proxy": 0, "main": 3})


async def test_a_deleted_pod_ends_its_sidecars_too(world):
    sidecar = container("touch $HOME/up; sleep 60 & wait", "proxy", restartPolicy="Always")
    await world.pod("sleep 60 & wait", initContainers=[sidecar])
    up = await world.written("up")
    await world.client.delete(POD, "p", world.namespace)
    await world.gone(POD, "p")
    await eventually(lambda: not containers_below(up.parent), "end of the process")


async def test_kubectl_shows_the_log_of_the_container_that_is_asked_for(world):
    await world.pod(containers=[container("echo ours"), container("echo theirs", "proxy")])
    await world.ended()
    out, _ = await (await kubectl_logs(world, "p", "-c", "proxy")).communicate()
    assert out == b"theirs\n"


@pytest.mark.parametrize(
    ("image", "pod_rule", "rule", "refusal"),
    [
        ("docker.io/library/alpine:3.10", {"runAsNonRoot": True}, {}, "image will run as root"),
        ("alpine", {}, {"runAsNonRoot": True}, "image will run as root"),
        ("alpine", {"runAsNonRoot": True}, {"runAsUser": 0}, "runAsUser breaks non-root policy"),
        ("alpine", {"runAsNonRoot": True}, {"runAsUser": 1000}, ""),
        ("alpine", {"runAsNonRoot": True}, {"runAsNonRoot": False}, ""),
        ("alpine", {}, {}, ""),
        ("ghcr.io/example/cgd-train:1", {"runAsNonRoot": True}, {}, ""),
    ],
)
async def test_root_is_refused_where_a_pod_forbids_it(world, image, pod_rule, rule, refusal):
    first = container("true", "init-pytorch", image=image, securityContext=rule)
    made = await world.pod(initContainers=[first], securityContext=pod_rule)

    def refused(pod: Object) -> Object:
        return state(pod, "init-pytorch").get("waiting", {})

    if not refusal:
        assert (await world.ended())["status"]["phase"] == "Succeeded"
        return
    pod = await world.until(POD, "p", lambda pod: refused(pod).get("reason") == "CreateContainerConfigError")
    place = f'(pod: "p_{world.namespace}({made["metadata"]["uid"]})", container: init-pytorch)'
    assert refusal in refused(pod)["message"]
    assert refused(pod)["message"].endswith(place)
    assert pod["status"]["phase"] == "Pending"


# --- how pods are ended


async def test_deletion_lets_the_program_say_goodbye(world):
    await world.pod("trap 'echo bye > $HOME/../bye; exit 143' TERM; touch $HOME/up; while :; do sleep 0.02; done")
    await world.written("up")
    await world.client.delete(POD, "p", world.namespace)
    await world.gone(POD, "p")
    assert (world.cluster.node.folder / "bye").read_text() == "bye\n"
    await eventually(lambda: not list(world.cluster.node.folder.glob(f"{world.namespace}_p_*")), "end of its folder")


async def test_the_news_of_a_deletion_has_the_pods_last_state(world):
    await world.pod("trap 'exit 143' TERM; touch $HOME/up; while :; do sleep 0.02; done")
    await world.written("up")

    async def deleted() -> Object:
        async for event, pod in world.client.watch(POD, world.namespace):
            if event == "LISTED":
                await world.client.delete(POD, "p", world.namespace)
            elif event == "DELETED":
                return pod
        raise AssertionError("the watch has ended")

    pod = await asyncio.wait_for(deleted(), PATIENCE)
    assert (pod["status"]["phase"], ended(pod)["exitCode"]) == ("Failed", 143)
    assert ended(pod)["finishedAt"] >= ended(pod)["startedAt"]


async def test_a_deleted_pod_gets_sigterm_when_its_hook_is_over(world):
    hook = {"preStop": {"exec": {"command": ["sh", "-c", "sleep 0.2; echo hook >> $HOME/../order"]}}}
    script = "trap 'echo SIGTERM >> $HOME/../order; exit 143' TERM; touch $HOME/up; while :; do sleep 0.02; done"
    await world.pod(containers=[container(script, lifecycle=hook)], terminationGracePeriodSeconds=30)
    await world.written("up")
    await world.client.delete(POD, "p", world.namespace)
    await world.gone(POD, "p")
    assert (world.cluster.node.folder / "order").read_text() == "hook\nSIGTERM\n"


@pytest.mark.skipif(pod_namespace() != "own", reason="only root can make a container's command PID 1")
async def test_a_program_that_is_to_go_before_it_has_a_handler_gets_sigterm_when_it_has_one(world):
    script = "import signal, sys, time; time.sleep(1); signal.signal(15, lambda *_: sys.exit(143)); time.sleep(60)"
    hook = {"preStop": {"exec": {"command": LISTENS}}}
    late = container("", lifecycle=hook) | {"command": ["python3", "-c", script]}
    await world.pod(containers=[late], terminationGracePeriodSeconds=60)
    await world.running()
    await world.client.delete(POD, "p", world.namespace)
    await world.gone(POD, "p")


async def test_who_does_not_listen_is_killed_after_the_grace_period_with_all_its_children(world):
    script = "trap '' TERM; setsid sh -c 'trap \"\" TERM; touch $HOME/up; sleep 60; sleep 60' & wait"
    await world.pod(script, terminationGracePeriodSeconds=1)
    up = await world.written("up")
    assert containers_below(up.parent)
    await world.client.delete(POD, "p", world.namespace)
    await world.gone(POD, "p")
    assert not containers_below(up.parent)


async def test_a_container_is_over_only_when_all_its_processes_are(world):
    await world.pod("setsid sleep 60 &")
    assert (await world.ended())["status"]["phase"] == "Succeeded"
    assert not containers_below(world.folder())


async def test_a_forced_deletion_kills_at_once(world):
    await world.pod("trap '' TERM; touch $HOME/up; while :; do sleep 0.02; done")
    up = await world.written("up")
    await world.client.delete(POD, "p", world.namespace, grace=0)
    await eventually(lambda: not containers_below(up.parent), "end of the process")


@pytest.mark.parametrize("first", [[], [container("true", "first")]], ids=["alone", "past its init container"])
async def test_a_container_that_never_began_is_unknown_when_its_pod_is_over(world, first):
    env = [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "absent", "key": "key"}}}]
    await world.pod(containers=[container("true", env=env)], initContainers=first, metadata={"finalizers": ["a/test"]})
    await world.until(POD, "p", lambda pod: waiting(pod).get("reason") == "CreateContainerConfigError")
    await world.client.delete(POD, "p", world.namespace)
    pod = await world.ended()
    assert (pod["status"]["phase"], ended(pod)["exitCode"]) == ("Failed", 137)
    assert (ended(pod)["reason"], "finishedAt" in ended(pod)) == ("ContainerStatusUnknown", False)
    await world.client.patch(POD, "p", world.namespace, {"metadata": {"finalizers": []}})


async def test_one_that_is_deleted_before_its_init_containers_are_through_leaves_the_others_waiting(world):
    first = [container(WAIT, "first"), container("true", "second")]
    await world.pod(initContainers=first, metadata={"finalizers": ["a/test"]})
    await world.until(POD, "p", lambda pod: "running" in state(pod, "first"))
    await world.client.delete(POD, "p", world.namespace)
    pod = await world.ended()
    assert ("terminated" in state(pod, "first"), "waiting" in state(pod, "second")) == (True, True)
    assert waiting(pod)["reason"] == "PodInitializing"
    await world.client.patch(POD, "p", world.namespace, {"metadata": {"finalizers": []}})


async def test_an_evicted_pod_is_marked_as_disrupted(world):
    await world.pod(WAIT)
    await world.running()
    world.cluster.node.evict(world.namespace, "p")
    pod = await world.ended()
    assert (pod["status"]["reason"], condition(pod, "DisruptionTarget")["status"]) == ("Evicted", "True")


# --- scheduling, logs, registration


@pytest.mark.parametrize("end", ["deleted", "done"])
async def test_a_pod_that_does_not_fit_says_why_and_starts_when_it_does(world, end):
    need = {"resources": {"limits": {"nvidia.com/gpu": "2"}}}
    await world.pod(name="first", containers=[container(UNTIL_END, **need)], terminationGracePeriodSeconds=0)
    await world.running("first")
    await world.pod(name="second", containers=[container("true", **need)])
    pod = await world.until(POD, "second", lambda pod: condition(pod, "PodScheduled"))
    assert (condition(pod, "PodScheduled")["reason"], pod["status"]["phase"]) == ("Unschedulable", "Pending")
    assert condition(pod, "PodScheduled")["message"].startswith(
        "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    )
    assert (await world.event("FailedScheduling"))["type"] == "Warning"
    if end == "deleted":
        await world.client.delete(POD, "first", world.namespace)
    else:
        (world.folder("first") / "end").touch()
    assert (await world.ended("second"))["status"]["phase"] == "Succeeded"


async def test_the_node_is_registered_with_its_gpus(world):
    node = await world.client.get(NODE, "local")
    assert node["status"]["capacity"]["nvidia.com/gpu"] == "2"
    assert condition(node, "Ready")["status"] == "True"


async def kubectl_logs(world, *words: str) -> asyncio.subprocess.Process:
    command = [KUBECTL, "--kubeconfig", str(world.cluster.kubeconfig_path), "-n", world.namespace, "logs", *words]
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)


async def test_kubectl_follows_a_log_to_its_end(world):
    await world.pod('echo one; while [ ! -e "$HOME/end" ]; do sleep 0.02; done; echo two')
    await world.running()
    logs = await kubectl_logs(world, "p", "-f")
    assert await asyncio.wait_for(logs.stdout.readline(), PATIENCE) == b"one\n"
    (world.folder() / "end").touch()
    output, _ = await asyncio.wait_for(logs.communicate(), PATIENCE)
    assert output == b"two\n"


async def test_kubectl_shows_the_tail_of_a_log_and_that_of_the_container_before(world):
    await world.pod(
        'echo a; date +%s%N; [ -e "$HOME/again" ] || { touch "$HOME/again"; exit 1; }', restartPolicy="OnFailure"
    )
    await world.ended()
    tail, _ = await (await kubectl_logs(world, "p", "--tail=1")).communicate()
    before, _ = await (await kubectl_logs(world, "p", "--previous")).communicate()
    assert tail.decode().strip().isdigit()
    assert before.decode().splitlines()[0] == "a"
    assert before.decode().splitlines()[1:] != tail.decode().splitlines()


async def test_a_container_that_has_not_started_has_no_log(world):
    await world.pod(volumes=[{"name": "v", "configMap": {"name": "never"}}])
    await world.event("FailedMount")
    logs = await kubectl_logs(world, "p")
    _, problem = await logs.communicate()
    assert 'container "main" in pod "p" is waiting to start: ContainerCreating' in problem.decode()


async def test_a_status_that_the_api_refuses_is_logged_and_the_pod_goes_on(world, monkeypatch, caplog):
    runner_client, original = world.cluster.node.cluster, world.cluster.node.cluster.patch

    async def refuse_once(*args, **options):
        monkeypatch.setattr(runner_client, "patch", original)
        raise ApiError(422, "Invalid", "no")

    await world.pod(UNTIL_END)
    await world.running()
    monkeypatch.setattr(runner_client, "patch", refuse_once)
    (world.folder() / "end").touch()
    assert (await world.ended())["status"]["phase"] == "Succeeded"
    assert "/p: 422 Invalid: no" in caplog.text


async def test_only_whole_mount_paths_are_rewritten():
    mounts = {"/data": Path("/r/d"), "/data/deep": Path("/r/deep")}
    cases = {
        "/data": "/r/d",
        "/data/x": "/r/d/x",
        "/data/deep/x": "/r/deep/x",
        "/database": "/database",
        "x/data": "x/data",
    }
    assert {text: rewrite(text, mounts) for text in cases} == cases


@pytest.mark.parametrize(
    ("resources", "cpu"),
    [
        ({"limits": {"cpu": "2"}}, 2.0),
        ({"limits": {"cpu": "4"}, "requests": {"cpu": "500m"}}, 0.5),
        ({"requests": {"memory": "1Gi"}}, 0.0),
    ],
)
async def test_a_limit_stands_for_a_request_that_is_not_there(resources, cpu):
    pod = {"spec": {"containers": [{"resources": resources}]}}
    assert requests_of(pod) == {"cpu": cpu, "nvidia.com/gpu": 0.0}


async def test_containers_and_sidecars_add_up_and_an_init_container_counts_with_the_sidecars_before_it():
    def asks(cpu: str, **more: str) -> Object:
        return {"resources": {"requests": {"cpu": cpu}}, **more}

    main, sidecar = [asks("1"), asks("500m")], asks("250m", restartPolicy="Always")
    assert requests_of({"spec": {"containers": main, "initContainers": [sidecar, asks("1")]}})["cpu"] == 1.75
    assert requests_of({"spec": {"containers": main, "initContainers": [sidecar, asks("3")]}})["cpu"] == 3.25
    assert requests_of({"spec": {"containers": main, "initContainers": [asks("3"), sidecar]}})["cpu"] == 3.0


async def test_variables_expand_as_the_kubelet_does():
    env = {"A": "1", "B": "2"}
    cases = {"$(A)$(B)": "12", "$(NO)": "$(NO)", "$$(A)": "$(A)", "$A": "$A", "$$": "$", "cost: $": "cost: $"}
    assert {text: expand(text, env) for text in cases} == cases
