"""What a pod asks of its node where the manifest says nothing: processors, memory and disk, by the size of its model.
Pure.

A ResourceQuota refuses pods without requests, and a node evicts them first. The requests are a floor, not a limit:

    cpu                 1, or 2 for each GPU: the smallest machines with a GPU have 4 processors for it
    memory              4Gi, for each GPU; and the weights, which pass through the host's memory
    ephemeral-storage   4Gi; and the weights, unless the cluster keeps them; of a training two checkpoints besides; of
                        what samples for one, the weights of a round

With `training.offload` the optimizer's numbers are in the host's memory: 12 bytes for each parameter, over all pods.
A run in a Kueue queue gets none of them, because a ClusterQueue that does not count a resource never admits a child
that asks for it.
"""

import math
from dataclasses import dataclass

from cgd_operator.api.placement import Resources

GI = 2**30


@dataclass(frozen=True)
class Sizes:
    """Bytes, as prepare has told them; 0: unknown."""

    checkpoint: int = 0
    """Of a training's checkpoint, on the node that stores most of it."""
    student: int = 0
    """Of its weights as they are stored, as of the teacher's."""
    teacher: int = 0


UNKNOWN = Sizes()


@dataclass(frozen=True)
class Load:
    """What a pod has to carry. In bytes, but for the GPUs."""

    gpus: int = 0
    weights: int = 0
    """Of the model that it loads."""
    kept: bool = False
    """Whether the cluster's cache has the weights, so that they need no disk of the pod."""
    checkpoint: int = 0
    offloaded: int = 0
    """Of the host's memory, for what a training keeps there."""
    taken: int = 0
    """Of other weights that it takes while it works."""


NOTHING = Load()


def requests(load: Load, given: Resources) -> dict[str, str | int]:
    """The requests of a pod: the user's own, and the floor of each resource that the user names nowhere. A limit
    without a request is its request, as everywhere in Kubernetes."""
    memory = 4 * max(load.gpus, 1) * GI + load.weights + load.offloaded
    disk = 4 * GI + (0 if load.kept else load.weights) + 2 * load.checkpoint + load.taken
    floor = {"cpu": str(2 * load.gpus or 1), "memory": _quantity(memory), "ephemeral-storage": _quantity(disk)}
    asked = {name: least for name, least in floor.items() if name not in given.limits}
    return {**asked, **given.requests}


def _quantity(size: int) -> str:
    return f"{math.ceil(size / GI)}Gi"
