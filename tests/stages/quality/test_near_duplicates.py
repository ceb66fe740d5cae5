"""Near-duplicates by MinHash, held against the similarities themselves."""

import itertools
import math
import random

import numpy as np
import pytest

from cgd_stages.quality.near_duplicates import ALIKE, HASHES, WORDS, Signatures, alike, signature

Text = tuple[str, ...]

VOCABULARY = [f"word{i}" for i in range(2000)]


def runs_of(text: Text) -> set[Text]:
    return {text[i : i + WORDS] for i in range(max(1, len(text) - WORDS + 1))}


def jaccard(one: set[Text], other: set[Text]) -> float:
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def written(rng: random.Random, least: int = 20, most: int = 120) -> Text:
    return tuple(rng.choices(VOCABULARY, k=rng.randint(least, most)))


def edited(rng: random.Random, text: Text, edits: int) -> Text:
    words = list(text)
    for _ in range(edits):
        words[rng.randrange(len(words))] = rng.choice(VOCABULARY)
    return tuple(words)


def pairs_of(texts: list[Text]) -> set[tuple[int, int]]:
    return set(alike(np.stack([signature(text) for text in texts])))


def grouped(*texts: Text) -> Signatures:
    found = Signatures()
    for number, text in enumerate(texts):
        found.add(f"{number:04d}", text)
    return found


def corpus() -> list[Text]:
    """Texts, and for each one that shares from little to nearly all of it."""
    rng = random.Random(7)
    texts = [written(rng) for _ in range(150)]
    return texts + [edited(rng, text, rng.randint(0, len(text) // 8)) for text in texts]


def test_what_is_surely_alike_is_found_and_what_is_surely_not_is_not() -> None:
    texts = corpus()
    found = pairs_of(texts)
    runs = [runs_of(text) for text in texts]
    truth = {(i, j): jaccard(runs[i], runs[j]) for i, j in itertools.combinations(range(len(texts)), 2)}
    assert {pair for pair, similarity in truth.items() if similarity >= 0.9} <= found
    assert min(truth[pair] for pair in found) > 0.7
    near = [pair for pair, similarity in truth.items() if similarity >= ALIKE]
    assert len(found & set(near)) >= 0.85 * len(near)


def test_the_estimate_has_the_error_that_is_told_and_no_bias() -> None:
    texts = corpus()
    errors, variances = [], []
    for one, other in zip(texts[:150], texts[150:], strict=True):
        similarity = jaccard(runs_of(one), runs_of(other))
        errors.append(float((signature(one) == signature(other)).mean()) - similarity)
        variances.append(similarity * (1 - similarity) / HASHES)
    assert abs(sum(errors)) < 3 * math.sqrt(sum(variances))
    assert sum(error**2 for error in errors) == pytest.approx(sum(variances), rel=0.35)


def test_a_text_that_all_share_hides_no_pair() -> None:
    rng = random.Random(3)
    shared = tuple(rng.choices(VOCABULARY, k=72))
    tails = [tuple(rng.choices(VOCABULARY, k=28)) for _ in range(300)]
    texts = [shared + tail for tail in tails] + [shared + tail[:-1] + ("other",) for tail in tails]
    assert pairs_of(texts) == {(number, number + 300) for number in range(300)}


def test_groups_are_the_same_in_whatever_order_prompts_come() -> None:
    rng = random.Random(5)
    texts = {f"{number:04d}": text for number, text in enumerate(corpus())}
    first, second = Signatures(), Signatures()
    for identity in texts:
        first.add(identity, texts[identity])
    for identity in rng.sample(sorted(texts), len(texts)):
        second.add(identity, texts[identity])
    assert first.groups() == second.groups()


def test_groups_hang_together_by_their_pairs_and_the_largest_comes_first() -> None:
    rng = random.Random(1)
    long, short = written(rng, 100, 100), written(rng, 50, 50)
    chain = [long, edited(rng, long, 1)]
    chain.append(edited(rng, chain[1], 1))
    large, small = grouped(written(rng), short, *chain, short).groups()
    assert (large.ids, large.pair) == (("0002", "0003", "0004"), ("0002", "0003"))
    assert (small.ids, small.pair) == (("0001", "0005"), ("0001", "0005"))


@pytest.mark.parametrize("text", [("one",), ("one", "two"), ("one", "two", "three")])
def test_short_prompts_are_alike_when_they_are_the_same(text: Text) -> None:
    assert len(grouped(text, text).groups()) == 1
    assert grouped(text, (*text[:-1], "other")).groups() == []


def test_of_no_prompt_and_of_one_there_are_no_groups() -> None:
    assert grouped().groups() == grouped(("one",)).groups() == []


def test_of_many_that_are_the_same_each_is_compared_with_few() -> None:
    """In a bucket of n there are n - 1 neighbours, not n squared pairs."""
    text = written(random.Random(2))
    assert len(alike(np.stack([signature(text)] * 3000))) < 3 * 3000
    (group,) = grouped(*[text] * 3000).groups()
    assert len(group.ids) == 3000
