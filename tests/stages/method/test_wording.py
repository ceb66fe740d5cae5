"""The teacher's instructions in words of the manifest's own: what each request then holds, and what is refused."""

import json
from typing import Any

import pytest

from cgd_stages.contract import Generate, Instructions, Role
from cgd_stages.method import prompts, wording

ROW: dict[str, Any] = {
    "prompt": "2 + {answer}?",
    "answer": "5 {critique}",
    "critique": "off by {prompt}",
    "miscritique": "all is well",
}
OWN = "You teach sums."
WHOLE = "Q: {prompt}\nA: {answer}"
WHOLE_REFINE = WHOLE + "\nC: {critique} {other}"


def test_a_text_without_placeholders_stands_where_ours_does() -> None:
    ours, own = prompts.role_messages("critique", ROW), prompts.role_messages("critique", ROW, OWN)
    assert own == [{"role": "system", "content": OWN}, ours[1]]
    ours, own = prompts.role_messages("refine", ROW), prompts.role_messages("refine", ROW, OWN)
    assert own == [{"role": "system", "content": OWN}, ours[1]]


def test_a_text_with_placeholders_is_the_whole_turn_and_what_rows_hold_is_no_placeholder() -> None:
    assert prompts.role_messages("critique", ROW, WHOLE) == [
        {"role": "user", "content": "Q: 2 + {answer}?\nA: 5 {critique}"}
    ]
    (asked,) = prompts.role_messages("refine", ROW, WHOLE_REFINE)
    assert asked["content"] == "Q: 2 + {answer}?\nA: 5 {critique}\nC: off by {prompt} {other}"


def test_a_refinement_of_a_miscritique_reads_it_in_the_same_words() -> None:
    (asked,) = prompts.role_messages("misrefine", ROW, WHOLE_REFINE)
    assert asked["content"].endswith("C: all is well {other}")
    assert prompts.role_messages("misrefine", ROW, OWN)[1] == prompts.role_messages("misrefine", ROW)[1]


def test_the_turns_of_a_conversation_stay_in_front() -> None:
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    row = ROW | {"turns": json.dumps(turns)}
    for instruction in (OWN, WHOLE):
        asked = prompts.role_messages("critique", row, instruction)
        assert asked[:2] == turns
        assert len(asked) == 3


@pytest.mark.parametrize("role", ["critique", "refine", "misrefine"])
def test_another_wording_is_another_digest_and_none_is_todays(role: Role) -> None:
    assert prompts.fingerprint(role, None) == prompts.fingerprint(role)
    assert len({prompts.fingerprint(role, one) for one in (None, OWN, WHOLE_REFINE)}) == 3


def test_each_role_has_its_own_instruction() -> None:
    given = Instructions(critique="c", refine="r")
    roles: tuple[Role, ...] = ("answer", "critique", "refine", "distill", "miscritique", "misrefine")
    assert [given.of(role) for role in roles] == [None, "c", "r", None, None, "r"]


def test_a_task_without_instructions_is_written_as_before() -> None:
    assert "instructions" not in Generate(roles=(), sampling=(), max_rejected=0.0).to_json()


@pytest.mark.parametrize(
    ("field", "text", "faults"),
    [
        ("critique", OWN, []),
        ("critique", WHOLE, []),
        ("refine", WHOLE_REFINE, []),
        ("critique", " \n", ["it is empty"]),
        ("critique", "Judge {answer}.", ["it has no {prompt}"]),
        ("refine", WHOLE, ["it has no {critique}"]),
        ("critique", WHOLE_REFINE, ["it has {critique}, which there is not yet"]),
    ],
)
def test_what_an_instruction_leaves_out_is_told(field: str, text: str, faults: list[str]) -> None:
    assert wording.faults(field, text) == faults
