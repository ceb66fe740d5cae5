"""What DeepSpeed is told for a training."""

from pathlib import Path
from typing import Any

import pytest
from support.train_builders import train_work

from cgd_stages.train import student


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
