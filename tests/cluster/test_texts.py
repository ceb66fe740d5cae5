"""Words that programs and users write, with characters of every plane and control characters in them, are told."""

from typing import Any

from support.builders import ended, labels

from cgd_operator.kube.kinds import POD, TRAININGRUNTIME
from cgd_operator.planning import manifests

WORDS = "gloo: \U0001f525\U0010ffff \x07\x1b[31m \x7f\x85\u2028\ufeff\uffff the end"


async def add_failed_pod(world: Any, stage: str, message: str) -> None:
    own = labels(stage) | {manifests.UID_LABEL: (await world.get())["metadata"]["uid"]}
    spec = {"containers": [{"name": "stage", "image": "image"}]}
    meta = {"name": "failed", "namespace": "default", "labels": own}
    await world.client.create(POD, {"metadata": meta, "spec": spec})
    container = {"name": "stage", "image": "image", "imageID": "", "ready": False, "restartCount": 0}
    status = {"phase": "Failed", "containerStatuses": [{**container, "state": {"terminated": ended(3, message)}}]}
    await world.client.patch(POD, "failed", "default", {"status": status}, subresource="status")


async def has_failed(world: Any) -> bool:
    return bool(await world.state() == "Failed")


async def test_a_run_that_ends_with_strange_words_tells_them(world: Any) -> None:
    async with world.operator():
        await world.apply()
        await world.until(world.children)
        await add_failed_pod(world, "prepare", WORDS)
        await world.end("prepare", "Failed")
        await world.until(lambda: has_failed(world))
    (stage, *_) = (await world.get())["status"]["stages"]
    assert WORDS in stage["message"]


async def test_annotations_with_strange_words_reach_the_pods_of_a_training(world: Any) -> None:
    noted = {"example.com/owner": "team \U0001f680 \x07"}

    async def runtimes() -> Any:
        return (await world.client.list(TRAININGRUNTIME, "default"))[0]

    async with world.operator():
        await world.apply({"training.backend": "TrainJob", "podMetadata.annotations": noted})
        await world.play("prepare", "answer", "teacher", "check")
        (runtime,) = await world.until(runtimes)
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert noted.items() <= job["template"]["spec"]["template"]["metadata"]["annotations"].items()
