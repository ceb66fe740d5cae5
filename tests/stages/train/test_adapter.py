"""An adapter is stored as PEFT and vLLM read it, and the stored model is the student with the adapter added."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from support.architectures import MIXTURES, config_of
from support.stage_builders import RUN
from support.train_builders import STAGE, train_work
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

from cgd_stages.contract import Adapter, Model, Rows, Storage
from cgd_stages.errors import TransientError
from cgd_stages.train import adapter
from cgd_stages.training.job import Job

ADAPTER = Adapter(rank=4, alpha=6)
TOKENS = torch.arange(24).reshape(2, 12) % 90


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def job_of(folder: Path, dtype: str, **changes: Any) -> Job:
    student = Model(name="team/student", revision="c0ffee")
    work = train_work(folder, adapter=ADAPTER, zero_stage=0, **changes).model_copy(update={"student": student})
    return Job(
        run=RUN,
        stage=STAGE,
        digest="none",
        storage=Storage(uri="s3://nowhere/at-all"),
        work=work,
        student=str(folder),
        student_dtype=dtype,
        first_rank=0,
        resume=0,
        rows=Rows(),
    )


def stored(folder: Path, tokenizer: Path, kind: Any = LlamaConfig, dtype: str = "float32", **changes: Any) -> Path:
    """A random student of this family."""
    torch.manual_seed(1)
    config = config_of(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # by the rules of the model's type
    return folder


def learned(folder: Path, dtype: str = "float32") -> Any:
    """The student in training with an adapter that has learned something, as a training leaves it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    adapter.add(model, ADAPTER, seed=3)
    dice = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=dice) * 0.05)
    return model


def keeper_of(model: Any, job: Job) -> adapter.Keeper:
    return adapter.Keeper(SimpleNamespace(module=model, device=torch.device("cpu")), job)


@pytest.fixture
def student(tmp_path: Path, tiny_model: Path) -> Path:
    return stored(tmp_path / "student", tiny_model)


def test_peft_loads_what_is_stored_and_computes_what_was_trained(student: Path, tmp_path: Path) -> None:
    model = learned(student)
    keeper_of(model, job_of(student, "float32")).write(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(student)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    assert torch.equal(loaded(TOKENS).logits, model.eval()(TOKENS).logits)


def test_the_adapter_names_the_student_at_its_revision_and_is_the_same_file_each_time(
    student: Path, tmp_path: Path
) -> None:
    keeper = keeper_of(learned(student), job_of(student, "float32"))
    keeper.write(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("team/student", "c0ffee")
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["inference_mode"] is True
    keeper.write(tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
def test_the_stored_model_is_the_student_with_the_adapter_added_and_rounded_once(
    kind: Any, dtype: str, trained: str, tmp_path: Path, tiny_model: Path
) -> None:
    student = stored(tmp_path / "student", tiny_model, kind, dtype)
    model = learned(student, trained)
    keeper = keeper_of(model, job_of(student, dtype))
    keeper.write(tmp_path / "adapter")
    keeper.merge(tmp_path / "adapter", tmp_path / "model")
    base = dict(AutoModelForCausalLM.from_pretrained(student, dtype="auto").named_parameters())
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    parts = dict(model.named_parameters())
    added = 0
    for name, tensor in made.named_parameters():
        expected = base[name]
        if (a := parts.get(name.replace(".weight", ".lora_A.default.weight"))) is not None:
            b = parts[name.replace(".weight", ".lora_B.default.weight")]
            expected = (expected.float() + (b.float() @ a.float()) * 1.5).to(tensor.dtype)
            added += not torch.equal(expected, base[name])
        assert torch.equal(tensor, expected), name
    assert added == 14
    assert made.dtype == getattr(torch, dtype)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_with_the_adapter_added_is_stored_as_transformers_reads_it(
    kind: Any, tmp_path: Path, tiny_model: Path
) -> None:
    student = stored(tmp_path / "student", tiny_model, kind)
    model = learned(student)
    keeper = keeper_of(model, job_of(student, "float32"))
    keeper.write(tmp_path / "adapter")
    keeper.merge(tmp_path / "adapter", tmp_path / "model")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    without = AutoModelForCausalLM.from_pretrained(student).eval()
    expected = model.eval()(TOKENS).logits
    torch.testing.assert_close(made(TOKENS).logits, expected, rtol=0, atol=1e-5)
    assert (without(TOKENS).logits - expected).abs().max() > 1e-3


def test_tied_embeddings_stay_tied_and_out_of_checkpoints(tmp_path: Path, tiny_model: Path) -> None:
    student = stored(tmp_path / "student", tiny_model, tie_word_embeddings=True)
    model = learned(student)
    assert all(".lora_" in name for name in model.state_dict())
    keeper = keeper_of(model, job_of(student, "float32"))
    keeper.write(tmp_path / "adapter")
    keeper.merge(tmp_path / "adapter", tmp_path / "model")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert made.lm_head.weight is made.model.embed_tokens.weight


def test_storing_an_adapter_many_times_leaves_the_student_that_trains_as_it_was(
    tmp_path: Path, tiny_model: Path
) -> None:
    """PEFT's merge and unmerge in place would not: the weights drift."""
    student = stored(tmp_path / "student", tiny_model, dtype="bfloat16")
    model = learned(student, "bfloat16")
    keeper, before = keeper_of(model, job_of(student, "bfloat16")), model(TOKENS).logits
    for _ in range(3):
        keeper.write(tmp_path / "adapter")
        keeper.merge(tmp_path / "adapter", tmp_path / "model")
    assert torch.equal(model(TOKENS).logits, before)
    for layer in model.model.layers:
        layer.self_attn.q_proj.merge()
        layer.self_attn.q_proj.unmerge()
    with pytest.raises(TransientError, match="the student's own weights have changed in 1 processes"):
        keeper.write(tmp_path / "adapter")


def test_an_adapter_is_not_stored_when_one_bit_of_the_student_has_changed(student: Path, tmp_path: Path) -> None:
    model = learned(student)
    keeper = keeper_of(model, job_of(student, "float32"))
    with torch.no_grad():
        model.lm_head.weight.view(torch.int32)[3, 3] ^= 1
    with pytest.raises(TransientError, match="the adapter is not stored"):
        keeper.write(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_every_process_begins_with_the_same_adapter_whatever_it_drew_before(student: Path) -> None:
    models = []
    for drawn in (0, 7):
        model = AutoModelForCausalLM.from_pretrained(student)
        torch.rand(drawn)
        adapter.add(model, ADAPTER, seed=3)
        models.append({name: p for name, p in model.named_parameters() if p.requires_grad})
    assert len(models[0]) == 28
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


def test_a_checkpoint_that_lacks_a_part_of_the_adapter_is_refused(student: Path) -> None:
    model, other = learned(student), AutoModelForCausalLM.from_pretrained(student)
    adapter.add(other, ADAPTER, seed=9)
    state = model.state_dict()
    adapter.load_state(state, other)
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)
    name = next(iter(state))
    for wrong in ({key: tensor for key, tensor in state.items() if key != name}, state | {"more": state[name]}):
        with pytest.raises(TransientError, match="the checkpoint is not of this adapter"):
            adapter.load_state(wrong, other)
