"""The errors of the stage programs. The class of an error sets the exit code; its hint says who must act, and how."""

from typing import ClassVar

from cgd_stages.contract import Exit
from cgd_stages.keys import without_keys

GPU_HINT = (
    "An admin must look at the node's NVIDIA driver (the images have CUDA 13, which needs 580 or newer) and its device "
    "plugin. Where spec.placement.accelerator is none, spec.images must name images that are built for CPUs."
)
"""The hint when a pod has no usable GPU. Another node may have one, so the pod is tried again."""


class StageError(Exception):
    """A failure that a program understands. `message` says what happened, `hint` what to change and where.

    Keys are removed from both, because they become last words, status, events and report.
    """

    exit: ClassVar[Exit] = Exit.RETRY

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message, self.hint = without_keys(message), without_keys(hint)
        super().__init__(self.message)


class UserError(StageError):
    """The user must change something; a retry would fail the same way."""

    exit: ClassVar[Exit] = Exit.PERMANENT


class NoTransfer(UserError):
    """The student in training answers too few of the early questions. The training can go on from its checkpoint."""


class TransientError(StageError):
    """A service or a device is not available now; a retry may succeed."""


class RowsLost(TransientError):
    """The counts do not add up: read != kept + rejected. A retry reads the stored rows and asks for the others."""


class Interrupted(StageError):
    """SIGTERM: all finished work is stored."""

    exit: ClassVar[Exit] = Exit.INTERRUPTED
