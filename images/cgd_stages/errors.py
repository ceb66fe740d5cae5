"""The errors of the stage programs. An error says who must act: its class is its exit code, its hint is the mend."""

from typing import ClassVar

from cgd_stages.contract import Exit
from cgd_stages.keys import without_keys

GPU_HINT = (
    "An admin must look at the node's NVIDIA driver (the images have CUDA 13, which needs 580 or newer) and its device "
    "plugin. Where spec.placement.accelerator is none, spec.images must name images that are built for CPUs."
)
"""What to do where a pod has no GPU that can be used. Another node may have one: it is tried again."""


class StageError(Exception):
    """The root: a failure that a program understands. `message` says what happened, `hint` what to change and where.

    Neither shows a key: they become last words, status, events and report.
    """

    exit: ClassVar[Exit] = Exit.RETRY

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message, self.hint = without_keys(message), without_keys(hint)
        super().__init__(self.message)


class UserError(StageError):
    """The user must change something; a retry would fail the same way."""

    exit: ClassVar[Exit] = Exit.PERMANENT


class TransientError(StageError):
    """Something outside is not there right now; a retry may well succeed."""


class RowsLost(TransientError):
    """The counts do not add up: read != kept + rejected. A retry reads the stored rows anew and asks for the rest."""


class Interrupted(StageError):
    """SIGTERM: everything finished so far is stored."""

    exit: ClassVar[Exit] = Exit.INTERRUPTED
