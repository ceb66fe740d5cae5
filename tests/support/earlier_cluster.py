"""A cluster in which an earlier build's operator was at work, for the test that a later build's takes over its runs.

    PYTHONPATH=operator:images:tests python -m support.earlier_cluster

writes `earlier_cluster.zip`: all objects of an API server as its operator has left them, definitions too, by the full
name of their kind. The zip in this folder was written with the code of commit fb199f7. It is not written anew when the
code changes: that a later build goes on from there is what the test is about.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cgd_local import pytorchjobs, trainjobs
from cgd_local.apiserver import ApiServer
from cgd_local.cluster import install
from cgd_local.kinds import custom_resource
from cgd_operator.api.crd import crd
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import POD, RUN
from cgd_operator.planning.manifests import KINDS, STAGE_LABEL, UID_LABEL
from support.builders import ENDS, manifest

Json = dict[str, Any]

ZIP = Path(__file__).with_suffix(".zip")
FILE = "objects.json"
PATIENCE = 120.0
SETTLED_SECONDS = 15.0
"""The operator has written what it knows."""
STAGES = {"teacher": ("critique", "refine"), "misteacher": ("miscritique", "misrefine")}
"""Of children with more than one; another's stage has its name."""
BEGUN = ("prepare", "answer", "teacher", "check")
TRAINED = (*BEGUN, "train-cgd", "evaluate-base", "evaluate-cgd")
EVERY = ["CGD", "CFT", "DistilledSFT", "SFT", "RefinedSFT"]
MISTAUGHT = {
    "name": "cgd-mis",
    "kind": "CGD",
    "critique": {"kind": "miscritique", "rate": "0.5", "target": "refined"},
}
ALONE = {"teacher.fused": False, "student.shards": 3}


@dataclass(frozen=True)
class Life:
    """A run, and how far it is when the operator goes."""

    spec: Json = field(default_factory=dict)
    ended: tuple[str, ...] = ()
    """Children that have succeeded."""
    failed: str = ""
    """The child that has failed, after those."""
    under_way: tuple[str, ...] = ()
    """The children that have a pod at work, after those."""
    suspended: bool = False
    cleaned: tuple[str, ...] = ()
    """The ended children that somebody has deleted since, with their pods."""


LIVES = {
    "answering": Life(ended=BEGUN[:1], under_way=("answer",)),
    "critiquing": Life(ALONE, ended=BEGUN[:2], under_way=("critique",)),
    "checking": Life(ended=BEGUN[:3], under_way=("check",), cleaned=("answer",)),
    "training": Life({"training.workers": 2}, ended=BEGUN, under_way=("train-cgd",)),
    "trainjob": Life({"training.backend": "TrainJob"}, ended=BEGUN, under_way=("train-cgd",), cleaned=("teacher",)),
    "evaluating": Life(
        {"training.objectives": EVERY, "deletionPolicy": "Delete"},
        ended=("prepare", "answer", "teacher", "distill", "check", "train-cgd"),
        under_way=("train-cft", "evaluate-cgd"),
    ),
    "mistaught": Life({"training.variants": [MISTAUGHT]}, ended=BEGUN[:3], under_way=("misteacher",)),
    "reporting": Life(ended=TRAINED, under_way=("report",), cleaned=("train-cgd",)),
    "held": Life(ended=BEGUN[:1], under_way=("answer",), suspended=True),
    "broken": Life(ended=BEGUN[:2], failed="teacher"),
    "through": Life(ended=(*TRAINED, "report")),
    "emptied": Life(ended=(*TRAINED, "report"), cleaned=(*TRAINED, "report")),
}


def stored() -> dict[str, list[Json]]:
    """The objects of the zip, by the full name of their kind."""
    with zipfile.ZipFile(ZIP) as packed:
        found: dict[str, list[Json]] = json.loads(packed.read(FILE))
    return found


def restore(api: ApiServer, objects: dict[str, list[Json]]) -> None:
    """Put objects into an API server as they were, with uid, times and status."""
    registry = api.registry
    for crd_of_it in objects["customresourcedefinitions.apiextensions.k8s.io"]:
        served = custom_resource(crd_of_it)
        registry.resources[served.full_name] = served
    for kind, items in objects.items():
        for item in items:
            key = (item["metadata"].get("namespace", ""), item["metadata"]["name"])
            registry.store.put(registry.shelf(registry.resources[kind]), key, item)


def objects_of(api: ApiServer) -> dict[str, list[Json]]:
    found = {name: list(api.registry.shelf(kind).objects.values()) for name, kind in api.registry.resources.items()}
    return {name: items for name, items in found.items() if items}


async def _until(found: Any) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (answer := await found()):
        assert time.monotonic() < deadline, "it never came"
        await asyncio.sleep(0.05)
    return answer


async def child_of(client: Cluster, uid: str, stage: str) -> Json | None:
    """The child of a run for a stage, if there is one."""
    labels = f"{UID_LABEL}={uid},{STAGE_LABEL}={stage}"
    for kind in KINDS.values():
        if found := (await client.list(kind, "default", labels=labels))[0]:
            return found[0]
    return None


def _words(stage: str, outcome: str) -> str:
    facts = {"rows": {"total": 100, "done": 90, "rejected": 10}, "generatedTokens": 12345, "seconds": 60.0}
    told: Json = {"outcome": outcome, "stages": dict.fromkeys(STAGES.get(stage, (stage,)), facts)}
    if outcome == "failed":
        told |= {"error": "UserError", "message": "no such model", "hint": "name another"}
    return json.dumps(told)


def _ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


async def make_pod(client: Cluster, child: Json, outcome: str = "") -> None:
    """The pod of a child, which has ended so, or (empty) is at work."""
    meta, stage = child["metadata"], child["metadata"]["labels"][STAGE_LABEL]
    owner = {"apiVersion": child["apiVersion"], "kind": child["kind"], "name": meta["name"], "uid": meta["uid"]}
    container = {"Job": "stage", "PyTorchJob": "pytorch", "TrainJob": "node"}[child["kind"]]
    body: Json = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{meta['name']}-0",
            "namespace": "default",
            "labels": meta["labels"],
            "annotations": {"batch.kubernetes.io/job-completion-index": "0"},
            "ownerReferences": [{**owner, "controller": True}],
        },
        "spec": {"nodeName": "gpu-7", "containers": [{"name": container, "image": "image"}]},
    }
    await client.create(POD, body)
    state: Json = {"running": {"startedAt": _ago(300)}}
    if outcome:
        code = {"done": 0, "failed": 3}[outcome]
        message = _words(stage, outcome)
        ends = {"exitCode": code, "startedAt": _ago(300), "finishedAt": _ago(0), "message": message}
        state = {"terminated": ends | {"reason": "Error" if code else "Completed"}}
    phase = {"": "Running", "done": "Succeeded", "failed": "Failed"}[outcome]
    one = {"name": container, "image": "image", "imageID": "", "ready": False, "restartCount": 0, "state": state}
    status = {"phase": phase, "startTime": _ago(300), "containerStatuses": [one]}
    await client.patch(POD, body["metadata"]["name"], "default", {"status": status}, subresource="status")


async def end(client: Cluster, child: Json, condition: str = "Complete") -> None:
    """A child ends as its controller would end it."""
    kind, status = KINDS[child["kind"]], ENDS[child["kind"]](condition)
    await client.patch(kind, child["metadata"]["name"], "default", {"status": status}, subresource="status")


async def _live(client: Cluster, name: str, life: Life) -> None:
    body = manifest(life.spec, name=name)
    del body["metadata"]["uid"], body["metadata"]["generation"]
    uid = (await client.create(RUN, body))["metadata"]["uid"]
    for stage in (*life.ended, life.failed, *life.under_way):
        if not stage:
            continue
        child = await _until(lambda stage=stage: child_of(client, uid, stage))
        outcome = "done" if stage in life.ended else "failed" if stage == life.failed else ""
        await make_pod(client, child, outcome)
        if outcome:
            await end(client, child, "Complete" if outcome == "done" else "Failed")
    if life.suspended:
        await client.patch(RUN, name, "default", {"spec": {"suspend": True}})
    await asyncio.sleep(SETTLED_SECONDS)
    for stage in life.cleaned:
        child = await child_of(client, uid, stage)
        assert child is not None
        await client.delete(POD, f"{child['metadata']['name']}-0", "default", grace=0)
        await client.delete(KINDS[child["kind"]], child["metadata"]["name"], "default")
    await asyncio.sleep(SETTLED_SECONDS)


async def main() -> None:
    api = ApiServer()
    await api.start()
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "kubeconfig").write_text(api.kubeconfig())
        environment = {**os.environ, "KUBECONFIG": str(path), "CGD_PROGRESS_BIND": "127.0.0.1:0"}
        async with await Cluster.connect(str(path), manager="support") as client:
            for one in (crd(), pytorchjobs.crd(), *trainjobs.crds()):
                await install(client, one)
            process = await asyncio.create_subprocess_exec(sys.executable, "-m", "cgd_operator", env=environment)
            await asyncio.gather(*(_live(client, name, life) for name, life in LIVES.items()))
            process.terminate()
            await process.wait()
    with zipfile.ZipFile(ZIP, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        packed.writestr(zipfile.ZipInfo(FILE), json.dumps(objects_of(api)), zipfile.ZIP_DEFLATED)
    await api.stop()


if __name__ == "__main__":
    asyncio.run(main())
