"""What prepare tries with the real templates before a GPU is asked for."""

from pathlib import Path

import pytest
from support import tiny
from support.stage_builders import prepare_work

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Chat
from cgd_stages.errors import UserError
from cgd_stages.prepare.tryout import try_out

ALWAYS = tiny.THINKING.read_text().replace(
    "{%- if enable_thinking", "{{- '<think>\\n' -}}\n{%- if false and enable_thinking"
)
"""The template of a model that always thinks."""


def test_tasks_without_room_for_a_thought_are_refused_for_a_student_that_always_thinks(tmp_path: Path) -> None:
    training = prepare_work(tmp_path, "s3://data/p.jsonl").training.model_copy(update={"thinking": "learn"})
    work = prepare_work(tmp_path, "s3://data/p.jsonl", training=training, without_thoughts=("MuSR", "HumanEval"))
    student = ChatTemplate.load(tiny.thinking(tmp_path / "thinking"), Chat(thinking="on"))
    try_out(work, student, None)
    always = ChatTemplate(student.tokenizer, Chat(thinking="on", template=ALWAYS), name="always")
    try_out(work.model_copy(update={"without_thoughts": None}), always, None)
    with pytest.raises(
        UserError, match=r"MuSR, HumanEval: lm-eval asks them without a thought, but .* always "
    ) as told:
        try_out(work, always, None)
    assert told.value.hint == "Remove MuSR, HumanEval from spec.evaluation.tasks."
