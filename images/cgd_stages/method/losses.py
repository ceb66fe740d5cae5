"""The losses that are not the likelihood of a text, of logits and log-probabilities. Pure: tensors in, tensors out.

A teacher's distribution over the vocabulary is known by its K likeliest tokens at a position, and by one *bucket* that
holds all others together. Without the bucket a divergence over K tokens is none: it may be negative, and is least where
the student moves its mass out of the K tokens. With it, it is a divergence, and a lower bound of the one over the whole
vocabulary (the data-processing inequality); with K = vocabulary it is that one.

torch is imported where a tensor is made: programs that only plan need none.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def dpo(chosen: "Tensor", rejected: "Tensor", beta: float) -> "Tensor":
    """DPO's loss of each pair (Rafailov et al. 2023, equation 7), in nats.

    `chosen`, `rejected` (pairs,): log-probabilities of the texts, each less that of the reference. Log 2 where the
    student is the reference.
    """
    from torch.nn.functional import logsigmoid

    return -logsigmoid(beta * (chosen - rejected))


def forward_kl(logits: "Tensor", ids: "Tensor", logprobs: "Tensor") -> "Tensor":
    """KL(teacher || student) at each position, in nats: over the teacher's likeliest tokens and the bucket of all
    others (Agarwal et al. 2023, equation 1, has it over all tokens).

    `logits` (positions, vocabulary): the student's; `ids`, `logprobs` (positions, K): the teacher's likeliest tokens,
    each once. A token that the student does not have, as from a padded vocabulary, counts among the others. Finite also
    where the teacher's log-probability is -inf.
    """
    ids, logprobs = known(ids, logprobs.to(logits.dtype), logits.shape[-1])
    teacher, student = buckets(logprobs, logits.shape[-1]), bucketed(logits, ids)
    weight = teacher.exp()
    nothing = weight == 0
    return (weight * (teacher.masked_fill(nothing, 0.0) - student.masked_fill(nothing, 0.0))).sum(-1)


def known(ids: "Tensor", logprobs: "Tensor", vocabulary: int) -> tuple["Tensor", "Tensor"]:
    """The same tokens, and in place of those that the vocabulary does not have a token that is there already, with
    log-probability -inf."""
    foreign = ids >= vocabulary
    first = (~foreign).int().argmax(-1, keepdim=True)
    own = ids.gather(-1, first).clamp(max=vocabulary - 1)
    return ids.where(~foreign, own), logprobs.masked_fill(foreign, -float("inf"))


def buckets(logprobs: "Tensor", vocabulary: int) -> "Tensor":
    """The teacher's log-probabilities (positions, K + 1), the last one of all other tokens together: they sum up to 1,
    however the given ones were rounded. (positions, K) where K is the vocabulary."""
    import torch

    if logprobs.shape[-1] == vocabulary:
        return logprobs.log_softmax(-1)
    rest = (1 - logprobs.logsumexp(-1, keepdim=True).exp()).clamp(min=0).log()
    return torch.cat([logprobs, rest], -1).log_softmax(-1)


def bucketed(logits: "Tensor", ids: "Tensor") -> "Tensor":
    """The student's log-probabilities (positions, K + 1) of the tokens `ids`, and of all others together, which is
    summed over them: 1 less the sum of the others would lose small ones. (positions, K) where K is the vocabulary."""
    import torch

    total = logits.logsumexp(-1, keepdim=True)
    own = logits.gather(-1, ids) - total
    if ids.shape[-1] == logits.shape[-1]:
        return own
    rest = logits.scatter(-1, ids, -float("inf")).logsumexp(-1, keepdim=True) - total
    return torch.cat([own, rest], -1)
