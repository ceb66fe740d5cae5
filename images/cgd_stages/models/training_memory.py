"""What a training needs of a device's memory, and whether activations must be made again in backward to fit. Pure.

Model and optimizer, bytes per parameter (Rajbhandari et al. 2020, ZeRO, section 3.1), `w` being those of the dtype:

    parameters   w         partitioned by ZeRO 3
    gradients    4, and w before they are summed in float32 where the dtype is another; partitioned from ZeRO 2 on
    optimizer    12        master copy and two moments in float32; partitioned from ZeRO 1 on
    buffers      w for each of 5e8 parameters that are reduced together, and of 1e9 that ZeRO 3 keeps gathered

Offloaded are the optimizer and the summed gradients, or these and the parameters.

Activations, bytes per token, as the layers of transformers keep them for backward (counted as in Korthikanti et al.
2022, Reducing Activation Recomputation, section 4.1, whose layer is older). Attention is computed in tiles and keeps no
matrix of positions; keys and values may be repeated to the number of queries.

    norms        8 + w for each element: two copies in float32 and what comes out
    attention    w for each element of queries, keys, values, keys and values repeated, and what comes out
    MLP          4w for each element: gate, its activation, the other branch and their product

With checkpointing a layer keeps its input alone, one layer at a time the rest, and the last norm is none of a layer.
The output layer adds a chunk of logits, with a copy, its softmax and its gradient in float32. A tenth of the memory is
left for what is not counted: fragments, NCCL, cuBLAS. Against what torch keeps, tests/stages/models/test_training_memory.py finds 0.9
to 1.4 times as much for Llama, Qwen, Gemma, Mistral and Phi; layers without a gated MLP, such as GPT-2's, keep more
than is estimated.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cgd_stages.contract import Train

CHUNK = 1024
"""Positions whose logits and loss exist at a time: a row of logits is as wide as the vocabulary."""
REDUCED, GATHERED = 500_000_000, 1_000_000_000
"""DeepSpeed's reduce_bucket_size and stage3_max_live_parameters, which we leave as they are."""
USABLE = 0.9


@dataclass(frozen=True)
class Shape:
    """A student in numbers. Elements per token: of its hidden state, of all queries and all keys of a layer, of the
    MLP's inside (`inner`), and of the inputs of all norms of all layers together."""

    parameters: int
    layers: int
    hidden: int
    queries: int
    keys: int
    inner: int
    norms: int
    vocabulary: int


def shape_of(config: Any, parameters: int, norms: Iterable[int]) -> Shape | None:
    """A student by its config in transformers, all its parameters, and those of each norm; None for a mixture of
    experts."""
    text = config.get_text_config()
    if is_mixture(text):
        return None
    hidden, heads = text.hidden_size, text.num_attention_heads
    queries = heads * head_width(text)
    return Shape(
        parameters=parameters,
        layers=text.num_hidden_layers,
        hidden=hidden,
        queries=queries,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * head_width(text),
        inner=getattr(text, "intermediate_size", None) or 4 * hidden,
        norms=sum(size if size >= hidden else queries for size in norms),  # small ones: of each head
        vocabulary=text.vocab_size,
    )


def is_mixture(text: Any) -> bool:
    return any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def head_width(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


@dataclass(frozen=True)
class Decision:
    """Whether activations are made again in backward, and why."""

    checkpointing: bool
    why: str


def decide(work: Train, shape: Shape | None, *, world: int, tokens: int, free: int | None) -> Decision:
    """Once for a training, equal on every rank. `shape` None: a mixture of experts; `tokens`: of the largest
    micro-batch; `free`: bytes of the device before the student is loaded, None on a CPU."""
    if work.activation_checkpointing != "auto":
        return Decision(work.activation_checkpointing == "always", "as training.activationCheckpointing says")
    if free is None:
        return Decision(False, "on a CPU")
    if shape is None:
        return Decision(True, "what a mixture of experts keeps is not estimated")
    fixed = states(work, shape, world=world)
    whole, little = (activations(work, shape, tokens=tokens, checkpointing=on) for on in (False, True))
    fits = fixed + whole <= USABLE * free
    return Decision(
        not fits,
        f"{USABLE:.0%} of {_giga(free)} {'hold' if fits else 'do not hold'} {_giga(fixed)} of model and optimizer and "
        f"{_giga(whole)} of activations ({_giga(little)} with checkpointing) for {tokens} tokens",
    )


def states(work: Train, shape: Shape, *, world: int) -> int:
    """Bytes of parameters, gradients, optimizer and buffers on one device of `world`."""
    width = _width(work)
    parameters = width * shape.parameters
    gradients = (4 if width == 4 else 4 + width) * shape.parameters
    optimizer = 12 * shape.parameters
    buffers = width * min(shape.parameters, REDUCED)
    if work.offload != "none":
        gradients, optimizer = width * shape.parameters, 0
    if work.offload == "parameters":
        parameters = 0
    if work.zero_stage >= 1:
        optimizer //= world
    if work.zero_stage >= 2:
        gradients //= world
    if work.zero_stage == 3:
        parameters //= world
        buffers += width * min(shape.parameters, GATHERED)
    return parameters + gradients + optimizer + buffers


def activations(work: Train, shape: Shape, *, tokens: int, checkpointing: bool) -> int:
    """Bytes that a micro-batch of so many tokens keeps for backward, at most."""
    width = _width(work)
    norms = (8 + width) * shape.norms
    attention = width * shape.layers * (4 * shape.queries + 2 * shape.keys)
    mlp = 4 * width * shape.layers * shape.inner
    kept = norms + attention + mlp
    if checkpointing:
        kept = kept // shape.layers + (width * shape.layers + 8 + width) * shape.hidden
    return tokens * kept + min(tokens, CHUNK) * (width + 12) * shape.vocabulary


def _width(work: Train) -> int:
    return 2 if work.dtype == "bfloat16" else 4


def _giga(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
