"""Build the three images on a Debian made by debootstrap, and try in them everything that needs no GPU.

    make check-images IMAGES="operator train" FOLDER=/large/disk MIRROR=... COMPRESSED=yes

No Docker, no registry of images: root, buildah and debootstrap. What is built is what ships: the same Dockerfiles on
the same release of Debian. Programs run as pods run them (likeapod.sh), on a real S3 server and a local API server.
Everything that it makes is in one folder, which it removes.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table
from support import tiny
from support.local_world import eventually
from support.stage_builders import generate_work, prepare_work, task
from support.train_builders import quadruple, refined, train_work

from cgd_local import pytorchjobs
from cgd_local.apiserver import ApiServer
from cgd_local.cluster import install
from cgd_local.s3 import SeaweedFS
from cgd_operator.kube.client import Cluster, Object
from cgd_operator.kube.kinds import JOB, RUN
from cgd_stages.contract import Check, Exit, LastWords, Storage, Work
from cgd_stages.errors import GPU_HINT
from cgd_stages.store.bucket import Bucket

HERE = Path(__file__).parent
ROOM = 45
"""GB of disk: while the layer of generate is made, its venv is there four times."""
PIP = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")
CERTIFICATES, MOUNTED = Path("/etc/ssl/certs/ca-certificates.crt"), "/run/ca-certificates.crt"
PROGRAMS = [
    f"cgd_stages.{name}"
    for name in ("prepare", "fetch", "generate", "rollout", "score", "check", "evaluate", "harness", "report", "clean")
]
IMPORTS = {
    "operator": ["cgd_operator.process"],
    "generate": [
        *PROGRAMS,
        "vllm",
        "vllm.v1.engine.llm_engine",
        "vllm.entrypoints.llm",
        "lm_eval",
        "cgd_stages.report.audit",
        "math_verify",
        "peft",
    ],
    "train": ["cgd_stages.train.loop", "cgd_stages.train.student", "deepspeed", "accelerate", "peft", "triton"],
}
PROBLEMS = "".join(json.dumps({"question": f"What is {n} + {n}?", "answer": str(2 * n)}) + "\n" for n in range(20))
MODEL = "/scratch/model"
KEYS = {"AWS_ACCESS_KEY_ID": "check", "AWS_SECRET_ACCESS_KEY": "check-secret", "AWS_EC2_METADATA_DISABLED": "true"}


class Broken(Exception):
    """An image does not do what it must."""


@dataclass(frozen=True)
class Workshop:
    """The folder of this check, with buildah's storage in it."""

    folder: Path

    def command(self, *arguments: str) -> list[str]:
        return ["buildah", "--root", f"{self.folder}/root", "--runroot", f"{self.folder}/run", *arguments]

    def buildah(self, *arguments: str) -> str:
        return self._run(self.command(*arguments), stdout=subprocess.PIPE)

    def make_base(self) -> None:
        """Debian as its own images are, but for what they leave out to be small."""
        root = self.folder / "base"
        mirror = [os.environ["MIRROR"]] if os.environ.get("MIRROR") else []
        self._run(["debootstrap", "--variant=minbase", "trixie", str(root), *mirror], stdout=subprocess.DEVNULL)
        for left in ("var/cache/apt", "var/lib/apt/lists"):
            shutil.rmtree(root / left)
        container = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", container, str(root), "/")
        self.buildah("commit", "--quiet", "--rm", container, "base")
        shutil.rmtree(root)

    def make(self, name: str) -> "Image":
        started = time.monotonic()
        given = {name: os.environ[name] for name in PIP if name in os.environ}
        given |= {"PIP_CERT": MOUNTED}
        arguments = [word for key, value in given.items() for word in ("--build-arg", f"{key}={value}")]
        build = self.command("build", "--isolation", "chroot", "--volume", f"{CERTIFICATES}:{MOUNTED}:ro", *arguments)
        where = ["BASE_IMAGE=localhost/base", "REGISTRY=localhost", "TAG=check"]
        self._run(["make", "images", f"BUILD={' '.join(build)}", *where, f"IMAGES={name}"])
        container = self.buildah("from", f"localhost/cgd-{name}:check")
        root = Path(self.buildah("mount", container))
        settings = json.loads(self.buildah("inspect", container))["OCIv1"]["config"]
        return Image(name, root, settings["Env"], self.folder / "scratch", time.monotonic() - started)

    def compressed(self, name: str) -> int:
        """Bytes of the image as a registry holds it."""
        pushed = self.folder / "pushed"
        self.buildah("push", "--quiet", f"localhost/cgd-{name}:check", f"dir:{pushed}")
        size = sum(path.stat().st_size for path in pushed.iterdir())
        shutil.rmtree(pushed)
        return size

    def forget(self, name: str) -> None:
        """Give its room to the next image."""
        self.buildah("rm", "--all")
        self.buildah("rmi", f"localhost/cgd-{name}:check")

    def remove(self) -> None:
        self.buildah("rm", "--all")
        self.buildah("rmi", "--all", "--force")
        shutil.rmtree(self.folder)

    def _run(self, command: list[str], *, stdout: int | None = None) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
        environment |= {"TMPDIR": str(self.folder)}
        done = subprocess.run(command, stdout=stdout, env=environment, check=True)
        return (done.stdout or b"").decode().strip()


@dataclass(frozen=True)
class Image:
    """A built image, its root mounted."""

    name: str
    root: Path
    environment: list[str]
    scratch: Path
    seconds: float

    def command(self, *command: str, **environment: str) -> list[str]:
        pairs = {"HOME": "/scratch", "TMPDIR": "/tmp"} | environment
        given = [*self.environment, *(f"{name}={value}" for name, value in pairs.items())]
        return [str(HERE / "likeapod.sh"), str(self.root), str(self.scratch), *given, *command]

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*command, **environment), capture_output=True, text=True, check=False)

    def passes(self, *command: str) -> str:
        done = self.run(*command)
        if done.returncode:
            raise Broken(f"{' '.join(command)} in {self.name}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def clean_scratch(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        for file in ("imports.py", "owners.py", "compile_kernels.py"):
            shutil.copy(HERE / file, self.scratch)
        shutil.copy(Path(sys.executable).with_name("uv"), self.scratch)
        tiny.make(self.scratch / "model")
        for path in (self.scratch, *self.scratch.rglob("*")):
            os.chown(path, 65532, 65532)

    def stage(self, storage: Storage, work: Work, stage: str = "") -> tuple[int, LastWords, str]:
        """Run the program for this work to its end: exit code, last words, log."""
        given = task(storage, work).model_copy(update={"stage": stage or work.kind})
        done = self.run(
            "python", "-m", f"cgd_stages.{work.kind}",
            CGD_TASK=given.to_json(), CGD_SCRATCH="/scratch", CGD_TERMINATION_LOG="/scratch/words", **KEYS,
        )  # fmt: skip
        words = self.scratch / "words"
        if not words.exists():
            raise Broken(f"{work.kind} in {self.name}: {done.returncode}, no last words\n{done.stdout}{done.stderr}")
        said = LastWords.model_validate_json(words.read_text())
        words.unlink()
        return done.returncode, said, done.stderr

    def sizes(self) -> list[tuple[int, str]]:
        """MB of the largest packages."""
        packages = next((self.root / "opt/cgd/lib").glob("python3.*/site-packages"))
        return sorted(((megabytes(path), path.name) for path in packages.iterdir()), reverse=True)[:8]


def megabytes(path: Path) -> int:
    return int(subprocess.check_output(["du", "-sxB", "1000000", str(path)]).split()[0])


def ends_well(image: Image, storage: Storage, work: Work) -> None:
    code, words, log = image.stage(storage, work)
    if code != Exit.DONE:
        raise Broken(f"{work.kind} ended with {code}: {words.message}\n{log}")


def asks_for_a_gpu(image: Image, storage: Storage, work: Work, stage: str = "") -> str:
    """The program goes all the way to the device, and says in plain words that there is none and who must act."""
    code, words, log = image.stage(storage, work, stage)
    if (code, words.hint) != (Exit.RETRY, GPU_HINT):
        raise Broken(f"{work.kind} ended with {code}, {words.message!r}, hint {words.hint!r}\n{log}")
    return words.message


def try_generate(image: Image, s3: SeaweedFS) -> list[str]:
    storage = Storage(uri="s3://data/generate", endpoint=s3.endpoint, path_style=True)
    bucket = Bucket(storage)
    bucket.put("problems.jsonl", PROBLEMS.encode())
    ends_well(image, storage, prepare_work(MODEL, f"{storage.uri}/problems.jsonl"))
    message = asks_for_a_gpu(image, storage, generate_work(MODEL, "answer"), "answer")
    storage = Storage(uri="s3://data/check", endpoint=s3.endpoint, path_style=True)
    refined(Bucket(storage), [quadruple(number) for number in range(10)])
    ends_well(image, storage, Check(trainings=(train_work(Path(MODEL)),)))
    return [
        "prepare: done",
        f"generate: {message}",
        "check: done",
        image.passes("python", "/scratch/compile_kernels.py"),
    ]


def try_train(image: Image, s3: SeaweedFS) -> list[str]:
    storage = Storage(uri="s3://data/train", endpoint=s3.endpoint, path_style=True)
    refined(Bucket(storage), [quadruple(number) for number in range(10)])
    message = asks_for_a_gpu(image, storage, train_work(Path(MODEL)), "train-cgd")
    return [f"train: {message}", image.passes("python", "/scratch/compile_kernels.py")]


def try_operator(image: Image, _: SeaweedFS) -> list[str]:
    log = image.scratch / "operator.log"
    crd, run = (yaml.safe_load(Path(path).read_text()) for path in ("crds/cgdruns.yaml", "examples/quickstart.yaml"))

    @contextmanager
    def operator() -> Iterator[None]:
        given = {"KUBECONFIG": "/scratch/kubeconfig", "CGD_PROGRESS_BIND": "127.0.0.1:0"}
        command = image.command("python", "-m", "cgd_operator", **given)
        with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
            try:
                yield
            finally:
                process.kill()

    try:
        return [asyncio.run(_first_job(image.scratch / "kubeconfig", crd, run, operator))]
    except AssertionError as error:
        raise Broken(f"{error}\n{log.read_text()}") from error


async def _first_job(
    kubeconfig: Path, crd: Object, run: Object, operator: Callable[[], AbstractContextManager[None]]
) -> str:
    """What the operator makes of the quick start on the local API server, which has no node."""
    api = ApiServer()
    await api.start()
    await asyncio.to_thread(kubeconfig.write_text, api.kubeconfig())
    async with await Cluster.connect(str(kubeconfig), manager="check") as client:
        for definition in (pytorchjobs.crd(), crd):
            await install(client, definition)
        await client.create(RUN, run | {"metadata": run["metadata"] | {"namespace": "default"}})
        with operator():
            job = await eventually(lambda: _job(client), "Job of the operator's")
    await api.stop()
    return f"operator: made the Job {job['metadata']['name']}"


async def _job(client: Cluster) -> Object | None:
    jobs, _ = await client.list(JOB, "default")
    return next(iter(jobs), None)


TRIES: dict[str, Callable[[Image, SeaweedFS], list[str]]] = {
    "operator": try_operator,
    "generate": try_generate,
    "train": try_train,
}


async def check(workshop: Workshop, names: list[str], console: Console) -> Table:
    table = Table("image", "build", "GB", "GB compressed", "largest packages, MB")
    async with SeaweedFS(workshop.folder / "s3", access_key="check", secret_key="check-secret", bucket="data") as s3:
        for name in names:
            image = await asyncio.to_thread(workshop.make, name)
            image.clean_scratch()
            image.passes("/scratch/uv", "pip", "check", "--python", "/opt/cgd/bin/python")
            console.print("every package has what it requires")
            console.print(image.passes("python", "/scratch/owners.py"))
            console.print(image.passes("python", "/scratch/imports.py", *IMPORTS[name]))
            for line in await asyncio.to_thread(TRIES[name], image, s3):
                console.print(line)
            largest = ", ".join(f"{package} {size}" for size, package in image.sizes())
            compressed = f"{workshop.compressed(name) / 1e9:.2f}" if os.environ.get("COMPRESSED") else ""
            table.add_row(name, f"{image.seconds:.0f} s", f"{megabytes(image.root) / 1000:.2f}", compressed, largest)
            workshop.forget(name)
    return table


def main() -> None:
    if os.geteuid() or not all(map(shutil.which, ("buildah", "debootstrap"))):
        raise SystemExit("root is needed, and: apt-get install buildah debootstrap")
    os.environ |= KEYS
    names = os.environ.get("IMAGES", "operator generate train").split()
    free = shutil.disk_usage(os.environ.get("FOLDER") or tempfile.gettempdir()).free / 1e9
    if "generate" in names and free < ROOM:
        raise SystemExit(f"{ROOM} GB of disk are needed, {free:.0f} are free: FOLDER names another place")
    workshop = Workshop(Path(tempfile.mkdtemp(prefix="cgd-images-", dir=os.environ.get("FOLDER") or None)))
    console = Console(soft_wrap=True, highlight=False)
    try:
        workshop.make_base()
        console.print(asyncio.run(check(workshop, names, console)))
    finally:
        workshop.remove()


if __name__ == "__main__":
    main()
