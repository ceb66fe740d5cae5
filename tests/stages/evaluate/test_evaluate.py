"""Evaluation: the model sees the prompt alone, every question ends as a graded row, and nothing is asked twice."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from support.stage_builders import RUN, RuleEngine, VllmProgram, context, said, stop_after

from cgd_stages.contract import Benchmark, Evaluate, Model, Rival, Rows, Sampling, StageFacts, StageTask, Storage
from cgd_stages.contract import Engine as EngineSettings
from cgd_stages.engines.base import Refused, Reply, Request
from cgd_stages.errors import Interrupted, TransientError, UserError
from cgd_stages.evaluate import __main__ as evaluate
from cgd_stages.grading.grader import Grader
from cgd_stages.results.model import UNFINISHED_THOUGHT
from cgd_stages.runtime.pace import Pace
from cgd_stages.runtime.program import Context
from cgd_stages.store import part_writer
from cgd_stages.store.benchmarks import store_benchmarks
from cgd_stages.store.bucket import Bucket, patient
from cgd_stages.store.folder import Folder, read_rows
from cgd_stages.store.rows import Row, digest_of, from_parquet, now
from cgd_stages.store.run import RunStore

STAGE = "evaluate-base"
BOX = "Put the answer in a box."


def question(number: int, benchmark: str = "sums") -> Row:
    return {
        "benchmark": benchmark,
        "id": f"{number:020x}",
        "prompt": f"What is {number} + 1?",
        "reference": f"So {number} + 1.\n#### {number + 1}",
        "tolerance": None,
    }


def prepared(bucket: Bucket, questions: list[Row]) -> None:
    folder = Folder(bucket, RUN.namespace, "prepare", digest_of(questions=questions))
    part = store_benchmarks(folder, questions)
    RunStore(bucket, RUN).point_at(folder.finish(facts=StageFacts(), parts=[part], started=now(), inputs={}))


def work_for(model: Path, *benchmarks: str, samples: int = 1, rival: Rival | None = None) -> Evaluate:
    return Evaluate(
        model=Model(name=str(model)),
        benchmarks=tuple(
            Benchmark(name=name, source="", instruction=BOX, samples=samples) for name in benchmarks or ("sums",)
        ),
        sampling=Sampling(max_tokens=16, temperature=0.0 if samples == 1 else 0.7),
        engine=EngineSettings(dtype="float32"),
        rival=rival,
    )


def program(storage: Storage, tmp_path: Path, work: Evaluate) -> Context:
    made = context(storage, work, tmp_path)
    made.task = made.task.model_copy(update={"stage": STAGE})
    return made


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> RuleEngine:
    """A model that adds well, but cuts, stays silent, or is refused where a test says so."""
    engine = RuleEngine(adds)
    monkeypatch.setattr(evaluate, "_engine", lambda *_: engine)
    return engine


def adds(request: Request) -> Reply:
    number = int(request.messages[-1]["content"].split()[2])
    match number % 5:
        case 1:
            return said(request, "I do not know.")
        case 2:
            return said(request, f"It is clear that {number} + 1 = {number + 1}, and", "length")
        case 3:
            return Refused(request.name, "too_long", "the prompt has 99 tokens, the context 10", 99)
        case 4:
            return said(request, rf"\boxed{{{number + 2}}}")
        case _:
            return said(request, rf"It is \boxed{{{number + 1}.0}}")


def stored(bucket: Bucket, facts: StageFacts) -> list[Row]:
    rows = read_rows(Folder(bucket, RUN.namespace, STAGE, facts.digest))
    return sorted(rows, key=lambda row: (row["benchmark"], row["id"]))


def test_every_question_ends_as_a_row_that_says_how(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, engine: RuleEngine
) -> None:
    prepared(bucket, [question(number) for number in range(5)])
    facts = evaluate.main(program(storage, tmp_path, work_for(tiny_model)))[STAGE]
    assert facts.rows == Rows(total=5, done=5)
    told = [
        (row["finish_reason"], row["answer_source"], row["extracted"], row["correct"], row["rule"])
        for row in stored(bucket, facts)
    ]
    assert told == [
        ("stop", "boxed", "1.0", True, "value"),
        ("stop", "none", "", False, ""),
        ("length", "none", "", False, ""),
        ("too_long", "none", "", False, ""),
        ("stop", "boxed", "6", False, "value"),
    ]
    expected = {"accuracy": 0.2, "n": 5, "truncated": 1, "refused": 1, "unparsed": 3, "ungraded": 0}
    assert {name: facts.metrics[f"sums_{name}"] for name in expected} == expected
    assert 0 < facts.metrics["sums_low"] < 0.2 < facts.metrics["sums_high"] < 1


def test_the_turns_before_a_question_are_asked_before_it(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, engine: RuleEngine
) -> None:
    system = {"role": "system", "content": "Be brief."}
    prepared(bucket, [question(5) | {"turns": json.dumps([system])}, question(10)])
    facts = evaluate.main(program(storage, tmp_path, work_for(tiny_model)))[STAGE]
    asked = {len(request.messages): request.messages for request in engine.asked}
    assert asked[2] == [system, {"role": "user", "content": f"What is 5 + 1?\n\n{BOX}"}]
    assert asked[1] == [{"role": "user", "content": f"What is 10 + 1?\n\n{BOX}"}]
    kept = {row["prompt"]: row["turns"] for row in stored(bucket, facts)}
    assert kept == {f"What is 5 + 1?\n\n{BOX}": json.dumps([system]), f"What is 10 + 1?\n\n{BOX}": None}


def test_an_output_whose_thought_never_ended_has_no_answer_whatever_the_thought_holds(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def thinks(request: Request) -> Reply:
        number = int(request.messages[-1]["content"].split()[2])
        right = rf"\boxed{{{number + 1}}}"
        texts = [(f"<think>{right}", "length"), (f"<think>{right}", "stop"), (f"<think>hm</think>{right}", "stop")]
        return said(request, *texts[number])

    monkeypatch.setattr(evaluate, "_engine", lambda *_: RuleEngine(thinks))
    prepared(bucket, [question(number) for number in range(3)])
    facts = evaluate.main(program(storage, tmp_path, work_for(tiny_model)))[STAGE]
    assert [(row["output"], row["answer_source"], row["correct"]) for row in stored(bucket, facts)] == [
        ("", UNFINISHED_THOUGHT, False),
        ("", UNFINISHED_THOUGHT, False),
        (r"\boxed{3}", "boxed", True),
    ]
    assert [row["thinking"] for row in stored(bucket, facts)] == [r"\boxed{1}", r"\boxed{2}", "hm"]
    assert (facts.metrics["sums_unparsed"], facts.metrics["sums_unfinished"]) == (2, 2)


def test_the_first_estimate_of_what_remains_is_no_longer_than_the_work(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """48 questions are under way at once, and one ends in a second, after 7 in which none does."""
    prepared(bucket, [question(number) for number in range(48)])
    engine, seconds, etas = RuleEngine(adds, batch=1, room=64), [7.0], list[float | None]()
    engine.before_step = lambda: seconds.append(seconds.pop() + 1)
    monkeypatch.setattr(evaluate, "_engine", lambda *_: engine)
    monkeypatch.setattr(evaluate, "REPORT_SECONDS", 0)
    monkeypatch.setattr(evaluate, "Pace", lambda: Pace(lambda: seconds[0] if engine.asked else 0.0))
    given = program(storage, tmp_path, work_for(tiny_model))
    monkeypatch.setattr(given.progress, "report", lambda _stage, rows, *, eta, **told: etas.append(eta))
    evaluate.main(given)
    assert etas[:31] == [None] * 31
    assert etas[31] == pytest.approx(16 * 39 / 32)
    assert etas[-1] == 0


def test_the_model_is_given_the_question_and_the_instruction_and_nothing_else(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, engine: RuleEngine
) -> None:
    prepared(bucket, [question(7)])
    evaluate.main(program(storage, tmp_path, work_for(tiny_model)))
    (request,) = engine.asked
    assert request.messages == [{"role": "user", "content": f"What is 7 + 1?\n\n{BOX}"}]
    assert request.sampling.temperature == 0
    assert evaluate.asked("What?", "") == "What?"


def test_several_samples_are_a_row_each_and_drawn_with_seeds_of_their_own(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, engine: RuleEngine
) -> None:
    prepared(bucket, [question(0), question(1)])
    facts = evaluate.main(program(storage, tmp_path, work_for(tiny_model, samples=3)))[STAGE]
    rows = [(row["id"][-1], row["sample"]) for row in stored(bucket, facts)]
    assert sorted(rows) == [(which, sample) for which in "01" for sample in range(3)]
    assert len({request.sampling.seed for request in engine.asked}) == 6
    told = {name: facts.metrics[f"sums_{name}"] for name in ("n", "outputs", "accuracy", "pass_2", "pass_3")}
    assert told == {"n": 2, "outputs": 6, "accuracy": 0.5, "pass_2": 0.5, "pass_3": 0.5}


def test_base_and_trained_draw_with_the_same_seeds(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, engine: RuleEngine
) -> None:
    prepared(bucket, [question(0)])
    for stage in ("evaluate-base", "evaluate-cgd"):
        made = program(storage, tmp_path, work_for(tiny_model, samples=2))
        made.task = made.task.model_copy(update={"stage": stage})
        evaluate.main(made)
    seeds = [request.sampling.seed for request in engine.asked]
    assert seeds[:2] == seeds[2:]


def test_self_refine_is_graded_by_its_last_answer_and_pays_for_all_passes(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rule(request: Request) -> Reply:
        asked = request.messages[-1]["content"]
        if asked.endswith("Write the critique."):
            return said(request, "Add again.\nConclusion: wrong")
        return said(request, r"\boxed{1}" if asked.endswith("Write the improved answer.") else r"\boxed{2}")

    monkeypatch.setattr(evaluate, "_engine", lambda *_: RuleEngine(rule))
    prepared(bucket, [question(0)])
    alone = evaluate.main(program(storage, tmp_path, work_for(tiny_model)))[STAGE]
    rival = Rival(kind="SelfRefine", rounds=1)
    refined = evaluate.main(program(storage, tmp_path, work_for(tiny_model, rival=rival)))[STAGE]
    told = [
        (row["correct"], row["passes"], row["tokens"]) for facts in (alone, refined) for row in stored(bucket, facts)
    ]
    assert told == [(False, 1, 1), (True, 3, 1 + 4 + 1)]
    assert alone.digest != refined.digest


def test_an_evaluation_stopped_early_asks_only_for_the_rest(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, engine: RuleEngine
) -> None:
    prepared(bucket, [question(number) for number in range(20)])
    first = program(storage, tmp_path, work_for(tiny_model))
    stop_after(engine, 3, first.stop)
    with pytest.raises(Interrupted):
        evaluate.main(first)
    asked = len(engine.asked)
    engine.before_step, engine._waiting = lambda: None, []
    facts = evaluate.main(program(storage, tmp_path, work_for(tiny_model)))[STAGE]
    assert 0 < len(engine.asked) - asked < 20
    assert [row["id"] for row in stored(bucket, facts)] == [f"{number:020x}" for number in range(20)]


def test_an_evaluation_that_is_done_asks_nothing(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, engine: RuleEngine
) -> None:
    prepared(bucket, [question(0)])
    first = evaluate.main(program(storage, tmp_path, work_for(tiny_model)))
    assert evaluate.main(program(storage, tmp_path, work_for(tiny_model))) == first
    assert len(engine.asked) == 1


def test_only_the_benchmarks_of_the_task_are_asked_and_each_has_its_own_figures(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, engine: RuleEngine
) -> None:
    prepared(bucket, [question(0, "a"), question(5, "b"), question(10, "other")])
    facts = evaluate.main(program(storage, tmp_path, work_for(tiny_model, "a", "b")))[STAGE]
    assert {name.split("_")[0] for name in facts.metrics} == {"a", "b"}
    with pytest.raises(UserError, match="no questions of missing"):
        evaluate.main(program(storage, tmp_path, work_for(tiny_model, "missing")))


def test_the_tolerance_of_a_question_is_the_graders(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path, engine: RuleEngine
) -> None:
    close = question(0) | {"reference": "1.1", "tolerance": "0.2"}
    prepared(bucket, [close, question(5) | {"reference": "6.1"}])
    facts = evaluate.main(program(storage, tmp_path, work_for(tiny_model)))[STAGE]
    assert [(row["tolerance"], row["correct"], row["rule"]) for row in stored(bucket, facts)] == [
        ("0.2", True, "tolerance"),
        (None, False, "value"),
    ]


@pytest.mark.parametrize(
    ("parts", "left"),
    [(((0,), (0, 1)), 1), (((0, 1), (1, 2)), 0)],
    ids=["one is left to ask for", "none is"],
)
def test_rows_that_two_pods_have_stored_count_once(
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    engine: RuleEngine,
    parts: tuple[tuple[int, ...], ...],
    left: int,
) -> None:
    prepared(bucket, [question(number) for number in range(3)])
    work = work_for(tiny_model)
    made = program(storage, tmp_path, work)
    folder = made.store.folder(STAGE, evaluate._inputs(made, work, evaluate._questions(made, work)))
    verdict: dict[str, Any] = {
        "extracted": "1",
        "answer_source": "boxed",
        "correct": True,
        "rule": "",
        "grade_error": "",
    }
    done = {"sample": 0, "output": "1", "finish_reason": "stop", "prompt_tokens": 1, "tokens": 1, **verdict}
    for numbers in parts:
        folder.put_rows("parts/", [question(number) | done for number in numbers], evaluate.SCHEMA)
    facts = evaluate.main(made)[STAGE]
    assert facts.rows == Rows(total=3, done=3)
    assert [row["id"] for row in stored(bucket, facts)] == [f"{number:020x}" for number in range(3)]
    assert len(engine.asked) == left


def interrupted(
    bucket: Bucket, storage: Storage, tmp_path: Path, model: Path, engine: RuleEngine, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """An attempt at 20 questions that was stopped early; the keys of what it has stored, 3 rows a part."""
    monkeypatch.setattr(part_writer, "FLUSH_ROWS", 3)
    prepared(bucket, [question(number) for number in range(20)])
    attempt = program(storage, tmp_path, work_for(model))
    stop_after(engine, 3, attempt.stop)
    with pytest.raises(Interrupted):
        evaluate.main(attempt)
    engine.before_step, engine._waiting = lambda: None, []
    engine.asked.clear()
    return [stored.key for stored in bucket.list(f"{RUN.namespace}/{STAGE}/")]


@pytest.mark.parametrize("damage", ["cut", "empty", "another's", "gone"])
def test_the_rows_of_a_part_that_is_not_whole_are_asked_for_again_and_no_others(
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    engine: RuleEngine,
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
) -> None:
    first, *rest = interrupted(bucket, storage, tmp_path, tiny_model, engine, monkeypatch)
    whole = bucket.get(first) or b""
    kept = {row["id"] for key in rest for row in from_parquet(bucket.get(key) or b"")}
    bucket.put(first, {"cut": whole[:-10], "empty": b"", "another's": b"hello", "gone": whole}[damage])
    get = Bucket.get
    with monkeypatch.context() as patch:
        if damage == "gone":  # between the listing and the reading
            patch.setattr(Bucket, "get", lambda self, key: None if key == first else get(self, key))
        facts = evaluate.main(program(storage, tmp_path, work_for(tiny_model)))[STAGE]
    assert facts.rows == Rows(total=20, done=20)
    assert len(kept) > 3
    assert {request.name.split("/")[1] for request in engine.asked} == {f"{n:020x}" for n in range(20)} - kept
    assert [row["id"] for row in stored(bucket, facts)] == [f"{number:020x}" for number in range(20)]


def test_while_the_store_is_away_an_evaluation_goes_on(
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    engine: RuleEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"FLUSH_ROWS": 1, "RETRY_SECONDS": 0.0, "RETRY_SHARE": 1e9}.items():
        monkeypatch.setattr(part_writer, name, value)
    monkeypatch.setattr(evaluate, "UNGRADED_ROWS", 1)  # each step waits for the grader
    prepared(bucket, [question(number) for number in range(20)])
    put, steps = inspect.unwrap(Bucket.put), iter(range(100))
    away: list[bool] = []
    refused: list[str] = []

    @patient
    def put_if_there(self: Bucket, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        if away:
            refused.append(key)
            raise TransientError("the store is away")
        return bool(put(self, key, data, if_absent=if_absent))

    def before() -> None:
        away[:] = [True] if 1 <= next(steps) < 6 else []

    monkeypatch.setattr(Bucket, "put", put_if_there)
    engine.before_step = before
    facts = evaluate.main(program(storage, tmp_path, work_for(tiny_model)))[STAGE]
    assert facts.rows == Rows(total=20, done=20)
    assert refused
    assert len(engine.asked) == 20


@pytest.mark.parametrize(
    ("output", "finish_reason", "source", "correct"),
    [
        (r"\boxed{3} because", "length", "boxed", True),
        ("the answer is 3", "length", "none", False),
        ("the answer is 3", "stop", "text", True),
        ("", "length", "none", False),
        ("", "stop", "none", False),
    ],
)
def test_a_cut_output_counts_only_with_its_box_and_an_empty_one_never(
    output: str, finish_reason: str, source: str, correct: bool
) -> None:
    with Grader(workers=1) as grader:
        found = evaluate.grade(
            grader, {"reference": "3", "tolerance": None, "output": output, "finish_reason": finish_reason}
        )
    assert (found.answer_source, found.correct) == (source, correct)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_with_the_real_vllm_every_question_is_answered_and_graded(
    bucket: Bucket, storage: Storage, tmp_path: Path, tiny_model: Path
) -> None:
    prepared(bucket, [question(number) for number in range(20)])
    task = StageTask(run=RUN, stage=STAGE, storage=storage, work=work_for(tiny_model))
    ended = VllmProgram("evaluate", task, tmp_path).wait()
    assert ended.code == 0, ended.log
    facts = ended.words.stages[STAGE]
    assert facts.rows == Rows(total=20, done=20)
    rows = stored(bucket, facts)
    assert all(row["tokens"] > 0 and row["prompt_tokens"] > 0 for row in rows)
    assert all(row["prompt"].endswith(BOX) for row in rows)


def test_the_first_error_is_told_when_the_store_fails_too(
    bucket: Bucket,
    storage: Storage,
    tmp_path: Path,
    tiny_model: Path,
    engine: RuleEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepared(bucket, [question(number) for number in range(5)])
    work = program(storage, tmp_path, work_for(tiny_model))

    steps = iter((False, True))

    def breaks() -> None:
        if not next(steps):
            return

        def away(*_: object, **__: object) -> None:
            raise TransientError("the store is away")

        monkeypatch.setattr(Folder, "put_rows", away)
        raise UserError("the engine wants another setting")

    engine.before_step = breaks
    with pytest.raises(UserError, match="another setting"):
        evaluate.main(work)
