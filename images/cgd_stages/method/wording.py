"""The teacher's instructions in words of the manifest's own (`generation.critique.instruction`, `.refine.instruction`).

A text without placeholders stands where ours does: the system turn, above the slots. A text with `{prompt}`, `{answer}`
and, for a refinement, `{critique}` is the whole user turn. Pure.
"""

import re
from typing import Any

from cgd_stages.contract import Role, instructed_as

_PLACEHOLDER = re.compile(r"\{(prompt|answer|critique)\}")
NEEDED: dict[str, tuple[str, ...]] = {"critique": ("prompt", "answer"), "refine": ("prompt", "answer", "critique")}
"""The placeholders of each instruction, by its field in spec.generation."""


def is_whole(instruction: str) -> bool:
    """Whether the text is the whole user turn, with placeholders for the row's texts."""
    return _PLACEHOLDER.search(instruction) is not None


def filled(instruction: str, texts: dict[str, Any]) -> str:
    """The text with the row's texts in place of the placeholders, each once read: what stands in a row's text stays."""
    return _PLACEHOLDER.sub(lambda found: str(texts[found[1]]), instruction)


def faults(field: str, instruction: str) -> list[str]:
    """What keeps the text from being an instruction of spec.generation.<field>, for its author."""
    names = set(_PLACEHOLDER.findall(instruction))
    if not instruction.strip():
        return ["it is empty"]
    if not names:
        return []
    found = [f"it has no {{{name}}}" for name in NEEDED[field] if name not in names]
    if "critique" in names - set(NEEDED[field]):
        found.append("it has {critique}, which there is not yet")
    return found


def asks_for_verdict(instruction: str) -> bool:
    """Whether it names the line that a verdict is read from."""
    return "conclusion" in instruction.lower()


def asked_texts(role: Role, row: dict[str, Any]) -> dict[str, Any]:
    """The texts of a row that the placeholders of a role's instruction stand for."""
    critique = row["miscritique" if role == "misrefine" else "critique"] if instructed_as(role) == "refine" else None
    return {"prompt": row["prompt"], "answer": row["answer"], "critique": critique}
