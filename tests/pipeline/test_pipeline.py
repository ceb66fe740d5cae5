"""A whole run: operator process, kubectl, vLLM, DeepSpeed, S3; nothing played, on a tiny random model."""

import asyncio
import json
import socket
from typing import Any

import pytest
from support import tiny

from cgd_local.background import upload_model
from cgd_operator.kube.kinds import JOB, POD, PYTORCHJOB, SECRET, TRAININGRUNTIME, TRAINJOB, Kind
from cgd_stages.store.rows import from_parquet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MADE = (JOB, PYTORCHJOB, TRAINJOB, TRAININGRUNTIME, POD)
FIELDS = {"fields": {"prompt": "question", "reference": "answer"}}
STAGES = ["prepare", "answer", "critique", "refine", "check", "train-cgd", "evaluate-base", "evaluate-cgd", "report"]


async def test_a_run_from_prompts_to_report_through_a_dead_operator_and_lost_pods(stand: Any) -> None:
    stand.start_operator()
    await stand.apply("demo")
    killed = await disturb(stand)
    run = await stand.ended("demo")
    status = run["status"]
    assert status["state"] == "Succeeded", status["conditions"]
    assert killed >= {"answer", "teacher", "check", "train-cgd"}
    assert [(one["name"], one["state"]) for one in status["stages"]] == [(name, "Succeeded") for name in STAGES]
    check_rows(stand)
    check_artifacts(stand, status["artifacts"])
    await check_deletion(stand)


async def test_a_student_that_thinks_is_trained_by_a_trainjob_that_outlives_a_lost_pod(stand: Any) -> None:
    model = tiny.thinking(stand.folder / "thinking")
    await asyncio.to_thread(upload_model, stand.s3, model, "data", "thinking")
    served = {"model": "s3://data/models/thinking", "maxModelLen": 2048, "dtype": "float32", "chat": {"thinking": "on"}}
    training = stand.manifest("any")["spec"]["training"] | {"backend": "TrainJob", "learningRate": "1e-6"}
    stand.start_operator()
    await stand.apply("demo", student=served, teacher=served, training=training)
    lost = "batch.kubernetes.io/job-completion-index=1,cgd.dev/stage=train-cgd"
    while not [pod for pod in await listed(stand, POD, lost) if pod["status"]["phase"] == "Running"]:
        assert (await stand.condition("demo", "Succeeded"))["status"] != "False"
        await asyncio.sleep(0.2)
    await stand.kubectl("delete", "pod", "-l", lost, "--wait=false")
    status = (await stand.ended("demo"))["status"]
    assert status["state"] == "Succeeded", status["conditions"]
    assert len(await listed(stand, TRAINJOB)) == 1
    assert await listed(stand, PYTORCHJOB) == []
    check_artifacts(stand, status["artifacts"])
    check_thoughts(stand)
    await stand.kubectl("patch", "cgd", "demo", "--type=merge", "-p", '{"spec": {"deletionPolicy": "Delete"}}')
    await stand.kubectl("wait", "cgd/demo", "--for=jsonpath={.metadata.finalizers[0]}=cgd.dev/clean", "--timeout=150s")
    await check_deletion(stand, stays=False)


def check_thoughts(stand: Any) -> None:
    """It answers, learns and is evaluated in one mode: with a thought."""
    for row in rows_of(stand, "refine"):
        for text in ("answer", "critique", "refinement"):
            assert (row[text], row[f"{text}_thinking"]) == ("4", "a")
    for stage in ("evaluate-base", "evaluate-cgd"):
        assert {(row["output"], row["thinking"]) for row in rows_of(stand, stage)} == {("4", "a")}
    (report,) = [body for key, body in stand.stored("default/report/").items() if key.endswith("report.json")]
    said = "on, the teacher's thoughts are learned"
    assert json.loads(report)["modes"] == {"Thinking": said, "Teacher's thinking": "on"}


def rows_of(stand: Any, stage: str) -> list[dict[str, Any]]:
    """The stored rows of a stage."""
    parts = [body for key, body in stand.stored(f"default/{stage}/").items() if "/parts/" in key]
    rows = [row for body in parts for row in from_parquet(body)]
    assert rows
    return rows


async def disturb(stand: Any) -> set[str]:
    """SIGTERM the first pod of every stage as soon as it runs, and kill the operator each time, until the run ends."""
    hit: set[str] = set()
    while (await stand.condition("demo", "Succeeded"))["status"] == "Unknown":
        pods, _ = await stand.cluster.client.list(POD, "default")
        for pod in pods:
            stage = pod["metadata"]["labels"]["cgd.dev/stage"]
            if pod.get("status", {}).get("phase") == "Running" and stage not in hit:
                hit.add(stage)
                await asyncio.sleep(2)
                await stand.kill_operator()
                await stand.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")
                stand.start_operator()
        await asyncio.sleep(0.2)
    return hit


def check_rows(stand: Any) -> None:
    """read = kept + rejected at every stage, and what a stage kept is what the next one read."""
    read = 8
    for stage in STAGES[:4]:
        (done,) = [
            json.loads(body) for key, body in stand.stored(f"default/{stage}/").items() if key.endswith("DONE.json")
        ]
        rows = done["facts"]["rows"]
        assert rows["total"] == read == rows["done"] + rows["rejected"], stage
        read = rows["done"]
    assert read > 0


def check_artifacts(stand: Any, artifacts: dict[str, Any]) -> None:
    report = folder_of(stand, artifacts["report"])
    (page,) = [body for key, body in report.items() if key.endswith("report.html")]
    assert b"</html>" in page
    model = folder_of(stand, artifacts["checkpoints"]["CGD"])
    assert any(key.endswith("model/model.safetensors") for key in model)
    assert folder_of(stand, artifacts["quadruples"])


def folder_of(stand: Any, uri: str) -> dict[str, bytes]:
    """What is stored below an artifact's URI, or below the one that its pointer names."""
    root = f"s3://data/{stand.folder.name}/"
    found: dict[str, bytes] = stand.stored(uri.removeprefix(root))
    if uri.endswith(".json"):
        (pointer,) = found.values()
        found = stand.stored(json.loads(pointer)["uri"].removeprefix(root))
    return found


async def check_deletion(stand: Any, *, stays: bool = True) -> None:
    """Deleting the run removes its children; what is stored stays, or goes as its deletionPolicy wants."""
    before = len(stand.stored("default/"))
    await stand.kubectl("delete", "cgd", "demo", "--wait=true")
    for _ in range(300):
        left = [item for kind in MADE for item in await listed(stand, kind)]
        secrets = [one["metadata"]["name"] for one in await listed(stand, SECRET)]
        if not left and len(secrets) == 1:
            break
        await asyncio.sleep(0.1)
    assert left == []
    assert secrets == ["keys"]
    assert len(stand.stored("default/")) == (before if stays else 0)


async def listed(stand: Any, kind: Kind, labels: str = "") -> list[dict[str, Any]]:
    items, _ = await stand.cluster.client.list(kind, "default", labels=labels)
    return items


async def jobs(stand: Any) -> list[str]:
    return [job["metadata"]["labels"]["cgd.dev/stage"] for job in await listed(stand, JOB)]


async def fails(stand: Any, name: str, **changes: Any) -> str:
    """Apply a run that must fail; returns what its user is told."""
    stand.start_operator()
    await stand.apply(name, **changes)
    run = await stand.ended(name)
    (told,) = [one["message"] for one in run["status"]["conditions"] if one["type"] == "Succeeded"]
    described = await stand.kubectl("describe", "cgd", name)
    assert "StageFailed" in described
    running = [
        pod for pod in (await stand.cluster.client.list(POD, "default"))[0] if pod["status"]["phase"] == "Running"
    ]
    assert running == []
    return str(told)


async def test_a_wrong_key_is_told_with_exit_code_and_mend(stand: Any) -> None:
    await stand.secret("keys", "wrong", "wrong")
    told = await fails(stand, "wrong-key")
    assert "stage prepare: pod wrong-key-prepare" in told
    assert "exit code 3" in told
    assert "credentialsSecretRef" in told


async def test_a_model_that_does_not_exist_is_told_before_a_gpu_is_asked_for(stand: Any) -> None:
    told = await fails(stand, "no-model", student={"model": "/models/absent"})
    assert "/models/absent" in told
    assert "spec.student" in told
    assert await jobs(stand) == ["prepare"]


async def test_a_field_that_no_row_has_is_told_with_those_there_are(stand: Any) -> None:
    prompts = {"source": "configmap://problems/train.jsonl", "fields": {"prompt": "text"}}
    told = await fails(stand, "no-field", prompts=prompts)
    assert "text" in told
    assert "question" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has no rows"),
        ('{"question": "2 + 2?", "ans\n{"question":\nnot json at all\n', "malformed"),
        (json.dumps({"question": "long " * 3000, "answer": "9"}), "too_long"),
    ],
    ids=["empty", "malformed", "longer than the context"],
)
async def test_prompts_that_cannot_be_used_are_told_before_a_gpu_is_asked_for(stand: Any, text: str, told: str) -> None:
    await stand.configmap("bad", **{"prompts.jsonl": text})
    message = await fails(stand, "bad-prompts", prompts={"source": "configmap://bad/prompts.jsonl", **FIELDS})
    assert told in message
    assert "spec." in message
    assert await jobs(stand) == ["prepare"]


async def test_a_store_that_cannot_be_reached_is_tried_again_and_told(stand: Any) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        storage = stand.manifest("any")["spec"]["storage"] | {"endpoint": endpoint}
        message = await fails(stand, "no-store", storage=storage, retries=1)
    assert endpoint in message
    assert "spec.storage.endpoint" in message
    assert (await stand.run("no-store"))["status"]["stages"][0]["attempts"] == 2


async def test_a_teacher_that_says_nothing_is_told_and_the_answers_stay(stand: Any) -> None:
    silent = tiny.make(stand.folder / "silent", always=tiny.END)
    await asyncio.to_thread(upload_model, stand.s3, silent, "data", "silent")
    teacher = {"model": "s3://data/models/silent", "maxModelLen": 2048, "dtype": "float32"}
    message = await fails(stand, "silent", teacher=teacher)
    assert "critique" in message
    assert "empty" in message
    assert "maxRejected" in message
    assert any(key.endswith("DONE.json") for key in stand.stored("default/answer/"))


async def test_a_secret_that_is_missing_is_waited_for_and_the_reason_shown(stand: Any) -> None:
    await stand.kubectl("delete", "secret", "keys")
    stand.start_operator()
    await stand.apply("no-secret")
    await stand.kubectl(
        "wait",
        "cgd/no-secret",
        "--for=jsonpath={.status.stages[0].reason}=CreateContainerConfigError",
        "--timeout=150s",
    )
    stage = (await stand.run("no-secret"))["status"]["stages"][0]
    assert 'secret "keys" not found' in stage["message"]
