"""DPO's pairs: which rows have one, and that both texts stand below the same context."""

from pathlib import Path
from typing import Any

import pytest
from support.train_builders import quadruple

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.method.pairs import NoPair, Pair, pair


@pytest.fixture(scope="module")
def template(tiny_model: Path) -> ChatTemplate:
    return ChatTemplate.load(tiny_model)


def made(template: ChatTemplate, **changes: Any) -> Pair:
    found = pair(template, quadruple(3, **changes), max_length=500)
    assert isinstance(found, Pair)
    return found


def text(template: ChatTemplate, ids: Any) -> str:
    return str(template.tokenizer.decode(list(ids)))


def test_the_refinement_is_preferred_to_the_answer_below_the_prompt_alone(template: ChatTemplate) -> None:
    found, row = made(template), quadruple(3)
    context = text(template, found.input_ids[: found.start])
    assert context.count(row["prompt"]) == 1
    assert row["critique"] not in context
    assert found.rejected[: found.start] == tuple(found.input_ids[: found.start])
    assert row["refinement"] in text(template, found.input_ids[found.start :])
    assert row["answer"] in text(template, found.rejected[found.start :])
    assert found.rejected[-1] == found.input_ids[-1], "both have ended their turn"


@pytest.mark.parametrize("reason", ["length", "repetition"])
def test_an_answer_without_an_end_has_none_in_its_pair(template: ChatTemplate, reason: str) -> None:
    whole, cut = made(template), made(template, answer_finish_reason=reason)
    end = len(template.turn.end)
    assert end > 0
    assert cut.rejected == whole.rejected[:-end]
    assert cut.input_ids == whole.input_ids


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer": "7.", "refinement": " 7.\n"}, "same_text"),
        ({"verdict": "right"}, "right_draft"),
        ({"answer": "Because. " * 200}, "no_pair"),
    ],
)
def test_a_row_that_says_nothing_of_which_text_is_better_has_no_pair(
    template: ChatTemplate, changes: dict[str, Any], reason: NoPair
) -> None:
    assert pair(template, quadruple(3, **changes), max_length=500) == reason


def test_a_row_without_a_verdict_has_a_pair(template: ChatTemplate) -> None:
    assert made(template, verdict=None).rejected
