"""An estimate as a table for the terminal, and as JSON."""

import json
from dataclasses import asdict, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cgd_cli.estimate import (
    CHARACTERS,
    READING,
    WRITING,
    Assumptions,
    Size,
    Thoughts,
    costs,
    fits,
    lengths,
    lm_eval_tasks,
)
from cgd_cli.shorter import shorter
from cgd_cli.terminal import plain
from cgd_operator.planning.dag import Run
from cgd_stages.models.fit import Misfit


def price_table(run: Run, assumptions: Assumptions, gpu: str, misfits: list[Misfit] | None = None) -> RenderableType:
    """The stages with tokens, GPUs, time, GPU-hours, price and price; below, what fits and what was
    assumed. `misfits` are verdicts from the models' files; None: the verdicts come from the sizes in their names."""
    stages = costs(run, assumptions)
    hours, money = sum(cost.gpu_hours for cost in stages), sum(cost.money for cost in stages)
    clock = _clock(sum(cost.seconds for cost in stages))
    table = Table(
        title=f"CGDRun {run.name}: about {hours:,.1f} GPU-hours, {money:,.0f} {assumptions.currency}, {clock} if the "
        "stages run one after another",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    for column in ("stage", "rows", "read", "written", "GPUs", "time", "GPU-h", assumptions.currency):
        justify: Any = "left" if column == "stage" else "right"
        table.add_column(column, justify=justify, no_wrap=column != "stage", overflow="fold")
    for cost in stages:
        counts = (_count(cost.rows), _count(cost.read), _count(cost.written), str(cost.gpus or ""))
        figures = (_clock(cost.seconds + cost.waits), f"{cost.gpu_hours:,.1f}", f"{cost.money:,.0f}")
        table.add_row(cost.stage, *counts, *figures)
    verdicts = [plain(fit.text, "green" if fit.fits else "bold red") for fit in fits(run, assumptions)]
    if misfits is not None:
        verdicts = [line for misfit in misfits for line in (plain(misfit.message, "bold red"), plain(misfit.hint))]
        fine = "prepare would refuse none of its models: by what their files say, they fit"
        verdicts = verdicts or [plain(fine, "green")]
    verdicts += [plain(length.text, "bold red") for length in lengths(run, assumptions) if not length.fits]
    tasks, unpriced = lm_eval_tasks(run, assumptions)
    missing = f"not in it: {', '.join(unpriced)}: their numbers of documents are not known; set a limit to price them"
    requests = [plain(f"lm-eval asks every model ({CHARACTERS} characters a token):", "dim")]
    requests += [plain(f"  {task.text}", "dim") for task in tasks]
    return Group(
        table,
        "",
        *_longest(run, assumptions),
        *([plain(missing, "yellow")] if unpriced else []),
        *verdicts,
        "",
        *_assumed(run, assumptions, gpu),
        *(requests if tasks else []),
    )


def _longest(run: Run, assumptions: Assumptions) -> list[Text]:
    """What takes longest, and what would shorten it."""
    if (found := shorter(run, assumptions)) is None:
        return []
    said = f"The longest stage is {found.longest.stage}: {_clock(found.longest.seconds)}."
    if found.field is None:
        return [
            plain(f"{said} More GPUs would hardly shorten it: most of it is the start of its pods, or one pod's work.")
        ]
    return [
        plain(said),
        plain(
            f"{found.field} {2 * found.now} in place of {found.now}: {_clock(found.seconds)}, and the run costs "
            f"{found.money:,.0f} {assumptions.currency}."
        ),
    ]


def _assumed(run: Run, assumptions: Assumptions, gpu: str) -> list[Text]:
    a, spec, thoughts = assumptions, run.resolved, Thoughts.of(run, assumptions)
    student, taught = spec.student.chat, spec.teacher.chat
    templates = [
        f"Chat template of the {name}: {chat.template_uri or 'in the manifest'}."
        for name, chat in (("student", student), ("teacher", taught))
        if chat.template
    ]
    teacher = f", teacher {_billions(a.of_teacher)}" if a.teacher else ""
    lines = (
        f"assumed: student {_billions(a.of_student)}{teacher} parameters;",
        f"{gpu} at {a.gpu_hour:g} {a.currency} an hour;",
        f"tokens: prompt {a.prompt}, answer {a.answer}, critique {a.critique},",
        f"refinement {a.refinement}; {a.in_flight} rows in flight; pods start in {a.start_minutes:g} min;",
        f"engines reach {READING:.0%} of peak FLOP/s and {WRITING:.0%} of peak bandwidth, training {a.mfu:.0%}.",
        f"Thinking of the student {student.thinking}, as training.thinking {spec.training.thinking} has it, with ",
        f"{thoughts.student} tokens a thought; of the teacher {taught.thinking}, with {thoughts.teacher}.",
        *_if_it_thinks(run, a),
        *templates,
        "Retries, waiting for nodes and the cost of long caches are not in it: take it for an order of magnitude.",
    )
    return [plain(line, "dim") for line in lines]


def _if_it_thinks(run: Run, assumptions: Assumptions) -> list[str]:
    """What the run costs if a teacher thinks by itself of which that is not known."""
    a = assumptions
    if run.resolved.teacher.chat.thinking != "auto" or a.teacher_thinks is not None or Thoughts.of(run, a).teacher:
        return []
    stages = costs(run, replace(a, teacher_thinks=True))
    hours, money = sum(cost.gpu_hours for cost in stages), sum(cost.money for cost in stages)
    return [f"If it thinks by itself, as many do: {hours:,.1f} GPU-hours, {money:,.0f} {a.currency}."]


def _clock(seconds: float) -> str:
    """Hours and minutes."""
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02} h" if minutes else ""


def _billions(size: Size) -> str:
    active = f" ({size.active / 1e9:g} B active)" if size.active != size.parameters else ""
    return f"{size.parameters / 1e9:g} B{active}"


def _count(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}" if number else ""


def price_json(run: Run, assumptions: Assumptions, misfits: list[Misfit] | None = None) -> str:
    stages = costs(run, assumptions)
    tasks, unpriced = lm_eval_tasks(run, assumptions)
    estimate = {
        "total": {"gpu_hours": sum(c.gpu_hours for c in stages), "money": sum(c.money for c in stages)},
        "stages": [{**asdict(cost), "gpu_hours": cost.gpu_hours} for cost in stages],
        "unpriced": unpriced,
        "tasks": [asdict(task) for task in tasks],
        "lengths": [{**asdict(length), "fits": length.fits} for length in lengths(run, assumptions)],
        "fits": [{**asdict(fit), "fits": fit.fits} for fit in fits(run, assumptions)],
        "misfits": None if misfits is None else [asdict(misfit) for misfit in misfits],
        "assumed": asdict(assumptions),
    }
    return json.dumps(estimate, indent=1)
