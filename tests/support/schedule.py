"""Which worker of pytest-xdist runs which tests, so that all of them end together.

A unit of work is a file: its fixtures are made once. Files with slow tests start engines and trainings, which leave
much behind in a process, so a worker that has run one of them gets no file of fast tests any more, as long as another
worker can take them. Half of the workers begin with slow files, the others with fast ones, and then all run slow ones.
Files come in the order of the collection, which `tests/conftest.py` sorts: the longest first.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

SLOW = "pytest.mark.slow"


class FileSchedule(LoadScopeScheduling):
    """Gives a worker its next file when it begins the last test of the one before.

    Args:
        is_slow: whether a file, by its path from the root, has slow tests.
    """

    def __init__(self, config: Any, log: Producer | None, is_slow: Callable[[str], bool]) -> None:
        super().__init__(config, log)
        self._is_slow = is_slow
        self._spent: set[WorkerController] = set()
        """Workers that have had a slow file."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.split("::", 1)[0]

    def _reschedule(self, node: WorkerController) -> None:
        # A worker begins a test when it knows the next one: with a single one left it waits.
        if node.shutting_down or self._pending_of(self.assigned_work[node]) > 1:
            return
        if self._next_for(node) is None:
            node.shutdown()
        else:
            self._assign_work_unit(node)

    def _assign_work_unit(self, node: WorkerController) -> None:
        file = self._next_for(node)
        if file is None:
            return
        if self._is_slow(file):
            self._spent.add(node)
        self.workqueue.move_to_end(file, last=False)
        super()._assign_work_unit(node)

    def _next_for(self, node: WorkerController) -> str | None:
        """The worker's next file; None: there is none for it."""
        slow = next((file for file in self.workqueue if self._is_slow(file)), None)
        fast = next((file for file in self.workqueue if not self._is_slow(file)), None)
        if node in self._spent:
            fresh = any(not (other in self._spent or other.shutting_down) for other in self.nodes)
            return slow or (None if fresh else fast)
        begins_slow = self.nodes.index(node) < len(self.nodes) // 2
        return (slow or fast) if begins_slow else (fast or slow)


def has_slow_tests(root: Path) -> Callable[[str], bool]:
    """Whether the text of a file marks tests as slow; each file is read once."""
    known: dict[str, bool] = {}

    def look(file: str) -> bool:
        if file not in known:
            known[file] = SLOW in (root / file).read_text()
        return known[file]

    return look
