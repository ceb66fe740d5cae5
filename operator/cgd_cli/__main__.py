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
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cgd_cli.errors import Wrong, in_words
from cgd_cli.sizes import GPUS
from cgd_cli.terminal import Terminal, write
from cgd_stages.text.printable import printable, start_log

if TYPE_CHECKING:
    from cgd_cli.remote import Remote

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
console = Terminal()

File = Annotated[Path, typer.Argument(help="A CGDRun as YAML; - reads standard input.")]
Name = Annotated[str, typer.Argument(help="The run's name.")]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Default: that of the kubeconfig's context.")]
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
def validate(
    file: File,
    published: Annotated[
        Path | None, typer.Option(help="The file that evaluation.published names: check it, too.")
    ] = None,
) -> None:
    """Check a manifest without a cluster: its fields, and whether a run can be planned from them."""
    from cgd_cli.manifest import published_tables, run_of
    from cgd_operator.planning.dag import plan

    run = run_of(file)
    children = plan(run)
    console.print(f"{file}: valid. {len(children)} children: {', '.join(child.stage for child in children)}")
    if published:
        from cgd_stages.results.published import contradictions

        tables = published_tables(run, file, published)
        rows = sum(len(table.rows) for table in tables)
        console.print(f"{published}: valid. {rows} rows of {run.spec.student.model}")
        for said in contradictions(tables):
            console.print(f"not the mean of its figures: {said}")


@app.command()
def render(
    file: File,
    generate_image: Annotated[str, typer.Option(help="Image of every stage but training.")] = "cgd-generate:latest",
    train_image: Annotated[str, typer.Option(help="Image of training.")] = "cgd-train:latest",
) -> None:
    """Print every object that the operator would create for a manifest, without a cluster."""
    from cgd_cli.manifest import run_of
    from cgd_operator import yamls
    from cgd_operator.planning.dag import BACKENDS, choose_backend, plan
    from cgd_operator.planning.manifests import Release, manifest, training_runtime

    run, release = run_of(file), Release(generate_image, train_image)
    backend = choose_backend(run, BACKENDS, ())
    assert backend is not None
    objects = []
    for child in plan(run, backend):
        if child.kind == "TrainJob":
            objects.append(training_runtime(run, child, release))
        objects.append(manifest(run, child, release))
    write("---\n".join(yamls.dump(item) for item in objects))


@app.command("plan")
def price(
    file: File,
    rows: Annotated[int | None, typer.Option(min=1, help="Default: prompts.limit.")] = None,
    student_params: Annotated[
        str, typer.Option(help="Such as 8B, or 30B-A3B; default: read off the model's name.")
    ] = "",
    teacher_params: Annotated[
        str, typer.Option(help="Such as 70B, or 235B-A22B; default: read off the model's name.")
    ] = "",
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}.")] = "a100-80gb",
    gpu_hour: Annotated[float, typer.Option(min=0, help="Price of a GPU-hour.")] = 2.5,
    currency: Annotated[str, typer.Option(help="The currency of all prices.")] = "USD",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 200,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 700,
    critique: Annotated[int, typer.Option(min=1, help="Tokens of a critique.")] = 500,
    refinement: Annotated[int, typer.Option(min=1, help="Tokens of a refinement.")] = 800,
    thought: Annotated[int, typer.Option(min=0, help="Tokens of a thought, where a model thinks.")] = 4000,
    input_million: Annotated[float, typer.Option(min=0, help="Price of a million tokens read at the endpoint.")] = 0.0,
    output_million: Annotated[float, typer.Option(min=0, help="Price of a million written at the endpoint.")] = 0.0,
    read_models: Annotated[
        bool,
        typer.Option(
            "--read-models",
            help="Read the models' config.json and headers (a folder, S3, the hub): take their sizes from there, and "
            "say what prepare would refuse.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Estimate what a run will cost, stage by stage, and whether its models fit, without a cluster."""
    from cgd_cli.estimate import Assumptions, Size, active_in, size_in
    from cgd_cli.manifest import run_of
    from cgd_cli.price import price_json, price_table

    def size(role: str, model: str, option: str, read: Size | None) -> Size:
        if read and not option:
            return read
        if (found := size_in(option or model)) is None:
            raise Wrong(
                f"{option or model} names no number of parameters: add an option such as --{role}-params 8B (47B-A13B: "
                "a mixture of experts, of which a token meets 13B), or --read-models"
            )
        return Size(found, active_in(option) or active_in(model) or found)

    run = run_of(file)
    if run.spec.placement.accelerator == "none":
        raise Wrong(f"{file} asks for no GPU (placement.accelerator: none): there is nothing to price")
    if gpu not in GPUS:
        raise Wrong(f"--gpu {gpu} must be one of {', '.join(GPUS)}")
    if (count := rows or run.spec.prompts.limit) is None:
        raise Wrong("how many rows? Set prompts.limit in the manifest, or add an option such as --rows 100000")
    found = None
    if read_models:
        from cgd_cli import models

        found = models.read(run, GPUS[gpu].memory)
    student = size("student", run.spec.student.model, student_params, found.student if found else None)
    served, none = run.spec.teacher.model, Size(0.0, 0.0)
    teacher = size("teacher", served, teacher_params, found.teacher if found else None) if served else none
    assumptions = Assumptions(
        rows=count,
        student=student.parameters,
        teacher=teacher.parameters,
        student_active=student.active,
        teacher_active=teacher.active,
        gpu=GPUS[gpu],
        gpu_hour=gpu_hour,
        currency=currency,
        prompt=prompt,
        answer=answer,
        critique=critique,
        refinement=refinement,
        thought=thought,
        input_million=input_million,
        output_million=output_million,
    )
    misfits = found.misfits if found else None
    if as_json:
        write(price_json(run, assumptions, misfits) + "\n")
    else:
        console.print(price_table(run, assumptions, gpu, misfits))


@app.command()
def status(name: Name, namespace: Namespace = None) -> None:
    """Show a run's stages."""
    from cgd_cli.table import table

    console.print(table(_ask(namespace, lambda remote: remote.run(name))))


@app.command("list")
def list_runs(
    namespace: Namespace = None,
    everywhere: Annotated[bool, typer.Option("--all-namespaces", "-A", help="The runs of all namespaces.")] = False,
) -> None:
    """List the runs with their state, current stage and GPU-hours."""
    from cgd_cli.table import runs_table

    runs = _ask(namespace, lambda remote: remote.runs(everywhere=everywhere))
    if not runs:
        raise Wrong("there is no CGDRun: apply one, or look elsewhere with --namespace or --all-namespaces")
    console.print(runs_table(runs))


@app.command()
def suspend(name: Name, namespace: Namespace = None) -> None:
    """Stop a run's pods; finished rows and checkpoints stay."""
    from cgd_cli.view import command

    _ask(namespace, lambda remote: remote.suspend(name, suspended=True))
    console.print(f"{name} is going to stop; to let it go on: {command('resume', name)}")


@app.command()
def resume(name: Name, namespace: Namespace = None) -> None:
    """Let a suspended run go on."""
    _ask(namespace, lambda remote: remote.suspend(name, suspended=False))
    console.print(f"{name} is going on")


@app.command()
def retry(name: Name, namespace: Namespace = None) -> None:
    """Try the failed stages of a run again, by deleting their Jobs; what they have stored is used."""
    stages = _ask(namespace, lambda remote: remote.retry(name))
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

    if not _ask(namespace, follow):
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

    _ask(namespace, serve)


@app.command()
def logs(
    name: Name,
    stage: Annotated[str, typer.Argument(help="Default: the current one.")] = "",
    namespace: Namespace = None,
) -> None:
    """Print the logs of a stage's pods."""

    async def read(remote: "Remote") -> list[tuple[str, str]]:
        return await remote.logs(await remote.run(name), stage)

    for pod, text in _ask(namespace, read):
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

    run, storage = _ask(namespace, lambda remote: remote.run_and_storage(name))
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
    run, storage = _ask(namespace, lambda remote: remote.run_and_storage(name))
    _save(output, data.report(run, storage, kind))


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
    run, storage = _ask(namespace, lambda remote: remote.run_and_storage(name))
    size = data.pull(run, storage, stage, folder)
    console.print(f"{folder}: {size / 1e9:,.2f} GB. Serve it with: vllm serve {shlex.quote(str(folder))}")


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
            run, storage = _ask(namespace, lambda remote, name=source: remote.run_and_storage(name))
            reports[source] = data.report(run, storage, "json")
    table = comparison.joined_reports(reports)
    console.print(*comparison.shown(table), sep="\n")
    if html:
        _save(html, render_comparison(table).encode())


def _save(file: Path, content: bytes) -> None:
    try:
        file.write_bytes(content)
    except OSError as error:
        raise Wrong(f"{file} cannot be written: {error.strerror}") from error
    console.print(f"{file}: {len(content):,} bytes")


def _ask(namespace: str | None, question: Any) -> Any:
    import asyncio
    from collections.abc import Coroutine

    from cgd_cli.remote import Remote

    async def ask() -> Any:
        async with await Remote.connect(namespace) as remote:
            answer = question(remote)
            return await answer if isinstance(answer, Coroutine) else answer

    return asyncio.run(ask())


if __name__ == "__main__":
    main()
