"""Which prompts are held out of training."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgd_stages.training.validation_split import count, held_out

PROMPTS = st.lists(st.text("abcdef0123456789", min_size=1, max_size=8), min_size=2, unique=True)


@given(PROMPTS, st.floats(0.001, 0.5), st.integers(0, 9))
def test_at_least_one_prompt_is_held_out_and_never_all_whatever_their_order(
    prompts: list[str], fraction: float, seed: int
) -> None:
    chosen = held_out(prompts, fraction, seed)
    assert 1 <= len(chosen) < len(prompts)
    assert chosen <= set(prompts)
    assert held_out(reversed(prompts), fraction, seed) == chosen


def test_samples_of_a_prompt_count_once() -> None:
    assert len(held_out(["a", "a", "a", "b", "c", "d"], 0.5, 0)) == 2


def test_another_seed_holds_out_others_and_a_higher_fraction_the_same_and_more() -> None:
    prompts = [str(number) for number in range(200)]
    assert held_out(prompts, 0.1, 0) != held_out(prompts, 0.1, 1)
    assert held_out(prompts, 0.1, 0) < held_out(prompts, 0.2, 0)


@pytest.mark.parametrize(
    ("prompts", "fraction", "held"),
    [
        (31, None, 0),
        (1999, None, 0),
        (2000, None, 20),
        (100_000, None, 1000),
        (5_000_000, None, 1000),
        (100_000, 0, 0),
        (100_000, 0.02, 2000),
        (31, 0.02, 1),
        (1, 0.5, 0),
        (0, 0.5, 0),
    ],
)
def test_how_many_are_held_out(prompts: int, fraction: float | None, held: int) -> None:
    assert count(prompts, fraction) == held
