"""The shipped training process, which notes its steps and dies where the suite wants it to.

    CGD_CHAOS='{...}' python -m chaos.rank <folder>

A kill from outside would come some steps late; this one comes at the same place every time. It is a real SIGKILL.
"""

import json
import logging
import os
import signal
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import DONE
from cgd_stages.training.job import LAUNCHER

CHAOS = "CGD_CHAOS"
"""Environment variable: the plan, as JSON."""
STEP_SECONDS = 0.1
"""Every step takes so much longer: a tiny model's would be over before its checkpoint is stored."""
EVERY = 3
"""Steps between two checkpoints."""


class Kill(Enum):
    """Who is killed, or where."""

    RANK = "one rank"
    ALL = "all ranks"
    LAUNCHER = "a launcher"
    UPLOAD = "in an upload"
    PROMISE = "before the marker"
    SIGTERM = "SIGTERM"


class Plan(BaseModel):
    """What happens to one attempt: nothing, or a kill right after a step, or at a checkpoint not before it."""

    notes: Path
    """Rank 0 adds a line for every step that it has made."""
    step: int = 0
    kill: Kill | None = None

    @property
    def checkpoint(self) -> str:
        return f"/step-{-(-self.step // EVERY) * EVERY:06d}/"

    def after(self, step: int) -> None:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if rank == 0:
            with self.notes.open("a") as notes:
                notes.write(json.dumps({"step": step, "at": time.time()}) + "\n")
        if step != self.step:
            return
        last = rank == world - 1
        if self.kill is Kill.ALL or (self.kill is Kill.RANK and last):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kill in {Kill.LAUNCHER, Kill.SIGTERM} and last:
            number = signal.SIGKILL if self.kill is Kill.LAUNCHER else signal.SIGTERM
            os.kill(int(os.environ[LAUNCHER]), number)

    def before_write(self, key: str) -> None:
        """In an upload: while the checkpoint's other files are on their way or stored, if this node has any."""
        at = {Kill.UPLOAD: "_optim_states.pt", Kill.PROMISE: DONE}
        if self.kill in at and self.checkpoint in key and key.endswith(at[self.kill]):
            os.kill(os.getpid(), signal.SIGKILL)


def haunt(plan: Plan, trainer: Any) -> None:
    """Put the plan into the classes that train and store."""
    step, put, upload = trainer._step, Bucket.put, Bucket.upload

    def note_and_die(self: Any, number: int) -> None:
        step(self, number)
        time.sleep(STEP_SECONDS)
        plan.after(number + 1)

    def die_or_put(self: Bucket, key: str, data: bytes, *, if_absent: bool = False) -> bool:
        plan.before_write(key)
        return put(self, key, data, if_absent=if_absent)

    def die_or_upload(self: Bucket, path: Path, key: str) -> None:
        plan.before_write(key)
        upload(self, path, key)

    trainer._step = note_and_die
    Bucket.put = die_or_put  # type: ignore[method-assign]
    Bucket.upload = die_or_upload  # type: ignore[method-assign]


if __name__ == "__main__":
    from cgd_stages.train import loop as trainloop
    from cgd_stages.train.trainer import Trainer

    haunt(Plan.model_validate_json(os.environ[CHAOS]), Trainer)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    code = trainloop.main(Path(sys.argv[1]))
    sys.stderr.flush()
    os._exit(code)
