"""The plan of a run: which children it needs, in which order, and what each is told. Pure: a spec in, values out."""

import hashlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from cgd_operator import yamls
from cgd_operator.api.benchmarks import BENCHMARKS, EXECUTED, INSTRUCTION, TASKS
from cgd_operator.api.evaluation import Benchmark, Evaluation, Task
from cgd_operator.api.fields import bytes_of
from cgd_operator.api.generation import Sampling, ServedModel, Source
from cgd_operator.api.spec import CGDRunSpec, Storage, parse_spec, readable_spec
from cgd_operator.api.training import Critique, Validation
from cgd_stages import contract


@dataclass(frozen=True)
class Run:
    """A CGDRun as the operator needs it: who it is and what it asks for."""

    namespace: str
    name: str
    uid: str
    generation: int
    spec: CGDRunSpec
    labels: dict[str, str] = field(default_factory=dict)

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
        return cls(meta["namespace"], meta["name"], meta["uid"], meta.get("generation", 1), spec, labels)


Backend = Literal["PyTorchJob", "TrainJob"]
BACKENDS: tuple[Backend, ...] = ("PyTorchJob", "TrainJob")
"""What can run a training, in the order in which `auto` takes them."""


GRACE_SECONDS, MOST_GRACE_SECONDS = 120, 600
"""What a pod has after SIGTERM to store what is finished; a training more where its checkpoint is large."""
STORED_A_SECOND = 200_000_000
"""Bytes of a checkpoint that a node brings to its disk and to S3 in a second: 1 GB/s to the disk, and from there
250 MB/s. Most nodes with GPUs are faster."""


@dataclass(frozen=True)
class Child:
    """One Job, PyTorchJob or TrainJob. It carries out one stage, or several in one pod (a fused teacher)."""

    name: str
    stage: str
    stages: tuple[str, ...]
    kind: Literal["Job"] | Backend
    pool: Literal["cpu", "student", "teacher", "training"]
    image: Literal["generate", "train"]
    pods: int
    gpus: int
    """GPUs of each pod."""
    after: tuple[str, ...]
    """Stages (of other children) that must have succeeded before this one starts."""
    task: contract.StageTask
    grace_seconds: int = GRACE_SECONDS


def choose_backend(run: Run, served: Collection[Backend], started: Collection[str]) -> Backend | None:
    """What runs the trainings: what runs one already (`started` holds the children's kinds), else what the run asks
    for, else the first that is served. None when the cluster does not serve it."""
    wanted = BACKENDS if run.spec.training.backend == "auto" else (run.spec.training.backend,)
    adopted = [one for one in BACKENDS if one in started]
    return next((one for one in (*adopted, *wanted) if one in served), None)


def plan(run: Run, backend: Backend = "PyTorchJob", checkpoint_bytes: int = 0) -> tuple[Child, ...]:
    """Every child of the run, in order; `backend` is the kind of its trainings, `checkpoint_bytes` what prepare has
    told of their checkpoints, 0: nothing."""
    works = list(_works(run.spec))
    before_report = tuple(stage for work in works for stage in work.stages)
    report = contract.Report(stages=before_report, spec=_spec_text(run.spec))
    works.append(_Work("report", ("report",), report, "cpu", before_report))
    return tuple(_child(run, work, backend, checkpoint_bytes) for work in works)


CLEAN = "clean"
"""Stage of the child that deletes what a run has stored. No part of the plan: it comes when the run is deleted."""


def cleaning(run: Run) -> Child:
    """The child that deletes what the run has stored."""
    return _child(run, _Work(CLEAN, (CLEAN,), contract.Clean(), "cpu", ()), BACKENDS[0])


def stage_names(spec: CGDRunSpec) -> tuple[str, ...]:
    """The stages of a run, in order, as the status lists them."""
    return (*(stage for work in _works(spec) for stage in work.stages), "report")


@dataclass(frozen=True)
class _Work:
    stage: str
    stages: tuple[str, ...]
    work: contract.Work
    pool: Literal["cpu", "student", "teacher", "training"]
    after: tuple[str, ...]


def _works(spec: CGDRunSpec) -> Iterator[_Work]:
    yield _Work("prepare", ("prepare",), _prepare(spec), "cpu", ())
    yield _Work("answer", ("answer",), _generate(spec, ("answer",)), "student", ("prepare",))
    pool: Literal["cpu", "teacher"] = "teacher" if spec.teacher.model else "cpu"
    if spec.teacher.fused:
        roles: tuple[contract.Role, ...] = ("critique", "refine")
        yield _Work("teacher", roles, _generate(spec, roles), pool, ("answer",))
    else:
        yield _Work("critique", ("critique",), _generate(spec, ("critique",)), pool, ("answer",))
        yield _Work("refine", ("refine",), _generate(spec, ("refine",)), pool, ("critique",))
    generated: tuple[str, ...] = ("refine",)
    if "DistilledSFT" in spec.training.objectives:
        yield _Work("distill", ("distill",), _generate(spec, ("distill",)), pool, generated)
        generated = (*generated, "distill")
    yield from _trainings(spec, generated)
    if spec.evaluation:
        trained = tuple(contract.train_stage(objective) for objective in spec.training.objectives)
        yield from _evaluations(spec, spec.evaluation, trained)


def _trainings(spec: CGDRunSpec, generated: tuple[str, ...]) -> Iterator[_Work]:
    """A check on a CPU, then one training after another: they want the same GPUs."""
    works = tuple(_train(spec, objective) for objective in spec.training.objectives)
    yield _Work("check", ("check",), _check(spec, works), "cpu", generated)
    before: tuple[str, ...] = ("check",)
    for work in works:
        stage = contract.train_stage(work.objective)
        yield _Work(stage, (stage,), work, "training", before)
        before = ("check", stage)


def _evaluations(spec: CGDRunSpec, evaluation: Evaluation, trained: tuple[str, ...]) -> Iterator[_Work]:
    if "base" in evaluation.models:
        model = _student(spec)
        yield _Work("evaluate-base", ("evaluate-base",), _evaluate(spec, evaluation, model), "student", trained)
    if "base" in evaluation.models and evaluation.tasks:
        general = _harness(spec, evaluation, _student(spec))
        yield _Work("harness-base", ("harness-base",), general, "student", trained)
    for rival in evaluation.rivals:
        name = f"evaluate-{rival.kind.lower()}"
        method = contract.Rival(kind=rival.kind, rounds=rival.rounds)
        work = _evaluate(spec, evaluation, _student(spec)).model_copy(update={"rival": method})
        yield _Work(name, (name,), work, "student", trained)
    if "trained" in evaluation.models:
        for stage in trained:
            name = stage.replace("train-", "evaluate-")
            model = contract.Model(name=f"stage://{stage}")
            yield _Work(name, (name,), _evaluate(spec, evaluation, model), "student", (stage,))
            if evaluation.tasks:
                name = stage.replace("train-", "harness-")
                yield _Work(name, (name,), _harness(spec, evaluation, model), "student", (stage,))


def _child(run: Run, work: _Work, backend: Backend, checkpoint_bytes: int = 0) -> Child:
    task = contract.StageTask(
        run=contract.RunRef(namespace=run.namespace, name=run.name, uid=run.uid),
        stage=work.stage,
        storage=storage_of(run.spec.storage),
        work=work.work,
    )
    training = isinstance(work.work, contract.Train)
    return Child(
        name=child_name(run, work.stage),
        stage=work.stage,
        stages=work.stages,
        kind=backend if training else "Job",
        pool=work.pool,
        image="train" if training else "generate",
        pods=_pods(work.work),
        gpus=_gpus(run.spec, work),
        after=work.after,
        task=task,
        grace_seconds=_grace(run.spec, checkpoint_bytes) if training else GRACE_SECONDS,
    )


def _grace(spec: CGDRunSpec, checkpoint_bytes: int) -> int:
    """Seconds in which a node of a training can store a checkpoint."""
    needed = math.ceil(checkpoint_bytes / STORED_A_SECOND)
    return spec.training.termination_grace_period_seconds or min(max(needed, GRACE_SECONDS), MOST_GRACE_SECONDS)


def child_name(run: Run, stage: str) -> str:
    """Deterministic, so that creating a child twice is creating it once; of a run's uid, so that a run that was
    deleted and applied again does not meet the children of the former one. Of a long run's name so much that its pods'
    names are labels (a TrainJob's are the longest: `<child>-node-0-511-xxxxx`), which is what Services need. It begins
    with a letter (RFC 1035), or the controllers of trainings, which make Services, would refuse it."""
    start = run.name if run.name[0].isalpha() else f"run-{run.name}"
    digest = hashlib.sha256(f"{run.uid}/{run.name}/{stage}".encode()).hexdigest()[:6]
    return f"{start[:19].rstrip('-.')}-{stage}-{digest}".replace(".", "-")


def _pods(work: contract.Work) -> int:
    match work:
        case contract.Generate():
            return work.shards
        case contract.Train():
            return work.workers
        case _:
            return 1


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
    evaluation = spec.evaluation
    return contract.Prepare(
        prompts=_prompts(spec),
        benchmarks=tuple(_benchmark(one) for one in evaluation.benchmarks) if evaluation else (),
        student=_student(spec),
        student_engine=_engine(spec.student),
        teacher=_teacher(spec),
        teacher_engine=_engine(spec.teacher),
        endpoint=_endpoint(spec),
        max_rejected=percent(spec.generation.max_rejected),
        training=_train(spec, spec.training.objectives[0]),
        gpu_memory=bytes_of(memory) if (memory := spec.placement.gpu_memory) else None,
    )


def _generate(spec: CGDRunSpec, roles: tuple[contract.Role, ...]) -> contract.Generate:
    own = roles == ("answer",)
    served = spec.student if own else spec.teacher
    return contract.Generate(
        roles=roles,
        sampling=tuple(_sampling(getattr(spec.generation, role)) for role in roles),
        model=_student(spec) if own else _teacher(spec),
        endpoint=None if own else _endpoint(spec),
        engine=_engine(served),
        shards=served.shards,
        max_rejected=percent(spec.generation.max_rejected),
    )


def _check(spec: CGDRunSpec, trainings: tuple[contract.Train, ...]) -> contract.Check:
    least = spec.generation.min_right_refinements
    return contract.Check(trainings=trainings, min_right_refinements=percent(least) if least else None)


_OTHERS = {
    "objectives", "critique", "validation", "gpus_per_worker", "backend", "termination_grace_period_seconds",
}  # fmt: skip
"""Fields of spec.training that a training is told otherwise, or not at all."""


def _train(spec: CGDRunSpec, objective: contract.Objective) -> contract.Train:
    training = spec.training
    return contract.Train.model_validate(
        {
            **training.model_dump(exclude=_OTHERS),
            "objective": objective,
            "critique": _critique(training.critique) if objective == "CGD" else contract.Critique(),
            "validation": _validation(training.validation),
            "processes_per_worker": training.gpus_per_worker,
            "student": _student(spec),
            "learning_rate": float(training.learning_rate),
            "warmup_ratio": float(training.warmup_ratio),
            "weight_decay": float(training.weight_decay),
            "max_rejected": percent(spec.generation.max_rejected),
        }
    )


def _critique(critique: Critique) -> contract.Critique:
    return contract.Critique(kind=critique.kind, rate=float(critique.rate or 0))


def _validation(validation: Validation) -> contract.Validation:
    fraction = validation.fraction
    return contract.Validation(
        fraction=None if fraction is None else float(fraction),
        every_steps=validation.every_steps,
        select=validation.select or "best",
    )


def _evaluate(spec: CGDRunSpec, evaluation: Evaluation, model: contract.Model) -> contract.Evaluate:
    return contract.Evaluate(
        model=model,
        benchmarks=tuple(_benchmark(one) for one in evaluation.benchmarks),
        sampling=_sampling(evaluation.sampling),
        engine=_engine(spec.student),
    )


def _harness(spec: CGDRunSpec, evaluation: Evaluation, model: contract.Model) -> contract.Harness:
    return contract.Harness(
        model=model,
        tasks=tuple(_task(one) for one in evaluation.tasks),
        data=evaluation.task_data,
        engine=_engine(spec.student),
    )


def _task(task: Task) -> contract.HarnessTask:
    """A task of lm-eval; what the manifest leaves out of one that is known by its name is filled in."""
    known = TASKS.get(task.name)
    metric = task.metric or (known.metric if known else "")
    few_shot = known.few_shot if known and task.few_shot is None else task.few_shot
    name = known.task if known else task.name
    return contract.HarnessTask(
        name=task.name,
        task=name,
        metric=metric,
        few_shot=few_shot,
        limit=task.limit,
        executes=name in EXECUTED,
        own_code=task.own_code,
    )


def _student(spec: CGDRunSpec) -> contract.Model:
    return contract.Model(name=spec.student.model, revision=spec.student.revision)


def _teacher(spec: CGDRunSpec) -> contract.Model | None:
    if spec.teacher.model is None:
        return None
    return contract.Model(name=spec.teacher.model, revision=spec.teacher.revision)


def _endpoint(spec: CGDRunSpec) -> contract.Endpoint | None:
    endpoint = spec.teacher.endpoint
    if endpoint is None:
        return None
    return contract.Endpoint(url=endpoint.url, model=endpoint.model, max_concurrency=endpoint.max_concurrency)


def _engine(served: ServedModel) -> contract.Engine:
    return contract.Engine(
        max_model_len=served.max_model_len,
        tensor_parallel=served.tensor_parallel,
        dtype=served.dtype,
        max_num_seqs=served.max_num_seqs,
        max_num_batched_tokens=served.max_num_batched_tokens,
        gpu_memory_utilization=float(memory) if (memory := served.gpu_memory_utilization) else None,
    )


def _sampling(sampling: Sampling) -> contract.Sampling:
    return contract.Sampling(
        max_tokens=sampling.max_tokens,
        temperature=float(sampling.temperature),
        top_p=float(sampling.top_p),
        seed=sampling.seed,
    )


def _prompts(spec: CGDRunSpec) -> contract.Prompts:
    source = _source(spec.prompts)
    return contract.Prompts(**dict(source), seed=spec.prompts.seed, decontaminate=_decontaminate(spec))


def _decontaminate(spec: CGDRunSpec) -> contract.Decontaminate | None:
    wanted, evaluation = spec.prompts.decontaminate, spec.evaluation
    if wanted is None or evaluation is None:
        return None
    against = wanted.against or tuple(benchmark.name for benchmark in evaluation.benchmarks)
    return contract.Decontaminate(against=against, ngram=wanted.ngram)


def _source(given: Source) -> contract.Source:
    fields = contract.Fields(prompt=given.fields.prompt, reference=given.fields.reference)
    return contract.Source(source=given.source, fields=fields, limit=given.limit)


def _benchmark(benchmark: Benchmark) -> contract.Benchmark:
    """The benchmark with what is known of its name where the spec says nothing."""
    known = BENCHMARKS.get(benchmark.name)
    given = benchmark.model_dump(exclude_none=True)
    filled = (
        {
            "source": known.source,
            "fields": known.fields,
            "instruction": INSTRUCTION,
            "tolerance": known.tolerance,
            "questions": known.questions,
        }
        if known
        else {}
    )
    return contract.Benchmark.model_validate(filled | given)


def storage_of(storage: Storage) -> contract.Storage:
    """The object store as stage programs are told of it."""
    return contract.Storage(
        uri=storage.uri.rstrip("/"),
        endpoint=storage.endpoint,
        region=storage.region,
        path_style=storage.path_style,
        ca_bundle="/etc/cgd/ca/ca.crt" if storage.ca_bundle_config_map_ref else None,
    )


def _spec_text(spec: CGDRunSpec) -> str:
    given = spec.model_dump(by_alias=True, exclude_defaults=True, exclude=set(spec.MUTABLE), mode="json")
    return yamls.dump(given)


def percent(text: str) -> float:
    """`2%` -> 0.02"""
    return float(text.removesuffix("%")) / 100
