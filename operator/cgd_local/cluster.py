"""The local cluster: API server, controllers, garbage collector and one node, together.

    async with LocalCluster(folder, environment=venv_environment()) as cluster:
        print(cluster.kubeconfig_path)      # for the operator, kubectl and everybody else

Everything runs in this process except the containers, which end with it. The controllers and the node are ordinary
clients: with `kubeconfig` they work with another API server, which must have no controllers of its own.
"""

import asyncio
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sysconfig
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Self

from cgd_local import jobs, pytorchjobs, trainjobs
from cgd_local.apiserver import ApiServer, kubeconfig_of
from cgd_local.controllers import BACKOFF_SECONDS, Controller, condition, stop_task
from cgd_local.garbage import GarbageCollector
from cgd_local.node import Node
from cgd_local.nodes import PodCollector
from cgd_local.pods import exited, launch
from cgd_operator.kube.client import Cluster, Object
from cgd_operator.kube.kinds import CRD, JOB, NAMESPACE, PYTORCHJOB, AlreadyExists, ApiError

READY_SECONDS = 60.0


def venv_environment() -> dict[str, str]:
    """The environment of the project's image: this interpreter's programs first on the PATH, and UTF-8."""
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {"PATH": path, "LANG": "C.UTF-8"}


class LocalCluster:
    """A whole cluster in one folder.

    `environment` is the image environment of every container; `gpus` is the number of GPUs that the node claims;
    `backoff` is the wait in seconds before a failed pod or container runs again. `kubeconfig` names an API server to
    use instead of our own. It must have no controllers or nodes, as with `real_apiserver`: two would fight.
    """

    def __init__(
        self,
        folder: Path,
        *,
        environment: dict[str, str] | None = None,
        kubeconfig: Path | None = None,
        gpus: int = 0,
        backoff: float = BACKOFF_SECONDS,
    ) -> None:
        self.folder = folder
        self.kubeconfig_path = kubeconfig or folder / "kubeconfig"
        self.api: ApiServer | None = None if kubeconfig else ApiServer()
        self._environment = venv_environment() if environment is None else environment
        self._gpus, self._backoff = gpus, backoff
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """End the controllers first, so that they replace nothing; then every process; then the API."""
        await self._stack.aclose()

    async def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.api:
            await self.api.start()
            self._stack.push_async_callback(self.api.stop)
            self.kubeconfig_path.write_text(self.api.kubeconfig())
        self.client = await self._connect("cgd-local")
        for crd in (pytorchjobs.crd(), *trainjobs.crds()):
            await install(self.client, crd)
        kubelet, folder = await self._connect("kubelet"), self.folder / "pods"
        self.node = Node(kubelet, folder, environment=self._environment, gpus=self._gpus, backoff=self._backoff)
        self._stack.push_async_callback(self.node.stop)
        await self.node.start()
        client = await self._connect("job-controller")
        decide = partial(jobs.decide, backoff=self._backoff)
        self._run(Controller(client, JOB, decide, finalizer=jobs.TRACKED).run())
        client = await self._connect("pytorchjob-controller")
        self._run(Controller(client, PYTORCHJOB, pytorchjobs.decide, refusal="FailedCreatePod").run())
        self._run(trainjobs.TrainJobController(await self._connect("trainjob-controller")).run())
        self._run(PodCollector(await self._connect("pod-garbage-collector")).run())
        self._run(GarbageCollector(await self._connect("garbage-collector")).run())

    async def _connect(self, manager: str) -> Cluster:
        return await self._stack.enter_async_context(await Cluster.connect(str(self.kubeconfig_path), manager=manager))

    def _run(self, work: Coroutine[None, None, None]) -> None:
        self._stack.push_async_callback(stop_task, asyncio.create_task(work))


async def install(client: Cluster, crd: Object) -> None:
    """Create a CRD and wait until the server serves its kind."""
    with contextlib.suppress(AlreadyExists):
        await client.create(CRD, crd)
    async with asyncio.timeout(READY_SECONDS):
        while True:
            stored = await client.get(CRD, crd["metadata"]["name"])
            if stored and condition(stored.get("status", {}).get("conditions") or [], "Established"):
                return
            await asyncio.sleep(0.05)


@asynccontextmanager
async def real_apiserver(folder: Path, assets: Path) -> AsyncIterator[Path]:
    """etcd and kube-apiserver from a folder such as `$KUBEBUILDER_ASSETS`; yields the path of a kubeconfig.

    It uses loopback, TLS with a certificate that the server signs itself, one user with a random token and all rights,
    and no ServiceAccount admission (no controller manager makes the accounts). `audit.jsonl` in the folder logs every
    call. Tried with Kubernetes 1.20.2 and etcd 3.5, the newest that could be built here.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        store, peers, port = (listener.getsockname()[1] for listener in sockets)
    token, key = _prepare(folder)
    etcd = f"""
        --data-dir={folder}/etcd
        --listen-client-urls=http://127.0.0.1:{store}
        --advertise-client-urls=http://127.0.0.1:{store}
        --listen-peer-urls=http://127.0.0.1:{peers}"""
    server = f"""
        --etcd-servers=http://127.0.0.1:{store}
        --bind-address=127.0.0.1
        --secure-port={port}
        --cert-dir={folder}/certificates
        --token-auth-file={folder}/tokens.csv
        --authorization-mode=RBAC
        --service-account-issuer=https://127.0.0.1
        --service-account-key-file={key}
        --service-account-signing-key-file={key}
        --service-cluster-ip-range=10.0.0.0/24
        --audit-policy-file={folder}/audit.json
        --audit-log-path={folder}/audit.jsonl
        --audit-log-mode=blocking
        --disable-admission-plugins=ServiceAccount"""
    kubeconfig = folder / "kubeconfig"
    kubeconfig.touch(mode=0o600)
    served = {"server": f"https://127.0.0.1:{port}", "insecure-skip-tls-verify": True}
    kubeconfig.write_text(kubeconfig_of(served, {"token": token}))
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for program, flags in (("etcd", etcd), ("kube-apiserver", server)):
            command = [str(assets / program), *map(str.strip, flags.strip().splitlines())]
            processes.append(launch(command, {"HOME": str(folder)}, folder, folder / f"{program}.log"))
        await _await_namespace(kubeconfig, processes)
        yield kubeconfig
    finally:
        for process in reversed(processes):
            process.terminate()
            await exited(process)


def _prepare(folder: Path) -> tuple[str, Path]:
    """A token for the user, and a key to sign service account tokens with."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    token, key = secrets.token_hex(16), folder / "service-accounts.key"
    (folder / "tokens.csv").write_text(f'{token},admin,admin,"system:masters"\n')
    policy = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": [{"level": "Metadata"}]}
    (folder / "audit.json").write_text(json.dumps(policy))
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    return token, key


async def _await_namespace(kubeconfig: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait until the API server has created its first namespace."""
    async with asyncio.timeout(READY_SECONDS), await Cluster.connect(str(kubeconfig), manager="cgd-local") as client:
        while all(process.poll() is None for process in processes):
            with contextlib.suppress(ApiError):
                if await client.get(NAMESPACE, "default"):
                    return
            await asyncio.sleep(0.2)
    raise RuntimeError(f"etcd or kube-apiserver has ended: see the logs in {kubeconfig.parent}")
