"""How much of a device's memory a training needs, and whether it fits only with checkpointing. Pure.

Model and optimizer, bytes per parameter (Rajbhandari et al. 2020, ZeRO, section 3.1); `w` is the dtype's bytes:

    parameters   w         partitioned by ZeRO 3
    gradients    4, and w more before the sum in float32 if the dtype is another; partitioned from ZeRO 2 on
    optimizer    12        master copy and two moments in float32; partitioned from ZeRO 1 on
    buffers      w for each of 5e8 parameters that are reduced together, and of 1e9 that ZeRO 3 keeps gathered

An adapter has gradients and optimizer alone; the student's own parameters are kept, and not learned.

`offload: optimizer` moves the optimizer and the summed gradients to the host, `parameters` the parameters too.

A checkpoint holds parameters and optimizer, offloaded or not, and the best model so far in the student's stored dtype;
of a training of an adapter, the adapter's and no other.

Activations, bytes per token, as the layers of transformers keep them for backward (counted as in Korthikanti et al.
2022, Reducing Activation Recomputation, section 4.1, whose layer is older). Attention is computed in tiles and keeps no
matrix of positions, except in gpt-oss, where each head of a layer keeps w for each pair of positions, of one example at
most. Keys and values may be repeated to the number of queries.

    norms        8 + w for each element: two copies in float32 and what comes out; 4 + w where their weights are frozen
    attention    w for each element of queries, keys, values, keys and values repeated, and what comes out
    MLP          4w for each element: gate, its activation, the other branch and their product; 8w in gpt-oss, which
                 clamps gate and branch
    adapter      w for each row of A, of 7 modules in a layer; with dropout, w + 1 for each element of their inputs
    experts      2w for each element of the hidden state and expert that a token meets: what goes in and what comes out
    router       4 for each expert, a softmax in float32, and 2w for its loss: logits, and their softmax

In a mixture of experts the MLP has the elements of the experts that a token meets; every layer counts as such a layer.
With checkpointing, backward computes activations again: every layer keeps its input, one layer at a time keeps the
rest, and the last norm belongs to no layer; what the routers' loss needs stays. The output layer adds a chunk of
logits, with a copy, its softmax and its gradient in float32. A tenth of the memory stays free for fragments, NCCL and
cuBLAS, which the estimate leaves out. tests/stages/models/test_training_memory.py compares it with what torch keeps:
0.9 to 1.4 times as much for Llama, Qwen, Gemma, Mistral, Phi, OLMo and mixtures of experts. Layers without a gated MLP,
such as GPT-2's, keep more than the estimate.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cgd_stages.contract import Train
from cgd_stages.models.mixture import Mixture, UnknownMixture, mixture_of

log = logging.getLogger(__name__)

CHUNK = 1024
"""Positions whose logits and loss exist at the same time. A row of logits is as wide as the vocabulary."""
REDUCED, GATHERED = 500_000_000, 1_000_000_000
"""The defaults of DeepSpeed's reduce_bucket_size and stage3_max_live_parameters."""
USABLE = 0.9
ADAPTED = 7
"""Modules of a layer that get an adapter: four of attention, three of a gated MLP."""
GPT_OSS = "gpt_oss"
"""Its attention has sinks, which no attention in tiles that comes with torch knows; its experts clamp."""


@dataclass(frozen=True)
class Shape:
    """A student in numbers. Elements per token: of its hidden state; of a layer's queries, keys and MLP (`inner`); and
    of the inputs of all layers' norms together (`norms`)."""

    parameters: int
    layers: int
    hidden: int
    queries: int
    keys: int
    inner: int
    norms: int
    vocabulary: int
    trained: int | None = None
    """Parameters of the adapter that is learned beside them; None: they are learned themselves."""
    mixture: Mixture | None = None
    """What its layers have in the place of an MLP; `inner` is then what a token meets of it."""
    kept: int = 4
    """Copies of `inner` that a layer keeps for backward."""
    matrices: int = 0
    """Matrices of positions that a layer keeps for backward."""


def shape_of(config: Any, parameters: int, norms: Iterable[int]) -> Shape | None:
    """A student's shape from its config in transformers, the number of its parameters, and that of each norm's; None
    without attention, for latent attention, and for a mixture of experts whose config does not describe it."""
    text = config.get_text_config()
    if getattr(text, "kv_lora_rank", None) or not getattr(text, "num_attention_heads", None):
        return None
    hidden, heads = text.hidden_size, text.num_attention_heads
    queries = heads * head_width(text)
    try:
        mixture = mixture_of(config)
    except UnknownMixture as error:
        log.warning("%s", error)
        return None
    return Shape(
        parameters=parameters,
        layers=text.num_hidden_layers,
        hidden=hidden,
        queries=queries,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * head_width(text),
        inner=mixture.inner if mixture else getattr(text, "intermediate_size", None) or 4 * hidden,
        norms=sum(size if size >= hidden else queries for size in norms),  # a small norm works on each head
        vocabulary=text.vocab_size,
        mixture=mixture,
        kept=8 if text.model_type == GPT_OSS else 4,
        matrices=heads if text.model_type == GPT_OSS else 0,
    )


def head_width(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


@dataclass(frozen=True)
class Decision:
    """Whether backward computes activations again (checkpointing), and why."""

    checkpointing: bool
    why: str


def decide(work: Train, shape: Shape | None, *, world: int, tokens: int, free: int | None) -> Decision:
    """One decision for a training, equal on every rank. `shape`: None if it is not known; `tokens`: of the
    largest micro-batch; `free`: bytes of the device before the student is loaded, None on a CPU."""
    if work.activation_checkpointing != "auto":
        return Decision(work.activation_checkpointing == "always", "as training.activationCheckpointing says")
    if free is None:
        return Decision(False, "on a CPU")
    if shape is None:
        return Decision(True, "there is no estimate for this student")
    fixed = states(work, shape, world=world)
    kept, kept_less = (activations(work, shape, tokens=tokens, checkpointing=on) for on in (False, True))
    fits = fixed + kept <= USABLE * free
    return Decision(
        not fits,
        f"{USABLE:.0%} of {giga(free)} {'hold' if fits else 'do not hold'} {giga(fixed)} of model and optimizer and "
        f"{giga(kept)} of activations ({giga(kept_less)} with checkpointing) for {tokens} tokens",
    )


def states(work: Train, shape: Shape, *, world: int) -> int:
    """Bytes of parameters, gradients, optimizer and buffers on one device of `world`."""
    width = _width(work)
    trained = shape.parameters if shape.trained is None else shape.trained
    parameters = width * (shape.parameters + (shape.trained or 0))
    gradients = (4 if width == 4 else 4 + width) * trained
    optimizer = 12 * trained
    buffers = width * min(trained, REDUCED)
    if work.offload != "none":
        gradients, optimizer = width * trained, 0
    if work.offload == "parameters":
        parameters = 0
    if work.zero_stage >= 1:
        optimizer //= world
    if work.zero_stage >= 2:
        gradients //= world
    if work.zero_stage == 3:
        parameters //= world
        mixture = shape.mixture  # a layer's experts are gathered together, and the MLP of each has three matrices
        experts = 3 * shape.hidden * mixture.width * mixture.experts if mixture else 0
        buffers += width * min(shape.parameters, max(GATHERED, experts))
    return parameters + gradients + optimizer + buffers


def checkpoint(work: Train, *, parameters: int, stored: int) -> int:
    """Bytes of a checkpoint on the node that stores most of it, at most. `parameters`: those that are learned. The
    nodes share what ZeRO partitions; the first node writes the rest, with the `stored` bytes of the best model so far;
    the best adapter is stored in the dtype of the training."""
    model, optimizer = _width(work) * parameters, 12 * parameters
    if work.zero_stage >= 1:
        optimizer //= work.workers
    if work.zero_stage == 3:
        model //= work.workers
    stored = _width(work) * parameters if work.adapter else stored
    keeps_best = work.validation.select != "last" and work.validation.fraction != 0
    return model + optimizer + (stored if keeps_best else 0)


def activations(work: Train, shape: Shape, *, tokens: int, checkpointing: bool) -> int:
    """Bytes that a micro-batch of `tokens` tokens keeps for backward, at most."""
    width = _width(work)
    norms = ((4 if work.adapter else 8) + width) * shape.norms
    attention = width * shape.layers * (4 * shape.queries + 2 * shape.keys)
    mlp = shape.kept * width * shape.layers * shape.inner
    matrices = width * shape.matrices * tokens * (1 if checkpointing else shape.layers)
    experts, active = (shape.mixture.experts, shape.mixture.active) if shape.mixture else (0, 0)
    kept = norms + attention + mlp + shape.layers * (2 * width * active * shape.hidden + 4 * experts)
    if work.adapter:
        kept += shape.layers * ADAPTED * work.adapter.rank * width
        inputs = 5 * shape.hidden + shape.queries + shape.inner
        kept += shape.layers * inputs * (width + 1) if work.adapter.dropout else 0
    if checkpointing:
        kept = kept // shape.layers + (width * shape.layers + 8 + width) * shape.hidden
    kept += 2 * width * shape.layers * experts + matrices
    return tokens * kept + min(tokens, CHUNK) * (width + 12) * shape.vocabulary


def _width(work: Train) -> int:
    return 2 if work.dtype == "bfloat16" else 4


def giga(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
