"""Lets a task of lm-eval run only code of the image, because a stage's pod holds keys.

Task definitions and data in spec.evaluation.taskData, and data on the hub, come from other people. Without the guard
lm-eval imports Python functions from beside a definition, fills in templates that reach into Python, fetches metrics
that are programs, and reads any file or URL as a data set.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from cgd_stages.errors import UserError

EXECUTING = {"cruxeval", "humaneval", "humaneval_infilling", "longproc", "mbpp"}
"""Folders of lm-eval 0.4.13 whose functions execute a model's outputs, some without a warning."""
HUB = "hf"
"""The scheme of URLs of files on the hub."""


@contextmanager
def guarded(task: str) -> Iterator[None]:
    """Inside, lm-eval does none of this. Raises UserError for a task that tries to."""
    guard = _Guard(task)
    try:
        with guard:
            yield
    except Exception:  # lm-eval and datasets convert some errors, and swallow others
        if guard.refused is None:
            raise
    if guard.refused:
        raise guard.refused


class _Guard:
    """Replaces the functions of lm-eval and its libraries through which a task gets code or data."""

    def __init__(self, task: str) -> None:
        self._task = task
        self._stack = ExitStack()
        self.refused: UserError | None = None

    def __enter__(self) -> None:
        import datasets
        import evaluate
        import lm_eval
        from datasets import data_files
        from jinja2.sandbox import SandboxedEnvironment
        from lm_eval import utils
        from lm_eval.tasks import _yaml_loader

        self._image = Path(lm_eval.__file__).resolve().parent
        self._function, self._read = _yaml_loader._import_func_in_yml, datasets.load_dataset
        self._find = data_files.resolve_pattern
        templates = SandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=True)
        templates.filters |= utils.env.filters
        self._replace(_yaml_loader, "_import_func_in_yml", self._function_of_the_image)
        self._replace(evaluate, "load", self._no_program)
        self._replace(datasets, "load_dataset", self._read_beside)
        self._replace(data_files, "resolve_pattern", self._find_beside)
        self._replace(utils, "env", templates)

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        from jinja2.exceptions import SecurityError

        self._stack.close()
        if isinstance(error, SecurityError):
            self._refuse(f"has a template that reaches into Python ({error})")

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def _function_of_the_image(self, name: str, folder: Path) -> Any:
        if not folder.resolve().is_relative_to(self._image):
            self._refuse(f"has a function, {name}")
        if EXECUTING.intersection(folder.resolve().relative_to(self._image).parts):
            self.refused = execution_refused(self._task)
            raise self.refused
        return self._function(name, folder)

    def _no_program(self, name: str, *_: Any, **__: Any) -> NoReturn:
        self._refuse(f"has a metric that is a program and not one of lm-eval's, {name}")

    def _read_beside(self, *arguments: Any, **named: Any) -> Any:
        for text in _texts([arguments, named]):
            if text.startswith(("/", "~")) or ".." in Path(text).parts or urlsplit(text).scheme:
                self._refuse(f"reads {text}")
        return self._read(*arguments, **named)

    def _find_beside(self, pattern: str, *arguments: Any, **named: Any) -> list[str]:
        """The files of a pattern. The README of a data set may name one too, and may name any place."""
        if urlsplit(pattern).scheme not in ("", HUB):
            self._refuse(f"reads {pattern}")
        files: list[str] = self._find(pattern, *arguments, **named)
        for file in files:
            beside = any(Path(file).resolve().is_relative_to(folder) for folder in (Path.cwd().resolve(), self._image))
            if not beside and urlsplit(file).scheme != HUB:
                self._refuse(f"reads {file}")
        return files

    def _refuse(self, what: str) -> NoReturn:
        self.refused = UserError(
            f"the task {self._task} {what}, in a pod that holds this run's keys",
            hint="Remove it from the task's definition. Or, if everybody who can write to spec.evaluation.taskData may "
            "have these keys, set ownCode: true for this task in spec.evaluation.tasks.",
        )
        raise self.refused


def execution_refused(task: str) -> UserError:
    return UserError(
        f"the task {task} executes code that the model writes, which is possible for HumanEval alone",
        hint="Remove it from spec.evaluation.tasks.",
    )


def _texts(value: Any) -> Iterator[str]:
    """All texts within lists, tuples and the values of mappings."""
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
