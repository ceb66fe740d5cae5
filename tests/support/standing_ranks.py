"""Two processes of the training loop that stay for one training after another: their start takes ten seconds of a core.

    python -m torch.distributed.run --nproc-per-node 2 -m support.standing_ranks <queue>

<queue>/1, <queue>/2, ... are links to the folders of trainings, as the launcher makes them; 1.done follows when the
model is there. Processes of their own for each training, and their ends, are in test_pods.py.
"""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

from cgd_stages.training.job import LAUNCHER
from support.ports import free_port

LOOK_SECONDS = 0.05


class StandingRanks:
    """The test's side. `run` takes the place of the launcher's `_torchrun`."""

    def __init__(self, queue: Path, **environment: str) -> None:
        self._queue, self._numbers = queue, itertools.count(1)
        self._log = queue / "log"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--master-port", str(free_port()), "-m", "support.standing_ranks", str(queue)]
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), LAUNCHER: str(os.getpid())}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)

    def run(self, _: object, folder: Path) -> None:
        number = next(self._numbers)
        (self._queue / str(number)).symlink_to(folder)
        while not (self._queue / f"{number}.done").exists():
            assert self._process.poll() is None, self._log.read_text()[-12000:]
            time.sleep(LOOK_SECONDS)

    def end(self) -> None:
        self._process.terminate()
        self._process.wait()


def main(queue: Path) -> None:
    import torch.distributed as dist

    from cgd_stages.train import loop
    from cgd_stages.train.group import join_group

    loop._die_with_the_launcher()
    loop._quieten()
    join_group()
    for number in itertools.count(1):
        while not (queue / str(number)).exists():
            time.sleep(LOOK_SECONDS)
        trainer = loop.start((queue / str(number)).resolve())
        trainer.run()
        trainer.export()
        dist.barrier()
        if dist.get_rank() == 0:
            (queue / f"{number}.done").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
