"""Read, check and store the prompts, and refuse what would fail later on a GPU.

    CGD_TASK='{...}' python -m cgd_stages.prepare

First it tries the store, the endpoint, both models, their tokenizers and templates. Then it reads the source row by
row. A usable row is kept (or, where a sample is drawn, perhaps not drawn); any other is rejected with its reason.
"""

from cgd_stages.runtime.supervisor import supervise

if __name__ == "__main__":
    supervise()  # before the other imports: SIGTERM may come while they last

import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import (
    CHECKPOINT_BYTES,
    STUDENT_BYTES,
    TEACHER_BYTES,
    TOLERANCE,
    Benchmark,
    Chat,
    Engine,
    Fields,
    Instructions,
    Model,
    Prepare,
    StageFacts,
    Train,
    settings_of,
)
from cgd_stages.errors import UserError
from cgd_stages.grading.reference import has_answer
from cgd_stages.method import prompts
from cgd_stages.models import fit, resolve, targets, training_memory
from cgd_stages.models.attention import try_packing
from cgd_stages.models.export import try_export
from cgd_stages.models.mixture import lacks_router_loss
from cgd_stages.prepare.columns import identity_of, row_of, value_at
from cgd_stages.prepare.intake import STAGE, Intake, groups_of, schema_of
from cgd_stages.prepare.sampling import Sample
from cgd_stages.prepare.sources import File, Line, open_source, read_lines
from cgd_stages.prepare.tasks import read_tasks
from cgd_stages.prepare.tryout import (
    check_endpoint,
    check_engine,
    check_published,
    read_instructions,
    read_template,
    refuse_other_tokens,
    try_conversations,
    try_grading,
    try_out,
    try_references,
)
from cgd_stages.prepare.values import as_text, is_empty
from cgd_stages.quality.contamination import Questions
from cgd_stages.quality.paraphrases import FOUND, FOUND_SCHEMA, Findings, Originals
from cgd_stages.runtime.program import Context, run
from cgd_stages.store.benchmarks import BENCHMARK_SCHEMA, store_benchmarks, store_originals
from cgd_stages.store.folder import Folder
from cgd_stages.store.rows import Row, digest_of
from cgd_stages.store.run import Product

log = logging.getLogger(__name__)


def main(context: Context) -> dict[str, StageFacts]:
    work = context.work_of(Prepare)
    log.info("storage: %s as %s", context.task.storage.uri, context.store.bucket.probe())
    placed = work.instructions
    if placed:
        work = work.model_copy(update={"instructions": read_instructions(context, placed)})
    if work.endpoint:
        check_endpoint(work, work.endpoint)
    chats = {
        where: read_template(context, chat, where)
        for where, chat in (("spec.student", work.student_chat), ("spec.teacher", work.teacher_chat))
    }
    if work.published:
        check_published(context, work.published)
    models, drafts = _check_models(context, work, chats)
    student = models[0]
    files = open_source(context, work.prompts, "spec.prompts")
    benchmark_files = {
        benchmark.name: open_source(context, benchmark, _where(benchmark)) for benchmark in work.benchmarks
    }
    questions = [
        row for benchmark in work.benchmarks for row in read_benchmark(benchmark, benchmark_files[benchmark.name])
    ]
    documents, unchecked = read_tasks(context, work.tasks or (), work.task_data)
    against = work.prompts.decontaminate.against if work.prompts.decontaminate else ()
    originals = [row for row in (*questions, *documents) if row["benchmark"] in against]
    inputs = {
        "stage": STAGE,
        "prompts": work.prompts.given(),
        "files": [file.sha256 for file in files],
        "benchmarks": digest_of(questions=questions),
        "models": [model.resolved.identity() for model in models],
        "context": student.context,
        "frame": prompts.fingerprint("answer"),
        **_compared(work, originals, unchecked),
        **_templates(work, chats, placed),
        **student.template.identity(),
    }

    def read_prompts(folder: Folder) -> Product:
        intake = _open_intake(context, work, student, folder, questions, originals)
        if work.prompts.near_duplicates == "remove":
            intake.groups = groups_of(read_lines(files, "spec.prompts", work.prompts.fields), work.prompts.fields)
        intake.read(read_lines(files, "spec.prompts", work.prompts.fields), context)
        log.info("%s", intake.summary())
        intake.check()
        if intake.thoughts_left_out:
            log.warning(
                "%d conversations have thoughts in assistant turns before the prompt: they are left out, as chat "
                "templates leave them out",
                intake.thoughts_left_out,
            )
        if intake.contaminated:
            hint = "not of those named in against" if intake.questions else "spec.prompts.decontaminate removes them"
            log.warning("%d prompts are benchmark questions word for word (%s)", intake.contaminated, hint)
        metrics = intake.metrics | {"benchmark_questions": float(len(questions))}
        metrics |= {"unchecked_tasks": float(len(unchecked))} if unchecked else {}
        facts = StageFacts(rows=intake.rows, prompt_tokens=intake.tokens, metrics=metrics)
        stored = [store_benchmarks(folder, questions)]
        if intake.findings:
            found = folder.put_rows(FOUND, intake.findings.questions(), FOUND_SCHEMA)
            stored += [store_originals(folder, originals), found]
        pins = drafts | _pins(models, [*files, *(file for opened in benchmark_files.values() for file in opened)])
        notes = {"pins": pins} | ({"unchecked": unchecked} if unchecked else {})
        return Product(facts, [*intake.writer.parts, *stored], notes=notes)

    done = context.store.make_once(STAGE, inputs, read_prompts)
    # The rows may be another run's, which trains something else: what they are for this run is not stored.
    stored, teacher = context.store.place(STAGE, inputs), models[-1].template if work.teacher else None
    found = try_conversations(work, teacher, stored) | try_grading(work, stored)
    found |= try_references(work, student.template, stored)
    context.store.point_at(done)
    metrics = done.facts.metrics | found | _checkpoint_bytes(context, work, student) | _weights(context, models)
    return {STAGE: done.facts.model_copy(update={"metrics": metrics})}


@dataclass(frozen=True)
class Checked:
    """A model that loads and suits the spec: its exact identity, its small files, how it is spoken to, and how it is
    to be served."""

    resolved: resolve.Resolved
    folder: Path
    template: ChatTemplate
    served: fit.Served

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its reply together."""
        return self.served.context


def _check_models(context: Context, work: Prepare, chats: dict[str, Chat]) -> tuple[list[Checked], dict[str, str]]:
    """The student and, unless it is an endpoint, the teacher; and the commits of the models that write their drafts, by
    name. Raises UserError for what the run cannot do with them."""
    student = check_model(context, work.student, work.student_engine, "spec.student", chats["spec.student"])
    stored = resolve.tensors(student.served.model, context.store.bucket, context.scratch)
    _refuse_untrainable(student, work.training, stored)
    _warn_of_thoughts(work, student.template)
    _warn_of_budgets(work)
    models = [student]
    if work.teacher:
        teacher = check_model(context, work.teacher, work.teacher_engine, "spec.teacher", chats["spec.teacher"])
        models.append(teacher)
        if teacher.context < student.context:
            log.warning(
                "the teacher's context (%d tokens) is smaller than the student's (%d): long answers will be rejected",
                teacher.context,
                student.context,
            )
    spoken = models[-1].template if work.teacher else None
    _warn_of_empty_thoughts(work, spoken)
    if spoken and any(score.model == work.teacher for score in work.scores or ()):
        refuse_other_tokens(student.template, spoken)
    try_out(work, student.template, spoken)
    if work.gpu_memory:
        gpus = fit.Gpus(memory=work.gpu_memory, training=_largest(work))
        fit.refuse_misfits(context.store.bucket, context.scratch, gpus, [model.served for model in models])
    drafts: dict[str, str] = {}
    for model in models:
        drafts |= check_engine(context, model.served)
    return models, drafts


def _largest(work: Prepare) -> Train:
    """The run's training, with the room of its largest example: a pair has two texts of that length at most."""
    longest = work.training.max_sequence_length
    has_pairs = any(lesson.objective == "DPO" for lesson in work.lessons)
    return work.training.model_copy(update={"max_sequence_length": (2 if has_pairs else 1) * longest})


def check_model(context: Context, model: Model, engine: Engine, where: str, chat: Chat) -> Checked:
    """Load everything but the weights. Raises UserError when the model does not exist or does not suit the spec."""
    resolved = resolve.resolve(model, context.store)
    exact = model.model_copy(update={"revision": resolved.revision}) if resolve.is_hub(model) else model
    folder = resolve.fetch(exact, context.store, context.scratch, weights=False)
    config = fit.read_config(folder, model, where)
    with resolve.reading(model, where, "tokenizer"):
        template = ChatTemplate.load(folder, chat, name=model.name)
    length = fit.context_length(config, engine, model, where)
    log.info("%s: %s", where, template.summary)
    log.info("%s: %s at %s, context %d tokens", where, model.name, resolved.revision, length)
    return Checked(resolved, folder, template, fit.Served(where, exact, engine, config, length))


def _refuse_untrainable(checked: Checked, work: Train, stored: list[resolve.Tensor] | None) -> None:
    """Raise UserError for a student that this training cannot train, or whose trained model it could not store.
    `stored`: the tensors of its weights, None where nobody knows them."""
    student, config = checked.served, checked.served.config
    if (method := fit.quantization(config)) not in (None, fit.MXFP4):
        raise UserError(
            f"the weights of {student.model.name} are quantized ({method}), and cannot be trained",
            hint="Set spec.student.model to the model as it was before its quantization.",
        )
    if work.router_loss_weight and (lack := lacks_router_loss(config)):
        raise UserError(
            f"spec.training.routerLossWeight is set, but {student.model.name} {lack}",
            hint="Leave spec.training.routerLossWeight out.",
        )
    try_export(checked.folder, config, checked.template, stored)
    if work.adapter:
        targets.refuse(config, checked.template.tokenizer, work.adapter)
        if work.learning_rate < targets.LEAST_RATE:
            log.warning("spec.training.learningRate is %g: an adapter learns little", work.learning_rate)
    if work.packing:
        try_packing(config)


def _warn_of_thoughts(work: Prepare, student: ChatTemplate) -> None:
    """Log what often goes wrong with a student that thinks: greedy decoding, and no room for a thought."""
    if not student.thinks or student.chat.thinking == "auto":
        return
    sampling = dict(zip(work.roles, work.sampling, strict=True))
    if "answer" in sampling and sampling["answer"].temperature == 0:
        log.warning(
            "the student thinks and decodes greedily, which makes many models repeat themselves: see what its maker "
            "advises, and set spec.generation.answer.temperature"
        )
    longest = max((sampling[role].max_tokens for role in ("refine", "distill") if role in sampling), default=0)
    if work.training.thinking == "learn" and work.training.max_sequence_length <= longest:
        log.warning(
            "an example holds its context, a thought and a target: with spec.training.maxSequenceLength %d and texts "
            "of up to %d tokens, long ones will be rejected as too_long",
            work.training.max_sequence_length,
            longest,
        )


def _warn_of_empty_thoughts(work: Prepare, teacher: ChatTemplate | None) -> None:
    """Log what makes every example of a training learn an empty thought, so that a student that thinks learns not to.
    `teacher`: None behind an endpoint."""
    lessons = [lesson for lesson in work.lessons or (work.training,) if lesson.thinking == "learn"]
    thoughtless = work.teacher_chat.thinking == "off" or (teacher is not None and not teacher.thinks)
    empty = [lesson.title for lesson in lessons if thoughtless or lesson.objective == "SFT"]
    if not empty:
        return
    cause = "the teacher does not think (spec.teacher.chat)" if thoughtless else "a reference has no thought to learn"
    log.warning(
        "spec.training.thinking is learn, but %s: every example of %s learns an empty thought, and the student is "
        "evaluated thinking. Set spec.training.thinking to drop%s",
        cause,
        ", ".join(empty),
        ', or spec.teacher.chat.thinking to "on"' if thoughtless else ", or train another objective",
    )


def _warn_of_budgets(work: Prepare) -> None:
    """Log budgets of thoughts that are no smaller than a limit of thought and text together: they end no thought."""
    limits = {
        f"generation.{settings_of(role)}": sampling.max_tokens
        for role, sampling in zip(work.roles, work.sampling, strict=True)
    }
    if work.evaluation:
        limits["evaluation.sampling"] = work.evaluation.max_tokens
    for field, limit in limits.items():
        by_student = field in ("generation.answer", "evaluation.sampling")
        owner, chat = ("student", work.student_chat) if by_student else ("teacher", work.teacher_chat)
        budget = chat.thinking_budget if chat.thinking != "off" else None
        if budget and budget >= limit:
            log.warning(
                "spec.%s.chat.thinkingBudget (%d) ends no thought: spec.%s.maxTokens (%d) ends thought and text "
                "together; a long thought has no text after it, and is rejected. Set the budget below that",
                owner,
                budget,
                field,
                limit,
            )


def _checkpoint_bytes(context: Context, work: Prepare, student: Checked) -> dict[str, float]:
    """The metric that tells how large a checkpoint of the training will be, where the model's files show it. It is not
    stored, because runs that share these rows may train them in another layout."""
    tensors = resolve.tensors(student.served.model, context.store.bucket, context.scratch)
    if tensors is None:
        return {}
    if fit.quantization(student.served.config) == fit.MXFP4:
        tensors = fit.as_trained(tensors)
    parameters, stored = sum(tensor.parameters for tensor in tensors), sum(tensor.size for tensor in tensors)
    if work.training.adapter:
        parameters = targets.parameters_of(tensors, work.training.adapter)
    size = training_memory.checkpoint(work.training, parameters=parameters, stored=stored)
    log.info("a checkpoint of the training: %.1f GB on the node that stores most of it", size / 1e9)
    return {CHECKPOINT_BYTES: float(size)}


def _weights(context: Context, models: list[Checked]) -> dict[str, float]:
    """The metrics that tell how large the models' weights are, where their files show it."""
    sizes: dict[str, float] = {}
    for name, model in zip((STUDENT_BYTES, TEACHER_BYTES), models, strict=False):  # an endpoint has no weights here
        if tensors := resolve.tensors(model.served.model, context.store.bucket, context.scratch):
            sizes[name] = float(sum(tensor.size for tensor in tensors))
    return sizes


def _templates(work: Prepare, chats: dict[str, Chat], placed: Instructions | None) -> dict[str, Any]:
    """The entry of prepare's inputs with the texts of templates and instructions that the run names by their place;
    `placed`: the instructions as the manifest has them."""
    given = {"spec.student": work.student_chat, "spec.teacher": work.teacher_chat}
    texts = {uri: chats[where].template for where, chat in given.items() if (uri := chat.template_uri)}
    if placed and work.instructions:
        for place, text in zip(placed.given.values(), work.instructions.given.values(), strict=True):
            texts |= {place: text} if place != text else {}
    return {resolve.TEMPLATES: texts} if texts else {}


def _pins(models: list[Checked], files: list[File]) -> dict[str, str]:
    """The commit of every model and file that came from the hub, by name."""
    pins = {model.served.model.name: model.resolved.revision for model in models if resolve.is_hub(model.served.model)}
    return pins | {file.name: file.revision for file in files if file.revision}


def _compared(work: Prepare, originals: list[Row], unchecked: dict[str, str]) -> dict[str, Any]:
    """The entry of prepare's inputs with what prompts are compared with beside the benchmarks."""
    if not work.tasks:
        return {}
    return {"tasks": {"originals": digest_of(questions=originals), "unchecked": sorted(unchecked)}}


def _open_intake(
    context: Context, work: Prepare, student: Checked, folder: Folder, questions: list[Row], originals: list[Row]
) -> Intake:
    source, decontaminate = work.prompts, work.prompts.decontaminate
    sample, held_out, findings = None, None, None
    if source.seed is not None and source.limit is not None:
        sample = Sample(source.seed, source.limit, context.scratch / "sample", schema_of(source))
    if decontaminate:
        held_out = Questions(originals, decontaminate.ngram)
        if decontaminate.paraphrases:
            findings = Findings(Originals(originals, decontaminate.share))
    return Intake(
        work=work,
        template=student.template,
        context_length=student.context,
        folder=folder,
        sample=sample,
        benchmark_ids=frozenset(row["id"] for row in questions),
        questions=held_out,
        findings=findings,
    )


def _where(benchmark: Benchmark) -> str:
    return f"spec.evaluation.benchmarks {benchmark.name}"


def read_benchmark(benchmark: Benchmark, files: list[File]) -> Iterator[Row]:
    """A benchmark's questions. Its scores are compared with published ones, so one bad row is a UserError."""
    where = _where(benchmark)
    count = 0
    seen: Counter[str] = Counter()
    for line in read_lines(files, where, benchmark.fields):
        if benchmark.limit is not None and count >= benchmark.limit:
            break
        row, fault = row_of(line, benchmark.fields)
        if not fault and row["reference"] is None:
            fault = "missing_field", f"there is no reference (fields.reference is {benchmark.fields.reference!r})"
        elif not fault and _answerless(line, row, benchmark.fields):
            fault = "empty", f"the reference {row['reference'][:100]!r} holds no answer, so that none can be right"
        if fault:
            raise UserError(f"{line.where}: {fault[1]}", hint=f"Mend the file or fields of {where}.")
        count += 1
        if text_before := _cell(line, benchmark.fields.context, where):
            row["prompt"] = f"{text_before}\n\n{row['prompt']}"
            row["id"] = identity_of(row)
        identity = row["id"]
        repeated, seen[identity] = seen[identity], seen[identity] + 1
        tolerance = _tolerance(line, benchmark) or benchmark.tolerance
        row |= {"benchmark": benchmark.name, "tolerance": tolerance}
        row["id"] = identity_of(row, f" #{repeated}") if repeated else identity
        yield {column: row[column] for column in BENCHMARK_SCHEMA.names if column in row}
    if not count:
        raise UserError(f"the benchmark {benchmark.name} has no questions", hint=f"Check the source of {where}.")
    if benchmark.limit is None and benchmark.questions not in (None, count):
        log.warning("%s has %d questions, %s are published", benchmark.name, count, benchmark.questions)


def _answerless(line: Line, row: Row, fields: Fields) -> bool:
    value = value_at(line.value, fields.reference).value if line.value and fields.reference else row["reference"]
    return is_empty(value) or not has_answer(row["reference"])


def _tolerance(line: Line, benchmark: Benchmark) -> str:
    """The text of the tolerance's column; empty where the row lacks it. Raises UserError for what is no tolerance: it
    would be known after the GPU's work alone, or accept every answer."""
    column, where = benchmark.fields.tolerance, _where(benchmark)
    cell = _cell(line, column, where)
    parts = [part.strip() for part in cell.split(",")]
    if cell and not (any(parts) and all(re.fullmatch(TOLERANCE, part) for part in parts if part)):
        hint = (
            f"Write 0.01, 4%, or one of these for each of several values with commas between: mend the file of {where}."
        )
        raise UserError(f"{line.where}: the field {column!r} is {cell[:60]!r}, which is no tolerance", hint=hint)
    return cell


def _cell(line: Line, column: str | None, where: str) -> str:
    """The text of an optional column; empty where the row lacks it. Raises UserError for a value that is no text."""
    value = value_at(line.value, column).value if line.value and column else None
    try:
        return "" if value is None else as_text(value).strip()
    except ValueError as error:
        message = f"{line.where}: the field {column!r} is {error}"
        raise UserError(message, hint=f"Mend the file or fields of {where}.") from error


if __name__ == "__main__":
    run(main)
