"""Mixtures of experts: what a token meets of them, by a model's config and the names of its parameters. Pure.

A router in each layer chooses the experts of a token. transformers keeps all experts of a layer in a few fused
parameters, and stores one tensor for each expert; the names of both have the part `experts`.
"""

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size", "intermediate_size")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_SHARED_WIDTH = (
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
)
_SWITCHES = ("is_moe", "enable_moe_block")
"""Where one of these is false, the model is dense, whatever else its config has."""
_WEIGHT = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
"""Names of one figure in the configs of transformers."""
_ROUTED = re.compile(r"(^|\.)(experts|block_sparse_moe\.(in|out)put_linear)\.")


class UnknownMixture(ValueError):
    """The config of a mixture does not say, under a known name, how many experts a token meets, or how large one is."""


@dataclass(frozen=True)
class Mixture:
    """The experts of each layer, and how many of them a token meets (`active`). Intermediate elements of one expert
    (`width`), and of all experts that every token meets besides (`shared`)."""

    experts: int
    active: int
    width: int
    shared: int = 0

    @property
    def inner(self) -> int:
        """Intermediate elements of all experts that a token meets in a layer."""
        return self.active * self.width + self.shared


def mixture_of(config: Any) -> Mixture | None:
    """The mixture that a model's config in transformers describes; None for a dense model.

    Raises UnknownMixture.
    """
    text = _of_layers(config)
    experts = _experts(text)
    if experts == 1:
        return None
    active, width = _first(text, _ACTIVE), _first(text, _WIDTH)
    if not (active and width):
        raise UnknownMixture(
            f"the config of a {config.model_type} does not say what a token meets of {experts} experts"
        )
    shared = _first(text, _SHARED_WIDTH) or (_first(text, _SHARED) or 0) * width
    return Mixture(experts, active, width, shared)


def has_experts(config: Any) -> bool:
    """Whether a model's config describes a mixture, known or not."""
    return _experts(_of_layers(config)) > 1


def router_loss(architecture: type) -> Callable[..., Any] | None:
    """The function by which transformers computes the loss of this architecture's routers, of all layers' logits, the
    number of experts and of those that a token meets; None if it has none. `architecture`: the class of a model."""
    function = getattr(sys.modules[architecture.__module__], "load_balancing_loss_func", None)
    if function is None or list(inspect.signature(function).parameters)[:3] != ["gate_logits", "num_experts", "top_k"]:
        return None
    found: Callable[..., Any] = function
    return found


def lacks_router_loss(config: Any) -> str:
    """Why a training of this model could not add its routers' loss, in words; empty if it can."""
    from transformers import AutoModelForCausalLM

    if not has_experts(config):
        return "has no experts and no router"
    try:
        mixture_of(config)
    except UnknownMixture:
        return "is a mixture whose config does not say what a token meets of its experts"
    architecture = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if architecture is None or router_loss(architecture):
        return ""
    return f"is a {config.model_type}, for which transformers has no loss of the routers"


def router_weight(config: Any) -> float:
    """The weight of the router's loss in the architecture's own training, by its config; 0 without such a loss."""
    text = _of_layers(config)
    if not has_experts(config):
        return 0.0
    return float(next((value for name in _WEIGHT if (value := getattr(text, name, None)) is not None), 0.0))


def is_routed(name: str) -> bool:
    """Whether a parameter of this name belongs to experts, of which a token meets some."""
    return bool(_ROUTED.search(name))


def _of_layers(config: Any) -> Any:
    """The config that describes the MLPs of a model's layers."""
    text = config.get_text_config()
    return getattr(text, "ffn_config", None) or text


def _experts(text: Any) -> int:
    """The experts of a layer; 1 in a dense model."""
    if any(getattr(text, name, None) is False for name in _SWITCHES):
        return 1
    return _first(text, _EXPERTS) or 1


def _first(text: Any, names: tuple[str, ...]) -> int | None:
    """The first of these figures that the config has; the largest if it has another for each layer."""
    for name in names:
        value = getattr(text, name, None)
        if value:
            return max(value) if isinstance(value, list) else int(value)
    return None
