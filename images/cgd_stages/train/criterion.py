"""What a training minimises over a micro-batch: the likelihood of a text, DPO's preference, or a divergence.

Each is a sum over units, which are tokens or pairs; a step's loss is the mean over the units of its global batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import cross_entropy

from cgd_stages.contract import Train
from cgd_stages.method import losses
from cgd_stages.train.examples import Examples, Scored
from cgd_stages.train.router import spans_of
from cgd_stages.train.student import Measure, TargetLoss


@dataclass(frozen=True)
class Sums:
    """Sums over a micro-batch: the loss, the router's losses of its examples, and figures that only tell."""

    loss: torch.Tensor
    router: torch.Tensor
    figures: tuple[torch.Tensor, ...] = ()


class Criterion(Protocol):
    """`figures` names those of `Sums`, whose mean over the units is told with each step."""

    figures: tuple[str, ...]

    def units(self, examples: Examples, indices: Sequence[int]) -> int:
        """What the loss of these examples is the mean over."""

    def __call__(self, run: "Run", examples: Examples, indices: Sequence[int]) -> Sums: ...


@dataclass(frozen=True)
class Run:
    """How micro-batches go through the student. `balanced`: with the loss of a mixture's routers."""

    loss: TargetLoss
    device: torch.device
    packing: bool
    balanced: bool

    def __call__(
        self,
        examples: Examples,
        indices: Sequence[int],
        measure: Measure | None = None,
        aligned: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`TargetLoss.with_router` of these examples."""
        inputs, target = examples.tensors(indices, packing=self.packing)
        spans = spans_of(inputs) if self.balanced and indices else []
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        target, aligned = target.to(self.device), [tensor.to(self.device) for tensor in aligned]
        return self.loss.with_router(inputs, target, spans, measure, aligned)


class Likelihood:
    """The negative log-likelihood of the target."""

    figures: tuple[str, ...] = ()

    def units(self, examples: Examples, indices: Sequence[int]) -> int:
        return examples.learned(indices)

    def __call__(self, run: Run, examples: Examples, indices: Sequence[int]) -> Sums:
        return Sums(*run(examples, indices))


class Preference:
    """DPO's loss. `reference`: the log-probabilities of the pairs' texts by the model at the start, by the examples."""

    figures: tuple[str, ...] = ("reward_margin", "reward_accuracy")

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.reference: dict[Examples, torch.Tensor] = {}

    def units(self, _: Examples, indices: Sequence[int]) -> int:
        return len(indices)

    def __call__(self, run: Run, examples: Examples, indices: Sequence[int]) -> Sums:
        texts, router = logprobs(run, examples, indices)
        gain = texts - self.reference[examples][list(indices)].to(texts)
        margin = (gain[:, 0] - gain[:, 1]).detach()
        figures = (self.beta * margin.sum(), (margin > 0).sum().to(margin.dtype))
        return Sums(losses.dpo(gain[:, 0], gain[:, 1], self.beta).sum(), router, figures)


class Divergence:
    """The forward KL from stored log-probabilities."""

    figures: tuple[str, ...] = ()

    def units(self, examples: Examples, indices: Sequence[int]) -> int:
        return examples.learned(indices)

    def __call__(self, run: Run, examples: Examples, indices: Sequence[int]) -> Sums:
        assert isinstance(examples, Scored)
        return Sums(*run(examples, indices, _kl, examples.scores(indices)))


def logprobs(run: Run, examples: Examples, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities (pairs, 2) of each pair's preferred and other text, and the router's losses."""
    values, router = run(examples, indices, _each_nll)
    lengths = torch.tensor(examples.target_lengths(indices), dtype=torch.long)
    texts = torch.arange(2 * len(indices)).repeat_interleave(lengths).to(values.device)
    return values.new_zeros(2 * len(indices)).index_add(0, texts, -values).view(2, len(indices)).T, router


def criterion_of(work: Train) -> Criterion:
    """What the training minimises."""
    match work.objective:
        case "DPO":
            assert work.beta is not None
            return Preference(work.beta)
        case "ContextDistillation" | "SupervisedKD":
            return Divergence()
        case _:
            return Likelihood()


def _each_nll(logits: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.float(), learned, reduction="none")


def _kl(logits: torch.Tensor, _: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    return losses.divergence(logits.float(), ids, logprobs.float(), 0).sum()
