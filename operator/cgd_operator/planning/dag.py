"""The plan of a run: which children it needs, in which order, and the task of each. Pure: a spec in, values out."""

import hashlib
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any, Literal, TypeVar

from cgd_operator import yamls
from cgd_operator.api.evaluation import Evaluation
from cgd_operator.api.generation import Chat, ServedModel
from cgd_operator.api.spec import CGDRunSpec, parse_spec, readable_spec
from cgd_operator.api.training import Variant
from cgd_operator.planning import conveyor, scoring, served, tasks, trainings
from cgd_operator.planning.requests import NOTHING, UNKNOWN, Load, Sizes
from cgd_stages import contract
from cgd_stages.contract import StageName


@dataclass(frozen=True)
class Run:
    """A CGDRun as the operator needs it: who it is and what it asks for."""

    namespace: str
    name: str
    uid: str
    generation: int
    spec: CGDRunSpec
    labels: dict[str, str] = field(default_factory=dict)
    created: str = ""
    """The moment when the API server created it, in RFC 3339; empty for a manifest that was never applied."""

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> "Run":
        """Parse a resource as the API server returns it.

        Raises:
            InvalidRun: the spec cannot be run.
        """
        return cls._with(manifest, parse_spec(manifest))

    @classmethod
    def readable(cls, manifest: dict[str, Any]) -> "Run | None":
        """A resource whose spec cannot be run, as far as `cleaning` needs it; None: where it stores cannot be read."""
        spec = readable_spec(manifest)
        return cls._with(manifest, spec) if spec else None

    @classmethod
    def _with(cls, manifest: dict[str, Any], spec: CGDRunSpec) -> "Run":
        meta = manifest["metadata"]
        labels = meta.get("labels") or {}
        created = meta.get("creationTimestamp") or ""
        return cls(meta["namespace"], meta["name"], meta["uid"], meta.get("generation", 1), spec, labels, created)

    @property
    def resolved(self) -> CGDRunSpec:
        """The spec with what it leaves open and the run decides: whether the student thinks and whether it learns
        thoughts, which is one decision for its answers, its training and its evaluation, and the date of templates."""
        student, teacher, training = self.spec.student, self.spec.teacher, self.spec.training
        learned: contract.Learned = training.thinking or ("learn" if student.chat.thinking == "on" else "drop")
        today = self.created.partition("T")[0] or None
        spoken = {"thinking": "on" if learned == "learn" else "off", "date": student.chat.date or today}
        taught = {"date": teacher.chat.date or today} if teacher.model else {}
        changed = {
            "student": _with_chat(student, spoken),
            "teacher": _with_chat(teacher, taught),
            "training": training.model_copy(update={"thinking": learned}),
        }
        return self.spec.model_copy(update=changed)

    @property
    def names_modes(self) -> bool:
        """Whether the manifest says anything of thoughts or chats."""
        models = (self.spec.student, self.spec.teacher)
        return self.spec.training.thinking is not None or any(model.chat != Chat() for model in models)


M = TypeVar("M", bound=ServedModel)


def _with_chat(model: M, changes: dict[str, Any]) -> M:
    return model.model_copy(update={"chat": model.chat.model_copy(update=changes)})


Backend = Literal["PyTorchJob", "TrainJob"]
BACKENDS: tuple[Backend, ...] = ("PyTorchJob", "TrainJob")
"""What can run a training, in the order in which `auto` takes them."""


PoolName = Literal["cpu", "student", "teacher", "training"]
"""The parts of spec.placement."""
PREPARE, FETCH, ANSWER, TEACHER, CRITIQUE, REFINE, DISTILL, CHECK, REPORT, CLEAN = map(
    StageName, ("prepare", "fetch", "answer", "teacher", "critique", "refine", "distill", "check", "report", "clean")
)
"""Stages of which a run has only one. TEACHER names the child that critiques and refines; CLEAN, which deletes what a
run has stored, is no part of the plan: it starts when the run is deleted. FETCH is there with spec.modelCache alone."""
MISTEACHER, MISCRITIQUE, MISREFINE = map(StageName, ("misteacher", "miscritique", "misrefine"))
"""Of an ablation: MISTEACHER names the child that writes wrong critiques and what follows from them."""
GRACE_SECONDS, MOST_GRACE_SECONDS = 120, 600
"""What a pod has after SIGTERM to store what is finished; a training more where its checkpoint is large."""
STORED_A_SECOND = 200_000_000
"""Bytes of a checkpoint that a node brings to its disk and to S3 in a second: 1 GB/s to the disk, and from there
250 MB/s. Most nodes with GPUs are faster."""


@dataclass(frozen=True)
class Child:
    """One Job, PyTorchJob or TrainJob. It carries out one stage, or several in one pod (a fused teacher)."""

    name: str
    stage: StageName
    stages: tuple[StageName, ...]
    kind: Literal["Job"] | Backend
    pool: PoolName
    image: Literal["generate", "train"]
    pods: int
    gpus: int
    """GPUs of each pod."""
    after: tuple[StageName, ...]
    """Stages (of other children) that must have succeeded before this one starts."""
    make_task: Callable[[], contract.StageTask] = field(repr=False, compare=False)
    grace_seconds: int = GRACE_SECONDS
    load: Load = NOTHING
    """What each pod has to carry."""

    @cached_property
    def task(self) -> contract.StageTask:
        """What its program is told. Made when it is first asked for: most reconciles start no child."""
        return self.make_task()


def choose_backend(run: Run, served: Collection[Backend], started: Collection[str]) -> Backend | None:
    """The kind of the run's trainings: the kind of a training that exists (`started` holds the children's kinds), else
    what the run asks for, else the first that is served. None if the cluster does not serve it."""
    wanted = BACKENDS if run.spec.training.backend == "auto" else (run.spec.training.backend,)
    adopted = [backend for backend in BACKENDS if backend in started]
    return next((backend for backend in (*adopted, *wanted) if backend in served), None)


def plan(run: Run, backend: Backend = "PyTorchJob", sizes: Sizes = UNKNOWN) -> tuple[Child, ...]:
    """Every child of the run, in order; `backend` is the kind of its trainings, `sizes` those of models and checkpoints
    as prepare has reported them."""
    spec = run.resolved
    works = list(_works(spec))
    before_report = tuple(stage for work in works for stage in work.stages)
    shown = tuple(stage for stage in before_report if stage != FETCH)  # it stores nothing
    works.append(_Work(REPORT, lambda: tasks.report(spec, shown, _spec_text(run)), "cpu", before_report))
    return tuple(_child(run, work, backend, sizes) for work in works)


def cleaning(run: Run) -> Child:
    """The child that deletes what the run has stored."""
    return _child(run, _Work(CLEAN, contract.Clean, "cpu", ()), BACKENDS[0])


@dataclass(frozen=True)
class _Work:
    stage: StageName
    make: Callable[[], contract.Work]
    pool: PoolName
    after: tuple[StageName, ...]
    pods: int = 1

    @property
    def stages(self) -> tuple[StageName, ...]:
        return {TEACHER: (CRITIQUE, REFINE), MISTEACHER: (MISCRITIQUE, MISREFINE)}.get(self.stage, (self.stage,))


def _works(spec: CGDRunSpec) -> Iterator[_Work]:
    trains = cache(partial(trainings.trainings, spec))
    yield _Work(PREPARE, lambda: tasks.prepare(spec, trains(), scoring.everything(spec)), "cpu", ())
    begun: tuple[StageName, ...] = (PREPARE,)
    if spec.model_cache:
        yield _Work(FETCH, partial(tasks.fetch, spec), "cpu", begun)
        begun = (FETCH,)
    yield _Work(ANSWER, partial(tasks.generate, spec, "answer"), "student", begun, spec.student.shards)
    pool: PoolName = "teacher" if spec.teacher.model else "cpu"
    shards = spec.teacher.shards
    if spec.teacher.fused:
        yield _Work(TEACHER, partial(tasks.generate, spec, "critique", "refine"), pool, (ANSWER,), shards)
    else:
        yield _Work(CRITIQUE, partial(tasks.generate, spec, "critique"), pool, (ANSWER,), shards)
        yield _Work(REFINE, partial(tasks.generate, spec, "refine"), pool, (CRITIQUE,), shards)
    generated: tuple[StageName, ...] = (REFINE,)
    if spec.training.distills:
        yield _Work(DISTILL, partial(tasks.generate, spec, "distill"), pool, generated, shards)
        generated = (*generated, DISTILL)
    if spec.training.misleads:
        work = partial(tasks.generate, spec, "miscritique", "misrefine")
        yield _Work(MISTEACHER, work, pool, generated, shards)  # after the teacher's other work: it needs the same GPUs
        generated = (*generated, MISREFINE)
    for texts in scoring.by_teacher(spec):
        stage = contract.score_stage(texts)
        yield _Work(stage, partial(scoring.of_teacher, spec, texts), pool, generated, shards)
        generated = (*generated, stage)
    yield from _trainings(spec, generated, trains)
    if spec.evaluation:
        yield from _evaluations(spec, spec.evaluation)


def _trainings(
    spec: CGDRunSpec, generated: tuple[StageName, ...], trains: Callable[[], tuple[contract.Train, ...]]
) -> Iterator[_Work]:
    """A check on a CPU, then the trainings, so many side by side as training.parallel says: the others need the same
    GPUs. One that starts from another's model waits for it, and what scores for it comes between."""

    def train(number: int) -> contract.Train:
        return trains()[number]

    yield _Work(CHECK, lambda: tasks.check(spec, trains()), "cpu", generated)
    stages = [contract.train_stage(title) for title in spec.training.titles]
    variants = (*(None for _ in spec.training.objectives), *spec.training.ordered)
    for number, (stage, variant) in enumerate(zip(stages, variants, strict=True)):
        before = stages[number - spec.training.parallel] if number >= spec.training.parallel else None
        start = contract.train_stage(variant.from_) if variant and variant.from_ else None
        scores = None
        if variant in scoring.by_start(spec):
            scores = contract.score_stage(variant.name)
            after = (start or CHECK,)
            yield _Work(scores, partial(scoring.of_start, spec, variant), "student", after, spec.student.shards)
        waits = tuple(dict.fromkeys(one for one in (CHECK, before, start, scores) if one))
        if variant and variant.samples:
            yield from _beside(spec, variant, partial(train, number), waits)
        yield _Work(stage, partial(train, number), "training", waits, spec.training.workers)


def _beside(
    spec: CGDRunSpec, variant: Variant, train: Callable[[], contract.Train], waits: tuple[StageName, ...]
) -> Iterator[_Work]:
    """What works beside a training that learns what its student samples: all three go on round by round, and start
    together."""
    student, teacher = spec.student.shards, spec.teacher.shards
    rollouts, scores = contract.rollout_stage(variant.name), contract.score_stage(variant.name)
    yield _Work(rollouts, lambda: conveyor.rollout(spec, train()), "student", waits, student)
    yield _Work(scores, lambda: conveyor.score(spec, train()), "teacher", waits, teacher)


def _evaluations(spec: CGDRunSpec, evaluation: Evaluation) -> Iterator[_Work]:
    trained = tuple(map(contract.train_stage, spec.training.titles))
    if "base" in evaluation.models:
        yield from _measured("base", served.student(spec), spec, evaluation, trained)
    for rival in evaluation.rivals:
        work = partial(tasks.evaluate, spec, evaluation, served.student(spec), rival)
        yield _Work(StageName.of("evaluate", rival.kind.lower()), work, "student", trained)
    if "trained" in evaluation.models:
        for stage in trained:
            yield from _measured(stage.model, contract.Model(name=f"stage://{stage}"), spec, evaluation, (stage,))


def _measured(
    label: str, model: contract.Model, spec: CGDRunSpec, evaluation: Evaluation, after: tuple[StageName, ...]
) -> Iterator[_Work]:
    """A model on the benchmarks and, if the run has any, on tasks of lm-eval."""
    yield _Work(StageName.of("evaluate", label), partial(tasks.evaluate, spec, evaluation, model), "student", after)
    if evaluation.tasks:
        yield _Work(StageName.of("harness", label), partial(tasks.harness, spec, evaluation, model), "student", after)


def _child(run: Run, work: _Work, backend: Backend, sizes: Sizes = UNKNOWN) -> Child:
    training, gpus = work.pool == "training", _gpus(run.spec, work)
    return Child(
        name=child_name(run, work.stage),
        stage=work.stage,
        stages=work.stages,
        kind=backend if training else "Job",
        pool=work.pool,
        image="train" if training else "generate",
        pods=work.pods,
        gpus=gpus,
        after=work.after,
        make_task=partial(_task_of, run, work),
        grace_seconds=_grace(run.spec, sizes.checkpoint) if training else GRACE_SECONDS,
        load=_load(run.spec, work, gpus, sizes),
    )


def _load(spec: CGDRunSpec, work: _Work, gpus: int, sizes: Sizes) -> Load:
    weights = {"student": sizes.student, "training": sizes.student, "teacher": sizes.teacher, "cpu": 0}[work.pool]
    kept = spec.model_cache is not None
    if work.pool != "training":
        return Load(gpus, weights, kept, taken=weights if work.stage.kind == "rollout" else 0)
    parameters = weights // 2  # most are stored in two bytes
    offloaded = 12 * parameters // spec.training.workers if spec.training.offload != "none" else 0
    return Load(gpus, weights, kept, sizes.checkpoint, offloaded)


def _task_of(run: Run, work: _Work) -> contract.StageTask:
    return contract.StageTask(
        run=contract.RunRef(namespace=run.namespace, name=run.name, uid=run.uid),
        stage=work.stage,
        storage=tasks.storage_of(run.spec.storage),
        work=work.make(),
    )


def _grace(spec: CGDRunSpec, checkpoint_bytes: int) -> int:
    """Seconds in which a node of a training can store a checkpoint."""
    needed = math.ceil(checkpoint_bytes / STORED_A_SECOND)
    return spec.training.termination_grace_period_seconds or min(max(needed, GRACE_SECONDS), MOST_GRACE_SECONDS)


def child_name(run: Run, stage: StageName) -> str:
    """The name of a child. It is deterministic, so that creating a child twice creates it once. It depends on the run's
    uid, so that a run that was deleted and applied again does not meet its former children. A long run's name is cut so
    that the names of pods are labels, as Services need (the longest are a TrainJob's: `<child>-node-0-511-xxxxx`). It
    begins with a letter (RFC 1035), or the controllers of trainings, which make Services, would refuse it."""
    start = run.name if run.name[0].isalpha() else f"run-{run.name}"
    digest = hashlib.sha256(f"{run.uid}/{run.name}/{stage}".encode()).hexdigest()[:6]
    room = min(19, 32 - len(stage.model))
    return f"{start[:room].rstrip('-.')}-{stage}-{digest}".replace(".", "-")


def _gpus(spec: CGDRunSpec, work: _Work) -> int:
    if spec.placement.accelerator == "none":
        return 0
    match work.pool:
        case "student":
            return spec.student.tensor_parallel
        case "teacher":
            return spec.teacher.tensor_parallel
        case "training":
            return spec.training.gpus_per_worker
        case "cpu":
            return 0


def _spec_text(run: Run) -> str:
    """As it was given; where that says anything of chats, with what follows for them."""
    spec = run.resolved if run.names_modes else run.spec
    given = spec.model_dump(
        by_alias=True, exclude_defaults=True, exclude=set(spec.MUTABLE), mode="json", context=contract.MANIFEST
    )
    return yamls.dump(given)
