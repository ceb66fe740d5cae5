"""Paraphrases: which texts say much of a benchmark's question, and which only look like it."""

import itertools
import random

import pytest

from cgd_stages.quality.contamination import Questions
from cgd_stages.quality.paraphrases import Findings, Originals
from cgd_stages.store.rows import Row

QUESTION = (
    "Nora sold 48 candles to her neighbours in April. In May she sold half as many candles at the market. The rest of "
    "the year she sold none. How many candles did Nora sell altogether in April and May?"
)
OTHER_NAMES = QUESTION.replace("Nora", "Pavel").replace("her", "his").replace("she", "he")
OTHER_NUMBERS = QUESTION.replace("48", "62")
OTHER_ORDER = (
    "The rest of the year she sold none. In May she sold half as many candles at the market. Nora sold 48 candles to "
    "her neighbours in April. How many candles did Nora sell altogether in April and May?"
)
INSIDE = (
    f"Here is a task of the week that you should solve step by step and check twice. {OTHER_NAMES} Explain every step "
    "that you take so that a beginner can follow it, and write the result in a line of its own at the end."
)
UNRELATED = (
    "A tank holds 48 litres. Every hour 3 litres leak out of it, and Nora pours 2 litres in. How many hours does it "
    "take until the tank is empty, and how many litres did Nora pour in altogether by then?"
)
CHINESE = (
    "\u5c0f\u660e\u56db\u6708\u5356\u4e8648\u652f\u8721\u70db\uff0c\u4e94\u6708\u5356\u51fa"
    "\u7684\u8721\u70db\u662f\u56db\u6708\u7684\u4e00\u534a\u3002\u4ed6\u4e00\u5171\u5356\u4e86\u591a"
    "\u5c11\u652f\u8721\u70db\uff1f"
)
THAI = (
    "\u0e19\u0e34\u0e14\u0e32\u0e02\u0e32\u0e22\u0e40\u0e17\u0e35\u0e22\u0e19\u0e43\u0e19\u0e40\u0e14\u0e37\u0e2d\u0e19"
    "\u0e40\u0e21\u0e29\u0e32\u0e22\u0e19 48 \u0e40\u0e25\u0e48\u0e21 \u0e41\u0e25\u0e30\u0e02\u0e32\u0e22\u0e04\u0e23"
    "\u0e36\u0e48\u0e07\u0e2b\u0e19\u0e36\u0e48\u0e07\u0e43\u0e19\u0e40\u0e14\u0e37\u0e2d\u0e19\u0e1e\u0e24\u0e29\u0e20"
    "\u0e32\u0e04\u0e21"
)


def question(prompt: str, identity: str = "q1", reference: str = "") -> Row:
    return {"benchmark": "b", "id": identity, "prompt": prompt, "reference": reference}


def found(original: str, text: str, similarity: float = 0.5) -> bool:
    return bool(Originals([question(original)], similarity).paraphrased(text))


@pytest.mark.parametrize("text", [QUESTION.upper(), OTHER_NAMES, OTHER_NUMBERS, OTHER_ORDER, INSIDE])
def test_a_question_with_other_names_numbers_or_order_and_inside_a_longer_text_is_found(text: str) -> None:
    assert found(QUESTION, text)


@pytest.mark.parametrize("text", [UNRELATED, "", "How many candles did Nora sell altogether?", "48 " * 500])
def test_a_text_that_only_shares_a_subject_or_a_phrase_is_not(text: str) -> None:
    assert not found(QUESTION, text)


def test_a_question_with_other_names_shares_too_few_words_in_a_row_for_a_copy() -> None:
    text = OTHER_NAMES.replace("candles", "lamps")
    assert Questions([question(QUESTION)], 13).match(text) is None
    assert found(QUESTION, text, 0.3)


def test_the_similarity_decides() -> None:
    assert [found(QUESTION, OTHER_NAMES, share) for share in (0.3, 0.5, 0.9)] == [True, True, False]
    assert found(QUESTION, QUESTION, 1.0)


@pytest.mark.parametrize(
    ("text", "others"),
    [
        (CHINESE, CHINESE.replace("\u5c0f\u660e", "\u5f20\u4f1f")),
        (THAI, THAI.replace("\u0e19\u0e34\u0e14\u0e32", "\u0e2a\u0e21\u0e0a\u0e32\u0e22")),
    ],
)
def test_scripts_without_blanks_are_compared_by_their_characters(text: str, others: str) -> None:
    assert text != others
    assert found(text, others)
    assert not found(text, THAI if text == CHINESE else CHINESE)
    assert not found(text, text[: len(text) // 4])


def test_a_script_with_letters_and_no_blanks_is_compared_four_characters_at_a_time() -> None:
    letters = "".join(random.Random(1).choices([chr(code) for code in range(0x0E01, 0x0E2F)], k=60))
    assert found(letters, letters[:30] + "\u0e01\u0e02" + letters[32:])
    assert not found(letters, letters[::-1])


def test_the_share_is_of_the_question_alone() -> None:
    (match,) = Originals([question(QUESTION)], 0.5).paraphrased(f"{UNRELATED} {QUESTION} {UNRELATED}")
    assert match.similarity == 1.0


@pytest.mark.parametrize("text", ["", "?!", "What is 2 + 3?", "How many apples does Ann have?", "12 34 " * 40])
def test_a_question_of_few_words_or_of_numbers_alone_is_not_looked_for(text: str) -> None:
    assert not found(text, f"{text} {text} and more words that follow it")


def test_a_reference_of_a_benchmark_is_looked_for_too() -> None:
    solution = "Nora sold 48 / 2 = 24 candles in May, so altogether she sold 48 + 24 = 72 candles in both months."
    originals = Originals([question("Candles?", reference=solution)], 0.5)
    (match,) = originals.paraphrased(solution.replace("Nora", "Pavel"))
    assert (match.part, match.question) == ("reference", "q1")
    assert str(match).endswith("of the word triples of the reference of the question q1 of b")
    numbers = "48 / 2 = 24, 48 + 24 = 72, 72 - 5 = 67, 67 * 2 = 134, 134 + 6 = 140"
    assert not Originals([question("Candles?", reference=numbers)], 0.5).paraphrased(numbers)


def test_the_index_overlooks_no_question() -> None:
    """Held against every pair, where many share much."""
    rng = random.Random(5)
    vocabulary = [f"word{number}" for number in range(60)]
    originals = [" ".join(rng.choices(vocabulary, k=rng.randint(12, 40))) for _ in range(60)]
    texts = []
    for original in originals:
        words = original.split()
        for _ in range(rng.randint(0, len(words) // 4)):
            words[rng.randrange(len(words))] = rng.choice(vocabulary)
        texts.append(" ".join(words))

    def triples(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return set(zip(words, words[1:], words[2:], strict=False))

    for similarity in (0.3, 0.5, 0.8, 1.0):
        index = Originals([question(text, str(number)) for number, text in enumerate(originals)], similarity)
        for text in texts:
            shares = [len(triples(one) & triples(text)) / len(triples(one)) for one in originals]
            truth = {str(number) for number, share in enumerate(shares) if share >= similarity}
            assert {match.question for match in index.paraphrased(text)} == truth


def test_findings_name_the_closest_row_whatever_the_order() -> None:
    originals = Originals([question(QUESTION), question(UNRELATED, "q2")], 0.5)
    rows: list[tuple[Row, dict[str, str | None]]] = [
        ({"id": "a", "sample": 0}, {"prompt": OTHER_NAMES, "reference": None}),
        ({"id": "b", "sample": 0}, {"prompt": UNRELATED, "reference": QUESTION}),
        ({"id": "b", "sample": 1}, {"prompt": UNRELATED, "reference": QUESTION}),
        ({"id": "c", "sample": 0}, {"prompt": "Nothing of the kind", "reference": ""}),
    ]
    lists = []
    for order in itertools.permutations(rows):
        findings = Findings(originals)
        details = {row["id"]: findings.add(row, texts) for row, texts in order}
        assert details["c"] == ""
        assert details["a"].startswith("the prompt has ")
        assert details["b"].endswith("of the word triples of the question q1 of b")
        assert findings.metrics == {"paraphrased": 3.0, "paraphrased_questions": 2.0}
        lists.append(findings.questions())
    assert all(one == lists[0] for one in lists)
    first, second = lists[0]
    assert (first["question"], first["rows"], first["id"], first["sample"]) == ("q1", 3, "b", 0)
    assert (first["text"], first["similarity"], second["rows"]) == ("reference", 1.0, 2)


def test_a_benchmark_without_questions_finds_nothing() -> None:
    assert Originals([], 0.5).paraphrased(QUESTION) == []
