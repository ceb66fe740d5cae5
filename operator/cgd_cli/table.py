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
    conditions = {condition["type"]: condition for condition in status.get("conditions", [])}
    succeeded = conditions.get("Succeeded", {})
    if succeeded.get("message") and succeeded.get("status") != "True":
        lines.caption, lines.caption_justify = str(succeeded["message"]), "left"
    return lines


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
