"""Training as pods run it: torchrun, two processes, real DeepSpeed, signals; the numbers stay those of a plain loop."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.stage_builders import (
    GREEDY,
    Ended,
    Program,
    VllmProgram,
    context,
    generate_work,
    prepared,
    stored_rows,
    task,
)
from support.train_builders import (
    STAGE,
    has_checkpoint,
    places,
    plain_loss,
    plain_training,
    quadruple,
    refined,
    stored_curve,
    train_task,
    train_work,
    until_gone,
    until_torchrun_has_started_processes,
)
from transformers import AutoModelForCausalLM

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Adapter, Exit, Objective, Storage, Validation
from cgd_stages.method import prompts
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import Folder
from cgd_stages.train import __main__ as train
from cgd_stages.training.validation_split import held_out

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]

ROWS = [quadruple(number) for number in range(10)]
LONG = {"epochs": 40, "learning_rate": 1e-4, "checkpoint_every_steps": 10}
"""Long enough for a signal to arrive in the middle."""
MEASURED: dict[str, Objective] = {"validation_loss": "CGD", "bare_validation_loss": "RefinedSFT"}
"""The losses of CGD on held-out rows, and the objectives with such examples."""


@pytest.fixture(scope="module")
def losses(tiny_model: Path) -> list[float]:
    """Of a plain loop that nobody interrupted."""
    return plain_training(tiny_model, ROWS, train_work(tiny_model, **LONG))[0]


def assert_plain(bucket: Bucket, ended: Ended, losses: list[float]) -> None:
    """The stored curve has every step once, and the losses of the plain loop."""
    assert ended.code == Exit.DONE, ended.log
    records = stored_curve(bucket, Folder(bucket, "team", STAGE, ended.words.stages[STAGE].digest))
    assert [record["step"] for record in records] == list(range(1, len(losses) + 1))
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=2e-3)


def test_two_packing_processes_stopped_by_sigterm_go_on_where_they_were(
    bucket: Bucket, storage: Storage, tiny_model: Path, tmp_path: Path, losses: list[float]
) -> None:
    refined(bucket, ROWS)
    work = train_work(tiny_model, processes_per_worker=2, zero_stage=2, packing=True, **LONG)
    first = Program("train", train_task(storage, work), tmp_path / "a")
    first.send_once(lambda: has_checkpoint(bucket), signal.SIGTERM)
    stopped = first.wait()
    assert stopped.code == Exit.INTERRUPTED, stopped.log
    assert stopped.words.outcome == "interrupted"
    assert "a checkpoint is stored" in stopped.words.message

    ended = Program("train", train_task(storage, work), tmp_path / "b").wait()
    assert "going on after step" in ended.log
    assert_plain(bucket, ended, losses)


def test_a_training_that_has_begun_no_step_leaves_at_once_with_all_its_processes(
    bucket: Bucket, storage: Storage, tiny_model: Path, tmp_path: Path
) -> None:
    refined(bucket, ROWS)
    work = train_work(tiny_model, processes_per_worker=2)
    program = Program("train", train_task(storage, work), tmp_path)
    until_torchrun_has_started_processes(tmp_path)
    program.send(signal.SIGTERM)
    ended = program.wait()
    assert (ended.code, ended.words.message) == (Exit.INTERRUPTED, "SIGTERM: no step was begun"), ended.log
    until_gone(tmp_path)


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize(("zero_stage", "offload"), [(2, "none"), (3, "none"), (2, "optimizer"), (3, "parameters")])
def test_two_processes_measure_together_what_one_would_alone(
    bucket: Bucket, storage: Storage, tiny_model: Path, tmp_path: Path, zero_stage: int, offload: str
) -> None:
    refined(bucket, ROWS)
    validation = Validation(fraction=0.3, every_steps=1)
    layout = {"processes_per_worker": 2, "zero_stage": zero_stage, "offload": offload}
    work = train_work(tiny_model, validation=validation, **layout)
    training = context(storage, work, tmp_path)
    training.task = train_task(storage, work)
    facts = train.main(training)[STAGE]
    folder = Folder(bucket, "team", STAGE, facts.digest)
    exported = min(stored_curve(bucket, folder), key=lambda record: record["bare_validation_loss"])
    for part in folder.require().under("model/"):
        bucket.download(folder.key(part.key), tmp_path / part.key)
    measured = held_out([str(row["id"]) for row in ROWS], 0.3, 0)
    for name, objective in MEASURED.items():
        plain = plain_loss(tmp_path / "model", [row for row in ROWS if row["id"] in measured], objective)
        assert exported[name] == facts.metrics[name] == pytest.approx(plain, rel=1e-5)


def test_two_pods_go_on_from_the_newest_checkpoint_after_one_was_killed(
    bucket: Bucket, storage: Storage, tiny_model: Path, tmp_path: Path, losses: list[float]
) -> None:
    refined(bucket, ROWS)
    work = train_work(tiny_model, workers=2, zero_stage=3, **LONG)

    def pods(folder: Path) -> list[Program]:
        return [
            Program("train", train_task(storage, work), folder / str(rank), **place)
            for rank, place in enumerate(places(2))
        ]

    master, worker = pods(tmp_path / "a")
    master.send_once(lambda: has_checkpoint(bucket), signal.SIGKILL)
    assert master.wait().code == -signal.SIGKILL
    left = worker.wait()
    assert left.code == Exit.RETRY, left.log
    assert "continues from the newest checkpoint" in left.words.hint
    until_gone(tmp_path / "a")

    ended, other = [pod.wait() for pod in pods(tmp_path / "b")]
    assert other.code == Exit.DONE
    assert other.words.stages == {}, "only the first pod speaks for the stage"
    assert "going on after step" in ended.log
    assert_plain(bucket, ended, losses)


def test_the_stored_model_says_the_same_in_vllm_and_in_transformers(
    bucket: Bucket, storage: Storage, tiny_model: Path, tmp_path: Path
) -> None:
    refined(bucket, ROWS)
    training = train_task(storage, train_work(tiny_model, zero_stage=3))
    trained = Program("train", training, tmp_path / "train").wait()
    model = download(bucket, Folder(bucket, "team", STAGE, trained.words.stages[STAGE].digest), tmp_path / "model")
    prepared(bucket, [row["prompt"] for row in ROWS])
    work = generate_work(model, "answer", max_rejected=1.0)
    answered = VllmProgram("generate", task(storage, work), tmp_path / "generate").wait()
    assert answered.code == Exit.DONE, answered.log

    said = {row["prompt"]: row["answer"] for row in stored_rows(bucket, "answer")}
    assert len(said) >= 3
    # A half character before the end of turn is a mark in transformers' text; vLLM leaves it out.
    halves = {prompt: (text.rstrip("\ufffd"), greedy(model, prompt).rstrip("\ufffd")) for prompt, text in said.items()}
    assert {prompt: pair for prompt, pair in halves.items() if pair[0] != pair[1]} == {}


@pytest.mark.parametrize("zero_stage", [3])
def test_two_processes_that_train_an_adapter_go_on_after_sigterm_as_a_plain_loop(
    bucket: Bucket, storage: Storage, tiny_model: Path, tmp_path: Path, zero_stage: int
) -> None:
    refined(bucket, ROWS)
    given = LONG | {"epochs": 12, "adapter": Adapter(rank=4, alpha=8), "learning_rate": 1e-3, "zero_stage": zero_stage}
    work = train_work(tiny_model, processes_per_worker=2, **given)
    first = Program("train", train_task(storage, work), tmp_path / "a")
    first.send_once(lambda: has_checkpoint(bucket), signal.SIGTERM)
    stopped = first.wait()
    assert stopped.code == Exit.INTERRUPTED, stopped.log

    ended = Program("train", train_task(storage, work), tmp_path / "b").wait()
    assert "going on after step" in ended.log
    losses, _, expected = plain_training(tiny_model, ROWS, work)
    assert_plain(bucket, ended, losses)
    folder = Folder(bucket, "team", STAGE, ended.words.stages[STAGE].digest)
    model = AutoModelForCausalLM.from_pretrained(download(bucket, folder, tmp_path / "model"))
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(tensor.data, expected[name], rtol=1e-3, atol=1e-4)


def test_vllm_says_the_same_with_the_stored_adapter_as_with_the_stored_model(
    bucket: Bucket, storage: Storage, tiny_model: Path, tmp_path: Path
) -> None:
    refined(bucket, ROWS)
    adapter = {"adapter": Adapter(rank=4, alpha=8), "learning_rate": 1e-2, "epochs": 4}
    training = train_task(storage, train_work(tiny_model, zero_stage=2, **adapter))
    trained = Program("train", training, tmp_path / "train").wait()
    folder = Folder(bucket, "team", STAGE, trained.words.stages[STAGE].digest)
    model = download(bucket, folder, tmp_path / "model")
    template = ChatTemplate.load(model)
    asked = [template.token_ids(template.render(prompts.answer_messages(row["prompt"]))) for row in ROWS]
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(asked))
    adapted = download(bucket, folder, tmp_path / "adapter")
    serve = [sys.executable, "-m", "support.serve_adapter", str(tiny_model), str(adapted), str(file)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ended = subprocess.run(serve, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr[-6000:]
    said = json.loads(file.read_text())
    assert said == written(model, asked)
    assert said != written(tiny_model, asked)


def written(model: Path, asked: list[list[int]]) -> list[list[int]]:
    """What transformers writes after each of these prompts."""
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    made = [student.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24)[0].tolist() for ids in asked]
    return [ids[len(prompt) :] for ids, prompt in zip(made, asked, strict=True)]


def download(bucket: Bucket, folder: Folder, target: Path) -> Path:
    """The files of the trained model, or of its adapter, as a user would fetch them."""
    target.mkdir()
    for stored in bucket.list(folder.key(f"{target.name}/")):
        bucket.download(stored.key, target / Path(stored.key).name)
    return target


def greedy(model: Path, prompt: str) -> str:
    """What transformers says to a prompt."""
    template = ChatTemplate.load(model)
    ids = template.token_ids(template.render(prompts.answer_messages(prompt)))
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    made = student.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=GREEDY.max_tokens)
    reply = made[0, len(ids) :].tolist()
    return template.split(reply, template.tokenizer.decode(reply, skip_special_tokens=True)).text
