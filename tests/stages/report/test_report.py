"""The report program against a real store: it reads what the stages wrote, and writes what a browser opens."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.stage_builders import RUN, context, task

from cgd_stages.contract import (
    SCRATCH,
    TASK,
    TERMINATION_LOG,
    LastWords,
    Published,
    Report,
    Rows,
    RunRef,
    StageFacts,
    Storage,
)
from cgd_stages.errors import TransientError
from cgd_stages.grading.grader import Grader
from cgd_stages.quality.review import REVIEW, Review, read_quadruples, review_rows
from cgd_stages.report import __main__ as report
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import PARTS, REJECTED, Folder, Part
from cgd_stages.store.rows import REJECTION_SCHEMA, Row, digest_of, now, row_schema
from cgd_stages.store.run import RunStore
from cgd_stages.text.references import any_of

STAGES = ("prepare", "refine", "check", "train-cgd", "evaluate-base", "evaluate-cgd")
WORK = Report(stages=STAGES, spec="student: {}\n")


def finish(bucket: Bucket, stage: str, put: Any, run: RunRef = RUN, **facts: Any) -> Folder:
    """A finished stage whose parts `put` stores."""
    folder = Folder(bucket, run.namespace, stage, digest_of(stage=stage))
    parts: list[Part] = put(folder)
    done = folder.finish(facts=StageFacts(**facts), parts=parts, started=now(), inputs={"by": "test"})
    RunStore(bucket, run).point_at(done)
    return folder


def quadruples(folder: Folder, count: int = 250, **changes: Any) -> list[Part]:
    rows: list[Row] = [
        {
            **dict.fromkeys(row_schema("refine").names),
            "id": f"{i:020x}",
            "sample": 0,
            "prompt": f"Prompt {i}",
            "answer": "a",
            "answer_tokens": 1,
            "critique": "c",
            "critique_tokens": 2,
            "refinement": "r",
            "refinement_tokens": 3,
            "verdict": "wrong" if i % 2 else None,
            **changes,
        }
        for i in reversed(range(count))
    ]
    rejected = [{"id": "ff", "sample": 0, "stage": "refine", "reason": reason} for reason in ("empty", "truncated")]
    schema = row_schema("refine")
    return [
        folder.put_rows(PARTS, rows[:100], schema),
        folder.put_rows(PARTS, rows[100:], schema),
        folder.put_rows(REJECTED, rejected, REJECTION_SCHEMA),
    ]


def training_log(folder: Folder) -> list[Part]:
    lines = [{"step": step, "loss": 3.0 - step, "epoch": 0.5, "examples": 4} for step in (1, 2)]
    repeated = [{"step": 2, "loss": 0.5}, {"step": 3, "loss": float("nan")}]
    text = "".join(json.dumps(line) + "\n" for line in lines + repeated)
    return [folder.put("metrics.jsonl", text.encode())]


def graded(folder: Folder, correct: bool, *, parts: int = 1, more: str = "", **changes: Any) -> list[Part]:
    rows = [
        {
            "benchmark": "sums",
            "id": f"{i:020x}",
            "sample": 0,
            "prompt": f"Question {i}",
            "reference": "4",
            "output": f"4 </script>{more}",
            "finish_reason": "stop",
            "tokens": 5,
            "extracted": "4",
            "answer_source": "text",
            "correct": correct,
            "grade_error": "",
            "more": 1,
            **changes,
        }
        for i in range(8 * parts)
    ]
    schema = pa.Table.from_pylist(rows[:1]).schema
    return [folder.put_rows(PARTS, rows[8 * part : 8 * part + 8], schema) for part in range(parts)]


def reviewed(folder: Folder) -> list[Part]:
    """What the check stores about the rows of refine."""
    return [review_rows(folder, RunStore(folder.bucket, RUN).input("refine"))[1]]


@pytest.fixture
def whole_run(bucket: Bucket) -> Bucket:
    """Every stage of a run, as small as it gets."""
    finish(bucket, "prepare", lambda folder: [])
    finish(bucket, "refine", quadruples, rows=Rows(total=252, done=250, rejected=2))
    finish(bucket, "check", reviewed)
    finish(bucket, "train-cgd", training_log)
    finish(bucket, "evaluate-base", lambda folder: graded(folder, correct=False))
    finish(bucket, "evaluate-cgd", lambda folder: graded(folder, correct=True))
    return bucket


def files(bucket: Bucket) -> tuple[str, dict[str, Any]]:
    folder = RunStore(bucket, RUN).input("report")
    page, figures, *_ = (folder.read(part) for part in folder.require().parts)
    return page.decode(), json.loads(figures)


TURNS = json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}])


def test_a_conversation_its_right_answers_and_thoughts_are_shown_as_a_person_reads_them(bucket: Bucket) -> None:
    reference = any_of(["4", "four"])
    said = {"turns": TURNS, "reference": reference, "answer_thinking": "Two and two.", "refinement_thinking": "2 + 2."}
    finish(bucket, "refine", lambda folder: quadruples(folder, 1, **said))
    finish(bucket, "check", reviewed)
    for name, correct in (("evaluate-base", False), ("evaluate-cgd", True)):
        spoken = {"turns": TURNS, "reference": reference, "thinking": "Hm."}
        finish(bucket, name, lambda folder, correct=correct, spoken=spoken: graded(folder, correct, **spoken))
    outputs = report.find_outputs(RunStore(bucket, RUN), STAGES)
    data, review = report.read_run(RUN, WORK, outputs), report.read_review(outputs)
    assert review
    (row,) = review.quadruples.shown
    assert row.prompt == "[system]\nBe brief.\n\n[user]\nHello.\n\n[user]\nPrompt 0"
    assert row.reference == "4\nor four"
    assert (row.answer_thinking, row.critique_thinking, row.refinement_thinking) == ("Two and two.", "", "2 + 2.")
    change = data.changes[0]
    assert change.prompt.endswith("[user]\nHello.\n\n[user]\nQuestion 0")
    assert (change.reference, change.base.thinking) == ("4\nor four", "Hm.")


def test_the_report_of_a_whole_run_holds_what_each_stage_stored(
    whole_run: Bucket, storage: Storage, tmp_path: Path
) -> None:
    facts = report.main(context(storage, WORK, tmp_path))
    page, figures = files(whole_run)
    assert facts["report"].output_uri == RunStore(whole_run, RUN).input("report").uri
    assert page.startswith("<!DOCTYPE html>")
    assert "4 </script>" not in page
    assert [one["accuracy"] for one in figures["scores"]] == [0.0, 1.0]
    assert figures["comparisons"][0]["fixed"] == 8
    assert figures["quadruples"] == {"total": 250, "verdicts": {"wrong": 125, "missing": 125}}
    assert figures["stages"][1]["rejections"] == {"empty": 1, "truncated": 1}
    assert [step["loss"] for step in figures["training"]["train-cgd"]] == [2.0, 0.5, None]


def test_the_quadruples_shown_are_the_first_by_id_whatever_part_they_are_in(whole_run: Bucket) -> None:
    with Grader() as grader:
        review = read_quadruples(RunStore(whole_run, RUN).input("refine"), grader, shown=30)
    assert [row.id for row in review.quadruples.shown] == [f"{i:020x}" for i in range(30)]


def test_the_rows_are_counted_and_graded_and_their_marks_are_shown(
    bucket: Bucket, storage: Storage, tmp_path: Path
) -> None:
    finish(bucket, "refine", lambda folder: quadruples(folder, 120, reference="#### 4", answer="4", refinement="4"))
    finish(bucket, "check", reviewed)
    report.main(context(storage, Report(stages=("refine", "check"), spec=""), tmp_path))
    page, figures = files(bucket)
    graded = figures["quality"]["graded"]
    assert (graded["sampled"], graded["rows"], graded["draftsRight"]["count"]) == (120, 120, 120)
    assert graded["confusion"]["wrong"] == {"right": 60, "wrong": 0}
    assert figures["quality"]["unchanged"]["share"] == 1
    assert figures["quality"]["lengths"]["critique"]["median"] == 2
    # "Prompt 1", "Prompt 2", ...
    assert figures["quality"]["nearDuplicates"]["count"] == 119
    assert figures["quality"]["alike"] == [{"size": 120, "examples": ["Prompt 0", "Prompt 1"]}]
    assert any("repeat the student's answer" in caution for caution in figures["quality"]["cautions"])
    assert page.count('"draft_right":true') == 120


def test_of_each_stage_and_reason_some_rejected_rows_are_shown_with_their_prompts(
    bucket: Bucket, storage: Storage, tmp_path: Path
) -> None:
    def rejecting(stage: str, *rows: tuple[int, str]) -> Any:
        rejected = [
            {"id": f"{i:020x}", "sample": 0, "stage": stage, "reason": reason, "detail": f"{reason} {i}"}
            for i, reason in rows
        ]
        return lambda folder: [folder.put_rows(REJECTED, rejected, REJECTION_SCHEMA)]

    def prompts(folder: Folder) -> list[Part]:
        rows = [{"id": f"{i:020x}", "sample": 0, "prompt": f"Prompt {i}", "prompt_tokens": 1} for i in range(9)]
        return [folder.put_rows(PARTS, rows, row_schema("prepare")), *rejecting("prepare", (99, "empty"))(folder)]

    finish(bucket, "prepare", prompts)
    finish(bucket, "answer", rejecting("answer", *((i, "truncated") for i in reversed(range(8))), (8, "empty")))
    outputs = report.find_outputs(RunStore(bucket, RUN), ("prepare", "answer"))
    shown = report.read_rejected(outputs)
    assert [(one.stage, one.reason, one.prompt) for one in shown] == [
        ("answer", "empty", "Prompt 8"),
        *(("answer", "truncated", f"Prompt {i}") for i in range(report.REJECTIONS)),
        ("prepare", "empty", ""),
    ]
    assert shown[1].detail == "truncated 0"
    report.main(context(storage, Report(stages=("prepare", "answer"), spec=""), tmp_path))
    assert "7 rejected rows, some for each stage and reason. The rest:" in files(bucket)[0]


def test_outputs_are_read_part_by_part_and_only_the_texts_that_are_shown_are_kept(
    bucket: Bucket, storage: Storage, tmp_path: Path
) -> None:
    text, parts = "x" * 30_000, 16
    for name, correct in (("evaluate-base", False), ("evaluate-cgd", True)):
        finish(bucket, name, lambda folder, correct=correct: graded(folder, correct, parts=parts, more=text))
    outputs = report.find_outputs(RunStore(bucket, RUN), ("evaluate-base", "evaluate-cgd"))
    report.read_run(RUN, WORK, outputs)  # whatever is imported or connected on the way is not what is measured
    tracemalloc.start()
    data = report.read_run(RUN, WORK, outputs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(map(len, data.evaluations.values())) == 2 * 8 * parts
    # Both texts of what is shown, and those of a part; all of them together are 32 parts.
    shown, part = 2 * len(data.changes) * len(text), 8 * len(text)
    assert 0 < shown < 2 * part
    assert peak < shown + 3 * part < 2 * parts * part / 5
    assert {one.after.output for one in data.changes} == {f"4 </script>{text}"}


def test_grades_that_an_attempt_has_stored_before_it_broke_off_stand(whole_run: Bucket) -> None:
    folder, rows = Folder(whole_run, "team", "check", "anew"), RunStore(whole_run, RUN).input("refine")
    first, part = review_rows(folder, rows)
    assert Review.model_validate_json(folder.read(part)) == first
    other = first.model_copy(update={"quality": first.quality.model_copy(update={"rows": 7})})
    whole_run.put(folder.key(REVIEW), other.to_json().encode())
    again, part = review_rows(folder, rows)
    assert again.quality.rows == 7
    assert Review.model_validate_json(folder.read(part)) == other


@pytest.mark.parametrize("damaged", [b"", b'{"quadruples"'])
def test_grades_that_are_damaged_are_made_anew(whole_run: Bucket, damaged: bytes) -> None:
    folder, rows = Folder(whole_run, "team", "check", "anew"), RunStore(whole_run, RUN).input("refine")
    whole_run.put(folder.key(REVIEW), damaged)
    review, part = review_rows(folder, rows)
    assert Review.model_validate_json(folder.read(part)) == review


def test_a_run_whose_check_has_not_ended_has_a_report_without_rows(
    bucket: Bucket, storage: Storage, tmp_path: Path
) -> None:
    finish(bucket, "refine", quadruples)
    report.main(context(storage, WORK, tmp_path))
    assert files(bucket)[1]["quality"] is None


def test_a_second_attempt_finds_the_report_done(whole_run: Bucket, storage: Storage, tmp_path: Path) -> None:
    first = report.main(context(storage, WORK, tmp_path))
    assert report.main(context(storage, WORK, tmp_path)) == first


def test_an_attempt_that_broke_off_before_its_marker_is_completed(
    whole_run: Bucket, storage: Storage, tmp_path: Path
) -> None:
    report.main(context(storage, WORK, tmp_path))
    folder = RunStore(whole_run, RUN).input("report")
    whole_run.delete(folder.key("DONE.json"))
    report.main(context(storage, WORK, tmp_path))
    assert folder.require().parts


def test_the_program_runs_by_its_task_alone(whole_run: Bucket, storage: Storage, tmp_path: Path) -> None:
    words = tmp_path / "termination-log"
    environment = {TASK: task(storage, WORK).to_json(), TERMINATION_LOG: str(words), SCRATCH: str(tmp_path)}
    ended = subprocess.run([sys.executable, "-m", "cgd_stages.report"], env={**os.environ, **environment}, check=False)
    told = LastWords.model_validate_json(words.read_text())
    assert (ended.returncode, told.outcome) == (0, "done")
    assert told.stages["report"].output_uri == RunStore(whole_run, RUN).input("report").uri


def boxed(folder: Folder, benchmark: str = "sums") -> list[Part]:
    """lm-eval shares two of four grades: one answer is in another spelling, and one grade is mistaken."""
    told = [
        ("4", "4", True, ""),
        ("5", "4", False, ""),
        ("8/2", "4", True, ""),
        ("4", "4", False, ""),
        ("4", "4", False, "timeout"),
    ]
    rows = [
        {"benchmark": benchmark, "id": f"{i}", "sample": 0, "prompt": "?", "reference": reference,
         "output": f"So it is $\\boxed{{{answer}}}$.", "finish_reason": "stop", "tokens": 5, "extracted": answer,
         "answer_source": "boxed", "correct": correct, "rule": "value", "grade_error": error}
        for i, (answer, reference, correct, error) in enumerate(told)
    ]  # fmt: skip
    return [folder.put_rows(PARTS, rows, pa.Table.from_pylist(rows).schema)]


def test_stored_grades_are_judged_again_by_lm_eval_and_none_of_them_changes(
    bucket: Bucket, storage: Storage, tmp_path: Path
) -> None:
    finish(bucket, "evaluate-base", boxed)
    finish(bucket, "harness-base", lambda folder: boxed(folder, "IFEval"))
    before = RunStore(bucket, RUN).input("evaluate-base").require()
    plain = Report(stages=("evaluate-base", "harness-base"), spec="")
    report.main(context(storage, plain, tmp_path))
    assert files(bucket)[1]["audit"] is None
    report.main(context(storage, plain.model_copy(update={"audit": 200}), tmp_path))
    page, figures = files(bucket)
    (group,) = figures["audit"]["counts"]
    assert group == {
        "benchmark": "sums", "model": "base", "bothRight": 1, "bothWrong": 1, "lmEvalAlone": 1, "graderAlone": 1,
        "unboxed": 0,
    }  # fmt: skip
    assert [(one["id"], one["correct"], one["rule"]) for one in figures["audit"]["disagreements"]] == [
        ("3", False, "value"),
        ("2", True, "value"),
    ]
    assert "lm-eval alone calls 1 of 4 audited outputs right" in page
    assert RunStore(bucket, RUN).input("evaluate-base").require() == before


ASKED = Published(uri="configmap://paper/figures.json", student="org/student", benchmarks=("sums",))


def published(folder: Path, figure: float) -> Path:
    """The folder in which a ConfigMap with the file is mounted."""
    table = {"source": "Some et al., table 2", "rows": [{"method": "base", "figures": {"sums": figure}}]}
    (folder / "paper").mkdir(exist_ok=True)
    (folder / "paper" / "figures.json").write_text(json.dumps({"tables": [table]}))
    return folder


def test_published_figures_are_read_from_their_file_and_shown_beside_the_runs_own(
    whole_run: Bucket, storage: Storage, tmp_path: Path
) -> None:
    work = WORK.model_copy(update={"published": ASKED})
    report.main(context(storage, work, tmp_path, inputs=published(tmp_path, 12.5)))
    page, figures = files(whole_run)
    (table,) = figures["published"]["tables"]
    assert table["source"] == "Some et al., table 2"
    cell = table["rows"][0]["cells"]["sums"]
    assert (cell["published"], cell["printed"], cell["ours"], cell["side"]) == (0.125, "12.5", 0.0, "inside")
    assert figures["published"]["notPublished"] == ["CGD"]
    assert "published 12.5" in page


def test_published_figures_in_the_store_are_read_from_there(
    whole_run: Bucket, storage: Storage, tmp_path: Path
) -> None:
    whole_run.put("figures.json", (published(tmp_path, 12.5) / "paper" / "figures.json").read_bytes())
    there = ASKED.model_copy(update={"uri": whole_run.uri("figures.json")})
    report.main(context(storage, WORK.model_copy(update={"published": there}), tmp_path))
    assert files(whole_run)[1]["published"]["tables"][0]["rows"][0]["cells"]["sums"]["printed"] == "12.5"


def test_other_published_figures_are_another_report_and_without_any_it_is_as_it_was(
    whole_run: Bucket, storage: Storage, tmp_path: Path
) -> None:
    work = WORK.model_copy(update={"published": ASKED})
    digests = [
        report.main(context(storage, one, tmp_path, inputs=published(tmp_path, figure)))["report"].digest
        for one, figure in ((work, 12.5), (work, 13.0), (work, 12.5), (WORK, 12.5))
    ]
    assert digests[0] == digests[2]
    assert len(set(digests)) == 3
    assert "published" not in RunStore(whole_run, RUN).input("report").require().inputs
    assert "published" not in files(whole_run)[1]


def test_another_spec_is_another_report(whole_run: Bucket, storage: Storage, tmp_path: Path) -> None:
    first = report.main(context(storage, WORK, tmp_path))["report"].digest
    changed = WORK.model_copy(update={"spec": "student: {model: other}\n"})
    assert report.main(context(storage, changed, tmp_path))["report"].digest != first


def test_stages_without_output_are_missing_in_the_report_and_no_crash(
    bucket: Bucket, storage: Storage, tmp_path: Path
) -> None:
    finish(bucket, "prepare", lambda folder: [])
    report.main(context(storage, WORK, tmp_path))
    page, figures = files(bucket)
    assert "no output of refine, check, train-cgd, evaluate-base, evaluate-cgd" in page
    assert [stage["name"] for stage in figures["stages"] if stage["facts"] is None] == list(STAGES[1:])


def test_the_output_of_an_earlier_life_of_the_run_is_refused(bucket: Bucket, storage: Storage, tmp_path: Path) -> None:
    finish(bucket, "prepare", lambda folder: [], run=RUN.model_copy(update={"uid": "an earlier one"}))
    with pytest.raises(TransientError, match="earlier run"):
        report.main(context(storage, WORK, tmp_path))
