"""What DeepSpeed is told for a training."""

from pathlib import Path
from typing import Any

import pytest
from train_builders import train_work

from cgd_stages import student


def config(*, gpu: bool = True, **changes: Any) -> dict[str, Any]:
    return student.deepspeed_config(train_work(Path("student"), **changes), 4, gpu=gpu)


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
