"""Wrong and strange manifests against the operator: `make fuzz`, and a few of them in tests/cluster/test_fuzz.py.

    PYTHONPATH=tests python -m support.fuzz --count 10000 --seed 0

Each manifest is one of ours with one to four changes: something left out, doubled, renamed, put elsewhere, or replaced
by a value of another kind or size. It is applied to an API server with the project's definitions; what that takes is
reconciled once, and the children of its later stages are put to the server as well. Every manifest must end in a fate
of `FATES`; what ends in none is a bug, and its manifest is printed.
"""

import argparse
import asyncio
import copy
import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cgd_local import pytorchjobs, trainjobs
from cgd_local.apiserver import ApiServer
from cgd_local.cluster import install
from cgd_operator.api.crd import crd
from cgd_operator.controller.reconciler import Reconciler
from cgd_operator.facts.progress import Board
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import JOB, PYTORCHJOB, RUN, AlreadyExists, ApiError
from cgd_operator.planning.dag import Run, plan
from cgd_operator.planning.manifests import KINDS
from cgd_operator.planning.manifests import manifest as child_manifest
from support.builders import RELEASE, manifest

Json = dict[str, Any]

FATES = {
    "not taken": "the API server refuses it, and says which field",
    "refused": "the operator refuses it: InvalidSpec, with the field and the mend",
    "child refused": "the API server would refuse a child; nothing is started and the run's condition says so",
    "suspended": "it waits, as it asks for",
    "started": "its first stage is there, and the server takes its other children",
}
EXAMPLES = Path(__file__).parents[2] / "examples"
RICH: Json = {
    "student": {"model": "org/student", "revision": "v1", "tensorParallel": 2, "shards": 4, "maxModelLen": 4096},
    "teacher.model": None,
    "teacher.endpoint": {"url": "https://teacher/v1", "model": "t", "apiKeySecretRef": {"name": "k", "key": "t"}},
    "prompts.limit": 1000,
    "prompts.seed": 1,
    "prompts.decontaminate": {"against": ["arithmetic"], "ngram": 13, "paraphrases": "remove", "similarity": "0.5"},
    "prompts.nearDuplicates": "remove",
    "generation": {"maxRejected": "5%", "answer": {"maxTokens": 100, "temperature": "0.7", "topP": "0.9",
                                                       "unfinished": "reject"}},
    "training": {
        "objectives": ["SFT", "CFT", "CGD"], "workers": 2, "gpusPerWorker": 8, "globalBatchSize": 64,
        "learningRate": "1e-6", "critique": {"kind": "corrupted", "rate": "0.1"}, "zeroStage": 3,
        "bareShare": "0.25", "context": "system",
        "variants": [
            {"name": "cgd-none", "kind": "CGD", "critique": {"kind": "none"}, "bareShare": "0.5", "epochs": 2},
            {"name": "cgd-mis", "kind": "CGD", "critique": {"kind": "miscritique", "rate": "0.5", "target": "kept"}},
            {"name": "cft-user", "kind": "CFT", "context": "user", "learningRate": "5e-6"},
            {"name": "cgd-dpo", "kind": "DPO", "from": "CGD", "beta": "0.2"},
            {"name": "inner", "kind": "ContextDistillation", "from": "cgd-dpo", "topK": 4},
        ],
        "offload": "optimizer", "validation": {"fraction": "0.01", "everySteps": 10},
    },
    "placement": {
        "accelerator": "nvidia.com/gpu",
        "student": {"nodeSelector": {"pool": "a100"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]},
        "training": {"resources": {"requests": {"cpu": "8", "memory": "64Gi"}}, "priorityClassName": "high"},
    },
    "storage": {"uri": "s3://b/p", "endpoint": "https://s3", "credentialsSecretRef": {"name": "keys"}},
    "podMetadata": {"labels": {"team": "a"}, "annotations": {"note": "b"}},
    "budget": {"gpuHours": "400", "deadlineSeconds": 86400},
    "ttlSecondsAfterFinished": 3600,
    "deletionPolicy": "Delete",
    "suspend": False,
}  # fmt: skip
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, "", " ", "0", "-1", "1e-6", "nan", "inf",
    "1e999", "100%", "-5%", "101%", "true", "null", "~", "0x10", "a" * 300, "a" * 5000, "\u00e9\u4e2d\U0001f600",
    "a\u0000b", "a\nb", "../../etc", "s3://", "s3://b", "s3:///k", "hf://x", "configmap://", "configmap://a", "http://",
    "stage://train-cgd", "{{ x }}", "$(HOME)", "-lead", "UPPER", "a.b.c",
    [], [[]], [None], ["CGD", "CGD"], {}, {"": ""}, {"a": {"b": {}}},
    {"name": "x"}, [{"name": "x"}] * 70,
)  # fmt: skip


def seeds() -> list[Json]:
    """The manifests that are changed."""
    shipped = [EXAMPLES / "quickstart.yaml", EXAMPLES / "replicate/run.yaml"]
    runs = [one for path in shipped for one in yaml.safe_load_all(path.read_text()) if one["kind"] == "CGDRun"]
    return [*runs, manifest(), manifest(RICH)]


def mutants(seed: int) -> Iterator[Json]:
    """Without end, the same for a seed."""
    dice, originals = random.Random(seed), seeds()
    while True:
        made = copy.deepcopy(dice.choice(originals))
        made["metadata"] = {"name": "run", "namespace": "default"}
        for _ in range(dice.choice((1, 1, 1, 2, 4))):
            _change(made, dice)
        yield made


def _change(made: Json, dice: random.Random) -> None:
    places = list(_places(made["spec"])) or [(made, "spec")]
    holder, key = dice.choice(places)
    other_holder, other_key = dice.choice(places)
    match dice.randrange(6):
        case 0:
            del holder[key]
        case 1 | 2:
            holder[key] = copy.deepcopy(dice.choice(STRANGE))
        case 3:
            holder[key] = copy.deepcopy(other_holder[other_key])
        case 4 if isinstance(holder, dict):
            holder[dice.choice(["x" + key, key.upper(), key + "s", ""])] = holder.pop(key)
        case 4 | 5:
            for _ in range(dice.choice([1, 40])):
                holder[key] = [copy.deepcopy(holder[key])] if dice.random() < 0.5 else {str(key): holder[key]}


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every field and item below a value, as its holder and key."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


async def fate(client: Cluster, reconciler: Reconciler, run: Json) -> str:
    """What becomes of a manifest; leaves the cluster as it was. A fate that is not in FATES is a bug, in words."""
    try:
        await client.create(RUN, run)
    except ApiError as error:
        return "not taken" if error.status in (400, 422) and error.message else f"the API server failed: {error}"
    try:
        await reconciler.reconcile("default", "run")
        found = await _seen(client)
        return await _later(client) if found == "started" else found
    except Exception as error:  # noqa: BLE001 (to find them is what this is for)
        return f"{type(error).__name__}: {error}"
    finally:
        await client.patch(RUN, "run", "default", {"metadata": {"finalizers": None}})
        await client.delete(RUN, "run", "default")
        for kind in (JOB, PYTORCHJOB):
            for child in (await client.list(kind, "default"))[0]:
                await client.delete(kind, child["metadata"]["name"], "default")


async def _seen(client: Cluster) -> str:
    status = ((await client.get(RUN, "run", "default")) or {}).get("status", {})
    jobs = (await client.list(JOB, "default"))[0]
    stalled = next((one for one in status.get("conditions", []) if one["type"] == "Stalled"), {})
    match status.get("state"), stalled.get("reason"):
        case "Refused", "InvalidSpec" if stalled["message"].startswith("spec"):
            return "refused"
        case _, "ChildRefused" if stalled["message"]:
            return "child refused"
        case "Suspended", _:
            return "suspended"
        case _ if jobs:
            return "started"
    return f"stuck: {json.dumps(status)[:500]}"


async def _later(client: Cluster) -> str:
    """The fate of a run whose first child is there, when all others are put to the server."""
    run = Run.of(await client.get(RUN, "run", "default") or {})
    for child in plan(run):
        try:
            await client.create(KINDS[child.kind], child_manifest(run, child, RELEASE))
        except AlreadyExists:
            continue
        except ApiError as error:
            return f"a later child is refused: {error}"
    return "started"


async def fates(count: int, seed: int, kubeconfig: str) -> dict[str, list[Json]]:
    """The manifests by their fates."""
    found: dict[str, list[Json]] = {}
    chosen = mutants(seed)
    async with await Cluster.connect(kubeconfig, manager="fuzz") as client:
        for definition in (crd(), pytorchjobs.crd(), *trainjobs.crds()):
            await install(client, definition)
        reconciler = Reconciler(client, RELEASE, Board(), b"key")
        for _ in track(range(count), description="manifests", transient=True):
            run = next(chosen)
            found.setdefault(await fate(client, reconciler, copy.deepcopy(run)), []).append(run)
    return found


async def main(count: int, seed: int) -> int:
    api = ApiServer()
    await api.start()
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "kubeconfig").write_text(api.kubeconfig())
        found = await fates(count, seed, str(path))
    await api.stop()
    console, table = Console(highlight=False), Table("fate", "manifests", "meaning")
    for name, meaning in FATES.items():
        table.add_row(name, str(len(found.get(name, []))), meaning)
    console.print(table)
    bugs = {name: runs for name, runs in found.items() if name not in FATES}
    for name, count_of in Counter({name: len(runs) for name, runs in bugs.items()}).most_common():
        console.print(f"\n{count_of} times: {name}\n{json.dumps(bugs[name][0])}", markup=False)
    return len(bugs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    raise SystemExit(min(1, asyncio.run(main(given.count, given.seed))))
