"""The plan of a run: which children it needs, in which order, and the task of each. Pure: a spec in, values out."""

import hashlib
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any, Literal, TypeVar

from cgd_operator import yamls
from cgd_operator.api.benchmarks import BENCHMARKS, EXECUTED, INSTRUCTION, TASKS, Harnessed
from cgd_operator.api.evaluation import Benchmark, Evaluation, Task
from cgd_operator.api.fields import bytes_of
from cgd_operator.api.generation import Chat, ServedModel
from cgd_operator.api.spec import CGDRunSpec, Storage, parse_spec, readable_spec
from cgd_operator.api.training import Variant
from cgd_operator.planning import scoring
from cgd_operator.planning.requests import NOTHING, UNKNOWN, Load, Sizes
from cgd_operator.planning.served import chat as _chat
from cgd_operator.planning.served import student as _student
from cgd_operator.planning.served import teacher as _teacher
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
    works.append(_Work(REPORT, partial(_report, run, spec, shown), "cpu", before_report))
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
    yield _Work(PREPARE, partial(_prepare, spec), "cpu", ())
    begun: tuple[StageName, ...] = (PREPARE,)
    if spec.model_cache:
        yield _Work(FETCH, partial(_fetch, spec), "cpu", begun)
        begun = (FETCH,)
    yield _Work(ANSWER, partial(_generate, spec, "answer"), "student", begun, spec.student.shards)
    pool: PoolName = "teacher" if spec.teacher.model else "cpu"
    shards = spec.teacher.shards
    if spec.teacher.fused:
        yield _Work(TEACHER, partial(_generate, spec, "critique", "refine"), pool, (ANSWER,), shards)
    else:
        yield _Work(CRITIQUE, partial(_generate, spec, "critique"), pool, (ANSWER,), shards)
        yield _Work(REFINE, partial(_generate, spec, "refine"), pool, (CRITIQUE,), shards)
    generated: tuple[StageName, ...] = (REFINE,)
    if spec.training.distills:
        yield _Work(DISTILL, partial(_generate, spec, "distill"), pool, generated, shards)
        generated = (*generated, DISTILL)
    if spec.training.misleads:
        work = partial(_generate, spec, "miscritique", "misrefine")
        yield _Work(MISTEACHER, work, pool, generated, shards)  # after the teacher's other work: it needs the same GPUs
        generated = (*generated, MISREFINE)
    for texts in scoring.by_teacher(spec):
        stage = contract.score_stage(texts)
        yield _Work(stage, partial(scoring.of_teacher, spec, texts), pool, generated, shards)
        generated = (*generated, stage)
    yield from _trainings(spec, generated)
    if spec.evaluation:
        yield from _evaluations(spec, spec.evaluation)


def _trainings(spec: CGDRunSpec, generated: tuple[StageName, ...]) -> Iterator[_Work]:
    """A check on a CPU, then the trainings, so many side by side as training.parallel says: the others need the same
    GPUs. One that starts from another's model waits for it, and what scores for it comes between."""
    trains = cache(partial(_trains, spec))

    def train(number: int) -> contract.Train:
        return trains()[number]

    yield _Work(CHECK, lambda: _check(spec, trains()), "cpu", generated)
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
        waits = dict.fromkeys(one for one in (CHECK, before, start, scores) if one)
        yield _Work(stage, partial(train, number), "training", tuple(waits), spec.training.workers)


def _check(spec: CGDRunSpec, trainings: tuple[contract.Train, ...]) -> contract.Check:
    decontaminate = _prompts(spec).decontaminate
    return contract.Check(
        trainings=trainings,
        select=spec.generation.refine.select,
        keep=spec.training.keep,
        decontaminate=decontaminate if decontaminate and decontaminate.paraphrases else None,
        min_right_refinements=spec.generation.min_right_refinements,
    )


def _evaluations(spec: CGDRunSpec, evaluation: Evaluation) -> Iterator[_Work]:
    trained = tuple(map(contract.train_stage, spec.training.titles))
    if "base" in evaluation.models:
        yield from _measured("base", _student(spec), spec, evaluation, trained)
    for rival in evaluation.rivals:
        work = partial(_evaluate, spec, evaluation, _student(spec), rival)
        yield _Work(StageName.of("evaluate", rival.kind.lower()), work, "student", trained)
    if "trained" in evaluation.models:
        for stage in trained:
            yield from _measured(stage.model, contract.Model(name=f"stage://{stage}"), spec, evaluation, (stage,))


def _measured(
    label: str, model: contract.Model, spec: CGDRunSpec, evaluation: Evaluation, after: tuple[StageName, ...]
) -> Iterator[_Work]:
    """A model on the benchmarks and, if the run has any, on tasks of lm-eval."""
    yield _Work(StageName.of("evaluate", label), partial(_evaluate, spec, evaluation, model), "student", after)
    if evaluation.tasks:
        yield _Work(StageName.of("harness", label), partial(_harness, spec, evaluation, model), "student", after)


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
        load=_load(run.spec, work.pool, gpus, sizes),
    )


def _load(spec: CGDRunSpec, pool: PoolName, gpus: int, sizes: Sizes) -> Load:
    weights = {"student": sizes.student, "training": sizes.student, "teacher": sizes.teacher, "cpu": 0}[pool]
    kept = spec.model_cache is not None
    if pool != "training":
        return Load(gpus, weights, kept)
    parameters = weights // 2  # most are stored in two bytes
    offloaded = 12 * parameters // spec.training.workers if spec.training.offload != "none" else 0
    return Load(gpus, weights, kept, sizes.checkpoint, offloaded)


def _task_of(run: Run, work: _Work) -> contract.StageTask:
    return contract.StageTask(
        run=contract.RunRef(namespace=run.namespace, name=run.name, uid=run.uid),
        stage=work.stage,
        storage=storage_of(run.spec.storage),
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


def _prepare(spec: CGDRunSpec) -> contract.Prepare:
    evaluation, trains, prompts = spec.evaluation, _trains(spec), _prompts(spec)
    against = prompts.decontaminate.against if prompts.decontaminate else ()
    tasks = tuple(_task(task) for task in evaluation.tasks if task.name in against) if evaluation else ()
    roles: tuple[contract.Role, ...] = ("answer", "critique", "refine")
    if spec.training.distills:
        roles = (*roles, "distill")
    if spec.training.misleads:
        roles = (*roles, "miscritique", "misrefine")
    return contract.Prepare(
        prompts=prompts,
        benchmarks=tuple(map(_benchmark, evaluation.benchmarks)) if evaluation else (),
        tasks=tasks or None,
        task_data=evaluation.task_data if evaluation and tasks else None,
        student=_student(spec),
        student_engine=contract.Engine.part_of(spec.student),
        student_chat=_chat(spec.student),
        teacher=_teacher(spec),
        teacher_engine=contract.Engine.part_of(spec.teacher),
        teacher_chat=_chat(spec.teacher),
        endpoint=_endpoint(spec),
        without_thoughts=_without_thoughts(spec),
        roles=roles,
        sampling=_sampling(spec, roles),
        instructions=_instructions(spec),
        evaluation=evaluation.sampling if evaluation else None,
        max_rejected=spec.generation.max_rejected,
        training=trains[0],
        lessons=tuple(map(contract.Lesson.part_of, trains)),
        scores=scoring.everything(spec),
        gpu_memory=bytes_of(memory) if (memory := spec.placement.gpu_memory) else None,
        graded_by=_graded_by(spec),
        published=published_of(spec),
    )


def _graded_by(spec: CGDRunSpec) -> tuple[str, ...] | None:
    """The fields that have refinements graded, by which rows are chosen or the run is ended."""
    asked = {
        "spec.training.keep": spec.training.keep != "all",
        "spec.generation.refine.select": spec.generation.refine.select != "first",
        "spec.generation.minRightRefinements": spec.generation.min_right_refinements is not None,
    }
    return tuple(field for field, asks in asked.items() if asks) or None


def _without_thoughts(spec: CGDRunSpec) -> tuple[str, ...] | None:
    """The known tasks of lm-eval that a student that thinks must reply to without a thought."""
    tasks = spec.evaluation.tasks if spec.evaluation and _thinks(spec) else ()
    return tuple(task.name for task in tasks if task.name in TASKS and not TASKS[task.name].thoughts) or None


def _thinks(spec: CGDRunSpec) -> bool:
    return spec.student.chat.thinking == "on"


def _fetch(spec: CGDRunSpec) -> contract.Fetch:
    models = [_student(spec), *([teacher] if (teacher := _teacher(spec)) else [])]
    drafts = [one.speculative.model for one in (spec.student, spec.teacher) if one.speculative]
    models += [contract.Model(name=name) for name in drafts if name]
    return contract.Fetch(models=tuple(dict.fromkeys(models)))


def _generate(spec: CGDRunSpec, *roles: contract.Role) -> contract.Generate:
    own = roles == ("answer",)
    served = spec.student if own else spec.teacher
    return contract.Generate(
        roles=roles,
        sampling=_sampling(spec, roles),
        instructions=None if own else _instructions(spec),
        samples=getattr(getattr(spec.generation, contract.settings_of(roles[-1])), "samples", 1),
        unfinished=spec.generation.answer.unfinished if own else "reject",
        model=_student(spec) if own else _teacher(spec),
        endpoint=None if own else _endpoint(spec),
        engine=contract.Engine.part_of(served),
        chat=_chat(served),
        shards=served.shards,
        max_rejected=spec.generation.max_rejected,
    )


def _instructions(spec: CGDRunSpec) -> contract.Instructions | None:
    """The teacher's, where the manifest has any."""
    given = {"critique": spec.generation.critique.instruction, "refine": spec.generation.refine.instruction}
    return contract.Instructions(**given) if any(given.values()) else None


def _sampling(spec: CGDRunSpec, roles: tuple[contract.Role, ...]) -> tuple[contract.Sampling, ...]:
    settings = map(contract.settings_of, roles)
    return tuple(contract.Sampling.part_of(getattr(spec.generation, field)) for field in settings)


def _trains(spec: CGDRunSpec) -> tuple[contract.Train, ...]:
    """All trainings, in order: one for each objective, then one for each variant."""
    plain = (_train(spec, objective, {}) for objective in spec.training.objectives)
    varied = (_train(spec, variant.kind, _own(variant)) for variant in spec.training.ordered)
    return _judged((*plain, *varied))


def _judged(trains: tuple[contract.Train, ...]) -> tuple[contract.Train, ...]:
    """`stopUnless` judges CGD with its own critiques: a baseline or an ablation that falls behind is a result, and does
    not end the run. Where no training is such a CGD, it judges all."""
    judged = [train for train in trains if train.objective == "CGD" and train.critique.kind == "matched"]
    return tuple(train if not judged or train in judged else _unjudged(train) for train in trains)


def _unjudged(train: contract.Train) -> contract.Train:
    early = train.early and train.early.model_copy(update={"stop_unless": None})
    return train.model_copy(update={"early": early})


def _own(variant: Variant) -> dict[str, Any]:
    """The settings of a variant, with what its kind needs and the manifest leaves out."""
    own = variant.model_dump(exclude={"kind", "from_"}, exclude_none=True)
    defaults = {"beta": contract.DPO_BETA, "texts": "refined", "top_k": contract.TOP_K}
    own = {name: value for name, value in defaults.items() if variant.kind in contract.SETTINGS[name]} | own
    return own | ({"start": contract.train_stage(variant.from_)} if variant.from_ else {})


def _train(spec: CGDRunSpec, objective: contract.Objective, own: dict[str, Any]) -> contract.Train:
    """A training of an objective; `own` are the settings of a variant. What the manifest leaves out of critique and
    validation is what a task says by itself."""
    elsewhere = {"objectives", "variants", "keep", "stop_unless"}
    elsewhere |= {"parallel", "backend", "gpus_per_worker", "termination_grace_period_seconds"}
    elsewhere |= {setting for setting, readers in contract.SETTINGS.items() if objective not in readers}
    return contract.Train(
        **spec.training.model_dump(exclude=elsewhere, exclude_none=True) | own,
        objective=objective,
        student=_student(spec),
        chat=_chat(spec.student),
        processes_per_worker=spec.training.gpus_per_worker,
        early=_early(spec),
        max_rejected=spec.generation.max_rejected,
        common_rows=_chooses_rows(spec),
    )


def _early(spec: CGDRunSpec) -> contract.Early | None:
    evaluation = spec.evaluation
    if evaluation is None or evaluation.early is None:
        return None
    return contract.Early(
        **evaluation.early.model_dump(),
        instructions={benchmark.name: _benchmark(benchmark).instruction for benchmark in evaluation.benchmarks},
        stop_unless=spec.training.stop_unless,
    )


def _chooses_rows(spec: CGDRunSpec) -> bool:
    """Whether a training may learn fewer rows than its objective could use."""
    several = len(spec.training.titles) > 1 or spec.generation.refine.samples > 1
    decontaminate = spec.prompts.decontaminate
    removes = decontaminate is not None and decontaminate.paraphrases == "remove"
    return several or removes or spec.training.keep != "all"


def _evaluate(
    spec: CGDRunSpec, evaluation: Evaluation, model: contract.Model, rival: contract.Rival | None = None
) -> contract.Evaluate:
    return contract.Evaluate(
        model=model,
        benchmarks=tuple(map(_benchmark, evaluation.benchmarks)),
        sampling=evaluation.sampling,
        engine=contract.Engine.part_of(spec.student),
        chat=_chat(spec.student),
        rival=rival,
    )


def _harness(spec: CGDRunSpec, evaluation: Evaluation, model: contract.Model) -> contract.Harness:
    return contract.Harness(
        model=model,
        tasks=tuple(map(_task, evaluation.tasks)),
        data=evaluation.task_data,
        engine=contract.Engine.part_of(spec.student),
        chat=_chat(spec.student),
        max_tokens=evaluation.sampling.max_tokens if _thinks(spec) else None,
    )


def _task(task: Task) -> contract.HarnessTask:
    """A task of lm-eval; what the manifest leaves out of one that is known by its name is filled in."""
    known = TASKS.get(task.name, Harnessed(task.name, metric=""))
    return contract.HarnessTask(
        name=task.name,
        task=known.task,
        metric=task.metric or known.metric,
        few_shot=known.few_shot if task.few_shot is None else task.few_shot,
        limit=task.limit,
        executes=known.task in EXECUTED,
        own_code=task.own_code,
    )


def _endpoint(spec: CGDRunSpec) -> contract.Endpoint | None:
    return contract.Endpoint.part_of(spec.teacher.endpoint) if spec.teacher.endpoint else None


def _prompts(spec: CGDRunSpec) -> contract.Prompts:
    """With the names of all benchmarks, where decontaminate names none; and of all tasks where it looks for
    paraphrases, because earlier builds, which looked for copies alone, did not compare with tasks."""
    prompts, decontaminate = spec.prompts.model_dump(), spec.prompts.decontaminate
    if spec.evaluation and decontaminate and not decontaminate.against:
        names = [benchmark.name for benchmark in spec.evaluation.benchmarks]
        names += [task.name for task in spec.evaluation.tasks] if decontaminate.paraphrases else []
        prompts["decontaminate"]["against"] = names
    return contract.Prompts.model_validate(prompts)


def _benchmark(benchmark: Benchmark) -> contract.Benchmark:
    """The benchmark with what is known of its name where the spec says nothing."""
    known = BENCHMARKS.get(benchmark.name)
    filled = {name: getattr(known, name) for name in ("source", "fields", "tolerance", "questions")} if known else {}
    instruction = {"instruction": INSTRUCTION} if known else {}
    return contract.Benchmark.model_validate(instruction | filled | benchmark.model_dump(exclude_none=True))


def storage_of(storage: Storage) -> contract.Storage:
    """The object store as tasks name it."""
    ca_bundle = "/etc/cgd/ca/ca.crt" if storage.ca_bundle_config_map_ref else None
    place = {"uri": storage.uri.rstrip("/"), "ca_bundle": ca_bundle}
    return contract.Storage.part_of(storage).model_copy(update=place)


def _report(run: Run, spec: CGDRunSpec, stages: tuple[StageName, ...]) -> contract.Report:
    return contract.Report(
        stages=stages,
        spec=_spec_text(run),
        student_chat=_chat(spec.student),
        teacher_chat=_chat(spec.teacher),
        thinking=spec.training.thinking or "drop",
        audit=(spec.evaluation and spec.evaluation.audit) or None,
        published=published_of(spec),
    )


def published_of(spec: CGDRunSpec) -> contract.Published | None:
    """The published figures that the run asks for, with the names that they may have."""
    evaluation = spec.evaluation
    if evaluation is None or evaluation.published is None:
        return None
    benchmarks, tasks = (one.name for one in evaluation.benchmarks), (one.name for one in evaluation.tasks)
    names = tuple(dict.fromkeys((*benchmarks, *tasks, *BENCHMARKS, *TASKS)))
    return contract.Published(uri=evaluation.published, student=spec.student.model, benchmarks=names)


def _spec_text(run: Run) -> str:
    """As it was given; where that says anything of chats, with what follows for them."""
    spec = run.resolved if run.names_modes else run.spec
    given = spec.model_dump(
        by_alias=True, exclude_defaults=True, exclude=set(spec.MUTABLE), mode="json", context=contract.MANIFEST
    )
    return yamls.dump(given)
