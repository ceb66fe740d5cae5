"""Which of a student's modules an adapter (LoRA) is added to, and how many parameters it has.

Architectures name their modules differently, and one list of names reaches other parts in each of them: of a mixture of
experts, PEFT turns `gate_proj` into the experts' fused tensors and leaves out a dense first layer; of gpt-oss nothing
matches. So targets follow from the modules themselves: every linear module of the layers but routers; of a mixture
those of attention. `add` compares what got parameters with what was meant.

vLLM loads what is stored: the default init (it refuses inits that change the student's own weights), the same rank for
all modules, no output layer, no embeddings and no experts.

Sizes follow from the headers of the safetensors too, without torch, as everything that `cgd plan` shows.
"""

import logging
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cgd_stages.contract import Adapter
from cgd_stages.errors import UserError
from cgd_stages.models import resolve

log = logging.getLogger(__name__)

WHERE = "spec.training.adapter"
ATTENTION, MLP = "attention", "mlp"
"""The words in `targets` that stand for all modules of a kind."""
_PARTS = {ATTENTION: re.compile(r"attn|attention"), MLP: re.compile(r"mlp|feed_forward|ffn|^fc\d$|^moe$|_moe$")}
"""What the modules that hold linear modules are called in transformers."""
_LAYER = re.compile(r"\.\d+\.")
_OTHER_INPUTS = re.compile(r"(^|\.)(vision|visual|image|audio|speech)")
_ROUTER = re.compile(r"(^|_)gate$|router")
_EXPERTS = re.compile(r"(^|\.)(\w*experts?|\w*moe)(\.|$)")
LEAST_RATE = 1e-5
"""With a lower learning rate an adapter hardly moves in a training of usual length."""
_SHOWN = 12
"""Names in an error, at most."""


@dataclass(frozen=True)
class Linear:
    """A linear module of a layer. `width`: elements of one input and one output together."""

    name: str
    width: int

    @property
    def kind(self) -> str:
        """Attention or mlp, by the innermost module that says so; empty for any other."""
        for part in reversed(self.name.split(".")):
            for kind, pattern in _PARTS.items():
                if pattern.search(part):
                    return kind
        return ""


def select(linears: Iterable[Linear], names: Iterable[str], adapter: Adapter) -> list[Linear]:
    """The modules that get an adapter. `names`: of all modules or tensors of the student, which tell whether it is a
    mixture of experts. Raises UserError for a target that the student does not have."""
    mixture = any(map(_EXPERTS.search, names))
    usable = [linear for linear in linears if not mixture or linear.kind == ATTENTION]
    for target in adapter.targets:
        if not any(_is_meant(linear, target) for linear in usable):
            own_names = sorted({linear.name.rpartition(".")[2] for linear in usable})
            kinds = sorted({linear.kind for linear in usable} - {""})
            why = "the student has no linear module of this name in its layers"
            if mixture:
                why = "the student is a mixture of experts, where attention alone can have an adapter"
            hint = f"Leave {WHERE}.targets out, or choose of: {', '.join([*kinds, *own_names][:_SHOWN])}."
            raise UserError(f"{WHERE}.targets: {target!r}: {why}", hint=hint)
    if not usable:
        raise UserError("the student has no linear module that an adapter can be added to", hint=f"Remove {WHERE}.")
    wanted = adapter.targets
    return [linear for linear in usable if not wanted or any(_is_meant(linear, target) for target in wanted)]


def _is_meant(linear: Linear, target: str) -> bool:
    return target == linear.kind or f".{linear.name}".endswith(f".{target}")


def parameters(linears: Iterable[Linear], adapter: Adapter) -> int:
    """Parameters of the adapter of these modules."""
    return sum(adapter.rank * linear.width for linear in linears)


# --- by the files' headers --------------------------------------------------------------------------------------


def parameters_of(tensors: Sequence[resolve.Tensor], adapter: Adapter) -> int:
    """Parameters of the adapter of a stored student. Raises UserError as `select` does."""
    linears = []
    for tensor in tensors:
        name, _, kind = tensor.name.rpartition(".")
        if kind == "weight" and len(tensor.shape) == 2 and _is_usable(name):
            linears.append(Linear(name, sum(tensor.shape)))
    return parameters(select(linears, (tensor.name for tensor in tensors), adapter), adapter)


def _is_usable(name: str) -> bool:
    """Whether a linear module of this name may have an adapter: it is in a layer that reads text, and no router."""
    is_router = bool(_ROUTER.search(name.rpartition(".")[2]))
    return bool(_LAYER.search(name)) and not is_router and not _OTHER_INPUTS.search(name)


def roughly(student: float, adapter: Adapter) -> int:
    """Parameters of the adapter of a student of which the number of parameters alone is known, as of a model with 128
    times as many elements in its hidden state as layers, and an MLP 3.5 times as wide."""
    hidden = (student * 128 / 12) ** (1 / 3)
    mlp, attention = 3 * (1 + 3.5) * hidden, 4 * 2 * hidden
    kinds = {ATTENTION: attention, MLP: mlp}
    wanted = [kinds[target] for target in adapter.targets if target in kinds] or list(kinds.values())
    return int(adapter.rank * sum(wanted) * hidden / 128)


# --- by the modules ---------------------------------------------------------------------------------------------


def refuse(config: Any, tokenizer: Any, adapter: Adapter) -> None:
    """Raise UserError where the adapter cannot be trained, stored or served: tried with the student's modules, without
    their weights."""
    import torch
    from transformers import AutoModelForCausalLM

    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"{WHERE}: the student is quantized, and an adapter cannot be added to its weights when it is stored",
            hint="Set spec.student.model to the model in bfloat16.",
        )
    rows = config.get_text_config().vocab_size
    padding = getattr(tokenizer, "pad_token", None)  # which is never read
    new = sorted(token for token, number in tokenizer.get_vocab().items() if number >= rows and token != padding)
    if new:
        raise UserError(
            f"{WHERE}: the tokenizer has {len(new)} tokens more than the student has embeddings ({rows}), such as "
            f"{new[0]!r}; an adapter does not hold embeddings",
            hint="Resize the student's embeddings, train or initialise the new rows, and store it; then name that "
            "model in spec.student.model.",
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        everything = sum(parameter.numel() for parameter in model.parameters())
        names = ", ".join(sorted(add(model, adapter).target_modules))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = 100 * trained / everything
    log.info("adapter: %d parameters (%.2f%% of the student's) for %s; all others stay", trained, share, names)


def linears_of(model: Any) -> list[Linear]:
    """Every linear module of the layers of a causal language model but routers."""
    from torch.nn import Linear as Module
    from transformers.pytorch_utils import Conv1D

    found = []
    for name, module in model.named_modules():
        if not _is_usable(name):
            continue
        if isinstance(module, Module):
            found.append(Linear(name, module.in_features + module.out_features))
        elif isinstance(module, Conv1D):
            found.append(Linear(name, module.nx + module.nf))
    return found


def add(model: Any, adapter: Adapter) -> Any:
    """Add an adapter to a causal language model and freeze everything else; the result is PEFT's config of it.

    A is random, by torch's generator, and B is zero: the model computes what it did. Raises UserError where PEFT gives
    parameters to other modules than were meant.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer
    from transformers.pytorch_utils import Conv1D

    names = [name for name, _ in model.named_modules()]
    chosen = select(linears_of(model), names, adapter)
    meant = {linear.name for linear in chosen}
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=endings(meant, [name for name in names if name not in meant]),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        hint = f"Set {WHERE}.targets to [{ATTENTION}]."
        raise UserError(f"{WHERE}: PEFT adds no adapter to {type(model).__name__}: {error}", hint=hint) from error
    reached = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    if reached != meant or trained != parameters(chosen, adapter):
        odd = ", ".join(sorted(reached ^ meant)[:_SHOWN])
        raise UserError(
            f"{WHERE}: PEFT adds the adapter to other modules of {type(model).__name__} than {WHERE}.targets means: "
            f"{odd}",
            hint=f"Set {WHERE}.targets to [attention].",
        )
    return config


def endings(names: Collection[str], others: Collection[str]) -> list[str]:
    """The shortest ends of the names that no other name has: the form in which PEFT takes its targets."""
    for parts in (1, 2, 3):
        found = {".".join(name.split(".")[-parts:]) for name in names}
        if not any(f".{other}".endswith(tuple(f".{end}" for end in found)) for other in others):
            return sorted(found)
    return sorted(names)
