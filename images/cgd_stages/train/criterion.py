"""What a training minimises over a micro-batch: the likelihood of a text, DPO's preference, a divergence, or what the
teacher says of the student's own samples.

Each is a sum over units, which are tokens or pairs; a step's loss is the mean over the units of its global batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch.nn.functional import cross_entropy

from cgd_stages.contract import Train
from cgd_stages.method import losses
from cgd_stages.train.examples import Examples, Mixed, Scored
from cgd_stages.train.router import spans_of
from cgd_stages.train.student import Measure, TargetLoss


@dataclass(frozen=True)
class Sums:
    """Sums over a micro-batch: the loss, the router's losses of its examples, and figures that only tell."""

    loss: torch.Tensor
    router: torch.Tensor
    figures: tuple[torch.Tensor, ...] = ()


class Criterion(Protocol):
    """`figures` names those of `Sums` that are told with each step."""

    figures: tuple[str, ...]

    def units(self, examples: Examples, indices: Sequence[int]) -> int:
        """What the loss of these examples is the mean over."""

    def figure_units(self, examples: Examples, indices: Sequence[int]) -> int:
        """What the figures are the means over; where there is nothing, they are not told."""

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

    figure_units = units

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

    figure_units = units

    def __call__(self, run: Run, examples: Examples, indices: Sequence[int]) -> Sums:
        texts, router = logprobs(run, examples, indices)
        gain = texts - self.reference[examples][list(indices)].to(texts)
        margin = (gain[:, 0] - gain[:, 1]).detach()
        figures = (self.beta * margin.sum(), (margin > 0).sum().to(margin.dtype))
        return Sums(losses.dpo(gain[:, 0], gain[:, 1], self.beta).sum(), router, figures)


class Divergence:
    """The divergence from stored log-probabilities: see `losses.divergence`."""

    figures: tuple[str, ...] = ()

    def __init__(self, beta: float = 0.0) -> None:
        self._beta = beta

    def units(self, examples: Examples, indices: Sequence[int]) -> int:
        return examples.learned(indices)

    figure_units = units

    def __call__(self, run: Run, examples: Examples, indices: Sequence[int]) -> Sums:
        assert isinstance(examples, Scored)
        return Sums(*run(examples, indices, partial(_divergence, beta=self._beta), examples.scores(indices)))


class OnPolicy:
    """What is learned of a round: by a loss of each position, of the logits (positions, vocabulary) in float32, the
    tokens there, the log-probabilities that teacher and sampler have of the sampled ones (nan of stored texts), and
    what else it needs of the examples.

    `reverse_kl` is the mean of the student's less the teacher's log-probability over the sampled tokens, which
    estimates the reverse KL as long as the samples are the student's; `sampler_gap` is how far the student is from the
    sampler there, without the sign. In a round's first step it is what the engine computes otherwise.
    """

    figures: tuple[str, ...] = ("reverse_kl", "sampler_gap")

    def __init__(self, loss: Measure, needs: Callable[[Mixed, Sequence[int]], Sequence[torch.Tensor]]) -> None:
        self._loss, self._needs = loss, needs

    def units(self, examples: Examples, indices: Sequence[int]) -> int:
        return examples.learned(indices)

    def figure_units(self, examples: Examples, indices: Sequence[int]) -> int:
        assert isinstance(examples, Mixed)
        return examples.sampled_tokens(indices)

    def __call__(self, run: Run, examples: Examples, indices: Sequence[int]) -> Sums:
        assert isinstance(examples, Mixed)
        aligned = [examples.teacher(indices), examples.sampler(indices), *self._needs(examples, indices)]
        values, router = run(examples, indices, self._measure, aligned)
        loss, *figures = values.sum(0)
        return Sums(loss, router, tuple(figure.detach() for figure in figures))

    def _measure(
        self, logits: torch.Tensor, learned: torch.Tensor, teacher: torch.Tensor, sampler: torch.Tensor, *given: Any
    ) -> torch.Tensor:
        """(positions, 3): the loss, and at sampled tokens how far the student is from teacher and from sampler."""
        logits = logits.float()
        loss = self._loss(logits, learned, teacher, sampler, *given)
        with torch.no_grad():
            own, stored = _each_logprob(logits, learned), sampler.isnan()
            reverse, gap = ((own - other).masked_fill(stored, 0.0) for other in (teacher, sampler))
        return torch.stack([loss, reverse, gap.abs()], 1)


def on_policy(work: Train) -> OnPolicy:
    """What a training with rounds minimises: GKD's divergence over the teacher's likeliest tokens, the sampled one and
    all others, or one of OPD's forms of the reverse KL from the sampled token alone."""
    if work.objective == "GKD":
        return OnPolicy(partial(_mixed, beta=work.beta or 0.0), Mixed.scores)
    return OnPolicy(_squared if work.form == "loss" else _rewarded, lambda *_: ())


def logprobs(run: Run, examples: Examples, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities (pairs, 2) of each pair's preferred and other text, and the router's losses."""
    values, router = run(examples, indices, _each_nll)
    lengths = torch.tensor(examples.target_lengths(indices), dtype=torch.long)
    texts = torch.arange(2 * len(indices)).repeat_interleave(lengths).to(values.device)
    return values.new_zeros(2 * len(indices)).index_add(0, texts, -values).view(2, len(indices)).T, router


def criterion_of(work: Train) -> Criterion:
    """What the training minimises."""
    return on_policy(work) if work.on_policy else held_out_criterion(work)


def held_out_criterion(work: Train) -> Criterion:
    """What a validation measures: what the training minimises, as far as it does so on stored texts. No samples are
    held out: a training that learns from them alone is measured by the likelihood of the stored texts."""
    match work.objective:
        case "DPO":
            assert work.beta is not None
            return Preference(work.beta)
        case _ if work.scores:
            return Divergence(work.beta or 0.0)
        case _:
            return Likelihood()


def _each_nll(logits: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits.float(), learned, reduction="none")


def _each_logprob(logits: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    return -_each_nll(logits, learned)


def _divergence(
    logits: torch.Tensor, _: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor, *, beta: float
) -> torch.Tensor:
    return losses.divergence(logits.float(), ids, logprobs, beta).sum()


def _mixed(
    logits: torch.Tensor, _: torch.Tensor, __: torch.Tensor, ___: torch.Tensor, *top: torch.Tensor, beta: float
) -> torch.Tensor:
    ids, logprobs = top
    return losses.divergence(logits, ids, logprobs, beta)


def _squared(logits: torch.Tensor, learned: torch.Tensor, teacher: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return losses.squared(_each_logprob(logits, learned), teacher)


def _rewarded(logits: torch.Tensor, learned: torch.Tensor, *both: torch.Tensor) -> torch.Tensor:
    return losses.rewarded(_each_logprob(logits, learned), *both)
