"""What is taken as the answer of an output and of a reference."""

import pytest

from cgd_stages.grading.extraction import FoundAnswer, find_answer
from cgd_stages.grading.reference import reference_answer


@pytest.mark.parametrize(
    ("output", "text", "source"),
    [
        (r"So we get \boxed{18}.", "18", "boxed"),
        (r"First \boxed{1}, but really it is \boxed{\frac{1}{2}}", r"\frac{1}{2}", "boxed"),
        (r"The roots are $\boxed{1}$ and $\boxed{-2}$.", "1, -2", "boxed"),
        (r"\boxed{1}, \boxed{2}, and \boxed{3}", "1, 2, 3", "boxed"),
        (r"Step: \boxed{1} is not it. So \boxed{2}", "2", "boxed"),
        (r"\boxed{\text{the set } \{1, 2\}}", r"\text{the set } \{1, 2\}", "boxed"),
        (r"\fbox{7}", "7", "boxed"),
        (r"\boxed 7", "7", "boxed"),
        (r"\boxed{\boxed{7}}", "{7}", "boxed"),
        (r"\boxed{} and then the answer is 4", "4", "text"),
        (r"unclosed \boxed{12", "", "none"),
        (r"First \boxed{7}, no: \boxed{8", "", "none"),
        ("\\boxed{x > 2} fits one.\n**Answer: D**", "D", "text"),
        ("Answer: 12 - 5 = 7", "7", "text"),
        ("It is 5 hours.", "5 hours", "text"),
        (r"So $y = 2x + 1 = 1 + 2x$.", "y = 1 + 2x", "text"),
        ("16 - 3 = 13\n#### 13", "13", "text"),
        ("The answer is 5. The answer is 18 eggs per day.", "18", "text"),
        ("the final answer is: **$1,250** a year", "$1,250", "text"),
        (r"The answer is $\frac{3}{4}$ of 8.", r"\frac{3}{4}", "text"),
        (r"The answer is $\$32,\!348$.", r"\$32,\!348", "text"),
        ("The answer is Evelyn.", "Evelyn", "text"),
        ("Answer: -3.5", "-3.5", "text"),
        ("The answer is 3 and 5.", "3, 5", "text"),
        (r"The solutions are $x=1$, $x=-2$ and $x = 4$ as shown.", "x=1, x=-2, x = 4", "text"),
        ("The answer is 3 for 5 people.", "3", "text"),
        ("3 boxes of 4 make 12", "12", "text"),
        ("It costs $1,250.50 in all.", "$1,250.50", "text"),
        ("half of it, 1/2", "1/2", "text"),
        ("a share of 25 %", "25 %", "text"),
        ("I do not know.", "", "none"),
        ("", "", "none"),
    ],
)
def test_the_answer_is_found_and_it_is_told_where(output: str, text: str, source: str) -> None:
    assert find_answer(output) == FoundAnswer(text, source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reference", "value"),
    [
        ("16 eggs\n#### 18", "18"),
        ("#### 70,000", "70,000"),
        (r"Therefore $\boxed{\left( 3, \frac{\pi}{2} \right)}$.", r"\left( 3, \frac{\pi}{2} \right)"),
        (" 18 ", "18"),
        ('["$1$, $-2$"]', "$1$, $-2$"),
        ('["1", "2"]', "1, 2"),
        ("[1, 2]", "[1, 2]"),
        (r"\text{Evelyn}", r"\text{Evelyn}"),
    ],
)
def test_a_reference_is_read_in_each_of_its_forms(reference: str, value: str) -> None:
    assert reference_answer(reference) == value


@pytest.mark.parametrize(
    ("reference", "value"),
    [
        ("<think>12 + 5</think>\n\n17", "17"),
        ("<think>Is it \\boxed{3}? No.</think> The answer is 17.", "17"),
        ("<think>Is it \\boxed{3}?</think>It is \\boxed{17}.", "17"),
        ("#### 3\n</think>\n#### 17", "17"),
        ("<think>12 + 5</think>\n<answer> 17 </answer>", "17"),
        ("<think>12 + 5</think>\n**17**", "17"),
        ("<think>12 + 5</think>\n**Answer: D**", "D"),
        ("[THINK]\\boxed{3}[/THINK]17", "17"),
        (
            "<|channel|>analysis<|message|>3?<|end|><|start|>assistant<|channel|>final<|message|>\\boxed{17}<|return|>",
            "17",
        ),
        ("<think>It may be \\boxed{3}", ""),
        ("<think>12 + 5</think>", ""),
    ],
)
def test_a_thought_of_a_reference_never_counts(reference: str, value: str) -> None:
    assert reference_answer(reference) == value
