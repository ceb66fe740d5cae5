"""The training loop with real DeepSpeed on the tiny model: the numbers are right, and an interruption changes none."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.stage_builders import RUN
from support.train_builders import STAGE, plain_loss, plain_training, quadruple, refined, train_work, trained, weights
from transformers import AutoTokenizer

from cgd_stages.contract import Adapter, Chat, Objective, Storage, Validation
from cgd_stages.errors import Interrupted, TransientError, UserError
from cgd_stages.models import export, training_memory
from cgd_stages.runtime.progress import Reporter
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.run import RunStore
from cgd_stages.training import validation_split
from cgd_stages.training.job import STOP
from cgd_stages.training.tensorboard import EVENTS

# What torch and DeepSpeed warn of is theirs.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]

ROWS = [quadruple(number) for number in range(10)]


@contextmanager
def stopped_in(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SIGTERM comes in that step, counted from 1."""
    from cgd_stages.train.trainer import Trainer

    make = Trainer._step

    def stop(self: Trainer, number: int) -> None:
        make(self, number)
        if number + 1 == step:
            (self.folder / STOP).touch()

    with monkeypatch.context() as stopping:
        stopping.setattr(Trainer, "_step", stop)
        yield


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_making_activations_again_in_backward_changes_no_figure(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    zero_stage: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "cgd_stages.train.student")
    refined(bucket, ROWS)
    elsewhere = storage.model_copy(update={"uri": f"{storage.uri}-without"})
    refined(Bucket(elsewhere), ROWS)
    given = {"zero_stage": zero_stage, "packing": True, "max_sequence_length": 700}
    without, expected = trained(elsewhere, tmp_path / "without", tiny_model, **given)
    assert "activation checkpointing off: on a CPU" in caplog.text
    records, model = trained(storage, tmp_path / "with", tiny_model, activation_checkpointing="always", **given)
    assert "activation checkpointing on: as training.activationCheckpointing says" in caplog.text
    assert [record["loss"] for record in records] == [record["loss"] for record in without]
    for name, tensor in weights(model).items():
        assert tensor.equal(weights(expected)[name]), name


@pytest.mark.parametrize(
    ("zero_stage", "offload"), [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "parameters")]
)
def test_the_configuration_for_gpus_trains_also_after_an_interruption(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    zero_stage: int,
    offload: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU, where DeepSpeed takes pinned memory for a wish."""
    from cgd_stages.train import student

    make, begin, fused = student.deepspeed_config, student.initialize, []

    def initialize(*given: Any) -> Any:
        engine = begin(*given)
        fused.append(engine.basic_optimizer.defaults["fused"])
        return engine

    monkeypatch.setattr(student, "deepspeed_config", lambda work, world, **_: make(work, world, gpu=True))
    monkeypatch.setattr(student, "initialize", initialize)
    refined(bucket, ROWS)
    given = {"zero_stage": zero_stage, "offload": offload}
    with stopped_in(3, monkeypatch), pytest.raises(Interrupted, match="after step 3 of 6"):
        trained(storage, tmp_path / "first", tiny_model, **given)
    stored = sum(found.size for found in bucket.list(f"team/{STAGE}/") if "/checkpoints/" in found.key)
    parameters = sum(tensor.numel() for tensor in weights(tiny_model).values())
    size = training_memory.checkpoint(train_work(tiny_model, **given), parameters=parameters, stored=0)
    assert 0.7 < stored / size < 1.1, "what a checkpoint is told to have is what it has"
    records, model = trained(storage, tmp_path / "second", tiny_model, **given)
    assert fused == [True, True]
    losses, _, expected = plain_training(tiny_model, ROWS, train_work(tiny_model, **given))
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=1e-5)
    for name, tensor in weights(model).items():
        assert tensor.detach().numpy() == pytest.approx(expected[name].numpy(), rel=1e-3, abs=2e-5), name


@pytest.mark.parametrize(("zero_stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "parameters")])
def test_offloading_changes_no_weight_also_after_an_interruption(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    zero_stage: int,
    offload: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    refined(bucket, ROWS)
    elsewhere = storage.model_copy(update={"uri": f"{storage.uri}-without"})
    refined(Bucket(elsewhere), ROWS)
    given = {"zero_stage": zero_stage, "weight_decay": 0.1}
    without, expected = trained(elsewhere, tmp_path / "without", tiny_model, **given)
    with stopped_in(4, monkeypatch), pytest.raises(Interrupted, match="after step 4 of 6"):
        trained(storage, tmp_path / "first", tiny_model, offload=offload, **given)
    records, model = trained(storage, tmp_path / "second", tiny_model, offload=offload, **given)
    assert [record["loss"] for record in records] == pytest.approx([record["loss"] for record in without], rel=1e-6)
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, weights(expected)[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("zero_stage", "packing"), [(0, False), (1, False), (2, False), (3, False), (0, True), (2, True), (3, True)]
)
def test_losses_norms_and_weights_are_those_of_a_plain_loop(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    zero_stage: int,
    packing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from cgd_stages.train import student

    monkeypatch.setattr(student, "CHUNK", 16)
    refined(bucket, ROWS)
    settings = {"zero_stage": zero_stage, "max_sequence_length": 700, "packing": packing, "weight_decay": 0.5}
    work = train_work(tiny_model, **settings)
    records, model = trained(storage, tmp_path, tiny_model, **settings)
    with least_adam_scales() as scales:
        losses, norms, expected = plain_training(tiny_model, ROWS, work)
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=1e-5)
    # Adam and clipping hide a wrong scale of the gradients; the norms do not.
    assert [record["grad_norm"] for record in records] == pytest.approx(norms, rel=1e-4)
    assert losses[-1] < losses[0]
    trained_weights = weights(model)
    for (name, tensor), scale in zip(expected.items(), scales, strict=True):
        far = (trained_weights[name] - tensor).abs()
        # Adam has divided these gradients by so little that their rounding in float32 shows. The others are exact.
        rounded = (scale > 0) & (scale < 1e-7)
        assert rounded.sum() <= tensor.numel() // 200, name
        assert far.max() < work.learning_rate, name
        torch.testing.assert_close(trained_weights[name][~rounded], tensor[~rounded], rtol=1e-3, atol=2e-5)


@contextmanager
def least_adam_scales() -> Iterator[list[Any]]:
    """Of each parameter that AdamW changes meanwhile: for each element the least root of Adam's second moment over all
    steps, which is what a difference of two gradients is divided by."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    least: list[Any] = []

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        (group,) = optimizer.param_groups
        for at, parameter in enumerate(group["params"]):
            state = optimizer.state[parameter]
            scale = (state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"])).sqrt()
            if at == len(least):
                least.append(scale)
            least[at] = torch.minimum(least[at], scale)

    hook = register_optimizer_step_post_hook(note)
    try:
        yield least
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("zero_stage", "offload"),
    [(0, "none"), (1, "none"), (2, "none"), (1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")],
)
def test_in_bfloat16_the_loss_falls_and_the_model_keeps_the_student_s_dtype(
    launcher: None, bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, zero_stage: int, offload: str
) -> None:
    import torch

    refined(bucket, ROWS)
    given = {"zero_stage": zero_stage, "offload": offload, "epochs": 4}
    records, model = trained(storage, tmp_path, tiny_model, dtype="bfloat16", **given)
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    assert all(math.isfinite(record["grad_norm"]) and record["grad_norm"] > 0 for record in records)
    assert {tensor.dtype for tensor in weights(model).values()} == {torch.float32}


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_training_stopped_between_checkpoints_goes_on_as_if_it_had_not_been(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    zero_stage: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    refined(bucket, ROWS)
    there = {"zero_stage": zero_stage, "weight_decay": 0.1}
    elsewhere = storage.model_copy(update={"uri": f"{storage.uri}-whole"})
    refined(Bucket(elsewhere), ROWS)
    whole, expected = trained(elsewhere, tmp_path / "whole", tiny_model, **there)

    with stopped_in(4, monkeypatch), pytest.raises(Interrupted, match="after step 4 of 6, a checkpoint is stored"):
        trained(storage, tmp_path / "first", tiny_model, **there)
    records, model = trained(storage, tmp_path / "second", tiny_model, **there)

    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["loss"] for record in records] == [record["loss"] for record in whole]
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, weights(expected)[name]), name


DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %B %Y') }}.<|im_end|>\n" + tiny.TEMPLATE
"""A template that writes the day, as Llama 3.2's does."""


@contextmanager
def on_day(day: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The clock of chat templates shows this day of November 2026."""
    from transformers.utils import chat_template_utils

    class Clock:
        @staticmethod
        def now() -> datetime:
            return datetime(2026, 11, day, 23, 59, tzinfo=UTC)

    with monkeypatch.context() as clock:
        clock.setattr(chat_template_utils, "datetime", Clock)
        yield


def test_a_training_that_midnight_interrupts_ends_with_the_weights_of_a_whole_one(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    refined(bucket, ROWS)
    elsewhere = storage.model_copy(update={"uri": f"{storage.uri}-whole"})
    refined(Bucket(elsewhere), ROWS)
    model = tiny.make(tmp_path / "dated", template=DATED)
    settings = {"chat": Chat(date="2026-11-29"), "max_sequence_length": 700}
    with on_day(28, monkeypatch):
        whole, expected = trained(elsewhere, tmp_path / "whole", model, **settings)
    with on_day(29, monkeypatch), stopped_in(4, monkeypatch), pytest.raises(Interrupted):
        trained(storage, tmp_path / "first", model, **settings)
    with on_day(30, monkeypatch):
        bare = AutoTokenizer.from_pretrained(model)
        assert "30 November" in bare.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
        records, found = trained(storage, tmp_path / "second", model, **settings)
    assert [record["loss"] for record in records] == [record["loss"] for record in whole]
    for name, tensor in weights(found).items():
        assert torch.equal(tensor, weights(expected)[name]), name


def test_a_loss_that_is_no_number_ends_the_run_with_the_rows_of_its_batch(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cgd_stages.train import trainer

    monkeypatch.setattr(trainer, "learning_rate", lambda step, **_: 1e30)
    refined(bucket, ROWS)
    with pytest.raises(
        UserError, match=r"is (nan|inf) at step \d; the rows of the batch .*: (0+\d/0(, )?){4}"
    ) as caught:
        trained(storage, tmp_path, tiny_model)
    assert "learningRate" in caught.value.hint


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_student_with_tied_embeddings_stays_tied(
    launcher: None, bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, zero_stage: int
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    refined(bucket, ROWS)
    student = AutoModelForCausalLM.from_pretrained(tiny_model)
    student.config.tie_word_embeddings = True
    student.tie_weights()
    student.to(torch.bfloat16).save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "tied")

    _, model = trained(storage, tmp_path, tmp_path / "tied", zero_stage=zero_stage)
    made = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert made.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(model).chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template
    assert not torch.equal(made.lm_head.weight, student.lm_head.weight.to(torch.bfloat16))


def test_a_model_is_stored_with_the_rules_values_and_template_that_it_was_trained_with(
    launcher: None, bucket: Bucket, storage: Storage, tmp_path: Path
) -> None:
    """transformers refuses to save such a generation config, and would give other ids by the tokenizer's class."""
    from transformers import GenerationConfig

    refined(bucket, ROWS)
    student = tiny.misnamed(tmp_path / "student")
    (student / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.95, "eos_token_id": 2}')
    own = tiny.TEMPLATE.replace("<|im_end|>\n", "<|im_end|>\n\n")
    _, model = trained(storage, tmp_path, student, chat=Chat(template=own), **HELD_OUT)
    assert (model / "tokenizer.json").read_bytes() == (student / "tokenizer.json").read_bytes()
    stored = AutoTokenizer.from_pretrained(model)
    assert stored.decode(stored("Ann has  12")["input_ids"]) == "Ann has  12"
    assert stored.chat_template == own
    kept = GenerationConfig.from_pretrained(model)
    assert (kept.do_sample, kept.temperature, kept.top_p, kept.eos_token_id) == (True, 0.6, 0.95, 2)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_student_that_scales_its_logits_learns_as_in_a_plain_loop(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    zero_stage: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GraniteConfig

    from cgd_stages.train import student

    monkeypatch.setattr(student, "CHUNK", 16)
    refined(bucket, ROWS)
    tiny = AutoConfig.from_pretrained(tiny_model).to_dict()
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = GraniteConfig(**{name: tiny[name] for name in same}, num_key_value_heads=2, logits_scaling=0.125)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "granite")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "granite")
    records, _ = trained(storage, tmp_path, tmp_path / "granite", zero_stage=zero_stage)
    losses, norms, _ = plain_training(tmp_path / "granite", ROWS, train_work(tmp_path / "granite"))
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=1e-5)
    assert [record["grad_norm"] for record in records] == pytest.approx(norms, rel=1e-4)


HELD_OUT = {"validation": Validation(fraction=0.3, every_steps=2)}


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_the_validation_losses_are_the_means_over_the_tokens_of_rows_that_are_not_learned(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    zero_stage: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refined(bucket, ROWS)
    reports: list[dict[str, float]] = []
    monkeypatch.setattr(Reporter, "report", lambda *_, metrics=None, **__: reports.append(metrics or {}))
    records, model = trained(storage, tmp_path, tiny_model, zero_stage=zero_stage, **HELD_OUT)
    held_out = validation_split.held_out([str(row["id"]) for row in ROWS], 0.3, 0)
    learned = [row for row in ROWS if row["id"] not in held_out]
    assert (len(learned), len(records)) == (7, 4)
    work = train_work(tiny_model, zero_stage=zero_stage)
    losses, *_ = plain_training(tiny_model, learned, work)
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=1e-5)
    for name, objective in {"validation_loss": "CGD", "bare_validation_loss": "RefinedSFT"}.items():
        assert [name in record for record in records] == [False, True, False, True]
        measured = plain_loss(model, [row for row in ROWS if row["id"] in held_out], objective)
        assert min(record[name] for record in records[1::2]) == pytest.approx(measured, rel=1e-5)
        assert records[1][name] in [report.get(name) for report in reports]


MEASURED: dict[str, Objective] = {"validation_loss": "CFT", "bare_validation_loss": "RefinedSFT"}
"""The losses of CFT on held-out rows, and the objectives with such examples."""


def worsens_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After this step, training walks up the gradient: away from what was learned."""
    from cgd_stages.train import trainer

    rate = trainer.learning_rate

    def wrong(now: int, **given: Any) -> float:
        return rate(now, **given) * (1 if now < step else -10)

    monkeypatch.setattr(trainer, "learning_rate", wrong)


@pytest.mark.parametrize(("zero_stage", "select", "chosen"), [(2, "bare", 6), (3, "context", 4), (3, "last", 8)])
def test_the_loss_that_the_run_names_chooses_the_exported_model_also_after_an_interruption(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    zero_stage: int,
    select: Any,
    chosen: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CFT learns critiques until step 4 and unlearns them from there, which other texts gain by until step 6."""
    import torch

    rows = [row | {"refinement": "7 - 2 = 5. " * 9} for row in ROWS]

    worsens_after(4, monkeypatch)
    validation = Validation(fraction=0.3, every_steps=2, select=select)
    given = {"objective": "CFT", "zero_stage": zero_stage, "epochs": 4, "warmup_ratio": 0.0, "validation": validation}
    given |= {"checkpoint_every_steps": 5}
    elsewhere = storage.model_copy(update={"uri": f"{storage.uri}-whole"})
    for store in (storage, elsewhere):
        refined(Bucket(store), rows)
    whole, expected = trained(elsewhere, tmp_path / "whole", tiny_model, **given)
    measured = {record["step"]: record for record in whole if "validation_loss" in record}
    least = {name: min(measured, key=lambda step: measured[step][name]) for name in MEASURED}
    assert least == {"bare_validation_loss": 6, "validation_loss": 4}, measured
    held_out = validation_split.held_out([str(row["id"]) for row in rows], 0.3, 0)
    for name, objective in MEASURED.items():
        plain = plain_loss(expected, [row for row in rows if row["id"] in held_out], objective)
        assert plain == pytest.approx(measured[chosen][name], rel=1e-5)

    with stopped_in(7, monkeypatch), pytest.raises(Interrupted, match="after step 7 of 8"):
        trained(storage, tmp_path / "first", tiny_model, **given)
    records, model = trained(storage, tmp_path / "second", tiny_model, **given)
    for name in MEASURED:
        assert [record.get(name) for record in records] == [record.get(name) for record in whole]
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, weights(expected)[name]), name


def test_a_large_model_is_stored_in_files_of_a_moderate_size(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is a sign of life for the pods that wait for the model."""
    assert export.FILE_SIZE == "5GB"
    monkeypatch.setattr(export, "FILE_SIZE", "100KB")
    refined(bucket, ROWS)
    _, model = trained(storage, tmp_path, tiny_model)
    files = {path.name for path in model.glob("*.safetensors")}
    assert len(files) > 1
    assert weights(model)
    done = RunStore(bucket, RUN).input(STAGE).require()
    assert files <= {part.key.removeprefix("model/") for part in done.parts}


def test_a_loss_that_runs_away_ends_the_run_with_the_rows_of_its_batches(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cgd_stages.training import curves

    monkeypatch.setattr(curves, "BASELINE", 6)
    worsens_after(8, monkeypatch)
    refined(bucket, ROWS)
    given = {"epochs": 8, "global_batch_size": 4, "warmup_ratio": 0.0, "learning_rate": 1e-2}
    with pytest.raises(UserError, match=r"since step \d+ .*first to last: 0+\d/0, .*; .*; .*; .*; 0+\d/0") as caught:
        trained(storage, tmp_path / "on", tiny_model, **given)
    assert "stopOnLossSpike: false" in caught.value.hint
    kept = [found.key for found in bucket.list(f"team/{STAGE}/") if found.key.endswith("metrics.jsonl")]
    (curve,) = [key for key in kept if "checkpoints" not in key]
    assert (bucket.get(curve) or b"").count(b"\n") > 8, "the curve is stored, to be looked at"
    assert b"loss" in (bucket.get(curve.replace("metrics.jsonl", EVENTS)) or b"")
    records, _ = trained(storage, tmp_path / "off", tiny_model, stop_on_loss_spike=False, **given)
    assert len(records) == 24


def test_every_step_tells_its_speed_memory_and_remaining_time_and_no_share_of_an_unknown_peak(
    launcher: None, bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    refined(bucket, ROWS)
    records, _ = trained(storage, tmp_path, tiny_model, epochs=4, **HELD_OUT)
    for record in records:
        speed = record["supervised_tokens"] / record["seconds"]
        assert record["supervised_tokens_per_second"] == pytest.approx(speed, rel=0.02)
        assert record["peak_memory_bytes"] > 1e7
        assert "mfu" not in record
    assert "eta_seconds" not in records[0], "the first step of an attempt is slower than the others"
    assert any(record.get("eta_seconds", 0) > 0 for record in records)
    assert records[-1]["eta_seconds"] == 0


ADAPTER = {"adapter": Adapter(rank=4, alpha=8), "learning_rate": 1e-2}


def stored_checkpoint(bucket: Bucket, folder: Path) -> list[Path]:
    """The files of the one checkpoint that is stored."""
    folder.mkdir()
    keys = [found.key for found in bucket.list(f"team/{STAGE}/") if "/checkpoints/" in found.key]
    for key in keys:
        bucket.download(key, folder / Path(key).name)
    return sorted(folder.iterdir())


@pytest.mark.parametrize(("zero_stage", "offload"), [(0, "none"), (2, "none"), (3, "none"), (3, "parameters")])
def test_an_adapter_learns_as_in_a_plain_loop_of_peft_also_after_an_interruption(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    zero_stage: int,
    offload: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    refined(bucket, ROWS)
    given = {"zero_stage": zero_stage, "offload": offload, "weight_decay": 0.1, **ADAPTER}
    if offload == "parameters":
        given |= {"packing": True, "max_sequence_length": 700, "activation_checkpointing": "always"}
    with stopped_in(3, monkeypatch), pytest.raises(Interrupted, match="after step 3 of 6"):
        trained(storage, tmp_path / "first", tiny_model, **given)
    records, model = trained(storage, tmp_path / "second", tiny_model, **given)
    losses, norms, expected = plain_training(tiny_model, ROWS, train_work(tiny_model, **given))
    assert losses[-1] < losses[0]
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=1e-5)
    assert [record["grad_norm"] for record in records] == pytest.approx(norms, rel=1e-3)
    for name, tensor in weights(model).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5)
    own = weights(tiny_model)
    changed = {name for name, tensor in weights(model).items() if not tensor.equal(own[name])}
    assert changed == {name for name in own if "_proj" in name}
    kept = {part.key for part in RunStore(bucket, RUN).input(STAGE).require().parts}
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "model/model.safetensors"} <= kept


@pytest.mark.parametrize(("zero_stage", "tied"), [(2, True), (3, False)])
def test_a_checkpoint_holds_the_adapter_and_its_optimizer_alone(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    zero_stage: int,
    tied: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student = tmp_path / "student"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    model.save_pretrained(student)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(student)
    refined(bucket, ROWS)
    given = {"zero_stage": zero_stage, "adapter": Adapter(rank=32), "validation": Validation(fraction=0)}
    with stopped_in(3, monkeypatch), pytest.raises(Interrupted):
        trained(storage, tmp_path / "train", student, **given)
    found = sum(path.stat().st_size for path in stored_checkpoint(bucket, tmp_path / "checkpoint"))
    learned = 32 * 2 * (4 * (64 + 64) + 3 * (64 + 128))
    size = training_memory.checkpoint(train_work(student, **given), parameters=learned, stored=0)
    assert 0.7 < found / size < 1.2, "ZeRO 3 stores the parameters once, with the optimizer"
    assert found < 17 * learned < 4 * sum(tensor.numel() for tensor in model.parameters()) + 12 * learned


@pytest.mark.parametrize(("zero_stage", "dtype"), [(2, "bfloat16"), (3, "float32")])
def test_an_interrupted_adapter_with_dropout_ends_as_an_uninterrupted_one_and_the_best_is_stored(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    zero_stage: int,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    worsens_after(4, monkeypatch)
    given: dict[str, Any] = {"zero_stage": zero_stage, "dtype": dtype, "epochs": 4, "warmup_ratio": 0.0, **HELD_OUT}
    given |= {"adapter": Adapter(rank=4, alpha=8, dropout=0.2), "learning_rate": 1e-2, "checkpoint_every_steps": 5}
    elsewhere = storage.model_copy(update={"uri": f"{storage.uri}-whole"})
    for store in (storage, elsewhere):
        refined(Bucket(store), ROWS)
    whole, expected = trained(elsewhere, tmp_path / "whole", tiny_model, **given)
    losses = {record["step"]: record["validation_loss"] for record in whole if "validation_loss" in record}
    assert min(losses, key=lambda step: losses[step]) == 4, losses

    with stopped_in(7, monkeypatch), pytest.raises(Interrupted, match="after step 7 of 8"):
        trained(storage, tmp_path / "first", tiny_model, **given)
    records, model = trained(storage, tmp_path / "second", tiny_model, **given)
    assert [record["loss"] for record in records] == [record["loss"] for record in whole]
    assert {r["step"]: r["validation_loss"] for r in records if "validation_loss" in r} == losses
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, weights(expected)[name]), name
    held_out = validation_split.held_out([str(row["id"]) for row in ROWS], 0.3, 0)
    measured = plain_loss(model, [row for row in ROWS if row["id"] in held_out])
    assert measured == pytest.approx(losses[4], rel=1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_no_adapter_is_stored_when_the_student_s_own_weights_have_changed(
    launcher: None,
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    zero_stage: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from cgd_stages.train.trainer import Trainer

    step = Trainer._step

    def damage(self: Trainer, number: int) -> None:
        step(self, number)
        own = next(p for name, p in self.engine.module.named_parameters() if "q_proj.base_layer" in name)
        with torch.no_grad():
            getattr(own, "ds_tensor", own).flatten()[:1] += 1e-3

    monkeypatch.setattr(Trainer, "_step", damage)
    refined(bucket, ROWS)
    with pytest.raises(TransientError, match="the student's own weights have changed in 1 processes"):
        trained(storage, tmp_path, tiny_model, zero_stage=zero_stage, **ADAPTER)
    assert not [found.key for found in bucket.list(f"team/{STAGE}/") if "/adapter/" in found.key]
