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
        lines.add_column(column, justify="left" if column in {"stage", "state", ""} else "right", no_wrap=True)
    for stage in status.get("stages", []):
        lines.add_row(*_cells(stage))
    if message := _why_not(status):
        lines.caption, lines.caption_justify = message, "left"
    return lines


def runs_table(runs: list[dict[str, Any]]) -> Table:
    """Runs, a line each, with what `kubectl get cgdruns` shows of them."""
    lines = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for column in ("namespace", "name", "state", "stage", "progress", "GPU-hours", "created"):
        lines.add_column(column, justify="right" if column in {"progress", "GPU-hours"} else "left", no_wrap=True)
    for run in runs:
        meta, status = run["metadata"], run.get("status", {})
        state = status.get("state", "Pending")
        lines.add_row(
            meta["namespace"],
            meta["name"],
            plain(state, COLOURS.get(state, "dim")),
            status.get("stage") or "",
            status.get("progress") or "",
            status.get("usage", {}).get("gpuHours", ""),
            meta["creationTimestamp"],
        )
    return lines


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
        plain(state, COLOURS.get(state, "dim")),
        ProgressBar(total=100, completed=percent, width=12),
        f"{rows.get('done', 0)}/{total}" if total else "",
        str(rows["rejected"]) if rows.get("rejected") else "",
        str(stage.get("tokensPerSecond") or ""),
        f"{stage['etaSeconds']}s" if stage.get("etaSeconds") is not None else "",
        f"{max(0, round((end - start).total_seconds()))}s" if start and end else "",
    ]
