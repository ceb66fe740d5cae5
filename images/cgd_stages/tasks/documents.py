"""The tasks of lm-eval: where their definitions and data are, and the documents that they will ask."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from cgd_stages.contract import HarnessTask
from cgd_stages.errors import UserError
from cgd_stages.runtime.program import Context
from cgd_stages.store.bucket import places
from cgd_stages.store.rows import Row
from cgd_stages.tasks.guard import guarded

DATA_HINT = (
    "Let the pod reach the hub, or set spec.evaluation.taskData to a copy of the HF_HOME of a machine that has run the "
    "tasks."
)


@contextmanager
def mirrored(context: Context, uri: str | None) -> Iterator[Path | None]:
    """Downloads a copy of an HF_HOME. Inside, the libraries of the hub read it and nothing from the network, paths in
    definitions are relative to it, and processes that start inherit this. Yields its folder of task definitions,
    `tasks/`. Without a `uri` it does nothing."""
    if uri is None:
        yield None
        return
    bucket = context.store.bucket.at(uri)
    home, names = context.scratch / "mirror", [stored.key for stored in bucket.list()]
    if not names:
        raise UserError(f"there is nothing below {uri}", hint=DATA_HINT)
    for name, path in places(home, names).items():
        bucket.download(name, path)
    with ExitStack() as stack:
        _read_from(home, stack)
        yield home / "tasks"


def _read_from(home: Path, stack: ExitStack) -> None:
    environment = {
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "NLTK_DATA": str(home / "nltk_data"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONSAFEPATH": "1",  # processes that start in the copy must not import files of it
    }
    former = {name: value for name, value in os.environ.items() if name in environment}
    os.environ |= environment
    stack.callback(os.environ.update, former)
    for name in environment.keys() - former.keys():
        stack.callback(os.environ.pop, name, None)
    from huggingface_hub import constants

    # The library was imported, and read the environment, to fetch the model.
    for name, value in {"HF_HUB_OFFLINE": True, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}.items():
        stack.callback(setattr, constants, name, getattr(constants, name))
        setattr(constants, name, value)
    stack.callback(os.chdir, Path.cwd())
    os.chdir(home)


def known_tasks(definitions: Path | None) -> Any:
    """lm-eval's tasks, and those of the folder `definitions`."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(definitions) if definitions and definitions.is_dir() else None)


def definition_of(task: HarnessTask, manager: Any) -> str | dict[str, Any]:
    """What lm-eval loads for a task: its name or, where its metric would execute the outputs in this process, its
    definition without it. Raises UserError when lm-eval lacks the task."""
    import lm_eval

    if task.task not in manager.all_tasks:
        raise UserError(
            f"lm-eval {lm_eval.__version__} has no task {task.task!r}",
            hint="Correct spec.evaluation.tasks: `lm-eval ls tasks` lists the names.",
        )
    return without_execution(task.task, manager) if task.executes else task.task


def without_execution(name: str, manager: Any) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    definition = load_yaml(manager.task_index[name].yaml_path, resolve_func=False)
    kept = {key: value for key, value in definition.items() if key not in ("filter_list", "unsafe_code")}
    return kept | {"task": name, "metric_list": [{"metric": "bypass"}]}


def documents(task: HarnessTask, manager: Any) -> list[Row]:
    """The documents that a task will ask, in the columns of a benchmark's questions, with the ids that their outputs
    have. The prompt is what lm-eval names for this purpose (`doc_to_decontamination_query`), or else the question as a
    model reads it, without examples.

    Raises:
        UserError: lm-eval lacks the task, or the task would execute code of other people.
        Exception: lm-eval or the hub's libraries cannot read its data, in errors of their own.
    """
    definition = definition_of(task, manager)
    with nullcontext() if task.own_code else guarded(task.task):
        return [
            {"benchmark": task.name, "id": f"{name}/{number}", "prompt": _question(part, document),
             "reference": target if isinstance(target := part.doc_to_target(document), str) else ""}
            for name, part in sorted(manager.load([definition])["tasks"].items())
            for number, document in part.doc_iterator(limit=task.limit)
        ]  # fmt: skip


def _question(part: Any, document: Any) -> str:
    if part.should_decontaminate():
        try:
            query = part.doc_to_decontamination_query(document)
        except (SyntaxError, ValueError):  # lm-eval 0.4.13 takes what a template has made for a literal of Python
            query = None
        if isinstance(query, str):
            return query
    question = part.doc_to_text(document)
    if isinstance(question, str):
        return question
    return "\n".join(map(str, part.doc_to_choice(document)))  # the question is the number of one of them
