"""The audit of grades, with lm-eval's own code."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from support.report_builders import sample, samples

from cgd_stages.report.audit import END, audit, chosen, is_right
from cgd_stages.results.model import Key, Sample
from cgd_stages.text.references import any_of


def marks(outputs: Sequence[Sample], keys: set[Key]) -> Counter[bool]:
    return Counter(output.correct for output in outputs if output.key in keys)


@pytest.mark.parametrize(
    ("given", "most", "right", "wrong"),
    [
        ("+" * 30 + "-" * 30, 20, 10, 10),
        ("+" * 30 + "-" * 30, 5, 2, 3),
        ("+" * 30 + "-" * 3, 20, 17, 3),
        ("+" * 3 + "-" * 30, 20, 3, 17),
        ("+" * 3 + "-" * 4, 20, 3, 4),
        ("+" * 30, 1, 1, 0),
    ],
)
def test_half_of_the_outputs_are_right_as_far_as_there_are_enough(
    given: str, most: int, right: int, wrong: int
) -> None:
    outputs = samples(given)
    assert marks(outputs, chosen(outputs, most)) == Counter({True: right, False: wrong})


def test_each_benchmark_has_its_own_outputs_the_same_whatever_their_order() -> None:
    outputs = [*samples("+-" * 20), *samples("+-" * 20, benchmark="products")]
    keys = chosen(outputs, 6)
    assert Counter(benchmark for benchmark, _, _ in keys) == {"sums": 6, "products": 6}
    assert chosen(reversed(outputs), 6) == keys


def test_what_the_grader_could_not_decide_on_is_not_judged_again() -> None:
    assert chosen([sample(correct=False, grade_error="timeout"), sample("q2", correct=True)], 4) == {("sums", "q2", 0)}


@pytest.mark.parametrize(
    ("reference", "output", "right"),
    [
        ("4", r"First \boxed{5}, no: \boxed{4}.", True),
        (r"\frac{1}{2}", r"\boxed{\dfrac12}", True),
        (r"\frac{1}{2}", r"\boxed{0.5}", True),
        (r"\frac{1}{4}", r"\boxed{0.25}", False),
        ("4", "With $x = 2$ it is $4$.", False),
        ("4", "It is $4$.", True),
        ("4", "The answer is 4.", False),
        ("4", "", False),
        (r"We add and get $\boxed{4}$.", r"\boxed{4}", True),
        ("2 + 2 = <<2+2=4>>4\n#### 4", r"\boxed{4}", True),
        (any_of(["four", "4"]), r"\boxed{4}", True),
        (any_of(["four", "5"]), r"\boxed{4}", False),
        (r"<think>Is it \boxed{3}?</think>So it is \boxed{4}.", r"\boxed{4}", True),
        (r"<think>Is it \boxed{3}?</think>4", r"\boxed{4}", True),
        (r"<think>Is it \boxed{3}?</think>4", r"\boxed{3}", False),
        (r"\fbox{4}", r"\boxed{4}", False),
        (r"\boxed{4", r"\boxed{4", True),
    ],
)
def test_lm_eval_takes_the_last_box_and_compares_spellings(reference: str, output: str, right: bool) -> None:
    assert is_right(reference, output) is right


@pytest.mark.parametrize("text", ["x", "$", "1/", "{", r"\boxed{", r"\frac1", "#### "])
def test_no_text_takes_time_that_grows_with_the_square_of_its_length(text: str) -> None:
    assert not is_right(text * 500_000 + "4", text * 500_000 + "5")


def row(identity: str, answer: str, *, correct: bool, **changes: Any) -> dict[str, Any]:
    given = {"benchmark": "sums", "id": identity, "sample": 0, "reference": "4", "extracted": answer, "rule": "value"}
    return given | {"output": f"So it is \\boxed{{{answer}}}.", "correct": correct} | changes


def test_outputs_are_counted_by_benchmark_and_model_and_grades_that_may_be_mistaken_come_first() -> None:
    found = audit(
        [
            ("cgd", row("a", "8/2", correct=True)),
            ("cgd", row("b", "4", correct=False)),
            ("base", row("c", "4", correct=True, output="It is 4.")),
            ("base", row("d", "4", correct=True)),
            ("cgd", row("e", "7", correct=False, benchmark="products")),
        ],
        ["base", "cgd"],
    )
    assert [tuple(count.model_dump().values()) for count in found.counts] == [
        ("products", "cgd", 0, 1, 0, 0, 0),
        ("sums", "base", 1, 0, 0, 1, 1),
        ("sums", "cgd", 0, 0, 1, 1, 0),
    ]
    assert [(one.id, one.correct, one.boxed) for one in found.disagreements] == [
        ("b", False, True),
        ("a", True, True),
        ("c", True, False),
    ]


def test_of_a_long_text_the_end_is_kept_and_of_several_references_each() -> None:
    texts = {"output": "x" * 1000 + r"\boxed{4}", "reference": any_of(["4", "four"])}
    (one,) = audit([("base", row("a", "4", correct=False, rule=None) | texts)], ["base"]).disagreements
    assert one.output == "\u2026" + "x" * (END - 9) + r"\boxed{4}"
    assert (one.reference, one.rule) == ("4\nor four", "")
