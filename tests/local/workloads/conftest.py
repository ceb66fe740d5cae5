"""One local cluster for all tests of this folder; each test has a namespace of its own in it."""

from collections.abc import AsyncIterator
from itertools import count

import pytest
import pytest_asyncio
from support.local_world import FAST, IMAGE, World, eventually

from cgd_local.cluster import LocalCluster
from cgd_operator.kube.kinds import NAMESPACE, POD

numbers = count()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def local_cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    folder = tmp_path_factory.mktemp("cluster")
    async with LocalCluster(folder, environment=IMAGE, gpus=2, backoff=FAST) as cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="session")
async def world(local_cluster: LocalCluster) -> AsyncIterator[World]:
    client, namespace = local_cluster.client, f"test-{next(numbers)}"
    await client.create(NAMESPACE, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    yield World(local_cluster, namespace)

    async def is_gone() -> bool:
        return await client.get(NAMESPACE, namespace) is None

    for pod in (await client.list(POD, namespace))[0]:
        await client.delete(POD, pod["metadata"]["name"], namespace, grace=0)
    await client.delete(NAMESPACE, namespace)
    await eventually(is_gone, f"end of {namespace}")
