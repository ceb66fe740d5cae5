"""`cgd logs -f`: the lines of a run's pods as they are written, until its stages have ended."""

import asyncio
from collections.abc import AsyncIterator

from cgd_cli.remote import Remote, container_of
from cgd_operator.kube.client import Object
from cgd_operator.kube.kinds import ApiError

LOOK_SECONDS = 1.0
"""Between two looks for new pods."""
ENDED = ("Succeeded", "Failed")
Lines = asyncio.Queue[tuple[str, str] | None]
"""Pod and line; None: there are no more."""


async def follow(remote: Remote, name: str, stage: str) -> AsyncIterator[tuple[str, str]]:
    """Pod and line, for each line of the pods of a stage or, without one, of all pods that have not ended yet or come
    later. Ends with the stage or the run, when every line is told. Raises ApiError, UserError."""
    lines = Lines()
    work = asyncio.create_task(_find(remote, name, stage, lines))
    try:
        while (line := await lines.get()) is not None:
            yield line
        await work
    finally:
        work.cancel()


async def _find(remote: Remote, name: str, stage: str, lines: Lines) -> None:
    """Read every pod that there is or comes, each in a task of its own."""
    readers: dict[str, asyncio.Task[None]] = {}
    past: set[str] | None = None
    try:
        while True:
            run = await remote.run(name)
            is_over = _is_over(run, stage)
            pods = {pod["metadata"]["uid"]: pod for pod in await remote.pods(run, stage) if _phase(pod) != "Pending"}
            if past is None:  # `cgd logs` shows what has ended before
                past = set() if stage else {uid for uid, pod in pods.items() if _phase(pod) in ENDED}
            for uid in pods.keys() - readers.keys() - past:
                readers[uid] = asyncio.create_task(_read(remote, pods[uid], lines))
            if is_over or any(reader.done() and reader.exception() for reader in readers.values()):
                await asyncio.gather(*readers.values())
                return
            await asyncio.sleep(LOOK_SECONDS)
    finally:
        for reader in readers.values():
            reader.cancel()
        lines.put_nowait(None)


def _phase(pod: Object) -> str:
    return str(pod.get("status", {}).get("phase", "Pending"))


def _is_over(run: Object, stage: str) -> bool:
    status = run.get("status", {})
    states = {entry["name"]: entry.get("state") for entry in status.get("stages", [])}
    return status.get("state") in (*ENDED, "Refused") or states.get(stage) in ENDED


async def _read(remote: Remote, pod: Object, lines: Lines) -> None:
    name = pod["metadata"]["name"]
    try:
        async for line in remote.cluster.follow_log(name, remote.namespace, container=container_of(pod)):
            lines.put_nowait((name, line))
    except ApiError as error:
        if error.status != 404:  # the pod is deleted, with its log
            raise
