"""`cgd` as a user runs it: a process, an API server, a real object store."""

import asyncio
import io
import json
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from rich.console import Console
from support.builders import SPEC, definition, manifest
from support.kubelet import a_pod_with_a_log, kubelet
from support.patience import PATIENCE
from support.report_builders import report_data
from support.stage_builders import RUN as REF
from support.stage_builders import RuleEngine, context, generate_with, generate_work, prepared, said

from cgd_cli.table import age, runs_table, table
from cgd_local.apiserver import ApiServer
from cgd_local.cluster import install
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import CRD, JOB, NAMESPACE, POD, RUN, SECRET
from cgd_stages.contract import Report, Rows, StageFacts
from cgd_stages.report import __main__ as report
from cgd_stages.store.folder import Folder
from cgd_stages.store.run import Product, RunStore

ROOT = Path(__file__).parents[2]


async def cgd(*words: str, text: str = "", **environment: str) -> tuple[int, str, str]:
    """Exit code, output and errors; `text` is the standard input."""
    env = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1", **environment}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cgd_cli", *words,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=env,
    )  # fmt: skip
    out, err = await process.communicate(text.encode())
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


# --- without a cluster

HEAD = "apiVersion: cgd.dev/v1alpha1\nkind: CGDRun\n"


async def test_the_quick_start_is_valid() -> None:
    code, out, _ = await cgd("validate", str(ROOT / "examples/quickstart.yaml"))
    assert code == 0
    children = "prepare, answer, teacher, check, train-cgd, train-refinedsft, evaluate-base, evaluate-cgd, "
    assert f"10 children: {children}evaluate-refinedsft, report" in " ".join(out.split())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kind: [", "is not YAML"),
        ("kind: Pod", "holds no CGDRun"),
        ("kind: CGDRun", "metadata.name is missing"),
        ("kind: CGDRun\nmetadata: [name]", "metadata.name is missing"),
        ("kind: CGDRun\n---\nkind: CGDRun", "holds 2 CGDRuns: give each a file of its own"),
        ("a:\n\t- b", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML: 'utf-8' codec can't decode"),
        ("", "holds no CGDRun"),
        (HEAD + "metadata: {name: x}\nspec: {}", "student"),
        ("apiVersion: cgd.dev/v1\nkind: CGDRun\nmetadata: {name: x}", "apiVersion must be cgd.dev/v1alpha1"),
        (HEAD + "metadata: {name: 7}", "metadata.name must be text of at most 63 small letters"),
        (HEAD + "metadata: {name: Llama_8B}", "it is 'Llama_8B'"),
        (HEAD + f"metadata: {{name: {64 * 'a'}}}", "at most 63"),
        (HEAD + "metadata: {name: a, namespace: a.b}", "metadata.namespace must be text"),
        (HEAD + "metadata: {name: a}\nspec: {training: {learningRate: 1e-6}}", "training.learningRate"),
    ],
)
async def test_what_is_wrong_with_a_manifest_is_said_in_a_line(tmp_path: Path, text: str | bytes, told: str) -> None:
    (tmp_path / "run.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    code, _, err = await cgd("validate", str(tmp_path / "run.yaml"))
    assert code == 1
    assert err.startswith("cgd: ")
    assert told in err
    assert "Traceback" not in err


async def test_the_file_with_published_figures_is_checked_with_the_manifest(tmp_path: Path) -> None:
    paper, figures = ROOT / "examples/paper", tmp_path / "figures.json"
    code, out, _ = await cgd("validate", str(paper / "s1.yaml"), "--published", str(paper / "published.json"))
    assert code == 0
    assert "valid. 5 rows of simplescaling/s1.1-3B not the mean of its figures: base: Avg. (G1) 35.4" in " ".join(
        out.split()
    )
    figures.write_text((paper / "published.json").read_text().replace('"MATH-500": 54.0', '"MATH-500": 540'))
    code, _, err = await cgd("validate", str(paper / "s1.yaml"), "--published", str(figures))
    assert code == 1
    assert "figures.MATH-500 must be a percentage from 0 to 100 (it is 540)" in err
    code, _, err = await cgd("validate", str(paper / "olmo.yaml"), "--published", str(figures))
    assert (code, "has no evaluation.published: set it" in err) == (1, True)
    code, _, err = await cgd("validate", str(paper / "s1.yaml"), "--published", str(tmp_path / "none"))
    assert (code, "cannot be read: No such file" in err) == (1, True)


async def test_a_manifest_may_come_on_standard_input_and_stand_among_others(tmp_path: Path) -> None:
    among = "kind: Namespace\n---\n" + HEAD + yaml.safe_dump({"metadata": {"name": "demo"}, "spec": SPEC})
    code, out, err = await cgd("validate", "-", text=among)
    assert (code, err) == (0, "")
    assert out.startswith("-: valid. 8 children")


@pytest.mark.parametrize("held", [None, b"", b"\xff\xfe", b"a:\n\t- b", b"clusters: 3"], ids=repr)
async def test_a_kubeconfig_that_names_no_cluster_is_said_in_two_lines(tmp_path: Path, held: bytes | None) -> None:
    path = tmp_path / "kubeconfig"
    path.mkdir() if held is None else path.write_bytes(held)
    code, _, err = await cgd("status", "demo", KUBECONFIG=str(path))
    assert code == 1
    assert err.startswith("cgd: no cluster is configured: ")
    assert err.endswith("Let KUBECONFIG name a kubeconfig with a current context, as kubectl needs it.\n")


async def test_the_exit_code_is_ours_whatever_libraries_do_at_the_end(tmp_path: Path) -> None:
    """The threads of some libraries abort a process that ends while they run."""
    words = ["validate", str(tmp_path / "none.yaml")]
    program = f"import atexit, os, sys; atexit.register(os.abort); sys.argv[1:] = {words}\n"
    program += "from cgd_cli.__main__ import main\nmain()"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stderr=asyncio.subprocess.PIPE)
    _, told = await process.communicate()
    assert process.returncode == 1
    assert told.decode().endswith("none.yaml cannot be read: No such file or directory\n")


async def test_a_file_that_cannot_be_read_is_said_in_a_line(tmp_path: Path) -> None:
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "none.yaml", "No such file or directory")):
        assert await cgd("validate", str(path)) == (1, "", f"cgd: {path} cannot be read: {why}\n")


async def test_every_child_of_a_manifest_is_rendered(tmp_path: Path) -> None:
    body = {"apiVersion": RUN.api_version, "kind": "CGDRun", "metadata": {"name": "demo"}, "spec": SPEC}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(body))
    code, out, _ = await cgd("render", str(tmp_path / "run.yaml"), "--train-image", "registry.example/train:1")
    assert code == 0
    children = list(yaml.safe_load_all(out))
    assert [child["kind"] for child in children].count("PyTorchJob") == 1
    assert len(children) == 8
    (training,) = (child for child in children if child["kind"] == "PyTorchJob")
    worker = training["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    assert worker["containers"][0]["image"] == "registry.example/train:1"


async def test_a_trainjob_is_rendered_with_the_runtime_that_it_refers_to(tmp_path: Path) -> None:
    spec = SPEC | {"training": {"backend": "TrainJob"}}
    body = {"apiVersion": RUN.api_version, "kind": "CGDRun", "metadata": {"name": "demo"}, "spec": spec}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(body))
    _, out, _ = await cgd("render", str(tmp_path / "run.yaml"))
    children = {child["kind"]: child for child in yaml.safe_load_all(out)}
    assert children["TrainJob"]["spec"]["runtimeRef"]["name"] == children["TrainingRuntime"]["metadata"]["name"]


# --- with one


@pytest.fixture
async def api() -> AsyncIterator[ApiServer]:
    server = ApiServer()
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def client(api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    (tmp_path / "kubeconfig").write_text(api.kubeconfig())
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    async with await Cluster.connect(manager="test") as cluster:
        await install(cluster, definition())
        yield cluster


async def created(client: Cluster, changes: dict[str, Any] | None = None, status: dict[str, Any] | None = None) -> Any:
    body = manifest(changes)
    del body["metadata"]["uid"], body["metadata"]["generation"]
    run = await client.create(RUN, body)
    if status:
        run = await client.patch(RUN, "demo", "default", {"status": status}, subresource="status")
    return run


ENDED = {
    "state": "Failed",
    "stage": "answer",
    "stages": [
        {"name": "prepare", "state": "Succeeded", "percent": 100, "rows": {"total": 9, "done": 8, "rejected": 1}},
        {"name": "answer", "state": "Failed", "child": "demo-answer-1"},
    ],
    "conditions": [
        {
            "type": "Succeeded", "status": "False", "reason": "StageFailed", "message": "answer: out of memory",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
    ],
}  # fmt: skip


async def test_a_server_that_is_not_there_is_said_in_two_lines(client: Cluster, api: ApiServer) -> None:
    await api.stop()
    code, _, err = await cgd("status", "demo")
    assert code == 1
    assert err.startswith("cgd: Unreachable: GET /apis/cgd.dev/v1alpha1/namespaces/default/cgdruns/demo: Cannot ")
    assert err.endswith("Is the server of the kubeconfig's context the right one, and does it run?\n")


async def test_a_cluster_without_the_operator_is_told_apart_from_one_without_the_run(client: Cluster) -> None:
    code, _, err = await cgd("status", "demo")
    assert (code, err) == (1, "cgd: there is no CGDRun demo in namespace default\nIt has none: name another with -n.\n")
    await client.delete(CRD, "cgdruns.cgd.dev")
    code, _, err = await cgd("status", "demo")
    assert (code, err) == (1, "cgd: the cluster knows no CGDRuns\nInstall cgd-operator, as README.md says.\n")


@pytest.mark.parametrize(("code", "mend"), [(401, "Log in to the cluster again"), (403, "administrators can allow it")])
async def test_who_must_act_when_the_server_refuses(api: ApiServer, client: Cluster, code: int, mend: str) -> None:
    refusal = {"kind": "Status", "code": code, "reason": "Refused", "message": "not you"}
    api.fault = lambda _: web.json_response(refusal, status=code)
    status, _, err = await cgd("status", "demo")
    assert status == 1
    assert err.startswith(f"cgd: {code} Refused: not you\n")
    assert mend in err


async def test_status_shows_every_stage_and_why_a_run_failed(client: Cluster) -> None:
    await created(client, status=ENDED)
    code, out, _ = await cgd("status", "demo")
    assert code == 0
    assert "CGDRun demo: Failed" in out
    assert "8/9" in out
    assert "answer: out of memory" in out


async def test_a_name_that_is_nearly_right_is_guessed(client: Cluster, tmp_path: Path) -> None:
    await created(client, status=ENDED)
    assert await cgd("status", "demp") == (1, "", "cgd: there is no CGDRun demp in namespace default\nIs demo meant?\n")
    assert await cgd("logs", "demo", "anwser") == (1, "", "cgd: demo has no stage anwser\nIs answer meant?\n")
    stages = "cgd: demo has no stage x\nThere are answer, prepare.\n"
    assert await cgd("rows", "demo", "--stage", "x", AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b") == (
        1,
        "",
        stages,
    )


async def test_reports_and_folders_that_are_not_there(tmp_path: Path, client: Cluster) -> None:
    code, _, err = await cgd("compare", "report.html", "other.json")
    assert (code, err) == (
        1,
        "cgd: there is no file report.html: `cgd report` writes one of a run, with `-o` and its name\n",
    )


async def test_the_version_and_help_in_short(tmp_path: Path) -> None:
    assert await cgd("--version") == (0, "cgd 0.1.0\n", "")
    assert await cgd("-h") == await cgd("--help")


async def test_help_loads_no_library_of_the_commands() -> None:
    program = "import sys; from cgd_cli import __main__; print(*sys.modules)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    heavy = {"pydantic", "pyarrow", "kubernetes", "boto3", "aiohttp", "transformers", "numpy", "yaml", "asyncio"}
    assert heavy & set(out.decode().split()) == set()


async def test_runs_are_listed(client: Cluster) -> None:
    assert (await cgd("list"))[::2] == (1, LISTED_NONE)
    await created(client, status=ENDED)
    code, out, _ = await cgd("list", "-A")
    assert code == 0
    assert out.splitlines()[1].split()[:4] == ["default", "demo", "Failed", "answer"]


def test_a_list_of_runs_fits_into_80_columns_and_cuts_nothing() -> None:
    name, stage = 63 * "n", "evaluate-cgd-mis-100-refined-x"
    status = ENDED | {"stage": stage, "progress": "100%", "usage": {"gpuHours": "1234.56"}}
    run = manifest(name=name) | {"status": status}
    run["metadata"]["creationTimestamp"] = "2026-12-01T00:00:00Z"
    console = Console(file=io.StringIO(), width=80)
    console.print(runs_table([run], datetime(2026, 12, 3, 3, tzinfo=UTC), everywhere=False))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    assert "\u2026" not in "".join(lines)
    assert "2d3h" in lines[1]
    assert "".join(line.split()[0] for line in lines[1:] if line.startswith("n")) == name


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-5, "0s"), (119, "119s"), (200, "3m20s"), (240, "4m"), (2820, "47m"), (18720, "5h12m"), (18000, "5h"),
     (32400, "9h"), (183600, "2d3h"), (1036800, "12d")],
)  # fmt: skip
def test_an_age_is_written_as_kubectl_writes_it(seconds: float, said: str) -> None:
    assert age(seconds) == said


RUNNING = {
    "state": "Running",
    "stage": "answer",
    "stages": [{"name": "answer", "state": "Running", "child": "demo-answer-1"}],
}


async def test_the_lines_of_pods_are_followed_until_the_stage_has_ended(client: Cluster) -> None:
    """The kubelet is played: the log grows while it is read, and its last line has no end."""
    more, asked = asyncio.Event(), list[str]()

    async def log(request: web.Request) -> web.StreamResponse:
        asked.append(request.path_qs)
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"first\nsec")
        await more.wait()
        await response.write(b"ond\nlast")
        return response

    async with kubelet(log) as port:
        await a_pod_with_a_log(client, await created(client, status=RUNNING), port)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cgd_cli", "logs", "demo", "answer", "-f"), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 120) == b"demo-answer-1-0: first\n"
        more.set()
        assert await asyncio.wait_for(process.stdout.readline(), 120) == b"demo-answer-1-0: second\n"
        await client.patch(RUN, "demo", "default", {"status": ENDED}, subresource="status")
        out, _ = await asyncio.wait_for(process.communicate(), 120)
    assert (process.returncode, out) == (0, b"demo-answer-1-0: last\n")
    assert [path.partition("?")[0] for path in asked] == ["/containerLogs/default/demo-answer-1-0/stage"]


LISTED_NONE = "cgd: there is no CGDRun: apply one, or look elsewhere with --namespace or --all-namespaces\n"


async def test_a_run_is_suspended_and_goes_on(client: Cluster) -> None:
    await created(client)
    for word, other, suspended in (("suspend", "suspended already", True), ("resume", "not suspended", False)):
        assert (await cgd(word, "demo"))[0] == 0
        run = await client.get(RUN, "demo", "default")
        assert run is not None
        assert run["spec"]["suspend"] is suspended
        assert await cgd(word, "demo") == (1, "", f"cgd: demo is {other}\n")
    await client.patch(RUN, "demo", "default", {"status": ENDED}, subresource="status")
    assert await cgd("suspend", "demo") == (1, "", "cgd: demo has ended: Failed\n")


async def test_the_children_of_failed_stages_are_deleted_and_no_others(client: Cluster) -> None:
    await created(client)
    assert await cgd("retry", "demo") == (1, "", "cgd: no stage of demo has failed\nIts stages: cgd status demo\n")
    await client.patch(RUN, "demo", "default", {"status": ENDED}, subresource="status")
    for name in ("demo-answer-1", "demo-prepare-1"):
        spec = {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "a", "image": "b"}]}}}
        await client.create(JOB, {"metadata": {"name": name, "namespace": "default"}, "spec": spec})
    assert await cgd("retry", "demo") == (0, "demo tries answer again\n", "")
    assert [job["metadata"]["name"] for job in (await client.list(JOB, "default"))[0]] == ["demo-prepare-1"]


async def test_watch_ends_with_the_run_and_tells_by_its_exit_code(client: Cluster) -> None:
    await created(client)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cgd_cli", "watch", "demo", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), PATIENCE) == b"demo: New\n"
    await client.patch(RUN, "demo", "default", {"status": ENDED}, subresource="status")
    out, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == 1
    assert out.decode().splitlines() == [
        "demo: Failed",
        "demo: prepare Succeeded",
        "demo: answer Failed",
        "demo: answer: out of memory",
    ]


async def test_ctrl_c_ends_watching_though_it_was_started_in_the_background(client: Cluster, api: ApiServer) -> None:
    await created(client)
    asked = asyncio.Event()
    api.fault = lambda _: asked.set()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cgd_cli", "watch", "demo"),
        stdout=asyncio.subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    await asyncio.wait_for(asked.wait(), PATIENCE)
    process.send_signal(signal.SIGINT)
    await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == 130


@pytest.mark.parametrize("words", [("status",), ("rows",), ("report",), ("logs",), ("watch",)])
async def test_a_run_that_is_not_there_is_named(client: Cluster, words: tuple[str, ...]) -> None:
    code, _, err = await cgd(*words, "nobody", "--namespace", "default")
    assert code == 1
    assert "there is no CGDRun nobody in namespace default" in err


async def test_a_kubeconfig_that_is_not_there_is_told_with_what_to_do(tmp_path: Path) -> None:
    code, _, err = await cgd("status", "demo", KUBECONFIG=str(tmp_path / "nowhere"))
    assert code == 1
    assert "\ncgd: no cluster is configured: " in f"\n{err}"
    assert "Traceback" not in err
    assert err.endswith("Let KUBECONFIG name a kubeconfig with a current context, as kubectl needs it.\n")


async def test_logs_of_a_stage_without_pods(client: Cluster) -> None:
    await created(client, status=ENDED)
    code, _, err = await cgd("logs", "demo")
    assert code == 1
    assert "stage answer of demo has no pods" in err
    assert (await client.list(POD, "default"))[0] == []


# --- with a store


@pytest.fixture
async def stored(
    request: pytest.FixtureRequest, client: Cluster, storage: Any, bucket: Any, tiny_model: Path, tmp_path: Path
) -> str:
    """A run with quadruples, with the changes that the test's parameter names; its name."""
    changes = {"student.model": str(tiny_model), "teacher.model": str(tiny_model), "storage.uri": storage.uri,
               "storage.endpoint": storage.endpoint, "storage.pathStyle": True,
               "storage.credentialsSecretRef": {"name": "keys"}}  # fmt: skip
    await client.create(NAMESPACE, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": REF.namespace}})
    changes |= getattr(request, "param", {})
    body = manifest(changes, name=REF.name, namespace=REF.namespace)
    del body["metadata"]["uid"], body["metadata"]["generation"]
    run = await client.create(RUN, body)
    keys = {
        "AWS_ACCESS_KEY_ID": os.environ["AWS_ACCESS_KEY_ID"],
        "AWS_SECRET_ACCESS_KEY": os.environ["AWS_SECRET_ACCESS_KEY"],
    }
    await client.create(SECRET, {
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "keys", "namespace": REF.namespace},
        "stringData": keys,
    })  # fmt: skip
    reference = REF.model_copy(update={"uid": run["metadata"]["uid"]})

    prepared(bucket, [f"What is {n} + {n}?" for n in range(5)], reference)
    for role in ("answer", "critique", "refine"):  # in the main thread: programs set handlers of signals
        text = f"a {role} of its own" + ("\nConclusion: wrong" if role == "critique" else "")
        engine = RuleEngine(lambda request, text=text: said(request, text))
        generate_with(engine, context(storage, generate_work(tiny_model, role), tmp_path, run=reference))
    return str(REF.name)


WITHOUT_KEYS = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}


async def test_rows_are_shown_with_the_keys_of_the_runs_secret(stored: str) -> None:
    code, out, err = await cgd("rows", stored, "-n", REF.namespace, "--count", "2", **WITHOUT_KEYS)
    assert (code, err) == (0, "")
    assert out.count("a critique of its own") == 2
    assert out.count("refinement_tokens") == 2


async def test_logs_of_pods_that_are_gone_are_read_from_the_store(stored: str, bucket: Any, client: Cluster) -> None:
    """Critiques are written by the pods of `teacher`."""
    run = await client.get(RUN, stored, REF.namespace)
    assert run is not None
    store, place = RunStore(bucket, REF.model_copy(update={"uid": run["metadata"]["uid"]})), ("-n", REF.namespace)
    assert await cgd("logs", stored, "--stored", *place, **WITHOUT_KEYS) == (
        1, "", "cgd: run has stored no log\nA log is stored when its program has ended.\n",
    )  # fmt: skip
    store.keep_log("teacher", b"pod run-teacher-0\n\x1b[2Jhello\n")
    code, out, err = await cgd("logs", stored, "critique", "--stored", *place, **WITHOUT_KEYS)
    assert (code, err) == (0, "")
    assert "teacher/" in out
    assert "pod run-teacher-0\n\\x1b[2Jhello\n" in out
    code, _, err = await cgd("logs", stored, "answer", "--stored", *place, **WITHOUT_KEYS)
    assert (code, err.splitlines()[0]) == (1, "cgd: run has stored no log of answer")
    code, _, err = await cgd("logs", stored, "anwser", "--stored", *place, **WITHOUT_KEYS)
    assert err == "cgd: run has no stage anwser\nIs answer meant?\n"


async def test_a_row_is_chosen_by_its_id(stored: str) -> None:
    _, out, _ = await cgd("rows", stored, "-n", REF.namespace, "--count", "5")
    title = next(line for line in out.splitlines() if " / 0" in line)
    identity = title.split()[1]
    _, out, _ = await cgd("rows", stored, "-n", REF.namespace, "--id", identity[:8])
    assert out.count(" / 0") == 1
    code, _, err = await cgd("rows", stored, "-n", REF.namespace, "--id", "nothing")
    assert code == 1
    assert "has no such rows" in err


async def test_the_mask_shows_how_much_is_learned(stored: str) -> None:
    code, out, err = await cgd("rows", stored, "-n", REF.namespace, "--count", "1", "--mask", "CGD")
    assert (code, err) == (0, "")
    assert "CGD:" in out
    assert "tokens learned" in out
    assert "[[a refine of its own" in " ".join(out.split())
    assert "a critique of its own" in " ".join(out.split())


BARE = {"training.objectives": [], "training.variants": [{"name": "cgd-bare", "kind": "CGD", "bareShare": "1"}]}


@pytest.mark.parametrize("stored", [BARE], indirect=True)
async def test_the_mask_of_a_variant_says_where_the_context_is_the_prompt_alone(stored: str) -> None:
    code, out, err = await cgd("rows", stored, "-n", REF.namespace, "--count", "1", "--mask", "cgd-bare")
    assert (code, err) == (0, "")
    shown = " ".join(out.split())
    assert "The context is the prompt alone (bareShare)." in shown
    assert "a critique of its own" not in shown


WRONG = {"training.critique": {"kind": "miscritique", "rate": "1", "target": "refined"}}


@pytest.mark.parametrize("stored", [WRONG], indirect=True)
async def test_the_mask_says_where_the_critique_is_a_miscritique(
    stored: str, client: Cluster, storage: Any, bucket: Any, tiny_model: Path, tmp_path: Path
) -> None:
    run = await client.get(RUN, stored, REF.namespace)
    assert run
    reference = REF.model_copy(update={"uid": run["metadata"]["uid"]})
    engine = RuleEngine(lambda request: said(request, "Trust me.\nConclusion: right"))
    work = generate_work(tiny_model, "miscritique", "misrefine")
    generate_with(engine, context(storage, work, tmp_path, run=reference))
    code, out, err = await cgd("rows", stored, "-n", REF.namespace, "--count", "1", "--mask", "CGD")
    assert (code, err) == (0, "")
    shown = " ".join(out.split())
    assert "The critique is a miscritique, the target is refined." in shown
    assert "Critique: Trust me. │ │ Conclusion: right" in shown
    assert "[[Trust me." in shown
    code, out, err = await cgd("rows", stored, "-n", REF.namespace, "--count", "1", "--stage", "misrefine")
    assert (code, err) == (0, "")
    assert "misrefinement │ │ Trust me." in " ".join(out.split())


async def test_an_objective_that_is_not_trained_is_refused(stored: str) -> None:
    code, _, err = await cgd("rows", stored, "-n", REF.namespace, "--mask", "SFT")
    assert (code, "the run does not train SFT" in err) == (1, True), err


async def test_a_report_that_is_not_there_yet(stored: str, tmp_path: Path) -> None:
    code, _, err = await cgd("report", stored, "-n", REF.namespace, "-o", str(tmp_path / "page.html"))
    assert code == 1
    assert "has no output of report" in err
    assert not (tmp_path / "page.html").exists()


async def test_a_model_is_downloaded(stored: str, client: Cluster, bucket: Any, tmp_path: Path) -> None:
    run = await client.get(RUN, stored, REF.namespace)
    assert run is not None
    store = RunStore(bucket, REF.model_copy(update={"uid": run["metadata"]["uid"]}))
    files = {"config.json": b"{}", "model.safetensors": b"weights"}

    def make(folder: Folder) -> Product:
        return Product(StageFacts(rows=Rows()), [folder.put(f"model/{name}", data) for name, data in files.items()])

    await asyncio.to_thread(store.produce, "train-cgd", {}, make)
    target = tmp_path / "model"
    words = ("pull", stored, "-n", REF.namespace, "-o", str(target))
    code, out, err = await cgd(*words, **WITHOUT_KEYS)
    assert (code, err) == (0, "")
    assert f"vllm serve {target}" in "".join(out.splitlines())
    assert {path.name: path.read_bytes() for path in target.iterdir()} == files
    assert (await cgd(*words, **WITHOUT_KEYS))[2] == f"cgd: {target} is not empty: name another folder with -o\n"
    words = (*words[:-1], str(tmp_path / "other"), "--stage", "train-sft")
    assert (await cgd(*words, **WITHOUT_KEYS))[2].endswith("has no training train-sft\nIs train-cgd meant?\n")
    assert not (tmp_path / "other").exists()


async def test_the_commands_that_serve_a_model_and_ask_it(stored: str, tmp_path: Path) -> None:
    words = ("serve", stored, "-n", REF.namespace, "-o", str(tmp_path / "my model"), "--port", "8011")
    code, out, err = await cgd(*words, **WITHOUT_KEYS)
    assert (code, err) == (0, "")
    pulled, served, _, asked = out.splitlines()
    model = shlex.quote(str(tmp_path / "my model"))
    assert pulled == f"cgd pull {stored} -n {REF.namespace} --stage train-cgd -o {model}"
    assert served.startswith(f"vllm serve {model} --served-model-name {stored} --host 127.0.0.1 --port 8011")
    assert json.loads(shlex.split(asked)[-1])["model"] == stored
    words = (*words, "--run")
    assert (await cgd(*words, **WITHOUT_KEYS))[0] == 1  # there is no model yet
    assert not (tmp_path / "my model").exists()


async def test_a_manifest_from_another_run_is_asked_for_what_differs(stored: str, tmp_path: Path) -> None:
    target = tmp_path / "run.yaml"
    words = ("init", "--from", stored, "-n", REF.namespace, "-o", str(target), "--objectives", "CGD,RefinedSFT")
    answers = "Bad_Name\nsecond\n" + 13 * "\n"
    code, out, err = await cgd(*words, text=answers)
    assert (code, err) == (0, "")
    assert "metadata.name must be text" in out
    made = yaml.safe_load(target.read_text())
    assert made["metadata"] == {"name": "second"}
    assert made["spec"]["training"]["objectives"] == ["CGD", "RefinedSFT"]
    assert made["spec"]["storage"]["credentialsSecretRef"] == {"name": "keys"}
    assert "status" not in made
    assert (await cgd("validate", str(target)))[0] == 0


@pytest.mark.parametrize("stored", [{"training.objectives": ["CGD", "CFT"]}], indirect=True)
async def test_of_several_models_the_download_is_named(stored: str, tmp_path: Path) -> None:
    words = ("pull", stored, "-n", REF.namespace, "-o", str(tmp_path / "model"))
    code, _, err = await cgd(*words, **WITHOUT_KEYS)
    assert code == 1
    assert err == f"cgd: {stored} trains 2 models\nName one of them with --stage: train-cgd, train-cft.\n"
    assert not (tmp_path / "model").exists()


async def test_a_run_is_compared_by_its_name_with_a_report_in_a_file(
    stored: str, client: Cluster, storage: Any, bucket: Any, tmp_path: Path
) -> None:
    run = await client.get(RUN, stored, REF.namespace)
    assert run is not None
    reference = REF.model_copy(update={"uid": run["metadata"]["uid"]})
    work = Report(stages=("refine",), spec="")
    await asyncio.to_thread(report.main, context(storage, work, tmp_path, run=reference))
    (tmp_path / "other.json").write_bytes(report.to_json(report_data()))
    words = ("compare", stored, str(tmp_path / "other.json"), "-n", REF.namespace)
    code, out, err = await cgd(*words, **WITHOUT_KEYS)
    assert (code, err) == (0, "")
    assert f"base {report_data().run.name}" in " ".join(out.split())


def test_the_table_of_a_run_that_has_just_been_applied() -> None:
    assert table(manifest()).title == "CGDRun demo: Pending"


def test_a_stage_with_rounds_shows_where_it_is() -> None:
    stages = [{"name": "score-gkd", "state": "Running", "round": "3 of 12, waits for rollout-gkd"}]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(manifest() | {"status": {"state": "Scoring", "stages": stages}}))
    assert "Running, round 3 of 12, waits for rollout-gkd" in console.export_text()
