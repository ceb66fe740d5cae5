"""A run as a table for the terminal."""

from datetime import UTC, datetime
from typing import Any

from rich.progress_bar import ProgressBar
from rich.table import Table

from cgd_cli.terminal import plain
from cgd_operator.kube.outside import moment

COLOURS = {"Succeeded": "green", "Running": "cyan", "Failed": "bold red", "Waiting": "yellow", "Suspended": "yellow"}


def table(run: dict[str, Any]) -> Table:
    """Stages with state, progress, rows, speed, ETA and time, from the run's status."""
    status = run.get("status", {})
    name, state = run["metadata"]["name"], status.get("state", "Pending")
    shown = Table(title=f"CGDRun {name}: {state}", title_justify="left", box=None)
    for column, justify in (
        ("stage", "left"),
        ("state", "left"),
        ("", "left"),
        ("rows", "right"),
        ("rej.", "right"),
        ("tokens/s", "right"),
        ("ETA", "right"),
        ("time", "right"),
    ):
        shown.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for stage in status.get("stages", []):
        shown.add_row(*_row(stage))
    if message := _message(status):
        shown.caption, shown.caption_justify = message, "left"
    return shown


def _row(stage: dict[str, Any]) -> list[Any]:
    state, percent, rows = stage.get("state", "Pending"), stage.get("percent", 0), stage.get("rows") or {}
    total = rows.get("total")
    return [
        stage["name"],
        plain(state, COLOURS.get(state, "dim")),
        ProgressBar(total=100, completed=percent, width=12),
        f"{rows.get('done', 0)}/{total}" if total else "",
        str(rows["rejected"]) if rows.get("rejected") else "",
        str(stage.get("tokensPerSecond") or ""),
        f"{stage['etaSeconds']}s" if stage.get("etaSeconds") is not None else "",
        _time(stage),
    ]


def _time(stage: dict[str, Any]) -> str:
    """How long a stage has taken; nothing where its times are none."""
    start, ended = moment(stage.get("startTime")), stage.get("completionTime")
    end = moment(ended) if ended else datetime.now(UTC)
    return f"{max(0, round((end - start).total_seconds()))}s" if start and end else ""


def _message(status: dict[str, Any]) -> str:
    conditions = {one["type"]: one for one in status.get("conditions", [])}
    told = conditions.get("Succeeded", {})
    return str(told.get("message", "")) if told.get("status") != "True" else ""
