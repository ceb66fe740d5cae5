"""The frame of every stage program: task in, last words and exit code out, SIGTERM in between.

`run(main)` is the last line of each program. Its `main` gets a `Context` and returns the facts of its stages.
"""

import errno
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TypeVar

from pydantic import ValidationError

from cgd_stages.contract import (
    INPUTS,
    LAST_WORDS_LIMIT,
    SCRATCH,
    TASK,
    TERMINATION_LOG,
    Contract,
    Exit,
    LastWords,
    StageFacts,
    StageTask,
)
from cgd_stages.errors import Interrupted, StageError, UserError
from cgd_stages.keys import hide_in_log, without_keys
from cgd_stages.runtime.log_tail import LogTail
from cgd_stages.runtime.progress import Reporter
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.run import RunStore
from cgd_stages.text.normal import valid_unicode
from cgd_stages.text.printable import start_log

log = logging.getLogger("cgd")

W = TypeVar("W", bound=Contract)

INDEX = "JOB_COMPLETION_INDEX"
"""Environment variable of an Indexed Job: which shard this pod is."""


@dataclass
class Context:
    """A program's task, the store, and the ways to report."""

    task: StageTask
    store: RunStore
    progress: Reporter
    scratch: Path
    inputs: Path | None = None
    shard: int = 0
    stop: threading.Event = field(default_factory=threading.Event)
    """SIGTERM sets it inside `holding`: the program stores what it holds and leaves by `check`."""
    facts: dict[str, StageFacts] = field(default_factory=dict)
    """The facts so far of each stage, for the last words of a program that fails."""

    def work_of(self, kind: type[W]) -> W:
        """The work. Raises UserError when it is not of the kind that this program does."""
        if not isinstance(self.task.work, kind):
            raise UserError(f"this program does {kind.__name__} work, the task is {self.task.work.kind!r}")
        return self.task.work

    def check(self) -> None:
        """Raise Interrupted after SIGTERM. Call it where everything finished is stored."""
        if self.stop.is_set():
            raise Interrupted("SIGTERM: stopped early, everything finished is stored")

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Inside, something finished is not stored yet: SIGTERM sets `stop`, and the program leaves by `check`.

        Elsewhere SIGTERM ends the program at once, as SIGKILL may: the program has no handler, see `supervisor`.
        """
        former = signal.signal(signal.SIGTERM, lambda *_: self.stop.set())
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, former)


@contextmanager
def storing(flush: Callable[[], None]) -> Iterator[None]:
    """Call `flush` at the end of the block, also after an error. If `flush` fails too, the first error is raised."""
    try:
        yield
    except BaseException:
        try:
            flush()
        except StageError as error:
            log.warning("the rows that finished last are not stored: %s", error.message)
        raise
    flush()


Main = Callable[[Context], dict[str, StageFacts]]


def log_stage(beside: logging.Handler | None = None) -> None:
    """The log of a stage program's process, written to `beside` as well."""
    start_log("%(asctime)s %(message)s", times="%H:%M:%S", beside=beside)
    for library in ("botocore", "httpx2"):  # a line for each request
        logging.getLogger(library).setLevel(logging.WARNING)
    hide_in_log()


def run(main: Main) -> NoReturn:
    """Run a program on the task in `CGD_TASK` and exit with a code that tells the controllers what to do."""
    tail = LogTail()
    log_stage(tail)
    context: Context | None = None
    try:
        context = _context()
        words, code = LastWords(outcome="done", stages=main(context)), Exit.DONE
    except Exception as error:  # noqa: BLE001 (the rim: every failure becomes last words and a code)
        cause = error
        if context and context.stop.is_set() and not isinstance(error, Interrupted):
            # An error after SIGTERM comes from the interruption, or comes up again in the next attempt.
            cause = Interrupted(f"SIGTERM: stopped early, on {type(error).__name__}: {error}")
        words, code = _failure(cause, context.facts if context else {})
    if context:
        context.progress.close()
        # Whoever was interrupted has no time, and a run whose data are deleted keeps no log of that.
        if code != Exit.INTERRUPTED and context.task.work.kind != "clean":
            tail.store(context.store, context.task.stage)
    path = Path(os.environ.get(TERMINATION_LOG) or "/dev/termination-log")
    try:
        path.write_text(shortened(words).to_json())
    except OSError as error:
        log.warning("the last words cannot be written to %s: %s", path, error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not sys.exit: threads of a library may wait for an answer, and fail when they are torn down


def _context() -> Context:
    """What the environment says. Raises UserError when it has no task that this image understands."""
    text = os.environ.get(TASK)
    if text is None:
        raise UserError(f"the environment variable {TASK} is not set", hint="The operator sets it; see contract/.")
    try:
        task = StageTask.model_validate_json(text)
    except ValidationError as error:
        hint = "The operator and the image of the stages must be of the same version: see spec.images."
        raise UserError(f"the task is not one that this image understands: {error}", hint=hint) from error
    scratch = Path(os.environ.get(SCRATCH) or tempfile.mkdtemp(prefix="cgd-"))
    scratch.mkdir(parents=True, exist_ok=True)
    shard = int(os.environ.get(INDEX, "0"))
    return Context(
        task=task,
        store=RunStore(Bucket(task.storage), task.run),
        progress=Reporter.from_environment(shard),
        scratch=scratch,
        inputs=Path(os.environ[INPUTS]) if INPUTS in os.environ else None,
        shard=shard,
    )


def _failure(error: Exception, facts: dict[str, StageFacts]) -> tuple[LastWords, Exit]:
    if _disk_is_full(error):
        hint = "Ask for more ephemeral-storage in spec.placement.<pool>.resources, or nodes with larger disks."
        error = UserError(f"the disk is full: {error}", hint=hint)
    if isinstance(error, StageError):
        outcome, code = "interrupted" if isinstance(error, Interrupted) else "failed", error.exit
        message, hint = error.message, error.hint
    else:
        outcome, code = "failed", Exit.RETRY
        message = without_keys(str(error))
        hint = "This is unexpected; the traceback is in the pod's log. It will be retried."
    message, hint = valid_unicode(message), valid_unicode(hint)
    unexpected = None if isinstance(error, StageError) else error
    log.error("%s: %s%s", type(error).__name__, message, f" {hint}" if hint else "", exc_info=unexpected)
    words = LastWords.model_validate(
        {"outcome": outcome, "stages": facts, "error": type(error).__name__, "message": message, "hint": hint}
    )
    return words, code


def _disk_is_full(error: BaseException) -> bool:
    """Whether the chain of causes has a full disk: libraries wrap it in errors of their own."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, OSError) and cause.errno in {errno.ENOSPC, errno.EDQUOT}:
            return True
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return "No space left on device" in str(error)


def shortened(words: LastWords, limit: int = LAST_WORDS_LIMIT) -> LastWords:
    """The same words within `limit` bytes: a long message loses its middle first, then the metrics go."""
    for length in (2000, 1000, 400):
        words = words.model_copy(update={"message": _cut(words.message, length), "hint": _cut(words.hint, length // 2)})
        if len(words.to_json().encode()) <= limit:
            return words
    stages = {name: facts.model_copy(update={"metrics": {}}) for name, facts in words.stages.items()}
    words = words.model_copy(update={"stages": stages})
    return words if len(words.to_json().encode()) <= limit else words.model_copy(update={"stages": {}})


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"
