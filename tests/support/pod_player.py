"""A pod of a run as its kubelet tells of it, for tests whose API server has no nodes."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from cgd_operator.kube.clock import Clock
from cgd_operator.kube.kinds import POD
from cgd_operator.planning.manifests import UID_LABEL
from support.builders import labels


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


async def make_pod(world: Any, run: dict[str, Any], *finalizers: str, **status: Any) -> None:
    """A pod of the stage answer on a node."""
    meta = {
        "name": "pod",
        "namespace": "default",
        "labels": labels("answer") | {UID_LABEL: run["metadata"]["uid"]},
        "finalizers": list(finalizers),
    }
    spec = {"nodeName": "gpu-7", "containers": [{"name": "stage", "image": "image"}]}
    await world.client.create(POD, {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec})
    await tell_pod(world, **status)


async def tell_pod(world: Any, **status: Any) -> None:
    """Write its status as its kubelet would."""
    container = {"name": "stage", "image": "image", "imageID": "", "ready": False, "restartCount": 0}
    status["containerStatuses"] = [{**container, "state": status.pop("state", {})}]
    await world.client.patch(POD, "pod", "default", {"status": status}, subresource="status")


def in_an_hour(_: Clock) -> datetime:
    """The API server's time in place of `Clock.now`, an hour later."""
    return datetime.now(UTC) + timedelta(hours=1)


def stopped(seconds: float, after: str) -> Callable[[Clock], datetime]:
    """A clock, in place of `Clock.now`, that stands so many seconds after a moment."""
    moment = datetime.fromisoformat(after) + timedelta(seconds=seconds)
    return lambda _: moment
