"""Builders for the tests of the report: a small run, as values."""

import math
from pathlib import Path
from typing import Any

from cgd_stages.contract import Published, Rows, RunRef, StageFacts
from cgd_stages.quality.marks import Alike, Graded, Lengths, Quality, share
from cgd_stages.results.model import (
    Audit,
    AuditCounts,
    Change,
    Disagreement,
    GradedOutput,
    Quadruple,
    Quadruples,
    ReportData,
    Sample,
    StageRecord,
    Step,
)
from cgd_stages.results.published import read

RUN = RunRef(namespace="team", name="first-run", uid="uid-1")
HOSTILE = "</script><script>alert(1)</script><!-- <b>&amp;\u2028 ]]> {{ 7 * 7 }} '\""


GRADED = Graded(
    sampled=30,
    rows=20,
    undecided=1,
    confusion={
        "right": {"right": 4, "wrong": 6},
        "wrong": {"right": 1, "wrong": 7},
        "missing": {"right": 0, "wrong": 2},
    },
    drafts_right=share(5, 20),
    refinements_right=share(13, 20),
    broken=share(0, 5),
    mended=share(8, 15),
    verdicts_right=share(11, 18),
    constant=13 / 18,
    leaks=share(6, 15),
    chance=share(3, 15),
)
QUALITY = Quality(
    rows=40,
    missing=share(2, 40),
    unchanged=share(4, 40),
    near_duplicates=share(2, 40),
    alike=(Alike(size=3, examples=("Sue has 3 apples.", "Ann has 5 apples.")),),
    lengths={text: Lengths(low=10, median=20, high=40, most=90) for text in ("prompt", "answer")},
    graded=GRADED,
)


def sample(identity: str = "q1", *, correct: bool, **changes: Any) -> Sample:
    given: dict[str, Any] = {
        "benchmark": "sums",
        "id": identity,
        "sample": 0,
        "prompt": f"What is {identity}?",
        "reference": "#### 4",
        "finish_reason": "stop",
        "tokens": 10,
        "answer_source": "text",
        "correct": correct,
        "grade_error": "",
    }
    return Sample.of(given | changes)


def change(**changes: Any) -> Change:
    given: dict[str, Any] = {
        "benchmark": "sums",
        "id": "q1",
        "trained": "cgd",
        "kind": "fixed",
        "prompt": "What is q1?",
        "reference": "#### 4",
        "base": GradedOutput(output="It is 5.", extracted="5", correct=False),
        "after": GradedOutput(output="It is 4.", extracted="4", correct=True),
    }
    return Change(**(given | changes))


def audit(**changes: Any) -> Audit:
    """Forty audited outputs with two disagreements, one of each kind."""
    given: dict[str, Any] = {"benchmark": "sums", "model": "cgd", "sample": 0, "reference": "#### 4"} | changes
    said = {"output": "So it is \\boxed{4}.", "extracted": "5", "rule": "value", "boxed": True} | changes
    count = AuditCounts(
        benchmark=given["benchmark"],
        model="cgd",
        both_right=19,
        both_wrong=19,
        lm_eval_alone=1,
        grader_alone=1,
        unboxed=3,
    )
    two = [Disagreement(**given | said | {"id": identity, "correct": correct})
           for identity, correct in (("q7", False), ("q8", True))]  # fmt: skip
    return Audit(judge="lm-eval 1.2.3", counts=(count,), disagreements=tuple(two))


def samples(marks: str, **changes: Any) -> tuple[Sample, ...]:
    """One output for each mark: + is right, - is wrong."""
    return tuple(sample(f"q{i:02d}", correct=mark == "+", **changes) for i, mark in enumerate(marks))


def stage(name: str, start: int = 0, end: int = 30, **changes: Any) -> StageRecord:
    """A finished stage from minute:second `start` to `end` (both in seconds after noon)."""
    facts: dict[str, Any] = {
        "rows": Rows(total=10, done=9, rejected=1),
        "prompt_tokens": 100,
        "generated_tokens": 200,
        "seconds": float(end - start),
        "digest": f"{name}-digest",
        "output_uri": f"s3://data/team/{name}/{name}-digest",
    }
    facts |= changes.pop("facts", {})
    given: dict[str, Any] = {"started": clock(start), "completed": clock(end), "rejections": {"truncated": 1}}
    return StageRecord(name=name, facts=StageFacts(**facts), **(given | changes))


def clock(seconds: int) -> str:
    return f"2026-11-22T{12 + seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}Z"


PUBLISHED = Path(__file__).parents[2] / "examples/paper/published.json"


def repeated() -> ReportData:
    """A run that repeats the paper on a few questions of its benchmarks, without BBH and CFT, with its figures."""
    student, teacher = "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.3-70B-Instruct"
    names = ("MATH-500", "Minerva", "GSM8K", "OlympiadBench", "AMC23", "TheoremQA", "AIME25")
    tasks = ("GPQA-Diamond", "MMLU-Pro", "IFEval", "MuSR", "TruthfulQA", "HumanEval")
    marks = {"base": "+--", "sft": "+---", "distilledsft": "++-", "refinedsft": "+-", "cgd": "+++-"}
    marks = {model: mark * (24 // len(mark)) for model, mark in marks.items()}
    objectives = {"sft": "SFT", "distilledsft": "DistilledSFT", "refinedsft": "RefinedSFT", "cgd": "CGD"}
    known = (*names, *tasks, "BBH", "AIME24")
    asked = Published(uri="configmap://paper/published.json", student=student, benchmarks=known)
    listed = [{"name": name, "task": name.lower()} for name in tasks]
    return report_data(
        stages=(
            stage("answer", 20, 50, inputs={"model": {"name": student}}),
            stage("critique", 60, 90, inputs={"model": {"name": teacher}}),
            *(stage(f"train-{model}", inputs={"objective": name}) for model, name in objectives.items()),
            *(stage(f"harness-{model}", inputs={"tasks": listed}) for model in marks),
        ),
        training={},
        evaluations={
            model: tuple(one for name in (*names, *tasks) for one in samples(mark, benchmark=name))
            for model, mark in marks.items()
        },
        published=read(PUBLISHED.read_text(), asked),
    )


def quadruple(identity: str = "00", **changes: Any) -> Quadruple:
    given: dict[str, Any] = {
        "id": identity,
        "sample": 0,
        "prompt": "What is 2 + 2?",
        "reference": "#### 4",
        "answer": "5",
        "critique": "Add again.\nConclusion: wrong",
        "refinement": "4",
        "verdict": "wrong",
        "tokens": {"answer": 1, "critique": 7, "refinement": 1},
    }
    return Quadruple(**(given | changes))


def steps(count: int) -> tuple[Step, ...]:
    return tuple(Step(step=i + 1, loss=2 * math.exp(-i / 10), learning_rate=1e-6, grad_norm=1.5) for i in range(count))


def report_data(**changes: Any) -> ReportData:
    """A finished run: the training fixes three of eight questions and breaks one."""
    model = {"model": {"name": "some/student", "revision": "abc"}}
    given: dict[str, Any] = {
        "run": RUN,
        "spec": "student:\n  model: some/student\n",
        "stages": (
            stage("prepare", 0, 10),
            stage("answer", 20, 50, inputs=model),
            stage("critique", 60, 90, inputs={"model": {"name": "some/teacher"}}),
            stage("refine", 90, 120),
            stage("train-cgd", 130, 200, facts={"metrics": {"tokens_per_second": 350.5, "final_loss": 0.5}}),
            stage("evaluate-base", 210, 240),
            stage("evaluate-cgd", 250, 280),
        ),
        "training": {"train-cgd": steps(30)},
        "evaluations": {"base": samples("++------"), "cgd": samples("+-+++---")},
        "changes": (change(), change(id="q2", kind="broken")),
        "quadruples": Quadruples(total=1, verdicts={"wrong": 1}, shown=(quadruple(),)),
    }
    return ReportData(**(given | changes))
