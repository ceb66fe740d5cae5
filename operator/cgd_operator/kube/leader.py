"""A Lease makes sure that a single operator acts at a time. The Kubernetes client runs the election, over our
connection.

The client's own `LeaseLock` is not used: it cannot create a Lease, errors of aiohttp pass through it and end the
election while the leader acts on (findings/lease-election-of-the-asyncio-client.sh), and it releases nothing. Its
memory, 2 MB, is no reason.
"""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord

from cgd_operator.kube.client import Cluster, Object
from cgd_operator.kube.kinds import LEASE, ApiError

log = logging.getLogger(__name__)

DURATION, RENEW_WITHIN, RETRY, ANSWER = 15, 10, 2, 2
"""Seconds: a Lease that nobody renewed for so long is free; when a leader gives up; between two tries; for a read or a
write of the Lease. A last try that hangs must be over before the Lease is free: the election does not check that."""
ADDRESS = "cgd.dev/progress-server"
"""Annotation of the Lease: the address where its holder accepts progress reports."""


class LeaseLost(Exception):
    """The Lease is lost: another operator may act, so this one must stop."""


class LeaseLock:
    """The Lease as the election reads and writes it. The resource version refuses a write after somebody else's write.

    `address` is this operator's, and is written with the Lease while it holds the Lease; `leader` is the address of the
    holder at the last read, "" without a holder.
    """

    def __init__(self, cluster: Cluster, namespace: str, name: str, identity: str) -> None:
        self.namespace, self.name, self.identity = namespace, name, identity
        self.address, self.leader = "", ""
        self._cluster = cluster
        self._version = ""

    async def get(self, name: str, namespace: str) -> tuple[bool, LeaderElectionRecord | Exception]:
        try:
            async with asyncio.timeout(ANSWER):
                lease = await self._cluster.get(LEASE, name, namespace)
        except ApiError as error:
            return False, error
        except TimeoutError:  # the election reads a reason
            return False, ApiError(0, "Unreachable", f"no answer within {ANSWER} s")
        if lease is None:
            absent = ApiException(status=404, reason="NotFound")  # after this error the election creates the Lease
            absent.body = '{"code": 404}'
            return False, absent
        meta, spec = lease["metadata"], lease.get("spec", {})
        self._version = meta["resourceVersion"]
        self.leader = meta.get("annotations", {}).get(ADDRESS, "") if spec.get("holderIdentity") else ""
        duration = spec.get("leaseDurationSeconds")
        return True, LeaderElectionRecord(
            spec.get("holderIdentity") or None,
            duration and str(duration),
            spec.get("acquireTime"),
            spec.get("renewTime"),
        )

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        meta = {"name": name, "namespace": namespace, "annotations": {ADDRESS: self.address}}
        body = {"apiVersion": LEASE.api_version, "kind": LEASE.kind, "metadata": meta, "spec": _spec(election_record)}
        return await self._written(self._cluster.create(LEASE, body))

    async def update(self, name: str, namespace: str, updated_record: LeaderElectionRecord) -> bool:
        return await self._patch(name, namespace, _spec(updated_record))

    async def release(self) -> None:
        """Release the Lease if we hold it, so that the next operator can act at once instead of after `DURATION`."""
        _, record = await self.get(self.name, self.namespace)
        if isinstance(record, LeaderElectionRecord) and record.holder_identity == self.identity:
            await self._patch(self.name, self.namespace, {"holderIdentity": None})

    async def _patch(self, name: str, namespace: str, spec: Object) -> bool:
        meta = {"resourceVersion": self._version, "annotations": {ADDRESS: self.address}}
        return await self._written(self._cluster.patch(LEASE, name, namespace, {"metadata": meta, "spec": spec}))

    async def _written(self, write: Awaitable[Object | None]) -> bool:
        """Whether the API server took a write of the Lease in time."""
        try:
            async with asyncio.timeout(ANSWER):
                written = await write
        except (ApiError, TimeoutError) as error:
            log.info("the Lease %s/%s was not written: %s", self.namespace, self.name, error or "no answer")
            return False
        if written is not None:
            self._version = written["metadata"]["resourceVersion"]
        return written is not None


def _spec(record: LeaderElectionRecord) -> Object:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    acquired = str(record.acquire_time)
    return {
        "holderIdentity": record.holder_identity,
        "leaseDurationSeconds": DURATION,
        # The election writes its own time format for a new leader, and gives our format back for a renewal.
        "acquireTime": acquired if acquired.endswith("Z") else now,
        "renewTime": now,
    }


async def lead(lock: LeaseLock, work: Callable[[], Awaitable[None]], stop: threading.Event | None = None) -> None:
    """Wait for the Lease, then run `work` while it is held. The Lease is released at the end, also after a
    cancellation.

    Raises:
        LeaseLost: the Lease could not be renewed; `work` was cancelled.
    """
    election = LeaderElection(Config(lock, DURATION, RENEW_WITHIN, RETRY, work, None))
    log.info("%s waits for the Lease %s/%s", lock.identity, lock.namespace, lock.name)
    try:
        if not await _acquired(election, stop):
            return
        log.info("%s leads", lock.identity)
        renewing, working = asyncio.create_task(election.renew_loop()), asyncio.ensure_future(work())
        try:
            await asyncio.wait({renewing, working}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise LeaseLost(f"the Lease {lock.namespace}/{lock.name} was not renewed within {RENEW_WITHIN} s")
            working.result()
        finally:
            for task in (renewing, working):
                task.cancel()
            await asyncio.gather(renewing, working, return_exceptions=True)
    finally:
        await lock.release()


async def _acquired(election: LeaderElection, stop: threading.Event | None) -> bool:
    """Whether the Lease was acquired before `stop` was set. A try that is under way always runs to its end: whether it
    wrote the Lease must be known, to release it."""
    while stop is None or not stop.is_set():
        attempt = asyncio.create_task(election.try_acquire_or_renew())
        try:
            if await asyncio.shield(attempt):
                return True
        except asyncio.CancelledError:
            await asyncio.wait({attempt}, timeout=1)
            raise
        for _ in range(10):
            if stop is None or not stop.is_set():
                await asyncio.sleep(RETRY / 10)
    return False
