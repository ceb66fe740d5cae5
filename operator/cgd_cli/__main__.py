"""The commands.

`validate`, `render` and `plan` need only a manifest; `plan --read-models` reads the models' small files, too.
`status`, `watch`, `ui` and `logs` ask the cluster as kubectl does. `rows` and `report` also read the run's object store
with the credentials in the environment or, if it has none, those in the run's Secret. `compare` reads reports from
files, or from the stores of their runs.
"""

import asyncio
import errno
import logging
import os
import signal
import sys
import webbrowser
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
import yaml
from rich.live import Live

from cgd_cli import comparison, data, models
from cgd_cli.estimate import GPUS, Assumptions, active_in, size_in
from cgd_cli.price import price_json, price_table
from cgd_cli.remote import Remote
from cgd_cli.table import table
from cgd_cli.terminal import Terminal, write
from cgd_cli.ui import serving
from cgd_operator import yamls
from cgd_operator.api import GROUP, VERSION
from cgd_operator.api.spec import InvalidRun
from cgd_operator.kube.kinds import ApiError
from cgd_operator.kube.names import is_label, is_name
from cgd_operator.planning.dag import BACKENDS, Run, choose_backend, plan
from cgd_operator.planning.manifests import Release, manifest, training_runtime
from cgd_stages.errors import StageError
from cgd_stages.report.page import render_comparison
from cgd_stages.text.printable import printable, start_log

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Terminal()

STDIN = Path("-")
File = Annotated[Path, typer.Argument(help="A CGDRun as YAML; - reads standard input.")]
Name = Annotated[str, typer.Argument(help="The run's name.")]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Default: that of the kubeconfig's context.")]
Stage = Annotated[str, typer.Option(help="Stage, as `cgd status` lists them.")]


HINTS = {
    0: "Is the server of the kubeconfig's context the right one, and does it run?",
    401: "Log in to the cluster again: it does not know the kubeconfig's user.",
    403: "The cluster's administrators can allow it.",
}
"""What the user can do, by the code of the API server's answer; 0: no answer came."""


class Wrong(Exception):
    """The user must change something; the message says what."""


def main() -> NoReturn:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background commands ignore SIGINT
    start_log("%(message)s", level=logging.WARNING)
    code = 1
    try:
        app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except (Wrong, InvalidRun, ApiError, StageError) as error:
        hint = HINTS.get(error.status) if isinstance(error, ApiError) else getattr(error, "hint", "")
        print(printable(f"cgd: {error}" + (f"\n{hint}" if hint else ""), lines=True), file=sys.stderr)
    except Exception:  # noqa: BLE001 (the rim: a bug of ours prints its traceback)
        sys.excepthook(*sys.exc_info())
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):  # `cgd rows | head` closes the pipe early
            stream.flush()
    os._exit(code)  # not sys.exit: threads of libraries may abort the process during their teardown


@app.command()
def validate(file: File) -> None:
    """Check a manifest without a cluster: its fields, and whether a run can be planned from them."""
    run = _run_of(file)
    children = plan(run)
    console.print(f"{file}: valid. {len(children)} children: {', '.join(child.stage for child in children)}")


@app.command()
def render(
    file: File,
    generate_image: Annotated[str, typer.Option(help="Image of every stage but training.")] = "cgd-generate:latest",
    train_image: Annotated[str, typer.Option(help="Image of training.")] = "cgd-train:latest",
) -> None:
    """Print every object that the operator would create for a manifest, without a cluster."""
    run, release = _run_of(file), Release(generate_image, train_image)
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
            help="Read the models' config.json and headers (a folder, S3, the hub) and say what prepare would refuse.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Estimate what a run will cost, stage by stage, and whether its models fit, without a cluster."""
    run = _run_of(file)
    if run.spec.placement.accelerator == "none":
        raise Wrong(f"{file} asks for no GPU (placement.accelerator: none): there is nothing to price")
    if gpu not in GPUS:
        raise Wrong(f"--gpu {gpu} must be one of {', '.join(GPUS)}")
    if (count := rows or run.spec.prompts.limit) is None:
        raise Wrong("how many rows? Set prompts.limit in the manifest, or add an option such as --rows 100000")
    teacher = run.spec.teacher.model
    assumptions = Assumptions(
        rows=count,
        student=_parameters("student", run.spec.student.model, student_params),
        teacher=_parameters("teacher", teacher, teacher_params) if teacher else 0.0,
        student_active=active_in(student_params or run.spec.student.model),
        teacher_active=active_in(teacher_params or teacher) if teacher else None,
        gpu=GPUS[gpu],
        gpu_hour=gpu_hour,
        prompt=prompt,
        answer=answer,
        critique=critique,
        refinement=refinement,
        thought=thought,
        input_million=input_million,
        output_million=output_million,
    )
    misfits = models.misfits(run, assumptions.gpu.memory) if read_models else None
    if as_json:
        write(price_json(run, assumptions, misfits) + "\n")
    else:
        console.print(price_table(run, assumptions, gpu, misfits))


def _parameters(role: str, model: str, option: str) -> float:
    if (parameters := size_in(option or model)) is None:
        raise Wrong(
            f"{option or model} names no number of parameters: add an option such as --{role}-params 8B (47B-A13B: a "
            "mixture of experts, of which a token meets 13B)"
        )
    return parameters


@app.command()
def status(name: Name, namespace: Namespace = None) -> None:
    """Show a run's stages."""
    console.print(table(_ask(namespace, lambda remote: remote.run(name))))


@app.command()
def watch(name: Name, namespace: Namespace = None) -> None:
    """Show a run's stages, live, until the run ends. Exit code 1 if it fails."""

    async def follow(remote: Remote) -> bool:
        with Live(console=console, auto_refresh=False) as live:
            async for run in remote.follow(name):
                live.update(table(run), refresh=True)
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
    if namespace and everywhere:
        raise Wrong("--namespace and --all-namespaces exclude each other: use one of them")

    async def serve(remote: Remote) -> None:
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

    async def read(remote: Remote) -> list[tuple[str, str]]:
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
        str, typer.Option(help="Show the training example of this objective, with the learned tokens marked.")
    ] = "",
    namespace: Namespace = None,
) -> None:
    """Show rows: prompt, answer, critique and refinement, with their counts."""
    run, storage = _ask(namespace, lambda remote: remote.run_and_storage(name))
    stored = data.rows(run, storage, stage=stage, rejected=rejected, prefix=row, count=count)
    if not stored:
        raise Wrong(f"{stage} of {name} has no such rows")
    for item in stored:
        console.print(data.example(run, storage, item, mask) if mask else data.row_panel(item))


@app.command()
def report(
    name: Name,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("report.html"),
    namespace: Namespace = None,
) -> None:
    """Fetch a run's report: one HTML page that opens from disk, or with `-o report.json` every figure on it."""
    kind = output.suffix.removeprefix(".")
    if kind not in {"html", "json"}:
        raise Wrong(f"{output}: the name of a report's file ends in .html or .json")
    run, storage = _ask(namespace, lambda remote: remote.run_and_storage(name))
    output.write_bytes(data.report(run, storage, kind))
    console.print(f"{output}: {output.stat().st_size:,} bytes")


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Names of runs, or files from `cgd report -o x.json`.")],
    html: Annotated[Path | None, typer.Option(help="Also write the table to this HTML page.")] = None,
    namespace: Namespace = None,
) -> None:
    """Compare runs: accuracy of every model on every benchmark, and over the rate of corrupted critiques."""
    reports = {}
    for source in runs:
        if Path(source).is_file():
            reports[source] = Path(source).read_bytes()
        else:
            run, storage = _ask(namespace, lambda remote, name=source: remote.run_and_storage(name))
            reports[source] = data.report(run, storage, "json")
    table = comparison.joined_reports(reports)
    console.print(*comparison.shown(table), sep="\n")
    if html:
        html.write_text(render_comparison(table))
        console.print(f"{html}: {html.stat().st_size:,} bytes")


def _run_of(file: Path) -> Run:
    try:
        documents = list(yamls.load_all(sys.stdin.read() if file == STDIN else file.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Wrong(f"{file} is not YAML: {error}") from error
    except OSError as error:
        raise Wrong(f"{file} cannot be read: {error.strerror}") from error
    runs = [document for document in documents if isinstance(document, dict) and document.get("kind") == "CGDRun"]
    if len(runs) != 1:
        raise Wrong(f"{file} holds {len(runs) or 'no'} CGDRun{'s: give each a file of its own' if runs else ''}")
    (body,) = runs
    meta = body.get("metadata")
    if not isinstance(meta, dict) or not meta.get("name"):
        raise Wrong(f"{file}: metadata.name is missing")
    _check_names(file, body)
    # The API server would set these.
    body["metadata"] = {"namespace": "default", "uid": "00000000-0000-0000-0000-000000000000", **meta}
    return Run.of(body)


def _check_names(file: Path, body: dict[str, Any]) -> None:
    """Refuse what the API server would refuse outside the spec."""
    meta, version = body["metadata"], f"{GROUP}/{VERSION}"
    if body.get("apiVersion") != version:
        raise Wrong(f"{file}: apiVersion must be {version} (it is {body.get('apiVersion')!r})")
    for field, is_valid in (("name", is_name), ("namespace", is_label)):
        value = meta.get(field, "default")
        if not isinstance(value, str) or len(value) > 63 or not is_valid(value):
            raise Wrong(
                f"{file}: metadata.{field} must be text of at most 63 small letters, digits and hyphens"
                f"{' (dots, too, in a name)' if field == 'name' else ''}, with a letter or digit at both ends (it is "
                f"{value!r})"
            )


def _ask(namespace: str | None, question: Any) -> Any:
    async def ask() -> Any:
        async with await Remote.connect(namespace) as remote:
            answer = question(remote)
            return await answer if isinstance(answer, Coroutine) else answer

    return asyncio.run(ask())


if __name__ == "__main__":
    main()
