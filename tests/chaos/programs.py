"""Every stage program with a small task of its own, for the suite that interrupts them.

Each is put into a place of its own in the store, with what the stages before it would have stored there.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.stage_builders import GREEDY, RUN, generate_work, prepare_work, prepared
from support.train_builders import STAGE, quadruple, refined, train_work

from cgd_stages.contract import (
    Benchmark,
    Check,
    Clean,
    Endpoint,
    Engine,
    Evaluate,
    Generate,
    Harness,
    HarnessTask,
    Model,
    OnPolicy,
    Report,
    Rollout,
    Sampling,
    Score,
    StageFacts,
    StageTask,
    Storage,
    Work,
)
from cgd_stages.store.benchmarks import BENCHMARK_SCHEMA, store_benchmarks
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import PARTS, Folder
from cgd_stages.store.rows import digest_of, now, row_schema
from cgd_stages.store.run import RunStore

TEXTS = [f"How many apples are {number} apples and {number} more?" for number in range(40)]
ROWS = [quadruple(number, reference=f"#### {2 * number + 1}") for number in range(40)]
TRAINED = 8
"""Rows of a training: two steps of an epoch."""
SUMS = """\
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


@dataclass(frozen=True)
class Place:
    """What a program finds: the store, the tiny model, and an endpoint that answers."""

    storage: Storage
    model: Path
    endpoint: str

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.storage)


@dataclass(frozen=True)
class Program:
    """A stage program. `work` fills the place and says what to do there; a heavy one starts vLLM or torch."""

    name: str
    module: str
    stage: str
    work: Callable[[Place], Work]
    heavy: bool = False
    by_hand: bool = False
    """`make chaos-signals` has it, and CI has not."""

    def task(self, place: Place) -> StageTask:
        return StageTask(run=RUN, stage=self.stage, storage=place.storage, work=self.work(place))


def _prepare(place: Place) -> Work:
    lines = (json.dumps({"question": text, "answer": "1"}) for text in TEXTS)
    place.bucket.put("prompts.jsonl", "\n".join(lines).encode())
    return prepare_work(place.model, f"{place.storage.uri}/prompts.jsonl")


def _ask_endpoint(place: Place) -> Work:
    prepared(place.bucket, TEXTS)
    endpoint = Endpoint(url=place.endpoint, model="chaos", max_concurrency=4)
    return Generate(roles=("distill",), sampling=(GREEDY,), endpoint=endpoint, max_rejected=0.02)


def _answer(place: Place) -> Work:
    prepared(place.bucket, TEXTS)
    return generate_work(place.model, "answer")


def _check(place: Place) -> Work:
    refined(place.bucket, ROWS)
    return Check(trainings=(train_work(place.model), train_work(place.model, objective="SFT")))


def _score(place: Place) -> Work:
    refined(place.bucket, ROWS)
    student = _model(place)
    return Score(
        objective="RefinedSFT", student=student, model=student, engine=_engine(), max_sequence_length=600, top_k=16,
        max_rejected=0.0,
    )  # fmt: skip


def _rollout(place: Place) -> Work:
    """One round: for the next one it would wait for a training."""
    refined(place.bucket, ROWS)
    engine, teacher = _engine(), _model(place)
    drawn = OnPolicy(refresh=1000, max_tokens=16, engine=engine, teacher=teacher, teacher_engine=engine)
    return Rollout(training=train_work(place.model, name="opd", objective="OPD", form="reward", on_policy=drawn))


def _train(place: Place) -> Work:
    refined(place.bucket, ROWS[:TRAINED])
    return train_work(place.model, checkpoint_every_steps=1)


def _evaluate(place: Place) -> Work:
    empty = dict.fromkeys(BENCHMARK_SCHEMA.names)
    questions = [empty | {"benchmark": "sums", "id": text, "prompt": text, "reference": "#### 1"} for text in TEXTS]
    folder = Folder(place.bucket, RUN.namespace, "prepare", digest_of(questions=TEXTS))
    part = store_benchmarks(folder, questions)
    RunStore(place.bucket, RUN).point_at(folder.finish(facts=StageFacts(), parts=[part], started=now(), inputs={}))
    sums = Benchmark(name="sums", source="", instruction="Add them.")
    return Evaluate(model=_model(place), benchmarks=(sums,), sampling=Sampling(max_tokens=16), engine=_engine())


def _harness(place: Place) -> Work:
    prepared(place.bucket, TEXTS[:1])
    uri = f"{place.storage.uri}-mirror"
    mirror = place.bucket.at(uri)
    mirror.put("tasks/sums.yaml", SUMS.encode())
    mirror.put("sums.jsonl", "".join(f'{{"question": "{text}", "answer": "1"}}\n' for text in TEXTS).encode())
    sums = HarnessTask(name="sums", task="sums", metric="exact_match,none")
    return Harness(model=_model(place), tasks=(sums,), data=uri, engine=_engine())


def _report(place: Place) -> Work:
    refined(place.bucket, ROWS)
    return Report(stages=("prepare", "refine", "check"), spec="student: {}")


def _clean(place: Place) -> Work:
    for name in range(3):
        folder = Folder(place.bucket, RUN.namespace, "prepare", digest_of(name=name))
        RunStore(folder.bucket, RUN).claim(folder)
        rows: list[dict[str, Any]] = [
            {"id": text, "sample": name, "prompt": text, "reference": None, "prompt_tokens": 1} for text in TEXTS
        ]
        parts = [folder.put_rows(PARTS, [row], row_schema("prepare")) for row in rows]
        folder.finish(facts=StageFacts(), parts=parts, started=now(), inputs={})
    return Clean()


def _model(place: Place) -> Model:
    return Model(name=str(place.model))


def _engine() -> Engine:
    return Engine(dtype="float32")


PROGRAMS = (
    Program("prepare", "prepare", "prepare", _prepare),
    Program("endpoint", "generate", "distill", _ask_endpoint),
    Program("check", "check", "check", _check),
    Program("report", "report", "report", _report),
    Program("clean", "clean", "clean", _clean),
    Program("answer", "generate", "answer", _answer, heavy=True),
    Program("score", "score", "score-refined", _score, heavy=True, by_hand=True),
    Program("rollout", "rollout", "rollout-opd", _rollout, heavy=True, by_hand=True),
    Program("train", "train", STAGE, _train, heavy=True),
    Program("evaluate", "evaluate", "evaluate-base", _evaluate, heavy=True),
    Program("harness", "harness", "harness-base", _harness, heavy=True),
)
