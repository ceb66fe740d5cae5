"""What does not fit into a GPU is refused by prepare, with the arithmetic; what cannot be known is not."""

import json
import logging
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from support import tiny
from support.stage_builders import context, prepare_work
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Adapter, Engine, Model, Train
from cgd_stages.errors import TransientError, UserError
from cgd_stages.models import fit, resolve
from cgd_stages.prepare import __main__ as prepare
from cgd_stages.train import student

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
"""Llama 3.1 8B, in numbers."""
PARAMETERS = 8_030_261_248
CONFIGS = [
    LlamaConfig, Qwen2Config, Qwen3Config, Gemma2Config, Gemma3TextConfig, MistralConfig, Phi3Config, GPT2Config,
    Olmo2Config, Olmo3Config, MixtralConfig, OlmoeConfig, Qwen3MoeConfig, GptOssConfig,
]  # fmt: skip
GIB = 2**30


def config(tmp_path: Path, **changes: Any) -> Any:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
    return AutoConfig.from_pretrained(tmp_path)


def training(**changes: Any) -> Train:
    given: dict[str, Any] = {
        "student": Model(name="student"),
        "workers": 2,
        "processes_per_worker": 8,
        "global_batch_size": 64,
        "learning_rate": 1e-6,
        "max_sequence_length": 16384,
        "checkpoint_every_steps": 100,
        "max_rejected": 0.1,
        "zero_stage": 3,
    }
    return Train(**(given | changes))


def gpus(gibibytes: float, **changes: Any) -> fit.Gpus:
    return fit.Gpus(memory=int(gibibytes * GIB), training=training(**changes))


def weights(folder: Path, tensors: dict[str, tuple[str, list[int], int]], name: str = "model.safetensors") -> None:
    """Safetensors whose data is not there: a header is all that is read. Name to dtype, shape, bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, (dtype, shape, size) in tensors.items():
        header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text)


def tensors_of(found: Any) -> list[resolve.Tensor]:
    """What the headers would tell of a model with this config."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(found)
    return [
        resolve.Tensor(name, "BF16", one.numel(), 2 * one.numel(), tuple(one.shape))
        for name, one in model.named_parameters()
    ]


def served(found: Any, context: int = 8192, **engine: Any) -> fit.Served:
    return fit.Served("spec.teacher", Model(name="team/model"), Engine(**engine), found, context)


def cached(found: Any, **engine: Any) -> tuple[int, int]:
    """Bytes of a token of the whole context, and of one in the window."""
    cache = fit.cache_bytes(found, Engine(**engine))
    assert cache
    return cache.full, cache.windowed


def test_a_token_keeps_keys_and_values_of_every_layer(tmp_path: Path) -> None:
    assert cached(config(tmp_path)) == (2 * 32 * 8 * 128 * 2, 0)
    assert cached(config(tmp_path), dtype="float32") == (2 * 32 * 8 * 128 * 4, 0)
    assert cached(config(tmp_path, head_dim=64, num_key_value_heads=4)) == (2 * 32 * 4 * 64 * 2, 0)


@pytest.mark.parametrize(("gpus", "heads"), [(1, 8), (2, 4), (8, 1), (16, 1)])
def test_a_gpu_has_its_share_of_the_heads_and_one_at_least(tmp_path: Path, gpus: int, heads: int) -> None:
    assert cached(config(tmp_path), tensor_parallel=gpus) == (2 * 32 * heads * 128 * 2, 0)


def test_layers_with_a_window_keep_no_more_than_it(tmp_path: Path) -> None:
    mistral = config(tmp_path, model_type="mistral", sliding_window=4096)
    cache = fit.cache_bytes(mistral, Engine())
    token = 2 * 32 * 8 * 128 * 2
    assert cache
    assert (cache.total(100), cache.total(4096), cache.total(32768)) == (100 * token, 4096 * token, 4096 * token)
    kinds = ["full_attention", "sliding_attention"] * 16
    mixed = config(tmp_path, model_type="gemma2", sliding_window=4096, layer_types=kinds, head_dim=128)
    assert cached(mixed) == (token // 2, token // 2)


def test_latent_attention_gets_no_verdict(tmp_path: Path) -> None:
    latent = config(tmp_path, model_type="deepseek_v3", kv_lora_rank=512)
    assert fit.cache_bytes(latent, Engine()) is None
    assert fit.trained(gpus(0.1), latent, tensors_of(config(tmp_path))) is None


def test_floating_weights_take_the_engines_dtype_and_quantized_ones_stay(tmp_path: Path) -> None:
    weights(tmp_path, {"a": ("F32", [10, 4], 160), "b": ("BF16", [10], 20), "c": ("I32", [8], 32)})
    (tmp_path / "config.json").write_text("{}")
    found = resolve.tensors(Model(name=str(tmp_path)), None, tmp_path)  # type: ignore[arg-type]
    assert found
    assert fit.weight_bytes(found, Engine()) == 2 * 40 + 2 * 10 + 32
    assert fit.weight_bytes(found, Engine(dtype="float32")) == 4 * 40 + 4 * 10 + 32


def sharded(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights(folder, {"a": ("BF16", [3, 2], 12)}, "model-1-of-2.safetensors")
    weights(folder, {"b": ("F8_E4M3", [5], 5)}, "model-2-of-2.safetensors")
    weights(folder, {"x": ("F32", [100], 400)}, "consolidated.safetensors")
    names = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def sizes(found: list[resolve.Tensor] | None) -> list[tuple[str, int, int]]:
    return sorted((one.dtype, one.parameters, one.size) for one in found or [])


def test_of_a_model_in_parts_the_index_tells_which_count(bucket, tmp_path):
    folder = sharded(tmp_path / "model")
    expected = [("BF16", 6, 12), ("F8_E4M3", 5, 5)]
    assert sizes(resolve.tensors(Model(name=str(folder)), bucket, tmp_path)) == expected
    for path in folder.iterdir():
        bucket.upload(path, f"m/{path.name}")
    assert sizes(resolve.tensors(Model(name=bucket.uri("m")), bucket, tmp_path)) == expected


def test_of_a_stored_model_the_headers_alone_are_read(bucket, tiny_model, tmp_path):
    for path in tiny_model.iterdir():
        bucket.upload(path, f"m/{path.name}")
    found = resolve.tensors(Model(name=bucket.uri("m")), bucket, tmp_path)
    assert sizes(found) == sizes(resolve.tensors(Model(name=str(tiny_model)), bucket, tmp_path))
    (header,) = (tmp_path / "headers").rglob("*.safetensors")
    assert header.stat().st_size < sum(one.size for one in found) / 10


@pytest.fixture
def hub(tiny_model, monkeypatch):
    """A hub with one model, `team/tiny`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = tiny_model / self.path.rpartition("/")[2]
            there = self.path.startswith("/team/tiny/resolve/v1/") and path.is_file()
            data = path.read_bytes() if there else b""
            self.send_response(200 if there else 404)
            headers = {"ETag": '"1"', "X-Repo-Commit": "c" * 40} if there else {"X-Error-Code": "EntryNotFound"}
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET  # noqa: N815 (the base class's name)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield url
    server.shutdown()
    server.server_close()


def test_the_hub_tells_the_same_sizes(hub, bucket, tiny_model, tmp_path):
    found = resolve.tensors(Model(name="team/tiny", revision="v1"), bucket, tmp_path)
    assert sizes(found) == sizes(resolve.tensors(Model(name=str(tiny_model)), bucket, tmp_path))
    assert resolve.tensors(Model(name="team/tiny", revision="v2"), bucket, tmp_path) is None


def test_a_hub_that_is_away_is_asked_again_later(hub, bucket, tmp_path, monkeypatch):
    away = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", away)
    with pytest.raises(TransientError, match="cannot be fetched from the hub"):
        resolve.tensors(Model(name="team/tiny", revision="v1"), bucket, tmp_path)


def test_a_served_model_that_fits_exactly_fits(tmp_path: Path) -> None:
    one = served(config(tmp_path), gpu_memory_utilization=0.5)
    need = 2 * PARAMETERS + 8192 * 2 * 32 * 8 * 128 * 2
    for spare, fits in ((0, True), (-1, False)):
        found = fit.misfit_of(fit.Gpus(memory=2 * (need + spare), training=training()), one, 2 * PARAMETERS)
        assert (found is None) is fits


def test_a_served_model_that_does_not_fit_is_told_with_what_would(tmp_path: Path) -> None:
    one = served(config(tmp_path), context=131072)
    found = fit.misfit_of(gpus(24), one, 2 * PARAMETERS)
    assert found
    assert found.message == (
        "spec.teacher: team/model needs at least 16.1 GB of weights and 17.2 GB of cache for one sequence of 131072 "
        "tokens on each GPU (tensorParallel 1); 92% of 25.8 GB are 23.7 GB"
    )
    assert found.hint == "spec.teacher: set tensorParallel to 2, or set maxModelLen to 57344 or less."
    assert fit.misfit_of(gpus(24), served(config(tmp_path), context=57344), 2 * PARAMETERS) is None
    assert fit.misfit_of(gpus(24), served(config(tmp_path), 131072, tensor_parallel=2), 2 * PARAMETERS) is None


def test_a_model_for_which_no_number_of_gpus_is_enough_wants_another_model(tmp_path: Path) -> None:
    found = fit.misfit_of(gpus(0.1), served(config(tmp_path)), 2 * PARAMETERS)
    assert found
    assert found.hint == "spec.teacher: take a smaller or a quantized model."


def test_the_papers_training_fits_its_gpus(tmp_path: Path) -> None:
    llama = config(tmp_path)
    assert fit.trained(gpus(80), llama, tensors_of(llama)) is None


def test_a_training_that_does_not_fit_is_told_with_what_would(tmp_path: Path) -> None:
    llama = config(tmp_path)
    weights = tensors_of(llama)
    found = fit.trained(gpus(40, zero_stage=1), llama, weights)
    assert found
    assert "each of 16 GPUs needs" in found.message
    assert "(zeroStage 1, offload none)" in found.message
    assert "made again in backward, for 16384 tokens; 90% of 42.9 GB are 38.7 GB" in found.message
    assert found.hint == (
        "spec.training: set zeroStage to 2, or set zeroStage to 3, or raise workers or gpusPerWorker, or lower "
        "maxSequenceLength."
    )
    for stage in (2, 3):
        assert fit.trained(gpus(40, zero_stage=stage), llama, weights) is None


def test_a_training_that_keeps_its_activations_is_told_to_make_them_again(tmp_path: Path) -> None:
    llama = config(tmp_path)
    found = fit.trained(gpus(80, activation_checkpointing="never"), llama, tensors_of(llama))
    assert found
    assert ", kept, for 16384 tokens" in found.message
    assert "set activationCheckpointing to auto" in found.hint


def test_an_adapter_fits_where_the_whole_student_does_not(tmp_path: Path) -> None:
    llama = config(tmp_path)
    alone = {"workers": 1, "processes_per_worker": 1, "zero_stage": 0}
    assert fit.trained(gpus(80, **alone), llama, tensors_of(llama))
    assert fit.trained(gpus(80, adapter=Adapter(), **alone), llama, tensors_of(llama)) is None
    found = fit.trained(gpus(20, adapter=Adapter(), **alone), llama, tensors_of(llama))
    assert found
    assert "each of 1 GPUs needs 17.0 GB of model and optimizer (zeroStage 0, offload none)" in found.message


def test_a_mixture_of_experts_needs_memory_for_all_of_its_experts(tmp_path: Path) -> None:
    changes = {"model_type": "mixtral", "num_local_experts": 8, "vocab_size": 32000}  # Mixtral 8x7B
    mixtral = config(tmp_path, **changes)
    found = fit.trained(gpus(64), mixtral, tensors_of(mixtral))
    assert found
    assert "each of 16 GPUs needs 62.2 GB of model and optimizer (zeroStage 3, offload none)" in found.message
    assert "set zeroStage to 3 and offload to optimizer" in found.hint
    assert fit.trained(gpus(64, workers=4), mixtral, tensors_of(mixtral)) is None


def stored_in_mxfp4(found: Any) -> list[resolve.Tensor]:
    """The headers of a gpt-oss as its maker stores it: two weights of an expert in a byte, a scale for 32 of them."""
    tensors = []
    for one in tensors_of(found):
        if one.name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = one.parameters // 2, one.parameters // 32
            tensors += [resolve.Tensor(f"{one.name}_blocks", "U8", blocks, blocks)]
            tensors += [resolve.Tensor(f"{one.name}_scales", "U8", scales, scales)]
        else:
            tensors.append(one)
    return tensors


def test_a_student_in_mxfp4_is_trained_in_bfloat16(tmp_path: Path) -> None:
    gpt_oss = GptOssConfig(num_hidden_layers=2, num_local_experts=32, quantization_config={"quant_method": "mxfp4"})
    stored, plain = stored_in_mxfp4(gpt_oss), tensors_of(GptOssConfig(num_hidden_layers=2, num_local_experts=32))
    assert sum(one.size for one in stored) < 0.7 * sum(one.size for one in plain)
    assert sorted(one.size for one in fit.as_trained(stored)) == sorted(one.size for one in plain)
    assert fit.shape_of(gpt_oss, stored) == fit.shape_of(gpt_oss, plain)
    assert fit.trained(gpus(10, zero_stage=0), gpt_oss, stored)


def test_a_student_of_unknown_size_or_in_few_bits_gets_no_verdict(tmp_path: Path) -> None:
    llama = config(tmp_path)
    assert fit.trained(gpus(0.1), llama, None) is None
    packed = resolve.Tensor("model.layers.0.mlp.up_proj.weight", "I32", 100, 400)
    assert fit.trained(gpus(0.1), llama, [*tensors_of(llama), packed]) is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
def test_headers_tell_the_same_shape_as_the_model_itself(kind: Any, tied: bool, tmp_path: Path) -> None:
    found = kind(
        vocab_size=97, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(found)
    model.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    stored = resolve.tensors(Model(name=str(tmp_path)), None, tmp_path)  # type: ignore[arg-type]
    assert stored
    assert fit.shape_of(read, stored) == student.shape(model)
    if tied:  # some checkpoints store the output layer all the same
        again = resolve.Tensor("lm_head.weight", "F32", 97 * 64, 4 * 97 * 64)
        assert fit.shape_of(read, [*stored, again]) == student.shape(model)


LINES = b'{"question": "1 + 1?", "answer": "2"}\n'


def test_prepare_refuses_at_once_all_that_does_not_fit(bucket, storage, tiny_model, tmp_path):
    bucket.put("in/p.jsonl", LINES)
    work = prepare_work(tiny_model, bucket.uri("in/p.jsonl"), teacher=Model(name=str(tiny_model)))
    prepare.main(context(storage, work.model_copy(update={"gpu_memory": 80 * GIB}), tmp_path))
    with pytest.raises(UserError) as refused:
        prepare.main(context(storage, work.model_copy(update={"gpu_memory": 100_000}), tmp_path))
    for where in ("spec.student:", "spec.teacher:", "spec.training:"):
        assert where in refused.value.message
        assert where in refused.value.hint
    assert refused.value.hint.endswith("Or take larger GPUs: spec.placement.gpuMemory says how large they are.")


def test_a_model_of_unknown_size_gets_no_verdict(bucket, storage, tiny_model, tmp_path, caplog):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for path in tiny_model.iterdir():
        if path.suffix != ".safetensors":
            (teacher / path.name).write_bytes(path.read_bytes())
    bucket.put("in/p.jsonl", LINES)
    work = prepare_work(tiny_model, bucket.uri("in/p.jsonl"), teacher=Model(name=str(teacher)))
    with caplog.at_level(logging.WARNING), pytest.raises(UserError) as refused:
        prepare.main(context(storage, work.model_copy(update={"gpu_memory": 100_000}), tmp_path))
    assert "spec.teacher" not in refused.value.message
    assert f"the size of {teacher} is not known; whether it fits is not checked" in caplog.text


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rms_norm_eps", "1e-6", "rms_norm_eps"),
        ("num_hidden_layers", "2", "num_hidden_layers"),
        ("hidden_size", 65, "hidden"),
        ("dtype", "bogus", "bogus"),
        ("num_key_value_heads", 3, "num_key_value_heads"),
        ("return_dict", False, "return_dict"),
        ("model_type", "nobody's", "cannot be loaded"),
    ],
)
def test_a_config_that_transformers_or_a_training_cannot_use_is_refused_by_its_field(tmp_path, field, value, message):
    """Most of these are no ValueError: they ended prepare with a traceback, and it was tried again."""
    model = tiny.make(tmp_path / "model")
    tiny.change(model / "config.json", **{field: value})
    with pytest.raises(UserError, match=message) as raised:
        fit.read_config(model, Model(name="team/model"), "spec.student")
    assert "spec.student.model" in raised.value.hint


@pytest.mark.parametrize("text", ["{}", "[", '{"version": "1.0", "model": {"type": "Nobody"}}'])
def test_a_tokenizer_that_is_no_tokenizer_is_refused(tmp_path, text):
    """tokenizers raises bare Exceptions."""
    model = tiny.make(tmp_path / "model")
    (model / "tokenizer.json").write_text(text)
    with (
        pytest.raises(UserError, match="the model team/model cannot be loaded") as raised,
        resolve.reading(Model(name="team/model"), "spec.student", "tokenizer"),
    ):
        ChatTemplate.load(model, name="team/model")
    assert "its tokenizer must load in transformers" in raised.value.hint


def test_a_lost_connection_is_not_the_models_fault():
    with pytest.raises(TransientError), resolve.reading(Model(name="team/model"), "spec.student", "config"):
        raise TransientError("gone", hint="Wait.")


def test_a_quantization_without_a_method_is_one():
    config = LlamaConfig()
    config.quantization_config = {}
    assert fit.quantization(config) == "None"


@pytest.mark.parametrize("size", [0, -1, 1_000_000_000])
def test_a_config_with_an_impossible_number_of_layers_is_refused_at_once(tmp_path: Path, size: int) -> None:
    """transformers takes -1 for none until the weights come, and builds a thousand million without an end."""
    model = tiny.make(tmp_path / "model")
    tiny.change(model / "config.json", num_hidden_layers=size)
    with pytest.raises(UserError, match=rf"num_hidden_layers is {size} in config\.json"):
        fit.read_config(model, Model(name="team/model"), "spec.student")
