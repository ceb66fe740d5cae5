"""What a run says reaches its programs as it was written: the kubelet fills in nothing."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from kubernetes.aio.client.configuration import Configuration
from support.builders import RELEASE, SPEC, run
from support.strings import texts

from cgd_local.sandbox import Sandbox, expand
from cgd_operator.kube.client import Cluster, Object
from cgd_operator.planning import manifests
from cgd_operator.planning.dag import BACKENDS, Run, cleaning, plan
from cgd_stages import contract

LATEX = r"Put $$x$$ into $(PATH), as $\boxed{\$5}$ or $(HOME)$."


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("$(A)", "1"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$1"),
        ("$$$$(A)$$", "$$(A)$"),
        ("$(B)", "$(B)"),
        ("$()", "$()"),
        ("$A ${A} \\$(A) $", "$A ${A} \\1 $"),
        ("$(A", "$(A"),
        ("$(x$(A))", "$(x$(A))"),
        ("$($(A)", "$($(A)"),
        ("$(E)", ""),
        ("$(a\nb)$(A)", "$(a\nb)1"),
        ("$(R)", "$(A)"),
    ],
)
def test_the_local_kubelet_fills_in_as_the_real_one(text: str, becomes: str) -> None:
    """By kubernetes/third_party/forked/golang/expansion."""
    assert expand(text, {"A": "1", "E": "", "R": "$(A)"}) == becomes


def asking(instruction: str) -> Run:
    """A run whose benchmark has this instruction."""
    benchmark = SPEC["evaluation"]["benchmarks"][0] | {"instruction": instruction}
    return run({"evaluation.benchmarks": [benchmark]})


def pods(this: Run) -> Iterator[tuple[contract.StageTask, Object]]:
    """The task and the pod template of every child, on every training backend, and of what cleans up."""
    for backend in BACKENDS:
        for child in plan(this, backend):
            if child.kind == "TrainJob":
                node = manifests.training_runtime(this, child, RELEASE)["spec"]["template"]["spec"]["replicatedJobs"][0]
                yield child.task, node["template"]["spec"]["template"]
                continue
            spec = manifests.manifest(this, child, RELEASE)["spec"]
            holder = spec["pytorchReplicaSpecs"]["Worker"] if child.kind == "PyTorchJob" else spec
            yield child.task, holder["template"]
    clean = cleaning(this)
    yield clean.task, manifests.cleaning_job(this, clean, RELEASE)["spec"]["template"]


def filled_in(text: str) -> str:
    """By a kubelet that knows every variable."""

    class Every(dict[str, str]):
        def get(self, key: str, default: Any = None) -> Any:
            return f"<{key}>"

    return expand(text, Every())


@given(texts)
def test_every_text_of_a_task_arrives_unchanged(text: str) -> None:
    this = asking(text)
    for task, template in pods(this):
        (container,) = template["spec"]["containers"]
        values = {one["name"]: one["value"] for one in container["env"] if "value" in one}
        assert contract.StageTask.model_validate_json(filled_in(values[contract.TASK])) == task


def test_nothing_of_a_pod_is_filled_in() -> None:
    for _, template in pods(asking(LATEX)):
        (container,) = template["spec"]["containers"]
        given = [one["value"] for one in container["env"] if "value" in one]
        for text in (*given, *container["command"], *container.get("args", ())):
            assert "$" not in text.replace("$$", "")


async def test_a_formula_reaches_the_process_of_a_pod(tmp_path: Path) -> None:
    task, template = next((task, pod) for task, pod in pods(asking(LATEX)) if task.work.kind == "prepare")
    pod = template | {"metadata": template["metadata"] | {"name": "demo", "namespace": "default", "uid": "1"}}
    (container,) = pod["spec"]["containers"]
    print_it = ["printenv", contract.TASK]  # found on the PATH: a path below /tmp would be taken for one in the pod
    async with Cluster(Configuration(), manager="test") as nowhere:  # nothing of this pod is in a Secret
        sandbox = Sandbox(nowhere, pod, tmp_path / "pod")
        env = await sandbox.environment(container, {"PATH": "/usr/bin:/bin"})
        command = sandbox.command({**container, "command": print_it}, env)
    process = await asyncio.create_subprocess_exec(*command, env=env, stdout=asyncio.subprocess.PIPE)
    told = (await process.communicate())[0].decode()
    assert told == f"{task.to_json()}\n"
    assert json.dumps(LATEX) in told
