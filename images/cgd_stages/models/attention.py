"""What a model's attention can do: FlashAttention 2, and whether it keeps the examples of a packed row apart.

A packed row says by its positions where an example begins, and not every architecture's attention goes by them. So the
gradient is asked: of the second half of a row, by the embeddings of the first.
"""

import logging
from copy import deepcopy
from typing import Any

from cgd_stages.errors import UserError

log = logging.getLogger(__name__)

FLASH = "flash_attention_2"
_ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers that FlashAttention 2 can do. Others, such as linear attention, are what they are everywhere."""
_HEADS, _WIDTH, _VOCABULARY, _LAYERS = 2, 32, 16, 8
_HALF = 4
"""Tokens of each of the two examples."""
_NARROW: dict[str, int] = {
    "num_attention_heads": _HEADS,
    "intermediate_size": 2 * _WIDTH,
    "moe_intermediate_size": _WIDTH,
    "shared_expert_intermediate_size": _WIDTH,
    "vocab_size": _VOCABULARY,
}
"""The sizes of a small model of the same architecture."""
_ODD = (ArithmeticError, AttributeError, AssertionError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors of architectures that have no such small model, or no row with positions."""


def takes_flash(model: Any) -> bool:
    """Whether the architecture has FlashAttention 2, which is chosen where its package and a GPU are."""
    return bool(model._supports_flash_attn) and FLASH in (model._compatible_flash_implementations or [FLASH])


def refuse_leaks(model: Any) -> None:
    """Raise UserError for a model whose examples see each other in a packed row. `model`: not DeepSpeed's engine, which
    would take this look for a step. Runs it once: all ranks call together."""
    if _leaks(model):
        raise UserError(
            f"in a {model.config.model_type}, examples that share a row see each other",
            hint="Set spec.training.packing to false.",
        )


def _leaks(model: Any) -> bool:
    import torch

    ids = torch.arange(_HALF, device=model.device).repeat(2)[None]
    embedded: list[Any] = []

    def embed(*given: Any) -> Any:
        """A hook: of the module, its arguments, and its result."""
        embedded.append(given[-1].detach().requires_grad_())
        return embedded[0]

    hook = model.get_input_embeddings().register_forward_hook(embed)
    try:
        logits = model(input_ids=ids, position_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(logits[:, _HALF:].float().square().sum(), embedded)
    return bool(gradient[:, :_HALF].any())


def try_packing(config: Any) -> None:
    """`refuse_leaks` of a small random model with this config's kinds of layers, before the real model is loaded.

    There is no verdict on architectures that have no such model, or may have another attention on the training's GPUs;
    the training looks at these when it begins.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(_small(config), dtype=torch.float32, trust_remote_code=False)
        if not _leaks(model):
            return
    except _ODD as error:
        log.warning("packing is tried when the training begins: %s: %s", type(error).__name__, error)
        return
    if takes_flash(model) and set(getattr(model.config.get_text_config(), "layer_types", None) or ()) <= _ATTENTIONS:
        log.warning("packing is refused when the training begins, unless its image has FlashAttention 2")
        return
    refuse_leaks(model)


def _small(config: Any) -> Any:
    """The config of a small model with the same kinds of layers."""
    small = deepcopy(config)
    if getattr(small, "quantization_config", None) is not None:
        del small.quantization_config
    text = small.get_text_config()
    kinds, heads = getattr(text, "layer_types", None), getattr(text, "num_attention_heads", None)
    width = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else _WIDTH)
    layers = 1 + max(map(kinds.index, set(kinds))) if kinds else _LAYERS
    sizes = {name: size for name, size in _NARROW.items() if getattr(text, name, None)}
    sizes |= {"hidden_size": _HEADS * width, "num_hidden_layers": min(text.num_hidden_layers, layers)}
    if groups := getattr(text, "num_key_value_heads", None):
        sizes["num_key_value_heads"] = _HEADS if groups == heads else 1
    for name, size in sizes.items():
        setattr(text, name, size)
    if kinds and "layer_types" in vars(text):  # others derive it from the number of layers
        text.layer_types = kinds[:layers]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    return small
