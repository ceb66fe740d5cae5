"""Which examples are learned when, by whom and at which rate."""

from collections import Counter
from itertools import pairwise

import pytest

from cgd_stages.training.batching import Schedule, learning_rate

LENGTHS = [10 + 7 * (index % 9) for index in range(53)]


def schedule(**changes: int) -> Schedule:
    given = {"global_batch_size": 8, "epochs": 2, "seed": 1} | changes
    return Schedule(LENGTHS, **given)


def test_an_epoch_learns_every_example_once_and_keeps_the_rest_in_its_last_batch() -> None:
    plan = schedule()
    assert (plan.steps_per_epoch, plan.steps) == (7, 14)
    for epoch in range(2):
        batches = [plan.batch(epoch * 7 + position) for position in range(7)]
        assert [len(batch) for batch in batches] == [8] * 6 + [5]
        assert sorted(index for batch in batches for index in batch) == list(range(53))


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    assert schedule().batch(3) == schedule().batch(3)
    assert schedule().batch(3) != schedule(seed=2).batch(3)
    assert schedule().batch(3) != schedule().batch(3 + 7)


def test_examples_seen_are_counted_over_epochs() -> None:
    assert [schedule().seen(step) for step in (0, 1, 6, 7, 8, 14)] == [0, 8, 48, 53, 61, 106]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("step", [0, 6])
@pytest.mark.parametrize("packing", [False, True])
def test_any_number_of_ranks_learns_exactly_the_global_batch(world: int, step: int, packing: bool) -> None:
    plan = schedule()
    shares = [plan.micro_batches(step, rank=rank, world=world, budget=120, packing=packing) for rank in range(world)]
    dealt = Counter(index for share in shares for batch in share for index in batch)
    assert dealt == Counter(plan.batch(step))
    assert len({len(share) for share in shares}) == 1, "every rank must take part in every micro-batch"


def test_a_micro_batch_fits_the_budget_with_its_padding_and_one_example_always_fits() -> None:
    plan = schedule(global_batch_size=53)
    for batch in plan.micro_batches(0, rank=0, world=1, budget=120, packing=False):
        assert len(batch) * max(LENGTHS[index] for index in batch) <= 120
    assert all(len(batch) == 1 for batch in plan.micro_batches(0, rank=0, world=1, budget=1, packing=False))


def test_a_pack_is_as_full_as_its_next_example_allows_and_one_example_always_fits() -> None:
    packs = schedule(global_batch_size=53).micro_batches(0, rank=0, world=1, budget=120, packing=True)
    sizes = [sum(LENGTHS[index] for index in pack) for pack in packs]
    assert max(sizes) <= 120
    assert all(size + LENGTHS[after[0]] > 120 for size, after in zip(sizes[:-1], packs[1:], strict=True))
    alone = schedule().micro_batches(0, rank=0, world=1, budget=1, packing=True)
    assert all(len(pack) == 1 for pack in alone)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("world", "budget"), [(1, 120), (1, 10_000), (4, 120), (16, 120), (4, 80)])
def test_no_micro_batch_has_more_tokens_than_is_said(world: int, budget: int, packing: bool) -> None:
    plan = schedule()
    sizes = [
        sum(LENGTHS[index] for index in batch) if packing else len(batch) * LENGTHS[batch[0]]
        for step in range(plan.steps)
        for rank in range(world)
        for batch in plan.micro_batches(step, rank=rank, world=world, budget=budget, packing=packing)
        if batch
    ]
    most = plan.most_tokens(world=world, budget=budget)
    assert max(sizes) <= most <= max(budget, max(LENGTHS))
    assert most <= 2 * max(sizes)


def test_the_work_is_dealt_out_evenly() -> None:
    plan = schedule(global_batch_size=40)
    tokens = [
        sum(LENGTHS[i] for batch in plan.micro_batches(0, rank=rank, world=4, budget=500, packing=False) for i in batch)
        for rank in range(4)
    ]
    assert max(tokens) - min(tokens) <= max(LENGTHS)


def test_the_rate_warms_up_in_a_line_and_falls_in_a_cosine() -> None:
    rates = [learning_rate(step, steps=100, peak=1.0, warmup_ratio=0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert all(late < early for early, late in pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.001


def test_without_warm_up_the_first_step_has_the_peak_rate() -> None:
    assert learning_rate(0, steps=10, peak=1e-6, warmup_ratio=0.0) == 1e-6


def test_a_single_step_learns_too() -> None:
    assert learning_rate(0, steps=1, peak=1.0, warmup_ratio=0.0) == 1.0
    assert learning_rate(0, steps=1, peak=1.0, warmup_ratio=1.0) == 1.0
