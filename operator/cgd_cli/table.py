"""A run as a table for the terminal."""

from datetime import UTC, datetime
from typing import Any

from rich.progress_bar import ProgressBar
from rich.table import Table

from cgd_cli.terminal import plain
from cgd_operator.kube.outside import moment

COLOURS = {"Succeeded": "green", "Running": "cyan", "Failed": "bold red", "Waiting": "yellow", "Suspended": "yellow"}


def table(run: dict[str, Any]) -> Table:
    """The stages in a run's status, with state, progress, rows, speed, ETA and time."""
    status = run.get("status", {})
    name, state = run["metadata"]["name"], status.get("state", "Pending")
    lines = Table(title=f"CGDRun {name}: {state}", title_justify="left", box=None)
    for column in ("stage", "state", "", "rows", "rej.", "tokens/s", "ETA", "time"):
        justify: Any = "left" if column in {"stage", "state", ""} else "right"
        lines.add_column(column, justify=justify, no_wrap=column != "stage", overflow="fold")
    for stage in status.get("stages", []):
        lines.add_row(*_cells(stage))
    if message := _why_not(status):
        lines.caption, lines.caption_justify = message, "left"
    return lines


def runs_table(runs: list[dict[str, Any]], now: datetime, *, everywhere: bool) -> Table:
    """Runs, a line each, with what `kubectl get cgdruns` shows of them; with their namespaces if they are of all."""
    lines = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in (*(["namespace"] if everywhere else []), "name", "state", "stage", "progress", "GPU-hours", "age"):
        justify: Any = "right" if column in {"progress", "GPU-hours", "age"} else "left"
        lines.add_column(column, justify=justify, no_wrap=column not in FOLDED, overflow="fold")
    for run in runs:
        meta, status = run["metadata"], run.get("status", {})
        state, created = status.get("state", "Pending"), moment(meta.get("creationTimestamp"))
        lines.add_row(
            *([meta["namespace"]] if everywhere else []),
            meta["name"],
            plain(state, COLOURS.get(state, "dim")),
            status.get("stage") or "",
            status.get("progress") or "",
            status.get("usage", {}).get("gpuHours", ""),
            age((now - created).total_seconds()) if created else "",
        )
    return lines


FOLDED = ("namespace", "name", "stage")
"""Columns that take several lines where the terminal is narrow."""
UNITS = ((8 * 86400, 86400, "d", 0, ""), (2 * 86400, 86400, "d", 3600, "h"), (8 * 3600, 3600, "h", 0, ""),
         (3 * 3600, 3600, "h", 60, "m"), (600, 60, "m", 0, ""), (120, 60, "m", 1, "s"))  # fmt: skip
"""From so many seconds on: the first unit with its seconds and sign, and a second one."""


def age(seconds: float) -> str:
    """A span of time as kubectl writes it: 45s, 3m20s, 47m, 5h12m, 9h, 2d3h, 12d."""
    whole = max(0, int(seconds))
    for least, first, sign, second, other in UNITS:
        if whole >= least:
            rest = f"{whole % first // second}{other}" if second and whole % first // second else ""
            return f"{whole // first}{sign}{rest}"
    return f"{whole}s"


def changes(run: dict[str, Any]) -> list[str]:
    """The run's state and that of each stage that has begun, a line each, for a log: progress in steps of a tenth."""
    status, name = run.get("status", {}), run["metadata"]["name"]
    lines = [f"{name}: {status.get('state', 'Pending')}"]
    for stage in status.get("stages", []):
        state, percent = stage.get("state", "Pending"), stage.get("percent", 0)
        if state != "Pending":
            tenth = f" {percent // 10 * 10}%" if state == "Running" else ""
            lines.append(f"{name}: {stage['name']} {state}{tenth}")
    if message := _why_not(status):
        lines.append(f"{name}: {message}")
    return lines


def _why_not(status: dict[str, Any]) -> str:
    """Why the run has not succeeded, as far as its conditions say."""
    conditions = {condition["type"]: condition for condition in status.get("conditions", [])}
    succeeded = conditions.get("Succeeded", {})
    return "" if succeeded.get("status") == "True" else str(succeeded.get("message") or "")


def _cells(stage: dict[str, Any]) -> list[Any]:
    state, percent, rows = stage.get("state", "Pending"), stage.get("percent", 0), stage.get("rows") or {}
    total = rows.get("total")
    start, completion = moment(stage.get("startTime")), stage.get("completionTime")
    end = moment(completion) if completion else datetime.now(UTC)  # None: the status holds no valid time
    return [
        stage["name"],
        plain(", round ".join(filter(None, (state, stage.get("round")))), COLOURS.get(state, "dim")),
        ProgressBar(total=100, completed=percent, width=12),
        f"{rows.get('done', 0)}/{total}" if total else "",
        str(rows["rejected"]) if rows.get("rejected") else "",
        str(stage.get("tokensPerSecond") or ""),
        f"{stage['etaSeconds']}s" if stage.get("etaSeconds") is not None else "",
        f"{max(0, round((end - start).total_seconds()))}s" if start and end else "",
    ]
