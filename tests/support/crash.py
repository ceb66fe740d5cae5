"""The operator dies or is refused at one call of a run, for every call: `make chaos-operator`, some in tests/cluster.

    PYTHONPATH=tests python -m support.crash

A whole run with children that end as their controllers would end them. At call n the operator is killed after the
server has acted, or the answer is lost, or the call fails; what goes on has nothing but what is in the cluster. Every
run must end as the undisturbed one does: succeeded, no child created twice, and no stage that goes backwards.
"""

import argparse
import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import track
from rich.table import Table

from cgd_local import pytorchjobs
from cgd_local.apiserver import ApiServer
from cgd_local.cluster import install
from cgd_operator.api.crd import crd
from cgd_operator.controller.reconciler import Reconciler
from cgd_operator.facts.progress import Board
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import JOB, PYTORCHJOB, RUN, ApiError, Kind
from cgd_operator.planning.manifests import STAGE_LABEL
from support.builders import ENDS, RELEASE, manifest

Json = dict[str, Any]

ORDER = ("Pending", "Waiting", "Running", "Succeeded")
ROUNDS = 60
KINDS: dict[str, tuple[int, str]] = {
    "unreachable": (0, "Unreachable"),
    "conflict": (409, "Conflict"),
    "too many requests": (429, "TooManyRequests"),
    "server error": (500, "InternalError"),
}
"""Calls that fail before the server has acted: code and reason."""
DISTURBANCES = ("killed", "answer lost", *KINDS)


class Killed(BaseException):
    """The operator is gone; no handler of it may see this."""


@dataclass
class Disturbance:
    kind: str = ""
    at: int = -1
    """The call that is disturbed, counted from 0; -1: none."""


@dataclass
class History:
    """What the server was told during a run, whoever told it."""

    calls: int = 0
    created: list[str] = field(default_factory=list)
    """The stages of children."""
    statuses: list[Json] = field(default_factory=list)

    def faults(self) -> list[str]:
        """What must not have happened."""
        twice = {stage for stage in self.created if self.created.count(stage) > 1}
        found = [f"{stage} has two children" for stage in sorted(twice)]
        reached: dict[str, int] = {}
        generation = 0
        for status in self.statuses:
            for stage in status["stages"]:
                if stage["state"] not in ORDER:
                    found.append(f"{stage['name']} is {stage['state']}")
                    continue
                rank = ORDER.index(stage["state"])
                if rank < reached.get(stage["name"], 0):
                    found.append(f"{stage['name']} went back to {stage['state']}")
                reached[stage["name"]] = rank
            if status["observedGeneration"] < generation:
                found.append("observedGeneration fell")
            generation = status["observedGeneration"]
        return found


class Disturbed(Cluster):
    """A connection that writes down what is done through it, and breaks once."""

    history: History
    disturbance: Disturbance

    @classmethod
    async def through(cls, kubeconfig: str, history: History, disturbance: Disturbance) -> Self:
        made = await cls.connect(kubeconfig, manager="cgd-operator")
        made.history, made.disturbance = history, disturbance
        return made

    async def _call(self, method: str, path: str, body: Json | None = None, **options: Any) -> Json | None:
        here = self.history.calls == self.disturbance.at
        self.history.calls += 1
        if here and self.disturbance.kind in KINDS:
            raise ApiError(*KINDS[self.disturbance.kind], "as the test wants it")
        answer = await super()._call(method, path, body, **options)
        if method == "POST" and body and body["kind"] not in ("Event", "Secret") and "dryRun" not in path:
            self.history.created.append(body["metadata"]["labels"][STAGE_LABEL])
        if path.partition("?")[0].endswith("/status") and body:
            self.history.statuses.append(body["status"])
        if here and self.disturbance.kind == "killed":
            raise Killed
        if here:
            raise ApiError(0, "Unreachable", "the answer was lost")
        return answer


async def whole_run(kubeconfig: str, disturbance: Disturbance) -> tuple[History, Json]:
    """A run from its creation to its end, and its last status. Leaves the cluster as it was."""
    history = History()
    async with await Cluster.connect(kubeconfig, manager="test") as client:
        body = manifest()
        del body["metadata"]["uid"], body["metadata"]["generation"]
        await client.create(RUN, body)
        reconciler = await _operator(kubeconfig, history, disturbance)
        try:
            for _ in range(ROUNDS):
                try:
                    await reconciler.reconcile("default", "demo")
                except Killed:
                    await reconciler.cluster.close()
                    reconciler = await _operator(kubeconfig, history, disturbance)
                    continue
                except ApiError:
                    continue
                run = await client.get(RUN, "demo", "default") or {}
                if run["status"]["state"] in ("Succeeded", "Failed", "Refused"):
                    return history, run["status"]
                await _end_one(client)
            raise AssertionError(f"no end after {ROUNDS} rounds: {run['status']}")
        finally:
            await reconciler.cluster.close()
            await _remove_all(client)


async def _operator(kubeconfig: str, history: History, disturbance: Disturbance) -> Reconciler:
    """A new process, as far as memory goes."""
    return Reconciler(await Disturbed.through(kubeconfig, history, disturbance), RELEASE, Board(), b"key")


async def _children(client: Cluster) -> AsyncIterator[tuple[Kind, Json]]:
    for kind in (JOB, PYTORCHJOB):
        for child in (await client.list(kind, "default"))[0]:
            yield kind, child


async def _end_one(client: Cluster) -> None:
    """The first child that has not ended ends well."""
    async for kind, child in _children(client):
        if not child.get("status", {}).get("conditions"):
            status = ENDS[kind.kind]("Complete")
            await client.patch(kind, child["metadata"]["name"], "default", {"status": status}, subresource="status")
            return


async def _remove_all(client: Cluster) -> None:
    await client.delete(RUN, "demo", "default")
    async for kind, child in _children(client):
        await client.delete(kind, child["metadata"]["name"], "default")


def outline(status: Json) -> Json:
    """What two runs must have in common: no times, and no names of children, which derive from the run's uid."""
    stages = [(stage["name"], stage["state"], stage["attempts"]) for stage in status["stages"]]
    conditions = sorted((one["type"], one["status"], one["reason"]) for one in status["conditions"])
    return {"state": status["state"], "stages": stages, "conditions": conditions}


async def disturbed(kubeconfig: str, disturbance: Disturbance, wanted: Json) -> list[str]:
    """What is wrong with a run that is disturbed once."""
    try:
        history, status = await whole_run(kubeconfig, disturbance)
    except AssertionError as error:
        return [str(error)]
    return history.faults() + ([] if outline(status) == wanted else [f"it ended otherwise: {outline(status)}"])


async def undisturbed(kubeconfig: str) -> tuple[int, Json]:
    """Calls of a run, and how it ends."""
    async with await Cluster.connect(kubeconfig, manager="test") as client:
        for definition in (crd(), pytorchjobs.crd()):
            await install(client, definition)
    history, status = await whole_run(kubeconfig, Disturbance())
    assert history.faults() == []
    return history.calls, outline(status)


@asynccontextmanager
async def apiserver() -> AsyncIterator[str]:
    """The embedded API server; the path of its kubeconfig."""
    api = ApiServer()
    await api.start()
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "kubeconfig").write_text(api.kubeconfig())
        yield str(path)
    await api.stop()


async def main(every: int) -> int:
    console, table = Console(highlight=False), Table("disturbance", "runs", "ended otherwise")
    wrong: list[str] = []
    async with apiserver() as kubeconfig:
        calls, wanted = await undisturbed(kubeconfig)
        console.print(f"a run of {len(wanted['stages'])} stages is {calls} calls; state {wanted['state']}")
        for kind in DISTURBANCES:
            places = range(0, calls, every)
            found = []
            for at in track(places, description=kind, transient=True):
                found += [
                    f"{kind} at {at}: {one}" for one in await disturbed(kubeconfig, Disturbance(kind, at), wanted)
                ]
            table.add_row(kind, str(len(places)), str(len(found)))
            wrong += found
    console.print(table)
    for one in wrong[:20]:
        console.print(one, markup=False)
    return len(wrong)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="disturb every so manieth call only")
    raise SystemExit(min(1, asyncio.run(main(parser.parse_args().every))))
