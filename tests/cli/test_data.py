"""What the commands show of a stored row."""

import json
from typing import Any

from rich.console import Console

from cgd_cli.data import row_panel
from cgd_stages.store.rows import Row, row_schema
from cgd_stages.text.references import any_of


def shown(**columns: Any) -> list[str]:
    """The lines of a row's panel, without its frame."""
    row: Row = {**dict.fromkeys(row_schema("refine").names), "id": "a0", "sample": 1, "prompt": "2 + 2?", **columns}
    console = Console(width=100)
    with console.capture() as capture:
        console.print(row_panel(row))
    lines = [line.strip("│╭╮╰╯─ ") for line in capture.get().splitlines()]
    return [line for line in lines if line]


def test_each_text_follows_its_thought_and_the_counts_come_last() -> None:
    assert shown(answer="4", answer_thinking="Add.", answer_tokens=9, refinement="5", verdict="wrong") == [
        "a0 / 1", "prompt", "2 + 2?", "answer_thinking", "Add.", "answer", "4", "refinement", "5",
        "answer_tokens 9  verdict wrong",
    ]  # fmt: skip


def test_a_conversation_is_shown_with_its_roles_and_each_right_answer_on_a_line() -> None:
    turns = json.dumps([{"role": "system", "content": "Be brief."}])
    assert shown(turns=turns, reference=any_of(["4", "four"])) == [
        "a0 / 1", "prompt", "[system]", "Be brief.", "[user]", "2 + 2?", "reference", "4", "or four",
    ]  # fmt: skip
