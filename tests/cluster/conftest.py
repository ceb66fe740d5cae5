"""An API server with the project's definitions, the operator against it, and somebody who plays the controllers.

Each test runs against the embedded API server, and against a real one from `$KUBEBUILDER_ASSETS` if that is set.
"""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support.builders import ENDS, definition, manifest
from support.patience import PATIENCE

from cgd_local import pytorchjobs, trainjobs
from cgd_local.apiserver import ApiServer
from cgd_local.cluster import install, real_apiserver
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import EVENT, RUN, ApiError, Kind
from cgd_operator.planning.manifests import KINDS, STAGE_LABEL
from cgd_operator.process import operate

Json = dict[str, Any]

ASSETS = os.environ.get("KUBEBUILDER_ASSETS", "")


async def until(true: Callable[[], Awaitable[Any]]) -> Any:
    """Ask again until the answer is true; returns it."""
    deadline = time.monotonic() + PATIENCE
    while not (answer := await true()):
        assert time.monotonic() < deadline, "it never became true"
        await asyncio.sleep(0.02)
    return answer


class World:
    """A cluster without controllers: `play` does what they would do."""

    def __init__(self, client: Cluster, kubeconfig: Path, embedded: ApiServer | None) -> None:
        self.client, self.kubeconfig, self._embedded = client, kubeconfig, embedded
        self.until = until

    @property
    def is_embedded(self) -> bool:
        return self._embedded is not None

    @property
    def embedded(self) -> ApiServer:
        """The embedded server with its faults and its list of requests: for tests with `embedded_only`."""
        assert self._embedded is not None
        return self._embedded

    async def apply(
        self, changes: Json | None = None, name: str = "demo", labels: dict[str, str] | None = None
    ) -> Json:
        body = manifest(changes, name=name)
        body["metadata"]["labels"] = labels or {}
        del body["metadata"]["uid"], body["metadata"]["generation"]
        return await self.client.create(RUN, body)

    async def get(self, name: str = "demo") -> Json:
        run = await self.client.get(RUN, name, "default")
        assert run is not None
        return run

    async def state(self, name: str = "demo") -> str:
        return str((await self.get(name)).get("status", {}).get("state"))

    async def events(self, name: str = "demo") -> list[Json]:
        """Of a run; a real server posts some of its own."""
        about = f"involvedObject.kind={RUN.kind},involvedObject.name={name}"
        return (await self.client.list(EVENT, "default", fields=about))[0]

    async def children(self) -> dict[str, Json]:
        found: dict[str, Json] = {}
        for kind in KINDS.values():
            for child in await self._list(kind):
                stage = child["metadata"]["labels"][STAGE_LABEL]
                assert stage not in found, f"{stage} has two children"
                found[stage] = child
        return found

    async def _list(self, kind: Kind) -> list[Json]:
        try:
            return (await self.client.list(kind, "default"))[0]
        except ApiError as error:
            if error.status != 404:  # the kind is not served
                raise
            return []

    async def end(self, stage: str, condition: str = "Complete") -> None:
        """Let a child end as its controller would."""
        child = await until(lambda: self._child(stage))
        kind, status = KINDS[child["kind"]], ENDS[child["kind"]](condition)
        await self.client.patch(kind, child["metadata"]["name"], "default", {"status": status}, subresource="status")

    async def _child(self, stage: str) -> Json | None:
        return (await self.children()).get(stage)

    async def play(self, *stages: str) -> None:
        for stage in stages:
            await self.end(stage)

    @asynccontextmanager
    async def operator(self, namespaces: tuple[str, ...] = ()) -> AsyncIterator[None]:
        """The operator, in a thread with a loop of its own: it ends by waiting for every task of its loop."""
        stop, since = threading.Event(), len(self._requests())
        thread = asyncio.create_task(asyncio.to_thread(lambda: asyncio.run(self._operate(namespaces, stop))))

        async def under_way() -> bool:
            """Whether Kopf watches. If it is stopped while it still connects, it leaves open connections behind."""
            watches = (path for _, path in self._requests()[since:] if "/cgdruns?" in path and "watch=true" in path)
            return thread.done() or not self.is_embedded or any(watches)

        try:
            yield
            await until(under_way)
        finally:
            stop.set()
            await thread

    def _requests(self) -> list[tuple[str, str]]:
        return list(self._embedded.requests) if self._embedded else []

    async def _operate(self, namespaces: tuple[str, ...], stop: threading.Event) -> None:
        await operate(namespaces, stop)
        if not self.is_embedded:
            await asyncio.sleep(0.5)  # Kopf leaves its connections before TLS has said goodbye


@asynccontextmanager
async def embedded_apiserver(folder: Path) -> AsyncIterator[tuple[Path, ApiServer | None]]:
    api = ApiServer()
    await api.start()
    path = folder / "kubeconfig"
    path.write_text(api.kubeconfig())
    yield path, api
    await api.stop()


@asynccontextmanager
async def real_one(folder: Path) -> AsyncIterator[tuple[Path, ApiServer | None]]:
    async with real_apiserver(folder / "apiserver", Path(ASSETS)) as path:
        yield path, None


SERVERS: dict[str, Callable[[Path], AbstractAsyncContextManager[tuple[Path, ApiServer | None]]]] = {
    "embedded": embedded_apiserver,
    "real": real_one,
}


@pytest.fixture(params=SERVERS if ASSETS else ["embedded"])
async def world(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    async with SERVERS[request.param](tmp_path) as (path, embedded):
        monkeypatch.setenv("KUBECONFIG", str(path))
        monkeypatch.setenv("CGD_PROGRESS_BIND", "127.0.0.1:0")
        monkeypatch.setattr("cgd_operator.controller.reconciler.SETTLE_SECONDS", 0.1)
        monkeypatch.setattr("cgd_operator.controller.children.ABSENT_SECONDS", 0.1)
        for bound in ("OPENING_SECONDS", "READING_SECONDS"):  # on a busy machine nothing is done because of these
            monkeypatch.setattr(f"cgd_operator.controller.queue.{bound}", PATIENCE)
        async with await Cluster.connect(str(path), manager="test") as client:
            await install(client, definition())
            for other in (pytorchjobs.crd(), *trainjobs.crds()):
                await install(client, other)
            yield World(client, path, embedded)
