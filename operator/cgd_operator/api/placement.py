"""Where the pods run."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, WithJsonSchema, model_validator

from cgd_operator.api.fields import Memory, rules
from cgd_stages.contract import Contract, Name

FREE: dict[str, Any] = {"x-kubernetes-preserve-unknown-fields": True}


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
    """Of a container, as Kubernetes has them."""

    limits: dict[str, Quantity] = Field({})
    requests: dict[str, Quantity] = Field({})


class Pool(Contract):
    """Where the pods of a pool run. The fields are those of a PodSpec and of a container."""

    node_selector: dict[str, str] = Field({})
    tolerations: list[dict[str, Any]] = Field([], max_length=64)
    affinity: dict[str, Any] = Field({}, json_schema_extra=FREE)
    resources: Resources = Field(Resources(), description="Added to the GPUs that the run asks for.")
    priority_class_name: Name | None = None


VOLCANO_RULE = (
    "!has(self.queue) || self.gang == 'volcano'",
    "schedulingPolicy.queue is a queue of Volcano; leave it out for coscheduling, or set gang: volcano",
)


class SchedulingPolicy(Contract):
    """The pods of a training start together or not at all. For a scheduler that the cluster has beside its own, and
    that the training's controller was set up for."""

    model_config = ConfigDict(json_schema_extra=rules(VOLCANO_RULE))

    gang: Literal["volcano", "coscheduling"] = Field(
        description="Whose PodGroups: those of Volcano, or of coscheduling in scheduler-plugins."
    )
    scheduler_name: Name | None = Field(
        None, description="Of the training's pods; default: volcano, or scheduler-plugins-scheduler."
    )
    queue: Name | None = Field(None, description="Queue of Volcano; default: its own.")

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
    model_config = ConfigDict(json_schema_extra=rules(GPU_MEMORY_RULE))

    accelerator: str = Field(
        "nvidia.com/gpu",
        max_length=253,
        description="Resource name of a GPU; none: run on CPU and ask for no GPU.",
    )
    gpu_memory: Memory | None = Field(
        None,
        description="Memory of a GPU, of the smallest where pools differ, such as 80Gi. With it prepare refuses models "
        "and trainings that do not fit, with the arithmetic.",
    )
    student: Pool = Pool()
    teacher: Pool = Pool()
    training: Pool = Pool()
    cpu: Pool = Field(Pool(), description="prepare and report, and a teacher behind an endpoint.")
    scheduling_policy: SchedulingPolicy | None = Field(
        None, description="Gang scheduling of the trainings; minAvailable is all of a training's pods."
    )
    topology_key: Name | None = Field(
        None,
        description="Label of nodes, such as topology.kubernetes.io/zone or a rack's: all pods of a training run where "
        "its value is the same.",
    )

    @model_validator(mode="after")
    def _memory_is_of_gpus(self) -> "Placement":
        if self.gpu_memory and self.accelerator == "none":
            raise ValueError(GPU_MEMORY_RULE[1])
        return self
