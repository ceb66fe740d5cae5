"""What a task of lm-eval may do in a stage's pod, which holds keys: ask and grade, by code of the image alone.

A definition in the folder of spec.evaluation.taskData is other people's, and so are data in it or from the hub. lm-eval
would take Python functions from beside a definition, fill in templates that reach into Python, fetch metrics that are
programs, and read any file or URL as a data set.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from cgd_stages.errors import UserError

EXECUTING = {"cruxeval", "humaneval", "humaneval_infilling", "longproc", "mbpp"}
"""Folders of lm-eval 0.4.13 whose functions execute what a model writes, not all of them with a warning."""


HUB = "hf"
"""Scheme of the URLs of files on the hub."""


@contextmanager
def guarded(task: str) -> Iterator[None]:
    """Inside, lm-eval does nothing of that. Raises UserError for a task that wants it."""
    guard = _Guard(task)
    try:
        with guard:
            yield
    except Exception:  # lm-eval and datasets turn some errors into others, and swallow some
        if guard.refused is None:
            raise
    if guard.refused:
        raise guard.refused


class _Guard:
    """Stands before the functions of lm-eval and its libraries through which a task gets at code or data."""

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
        self._refuse(f"has a metric that is none of lm-eval's but a program, {name}")

    def _read_beside(self, *given: Any, **named: Any) -> Any:
        for text in _texts([given, named]):
            if text.startswith(("/", "~")) or ".." in Path(text).parts or urlsplit(text).scheme:
                self._refuse(f"reads {text}")
        return self._read(*given, **named)

    def _find_beside(self, pattern: str, *given: Any, **named: Any) -> list[str]:
        """The files of a pattern, which the README of a data set names as well, and where it likes."""
        if urlsplit(pattern).scheme not in ("", HUB):
            self._refuse(f"reads {pattern}")
        found: list[str] = self._find(pattern, *given, **named)
        for file in found:
            beside = any(Path(file).resolve().is_relative_to(folder) for folder in (Path.cwd().resolve(), self._image))
            if not beside and urlsplit(file).scheme != HUB:
                self._refuse(f"reads {file}")
        return found

    def _refuse(self, what: str) -> NoReturn:
        self.refused = UserError(
            f"the task {self._task} {what}, in a pod that holds this run's keys",
            hint="Take it out of the task's definition. Or set ownCode: true for this task in spec.evaluation.tasks, "
            "if everybody who can write to spec.evaluation.taskData may have these keys.",
        )
        raise self.refused


def execution_refused(task: str) -> UserError:
    return UserError(
        f"the task {task} executes code that the model writes, which is done for HumanEval alone",
        hint="Leave it out of spec.evaluation.tasks.",
    )


def _texts(value: Any) -> Iterator[str]:
    """All texts within lists, tuples and the values of mappings."""
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)
