"""`make demo`, step by step: S3, model, cluster, operator, kubectl apply, a live table, the report."""

import asyncio
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from botocore.exceptions import ClientError
from rich.live import Live

from cgd_cli.table import table
from cgd_cli.terminal import Terminal, plain
from cgd_local import smollm2
from cgd_local.cluster import LocalCluster, venv_environment
from cgd_local.pods import exited, launch
from cgd_local.s3 import SeaweedFS
from cgd_operator import yamls
from cgd_operator.api.spec import InvalidRun, parse_spec
from cgd_operator.kube.client import Cluster, Object
from cgd_operator.kube.kinds import NODE, RUN

BUCKET, SECRET = "cgd", "quickstart-s3"
LOOK_SECONDS = 0.5
QUIET_SECONDS = 10.0

console = Terminal()


class DemoError(Exception):
    """The demo cannot run; says what to change."""


async def demo(manifest: Path, folder: Path, files: list[str], models: list[Path], kubeconfig: Path | None) -> int:
    """Run the manifest; 0 when it has succeeded. `files` go into ConfigMaps: NAME/KEY=PATH. `models` are folders that
    are stored beside the demo's own model."""
    run, configmaps = _read(manifest), _configmaps(files)
    if missing := [model for model in models if not (model / "config.json").is_file()]:
        raise DemoError(f"--model {missing[0]} must be the folder of a model, with its config.json")
    async with AsyncExitStack() as stack:
        s3 = await stack.enter_async_context(
            SeaweedFS(folder / "s3", access_key="demo", secret_key="demo-secret", bucket=BUCKET)  # noqa: S106
        )
        console.print(f"S3        {s3.endpoint} (SeaweedFS, data in {_short(folder / 's3')})")
        for model in (await asyncio.to_thread(smollm2.ensure), *models):
            await asyncio.to_thread(upload_model, s3, model, BUCKET, model.resolve().name)
            console.print(f"model     s3://{BUCKET}/models/{model.resolve().name}")
        if kubeconfig:
            await _require_no_nodes(kubeconfig)
        cluster = await stack.enter_async_context(
            LocalCluster(folder / "cluster", environment=image_environment(), kubeconfig=kubeconfig)
        )
        console.print(f"cluster   {_short(cluster.kubeconfig_path)}")
        keys = {"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo-secret"}
        objects = "\n---\n".join(map(json.dumps, (_object("Secret", SECRET, stringData=keys), *configmaps)))
        for source, text in (("crds/", ""), ("-", objects)):
            apply = ("apply", "--server-side", "--force-conflicts", "-f", source)
            await _kubectl(cluster.kubeconfig_path, *apply, text=text)
        await stack.enter_async_context(_operator(cluster.kubeconfig_path, folder))
        console.print(f"operator  python -m cgd_operator (log: {_short(folder / 'operator.log')})")
        name = await _apply(run, s3, cluster.kubeconfig_path, folder)
        return _show_end(await _watch(cluster.kubeconfig_path, name), s3, folder)


def _read(manifest: Path) -> Object:
    try:
        run: Object = yaml.safe_load(manifest.read_text())
        parse_spec(run)
    except OSError as error:
        raise DemoError(f"{manifest} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, InvalidRun) as error:
        raise DemoError(f"{manifest} is not a valid CGDRun:\n{error}") from error
    return run


def image_environment() -> dict[str, str]:
    """The variables that the images set, for a machine without GPU and without a hub, and caches that outlive a pod."""
    cache = smollm2.cache_home()
    return venv_environment() | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads slow down everything else on the machine
        "TORCH_EXTENSIONS_DIR": str(cache / "torch-extensions"),
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
    }


def upload_model(s3: SeaweedFS, folder: Path, bucket: str, name: str) -> None:
    """Store a model's folder as `s3://<bucket>/models/<name>`, as a user stores their own. Skips stored files."""
    client = s3.client()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        key = f"models/{name}/{path.name}"
        try:
            stored = client.head_object(Bucket=bucket, Key=key)["ContentLength"]
        except ClientError:
            stored = -1
        if stored != path.stat().st_size:
            client.upload_file(str(path), bucket, key)


async def _require_no_nodes(kubeconfig: Path) -> None:
    async with await Cluster.connect(str(kubeconfig), manager="cgd-demo") as cluster:
        nodes, _ = await cluster.list(NODE)
    if others := [node["metadata"]["name"] for node in nodes if node["metadata"]["name"] != "local"]:
        raise DemoError(
            f"the cluster of {kubeconfig} has nodes of its own ({others[0]}, ...), and their pods cannot reach the S3 "
            "server of this machine. Apply a manifest with your own storage and images there, or unset KUBECONFIG here."
        )


def _configmaps(files: list[str]) -> list[Object]:
    data: dict[str, dict[str, str]] = {}
    for file in files:
        try:
            target, path = file.split("=", 1)
            name, key = target.split("/", 1)
            data.setdefault(name, {})[key] = Path(path).read_text()
        except ValueError as error:
            raise DemoError(f"--file {file} must be CONFIGMAP/KEY=PATH and name a UTF-8 text file") from error
        except OSError as error:
            raise DemoError(f"--file {file}: {error.strerror}") from error
    return [_object("ConfigMap", name, data=content) for name, content in data.items()]


def _object(kind: str, name: str, **content: Object) -> Object:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}, **content}


async def _apply(run: Object, s3: SeaweedFS, kubeconfig: Path, folder: Path) -> str:
    run["spec"]["storage"]["endpoint"] = s3.endpoint
    path = folder / "run.yaml"
    path.write_text(yamls.dump(run))
    await _kubectl(kubeconfig, "apply", "-f", str(path))
    name = str(run["metadata"]["name"])
    kubectl = _short(Path(sysconfig.get_path("scripts")) / "kubectl")
    applied = shlex.join(("kubectl", "apply", "-f", _short(path)))
    console.print(f"run       {applied}; look at it from another terminal:")
    console.print()
    console.print(f"          export KUBECONFIG={shlex.quote(str(kubeconfig))}")
    console.print(f"          {shlex.join((kubectl, 'get', 'cgd', '-w'))}")
    console.print(f"          {shlex.join((kubectl, 'describe', 'cgd', name))}")
    console.print()
    return name


async def _kubectl(kubeconfig: Path, *arguments: str, text: str = "") -> None:
    program = Path(sysconfig.get_path("scripts")) / "kubectl"
    process = await asyncio.create_subprocess_exec(
        str(program),
        *arguments,
        env={**os.environ, "KUBECONFIG": str(kubeconfig)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    out, _ = await process.communicate(text.encode())
    if process.returncode:
        raise DemoError(f"kubectl {' '.join(arguments)}: {out.decode().strip()}")


@asynccontextmanager
async def _operator(kubeconfig: Path, folder: Path) -> AsyncIterator[None]:
    env = venv_environment() | {"KUBECONFIG": str(kubeconfig), "CGD_PROGRESS_BIND": "127.0.0.1:0"}
    process = launch([sys.executable, "-m", "cgd_operator"], env, folder, folder / "operator.log")
    try:
        yield
    finally:
        process.terminate()
        await exited(process)


async def _watch(kubeconfig: Path, name: str) -> Object:
    """Show the run until it has ended; returns it."""
    async with await Cluster.connect(str(kubeconfig), manager="cgd-demo") as cluster:
        with Live(console=console, refresh_per_second=4, transient=False) as live:
            printed, printed_at = "", time.monotonic()
            while True:
                run = await cluster.get(RUN, name, "default")
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


def _show_end(run: Object, s3: SeaweedFS, folder: Path) -> int:
    status = run["status"]
    if _succeeded(status) == "False":
        message = next(entry["message"] for entry in status["conditions"] if entry["type"] == "Succeeded")
        console.print()
        console.print(plain("failed: ", "bold red"), message, sep="", soft_wrap=True)
        console.print(f"logs of the pods: {_short(folder / 'cluster' / 'pods')}")
        return 1
    artifacts, report, client = status["artifacts"], folder / "report.html", s3.client()
    where = urlsplit(artifacts["report"])
    key = where.path.lstrip("/")
    if key.endswith(".json"):  # a pointer to the folder: the pod was deleted before the operator looked at it
        pointer = client.get_object(Bucket=where.netloc, Key=key)["Body"].read()
        where = urlsplit(str(json.loads(pointer)["uri"]))
        key = where.path.lstrip("/")
    part = report.with_suffix(".part")
    client.download_file(where.netloc, f"{key}/report.html", str(part))
    shutil.move(part, report)
    console.print()
    console.print(plain("report       ", "bold green"), str(report), sep="")
    console.print(f"quadruples   {artifacts['quadruples']}", soft_wrap=True)
    for objective, uri in artifacts["checkpoints"].items():
        console.print(f"{objective:<12} {uri}", soft_wrap=True)
    return 0


def _short(path: Path) -> str:
    """The path, relative to the working folder if it lies below that."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
