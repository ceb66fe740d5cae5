"""The losses beside the likelihood: each is what its paper says, and the bucket of all other tokens makes it so."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, tensor

from cgd_stages.method import losses

INF = float("inf")


BETAS = (0, 0.05, 0.3, 0.5, 0.95, 1)


def full(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """By the definition, over the whole vocabulary; both are logits (positions, vocabulary)."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    m = beta * p + (1 - beta) * q

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    return {0: kl(p, q), 1: kl(q, p)}.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m))


def top(teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ids and log-probabilities of the k likeliest tokens, by rank."""
    logprobs, ids = teacher.log_softmax(-1).topk(k)
    return ids, logprobs


def and_sampled(teacher: Tensor, k: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and last the sampled tokens, which may be among them."""
    ids, logprobs = top(teacher, k)
    own = teacher.log_softmax(-1).gather(-1, tokens[:, None])
    return torch.cat([ids, tokens[:, None]], -1), torch.cat([logprobs, own], -1)


def some(seed: int, positions: int = 7, vocabulary: int = 11) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    shape = (positions, vocabulary)
    return 2 * torch.randn(shape, dtype=torch.float64), 2 * torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("seed", range(3))
def test_with_the_whole_vocabulary_it_is_the_divergence_itself_and_so_are_its_gradients(seed: int, beta: float) -> None:
    """The bucket of all others changes nothing then, also where the sampled token is given once more."""
    teacher, student = some(seed)
    tokens = torch.arange(7) % 11
    theirs = student.clone().requires_grad_()
    expected = full(teacher, theirs, beta)
    expected.sum().backward()
    for given in (top(teacher, 11), and_sampled(teacher, 11, tokens)):
        ours = student.clone().requires_grad_()
        found = losses.divergence(ours, *given, beta)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        found.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [1, 2, 5, 10])
def test_fewer_tokens_give_no_more_than_the_divergence_and_never_less_than_nothing(k: int, beta: float) -> None:
    teacher, student = some(3, positions=50)
    found = losses.divergence(student, *top(teacher, k), beta)
    assert (found >= -1e-12).all()
    assert (found <= full(teacher, student, beta) + 1e-12).all()
    more = losses.divergence(student, *top(teacher, k + 1), beta)
    assert (found <= more + 1e-12).all()
    sampled = losses.divergence(student, *and_sampled(teacher, k, student.argmin(-1)), beta)
    assert (found <= sampled + 1e-12).all()


@pytest.mark.parametrize("beta", BETAS)
def test_a_student_that_moves_its_mass_to_the_other_tokens_gains_nothing(beta: float) -> None:
    """Without the bucket the sum over two tokens would be less than 0 for the second student."""
    teacher = tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    same, moved = teacher, tensor([[0.48, 0.48, 0.02, 0.02]], dtype=torch.float64).log()
    ids, logprobs = top(teacher, 2)
    without = (logprobs.exp() * (logprobs - moved.gather(-1, ids))).sum()
    assert without < 0
    away = tensor([[0.02, 0.02, 0.48, 0.48]], dtype=torch.float64).log()
    own = away.gather(-1, ids)
    assert (own.exp() * (own - logprobs)).sum() < 0, "the reverse one would be less than 0 for the third"
    assert losses.divergence(same, ids, logprobs, beta).item() == pytest.approx(0, abs=1e-12)
    assert losses.divergence(moved, ids, logprobs, beta).item() > 0.002
    assert losses.divergence(away, ids, logprobs, beta).item() > 0.01


@pytest.mark.parametrize("beta", BETAS)
def test_at_the_teacher_the_gradient_is_zero_whatever_is_told_apart(beta: float) -> None:
    teacher, _ = some(5)
    for k in (1, 4, 11):
        student = teacher.clone().requires_grad_()
        losses.divergence(student, *top(teacher, k), beta).sum().backward()
        assert student.grad is not None
        assert student.grad.abs().max() < 1e-12


@pytest.mark.parametrize("beta", BETAS)
def test_log_probabilities_of_minus_infinity_leave_loss_and_gradients_finite(beta: float) -> None:
    """A teacher masks the rows that pad its vocabulary. Elsewhere this makes nan of beta 0 and inf of beta 1."""
    student = torch.zeros(3, 6, dtype=torch.float64, requires_grad=True)
    ids = tensor([[0, 1, 5, 2, 3, 4], [2, 3, 4, 0, 1, 5], [0, 1, 2, 3, 4, 5]])
    logprobs = tensor([[-0.1, -2.5, -5.0, -INF, -INF, -INF], [0.0, *[-INF] * 5], [*[-1.791759] * 5, -INF]])
    for k in (2, 3, 6):
        found = losses.divergence(student, ids[:, :k], logprobs[:, :k], beta)
        found.sum().backward()
        assert found.isfinite().all()
        assert (found >= 0).all()
        assert student.grad is not None
        assert student.grad.isfinite().all()
    if beta == 0:
        assert found[1].item() == pytest.approx(math.log(6))


def test_the_reverse_divergence_pushes_no_further_than_the_rounding_of_what_is_stored() -> None:
    """The others have nothing in the teacher's eyes only because the sum of the stored ones was rounded to 1."""
    ids, logprobs = tensor([[0, 1]]), tensor([[0.5, 0.5]], dtype=torch.float64).log()

    def force(mass: float) -> float:
        """What the loss asks of the others' logit, where the student gives them `mass`."""
        own = tensor([[(1 - mass) / 2] * 2 + [mass]], dtype=torch.float64)
        student = own.log().requires_grad_()
        losses.divergence(student, ids, logprobs, 1).sum().backward()
        assert student.grad is not None
        return float(student.grad[0, 2])

    assert force(0.1) > force(0.03) > force(0.01) > 1e-2
    assert force(losses.LEAST_OTHERS) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_a_token_that_the_student_does_not_have_counts_among_the_others(beta: float) -> None:
    teacher, student = some(6, vocabulary=8)
    teacher[:, 7] += 3
    ids, logprobs = top(teacher, 4)
    assert (ids == 7).any(-1).all()
    foreign = losses.divergence(student[:, :7], ids, logprobs, beta)
    kept = ids != 7
    for place in range(len(ids)):
        own, expected = ids[place][kept[place]][None], logprobs[place][kept[place]][None]
        alone = losses.divergence(student[place : place + 1, :7], own, expected, beta)
        assert foreign[place].item() == pytest.approx(alone.item(), abs=1e-12)


def test_half_precision_of_the_stored_log_probabilities_costs_little_and_breaks_nothing() -> None:
    teacher, student = some(7, positions=200, vocabulary=50)
    ids, logprobs = top(5 * teacher, 16)
    for beta in BETAS:
        exact, rounded = (losses.divergence(student, ids, given, beta) for given in (logprobs, logprobs.half()))
        torch.testing.assert_close(rounded, exact, rtol=2e-3, atol=2e-2 if beta == 1 else 2e-3)
        sure = losses.divergence(student[:1], tensor([[3, 4]]), tensor([[0.0004, -9.0]]), beta)
        assert sure.isfinite().all()


def test_a_small_rest_of_the_student_is_not_lost_in_rounding() -> None:
    """1 - (1 - 1e-9) is 0 in float32, and its logarithm is no number to learn from."""
    logits = tensor([[25.0, 24.0, 0.0, 0.0]])
    _, student = losses.told_apart(logits, tensor([[0, 1]]), tensor([[-0.5, -1.0]]))
    assert student[0, -1].item() == pytest.approx(math.log(2) - 25 - math.log1p(math.exp(-1)), rel=1e-5)


def test_next_to_its_ends_the_divergence_is_no_divergence_any_more() -> None:
    """What the docs say of beta, and why the API refuses what lies between 0 and 0.05, and between 0.95 and 1."""
    teacher, student = tensor([[0.9, 0.1]]).log(), tensor([[0.1, 0.9]]).log()
    both = top(teacher, 2)
    assert losses.divergence(student, *both, 0).item() == pytest.approx(1.758, abs=1e-3)
    assert losses.divergence(student, *both, 0.001).item() == pytest.approx(0.0018, abs=1e-4)
    small = losses.divergence(student.double(), *both, 1e-6).item()
    assert small / 1e-6 == pytest.approx(losses.divergence(student, *both, 0).item(), rel=1e-4)


def on_average(estimate: Callable[[Tensor, Tensor], Tensor], logits: Tensor, teacher: Tensor) -> Tensor:
    """The gradient of an estimator's mean over all tokens, each as often as the student itself samples it."""
    student = logits.clone().requires_grad_()
    values = estimate(student.log_softmax(-1), teacher)
    (logits.softmax(-1) * values).sum().backward()
    assert student.grad is not None
    return student.grad


def gradient_of(beta: float, logits: Tensor, teacher: Tensor) -> Tensor:
    student = logits.clone().requires_grad_()
    full(teacher, student, beta).sum().backward()
    assert student.grad is not None
    return student.grad


@pytest.mark.parametrize("seed", range(3))
def test_both_losses_of_sampled_tokens_have_the_reverse_divergences_gradient_and_k1_and_k3_do_not(seed: int) -> None:
    """By enumeration over five tokens."""
    teacher, logits = some(seed, positions=1, vocabulary=5)
    teacher, sampler = teacher.log_softmax(-1), logits.log_softmax(-1)
    reverse, forward = gradient_of(1, logits, teacher), gradient_of(0, logits, teacher)
    found = {
        "reward": on_average(lambda s, t: losses.rewarded(s, t, sampler), logits, teacher),
        "loss": on_average(losses.squared, logits, teacher),
        "k1": on_average(lambda s, t: s - t, logits, teacher),
        "k3": on_average(lambda s, t: (t - s).exp() - 1 - (t - s), logits, teacher),
    }
    for form in ("reward", "loss"):
        torch.testing.assert_close(found[form], reverse, rtol=0, atol=1e-12)
    torch.testing.assert_close(found["k1"], torch.zeros_like(reverse), rtol=0, atol=1e-12)
    torch.testing.assert_close(found["k3"], forward, rtol=0, atol=1e-12)
    assert (reverse - forward).abs().max() > 0.01


def test_the_ratio_to_an_older_sampler_keeps_the_gradient_and_the_square_has_none() -> None:
    """A round's later steps learn from samples of the student that it was at the round's beginning."""
    teacher, logits = some(4, positions=1, vocabulary=5)
    teacher, (older, _) = teacher.log_softmax(-1), some(5, positions=1, vocabulary=5)
    sampler = (logits + 0.3 * older).log_softmax(-1)
    reverse = gradient_of(1, logits, teacher)

    def sampled(estimate: Callable[[Tensor], Tensor]) -> Tensor:
        student = logits.clone().requires_grad_()
        (sampler.exp() * estimate(student.log_softmax(-1))).sum().backward()
        assert student.grad is not None
        return student.grad

    rewarded = sampled(lambda s: losses.rewarded(s, teacher, sampler))
    torch.testing.assert_close(rewarded, reverse, rtol=0, atol=1e-12)
    assert (sampled(lambda s: losses.squared(s, teacher)) - reverse).abs().max() > 0.01


def test_the_losses_of_sampled_tokens_are_finite_where_the_teacher_holds_a_token_impossible() -> None:
    student = tensor([-1.0, -2.0], requires_grad=True)
    teacher = tensor([-INF, -3.0])
    for found in (losses.rewarded(student, teacher, student.detach()), losses.squared(student, teacher)):
        (gradient,) = torch.autograd.grad(found.sum(), student)
        assert found.isfinite().all()
        assert gradient.isfinite().all()
        assert gradient[0] > 50 * gradient[1] > 0, "the token becomes less likely"


def test_dpo_is_log_two_at_the_reference_and_falls_as_the_preferred_text_gains() -> None:
    zero = torch.zeros(3)
    torch.testing.assert_close(losses.dpo(zero, zero, 0.1), torch.full((3,), math.log(2)))
    gained = losses.dpo(tensor([0.0, 1.0, 5.0]), zero, 0.5)
    assert gained[0] > gained[1] > gained[2] > 0
    assert losses.dpo(tensor([2.0]), tensor([-1.0]), 0.5).item() == pytest.approx(math.log1p(math.exp(-1.5)))
