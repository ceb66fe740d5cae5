"""The examples for clouds: what the API server takes, and what the operator makes of it."""

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from cgd_operator.kube.kinds import JOB, RUN

CLOUDS = Path(__file__).parents[2] / "examples/clouds"
KUBECTL = Path(sys.executable).parent / "kubectl"
NAMESPACE = "team-a"


async def kubectl(world: Any, *words: str) -> str:
    env = {**os.environ, "KUBECONFIG": str(world.kubeconfig)}
    process = await asyncio.create_subprocess_exec(
        str(KUBECTL), *words, env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    return out.decode()


def test_no_example_is_left_untried() -> None:
    others = {"gke-external-secret.yaml"}  # kinds of another project
    assert {path.name for path in CLOUDS.glob("*.yaml")} - others == {f"{name}.yaml" for name in EXAMPLES}


EXAMPLES = {"aws": "cgd-stages", "gke": None, "azure": None, "onprem": None}
"""The example of a cloud, and the ServiceAccount of its pods."""


@pytest.mark.parametrize("name", EXAMPLES)
async def test_the_example_of_a_cloud_is_applied_and_started(world: Any, name: str) -> None:
    async with world.operator():
        await kubectl(world, "apply", "-f", str(CLOUDS / f"{name}.yaml"))

        async def job() -> Any:
            jobs, _ = await world.client.list(JOB, NAMESPACE)
            return next(iter(jobs), None)

        async def told() -> Any:
            run = await world.client.get(RUN, "qwen-math", NAMESPACE)
            return (run.get("status") or {}).get("conditions")

        spec = (await world.until(job))["spec"]["template"]["spec"]
        conditions = {one["type"]: one["status"] for one in await world.until(told)}
    assert conditions["Accepted"] == "True"
    assert spec.get("serviceAccountName") == EXAMPLES[name]
    secrets = {one["secretRef"]["name"] for one in spec["containers"][0].get("envFrom", [])}
    keys = {
        one["valueFrom"]["secretKeyRef"]["name"]
        for one in spec["containers"][0]["env"]
        if "secretKeyRef" in one.get("valueFrom", {})
    }
    assert ("s3-keys" in secrets | keys) == (name != "aws")
