"""The task of each stage but the trainings and what belongs to them. Pure."""

from cgd_operator.api.benchmarks import BENCHMARKS, EXECUTED, INSTRUCTION, TASKS, Harnessed
from cgd_operator.api.evaluation import Benchmark, Evaluation, Task
from cgd_operator.api.fields import bytes_of
from cgd_operator.api.spec import CGDRunSpec, Storage
from cgd_operator.planning import served
from cgd_stages import contract
from cgd_stages.contract import StageName


def prepare(
    spec: CGDRunSpec, trainings: tuple[contract.Train, ...], scores: tuple[contract.Score, ...] | None
) -> contract.Prepare:
    evaluation, prompts = spec.evaluation, _prompts(spec)
    against = prompts.decontaminate.against if prompts.decontaminate else ()
    tasks = tuple(_task(task) for task in evaluation.tasks if task.name in against) if evaluation else ()
    roles: tuple[contract.Role, ...] = ("answer", "critique", "refine")
    if spec.training.distills:
        roles = (*roles, "distill")
    if spec.training.misleads:
        roles = (*roles, "miscritique", "misrefine")
    return contract.Prepare(
        prompts=prompts,
        benchmarks=tuple(map(benchmark, evaluation.benchmarks)) if evaluation else (),
        tasks=tasks or None,
        task_data=evaluation.task_data if evaluation and tasks else None,
        student=served.student(spec),
        student_engine=contract.Engine.part_of(spec.student),
        student_chat=served.chat(spec.student),
        teacher=served.teacher(spec),
        teacher_engine=contract.Engine.part_of(spec.teacher),
        teacher_chat=served.chat(spec.teacher),
        endpoint=_endpoint(spec),
        without_thoughts=_without_thoughts(spec),
        roles=roles,
        sampling=_sampling(spec, roles),
        instructions=_instructions(spec),
        evaluation=evaluation.sampling if evaluation else None,
        max_rejected=spec.generation.max_rejected,
        training=trainings[0],
        lessons=tuple(map(contract.Lesson.part_of, trainings)),
        scores=scores,
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


def fetch(spec: CGDRunSpec) -> contract.Fetch:
    models = [served.student(spec), *([teacher] if (teacher := served.teacher(spec)) else [])]
    drafts = [one.speculative.model for one in (spec.student, spec.teacher) if one.speculative]
    models += [contract.Model(name=name) for name in drafts if name]
    return contract.Fetch(models=tuple(dict.fromkeys(models)))


def generate(spec: CGDRunSpec, *roles: contract.Role) -> contract.Generate:
    own = roles == ("answer",)
    writer = spec.student if own else spec.teacher
    return contract.Generate(
        roles=roles,
        sampling=_sampling(spec, roles),
        instructions=None if own else _instructions(spec),
        samples=getattr(getattr(spec.generation, contract.settings_of(roles[-1])), "samples", 1),
        unfinished=spec.generation.answer.unfinished if own else "reject",
        model=served.student(spec) if own else served.teacher(spec),
        endpoint=None if own else _endpoint(spec),
        engine=contract.Engine.part_of(writer),
        chat=served.chat(writer),
        shards=writer.shards,
        max_rejected=spec.generation.max_rejected,
    )


def _instructions(spec: CGDRunSpec) -> contract.Instructions | None:
    """The teacher's, where the manifest has any."""
    given = {"critique": spec.generation.critique.instruction, "refine": spec.generation.refine.instruction}
    return contract.Instructions(**given) if any(given.values()) else None


def _sampling(spec: CGDRunSpec, roles: tuple[contract.Role, ...]) -> tuple[contract.Sampling, ...]:
    settings = map(contract.settings_of, roles)
    return tuple(contract.Sampling.part_of(getattr(spec.generation, field)) for field in settings)


def check(spec: CGDRunSpec, trainings: tuple[contract.Train, ...]) -> contract.Check:
    decontaminate = _prompts(spec).decontaminate
    return contract.Check(
        trainings=trainings,
        select=spec.generation.refine.select,
        keep=spec.training.keep,
        decontaminate=decontaminate if decontaminate and decontaminate.paraphrases else None,
        min_right_refinements=spec.generation.min_right_refinements,
    )


def evaluate(
    spec: CGDRunSpec, evaluation: Evaluation, model: contract.Model, rival: contract.Rival | None = None
) -> contract.Evaluate:
    return contract.Evaluate(
        model=model,
        benchmarks=tuple(map(benchmark, evaluation.benchmarks)),
        sampling=evaluation.sampling,
        engine=contract.Engine.part_of(spec.student),
        chat=served.chat(spec.student),
        rival=rival,
    )


def harness(spec: CGDRunSpec, evaluation: Evaluation, model: contract.Model) -> contract.Harness:
    return contract.Harness(
        model=model,
        tasks=tuple(map(_task, evaluation.tasks)),
        data=evaluation.task_data,
        engine=contract.Engine.part_of(spec.student),
        chat=served.chat(spec.student),
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


def benchmark(benchmark: Benchmark) -> contract.Benchmark:
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


def report(spec: CGDRunSpec, stages: tuple[StageName, ...], manifest: str) -> contract.Report:
    """`manifest`: the spec as YAML, for display."""
    return contract.Report(
        stages=stages,
        spec=manifest,
        student_chat=served.chat(spec.student),
        teacher_chat=served.chat(spec.teacher),
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
