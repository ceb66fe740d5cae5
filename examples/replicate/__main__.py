"""Does Critique-Guided Distillation work? A study on one machine, from nothing to a page.

    make replicate                  one seed, in .demo/replicate
    make replicate SEEDS=3          three seeds; what is there already is used
    make replicate FULL=1           more arms, and three more kinds of problems
    make replicate QUICK=1          a tiny student and few rows: whether it runs, not whether it works
    make replicate SEED=3           the third seed alone, on a machine of its own: its outcome is a small file
    python -m replicate --outcomes examples/replicate/outcomes/*.gz    the page of such files, without a run

SmolLM2-135M-Instruct answers, a tutor criticises and refines; every arm is trained from the same rows and takes the
same exam. Ctrl-C ends it; run again, it goes on.
"""

import argparse
import asyncio
import errno
import hashlib
import itertools
import json
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from cgd_local import smollm2
from cgd_local.s3 import SeaweedFS
from replicate import pretrain, results, tutor
from replicate.arithmetic import CHAINS, HUNDREDS, ONES, SUMS, TENS
from replicate.outcome import Outcome, OutcomeError, read_all
from replicate.study import ARMS, KEYS, MORE_ARMS, SEVERAL, Misfit, Size, Study, StudyError

HERE = Path(__file__).parent
TUTOR_PORT = 10801
"""Always the same: the tutor's address is part of what its rows are known by."""
PRETRAINING = 120
"""Steps of the tiny student."""

DEFAULT = Size(
    name="sums",
    kind=SUMS,
    arms=ARMS,
    rates=("3e-5", "1e-4"),
    rows=64,
    exam=240,
    several=60,
    samples=4,
    max_rejected="20%",
)
QUICK = replace(
    DEFAULT,
    name="quick",
    kind=CHAINS,
    arms=tuple(arm for arm in ARMS if arm.name in ("distilledsft", *SEVERAL)),
    rows=16,
    exam=20,
    several=8,
    max_rejected="90%",
)
FULL = (
    DEFAULT,
    replace(DEFAULT, name="sums-more", arms=(*(arm for arm in ARMS if arm.name in SEVERAL), *MORE_ARMS)),
    *(replace(DEFAULT, name=kind.name, kind=kind) for kind in (ONES, TENS, HUNDREDS)),
)

console = Console(highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="default: .demo/replicate, and .demo/replicate-quick with --quick")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seeds", type=int, default=1, help="how many seeds, from 1 on; default: 1")
    which.add_argument("--seed", type=int, help="this seed alone")
    which.add_argument(
        "--outcomes", type=Path, nargs="+", metavar="FILE", help="run nothing: the page of these outcomes"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--full", action="store_true", help="more arms, and three more kinds of problems")
    how.add_argument("--quick", action="store_true", help="tiny, to see whether it runs")
    parser.add_argument(
        "--move-targets", action="store_true", help="give every row another problem's targets, which the study must see"
    )
    given = parser.parse_args()
    folder = (given.folder or Path(".demo") / ("replicate-quick" if given.quick else "replicate")).absolute()
    sizes = (QUICK,) if given.quick else FULL if given.full else (DEFAULT,)
    seeds = (given.seed,) if given.seed else tuple(range(1, given.seeds + 1))
    try:
        files = given.outcomes or run(folder, sizes, quick=given.quick, seeds=seeds, moved=given.move_targets)
        write(folder, read_all(files))
    except Misfit:
        console.print("not informative: targets do not fit")
        return 1
    except (StudyError, OutcomeError) as error:
        console.print(f"[red]{error}")
        return 1
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        console.print(
            f"[red]port {TUTOR_PORT}, where the tutor listens, is taken: end what uses it, such as another study"
        )
        return 1
    return 0


def leave(*_: object) -> None:
    """At once: a thread waits for a program, and every program ends with this process."""
    console.print("\nstopped; run it again, and it goes on")
    os._exit(128 + signal.SIGINT)


def run(folder: Path, sizes: tuple[Size, ...], *, quick: bool, seeds: tuple[int, ...], moved: bool) -> list[Path]:
    """Carry out the study; the files of its outcomes. Raises Misfit, StudyError, OSError."""
    signal.signal(signal.SIGINT, leave)
    student = tiny_student(folder) if quick else smollm2.ensure_float32()
    return asyncio.run(carry_out(folder, student, sizes, seeds=seeds, moved=moved))


async def carry_out(
    folder: Path, student: Path, sizes: tuple[Size, ...], *, seeds: tuple[int, ...], moved: bool
) -> list[Path]:
    """All runs of all seeds, or what an interrupted study has left of them. A seed's outcome is written when it ends.
    Raises Misfit, StudyError; OSError when the tutor's port is taken."""
    os.environ.update(KEYS)
    access_key, secret_key = KEYS["AWS_ACCESS_KEY_ID"], KEYS["AWS_SECRET_ACCESS_KEY"]
    files = []
    async with SeaweedFS(folder / "s3", bucket="cgd", access_key=access_key, secret_key=secret_key) as s3:
        with tutor.served(TUTOR_PORT) as url:
            for size, seed in itertools.product(sizes, seeds):
                console.print(f"[bold]{size.name}, seed {seed}")
                teacher = tutor.MOVED if moved else tutor.MODEL
                runs = Study(folder, student, url, teacher, s3, size, seed, tell)
                outcome = await asyncio.to_thread(runs.carry_out, results.fits)
                files.append(outcome.write(folder))
    return files


def tell(line: str) -> None:
    console.print(f"{time.strftime('%H:%M:%S')}  {line}")


def tiny_student(folder: Path) -> Path:
    """The tiny student, pre-trained for a moment; made once for what it is made by."""
    code = b"".join((HERE / f"{name}.py").read_bytes() for name in ("arithmetic", "tutor", "corpus", "pretrain"))
    target = folder / f"student-{hashlib.sha256(code).hexdigest()[:8]}-{PRETRAINING}"
    torch.set_num_threads(os.cpu_count() or 1)

    def told(step: int, loss: float) -> None:
        if step % 20 == 0:
            tell(f"pre-training, step {step} of {PRETRAINING}: loss {loss:.2f}")

    smollm2.make_once(target, lambda empty: pretrain.pretrain(empty, steps=PRETRAINING, seed=0, tell=told))
    return target


def write(folder: Path, sizes: list[list[Outcome]]) -> None:
    """Write results.json, the page and the table of the docs; print the result in words."""
    folder.mkdir(parents=True, exist_ok=True)
    chapters = [results.chapter(seeds, folder) for seeds in sizes]
    found = {"made": asdict(sizes[0][0].made), "chapters": chapters}
    (folder / "results.json").write_text(json.dumps(found, indent=1))
    results.write_page(folder / "page.html", found)
    (folder / "table.md").write_text("\n".join(map(results.markdown, chapters)))
    for chapter in chapters:
        console.print(f"\n[bold]{chapter['title']}", *chapter["said"], sep="\n")
    files = {"page": "page.html", "table": "table.md", "figures": "results.json"}
    console.print("", *(f"{what:10}{folder / name}" for what, name in files.items()), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
