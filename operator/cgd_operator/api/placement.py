"""Where the pods run."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, WithJsonSchema, model_validator

from cgd_operator.api.fields import Memory, rules
from cgd_stages.contract import FREE, Contract, Name

QUANTITY = r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?$"


def _quantity(value: str | int) -> str | int:
    if not re.match(QUANTITY, str(value)):
        raise ValueError('write a quantity, such as 4, "500m" or 64Gi')
    return value


Quantity = Annotated[
    str | int,
    AfterValidator(_quantity),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "pattern": QUANTITY}),
]


class Resources(Contract):
    """The resources of a container, as Kubernetes has them, added to the GPUs that the run asks for."""

    limits: dict[str, Quantity] = Field({})
    requests: dict[str, Quantity] = Field({})


class Pool(Contract):
    """Where the pods of a pool run. The fields are those of a PodSpec and of its container."""

    node_selector: dict[str, str] = Field({})
    tolerations: list[dict[str, Any]] = Field([], max_length=64)
    affinity: dict[str, Any] = Field({}, json_schema_extra=FREE)
    resources: Resources = Resources()
    priority_class_name: Name | None = None


VOLCANO_RULE = (
    "!has(self.queue) || self.gang == 'volcano'",
    "schedulingPolicy.queue is a queue of Volcano; leave it out for coscheduling, or set gang: volcano",
)


class SchedulingPolicy(Contract):
    """All pods of a training start together, or none does. It needs a gang scheduler in the cluster that the training's
    controller is set up for. minAvailable is the number of the training's pods."""

    model_config = ConfigDict(json_schema_extra=rules(VOLCANO_RULE))

    gang: Literal["volcano", "coscheduling"] = Field(
        description="The gang scheduler: Volcano, or coscheduling of scheduler-plugins."
    )
    scheduler_name: Name | None = Field(
        None, description="The schedulerName of the training's pods; default: volcano or scheduler-plugins-scheduler."
    )
    queue: Name | None = Field(
        None, description="The queue of Volcano; default: the queue that Volcano takes by itself."
    )

    @model_validator(mode="after")
    def _queue_is_volcanos(self) -> "SchedulingPolicy":
        if self.queue and self.gang != "volcano":
            raise ValueError(VOLCANO_RULE[1])
        return self


GPU_MEMORY_RULE = (
    "!has(self.gpuMemory) || self.accelerator != 'none'",
    "placement.gpuMemory is of GPUs, and accelerator is none: leave one of them out",
)


class Placement(Contract):
    """Where the pods run, and what a GPU is called there. Each kind of pod has a pool."""

    model_config = ConfigDict(json_schema_extra=rules(GPU_MEMORY_RULE))

    accelerator: str = Field(
        "nvidia.com/gpu",
        max_length=253,
        description="The resource name of a GPU. With none the run uses CPUs and asks for no GPU.",
    )
    gpu_memory: Memory | None = Field(
        None,
        description="The memory of a GPU, such as 80Gi; where pools differ, of the smallest. When it is set, prepare "
        "refuses models and trainings that do not fit, and shows the arithmetic.",
    )
    student: Pool = Field(Pool(), description="The pods that run the student: answers and evaluations.")
    teacher: Pool = Field(Pool(), description="The pods that run the teacher.")
    training: Pool = Field(Pool(), description="The pods that train.")
    cpu: Pool = Field(
        Pool(), description="The pods without a GPU: prepare, check, report, and those that ask a teacher's endpoint."
    )
    scheduling_policy: SchedulingPolicy | None = None
    topology_key: Name | None = Field(
        None,
        description="A label of nodes, such as topology.kubernetes.io/zone or a rack's. All pods of a training run on "
        "nodes with the same value of it.",
    )

    @model_validator(mode="after")
    def _memory_is_of_gpus(self) -> "Placement":
        if self.gpu_memory and self.accelerator == "none":
            raise ValueError(GPU_MEMORY_RULE[1])
        return self
