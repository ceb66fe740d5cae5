"""Does Critique-Guided Distillation work? A study on one machine, from nothing to a page.

    make replicate                  the study, in .demo/replicate
    make replicate QUICK=1          the same with few steps and rows: whether it runs, not whether it works

Pre-train a student that can work sums and would rather guess; let it answer, the tutor criticise and refine; train it
with every objective and every ablation of the critique from the same rows; give all of them the same exam. Ctrl-C ends
it; run again, it goes on.
"""

import argparse
import asyncio
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeElapsedColumn
from safetensors import safe_open

from cgd_local.s3 import SeaweedFS
from replicate import pretrain, results, tutor
from replicate.study import ABLATIONS, BASE, KEYS, Model, Study, StudyError, exam_problems, models

HERE = Path(__file__).parent
TUTOR_PORT = 11801
"""Always the same: the tutor's address is part of what its rows are known by."""
SIDE_BY_SIDE = 2

console = Console(highlight=False)


@dataclass(frozen=True)
class Size:
    steps: int
    """Of the pre-training."""
    rows: int
    """Questions of a seed."""
    seeds: int
    questions: int
    """Of the exam."""
    max_rejected: str


FULL = Size(steps=1500, rows=400, seeds=3, questions=600, max_rejected="20%")
QUICK = Size(steps=120, rows=16, seeds=1, questions=20, max_rejected="90%")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="default: .demo/replicate, and .demo/replicate-quick with --quick")
    parser.add_argument("--quick", action="store_true", help="small, to see whether it runs")
    given = parser.parse_args()
    signal.signal(signal.SIGINT, leave)
    folder = (given.folder or Path(".demo") / ("replicate-quick" if given.quick else "replicate")).absolute()
    try:
        page = asyncio.run(study(folder, QUICK if given.quick else FULL, fresh=not folder.exists()))
    except StudyError as error:
        console.print(f"[red]{error}")
        return 1
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        console.print(
            f"[red]port {TUTOR_PORT}, where the tutor listens, is taken: end what uses it, such as another study"
        )
        return 1
    console.print(f"\npage      {page}\nfigures   {page.with_name('results.json')}")
    return 0


def leave(*_: object) -> None:
    """At once: threads wait for programs, and every program ends with this process."""
    console.print("\nstopped; run it again, and it goes on")
    os._exit(128 + signal.SIGINT)


async def study(folder: Path, size: Size, *, fresh: bool) -> Path:
    """From nothing, or from what an interrupted study has left, to the page; its path."""
    started = time.monotonic()
    student = make_student(folder, size)
    os.environ.update(KEYS)
    access = {"access_key": KEYS["AWS_ACCESS_KEY_ID"], "secret_key": KEYS["AWS_SECRET_ACCESS_KEY"]}
    async with SeaweedFS(folder / "s3", bucket="cgd", **access) as s3:
        with tutor.served(TUTOR_PORT) as url:
            runs = Study(
                folder=folder, student=student, tutor=url, s3=s3, rows=size.rows, max_rejected=size.max_rejected
            )
            quality = await asyncio.to_thread(make_rows, runs, size)
            exams = await asyncio.to_thread(take_exams, runs, size)
    minutes = (time.monotonic() - started) / 60 if fresh else None
    return tell(folder, student, size, quality, exams, minutes=minutes)


def make_student(folder: Path, size: Size) -> Path:
    """The pre-trained student; made once for what it is made by."""
    code = b"".join((HERE / f"{name}.py").read_bytes() for name in ("arithmetic", "tutor", "corpus", "pretrain"))
    target = folder / f"student-{hashlib.sha256(code).hexdigest()[:8]}-{size.steps}"
    if target.exists():
        console.print(f"student   {target}")
        return target
    torch.set_num_threads(os.cpu_count() or 1)
    with _progress() as progress:
        task = progress.add_task("pre-training", total=size.steps)

        def told(step: int, loss: float) -> None:
            progress.update(task, completed=step, description=f"pre-training   loss {loss:.2f}")
            if not console.is_terminal and step * 10 % size.steps < 10:  # a bar is shown at its end only
                console.print(f"pre-training   {step} of {size.steps}   loss {loss:.2f}")

        part = target.with_suffix(".part")
        pretrain.pretrain(part, steps=size.steps, seed=0, tell=told)
        part.rename(target)
    return target


def make_rows(runs: Study, size: Size) -> list[dict[str, float]]:
    """The quadruples of every seed; what they are like."""
    with _progress() as progress, ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        return list(progress.track(pool.map(runs.generate, range(size.seeds)), size.seeds, description="rows"))


def take_exams(runs: Study, size: Size) -> dict[str, list[list[results.Mark]]]:
    """The exams of the base and of everything that is trained, by label."""
    path = runs.folder / f"questions-{size.questions}.jsonl"
    path.write_text("".join(json.dumps({"question": one.question}) + "\n" for one in exam_problems(size.questions)))
    trainings = [model for seed in range(size.seeds) for model in models(seed)]
    with _progress() as progress, ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        base = examined(runs.student, path, runs.student / f"exam-{size.questions}.jsonl")
        found = {BASE: [base]}
        marked = pool.map(lambda model: train_and_examine(runs, model, path), trainings)
        for model, marks in zip(
            trainings, progress.track(marked, len(trainings), description="trainings"), strict=True
        ):
            found.setdefault(model.label, []).append(marks)
            right = sum(mark.right for mark in marks) / len(marks)
            progress.console.print(f"seed {model.seed}    {model.label:14} {right:6.1%} right")
    return found


def train_and_examine(runs: Study, model: Model, questions: Path) -> list[results.Mark]:
    folder = runs.train(model)
    return examined(folder, questions, folder / questions.name.replace("questions", "exam"))


def examined(folder: Path, questions: Path, answers: Path) -> list[results.Mark]:
    """A model's outputs, from a process of its own: torch gives every process its own threads."""
    if not answers.exists():
        part = answers.with_suffix(".part")
        command = [sys.executable, "-m", "replicate.exam", str(folder), str(questions), str(part)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise StudyError(f"the exam of {folder} failed:\n{done.stderr[-2000:]}")
        part.rename(answers)
    return results.read_marks(answers)


def tell(
    folder: Path,
    student: Path,
    size: Size,
    quality: list[dict[str, float]],
    exams: dict[str, list[list[results.Mark]]],
    *,
    minutes: float | None,
) -> Path:
    """Write results.json and the page; print the result in words. `minutes`: of a study that was not interrupted."""
    rows = results.figures(exams)
    said = results.sentences(rows)
    example = next((at for at, mark in enumerate(exams[BASE][0]) if not mark.right), 0)
    training = Study.manifest()["spec"]["training"]
    found = {
        "made": {
            **size.__dict__,
            "cores": os.cpu_count(),
            "minutes": minutes,
            "parameters": parameters(student),
            "learning_rate": training["learningRate"],
            "epochs": training["epochs"],
        },
        "said": said,
        "rows": rows,
        "ablations": [Model("CGD", kind, 0).label for kind in ABLATIONS],
        "quality": quality,
        "example": {
            "question": exams[BASE][0][example].question,
            "outputs": {label: taken[0][example].output for label, taken in exams.items()},
        },
    }
    (folder / "results.json").write_text(json.dumps(found, indent=1))
    results.write_page(folder / "page.html", found)
    console.print("\n" + "\n".join(said))
    return folder / "page.html"


def parameters(student: Path) -> int:
    with safe_open(student / "model.safetensors", "pt") as weights:
        return sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118 (it is no dict)


def _progress() -> Progress:
    return Progress("{task.description:32}", BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), console=console)


if __name__ == "__main__":
    sys.exit(main())
