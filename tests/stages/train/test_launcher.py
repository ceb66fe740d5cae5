"""The launcher of a training pod: what it refuses, what it hands to torchrun, and how it reads the end."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from support.patience import PATIENCE
from support.stage_builders import RUN, context
from support.train_builders import STAGE, distilled, quadruple, refined, train_work

from cgd_stages.contract import Adapter, Critique, Exit, Rows, StageFacts, Storage, Train, Validation
from cgd_stages.errors import GPU_HINT, Interrupted, TransientError, UserError
from cgd_stages.runtime.program import Context
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import Folder
from cgd_stages.store.rows import from_parquet
from cgd_stages.store.run import RunStore
from cgd_stages.train import __main__ as train
from cgd_stages.train import launch, product
from cgd_stages.train.__main__ import stored_dtype
from cgd_stages.train.example_files import make_examples
from cgd_stages.train.launch import failure
from cgd_stages.train.product import model_card
from cgd_stages.train.stage import Node, Stage, stage_of
from cgd_stages.training.job import ADAPTER, EXAMPLES, HELD_OUT, JOB, MODEL, Job, ProcessEnd, write_records
from cgd_stages.training.tensorboard import EVENTS

KUBEFLOW = {
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "PET_NPROC_PER_NODE": "auto",
    "PET_MASTER_ADDR": "run-train-worker-0",
    "PET_MASTER_PORT": "23456",
}


def training(storage: Storage, tmp_path: Path, work: Train) -> Context:
    made = context(storage, work, tmp_path / "scratch")
    made.task = made.task.model_copy(update={"stage": STAGE})
    return made


@pytest.fixture
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Torchrun replaced by processes that train nothing; the folders they were given."""
    given: list[Path] = []

    def run(stage: Any, folder: Path) -> None:
        given.append(folder)
        (folder / MODEL).mkdir()
        (folder / MODEL / "config.json").write_text("{}")
        if stage.work.adapter:
            (folder / ADAPTER).mkdir()
            (folder / ADAPTER / "adapter_config.json").write_text("{}")
        figures = {"loss": 2.0, "seconds": 1.0, "tokens": 10.0, "supervised_tokens": 3.0, "peak_memory_bytes": 9.0}
        write_records(folder / "metrics.jsonl", [figures | {"step": 1.0}, figures | {"step": 2.0, "loss": 1.0}])

    monkeypatch.setattr(launch, "torchrun", run)
    return given


def test_a_pod_finds_its_place_in_the_environment_of_kubeflow(tmp_path: Path) -> None:
    node = Node.from_environment(KUBEFLOW, train_work(tmp_path, workers=2, processes_per_worker=8))
    assert node == Node(rank=1, nodes=2, processes=8, master="run-train-worker-0", port="23456")
    assert " ".join(node.torchrun()) == (
        "--nnodes 2 --node-rank 1 --master-addr run-train-worker-0 --master-port 23456 "
        "--nproc-per-node 8 --max-restarts 0"
    )


def test_a_single_pod_needs_no_environment_and_no_fixed_port(tmp_path: Path) -> None:
    node = Node.from_environment({}, train_work(tmp_path, processes_per_worker=2))
    assert node.first
    assert node.torchrun() == ["--standalone", "--nproc-per-node", "2", "--max-restarts", "0"]


def test_another_number_of_pods_than_the_task_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the job has 2 pods, the task 1"):
        Node.from_environment(KUBEFLOW, train_work(tmp_path))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the first pod ends soon."""
    monkeypatch.setattr(train, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(launch, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(launch, "ABSENT_SECONDS", 0.2)
    monkeypatch.setattr(train, "SILENT_SECONDS", 0.2)


@pytest.fixture
def second_of_two(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> Stage:
    """The stage of a pod that is not the first; its first one is this machine."""
    refined(bucket, [quadruple(number) for number in range(4)])
    for name, value in (KUBEFLOW | {"PET_MASTER_ADDR": "127.0.0.1"}).items():
        monkeypatch.setenv(name, value)
    return stage_of(training(storage, tmp_path, train_work(tiny_model, workers=2)))


@pytest.mark.usefixtures("impatient")
def test_a_pod_waits_until_dns_knows_the_first_one(second_of_two: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False, False, True])
    monkeypatch.setattr(launch, "is_known", lambda host: next(answers))
    launch.find_first_pod(second_of_two)
    assert list(answers) == []


@pytest.mark.usefixtures("impatient")
def test_a_first_pod_that_is_never_found_is_a_reason_to_try_again(
    second_of_two: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "is_known", lambda host: False)
    with pytest.raises(TransientError, match=r"was not found in 0\.2 s: 127\.0\.0\.1 has no address"):
        launch.find_first_pod(second_of_two)


def test_names_that_dns_does_not_know_are_told_from_those_it_knows() -> None:
    assert launch.is_known("127.0.0.1")
    assert not launch.is_known("a name with blanks is nobody's")


def test_another_pod_stays_until_the_first_one_has_stored_the_model(
    second_of_two: Stage, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_torchrun: Any
) -> None:
    monkeypatch.setattr(train, "LOOK_SECONDS", 0.01)
    with ThreadPoolExecutor() as pool:
        other = pool.submit(train._await_promise, second_of_two)
        with pytest.raises(TimeoutError):
            other.result(timeout=0.5)
        monkeypatch.setenv("PET_NODE_RANK", "0")
        first = train.main(training(storage, tmp_path / "first", second_of_two.work))
        other.result(timeout=PATIENCE)
    assert first.keys() == {STAGE}


@pytest.mark.usefixtures("impatient")
def test_a_first_pod_that_stores_nothing_is_taken_for_lost_and_both_are_tried_again(
    second_of_two: Stage, no_torchrun: Any
) -> None:
    with pytest.raises(TransientError, match="the first pod has stored nothing more of the model"):
        train.main(second_of_two.context)


def test_a_first_pod_that_still_stores_is_waited_for(second_of_two: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock on which nearly all of its patience passes between two looks."""
    looks = 0

    def look(_: float) -> None:
        nonlocal looks
        looks += 1
        if looks <= 5:
            second_of_two.folder.put(f"model/{looks}", b"x")

    monkeypatch.setattr(second_of_two.context.stop, "wait", look)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: looks * 0.9 * train.SILENT_SECONDS))
    with pytest.raises(TransientError, match="the first pod has stored nothing more"):
        train._await_promise(second_of_two)
    assert looks == 7, "five objects, and twice nothing"


NODE = Node(rank=0, nodes=1, processes=3, master="", port="")
GONE = ProcessEnd(rank=1, code=Exit.RETRY, error="RuntimeError", message="connection closed by peer")


def test_what_the_user_must_change_is_told_even_when_other_processes_failed_of_it() -> None:
    bad = ProcessEnd(rank=2, code=Exit.PERMANENT, error="UserError", message="the loss is nan", hint="Lower it.")
    error = failure([GONE, bad], 1, NODE)
    assert isinstance(error, UserError)
    assert (error.message, error.hint) == ("the loss is nan", "Lower it.")


def test_an_interruption_is_told_as_one() -> None:
    assert isinstance(failure([ProcessEnd(rank=0, code=Exit.INTERRUPTED, message="SIGTERM")], 1, NODE), Interrupted)


def test_a_process_that_was_killed_is_named_and_the_training_tried_again() -> None:
    error = failure([GONE, ProcessEnd(rank=2, code=Exit.DONE)], 1, NODE)
    assert isinstance(error, TransientError)
    assert "rank 0 was killed or ended without a word" in error.message
    assert "rank 1: RuntimeError: connection closed by peer" in error.message


def test_what_a_process_knows_to_be_done_is_told() -> None:
    blind = ProcessEnd(rank=0, code=Exit.RETRY, error="TransientError", message="no GPU can be used", hint=GPU_HINT)
    assert failure([blind], 1, Node(rank=0, nodes=1, processes=1, master="", port="")).hint == GPU_HINT


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.float32"}, "float32"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({}, "float32"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "bfloat16"),
    ],
)
def test_the_dtype_that_a_student_is_stored_in_is_read_from_its_config(
    tmp_path: Path, config: dict[str, object], dtype: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stored_dtype(tmp_path) == dtype


def test_importing_the_launcher_imports_no_torch() -> None:
    check = "import sys, cgd_stages.train; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_the_processes_get_a_job_and_examples_and_the_model_is_stored_with_its_promise(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, no_torchrun: list[Path]
) -> None:
    refined(bucket, [quadruple(number) for number in range(10)] + [quadruple(10, refinement=" ")])
    made = training(storage, tmp_path, train_work(tiny_model))
    kept = {}

    def keep(stage: Any, folder: Path) -> None:
        kept["job"] = Job.model_validate_json((folder / JOB).read_text())
        with pa.memory_map(str(folder / EXAMPLES)) as source:
            kept["examples"] = pa.ipc.open_file(source).read_all().to_pylist()
        no_torchrun_run(stage, folder)

    no_torchrun_run, launch.torchrun = launch.torchrun, keep
    try:
        facts = train.main(made)[STAGE]
    finally:
        launch.torchrun = no_torchrun_run
    assert facts.rows == Rows(total=11, done=10, rejected=1)
    assert len(kept["examples"]) == 10
    assert kept["job"].resume == 0
    folder = Folder(bucket, "team", STAGE, facts.digest)
    done = folder.require()
    assert [part.key for part in done.under(MODEL)] == ["model/README.md", "model/config.json"]
    assert [row["reason"] for row in from_parquet(folder.read(done.under("rejected/")[0]))] == ["empty"]
    assert RunStore(bucket, made.task.run).pointer(STAGE).digest == facts.digest
    assert facts.metrics["first_loss"] == 2.0
    assert facts.metrics["final_loss"] == 1.0


def test_a_training_that_is_done_already_only_gets_the_pointer(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, no_torchrun: list[Path]
) -> None:
    refined(bucket, [quadruple(number) for number in range(4)])
    first = train.main(training(storage, tmp_path, train_work(tiny_model)))
    again = training(storage, tmp_path, train_work(tiny_model, workers=1, zero_stage=3, checkpoint_every_steps=7))
    again.task = again.task.model_copy(update={"run": again.task.run.model_copy(update={"name": "other"})})
    again.store = RunStore(bucket, again.task.run)
    refined(bucket, [quadruple(number) for number in range(4)], again.task.run)
    assert train.main(again) == first
    assert len(no_torchrun) == 1
    assert RunStore(bucket, again.task.run).pointer(STAGE).digest == first[STAGE].digest


@pytest.mark.parametrize(
    "change", [{"learning_rate": 1e-4}, {"epochs": 3}, {"seed": 1}, {"dtype": "bfloat16"}, {"global_batch_size": 8}]
)
def test_what_changes_the_weights_changes_the_digest(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, change: dict[str, Any]
) -> None:
    refined(bucket, [quadruple(1)])
    digests = {
        stage_of(training(storage, tmp_path, train_work(tiny_model, **changes))).folder.digest
        for changes in ({}, {"zero_stage": 3, "keep_checkpoints": 5, "max_rejected": 0.5}, change)
    }
    assert len(digests) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"objective": "CFT"},
        {"objective": "SFT"},
        {"objective": "RefinedSFT"},
        {"validation": Validation(fraction=0.1)},
        {"validation": Validation(every_steps=7)},
        {"validation": Validation(select="last")},
        {"critique": Critique(kind="shuffled")},
        {"critique": Critique(kind="generic")},
        {"critique": Critique(kind="none")},
        {"critique": Critique(kind="corrupted", rate=0.3)},
        {"critique": Critique(kind="corrupted", rate=0.6)},
    ],
    ids=lambda change: str(next(iter(change.values()))),
)
def test_every_objective_and_every_ablation_has_a_digest_of_its_own(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, change: dict[str, Any]
) -> None:
    refined(bucket, [quadruple(1)])
    given: list[dict[str, Any]] = [{}, {"critique": Critique(kind="corrupted", rate=0.5)}, change]
    digests = {
        stage_of(training(storage, tmp_path, train_work(tiny_model, **changes))).folder.digest for changes in given
    }
    assert len(digests) == 3


def test_an_adapter_and_each_of_its_settings_has_a_digest_of_its_own_and_no_adapter_has_none(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    refined(bucket, [quadruple(1)])
    adapters = [None, Adapter(), Adapter(rank=8), Adapter(alpha=16), Adapter(dropout=0.1), Adapter(targets=("mlp",))]
    stages = [stage_of(training(storage, tmp_path, train_work(tiny_model, adapter=one))) for one in adapters]
    assert len({stage.folder.digest for stage in stages}) == len(adapters)
    assert ["adapter" in stage.training.inputs["training"] for stage in stages] == [False] + 5 * [True]


def test_other_answers_of_the_teacher_are_another_training(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    refined(bucket, [quadruple(1)])
    digests = set()
    for answer in ("yes", "no"):
        distilled(bucket, {"1": answer})
        work = train_work(tiny_model, objective="DistilledSFT")
        digests.add(stage_of(training(storage, tmp_path, work)).folder.digest)
    assert len(digests) == 2


def test_too_many_rows_without_an_example_are_refused_with_reasons_and_examples(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, no_torchrun: list[Path]
) -> None:
    refined(bucket, [quadruple(number, refinement="5 " * (400 if number % 2 else 1)) for number in range(10)])
    with pytest.raises(UserError, match=r"5 of 10 rows make no example, 10.0% may \(too_long 5\)") as caught:
        train.main(training(storage, tmp_path, train_work(tiny_model)))
    assert "maxSequenceLength" in caught.value.hint
    assert no_torchrun == []


def test_no_rows_at_all_are_refused(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, no_torchrun: list[Path]
) -> None:
    refined(bucket, [])
    with pytest.raises(UserError, match="there are no rows"):
        train.main(training(storage, tmp_path, train_work(tiny_model)))


def test_the_model_card_tells_where_the_model_comes_from() -> None:
    facts = StageFacts(rows=Rows(total=5, done=4, rejected=1), digest="d1", metrics={"final_loss": 1.25})
    inputs = {"student": {"name": "org/small", "revision": "abc"}, "upstream": "u1", "training": {"seed": 7}}
    card = model_card(inputs, train_work(Path("x")), facts)
    for told in ("org/small", "abc", "4 rows", "1 of 5", "`d1`", "`u1`", "| seed | 7 |", "| final_loss | 1.25 |"):
        assert told in card


def test_the_model_card_tells_what_was_learned_and_that_it_was_an_ablation() -> None:
    inputs = {"student": {"name": "org/small", "revision": "abc"}, "upstream": "u1", "training": {}}
    cft, shuffled = (
        model_card(inputs, train_work(Path("x"), **changes), StageFacts(metrics={"length_to_512": 3}))
        for changes in ({"objective": "CFT"}, {"critique": Critique(kind="shuffled")})
    )
    assert "only the teacher's critique was learned" in cft
    assert "ablation" not in cft
    assert "An ablation: every critique was another prompt's." in shuffled
    assert "length_to" not in shuffled


def test_the_model_card_tells_what_was_learned_behind_wrong_critiques() -> None:
    inputs = {"student": {"name": "org/small", "revision": "abc"}, "upstream": "u1", "training": {}}
    kept, changed = (
        model_card(inputs, train_work(Path("x"), critique=critique), StageFacts(metrics={"misled_examples": 3}))
        for critique in (
            Critique(kind="miscritique", rate=0.5, target="kept"),
            Critique(kind="miscritique", rate=0.5, target="refined"),
        )
    )
    told = "a part of the critiques was replaced by wrong ones of the same drafts."
    assert told in kept
    assert f"{told} Behind these, what the teacher refined from them was learned." in changed
    assert "Behind these" not in kept
    assert "| misled_examples | 3 |" in kept


def test_the_model_card_tells_that_an_adapter_was_trained_and_where_it_is() -> None:
    inputs = {"student": {"name": "org/small", "revision": "abc"}, "upstream": "u1", "training": {"adapter": {}}}
    whole, some = (
        model_card(inputs, train_work(Path("x"), adapter=adapter), StageFacts())
        for adapter in (Adapter(rank=8), Adapter(targets=("attention", "up_proj"), dropout=0.1))
    )
    assert "a low-rank adapter (rank 8, alpha 32, dropout 0, for every linear module of the layers)" in whole
    assert "dropout 0.1, for attention, up_proj), which is stored beside this folder in `adapter/`" in some
    assert "low-rank" not in model_card(inputs, train_work(Path("x")), StageFacts())


def test_the_model_and_its_adapter_are_both_stored(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, no_torchrun: list[Path]
) -> None:
    refined(bucket, [quadruple(number) for number in range(10)])
    work = train_work(tiny_model, adapter=Adapter(), max_sequence_length=1000)
    train.main(training(storage, tmp_path, work))
    keys = {part.key for part in RunStore(bucket, RUN).input(STAGE).require().parts}
    assert {"model/config.json", "model/README.md", "adapter/adapter_config.json"} <= keys
    assert {"metrics.jsonl", EVENTS} <= keys


def test_the_devices_of_the_processes_are_among_the_settings(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, no_torchrun: list[Path], monkeypatch: Any
) -> None:
    refined(bucket, [quadruple(number) for number in range(10)])
    trains = launch.torchrun

    def run(stage: Any, folder: Path) -> None:
        trains(stage, folder)
        for rank in (0, 1):
            ProcessEnd(rank=rank, code=0, device="NVIDIA H200").write(folder)

    monkeypatch.setattr(launch, "torchrun", run)
    train.main(training(storage, tmp_path, train_work(tiny_model, max_sequence_length=1000)))
    assert RunStore(bucket, RUN).input(STAGE).require().settings["deviceName"] == "NVIDIA H200"


def written(path: Path) -> dict[str, list[int]]:
    """The token ids of the examples in a file that the processes map, by the row's id."""
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    return dict(zip(table["id"].to_pylist(), table["input_ids"].to_pylist(), strict=True))


def test_held_out_rows_are_in_a_file_of_their_own_and_all_rows_are_accounted_for(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, no_torchrun: list[Path]
) -> None:
    refined(bucket, [quadruple(number) for number in range(10)] + [quadruple(10, refinement=" ")])
    stage = stage_of(training(storage, tmp_path, train_work(tiny_model, validation=Validation(fraction=0.3))))
    made = make_examples(stage, tmp_path)
    learned, measured, bare = (set(written(tmp_path / name)) for name in (EXAMPLES, *HELD_OUT.values()))
    assert bare == measured
    assert measured == stage.dataset.held_out - {str(row["id"]) for row in made.counts.rejected}
    assert not learned & measured
    assert len(learned) + len(measured) + len(made.counts.rejected) == made.counts.rows.total == 11


def test_a_held_out_row_is_written_once_for_each_loss_on_it(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    """Given the prompt alone CGD and CFT are measured on what RefinedSFT learns, and the others not a second time."""
    rows = [quadruple(number, reference="It is 4.") for number in range(10)]
    refined(bucket, rows)
    own, bare = HELD_OUT.values()
    found = {}
    for objective in ("CGD", "CFT", "RefinedSFT", "SFT"):
        work = train_work(tiny_model, objective=objective, validation=Validation(fraction=0.3))
        stage = stage_of(training(storage, tmp_path, work))
        (folder := tmp_path / objective).mkdir()
        make_examples(stage, folder)
        found[objective] = {name: written(folder / name) for name in (own, bare)}
        assert set(found[objective][own]) == stage.dataset.held_out
    assert found["CGD"][bare] == found["CFT"][bare] == found["RefinedSFT"][own] != found["CGD"][own]
    assert found["RefinedSFT"][bare] == found["SFT"][bare] == {}


@pytest.mark.parametrize(
    ("select", "figures", "told"),
    [
        ("bare", {}, "after the last step; no prompts were held out"),
        ("last", {"validation_examples": 2, "validation_loss": 1.5}, "after the last step, whose loss on 2 rows"),
        (
            "context",
            {"validation_examples": 2, "validation_loss": 1.5, "exported_step": 20, "steps": 40},
            "after step 20 of 40, whose loss on 2 rows of held-out prompts is the least",
        ),
        (
            "bare",
            {
                "validation_examples": 2,
                "validation_loss": 1.5,
                "bare_validation_loss": 2.5,
                "exported_step": 20,
                "steps": 40,
            },
            "measured given the prompt alone: 2.5 (in the context in which it was trained 1.5). No benchmark",
        ),
    ],
)
def test_the_model_card_tells_how_the_model_was_chosen(select: Any, figures: dict[str, float], told: str) -> None:
    inputs = {"student": {"name": "org/small", "revision": "abc"}, "upstream": "u1", "distill": "d2", "training": {}}
    facts = StageFacts(rows=Rows(total=9, done=8, rejected=1), metrics=figures)
    card = model_card(inputs, train_work(Path("x"), validation=Validation(select=select)), facts)
    assert told in card
    assert f"on {8 - figures.get('validation_examples', 0)} rows. The context" in card
    assert "the teacher's own answers `d2`" in card


def test_the_facts_are_those_of_the_exported_model() -> None:
    records: list[dict[str, float]] = [
        {"step": 1, "validation_loss": 2.0, "bare_validation_loss": 3.0, "peak_memory_bytes": 5, "mfu": 0.4},
        {"step": 2, "peak_memory_bytes": 7, "mfu": 0.5},
    ]
    figures = product._of_the_exported(records[0], records)
    assert figures == {"validation_loss": 2.0, "bare_validation_loss": 3.0, "peak_memory_bytes": 7, "mfu": 0.45}
    assert product._of_the_exported({"step": 1}, [{"step": 1, "peak_memory_bytes": 5}]) == {"peak_memory_bytes": 5}
