"""The work that a training asks of its hardware, and what that hardware can do."""

from dataclasses import replace
from pathlib import Path

import pytest

from cgd_stages.models.flops import Work, peak


@pytest.mark.parametrize(
    ("device", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_the_peak_of_a_known_gpu(device: str, teraflops: int) -> None:
    assert peak(device) == teraflops * 1e12


@pytest.mark.parametrize(
    "device", ["NVIDIA GeForce GTX 1080", "NVIDIA L40", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "cpu"]
)
def test_no_peak_is_invented(device: str) -> None:
    assert peak(device) is None


def test_the_work_of_a_step_is_that_of_its_matrices_and_of_causal_attention() -> None:
    work = Work(body=1000, head=50, attention=3)
    assert work.flops([10, 20], 7) == 6 * (1000 * 30 + 50 * 7 + 3 * (100 + 400))


def test_parameters_that_are_frozen_beside_an_adapter_need_no_gradients() -> None:
    work = Work(body=1000, head=50, attention=3, adapter=20)
    assert work.flops([10, 20], 7) == 4 * (1000 * 30 + 50 * 7) + 6 * (20 * 30 + 3 * (100 + 400))


def test_the_work_of_a_student_with_an_adapter_is_its_own_and_the_adapter_s(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    from cgd_stages.contract import Adapter
    from cgd_stages.models import targets
    from cgd_stages.train.student import cost

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    without = cost(model)
    targets.add(model, Adapter(rank=4))
    assert without
    assert cost(model) == replace(without, adapter=4 * 2 * (4 * (64 + 64) + 3 * (64 + 128)))


@pytest.mark.parametrize("tied", [False, True])
def test_the_work_of_a_student_is_counted_in_the_matrices_that_its_tokens_meet(tiny_model: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    from cgd_stages.train.student import cost

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.tie_word_embeddings = tied
    if tied:
        model.tie_weights()
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters()) + model.model.norm.weight.numel()
    config = model.config
    width = config.num_attention_heads * model.model.layers[0].self_attn.head_dim
    expected = Work(layers, config.vocab_size * config.hidden_size, config.num_hidden_layers * width)
    assert cost(model) == expected
