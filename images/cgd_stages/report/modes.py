"""How the models of a run were spoken to, in words: their thoughts, what is learned of them, templates, dates. Pure."""

from collections.abc import Sequence
from typing import Any

from cgd_stages.contract import Chat
from cgd_stages.results.model import ReportData, StageRecord

STUDENT = ("answer", "train", "evaluate", "harness")
TEACHER = ("critique", "refine", "distill", "miscritique", "misrefine")
"""The kinds of the stages in which each of the two is spoken to."""
LEARNED = {"learn": "on, the teacher's thoughts are learned", "drop": "off"}
"""The student's one mode in answer, training and evaluation."""


def modes(report: ReportData) -> dict[str, str]:
    """What the page says of it, by name. Empty where the models have no thoughts, and their own templates write no
    date."""
    student, teacher = (_spoken(report.stages, kinds) for kinds in (STUDENT, TEACHER))
    dates = sorted({chat["date"] for chat in (student, teacher) if chat.get("date")})
    words = {
        "Thinking": LEARNED[report.thinking] if student.get("thinking") else "",
        "Teacher's thinking": teacher.get("thinking", ""),
        "Chat template": _template(report.student_chat),
        "Teacher's chat template": _template(report.teacher_chat),
        "Date in the templates": ", ".join(dates),
    }
    return {name: said for name, said in words.items() if said}


def _spoken(stages: Sequence[StageRecord], kinds: Sequence[str]) -> dict[str, Any]:
    """How a model was spoken to, as the first stage of these kinds has it in its inputs: see `ChatTemplate.identity`.
    Empty for a model without thoughts that reads what its own template writes."""
    found = (stage.inputs["chat"] for stage in stages if stage.name.kind in kinds and "chat" in stage.inputs)
    return next(found, {})


def _template(chat: Chat) -> str:
    if chat.template is None:
        return ""
    return chat.template_uri or "written in the manifest"
