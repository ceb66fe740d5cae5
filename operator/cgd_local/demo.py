"""`make demo`, step by step: what a cluster provides, kubectl apply, a live table, the report, and what to try next."""

import asyncio
import json
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rich.live import Live

from cgd_cli import comparison
from cgd_cli.errors import Wrong
from cgd_cli.manifest import body_of, run_of
from cgd_cli.table import table
from cgd_cli.terminal import Terminal, plain
from cgd_cli.view import shell
from cgd_local.background import BUCKET, ERRORS, TUTOR, Provided, short, up, upload_model
from cgd_local.kubectl import DemoError, apply, configmaps, kubectl
from cgd_operator import yamls
from cgd_operator.api.spec import InvalidRun
from cgd_operator.kube.client import Cluster, Object
from cgd_operator.kube.kinds import RUN, ApiError

NAMESPACE = "default"
LOOK_SECONDS = 0.5
QUIET_SECONDS = 10.0

console = Terminal()


@dataclass(frozen=True)
class Given:
    """What the user asks for."""

    manifest: Path
    folder: Path
    files: tuple[str, ...]
    """What goes into ConfigMaps: CONFIGMAP/KEY=PATH."""
    models: tuple[Path, ...]
    """Folders that are stored beside the demo's own model."""
    kubeconfig: Path | None
    """An API server to use instead of our own."""


async def demo(given: Given) -> int:
    """Run the manifest; 0 when it has succeeded. What it needs stays up. Raises DemoError."""
    run, objects = read(given.manifest), configmaps(given.files)
    if missing := [model for model in given.models if not (model / "config.json").is_file()]:
        raise DemoError(f"--model {missing[0]} must be the folder of a model, with its config.json")
    provided = await up(given.folder, given.kubeconfig)
    for model in given.models:
        await asyncio.to_thread(upload_model, provided.s3, model, BUCKET, model.resolve().name)
        console.print(f"model     s3://{BUCKET}/models/{model.resolve().name}")
    await apply(provided.kubeconfig, objects)
    try:
        name = await _apply(run, provided, given.folder)
        ended = await _watch(provided.kubeconfig, name)
    except ApiError as error:
        if error.status:
            raise DemoError(str(error)) from error
        raise DemoError(f"the cluster has ended: see {given.folder / ERRORS}") from error
    return _show_end(ended, provided, given.folder)


def read(manifest: Path) -> Object:
    """The CGDRun of a file. Raises DemoError."""
    try:
        run_of(manifest)
        run: Object = body_of(manifest)
    except (Wrong, InvalidRun) as error:
        raise DemoError(str(error)) from error
    if run["metadata"].get("namespace", NAMESPACE) != NAMESPACE:
        raise DemoError(
            f"{manifest}: leave out metadata.namespace: the demo's Secret and ConfigMaps are in {NAMESPACE}"
        )
    return run


async def _apply(run: Object, provided: Provided, folder: Path) -> str:
    name = str(run["metadata"]["name"])
    run["spec"]["storage"]["endpoint"] = provided.endpoint
    endpoint = run["spec"]["teacher"].get("endpoint", {})
    if endpoint.get("url") == TUTOR:
        endpoint["url"] = provided.tutor
    path = folder / "runs" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yamls.dump(run))
    await kubectl(provided.kubeconfig, "apply", "-f", str(path))
    console.print(f"run       {shell('kubectl', 'apply', '-f', short(path))}; in another terminal:")
    _show_commands(provided.kubeconfig, ("kubectl", "get", "cgd", "-w"), ("cgd", "watch", name), ("cgd", "ui"))
    return name


def _show_commands(kubeconfig: Path, *commands: tuple[str, ...]) -> None:
    """Commands to type, in an environment in which they work from any shell in this folder."""
    folder = short(Path(sysconfig.get_path("scripts")))
    console.print()
    console.print(f"    export KUBECONFIG={shell(str(kubeconfig))}", soft_wrap=True)
    for program, *words in commands:
        console.print(f"    {shell(f'{folder}/{program}', *words)}", soft_wrap=True)
    console.print()


async def _watch(kubeconfig: Path, name: str) -> Object:
    """Show the run until it has ended; returns it."""
    async with await Cluster.connect(str(kubeconfig), manager="cgd-demo") as cluster:
        with Live(console=console, refresh_per_second=4, transient=False) as live:
            printed, printed_at = "", time.monotonic()
            while True:
                run = await cluster.get(RUN, name, NAMESPACE)
                if run is None:
                    raise DemoError(f"CGDRun {name} was deleted")
                status = run.get("status", {})
                words = (status.get("state", "Pending"), *(status.get(field) for field in ("stage", "progress", "eta")))
                line = "  ".join(word for word in words if word)
                if console.is_terminal:
                    live.update(table(run))
                elif line != printed and time.monotonic() - printed_at > QUIET_SECONDS:
                    printed, printed_at = line, time.monotonic()
                    console.print(line)
                if _succeeded(status) != "Unknown":
                    live.update(table(run))
                    return run
                await asyncio.sleep(LOOK_SECONDS)


def _succeeded(status: Object) -> str:
    """The status of the condition Succeeded."""
    conditions = {entry["type"]: entry["status"] for entry in status.get("conditions", [])}
    return str(conditions.get("Succeeded", "Unknown"))


def _show_end(run: Object, provided: Provided, folder: Path) -> int:
    status, name = run["status"], str(run["metadata"]["name"])
    console.print()
    if _succeeded(status) == "False":
        message = next(entry["message"] for entry in status["conditions"] if entry["type"] == "Succeeded")
        console.print(plain("failed: ", "bold red"), message, sep="", soft_wrap=True)
        console.print(f"Logs of the pods: {short(folder / 'cluster/pods')}. Worth typing:")
        again = ("kubectl", "delete", "cgd", name)
        _show_commands(provided.kubeconfig, ("cgd", "logs", name), ("cgd", "retry", name), again)
        _show_down()
        return 1
    report = _fetch_report(run, provided, folder)
    figures = json.loads(report.with_suffix(".json").read_text())
    console.print(*comparison.shown(comparison.report_table(name, json.dumps(figures).encode())), sep="\n")
    console.print()
    console.print(plain("report    ", "bold green"), str(report), sep="", soft_wrap=True)
    console.print(f"rows      {status['artifacts']['quadruples']}", soft_wrap=True)
    for objective, uri in status["artifacts"]["checkpoints"].items():
        console.print(f"model     {uri} ({objective})", soft_wrap=True)
    console.print()
    console.print("The cluster stays up. Worth typing, here or in another terminal:")
    trained = next(iter(status["artifacts"]["checkpoints"]))
    stage = f"train-{trained.lower()}"
    _show_commands(
        provided.kubeconfig,
        ("cgd", "rows", name, "-c", "1"),
        ("cgd", "rows", name, "-c", "1", "--mask", trained),
        ("cgd", "ui"),
        ("kubectl", "describe", "cgd", name),
        ("cgd", "serve", name, "--stage", stage, "--run"),
    )
    _show_down()
    return 0


def _show_down() -> None:
    console.print("`make down` ends it; what is stored stays.")


def _fetch_report(run: Object, provided: Provided, folder: Path) -> Path:
    """The page, in a folder of this run's own, with its figures beside it."""
    meta, client = run["metadata"], provided.s3.client(patient=True)
    where = urlsplit(run["status"]["artifacts"]["report"])
    key = where.path.lstrip("/")
    if key.endswith(".json"):  # a pointer to the folder: the pod was deleted before the operator looked at it
        pointer = client.get_object(Bucket=where.netloc, Key=key)["Body"].read()
        where = urlsplit(str(json.loads(pointer)["uri"]))
        key = where.path.lstrip("/")
    moment = str(meta["creationTimestamp"]).translate({ord(":"): None, ord("-"): None})
    own = folder / "runs" / f"{meta['name']}-{moment}"
    own.mkdir(parents=True, exist_ok=True)
    for kind in ("json", "html"):
        client.download_file(where.netloc, f"{key}/report.{kind}", str(own / f"report.{kind}.part"))
        (own / f"report.{kind}.part").rename(own / f"report.{kind}")
    return own / "report.html"
