"""The losses beside the likelihood: each is what its paper says, and the bucket of all other tokens makes it so."""

import math

import pytest
import torch
from torch import Tensor, tensor

from cgd_stages.method import losses

INF = float("inf")


def full_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """By the definition, over the whole vocabulary; both are logits (positions, vocabulary)."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (p * (p.log() - q.log())).sum(-1)


def top(teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ids and log-probabilities of the k likeliest tokens, by rank."""
    logprobs, ids = teacher.log_softmax(-1).topk(k)
    return ids, logprobs


def some(seed: int, positions: int = 7, vocabulary: int = 11) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    shape = (positions, vocabulary)
    return 2 * torch.randn(shape, dtype=torch.float64), 2 * torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_with_the_whole_vocabulary_it_is_the_divergence_itself_and_so_are_its_gradients(seed: int) -> None:
    teacher, student = some(seed)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    found, expected = losses.forward_kl(ours, *top(teacher, 11)), full_kl(teacher, theirs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_fewer_tokens_give_no_more_than_the_divergence_and_never_less_than_nothing(k: int) -> None:
    teacher, student = some(3, positions=50)
    found = losses.forward_kl(student, *top(teacher, k))
    assert (found >= -1e-12).all()
    assert (found <= full_kl(teacher, student) + 1e-12).all()
    more = losses.forward_kl(student, *top(teacher, k + 1))
    assert (found <= more + 1e-12).all()


def test_a_student_that_moves_its_mass_to_the_other_tokens_gains_nothing() -> None:
    """Without the bucket the sum over two tokens would be less than 0 for the second student."""
    teacher = tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    same, moved = teacher, tensor([[0.48, 0.48, 0.02, 0.02]], dtype=torch.float64).log()
    ids, logprobs = top(teacher, 2)
    without = (logprobs.exp() * (logprobs - moved.gather(-1, ids))).sum()
    assert without < 0
    assert losses.forward_kl(same, ids, logprobs).item() == pytest.approx(0, abs=1e-12)
    assert losses.forward_kl(moved, ids, logprobs).item() > 0.1


def test_at_the_teacher_the_gradient_is_zero_whatever_is_told_apart() -> None:
    teacher, _ = some(5)
    for k in (1, 4, 11):
        student = teacher.clone().requires_grad_()
        losses.forward_kl(student, *top(teacher, k)).sum().backward()
        assert student.grad is not None
        assert student.grad.abs().max() < 1e-12


def test_log_probabilities_of_minus_infinity_leave_loss_and_gradients_finite() -> None:
    """A teacher masks the rows that pad its vocabulary."""
    student = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    ids, logprobs = tensor([[0, 1, 5], [2, 3, 4]]), tensor([[-0.1, -2.5, -INF], [0.0, -INF, -INF]])
    found = losses.forward_kl(student, ids, logprobs)
    found.sum().backward()
    assert found.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert found[1].item() == pytest.approx(math.log(6))


def test_a_token_that_the_student_does_not_have_counts_among_the_others() -> None:
    teacher, student = some(6, vocabulary=8)
    teacher[:, 7] += 3
    ids, logprobs = top(teacher, 4)
    assert (ids == 7).any(-1).all()
    foreign = losses.forward_kl(student[:, :7].clone().requires_grad_(), ids, logprobs)
    kept = ids != 7
    for place in range(len(ids)):
        own, expected = ids[place][kept[place]][None], logprobs[place][kept[place]][None]
        alone = losses.forward_kl(student[place : place + 1, :7], own, expected)
        assert foreign[place].item() == pytest.approx(alone.item(), abs=1e-12)


def test_half_precision_of_the_stored_log_probabilities_costs_little_and_breaks_nothing() -> None:
    teacher, student = some(7, positions=200, vocabulary=50)
    ids, logprobs = top(5 * teacher, 16)
    exact, rounded = losses.forward_kl(student, ids, logprobs), losses.forward_kl(student, ids, logprobs.half())
    torch.testing.assert_close(rounded, exact, rtol=2e-3, atol=2e-3)
    sure = losses.forward_kl(student[:1], tensor([[3, 4]]), tensor([[0.0004, -9.0]]))
    assert sure.isfinite().all()


def test_a_small_rest_of_the_student_is_not_lost_in_rounding() -> None:
    """1 - (1 - 1e-9) is 0 in float32, and its logarithm is no number to learn from."""
    logits = tensor([[25.0, 24.0, 0.0, 0.0]])
    rest = losses.bucketed(logits, tensor([[0, 1]]))[0, -1]
    assert rest.item() == pytest.approx(math.log(2) - 25 - math.log1p(math.exp(-1)), rel=1e-5)


def test_dpo_is_log_two_at_the_reference_and_falls_as_the_preferred_text_gains() -> None:
    zero = torch.zeros(3)
    torch.testing.assert_close(losses.dpo(zero, zero, 0.1), torch.full((3,), math.log(2)))
    gained = losses.dpo(tensor([0.0, 1.0, 5.0]), zero, 0.5)
    assert gained[0] > gained[1] > gained[2] > 0
    assert losses.dpo(tensor([2.0]), tensor([-1.0]), 0.5).item() == pytest.approx(math.log1p(math.exp(-1.5)))
