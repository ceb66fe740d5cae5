"""A teacher whose probabilities are learned has the student's tokens, or prepare says that it has not."""

from pathlib import Path

import pytest
from support import tiny

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.errors import UserError
from cgd_stages.prepare.tryout import refuse_other_tokens


def test_a_teacher_of_the_same_tokens_is_taken_also_with_more_of_them(tmp_path: Path) -> None:
    student = ChatTemplate.load(tiny.make(tmp_path / "student"))
    refuse_other_tokens(student, ChatTemplate.load(tiny.make(tmp_path / "teacher", seed=1)))
    refuse_other_tokens(student, ChatTemplate.load(tiny.make(tmp_path / "more", markers=("<think>",))))


def test_a_teacher_of_other_tokens_is_refused_with_what_to_take_instead(tmp_path: Path) -> None:
    student = ChatTemplate.load(tiny.make(tmp_path / "student", markers=("<think>",)), name="small")
    teacher = ChatTemplate.load(tiny.make(tmp_path / "teacher"), name="large")
    with pytest.raises(UserError, match=r"1 of \d+ tokens of small are not tokens of large .* '<think>'") as refused:
        refuse_other_tokens(student, teacher)
    assert "DistilledSFT" in refused.value.hint
