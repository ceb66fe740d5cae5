"""What a line of a source becomes: conversations, nested columns, several references, choices."""

import json
from typing import Any

import pytest

from cgd_stages.contract import Fields
from cgd_stages.prepare.columns import holds_earlier_thoughts, row_of, value_at
from cgd_stages.prepare.sources import Line, row_id
from cgd_stages.store.rows import Row
from cgd_stages.text.references import right_answers

CHAT = Fields(messages="messages")
SYSTEM = {"role": "system", "content": "Answer in one word."}
ASKED = {"role": "user", "content": "2 + 2?"}
SAID = {"role": "assistant", "content": "4"}
AGAIN = {"role": "user", "content": "And 3 + 3?"}


def row(fields: Fields, **value: Any) -> Row:
    """The row of a line that can be used."""
    made, fault = row_of(Line("line 1", value), fields)
    assert fault is None, fault
    return made


def fault(fields: Fields, **value: Any) -> tuple[str, str]:
    """The reason and the detail of a line that cannot."""
    _, found = row_of(Line("line 1", value), fields)
    assert found is not None
    return found


# --- conversations


def test_the_prompt_is_the_last_user_turn_and_the_turns_before_it_stay() -> None:
    made = row(CHAT, messages=[SYSTEM, ASKED, SAID, AGAIN])
    assert made["prompt"] == "And 3 + 3?"
    assert json.loads(made["turns"]) == [SYSTEM, ASKED, SAID]
    assert made["reference"] is None


def test_both_ways_of_writing_a_conversation_make_the_same_row() -> None:
    sharegpt = [
        {"from": "system", "value": "Answer in one word."},
        {"from": "human", "value": "2 + 2?"},
        {"from": "gpt", "value": "4"},
        {"from": "human", "value": "And 3 + 3?"},
    ]
    openai = [{**turn, "name": None, "tool_calls": None} for turn in (SYSTEM, ASKED, SAID, AGAIN)]
    rows = [row(CHAT, messages=messages) for messages in (openai, sharegpt, json.dumps(openai))]
    assert rows[0] == rows[1] == rows[2]


def test_an_assistant_turn_after_the_prompt_is_the_reference_unless_a_column_is_named() -> None:
    assert row(CHAT, messages=[ASKED, SAID])["reference"] == "4"
    named = Fields(messages="messages", reference="answer")
    assert row(named, messages=[ASKED, SAID], answer="four")["reference"] == "four"
    assert row(named, messages=[ASKED, SAID], answer=None)["reference"] is None


def test_a_conversation_of_one_turn_is_the_same_row_as_its_text() -> None:
    assert row(CHAT, messages=[ASKED]) == row(Fields(), prompt="2 + 2?")
    assert row(CHAT, messages=[{"role": "system", "content": " "}, ASKED]) == row(Fields(), prompt="2 + 2?")
    assert row(Fields(), prompt="2 + 2?")["id"] == row_id("2 + 2?")


def test_the_id_is_that_of_the_whole_conversation() -> None:
    conversations = [[AGAIN], [SYSTEM, AGAIN], [ASKED, SAID, AGAIN], [SYSTEM, ASKED, SAID, AGAIN]]
    rows = [row(CHAT, messages=messages) for messages in conversations]
    assert len({made["id"] for made in rows}) == 4
    assert {made["prompt"] for made in rows} == {"And 3 + 3?"}


THOUGHT = "<think>2 and 2.</think>"
FOUR = {"type": "text", "text": "4"}
ANTHROPIC = {"type": "thinking", "thinking": "2 and 2.", "signature": "c2ln"}
REDACTED = {"type": "redacted_thinking", "data": "c2ln"}
MISTRAL = {"type": "thinking", "thinking": [{"type": "text", "text": "2 and 2."}]}
OPENAI = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "2 and 2."}]}


@pytest.mark.parametrize(
    "said",
    [
        *({"role": "assistant", "content": [part, FOUR]} for part in (ANTHROPIC, REDACTED, MISTRAL, OPENAI)),
        {"role": "assistant", "content": [OPENAI, {"type": "output_text", "text": "4", "annotations": []}]},
        {"from": "gpt", "value": [ANTHROPIC, REDACTED, "4"]},
        {"role": "assistant", "content": f"{THOUGHT}\n\n4"},
        {"role": "assistant", "content": "2 and 2.\n</think>\n4"},
        {"role": "assistant", "content": "[THINK]2 and 2.[/THINK]4"},
        {"role": "assistant", "content": "4", "reasoning_content": "2 and 2."},
    ],
)
def test_the_thought_of_an_earlier_reply_is_left_out_and_told(said: dict[str, Any]) -> None:
    messages = [SYSTEM, ASKED, said, AGAIN]
    assert row(CHAT, messages=messages) == row(CHAT, messages=[SYSTEM, ASKED, SAID, AGAIN])
    for given in (messages, json.dumps(messages)):
        assert holds_earlier_thoughts({"messages": given}, CHAT)


def test_only_thoughts_of_earlier_replies_are_left_out() -> None:
    """A user's words stay, and the reference has its thought."""
    quoted = {"role": "user", "content": f"What is {THOUGHT} for?"}
    spaced = {"role": "assistant", "content": " 4\n"}
    answer = {"role": "assistant", "content": f"{THOUGHT}6", "reasoning_content": "3 and 3."}
    made = row(CHAT, messages=[quoted, spaced, AGAIN, answer])
    assert json.loads(made["turns"]) == [quoted, spaced]
    assert made["reference"] == f"{THOUGHT}6"
    assert not holds_earlier_thoughts({"messages": [quoted, spaced, AGAIN, answer]}, CHAT)
    assert not holds_earlier_thoughts({"prompt": THOUGHT}, Fields())


def test_a_reference_in_parts_has_no_thought_and_a_user_may_write_none() -> None:
    reply = {"role": "assistant", "content": [ANTHROPIC, FOUR]}
    assert row(CHAT, messages=[ASKED, reply])["reference"] == "4"
    assert not holds_earlier_thoughts({"messages": [ASKED, reply]}, CHAT)
    reason, detail = fault(CHAT, messages=[{"role": "user", "content": [ANTHROPIC, FOUR]}])
    assert (reason, "a part of the type 'thinking'" in detail) == ("malformed", True)


@pytest.mark.parametrize("content", [THOUGHT, "<think>2 and", [ANTHROPIC], [REDACTED]])
def test_an_earlier_reply_that_is_only_a_thought_is_empty(content: Any) -> None:
    reason, detail = fault(CHAT, messages=[ASKED, {"role": "assistant", "content": content}, AGAIN])
    assert (reason, "nothing but a thought" in detail) == ("empty", True)


def test_columns_that_are_null_in_a_table_are_not_there() -> None:
    """Parquet has every column for every row."""
    empty = {"role": None, "content": None, "from": None, "value": None}
    turns = [empty | {"from": "human", "value": "2 + 2?"}, empty | SAID]
    made = row(CHAT, messages=turns)
    assert (made["prompt"], made["reference"]) == ("2 + 2?", "4")
    choices = [{"text": None, "value": text, "label": None, "key": key} for key, text in (("A", "Moon"), ("B", "Mars"))]
    assert row(CHOICES, question="Which is a planet?", choices=choices, answer="Mars")["reference"] == "B"


def test_content_in_parts_of_text_is_one_text() -> None:
    parts = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?", "image_url": None}]
    assert row(CHAT, messages=[{"role": "user", "content": parts}])["prompt"] == "2 + 2?"


@pytest.mark.parametrize(
    ("messages", "reason", "detail"),
    [
        ([SAID], "malformed", "no user turn"),
        ([SYSTEM], "malformed", "no user turn"),
        ([], "malformed", "no list of messages"),
        (None, "missing_field", "there is no field 'messages'"),
        ("2 + 2?", "malformed", "a text belongs to fields.prompt"),
        ([ASKED, SAID, SAID], "malformed", "stand assistant, assistant; one assistant turn may"),
        ([ASKED, SYSTEM], "malformed", "turn 2 in 'messages' is a system turn"),
        (
            [ASKED, {"role": "tool", "content": "4"}, AGAIN],
            "malformed",
            "turn 2 in 'messages' has the unknown role 'tool'",
        ),
        ([{"content": "2 + 2?"}], "malformed", "unknown role None"),
        ([{"role": "user", "content": ""}], "empty", "turn 1 in 'messages' is empty"),
        ([ASKED, {"role": "assistant", "content": None}, AGAIN], "empty", "turn 2 in 'messages' is empty"),
        ([{"role": "user", "content": 4}], "malformed", "is a int, not a text"),
        (["2 + 2?"], "malformed", "is a str, not a message"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": "x"}]}],
            "malformed",
            "holds a part of the type 'image_url'",
        ),
        (
            [ASKED, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, AGAIN],
            "malformed",
            "turn 2 in 'messages' calls a tool",
        ),
    ],
)
def test_a_conversation_that_cannot_be_asked_is_rejected_with_its_reason(
    messages: Any, reason: str, detail: str
) -> None:
    found = fault(CHAT, messages=messages)
    assert found[0] == reason
    assert detail in found[1]


def test_messages_in_the_column_of_the_prompt_name_the_field_that_takes_them() -> None:
    assert "belongs to fields.messages" in fault(Fields(), prompt=[ASKED])[1]


# --- nested columns


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("reward_model.ground_truth", "4"),
        ("answers.0", "four"),
        ("answers.1.text", "4"),
        ("a.b", "literal"),
        ("answers", ["four", {"text": "4"}]),
    ],
)
def test_dots_lead_into_objects_and_lists_where_no_column_has_the_name(column: str, value: Any) -> None:
    line = {
        "reward_model": {"ground_truth": "4"},
        "answers": ["four", {"text": "4"}],
        "a.b": "literal",
        "a": {"b": "x"},
    }
    assert value_at(line, column).value == value
    assert value_at(line, column).exists


@pytest.mark.parametrize("column", ["reward_model.x", "answers.2", "answers.-1", "answers.x", "b", "reward_model.a.b"])
def test_a_place_that_a_line_does_not_have_is_missing(column: str) -> None:
    assert not value_at({"reward_model": {"a": "4"}, "answers": ["1", "2"]}, column).exists


def test_a_nested_reference_is_read() -> None:
    fields = Fields(messages="prompt", reference="reward_model.ground_truth")
    made = row(fields, prompt=[ASKED], reward_model={"style": "rule", "ground_truth": "4"})
    assert (made["prompt"], made["reference"]) == ("2 + 2?", "4")


# --- several references


@pytest.mark.parametrize(
    ("several", "reference", "stored"),
    [
        (None, ["Paris", "City of Paris"], '{"any": ["Paris", "City of Paris"]}'),
        ("all", ["1", "2"], '["1", "2"]'),
        ("any", [1, 2.5], '{"any": ["1", "2.5"]}'),
        (None, [1, 2], "[1, 2]"),
        (None, ["Paris"], "Paris"),
        ("any", ["Paris"], "Paris"),
        (None, [5], "5"),
        ("any", [[1, 2]], '{"any": ["1", "2"]}'),
        (None, [["a", "b"]], '{"any": ["a", "b"]}'),
        (None, ["Paris", None], "Paris"),
        ("any", [None, 1, 2], '{"any": ["1", "2"]}'),
        (None, [], None),
        (None, [None], None),
        ("all", ["0.5"], '["0.5"]'),
        (None, 27, "27"),
        (None, None, None),
    ],
)
def test_a_list_of_references_is_stored_as_what_it_means(several: Any, reference: Any, stored: str | None) -> None:
    fields = Fields(reference="answer", several=several)
    assert row(fields, prompt="Which?", answer=reference)["reference"] == stored


def test_only_what_was_joined_is_taken_apart() -> None:
    assert right_answers('{"any": ["a", "b"]}') == ["a", "b"]
    for text in ("a", '["a", "b"]', '{"any": "a"}', '{"any": []}', '{"any": [1]}', '{"any": ["a"', '{"any": 1, '):
        assert right_answers(text) == [text]


# --- choices

CHOICES = Fields(prompt="question", reference="answer", choices="choices")
LETTERED = "Which is a planet?\n\nA. Moon\nB. Mars\nC. Sun"


@pytest.mark.parametrize(
    "choices",
    [
        ["Moon", "Mars", "Sun"],
        {"text": ["Moon", "Mars", "Sun"], "label": ["A", "B", "C"]},
        {"text": ["Moon", "Mars", "Sun"], "label": ["1", "2", "3"]},
        {"text": ["Moon", "Mars", "Sun"]},
        {"A": "Moon", "B": "Mars", "C": "Sun", "D": None},
        [{"label": "A", "text": "Moon"}, {"label": "B", "text": "Mars"}, {"label": "C", "text": "Sun"}],
        [{"key": "A", "value": "Moon"}, {"key": "B", "value": "Mars"}, {"key": "C", "value": "Sun"}],
    ],
)
def test_choices_are_lettered_lines_after_the_question(choices: Any) -> None:
    made = row(CHOICES, question="Which is a planet?", choices=choices, answer="Mars")
    assert (made["prompt"], made["reference"]) == (LETTERED, "B")
    assert made["id"] == row_id(LETTERED)


@pytest.mark.parametrize(
    ("choices", "answer", "letter"),
    [
        (["Moon", "Mars"], 1, "B"),
        (["Moon", "Mars"], "1", "B"),
        (["Moon", "Mars"], "B", "B"),
        (["1", "2", "3"], "2", "B"),
        (["1", "2", "3"], 2, "C"),
        ({"text": ["Moon", "Mars"], "label": ["1", "2"]}, "1", "A"),
        ({"text": ["Moon", "Mars"], "label": ["1", "2"]}, 1, "A"),
        ([3, 4], "4", "B"),
        ([3, 4], 4, "B"),
        ([3, 4], 1, "B"),
        ([-1, 2], -1, "A"),
        ([0.25, 0.5], 0.5, "B"),
    ],
)
def test_the_right_choice_is_named_by_label_index_letter_or_text(choices: Any, answer: Any, letter: str) -> None:
    assert row(CHOICES, question="Which?", choices=choices, answer=answer)["reference"] == letter


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        (["Moon", "Mars"], "Venus"),
        (["Moon", "Mars"], 2),
        (["Moon", "Mars"], -1),
        (["Moon", "Mars"], 1.0),
        (["Moon", "Mars"], True),
        (["Moon", "Mars"], ["Mars"]),
        (["Moon"], "Moon"),
        ([], 0),
        ("Moon, Mars", "Mars"),
        ([["Moon"], "Mars"], "Mars"),
        (["Moon", ""], "Moon"),
    ],
)
def test_choices_without_a_right_one_are_rejected(choices: Any, answer: Any) -> None:
    assert fault(CHOICES, question="Which?", choices=choices, answer=answer)[0] == "malformed"


def test_choices_without_a_question_are_empty() -> None:
    assert fault(CHOICES, question=" ", choices=["Moon", "Mars"], answer=0) == ("empty", "the prompt is empty")


def test_choices_follow_the_last_turn_of_a_conversation() -> None:
    fields = Fields(messages="messages", reference="answer", choices="choices")
    made = row(fields, messages=[SYSTEM, ASKED], choices=["3", "4"], answer=1)
    assert (made["prompt"], made["reference"]) == ("2 + 2?\n\nA. 3\nB. 4", "B")
    assert json.loads(made["turns"]) == [SYSTEM]
