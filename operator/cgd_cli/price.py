"""An estimate as a table for the terminal, and as JSON."""

import json
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cgd_cli.estimate import (
    CHARACTERS,
    READING,
    WRITING,
    Asked,
    Assumptions,
    Cost,
    all_asked,
    costs,
    fits,
    harness_of,
    unpriced,
)
from cgd_cli.terminal import plain
from cgd_operator.planning.dag import Run
from cgd_stages.models.fit import Misfit


def price_table(run: Run, given: Assumptions, gpu: str, misfits: list[Misfit] | None = None) -> RenderableType:
    """Stages with tokens, GPUs, time, GPU-hours, price and their share; below, what was assumed and what fits: by the
    sizes that were given, or by the models themselves where `misfits` tells what they were found to be."""
    found = costs(run, given)
    hours, money = _hours(found), sum(cost.money for cost in found)
    shown = Table(
        title=f"CGDRun {run.name}: about {hours:,.1f} GPU-hours, {money:,.0f}", title_justify="left", box=None
    )
    for column in ("stage", "rows", "read", "written", "GPUs", "time", "GPU-hours", "price", ""):
        shown.add_column(column, justify="left" if column in {"stage", ""} else "right", no_wrap=True)
    for cost in found:
        share = cost.money / money if money else 0.0
        figures = (
            _count(cost.rows),
            _count(cost.read),
            _count(cost.written),
            str(cost.gpus or ""),
            _time(cost.seconds),
        )
        bar = ProgressBar(total=1.0, completed=share, width=16)
        shown.add_row(cost.stage, *figures, f"{cost.gpu_hours:,.1f}", f"{cost.money:,.0f}", bar)
    return Group(
        shown,
        "",
        *_missing(run, given),
        *_verdicts(run, given, misfits),
        "",
        *_assumed(given, gpu),
        *_tasks(run, given),
    )


def _verdicts(run: Run, given: Assumptions, misfits: list[Misfit] | None) -> list[Text]:
    if misfits is None:
        return [plain(one.text, "green" if one.fits else "bold red") for one in fits(run, given)]
    told = [text for one in misfits for text in (plain(one.message, "bold red"), plain(one.hint))]
    return told or [plain("prepare would refuse none of its models: as far as their files tell, they fit", "green")]


def price_json(run: Run, given: Assumptions, misfits: list[Misfit] | None = None) -> str:
    found = costs(run, given)
    stages = [{**asdict(cost), "gpu_hours": cost.gpu_hours} for cost in found]
    verdicts = [{**asdict(one), "fits": one.fits} for one in fits(run, given)]
    total = {"gpu_hours": _hours(found), "money": sum(cost.money for cost in found)}
    told = {
        "total": total,
        "stages": stages,
        "unpriced": unpriced(run, given),
        "tasks": [asdict(one) for one in _asked(run, given)],
        "fits": verdicts,
        "misfits": None if misfits is None else [asdict(one) for one in misfits],
        "assumed": asdict(given),
    }
    return json.dumps(told, indent=1)


def _hours(found: list[Cost]) -> float:
    return sum(cost.gpu_hours for cost in found)


def _assumed(given: Assumptions, gpu: str) -> list[Text]:
    teacher = f", teacher {given.teacher / 1e9:g} B" if given.teacher else ""
    told = (
        f"assumed: student {given.student / 1e9:g} B{teacher} parameters; {gpu} at {given.gpu_hour:g} an hour;",
        f"tokens: prompt {given.prompt}, answer {given.answer}, critique {given.critique},",
        f"refinement {given.refinement}; {given.in_flight} rows in flight; pods start in {given.start_minutes:g} min;",
        f"engines reach {READING:.0%} of peak FLOP/s and {WRITING:.0%} of peak bandwidth, training {given.mfu:.0%}.",
        "Retries, waiting for nodes and the cost of long caches are not in it: take it for an order of magnitude.",
    )
    return [plain(line, "dim") for line in told]


def _asked(run: Run, given: Assumptions) -> list[Asked]:
    work = harness_of(run)
    return all_asked(work, given) if work else []


def _missing(run: Run, given: Assumptions) -> list[Text]:
    """What the sum leaves out."""
    names = unpriced(run, given)
    why = "how many documents lm-eval has of it is not known here; a limit would tell"
    return [plain(f"not in it: {', '.join(names)}: {why}", "yellow")] if names else []


def _tasks(run: Run, given: Assumptions) -> list[Text]:
    """What is assumed of lm-eval's tasks, for every model."""
    lines = [plain(f"  {one.text}", "dim") for one in _asked(run, given)]
    return [plain(f"lm-eval asks every model ({CHARACTERS} characters a token):", "dim"), *lines] if lines else []


def _count(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}" if number else ""


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min" if minutes else ""
