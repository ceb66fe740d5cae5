"""The loss of a mixture's routers: it grows where they send many tokens to few experts.

It is each architecture's own function in transformers (Switch Transformers, Fedus et al. 2021, equations 4 to 6, over
all layers). Models compute it for all tokens of a forward pass, so its value depends on what else is in the pass. Here
it is computed for each example by itself, and a batch has the mean of its examples: neither the number of processes nor
micro-batches, padding or packing change it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cgd_stages.models.mixture import UnknownMixture, mixture_of, router_loss

Logits = tuple[torch.Tensor, ...]
"""The router's logits of each layer: (positions, experts)."""
Balance = Callable[[Logits], torch.Tensor]


def balance_of(model: Any) -> Balance | None:
    """The router's loss of an architecture, as a function of logits; None if transformers has none for it.

    `model`: a causal language model, or a module around one.
    """
    from transformers import PreTrainedModel

    causal = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    function = router_loss(type(causal))
    if function is None:
        return None
    try:
        mixture = mixture_of(causal.config)
    except UnknownMixture:
        return None
    if mixture is None:
        return None

    def balance(logits: Logits) -> torch.Tensor:
        loss: torch.Tensor = function(logits, mixture.experts, mixture.active)
        return loss

    return balance


def spans_of(inputs: dict[str, torch.Tensor]) -> list[slice]:
    """Where each example of a micro-batch lies among its positions, if these are counted row by row."""
    rows, width = inputs["input_ids"].shape
    if "position_ids" in inputs:  # packed: positions begin again at every example
        starts = (inputs["position_ids"].flatten() == 0).nonzero().flatten().tolist()
        return [slice(start, end) for start, end in zip(starts, [*starts[1:], width], strict=True)]
    mask = inputs.get("attention_mask")
    lengths = [width] * rows if mask is None else mask.sum(dim=1).tolist()
    return [slice(row * width, row * width + length) for row, length in enumerate(lengths)]


def summed(balance: Balance, logits: Logits, spans: Sequence[slice]) -> torch.Tensor:
    """The sum of the examples' losses."""
    return torch.stack([balance(tuple(layer[span] for layer in logits)) for span in spans]).sum()
