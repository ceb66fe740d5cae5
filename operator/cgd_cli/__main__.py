"""The commands.

`validate`, `render` and `plan` need only a manifest; `plan --read-models` reads the models' small files, too.
`status`, `watch`, `ui` and `logs` ask the cluster as kubectl does. `rows` and `report` also read the run's object store
with the credentials in the environment or, if it has none, those in the run's Secret. `compare` reads reports from
files, or from the stores of their runs.

What a command needs is imported in the command, so that `cgd --help` and completion start at once.
"""

import logging
import os
import shlex
import signal
import sys
from contextlib import nullcontext, suppress
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from cgd_cli import drafting  # noqa: F401  its commands
from cgd_cli.app import Namespace, app, ask, console, save
from cgd_cli.errors import Wrong, in_words
from cgd_cli.terminal import write
from cgd_stages.text.printable import printable, start_log

if TYPE_CHECKING:
    from cgd_cli.remote import Remote

Name = Annotated[str, typer.Argument(help="The run's name.")]
Stage = Annotated[str, typer.Option(help="Stage, as `cgd status` lists them.")]


def main() -> NoReturn:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background commands ignore SIGINT
    start_log("%(message)s", level=logging.WARNING)
    code = 1
    try:
        app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:  # noqa: BLE001 (the rim: a bug of ours prints its traceback)
        if (said := in_words(error)) is None:
            sys.excepthook(*sys.exc_info())
        else:
            print(printable(f"cgd: {said}", lines=True), file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):  # `cgd rows | head` closes the pipe early
            stream.flush()
    os._exit(code)  # not sys.exit: threads of libraries may abort the process during their teardown


def _version(show: bool) -> None:
    if show:
        write("cgd " + version_of("cgd-cli") + "\n")
        raise typer.Exit


@app.callback()
def cgd(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Critique-Guided Distillation on Kubernetes: manifests and runs, from a terminal."""


@app.command()
def status(name: Name, namespace: Namespace = None) -> None:
    """Show a run's stages."""
    from cgd_cli.table import table

    console.print(table(ask(namespace, lambda remote: remote.run(name))))


@app.command("list")
def list_runs(
    namespace: Namespace = None,
    everywhere: Annotated[bool, typer.Option("--all-namespaces", "-A", help="The runs of all namespaces.")] = False,
) -> None:
    """List the runs with their state, current stage, GPU-hours and age."""
    from datetime import UTC, datetime

    from cgd_cli.table import runs_table

    if namespace and everywhere:
        raise Wrong("--namespace and --all-namespaces exclude each other: use one of them")

    runs = ask(namespace, lambda remote: remote.runs(everywhere=everywhere))
    if not runs:
        raise Wrong("there is no CGDRun: apply one, or look elsewhere with --namespace or --all-namespaces")
    console.print(runs_table(runs, datetime.now(UTC), everywhere=everywhere))


@app.command()
def suspend(name: Name, namespace: Namespace = None) -> None:
    """Stop a run's pods; finished rows and checkpoints stay."""
    from cgd_cli.view import command

    ask(namespace, lambda remote: remote.suspend(name, suspended=True))
    console.print(f"{name} is going to stop; to let it go on: {command('resume', name)}")


@app.command()
def resume(name: Name, namespace: Namespace = None) -> None:
    """Let a suspended run go on."""
    ask(namespace, lambda remote: remote.suspend(name, suspended=False))
    console.print(f"{name} is going on")


@app.command()
def retry(name: Name, namespace: Namespace = None) -> None:
    """Try the failed stages of a run again, by deleting their Jobs; what they have stored is used."""
    stages = ask(namespace, lambda remote: remote.retry(name))
    console.print(f"{name} tries {', '.join(stages)} again")


@app.command()
def watch(name: Name, namespace: Namespace = None) -> None:
    """Show a run's stages, live, until the run ends; into a pipe, a line for each change. Exit code 1 if it fails."""
    from rich.live import Live

    from cgd_cli.table import changes, table

    async def follow(remote: "Remote") -> bool:
        with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
            shown: list[str] = []
            async for run in remote.follow(name):
                if live:
                    live.update(table(run), refresh=True)
                else:
                    lines = changes(run)
                    write("".join(f"{line}\n" for line in lines if line not in shown))
                    sys.stdout.flush()
                    shown = lines
                state = run.get("status", {}).get("state")
                if state in {"Succeeded", "Failed"}:
                    return bool(state == "Succeeded")
        raise Wrong(f"{name} was deleted")

    if not ask(namespace, follow):
        raise SystemExit(1)


@app.command()
def ui(
    namespace: Namespace = None,
    everywhere: Annotated[bool, typer.Option("--all-namespaces", "-A", help="The runs of all namespaces.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0 takes a free one.")] = 8765,
    browser: Annotated[bool, typer.Option(help="Open it in a browser.")] = True,
) -> None:
    """Show runs in a browser, live and read-only, until Ctrl-C."""
    import asyncio
    import errno
    import webbrowser

    from cgd_cli.ui import serving

    if namespace and everywhere:
        raise Wrong("--namespace and --all-namespaces exclude each other: use one of them")

    async def serve(remote: "Remote") -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        try:
            async with serving(remote.cluster, None if everywhere else remote.namespace, port) as address:
                console.print(f"{address} shows the runs, to this machine alone. Ctrl-C ends it.")
                if browser:
                    webbrowser.open(address)
                await stop.wait()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise Wrong(f"port {port} is in use: try --port {port + 1}, or --port 0 for a free one") from error

    ask(namespace, serve)


@app.command()
def logs(
    name: Name,
    stage: Annotated[str, typer.Argument(help="Default: the current one; with -f all from now on.")] = "",
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the stage, or the run, has ended.")
    ] = False,
    stored: Annotated[
        bool, typer.Option("--stored", help="What the run has stored of its logs, also of pods that are gone.")
    ] = False,
    namespace: Namespace = None,
) -> None:
    """Print the logs of a stage's pods."""
    from cgd_cli.logs import follow as follow_lines

    if follow and stored:
        raise Wrong("--follow and --stored exclude each other: a log is stored when its program has ended")

    async def read(remote: "Remote") -> list[tuple[str, str]]:
        return await remote.logs(await remote.run(name), stage)

    async def read_on(remote: "Remote") -> list[tuple[str, str]]:
        async for pod, line in follow_lines(remote, name, stage):
            write(f"{pod}: {line}\n")
            sys.stdout.flush()
        return []

    if stored:
        from cgd_cli import data

        run, storage = ask(namespace, lambda remote: remote.run_and_storage(name))
        found = data.stored_logs(run, storage, stage)
    else:
        found = ask(namespace, read_on if follow else read)
    for pod, text in found:
        console.rule(pod)
        write(text if text.endswith("\n") else f"{text}\n")


@app.command()
def rows(
    name: Name,
    stage: Stage = "refine",
    count: Annotated[int, typer.Option("--count", "-c", min=1, help="How many rows to show.")] = 3,
    row: Annotated[str, typer.Option("--id", help="Only rows whose id begins with this text.")] = "",
    rejected: Annotated[bool, typer.Option(help="The rejected rows, with their reasons.")] = False,
    mask: Annotated[
        str,
        typer.Option(help="Show the training example of this objective or variant, with the learned tokens marked."),
    ] = "",
    namespace: Namespace = None,
) -> None:
    """Show rows: prompt, answer, critique and refinement, with their counts."""
    from cgd_cli import data

    run, storage = ask(namespace, lambda remote: remote.run_and_storage(name))
    stored = data.rows(run, storage, stage=stage, rejected=rejected, prefix=row, count=count)
    if not stored:
        raise Wrong(f"{stage} of {name} has no such rows")
    for item in stored:
        colours = console.is_terminal and not console.no_color
        console.print(data.example(run, storage, item, mask, colours=colours) if mask else data.row_panel(item))


@app.command()
def report(
    name: Name,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("report.html"),
    namespace: Namespace = None,
) -> None:
    """Fetch a run's report: one HTML page that opens from disk, or with `-o report.json` every figure on it."""
    from cgd_cli import data

    kind = output.suffix.removeprefix(".")
    if kind not in {"html", "json"}:
        raise Wrong(f"{output}: the name of a report's file ends in .html or .json")
    run, storage = ask(namespace, lambda remote: remote.run_and_storage(name))
    save(output, data.report(run, storage, kind))


@app.command()
def pull(
    name: Name,
    folder: Annotated[Path, typer.Option("--output", "-o", help="A new or an empty folder.")] = Path("model"),
    stage: Annotated[str, typer.Option(help="The training whose model is wanted; default: the run's only one.")] = "",
    namespace: Namespace = None,
) -> None:
    """Download a trained student: a folder that transformers, vLLM and llama.cpp's converter load."""
    from cgd_cli import data

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Wrong(f"{folder} is not empty: name another folder with -o")
    run, storage = ask(namespace, lambda remote: remote.run_and_storage(name))
    size = data.pull(run, storage, stage, folder)
    console.print(f"{folder}: {size / 1e9:,.2f} GB. Serve it with: vllm serve {shlex.quote(str(folder))}")


@app.command()
def serve(
    name: Name,
    stage: Annotated[str, typer.Option(help="The training whose model is wanted; default: the run's only one.")] = "",
    folder: Annotated[
        Path | None, typer.Option("--output", "-o", help="Of the model; default: the stage's name.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="On 127.0.0.1.")] = 8000,
    run_it: Annotated[bool, typer.Option("--run", help="Download the model and start the server here.")] = False,
    namespace: Namespace = None,
) -> None:
    """Print the commands that serve a trained student with vLLM and ask it a question, or run the server."""
    from cgd_cli import data
    from cgd_cli.serve import become, service
    from cgd_cli.view import command
    from cgd_operator.planning.dag import Run

    run, storage = ask(namespace, lambda remote: remote.run_and_storage(name))
    training = data.training_of(run, stage)
    target = folder or Path(training)
    made = service(Run.of(run), target, port)
    if run_it and not target.exists():
        data.pull(run, storage, training, target)
    elif not target.exists():
        place = ("-n", run["metadata"]["namespace"], "--stage", training, "-o", str(target))
        write(f"{command('pull', name, *place)}\n")
    write(f"{made.text}\n# in another terminal, when it is ready:\n{made.asking}\n")
    if run_it:
        sys.stdout.flush()
        become(made)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Names of runs, or files from `cgd report -o x.json`.")],
    html: Annotated[Path | None, typer.Option(help="Also write the table to this HTML page.")] = None,
    namespace: Namespace = None,
) -> None:
    """Compare runs: accuracy of every model on every benchmark, trained models against each other question by question,
    and CGD over the rate of wrong critiques."""
    from cgd_cli import comparison, data
    from cgd_stages.report.page import render_comparison

    reports = {}
    for source in runs:
        if Path(source).is_file():
            reports[source] = Path(source).read_bytes()
        elif Path(source).suffix in {".json", ".html"}:
            raise Wrong(f"there is no file {source}: `cgd report` writes one of a run, with `-o` and its name")
        else:
            run, storage = ask(namespace, lambda remote, name=source: remote.run_and_storage(name))
            reports[source] = data.report(run, storage, "json")
    table = comparison.joined_reports(reports)
    console.print(*comparison.shown(table), sep="\n")
    if html:
        save(html, render_comparison(table).encode())


if __name__ == "__main__":
    main()
