"""What DeepSpeed is told for a training, and how the student is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import families
from support.stage_builders import RUN
from support.train_builders import train_work

from cgd_stages.contract import Model, Rows, Storage
from cgd_stages.models import fit, resolve
from cgd_stages.train import student
from cgd_stages.training.job import Job


def config(*, gpu: bool = True, **changes: Any) -> dict[str, Any]:
    return student.deepspeed_config(train_work(Path("student"), **changes), 4, gpu=gpu)


@pytest.mark.parametrize(
    ("gpu", "dtype", "installed", "head", "flash"),
    [
        (True, "bfloat16", True, 128, True),
        (True, "bfloat16", True, 256, True),
        (True, "bfloat16", True, 512, False),
        (True, "bfloat16", False, 128, False),
        (True, "float32", True, 128, False),
        (False, "bfloat16", True, 128, False),
        (False, "bfloat16", False, 128, False),
    ],
)
def test_flash_attention_needs_its_package_and_a_gpu_and_what_its_kernels_take(
    gpu: bool, dtype: str, installed: bool, head: int, flash: bool
) -> None:
    assert student.flash(train_work(Path("student"), dtype=dtype), gpu=gpu, installed=installed, head=head) is flash


@pytest.mark.parametrize("offload", ["none", "parameters"])
def test_adam_is_torch_s_in_one_kernel(offload: str) -> None:
    given = config(gpu=False, offload=offload, zero_stage=3, weight_decay=0.1)["optimizer"]
    own = {"torch_adam": True, "fused": True, "betas": [0.9, 0.999], "eps": 1e-8}
    assert given == {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1, **own}}


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize(
    ("offload", "zero_stage", "offloaded"),
    [("none", 3, set()), ("optimizer", 1, {"optimizer"}), ("parameters", 3, {"optimizer", "param"})],
)
def test_what_is_offloaded_is_in_the_host_s_memory_pinned_for_a_gpu(
    offload: str, zero_stage: int, offloaded: set[str], gpu: bool
) -> None:
    expected = {f"offload_{what}": {"device": "cpu", "pin_memory": gpu} for what in offloaded}
    zero = config(offload=offload, zero_stage=zero_stage, gpu=gpu)["zero_optimization"]
    assert zero == {"stage": zero_stage} | expected


def test_a_student_in_mxfp4_is_loaded_as_what_its_four_bits_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student.dist, "get_rank", lambda: 0)
    folder, experts = families.make_mxfp4(tmp_path / "gpt-oss")
    job = Job(
        run=RUN,
        stage="train-cgd",
        digest="none",
        storage=Storage(uri="s3://nowhere/at-all"),
        work=train_work(folder, zero_stage=0),
        student=str(folder),
        student_dtype="bfloat16",
        first_rank=0,
        resume=0,
        rows=Rows(),
    )
    model = student.load(job, {})
    loaded = dict(model.named_parameters())
    assert {parameter.dtype for parameter in loaded.values()} == {torch.float32}
    assert len(experts) == 2 * families.LAYERS
    for name, expected in experts.items():
        torch.testing.assert_close(loaded[name].to(torch.bfloat16), expected, rtol=0, atol=0)
    assert fit.quantization(model.config) is None, "and so it is stored"
    tensors = resolve.tensors(Model(name=str(folder)), None, tmp_path)  # type: ignore[arg-type]
    assert tensors
    assert fit.shape_of(fit.read_config(folder, Model(name=""), "spec.student"), tensors) == student.shape(model)
