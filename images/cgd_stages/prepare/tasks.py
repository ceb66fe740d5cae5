"""The documents of the run's tasks of lm-eval, which prompts are compared with."""

import logging
from collections.abc import Sequence

from cgd_stages.contract import HarnessTask
from cgd_stages.errors import StageError
from cgd_stages.runtime.program import Context
from cgd_stages.store.rows import Row
from cgd_stages.tasks.documents import documents, known_tasks, mirrored
from cgd_stages.text.printable import printable

log = logging.getLogger(__name__)

MOST = 300
"""The most characters of a reason."""


def read_tasks(context: Context, tasks: Sequence[HarnessTask], uri: str | None) -> tuple[list[Row], dict[str, str]]:
    """The documents of the tasks, and of each task whose documents cannot be read the reason. `uri`: where their
    definitions and data are; None: the hub.

    Raises UserError for a task that the stage harness would refuse later.
    """
    rows: list[Row] = []
    unchecked: dict[str, str] = {}
    if not tasks:
        return rows, unchecked
    with mirrored(context, uri) as definitions:
        manager = known_tasks(definitions)
        for task in tasks:
            try:
                found = documents(task, manager)
                reason = "" if found else "it has no documents"
            except StageError:
                raise
            except Exception as error:  # noqa: BLE001 (whatever libraries raise where data are missing; harness asks)
                found, reason = [], printable(f"{type(error).__name__}: {error}")[:MOST]
            rows += found
            if reason:
                unchecked[task.name] = reason
                log.warning("no prompt is compared with the task %s of lm-eval: %s", task.name, reason)
    return rows, unchecked
