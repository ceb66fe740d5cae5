"""The losses that are not the likelihood of a text, of logits and log-probabilities. Pure: tensors in, tensors out.

A teacher's distribution over the vocabulary is known by its K likeliest tokens at a position, perhaps by one more (the
token that the student has sampled), and by one *bucket* that holds all others together. Without the bucket a divergence
over K tokens is none: it may be negative, and is least where the student moves its mass out of the K tokens. With it,
it is a divergence, and a lower bound of the one over the whole vocabulary (the data-processing inequality); with K =
vocabulary it is that one.

torch is imported where a tensor is made: programs that only plan need none.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LEAST_OTHERS = 1e-3
"""What all other tokens together have in the teacher's eyes, at least, where the student is asked to stay within the
teacher's distribution: 1 less the K likeliest ones is known no better, because they are stored in float16, which moves
a sum of probabilities by up to 5e-4."""
LEAST_LOGPROB = -100.0
"""Nats; less than any probability that float32 tells from 0. It stands for a teacher's -inf."""
_NONE = -math.inf


def dpo(chosen: "Tensor", rejected: "Tensor", beta: float) -> "Tensor":
    """DPO's loss of each pair (Rafailov et al. 2023, equation 7), in nats.

    `chosen`, `rejected` (pairs,): log-probabilities of the texts, each less that of the reference. Log 2 where the
    student is the reference.
    """
    from torch.nn.functional import logsigmoid

    return -logsigmoid(beta * (chosen - rejected))


def divergence(logits: "Tensor", ids: "Tensor", logprobs: "Tensor", beta: float) -> "Tensor":
    """The generalised Jensen-Shannon divergence at each position, in nats (Agarwal et al. 2023, section 2), over the
    teacher's tokens that are given and the bucket of all others.

    With the mixture M = beta T + (1 - beta) S it is beta KL(T || M) + (1 - beta) KL(S || M). That goes to 0 with beta
    and with 1 - beta, so beta 0 is KL(T || S) by definition, the forward KL, and beta 1 is KL(S || T), the reverse KL;
    TRL has the same definition. Next to both ends the loss is a small part of that at the end, and nobody wants it.

    `logits` (positions, vocabulary): the student's; `ids`, `logprobs` (positions, K): the teacher's tokens, each once;
    only the last one may be there before, and counts once. A token that the student does not have, as from a padded
    vocabulary, counts among the others, and so does one of which the teacher says -inf. Finite.
    """
    import torch

    teacher, student = told_apart(logits, ids, logprobs)
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, _bounded(teacher, student))
    nobody = student == _NONE
    own, others = (side.masked_fill(nobody, 0.0) for side in (teacher, student))
    mixture = torch.logaddexp(own + math.log(beta), others + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def told_apart(logits: "Tensor", ids: "Tensor", logprobs: "Tensor") -> tuple["Tensor", "Tensor"]:
    """The log-probabilities (positions, K + 1) of teacher and student, of the tokens `ids` and, last, of all others
    together; both are -inf at a token that does not count, and at the others where there are none.

    Those of the teacher sum up to 1, however the given ones were rounded. The student's others are summed over them: 1
    less the sum of the tokens would lose small ones.
    """
    import torch

    vocabulary, logprobs = logits.shape[-1], logprobs.to(logits.dtype)
    counts = (ids < vocabulary) & (logprobs > _NONE)
    counts[..., -1:] &= (ids[..., :-1] != ids[..., -1:]).all(-1, keepdim=True)
    # Those that do not count stand at one that does, where they change nothing.
    one = ids.gather(-1, counts.int().argmax(-1, keepdim=True)).clamp(max=vocabulary - 1)
    ids = ids.where(counts, one)
    total = logits.logsumexp(-1, keepdim=True)
    own = (logits.gather(-1, ids) - total).masked_fill(~counts, _NONE)
    given = logprobs.masked_fill(~counts, _NONE)
    rest, left = logits.scatter(-1, ids, _NONE), (1 - given.logsumexp(-1, keepdim=True).exp()).clamp(min=0).log()
    if ids.shape[-1] < vocabulary:
        others = rest.logsumexp(-1, keepdim=True) - total
    else:
        nobody = counts.sum(-1, keepdim=True) == vocabulary
        others = (rest.masked_fill(nobody, 0.0).logsumexp(-1, keepdim=True) - total).masked_fill(nobody, _NONE)
        left = left.masked_fill(nobody, _NONE)
    return torch.cat([given, left], -1).log_softmax(-1), torch.cat([own, others], -1)


def rewarded(student: "Tensor", teacher: "Tensor", sampler: "Tensor") -> "Tensor":
    """The loss of each sampled token whose gradient is that of the reverse KL on average over the samples, in nats: the
    advantage is the teacher's log-probability less the student's, and has no gradient; the student's ratio to the
    sampler has it (the estimator of REINFORCE with importance sampling; its value estimates the reverse KL).

    `student`, `teacher`, `sampler` (tokens,): log-probabilities of the same tokens; the sampler is the student of the
    round's beginning, in the engine that has sampled.
    """
    return (student - sampler).exp() * (student - _possible(teacher)).detach()


def squared(student: "Tensor", teacher: "Tensor") -> "Tensor":
    """Half the square of what student and teacher are apart at each sampled token, in nats squared: the estimator k2 of
    the reverse KL (Schulman 2020), whose gradient is that of the reverse KL on average over the student's own samples.

    Of the other two, k1 (the difference) has no gradient on average, and k3 has that of the forward KL.
    `student`, `teacher` (tokens,): log-probabilities of the same tokens.
    """
    return (student - _possible(teacher)).square() / 2


def _kl(p: "Tensor", q: "Tensor") -> "Tensor":
    """KL(p || q) of log-probabilities (positions, buckets). A bucket in which p has nothing adds nothing."""
    nothing = p == _NONE
    return (p.exp() * (p.masked_fill(nothing, 0.0) - q.masked_fill(nothing, 0.0))).sum(-1)


def _bounded(teacher: "Tensor", student: "Tensor") -> "Tensor":
    """The teacher's buckets with at least `LEAST_OTHERS` in the last one, where the student has it."""
    import torch

    others = teacher[..., -1:]
    least = others.clamp(min=math.log(LEAST_OTHERS)).where(student[..., -1:] > _NONE, others)
    return torch.cat([teacher[..., :-1], least], -1).log_softmax(-1)


def _possible(teacher: "Tensor") -> "Tensor":
    return teacher.clamp(min=LEAST_LOGPROB)
