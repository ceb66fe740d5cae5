"""The teacher's own instructions, as prepare reads and tries them."""

import logging
from pathlib import Path

import pytest
from support.stage_builders import bucket_of, context, prepare_work

from cgd_stages.contract import Instructions, Storage
from cgd_stages.errors import UserError
from cgd_stages.models import resolve
from cgd_stages.prepare import __main__ as prepare
from cgd_stages.prepare.tryout import read_instructions

CRITIQUE = 'Judge it. End with "Conclusion: right" or "Conclusion: wrong".'


def test_texts_and_files_are_read(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "inputs/words").mkdir(parents=True)
    (tmp_path / "inputs/words/critique.txt").write_text(f"\n{CRITIQUE}\n")
    given = context(storage, prepare_work("/model", ""), tmp_path, inputs=tmp_path / "inputs")
    bucket_of(storage).put("words/refine.txt", b"Improve {answer}, asked {prompt}, by {critique}.")
    stored = bucket_of(storage).uri("words/refine.txt")
    read = read_instructions(given, Instructions(critique="configmap://words/critique.txt", refine=stored))
    assert read == Instructions(critique=CRITIQUE, refine="Improve {answer}, asked {prompt}, by {critique}.")


def test_one_that_leaves_a_text_out_is_refused_with_the_field(storage: Storage, tmp_path: Path) -> None:
    given = context(storage, prepare_work("/model", ""), tmp_path)
    with pytest.raises(UserError, match=r"spec.generation.refine.instruction: it has no \{critique\}") as error:
        read_instructions(given, Instructions(refine="{prompt} {answer}"))
    assert "{prompt}, {answer}, {critique}" in error.value.hint


@pytest.mark.parametrize(("text", "warned"), [(CRITIQUE, False), ("Judge it.", True)])
def test_a_critique_without_a_verdict_is_warned_of(
    storage: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, warned: bool
) -> None:
    given = context(storage, prepare_work("/model", ""), tmp_path)
    with caplog.at_level(logging.WARNING):
        read_instructions(given, Instructions(critique=text))
    assert ("will have no verdict" in caplog.text) == warned


def test_a_file_is_read_once_for_the_whole_run_and_another_text_is_another_digest(
    storage: Storage, tiny_model: Path, tmp_path: Path
) -> None:
    bucket = bucket_of(storage)
    bucket.put("in/p.jsonl", b'{"question": "1 + 1?", "answer": "2"}\n')
    place = bucket.uri("in/critique.txt")

    def digest(text: str | None) -> str:
        if text:
            bucket.put("in/critique.txt", text.encode())
        named = Instructions(critique=place) if text else Instructions(critique=CRITIQUE)
        work = prepare_work(tiny_model, bucket.uri("in/p.jsonl"), instructions=named)
        return prepare.main(context(storage, work, tmp_path))["prepare"].digest

    inline = digest(None)
    first = digest(CRITIQUE)
    bucket.put("in/critique.txt", b"changed meanwhile")
    store = context(storage, prepare_work(tiny_model, ""), tmp_path).store
    assert resolve.pinned_text(place, store) == CRITIQUE
    assert resolve.pinned_text("the text itself", store) == "the text itself"
    assert len({inline, first, digest(CRITIQUE + " Be kind.")}) == 3
