"""Which steps and which examples each round of an on-policy training has: the same for whoever computes it."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgd_stages.contract import Engine, Model, OnPolicy, Train
from cgd_stages.training.rounds import Rounds, weights_of

KEYS = [(f"{number:020x}", sample) for number in range(26) for sample in range(2)]
LENGTHS = [10 + number % 7 for number in range(len(KEYS))]


def rounds(share: float = 1.0, refresh: int = 3, *, seed: int = 1, batch: int = 8, epochs: int = 2) -> Rounds:
    student = Model(name="student")
    drawn = OnPolicy(
        share=share, refresh=refresh, max_tokens=9, engine=Engine(), teacher=student, teacher_engine=Engine()
    )
    work = Train(
        objective="GKD", student=student, global_batch_size=batch, epochs=epochs, seed=seed, max_rejected=0.0,
        on_policy=drawn,
    )  # fmt: skip
    return Rounds.of(work, KEYS, LENGTHS)


def test_every_step_is_in_one_round_and_the_last_round_has_the_rest() -> None:
    plan = rounds()
    assert plan.schedule.steps == 14
    assert plan.count == 5
    steps = [step for number in range(plan.count) for step in plan.steps(number)]
    assert steps == list(range(14))
    assert list(plan.steps(4)) == [12, 13]
    assert all(plan.round_of(step) == number for number in range(plan.count) for step in plan.steps(number))


def test_with_a_share_of_one_everything_is_sampled_once_in_each_epoch() -> None:
    plan = rounds()
    asked = [one for number in range(plan.count) for one in plan.asked(number)]
    assert Counter(index for _, index in asked) == dict.fromkeys(range(len(KEYS)), 2)
    assert all(index in plan.schedule.batch(step) for step, index in asked)


@given(share=st.floats(0.01, 1.0), batch=st.integers(1, 9), epochs=st.integers(1, 3))
def test_the_share_is_kept_over_all_steps_also_where_a_step_has_less_than_one(
    share: float, batch: int, epochs: int
) -> None:
    plan = rounds(share, batch=batch, epochs=epochs)
    counts = [len(plan.sampled(step)) for step in range(plan.schedule.steps)]
    for step in range(plan.schedule.steps):
        assert abs(sum(counts[: step + 1]) - share * plan.schedule.seen(step + 1)) <= 1
    assert max(counts) <= batch


def test_the_choice_follows_from_seed_step_and_key_alone() -> None:
    assert rounds(0.5).sampled(4) == rounds(0.5, refresh=1).sampled(4)
    assert any(rounds(0.5).sampled(step) != rounds(0.5, seed=2).sampled(step) for step in range(14))
    whole = rounds(0.5, batch=len(KEYS))
    first, second = (set(whole.sampled(step)) for step in range(2))
    assert first != second, "another epoch samples other prompts"


def test_what_is_sampled_is_in_the_order_of_the_step() -> None:
    plan = rounds(0.5)
    batch = plan.schedule.batch(3)
    assert plan.sampled(3) == sorted(plan.sampled(3), key=batch.index)


@pytest.mark.parametrize(("number", "prefix"), [(1, "weights/00001/"), (12345, "weights/12345/")])
def test_the_weights_of_a_round_have_a_folder(number: int, prefix: str) -> None:
    assert weights_of(number) == prefix
