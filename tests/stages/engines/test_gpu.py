"""What a program says in a pod without a GPU it could use; `make check-images` holds the real CUDA builds to it."""

import pytest

from cgd_stages import contract
from cgd_stages.engines.vllm_settings import vllm_arguments
from cgd_stages.errors import GPU_HINT, TransientError

# vLLM and torch warn about themselves while they are imported.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]


def test_a_torch_for_gpus_does_not_train_on_the_cpu(monkeypatch):
    import torch

    from cgd_stages.train.group import take_gpu

    def set_device(device):
        raise RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU")

    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with pytest.raises(TransientError, match="no GPU can be used: Found no NVIDIA driver") as raised:
        take_gpu()
    assert raised.value.hint == GPU_HINT


def test_a_torch_for_cpus_asks_for_no_gpu():
    from cgd_stages.train.group import take_gpu

    assert take_gpu() is False


def test_a_vllm_that_finds_no_device_says_so(monkeypatch, tmp_path):
    import vllm.platforms
    from vllm.platforms.interface import UnspecifiedPlatform

    monkeypatch.setattr(vllm.platforms, "_current_platform", UnspecifiedPlatform())
    with pytest.raises(TransientError, match="vLLM finds no GPU in this pod") as raised:
        vllm_arguments(tmp_path, contract.Engine())
    assert raised.value.hint == GPU_HINT
