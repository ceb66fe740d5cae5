"""Contamination: which prompts share words with a benchmark's questions, and which only look like it."""

import pytest

from cgd_stages.quality.contamination import Questions

LONG = "A train leaves Oslo at nine and another leaves Bergen at ten; when do the two trains meet on their way?"
SHORT = "How many sides has a hexagon?"


def match(question: str, prompt: str, ngram: int = 13) -> str | None:
    found = Questions([{"benchmark": "b", "id": "q1", "prompt": question}], ngram).match(prompt)
    return found and found.words


def test_a_match_says_which_question_of_which_benchmark_shares_which_words():
    asked = [{"benchmark": "a", "id": "q1", "prompt": SHORT}, {"benchmark": "b", "id": "q2", "prompt": LONG}]
    found = Questions(asked, 5).match("Tell me when the two trains meet: when do the two trains meet on their way")
    assert str(found) == "shares words with the question q2 of b: 'when do the two trains meet on their way'"


@pytest.mark.parametrize(
    ("prompt", "shared"),
    [
        (LONG.upper().replace(";", " -- "), 21),
        ("So: " + " ".join(LONG.split()[3:16]) + "?", 13),
        (" ".join(LONG.split()[:13]), 13),
        (" ".join(LONG.split()[-13:]), 13),
        (" ".join(LONG.split()[:12]), None),
        (" ".join(LONG.split()[-12:]), None),
        (LONG.replace("nine", "noon"), 15),
        (LONG.replace("ten", "two"), None),
    ],
)
def test_thirteen_words_in_a_row_are_a_match_whatever_their_case_and_punctuation(prompt, shared):
    words = match(LONG, prompt)
    assert (words and len(words.split())) == shared


@pytest.mark.parametrize("ngram", range(5, 22))
def test_no_place_in_a_question_is_overlooked(ngram):
    words = LONG.split()
    found = [match(LONG, " ".join(words[start : start + ngram]), ngram) for start in range(len(words) - ngram + 1)]
    assert all(found)
    assert len(found) == 22 - ngram


def test_a_question_of_fewer_words_is_looked_for_as_a_whole():
    assert match(SHORT, f"Warm up. {SHORT} Then go on.") == "how many sides has a hexagon"
    assert match(SHORT, "How many sides has a square, and how many a hexagon?") is None


def test_a_question_of_four_words_is_matched_by_the_same_text_only():
    assert match("What is 2 + 3?", " what is  2 + 3? ") == "What is 2 + 3?"
    assert match("What is 2 + 3?", "What is 2 - 3?") is None
    assert match("What is 2 + 3?", "What is 2 + 3? And 4 + 4?") is None


def test_a_script_without_blanks_is_compared_by_characters():
    question = "\u4e00\u4e2a\u6570\u7684\u4e09\u500d\u662f\u4e5d"
    assert match(question, f"\u95ee\uff1a{question}\uff0c\u6c42\u8fd9\u4e2a\u6570") == " ".join(question)


def test_letters_of_another_width_or_composition_are_the_same_letters():
    assert match("le caf\u00e9 est tr\u00e8s bon ici", "Le cafe\u0301 est tre\u0300s bon \uff49ci") is not None
