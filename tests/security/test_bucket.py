"""Whoever can write to the bucket gives the pods data, and no code to run: nothing is played here."""

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.stage_builders import RUN, context
from support.train_builders import STAGE, train_work

from cgd_stages.contract import Harness, HarnessTask, Model, Rows, Storage
from cgd_stages.errors import UserError
from cgd_stages.harness import __main__ as harness
from cgd_stages.harness.replies import Reply
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.rows import file_sha256
from cgd_stages.tasks.documents import mirrored
from cgd_stages.tasks.guard import EXECUTING
from cgd_stages.train import student
from cgd_stages.train.saving import Saver
from cgd_stages.training.checkpoints import Checkpoints
from cgd_stages.training.job import CHECKPOINTS, Job

CURVE = [{"step": 1.0, "loss": 2.0}]


class Marker:
    """A pickle of it leaves a file where it is loaded with whatever it asks for."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self._path),)


# --- checkpoints ------------------------------------------------------------------------------------------------


def saver(storage: Storage, folder: Path, resume: int, **changes: Any) -> Saver:
    """Of a layer in training under DeepSpeed."""
    work = train_work(Path("x"), **changes)
    given: dict[str, Any] = {"student": "", "student_dtype": "float32", "first_rank": 0, "rows": Rows()}
    job = Job(run=RUN, stage=STAGE, digest="d1", storage=storage, work=work, resume=resume, **given)
    torch.manual_seed(resume)
    layer = torch.nn.Linear(8, 8).to(getattr(torch, work.dtype))
    return Saver(student.initialize(layer, student.deepspeed_config(work, 1, gpu=False)), job, folder)


def step(engine: Any) -> float:
    loss = engine(torch.ones(2, 8, dtype=next(engine.module.parameters()).dtype)).float().square().sum()
    engine.backward(loss)
    engine.step()
    return float(loss)


def stored(storage: Storage, folder: Path, **changes: Any) -> Saver:
    """A training after one step, whose checkpoint is in the bucket."""
    training = saver(storage, folder, 0, **changes)
    step(training._engine)
    training.save(1, CURVE)
    training.wait()
    return training


def resumed(storage: Storage, folder: Path, **changes: Any) -> Saver:
    later = saver(storage, folder, 1, **changes)
    later._checkpoints.fetch(folder / CHECKPOINTS, range(1))
    later.load()
    return later


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_checkpoint_is_loaded_as_data_alone_and_training_goes_on_as_it_would_have(
    group: None, storage: Storage, bucket: Bucket, tmp_path: Path, zero_stage: int, dtype: str
) -> None:
    first = stored(storage, tmp_path / "first", zero_stage=zero_stage, dtype=dtype)
    later = resumed(storage, tmp_path / "later", zero_stage=zero_stage, dtype=dtype)
    assert [step(later._engine) for _ in range(3)] == [step(first._engine) for _ in range(3)]


def replace(checkpoints: Checkpoints, name: str, marker: Marker, scratch: Path) -> None:
    """Put a pickle of the marker in the place of a checkpoint's file, with a promise that fits."""
    newest = checkpoints.newest()
    assert newest
    torch.save({"module": marker}, scratch / name)
    checkpoints.folder.bucket.upload(scratch / name, checkpoints._key(1, name))
    files = [
        part.model_copy(update={"sha256": file_sha256(scratch / name)}) if part.key == name else part
        for part in newest.files
    ]
    assert any(part.key == name for part in files)
    checkpoints.complete(1, files)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("zero_stage", "what"),
    [(0, "model_states"), (2, "model_states"), (2, "optim_states"), (3, "model_states"), (3, "optim_states")],
)
def test_a_checkpoint_that_holds_code_is_refused_and_the_code_is_not_run(
    group: None, storage: Storage, bucket: Bucket, tmp_path: Path, zero_stage: int, what: str
) -> None:
    first = stored(storage, tmp_path / "first", zero_stage=zero_stage)
    newest = first._checkpoints.newest()
    assert newest
    (name,) = (part.key for part in newest.files if what in part.key)
    ran = tmp_path / "ran"
    replace(first._checkpoints, name, Marker(ran), tmp_path)
    with pytest.raises(UserError, match="step-000001 holds more than data") as refused:
        resumed(storage, tmp_path / "later", zero_stage=zero_stage)
    assert not ran.exists()
    assert "who else can write to the bucket" in refused.value.hint


# --- own tasks of lm-eval ---------------------------------------------------------------------------------------

DEFINITION = """\
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CODE = "import pathlib\npathlib.Path('ran').touch()\ndef text(doc):\n    return doc['question']\n"
METRIC = """\
import datasets, evaluate, pathlib
pathlib.Path("ran").touch()
class Program(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", features=features)
    def _compute(self, **_):
        return {"program": 1.0}
"""
TEXT, DATA = 'doc_to_text: "{{question}}"', "{data_files: {test: sums.jsonl}}"
FUNCTION = "doc_to_text: !function code.text"


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of own tasks below the one that a program works in, with what goes with them."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "code.py").write_text(CODE)
    (tmp_path / "program").mkdir()
    (tmp_path / "program/program.py").write_text(METRIC)
    (folder / "base.txt").write_text(FUNCTION)
    (tmp_path / "sums.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    return folder


def asked(tasks: Path, definition: str, *, own_code: bool = False) -> dict[str, Any]:
    """What the real lm-eval says of a task of this definition; the model says the same of everything."""
    from lm_eval.models.dummy import DummyLM
    from lm_eval.tasks import TaskManager

    (tasks / "own.yaml").write_text(definition)
    asker = DummyLM()
    asker.tokenizer, asker.chat = None, SimpleNamespace(thinks=False, templated=False)
    asker.replies = defaultdict(lambda: Reply.of("", "stop"))
    task = HarnessTask(name="own", task="own", metric="exact_match", own_code=own_code)
    return harness.ask(asker, task, TaskManager(include_path=str(tasks), include_defaults=False))


@pytest.mark.filterwarnings("ignore")
def test_an_own_task_of_data_alone_is_asked(tasks: Path) -> None:
    (sample,) = asked(tasks, DEFINITION)["samples"]["own"]
    assert (sample["arguments"][0][0], sample["target"]) == ("1 + 1?", "2")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("given", "instead", "told"),
    [
        (TEXT, FUNCTION, "has a function, code.text"),
        (TEXT, "include: base.txt", "has a function, code.text"),
        ("task: own", "task: own\nclass: !function code.text", "has a function, code.text"),
        (TEXT, "doc_to_text: !function os.getcwd", "has a function, os.getcwd"),
        ("question}}", "cycler.__init__.__globals__.os.mkdir('ran')}}", "has a template that reaches into Python"),
        ("metric: exact_match", "metric: ./program", "is a program and not one of lm-eval's, ./program"),
        ("metric: exact_match", "hf_evaluate: true, metric: ./program", "is a program and not one of lm-eval's"),
        (DATA, "{data_files: {test: /proc/self/environ}}", "reads /proc/self/environ"),
        (DATA, "{data_files: {test: [sums.jsonl, 'file:/proc/self/environ']}}", "reads file:/proc/self/environ"),
        (DATA, "{data_files: {test: ../x/../sums.jsonl}}", "reads ../x/../sums.jsonl"),
        (DATA, "{data_files: {test: 'http://127.0.0.1:9/x.jsonl'}}", "reads http://127.0.0.1:9/x.jsonl"),
        ("dataset_path: json", "dataset_path: /proc/self", "reads /proc/self"),
    ],
)
def test_an_own_task_that_brings_code_or_reads_what_is_not_beside_it_is_refused(
    tasks: Path, given: str, instead: str, told: str
) -> None:
    assert given in DEFINITION
    with pytest.raises(UserError, match="the task own ") as refused:
        asked(tasks, DEFINITION.replace(given, instead))
    assert told in refused.value.message
    assert "ownCode: true" in refused.value.hint
    assert not (tasks.parent / "ran").exists()


README = """\
---
configs:
- config_name: default
  {given}
---
"""
FOLDER = DEFINITION.replace("dataset_path: json", "dataset_path: sums").replace(f"dataset_kwargs: {DATA}\n", "")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("data_files: [{split: test, path: sums.jsonl}]", ""),
        ("data_files: [{split: test, path: ABOVE/others.jsonl}]", "/others.jsonl"),
        ("data_files: [{split: test, path: ../../others.jsonl}]", "/others.jsonl"),
        ("data_files: [{split: test, path: 'http://127.0.0.1:9/x.jsonl'}]", "http://127.0.0.1:9/x.jsonl"),
        ("data_dir: ABOVE", "/others.jsonl"),
    ],
)
def test_a_folder_of_data_names_no_file_outside_its_own_mirror(
    tasks: Path, monkeypatch: pytest.MonkeyPatch, given: str, told: str
) -> None:
    mirror = tasks.parent / "mirror"
    (mirror / "sums").mkdir(parents=True)
    monkeypatch.chdir(mirror)
    (mirror / "sums/README.md").write_text(README.format(given=given.replace("ABOVE", str(tasks.parent))))
    for path in (mirror / "sums/sums.jsonl", tasks.parent / "others.jsonl"):
        path.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    if not told:
        assert len(asked(tasks, FOLDER)["samples"]["own"]) == 1
        return
    with pytest.raises(UserError, match="the task own reads ") as refused:
        asked(tasks, FOLDER)
    assert told in refused.value.message


@pytest.mark.filterwarnings("ignore")
def test_a_task_that_is_named_as_one_with_own_code_may_bring_it(tasks: Path) -> None:
    (sample,) = asked(tasks, DEFINITION.replace(TEXT, FUNCTION), own_code=True)["samples"]["own"]
    assert sample["arguments"][0][0] == "1 + 1?"
    assert (tasks.parent / "ran").exists()


@pytest.mark.filterwarnings("ignore")
def test_after_a_task_the_libraries_are_as_they_were(tasks: Path) -> None:
    from lm_eval import utils

    before = utils.env
    with pytest.raises(UserError):
        asked(tasks, DEFINITION.replace(TEXT, FUNCTION))
    assert utils.env is before


def test_processes_that_start_among_the_data_of_tasks_import_nothing_of_it(
    bucket: Bucket, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM's workers do, which Python starts with -c."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.chdir(tmp_path)
    uri = f"{storage.uri}-mirror"
    bucket.at(uri).put("runpy_of_the_bucket.py", b"")
    work = Harness(model=Model(name="x"), tasks=(), data=uri)
    with mirrored(context(storage, work, tmp_path), uri):
        assert Path("runpy_of_the_bucket.py").exists()
        command = [sys.executable, "-c", "import runpy_of_the_bucket"]
        done = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert "ModuleNotFoundError" in done.stderr


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "definition", ["cruxeval/cruxeval_input.yaml", "longproc/countdown_0.5k.yaml", "mbpp/mbpp.yaml"]
)
def test_a_task_of_lm_eval_that_executes_what_the_model_writes_is_refused(tasks: Path, definition: str) -> None:
    import lm_eval

    stock = Path(lm_eval.__file__).parent / "tasks" / definition
    assert stock.exists()
    with pytest.raises(UserError, match="the task own executes code that the model writes"):
        asked(tasks, f"task: own\ninclude: {stock}\n")


def test_no_other_task_of_lm_eval_executes_anything() -> None:
    import lm_eval

    tasks = Path(lm_eval.__file__).parent / "tasks"
    executing = re.compile(r"(?<![\w.\"'])(?:eval|exec)\(|\bPopen\(|subprocess\.|code_eval|os\.system\(")
    found = {path.relative_to(tasks) for path in tasks.rglob("*.py") if executing.search(path.read_text())}
    # ERRANT is a command that reads what the model writes and executes none of it.
    assert {path.parts[0] for path in found - {Path("noreval/ask_gec/errant.py")}} == EXECUTING
