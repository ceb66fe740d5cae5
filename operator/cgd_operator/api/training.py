"""How the student is trained, and the ablations of it."""

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from cgd_operator.api.fields import Fraction, Half, Part, Rate, rules
from cgd_stages.contract import CritiqueKind, Objective

BATCH_RULE = (
    "self.globalBatchSize >= self.workers * self.gpusPerWorker",
    "every GPU needs an example: raise globalBatchSize to at least workers * gpusPerWorker",
)
OFFLOAD_RULE = (
    "self.offload == 'none' || self.zeroStage >= (self.offload == 'parameters' ? 3 : 1)",
    "only what ZeRO partitions is offloaded: set zeroStage to 3 for parameters, to 1 or more for the optimizer",
)
RATE_RULE = (
    "(self.kind == 'corrupted') == has(self.rate)",
    'a corrupted critique needs a rate, such as "0.3", and no other kind has one',
)
ABLATION_RULE = (
    "self.critique.kind == 'matched' || 'CGD' in self.objectives",
    "only CGD is conditioned on the critique: add CGD to objectives, or leave critique out",
)
SELECT_RULE = (
    "!has(self.select) || self.select == 'last' || !has(self.fraction) || double(self.fraction) > 0.0",
    "the best model is that of the least validation loss: hold out a fraction above 0, or leave select out",
)


class Critique(Part):
    """What stands in the critique's place when CGD is trained; the targets stay the same. For ablations.

    matched: the row's own. shuffled: another prompt's. generic: one placeholder text. none: left out. corrupted: of a
    fraction of the rows (rate) another prompt's critique under the opposite verdict, of the others their own.
    """

    model_config = ConfigDict(json_schema_extra=rules(RATE_RULE))

    kind: CritiqueKind = "matched"
    rate: Rate | None = Field(None, description="Fraction of the rows that get a wrong critique.")

    @model_validator(mode="after")
    def _rate_of_corrupted(self) -> "Critique":
        if (self.kind == "corrupted") != (self.rate is not None):
            raise ValueError(RATE_RULE[1])
        return self


class Validation(Part):
    """Prompts that are held out of training; the loss on them says which model is exported, no benchmark does.

    They are chosen by training.seed, the same for every objective of the run, with all samples of a prompt together.
    """

    model_config = ConfigDict(json_schema_extra=rules(SELECT_RULE))

    fraction: Half | None = Field(
        None,
        description='Share of the prompts, at least one and never all; "0": none. Default: 1 % and at most 1,000 '
        "prompts in a run of 2,000 or more; none in a smaller run, where a handful of prompts would be lost to "
        "learning for a loss that is mostly noise.",
    )
    every_steps: int = Field(200, ge=1, description="Measured after so many steps, and after the last one.")
    select: Literal["best", "last"] | None = Field(
        None,
        description="The model that is exported: the one with the least validation loss (best), or the one after the "
        "last step. Default: best where prompts are held out.",
    )

    @model_validator(mode="after")
    def _something_to_select_by(self) -> "Validation":
        if self.select == "best" and self.fraction is not None and float(self.fraction) == 0:
            raise ValueError(SELECT_RULE[1])
        return self


class Training(Part):
    model_config = ConfigDict(json_schema_extra=rules(BATCH_RULE, OFFLOAD_RULE, ABLATION_RULE))

    objectives: tuple[Objective, ...] = Field(
        ("CGD",),
        min_length=1,
        max_length=5,
        json_schema_extra={"x-kubernetes-list-type": "set"},
        description="What is learned, a model for each, trained one after another: CGD (the refinement, given prompt, "
        "answer and critique), CFT (the critique, given prompt and answer), and given the prompt alone "
        "DistilledSFT (the teacher's own answer, which costs a pass of the teacher), SFT (the reference answer; needs "
        "prompts.fields.reference), RefinedSFT (the refinement).",
    )
    critique: Critique = Critique()
    epochs: int = Field(1, ge=1, le=100, description="Passes over the rows.")
    global_batch_size: int = Field(64, ge=1, le=65536, description="Examples per step, over all workers.")
    learning_rate: Rate = Field("1e-6", description="Peak of the schedule; a string, as every fraction.")
    warmup_ratio: Fraction = Field("0", description="Share of the steps with a rising learning rate.")
    weight_decay: Fraction = Field("0", description="Of AdamW.")
    max_sequence_length: int = Field(16384, ge=16, description="Tokens; a longer example is rejected, never cut.")
    packing: bool = Field(
        False,
        description="Several examples in one row of at most maxSequenceLength tokens, each seeing itself alone, rather "
        "than examples of like length padded to the longest. The losses are the same.",
    )
    workers: int = Field(1, ge=1, le=512, description="Pods of a training.")
    backend: Literal["auto", "PyTorchJob", "TrainJob"] = Field(
        "auto",
        description="What runs a training: PyTorchJob (Kubeflow Training Operator) or TrainJob (Kubeflow Trainer v2); "
        "auto takes what the cluster has, PyTorchJob first.",
    )
    gpus_per_worker: int = Field(8, ge=1, le=64, description="Also the processes of a worker, on CPU too.")
    zero_stage: int = Field(3, ge=0, le=3, description="DeepSpeed ZeRO: what is partitioned over the GPUs.")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Of the forward and backward pass.")
    activation_checkpointing: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether layers compute their activations again in backward, which saves memory and costs one more "
        "forward pass. auto: where the GPU's memory is estimated not to hold them, never on a CPU.",
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none",
        description="What is kept in the host's memory and costs time for less of the GPU's: the optimizer (12 bytes "
        "per parameter, divided by the GPUs; AdamW then runs on the CPU), or with zeroStage 3 the parameters as well.",
    )
    checkpoint_every_steps: int = Field(200, ge=1, description="A preempted training goes on from the last one.")
    keep_checkpoints: int = Field(2, ge=1, le=100, description="Older ones are removed.")
    termination_grace_period_seconds: int | None = Field(
        None,
        ge=1,
        le=86400,
        description="Seconds that a pod has to store a checkpoint when it must go. Default: 120, or up to 600 where "
        "prepare finds the checkpoint larger than a node stores in that time (200 MB a second). Nodes that are taken "
        "back, such as spot nodes, give 30 to 120 seconds whatever is asked.",
    )
    validation: Validation = Validation()
    stop_on_loss_spike: bool = Field(
        True,
        description="End a training whose loss stays far above what it was for 5 steps in a row: above the median of "
        "the 50 steps before by half of it and by 6 standard deviations. A single odd batch ends nothing.",
    )
    seed: int = Field(
        0,
        ge=0,
        description="Order of the examples; also which prompts are held out, and which critiques are exchanged, for "
        "shuffled and corrupted.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Training":
        if self.global_batch_size < self.workers * self.gpus_per_worker:
            raise ValueError(BATCH_RULE[1])
        if self.offload != "none" and self.zero_stage < (3 if self.offload == "parameters" else 1):
            raise ValueError(OFFLOAD_RULE[1])
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError("objectives: name each objective once")
        if self.critique.kind != "matched" and "CGD" not in self.objectives:
            raise ValueError(ABLATION_RULE[1])
        return self
