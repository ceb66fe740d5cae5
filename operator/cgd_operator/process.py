"""The operator process.

    python -m cgd_operator [--namespace NS ...] [--kubeconfig FILE]

Environment:
    CGD_GENERATE_IMAGE, CGD_TRAIN_IMAGE  images of the stage programs
    CGD_PROGRESS_BIND                    host:port that takes progress reports
    CGD_PROGRESS_URL                     how pods reach it; default: the bound address
    CGD_PROGRESS_KEY                     signs the progress tokens, at least 32 bytes; default: a new key
    CGD_PROGRESS_KEY_SECRET              namespace/name of a Secret that stores a new key, as `key`: later pods of the
                                         operator get it as CGD_PROGRESS_KEY; default: nothing stores it, and after a
                                         restart the progress of running stages is refused
    CGD_HEALTH_BIND                      host:port of /healthz, /readyz, /leaderz and /metrics; default: none of them
    CGD_REHEARSE_PODS                    false: the operator may not create pods, so it tries no pod as a dry run
    CGD_SCRATCH_SIZE_LIMIT               of a stage pod's /scratch and /tmp each, such as 2Ti; default: none
    CGD_STALLED_AFTER_SECONDS            how long a person has to fix something before a run is Stalled; default:
                                         `status.render.STALLED_AFTER`
    CGD_LOG_FORMAT                       json: an object for each record; default: lines of text
    CGD_LEASE                            namespace/name of a Lease; default: none, this is the only operator
    CGD_WEBHOOK_URL                      takes a CloudEvent when a run ends; default: nobody is told
    CGD_WEBHOOK_AUTHORIZATION            the header Authorization of such requests; default: none
    CGD_POD_IP                           where other operators reach this operator; default: the bound address
"""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import secrets
import signal
import socket
import threading
import uuid
from datetime import timedelta

import kopf
from kubernetes.aio.config.config_exception import ConfigException

from cgd_operator import handlers
from cgd_operator.controller.queue import Loop
from cgd_operator.controller.reconciler import Reconciler
from cgd_operator.facts.progress import Board
from cgd_operator.http.health import Health
from cgd_operator.http.progress import Desk, ProgressServer
from cgd_operator.http.webhook import Webhook
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import RUN, SECRET, AlreadyExists, ApiError
from cgd_operator.kube.leader import LeaseLock, LeaseLost, lead
from cgd_operator.planning.manifests import MANAGED_BY, MANAGER, Release
from cgd_operator.status.render import STALLED_AFTER
from cgd_stages.text.printable import printable, start_log

log = logging.getLogger("cgd_operator")

KEY_BYTES = 32


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="cgd-operator", description=__doc__.partition("\n")[0])
    parser.add_argument("--namespace", "-n", action="append", default=[], help="watch only this namespace (repeatable)")
    parser.add_argument("--kubeconfig", help="default: the pod's service account, or $KUBECONFIG")
    options = parser.parse_args()
    start_log("%(asctime)s %(levelname)-7s %(name)s %(message)s", json=os.environ.get("CGD_LOG_FORMAT") == "json")
    logging.getLogger("kopf").setLevel(logging.WARNING)
    if options.kubeconfig:
        os.environ["KUBECONFIG"] = options.kubeconfig  # Kopf logs in by itself, from the same file
    # Pages of JSON make the collector walk over all that was imported, again and again: more work than reading them.
    gc.freeze()
    gc.set_threshold(50_000)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(_until_signalled(tuple(options.namespace)))
    except ApiError as error:
        hints = {
            403: "The operator's ServiceAccount may not do this: check its Role and RoleBinding.",
            404: "The CGDRun definition is not installed: kubectl apply --server-side -f crds/",
        }
        hint = hints.get(error.status, "Check the API server's address and the operator's credentials.")
        raise SystemExit(f"cgd-operator: {printable(str(error))}\n{hint}") from error
    except (ConfigException, LeaseLost) as error:
        raise SystemExit(f"cgd-operator: {printable(str(error))}") from error


async def _until_signalled(namespaces: tuple[str, ...]) -> None:
    """Operate. A signal ends whatever is under way, until Kopf handles the signals."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    await operate(namespaces)


async def operate(namespaces: tuple[str, ...] = (), stop: threading.Event | None = None) -> None:
    """Run the operator until it is stopped: by SIGTERM or SIGINT once it acts, by cancellation before, by `stop`.

    Raises:
        ApiError: CGDRuns cannot be listed at the start.
        LeaseLost: another operator may act now.
    """
    key = _key()
    async with contextlib.AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(await Cluster.connect(manager=MANAGER))
        lock: LeaseLock | None = None
        if lease := os.environ.get("CGD_LEASE"):
            namespace, _, name = lease.partition("/")
            lock = LeaseLock(cluster, namespace, name, f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}")
        server = ProgressServer(leader=lambda: lock.leader if lock else "")
        health = Health(leader_answers=server.leader_answers)
        if bind := os.environ.get("CGD_HEALTH_BIND"):
            stack.push_async_callback(health.stop)
            await health.start(*_address(bind))
        stack.push_async_callback(server.stop)
        await server.start(*_address(os.environ.get("CGD_PROGRESS_BIND", "0.0.0.0:8080")))
        await cluster.version(RUN, namespaces[0] if namespaces else None)
        key = key or await _new_key(cluster)
        health.could_lead()
        if lock:
            host = os.environ.get("CGD_POD_IP") or server.host  # where other operators reach the progress server
            lock.address = f"[{host}]:{server.port}" if ":" in host else f"{host}:{server.port}"
            await lead(lock, lambda: _act(cluster, health, server, key, namespaces, stop), stop)
        else:
            await _act(cluster, health, server, key, namespaces, stop)


def _address(bind: str) -> tuple[str, int]:
    host, _, port = bind.rpartition(":")
    return host, int(port)


def _key() -> bytes:
    """The key that signs the progress tokens; empty: the operator makes one. It cannot be short: whoever has a token
    can try keys until one of them gives that token."""
    key = os.fsencode(os.environ.get("CGD_PROGRESS_KEY", ""))
    if 0 < len(key) < KEY_BYTES:
        why = (
            f"CGD_PROGRESS_KEY has {len(key)} bytes, and needs {KEY_BYTES}: make one with `openssl rand -hex 32` "
            "(the chart reads it from the Secret in progress.keySecretName), or leave it out for a new key"
        )
        raise SystemExit(f"cgd-operator: {printable(why)}")
    return key


async def _new_key(cluster: Cluster) -> bytes:
    """A key that this process makes. The operator may create Secrets but not read them: other pods get the key from
    their environment, so a pod that started before the Secret existed must be started again."""
    key = secrets.token_hex(KEY_BYTES)
    if not (secret := os.environ.get("CGD_PROGRESS_KEY_SECRET")):
        return key.encode()
    namespace, _, name = secret.partition("/")
    meta = {"namespace": namespace, "name": name, "labels": {MANAGED_BY: MANAGER}}
    body = {"apiVersion": SECRET.api_version, "kind": SECRET.kind, "metadata": meta, "immutable": True}
    try:
        await cluster.create(SECRET, body | {"stringData": {"key": key}})
    except AlreadyExists as error:
        raise SystemExit(
            f"cgd-operator: the Secret {printable(secret)} exists, but this process was started without its key, and "
            "must be started again. If that does not help, the Secret has no field `key`: delete the Secret"
        ) from error
    except ApiError as error:
        if error.status not in (400, 403, 404, 422):
            raise
        log.warning("the key of the progress tokens ends with this process, for no Secret keeps it: %s", error)
    return key.encode()


async def _act(
    cluster: Cluster,
    health: Health,
    server: ProgressServer,
    key: bytes,
    namespaces: tuple[str, ...],
    stop: threading.Event | None,
) -> None:
    board = Board()
    url = os.environ.get("CGD_PROGRESS_URL") or f"http://{server.host}:{server.port}"
    patience = timedelta(seconds=float(os.environ.get("CGD_STALLED_AFTER_SECONDS", STALLED_AFTER.total_seconds())))
    rehearse = os.environ.get("CGD_REHEARSE_PODS") != "false"
    reconciler = Reconciler(
        cluster,
        _release(url),
        board,
        key,
        rehearse_pods=rehearse,
        stalled_after=patience,
        webhook=Webhook.of_environment(),
    )
    loop = Loop(reconciler, namespaces, health)
    server.lead(Desk(board, key, loop.later))
    health.lead()
    loop.start()
    assert handlers.configure  # importing the module registers the handlers
    try:
        await loop.caught_up()  # Kopf begins with all runs at once, and the next children would wait
        await kopf.operator(
            memo=kopf.Memo(loop=loop),
            namespaces=namespaces,
            clusterwide=not namespaces,
            standalone=True,
            stop_flag=stop,
        )
    finally:
        await loop.stop()


def _release(progress_url: str) -> Release:
    return Release(
        generate_image=os.environ.get("CGD_GENERATE_IMAGE", "cgd-generate:latest"),
        train_image=os.environ.get("CGD_TRAIN_IMAGE", "cgd-train:latest"),
        progress_url=progress_url,
        scratch_size_limit=os.environ.get("CGD_SCRATCH_SIZE_LIMIT", ""),
    )
