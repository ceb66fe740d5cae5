"""What a cluster provides, in a process of its own that stays until somebody ends it: `make up` and `make down`.

The process starts S3 with the demo's model, the examples' tutor, the local cluster and the operator. As long as it
lives it holds a lock in its folder, so that no other is started there and a dead one is known to be dead. Everything
that it has started ends with it, however it ends.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from botocore.exceptions import ClientError

from cgd_cli.terminal import Terminal
from cgd_local import smollm2
from cgd_local.cluster import LocalCluster, venv_environment
from cgd_local.kubectl import DemoError, apply, configmaps, object_of
from cgd_local.pods import exited, launch
from cgd_local.s3 import Access, SeaweedFS
from cgd_operator.api.crd import crd
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import NODE

BUCKET, SECRET = "cgd", "quickstart-s3"
ACCESS_KEY, SECRET_KEY = "demo", "demo-secret"
S3_PORT, TUTOR_PORT = 8333, 10802
"""The addresses that the manifests of `examples` name. Both servers take another port if theirs is taken."""
TUTOR = f"http://127.0.0.1:{TUTOR_PORT}/v1"
EXAMPLES = Path("examples")
QUICKSTART = (
    "quickstart-sums/rows.jsonl=examples/quickstart-rows.jsonl",
    "quickstart-sums/exam.jsonl=examples/quickstart-exam.jsonl",
    "quickstart-problems/problems.jsonl=examples/quickstart-problems.jsonl",
    "quickstart-problems/heldout.jsonl=examples/quickstart-heldout.jsonl",
)
LOCK, LOG, ERRORS, READY = "up.lock", "up.log", "up-errors.log", "up.json"
FAILED = "demo: "
"""Begins the line that says why it does not start."""
LOOK_SECONDS, LOCK_SECONDS, STOP_SECONDS = 0.1, 5.0, 10.0

console = Terminal()


@dataclass(frozen=True)
class Provided:
    """Where S3, the tutor and the API server are."""

    endpoint: str
    tutor: str
    kubeconfig: Path

    @property
    def s3(self) -> Access:
        return Access(self.endpoint, ACCESS_KEY, SECRET_KEY)


# --- from outside


def holder(folder: Path) -> int | None:
    """The id of the process that is up in a folder, or starts or ends there; None: there is none."""
    try:
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return int((folder / LOCK).read_text() or 0)
    return None


async def up(folder: Path, kubeconfig: Path | None = None) -> Provided:
    """Start what a cluster provides unless it is there already, and print what it says. Raises DemoError."""
    ready, log = folder / READY, folder / LOG
    process = None if holder(folder) else _start_holder(folder, kubeconfig)
    with log.open() as lines:
        while True:
            is_over = process.poll() is not None if process else holder(folder) is None
            is_ready = ready.exists()
            for line in lines.read().splitlines():
                console.print(line, soft_wrap=True)
            if is_over:
                last = (folder / ERRORS).read_text().strip().rpartition("\n")[2]
                raise DemoError(last.removeprefix(FAILED) or f"what a cluster provides has ended: see {log}")
            if is_ready:
                found = json.loads(ready.read_text())
                return Provided(found["endpoint"], found["tutor"], Path(found["kubeconfig"]))
            await asyncio.sleep(LOOK_SECONDS)


def _start_holder(folder: Path, kubeconfig: Path | None) -> "subprocess.Popen[bytes]":
    (folder / READY).unlink(missing_ok=True)
    given = ["--kubeconfig", str(kubeconfig)] if kubeconfig else []
    command = [sys.executable, "-m", "cgd_local", "hold", "--folder", str(folder), *given]
    with (folder / LOG).open("wb") as said, (folder / ERRORS).open("wb") as errors:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=errors, start_new_session=True)


async def down(folder: Path) -> bool:
    """End it; False when nothing is up. What does not end by itself within STOP_SECONDS is killed: the store and the
    stage programs are made for that."""
    if not (pid := holder(folder)):
        return False
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                while holder(folder) == pid:  # noqa: ASYNC110  another process's lock
                    await asyncio.sleep(LOOK_SECONDS)
                break
    return True


# --- the process


async def hold(folder: Path, kubeconfig: Path | None) -> None:
    """Start everything, say so, and wait for SIGTERM. Raises DemoError."""
    work = asyncio.current_task()
    assert work is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, work.cancel)
    with _lock(folder), contextlib.suppress(asyncio.CancelledError):
        async with AsyncExitStack() as stack:
            provided, operator = await _start(stack, folder, kubeconfig)
            made = json.dumps(asdict(provided), default=str)
            part = folder / f"{READY}.part"
            part.write_text(made)
            part.rename(folder / READY)
            code = await exited(operator)
            raise DemoError(f"the operator has ended with exit code {code}: see {folder / 'operator.log'}")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    with (folder / LOCK).open("a+") as lock:
        for attempt in range(round(LOCK_SECONDS / LOOK_SECONDS), -1, -1):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:  # `holder` takes it for a moment, too
                if not attempt:
                    raise DemoError(f"something is up in {folder} already") from error
                time.sleep(LOOK_SECONDS)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


async def _start(
    stack: AsyncExitStack, folder: Path, kubeconfig: Path | None
) -> tuple[Provided, "subprocess.Popen[bytes]"]:
    store = SeaweedFS(folder / "s3", access_key=ACCESS_KEY, secret_key=SECRET_KEY, bucket=BUCKET, port=S3_PORT)
    s3 = await stack.enter_async_context(store)
    _say(f"S3        {s3.endpoint} (SeaweedFS, data in {short(folder / 's3')})")
    model = await asyncio.to_thread(smollm2.ensure_float32)
    await asyncio.to_thread(upload_model, s3, model, BUCKET, model.name)
    _say(f"model     s3://{BUCKET}/models/{model.name}")
    if kubeconfig:
        await _require_no_nodes(kubeconfig)
    cluster = await stack.enter_async_context(
        LocalCluster(folder / "cluster", environment=image_environment(), kubeconfig=kubeconfig)
    )
    _say(f"cluster   {short(cluster.kubeconfig_path)}")
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    tutor = TUTOR
    objects = [crd(), object_of("Secret", SECRET, stringData=keys)]
    if examples := _examples():
        objects += configmaps(QUICKSTART)
        tutor = await stack.enter_async_context(_tutor(folder, examples))
        _say(f"tutor     {tutor} (examples/replicate/tutor.py)")
    await apply(cluster.kubeconfig_path, objects)
    operator = await stack.enter_async_context(_operator(cluster.kubeconfig_path, folder))
    _say(f"operator  python -m cgd_operator (log: {short(folder / 'operator.log')})")
    return Provided(s3.endpoint, tutor, cluster.kubeconfig_path), operator


def _examples() -> Path | None:
    """The folder of examples of this clone; None elsewhere."""
    return EXAMPLES.resolve() if EXAMPLES.is_dir() else None


def _say(line: str) -> None:
    console.print(line, soft_wrap=True)
    sys.stdout.flush()


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


def upload_model(s3: SeaweedFS | Access, folder: Path, bucket: str, name: str) -> None:
    """Store a model's folder as `s3://<bucket>/models/<name>`, as a user stores their own. Skips stored files."""
    client = s3.client(patient=True)
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
            "server of this machine. Apply a manifest with your own storage and images there, or leave out --kubeconfig"
        )


@asynccontextmanager
async def _tutor(folder: Path, examples: Path) -> AsyncIterator[str]:
    """The teacher of the quick start, as a server on this machine; its base URL."""
    port = TUTOR_PORT
    while await _listens(port):
        port += 1
    env = venv_environment() | {"PYTHONPATH": str(examples)}
    process = launch([sys.executable, "-m", "replicate.tutor", str(port)], env, folder, folder / "tutor.log")
    try:
        while not await _listens(port):
            if process.poll() is not None:
                raise DemoError(f"the tutor did not start: see {folder / 'tutor.log'}")
            await asyncio.sleep(LOOK_SECONDS)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        await exited(process)


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


@asynccontextmanager
async def _operator(kubeconfig: Path, folder: Path) -> "AsyncIterator[subprocess.Popen[bytes]]":
    env = venv_environment() | {"KUBECONFIG": str(kubeconfig), "CGD_PROGRESS_BIND": "127.0.0.1:0"}
    process = launch([sys.executable, "-m", "cgd_operator"], env, folder, folder / "operator.log")
    try:
        yield process
    finally:
        process.terminate()
        await exited(process)


def short(path: Path) -> str:
    """The path, relative to the working folder if it lies below that."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
