"""The operator process.

    python -m cgd_operator [--namespace NS ...] [--kubeconfig FILE]

Environment:
    CGD_GENERATE_IMAGE, CGD_TRAIN_IMAGE  images of the stage programs
    CGD_PROGRESS_BIND                    host:port that takes progress reports
    CGD_PROGRESS_URL                     how pods reach it; default: the bound address
    CGD_PROGRESS_KEY                     signs the progress tokens; default: a new one at every start, which costs the
                                         stages that run at that moment their display
    CGD_HEALTH_BIND                      host:port of /healthz, /readyz and /metrics; default: none of them
    CGD_LEASE                            namespace/name of a Lease; default: none, this is the only operator
"""

import argparse
import asyncio
import gc
import logging
import os
import secrets
import socket
import threading
import uuid

import kopf

from cgd_operator import handlers
from cgd_operator.cluster import RUN, ApiError, Cluster
from cgd_operator.health import Health
from cgd_operator.leader import LeaseLock, LeaseLost, lead
from cgd_operator.loop import Loop
from cgd_operator.manifests import MANAGER, Release
from cgd_operator.progress import Board, ProgressServer
from cgd_operator.reconcile import Reconciler

log = logging.getLogger("cgd_operator")


def main() -> None:
    options = _options()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(name)s %(message)s")
    logging.getLogger("kopf").setLevel(logging.WARNING)
    if options.kubeconfig:
        os.environ["KUBECONFIG"] = options.kubeconfig  # Kopf logs in by itself, from the same file
    # Pages of JSON make the collector walk over all that was imported, again and again: more work than reading them.
    gc.freeze()
    gc.set_threshold(50_000)
    try:
        asyncio.run(operate(tuple(options.namespace)))
    except ApiError as error:
        raise SystemExit(f"cgd-operator: {error}\n{_hint(error)}") from error
    except LeaseLost as error:
        raise SystemExit(f"cgd-operator: {error}") from error


def _options() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="cgd-operator", description=__doc__.partition("\n")[0])
    parser.add_argument("--namespace", "-n", action="append", default=[], help="watch this one only (repeatable)")
    parser.add_argument("--kubeconfig", help="default: the pod's service account, or $KUBECONFIG")
    return parser.parse_args()


def _hint(error: ApiError) -> str:
    if error.status == 404:
        return "The CGDRun definition is not installed: kubectl apply --server-side -f crds/"
    if error.status == 403:
        return "The operator's ServiceAccount may not do this: check its Role and RoleBinding."
    return "Check the API server's address and the operator's credentials."


async def operate(namespaces: tuple[str, ...] = (), stop: threading.Event | None = None) -> None:
    """Run the operator until it is told to stop (SIGTERM, SIGINT, or `stop`).

    Raises:
        ApiError: CGDRuns cannot be listed at the start.
        LeaseLost: another operator may act now.
    """
    health = Health()
    async with await Cluster.connect(manager=MANAGER) as cluster:
        if bind := os.environ.get("CGD_HEALTH_BIND"):
            await health.start(*_address(bind))
        try:
            await cluster.list(RUN, namespaces[0] if namespaces else None)
            if lease := os.environ.get("CGD_LEASE"):
                namespace, _, name = lease.partition("/")
                identity = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
                lock = LeaseLock(cluster, namespace, name, identity)
                await lead(lock, lambda: _act(cluster, health, namespaces, stop), stop)
            else:
                await _act(cluster, health, namespaces, stop)
        finally:
            await health.stop()


async def _act(cluster: Cluster, health: Health, namespaces: tuple[str, ...], stop: threading.Event | None) -> None:
    key = os.environ.get("CGD_PROGRESS_KEY", "").encode() or secrets.token_bytes(32)
    board = Board()
    reconciler = Reconciler(cluster, _release(""), board, key)
    loop = Loop(reconciler, namespaces, health)
    server = ProgressServer(board, key, loop.later)
    host, port = _address(os.environ.get("CGD_PROGRESS_BIND", "0.0.0.0:8080"))
    await server.start(host, port)
    reconciler.release = _release(os.environ.get("CGD_PROGRESS_URL") or f"http://{host}:{server.port}")
    health.lead()
    loop.start()
    try:
        await _kopf(loop, stop)
    finally:
        await loop.stop()
        await server.stop()


def _address(bind: str) -> tuple[str, int]:
    host, _, port = bind.rpartition(":")
    return host, int(port)


async def _kopf(loop: Loop, stop: threading.Event | None) -> None:
    assert handlers.configure  # importing the module registers the handlers
    await kopf.operator(
        memo=kopf.Memo(loop=loop),
        namespaces=loop.namespaces,
        clusterwide=not loop.namespaces,
        standalone=True,
        stop_flag=stop,
    )


def _release(progress_url: str) -> Release:
    return Release(
        generate_image=os.environ.get("CGD_GENERATE_IMAGE", "cgd-generate:latest"),
        train_image=os.environ.get("CGD_TRAIN_IMAGE", "cgd-train:latest"),
        progress_url=progress_url,
    )


if __name__ == "__main__":
    main()
