"""Self-Refine and Reflexion: the same model answers, criticises and answers again; what counts as its answer, and what
it costs."""

import threading
from collections.abc import Callable

import pytest
from support.stage_builders import RuleEngine, said

from cgd_stages.contract import Rival, RivalKind, Sampling
from cgd_stages.engines.base import Completion, Refused, Reply, Request, drive
from cgd_stages.evaluate.multi_pass import Dialogue, Dialogues
from cgd_stages.method.prompts import answer_messages, critique_messages, refine_messages, retry_messages
from cgd_stages.store.rows import Row

QUESTION = "What is 1 + 1?"
WRONG, RIGHT = "Look again.\nConclusion: wrong", "Fine.\nConclusion: right"
CUT = ("and so on", "length")
Given = str | tuple[str, str] | None
"""A text, a text and its finish reason, or a refusal."""


def question(number: int = 0) -> Row:
    return {"benchmark": "sums", "id": f"{number:020x}", "sample": 0, "prompt": QUESTION}


def replies(*given: Given) -> Callable[[Request], Reply]:
    """A model that says one thing after the other; None: it is refused."""
    left = list(given)

    def rule(request: Request) -> Reply:
        match left.pop(0):
            case None:
                return Refused(request.name, "too_long", "too long", 99)
            case (text, reason):
                return said(request, text, reason)
            case text:
                return said(request, str(text))

    return rule


def draw(engine: RuleEngine, kind: RivalKind, samples: int) -> Dialogue:
    """The dialogue about one question with a rival that draws several answers."""
    rival = Rival(kind=kind, samples=samples)
    dialogues = Dialogues([("q0", question())], Sampling(max_tokens=8, temperature=0.5), rival)
    (ended,) = [
        ended
        for reply in drive(engine, dialogues.take, threading.Event())
        if (ended := dialogues.note(reply)) is not None
    ]
    return ended


def play(engine: RuleEngine, rounds: int, questions: int = 1, kind: RivalKind = "SelfRefine") -> list[Dialogue]:
    named = [(f"q{number}", question(number)) for number in range(questions)]
    dialogues = Dialogues(
        named, Sampling(max_tokens=8, temperature=0.5), Rival(kind=kind, rounds=rounds) if rounds else None
    )
    replies = drive(engine, dialogues.take, threading.Event())
    return [ended for reply in replies if (ended := dialogues.note(reply))]


def test_the_model_sees_its_own_answer_and_critique_in_the_teachers_words() -> None:
    engine = RuleEngine(replies("one", WRONG, "<think>hm</think>two", WRONG, "three"))
    (ended,) = play(engine, rounds=2)
    assert [request.messages for request in engine.asked] == [
        answer_messages(QUESTION),
        critique_messages(QUESTION, "one"),
        refine_messages(QUESTION, "one", WRONG),
        critique_messages(QUESTION, "two"),
        refine_messages(QUESTION, "two", WRONG),
    ]
    assert (ended.reply.name, text_of(ended), ended.passes) == ("q0", "three", 5)


def test_reflexion_answers_anew_with_its_last_three_reflections_and_without_its_answers() -> None:
    thoughts = [f"Thought {number}.\nConclusion: wrong" for number in range(1, 5)]
    engine = RuleEngine(
        replies("one", thoughts[0], "two", thoughts[1], "three", thoughts[2], "four", thoughts[3], "five")
    )
    (ended,) = play(engine, rounds=4, kind="Reflexion")
    assert [request.messages for request in engine.asked[:3]] == [
        answer_messages(QUESTION),
        critique_messages(QUESTION, "one"),
        retry_messages(QUESTION, thoughts[:1]),
    ]
    last = engine.asked[-1].messages[-1]["content"]
    assert engine.asked[-1].messages == retry_messages(QUESTION, thoughts[1:])
    assert "four" not in last
    assert thoughts[0] not in last
    assert (text_of(ended), ended.passes) == ("five", 9)


def text_of(dialogue: Dialogue) -> str:
    assert isinstance(dialogue.reply, Completion)
    return dialogue.reply.text


@pytest.mark.parametrize("kind", ["SelfRefine", "Reflexion"])
@pytest.mark.parametrize(
    ("given", "text", "passes"),
    [
        (["one", RIGHT], "one", 2),
        (["one", WRONG, "two", RIGHT], "two", 4),
        (["one", CUT], "one", 2),
        (["one", None], "one", 2),
        (["one", "  "], "one", 2),
        (["one", WRONG, CUT], "one", 3),
        (["one", WRONG, None], "one", 3),
        (["one", WRONG, "two", None], "two", 4),
        ([CUT], "and so on", 1),
    ],
)
def test_a_dialogue_ends_where_nothing_is_wrong_or_a_pass_comes_to_nothing(
    given: list[Given], text: str, passes: int, kind: RivalKind
) -> None:
    (ended,) = play(RuleEngine(replies(*given)), rounds=3, kind=kind)
    assert (text_of(ended), ended.passes) == (text, passes)


def test_every_pass_is_paid_for() -> None:
    (ended,) = play(RuleEngine(replies("one", WRONG, "two and two")), rounds=1)
    assert (ended.reply.prompt_tokens, ended.tokens) == (30, 1 + 4 + 3)
    assert isinstance(ended.reply, Completion)
    assert ended.reply.tokens == 8


def test_a_question_that_is_refused_is_refused() -> None:
    (ended,) = play(RuleEngine(replies(None)), rounds=1)
    assert isinstance(ended.reply, Refused)


def test_no_rounds_are_a_single_pass_and_the_first_pass_is_always_the_same() -> None:
    single, refined = RuleEngine(replies("one")), RuleEngine(replies("one", WRONG, "two"))
    assert [one.passes for one in play(single, rounds=0)] == [1]
    play(refined, rounds=1)
    assert single.asked[0] == refined.asked[0]
    assert len({request.sampling.seed for request in refined.asked}) == 3


def test_many_dialogues_go_on_side_by_side_and_none_is_lost() -> None:
    engine = RuleEngine(
        lambda request: said(request, WRONG if "critique" in request.messages[-1]["content"] else "two")
    )
    assert {one.name: one.passes for one in play(engine, rounds=2, questions=20)} == {f"q{n}": 5 for n in range(20)}


@pytest.mark.parametrize(
    ("given", "chosen", "passes"),
    [
        (("Answer: 3", "Answer: 2", r"so \boxed{2}"), "Answer: 2", 3),
        (("Answer: 3", "Answer: 2", "Answer: 4"), "Answer: 3", 3),
        (("Answer: 1000", "Answer: 7", "Answer: 1,000"), "Answer: 1000", 3),
        (("Answer: 7", "", "", "Answer: 2", "Answer: 2"), "Answer: 2", 5),
        ((("Answer: 3", "length"), ("Answer: 3", "length"), "Answer: 2"), "Answer: 2", 3),
        ((CUT, CUT), "and so on", 2),
    ],
    ids=[
        "most",
        "the first of equals",
        "one value in two spellings",
        "empty",
        "cut ones have no vote",
        "none is whole",
    ],
)
def test_majority_grades_the_first_output_with_the_answer_that_most_give(
    given: tuple[Given, ...], chosen: str, passes: int
) -> None:
    engine = RuleEngine(replies(*given))
    ended = draw(engine, "Majority", len(given))
    assert (text_of(ended), ended.passes, len(engine.asked)) == (chosen, passes, passes)
    assert all(request.messages == answer_messages(QUESTION) for request in engine.asked)
    assert len({request.sampling.seed for request in engine.asked}) == passes


def test_the_tokens_of_all_drawn_answers_count() -> None:
    engine = RuleEngine(replies("Answer: 1 2 3", "Answer: 2", "Answer: 2"))
    ended = draw(engine, "Majority", 3)
    assert isinstance(ended.reply, Completion)
    assert ended.reply.tokens == sum(len(text.split()) for text in ("Answer: 1 2 3", "Answer: 2", "Answer: 2"))


@pytest.mark.parametrize(
    ("given", "chosen", "judged"),
    [
        (("one", "two", "three", WRONG, RIGHT), "two", ["one", "two"]),
        (("one", "two", "three", WRONG, WRONG, WRONG), "one", ["one", "two", "three"]),
        (("one", CUT, "three", WRONG, RIGHT), "three", ["one", "three"]),
        ((CUT, "two", "three", CUT, RIGHT), "three", ["two", "three"]),
        ((CUT, CUT, CUT), "and so on", []),
    ],
    ids=["the first right", "none right", "a cut draft is not judged", "a cut critique says nothing", "none is whole"],
)
def test_best_of_n_grades_the_first_draft_that_the_model_finds_right(
    given: tuple[Given, ...], chosen: str, judged: list[str]
) -> None:
    engine = RuleEngine(replies(*given))
    ended = draw(engine, "BestOfN", 3)
    assert (text_of(ended), ended.passes) == (chosen, len(given))
    assert [request.messages for request in engine.asked[3:]] == [critique_messages(QUESTION, text) for text in judged]


@pytest.mark.parametrize("kind", ["Majority", "BestOfN"])
def test_a_question_that_the_engine_refuses_is_not_drawn_again(kind: RivalKind) -> None:
    engine = RuleEngine(replies(None))
    ended = draw(engine, kind, 4)
    assert isinstance(ended.reply, Refused)
    assert len(engine.asked) == 1
