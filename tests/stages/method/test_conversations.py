"""Conversations: the turns before the prompt stand in front, word for word, for every model and every training."""

import json
from typing import Any, get_args

import pytest

from cgd_stages.chat.messages import Message, plain
from cgd_stages.contract import Role, Supervised
from cgd_stages.method import prompts
from cgd_stages.method.examples import conversation

SYSTEM: Message = {"role": "system", "content": "Answer like a pirate."}
EARLIER: list[Message] = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "Arr, 4."}]
TEXTS = {
    "id": "",
    "sample": 0,
    "prompt": "And 3 + 3?",
    "answer": "5",
    "critique": "Off by one.",
    "miscritique": "All right.",
    "refinement": "Arr, 6.",
    "distilled": "6!",
    "reference": '{"any": ["6", "six"]}',
}


def row(turns: list[Message]) -> dict[str, Any]:
    return TEXTS | {"turns": json.dumps(turns)}


@pytest.mark.parametrize("turns", [[SYSTEM], EARLIER, [SYSTEM, *EARLIER]])
@pytest.mark.parametrize("role", get_args(Role))
def test_every_role_sees_the_turns_in_front(role: Role, turns: list[Message]) -> None:
    asked = prompts.role_messages(role, row(turns))
    assert asked[:-1] == turns
    assert asked[-1]["role"] == "user"
    assert "And 3 + 3?" in asked[-1]["content"]


@pytest.mark.parametrize("turns", [[SYSTEM], EARLIER, [SYSTEM, *EARLIER]])
@pytest.mark.parametrize("objective", get_args(Supervised))
def test_the_context_of_every_objective_has_the_turns_in_front(objective: Supervised, turns: list[Message]) -> None:
    context, target = conversation(objective, row(turns))
    assert context[:-1] == turns
    assert target in {"Arr, 6.", "Off by one.", "6!", "6"}


def test_what_a_student_reads_in_training_is_what_it_is_asked_later() -> None:
    made = row([SYSTEM, *EARLIER])
    for objective in ("DistilledSFT", "SFT", "RefinedSFT"):
        assert conversation(objective, made)[0] == prompts.role_messages("answer", made)


def test_our_instruction_stands_above_the_slots_where_the_conversation_has_its_own_system_turn() -> None:
    asked = prompts.role_messages("refine", row([SYSTEM]))
    bare = prompts.refine_messages("And 3 + 3?", "5", "Off by one.")
    assert asked == [SYSTEM, {"role": "user", "content": f"{bare[0]['content']}\n\n{bare[1]['content']}"}]
    retry = prompts.retry_messages("And 3 + 3?", ["Off by one."], turns=EARLIER)
    assert retry[:2] == EARLIER
    assert retry[2]["content"].startswith(prompts.REFLEXION)


@pytest.mark.parametrize("objective", ["CGD", "CFT"])
def test_a_trainings_instruction_stands_above_the_slots_in_the_last_turn(objective: Supervised) -> None:
    context, _ = conversation(objective, row([SYSTEM, *EARLIER]))
    assert context == [SYSTEM, *EARLIER, *conversation(objective, row([]))[0]]
    joined, _ = conversation(objective, row([SYSTEM, *EARLIER]), "system")
    own = [message["content"] for message in conversation(objective, row([]), "system")[0]]
    assert joined == [SYSTEM, *EARLIER, {"role": "user", "content": "\n\n".join(own)}]


def test_a_row_without_turns_is_asked_as_ever() -> None:
    stored_before = TEXTS
    null = TEXTS | {"turns": None}
    for role in get_args(Role):
        assert prompts.role_messages(role, stored_before) == prompts.role_messages(role, null)
        assert len(prompts.role_messages(role, null)) == (1 if role in {"answer", "distill"} else 2)


def test_a_model_without_a_template_reads_every_turn() -> None:
    asked = prompts.role_messages("answer", row([SYSTEM, *EARLIER]))
    assert plain(asked) == (
        "Answer like a pirate.\n\nQuestion: 2 + 2?\n\nAnswer: Arr, 4.\n\nQuestion: And 3 + 3?\n\nAnswer:"
    )


def test_of_several_right_answers_sft_learns_the_first() -> None:
    assert conversation("SFT", row([]))[1] == "6"
    assert conversation("SFT", TEXTS | {"reference": None})[1] is None
