"""What a training learns, how long and how fast, and how it uses its GPUs."""

from typing import Annotated, Any, Literal

from pydantic import Field

from cgd_stages.contract.base import Contract, Fraction, Half, Number, Positive, Rate, StageName
from cgd_stages.contract.models import Chat, Engine, Model

Supervised = Literal["CGD", "CFT", "DistilledSFT", "SFT", "RefinedSFT"]
"""An objective that learns a text token by token; `examples.conversation` is the table."""
Objective = Literal[Supervised, "DPO", "ContextDistillation", "SupervisedKD", "GKD", "OPD"]
"""What a student reads and what it learns. Each one but the supervised learns from the texts of a supervised one, by a
loss of its own; `methods.METHODS` is the table."""
Texts = Literal["refined", "distilled"]
"""The texts that a divergence is learned on: the teacher's refinements, or its own answers."""
Form = Literal["reward", "loss"]
"""How OPD learns reverse KL from the sampled token alone: teacher's less student's log-probability as a reward, which
has no gradient, or half the square of that difference as a loss. See `method.losses`."""


InstructionTurn = Literal["user", "system"]
"""The turn with the instruction of CGD's and CFT's contexts; the texts of the row are always in a user turn."""
CritiqueKind = Literal["matched", "shuffled", "generic", "none", "corrupted", "miscritique"]
"""The text that takes the critique's place when CGD is trained: see `examples.critic`."""
Target = Literal["kept", "refined"]
"""What is learned behind a miscritique: the row's refinement, or the one that the teacher made from the miscritique."""
Learned = Literal["drop", "learn"]
"""What becomes of the teacher's thoughts in training."""


def train_stage(training: str) -> StageName:
    """The name of the stage of a training, which is called as its objective or as a variant of one."""
    return StageName.of("train", training.lower())


def score_stage(scored: str) -> StageName:
    """The name of the stage that stores log-probabilities: of the teacher on the texts of that name, or of the model
    that a training starts from, for the training of that name."""
    return StageName.of("score", scored.lower())


def rollout_stage(training: str) -> StageName:
    """The name of the stage in which the student of a training samples what the training learns."""
    return StageName.of("rollout", training.lower())


class Critique(Contract):
    """The critique that training reads. `rate`: the fraction of rows that `corrupted` or `miscritique` gives a wrong
    critique."""

    kind: CritiqueKind = "matched"
    rate: float = 0.0
    target: Target | None = None
    """Of `miscritique`; None for every other kind."""

    def identity(self) -> dict[str, Any]:
        """Its part of a digest's inputs, without a target where the kind has none: earlier builds had no field."""
        return self.model_dump(by_alias=True, exclude_none=True)


Exported = Literal["bare", "context", "last"]
"""Which model of a training is exported: the one with the least loss on the held-out prompts, given the prompt alone or
in the context in which the objective learns, or the one after the last step; the last also where nothing is held
out."""


class HeldOut(Contract):
    """Prompts that are held out of training, and how often the losses on them are measured."""

    fraction: Half | None = Field(
        None,
        description='The share of the prompts that is held out: at least one prompt and never all; "0" holds none out. '
        "By default a run of 2,000 prompts or more holds out 1 %, at most 1,000 prompts, and a smaller run none: the "
        "loss on a handful of prompts is mostly noise.",
    )
    every_steps: int = Field(
        200, ge=1, description="The losses are measured after every so many steps, and after the last one."
    )


class Validation(HeldOut):
    select: Exported = "bare"


class EarlyLook(Contract):
    """Benchmark questions that a student in training is asked at a few steps, and how long its outputs may be."""

    questions: int = Field(
        64,
        ge=1,
        le=1000,
        description="How many questions are asked, as many of each benchmark as can be, chosen by training.seed. A "
        "share of 64 questions is known to about 12 points, one of 400 to about 5.",
    )
    max_tokens: int = Field(
        1024,
        ge=1,
        le=32768,
        description="The most tokens of an output, its thought included. Prompt and output together have at most "
        "training.maxSequenceLength.",
    )


class StopUnless(Contract):
    """What a training must have gained on the early questions to go on."""

    after: Rate = Field(Number("0.1"), description="The share of the steps after which the training is judged.")
    gain: Fraction = Field(
        Number("0"),
        description="The share of the early questions by which the student must be better than before the training: "
        '"0" ends a training that has become worse, "0.05" one that has not gained 5 points.',
    )


class Early(EarlyLook):
    """The early look of one training. `instructions`: what follows the questions of each benchmark."""

    instructions: dict[str, str]
    stop_unless: StopUnless | None = None


class Adapter(Contract):
    """A low-rank adapter (LoRA, Hu et al. 2021): W + alpha / rank * B A is trained in A and B alone, W stays."""

    rank: int = Field(
        16,
        ge=1,
        le=512,
        description="The rows of A and columns of B. vLLM serves the adapter with a max_lora_rank of at least this.",
    )
    alpha: int = Field(32, ge=1, le=65536, description="What the adapter adds is scaled by alpha / rank.")
    dropout: Half = Field(0.0, description="The share of a module's inputs that the adapter does not see in a step.")
    targets: tuple[Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9_.]+$")], ...] = Field(
        (),
        max_length=50,
        description="What gets A and B: attention, mlp, or linear modules by the architecture's names, such as q_proj. "
        "Default: every linear module of the layers; of a mixture of experts, those of attention. prepare refuses what "
        "the student does not have.",
    )


class Course(Contract):
    """How much a training reads, and how fast it learns."""

    epochs: int = Field(1, ge=1, le=100, description="How often the training goes through the rows.")
    global_batch_size: int = Field(
        64, ge=1, le=65536, description="How many examples one step learns from, over all workers."
    )
    learning_rate: Rate = Field(
        Number("1e-6"),
        description='The highest learning rate; a string, such as "1e-6". The warm-up rises to it linearly, and half a '
        "cosine lowers it to 0.",
    )
    warmup_ratio: Fraction = Field(
        0.0, description="The share of the steps in which the learning rate rises linearly, before the cosine."
    )
    weight_decay: Fraction = Field(0.0, description="The weight decay of AdamW.")
    max_sequence_length: int = Field(
        16384, ge=16, description="The most tokens of an example. A longer one is rejected, never cut."
    )
    packing: bool = Field(
        False,
        description="Puts several examples into one row of at most maxSequenceLength tokens, and each sees itself "
        "alone. Without it, examples of like length are padded to the longest. The losses are the same.",
    )
    adapter: Adapter | None = Field(
        None,
        description="Trains a low-rank adapter (LoRA) instead of all parameters, and stores both the adapter and the "
        "student with the adapter added. {} takes the defaults. An adapter wants a higher learningRate: ten to a "
        'hundred times that of a full training, such as "1e-4".',
    )
    router_loss_weight: Fraction | None = Field(
        None,
        description='The weight of the loss that keeps the routers of a mixture of experts balanced; a string, "0" '
        "leaves it out. Default: as the student's config says (router_aux_loss_coef).",
    )


class Upkeep(Contract):
    """How a training uses its GPUs, its checkpoints and validation, and its random seed."""

    zero_stage: int = Field(
        3,
        ge=0,
        le=3,
        description="What DeepSpeed ZeRO divides among the GPUs: 1 the optimizer, 2 also gradients, 3 also parameters.",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="The number format of the forward and backward pass."
    )
    activation_checkpointing: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether the backward pass computes activations again, which saves memory and costs one more "
        "forward pass. auto does so where the GPU's memory would not hold them by estimate, and never on a CPU.",
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none",
        description="What moves from the GPU's memory to the host's, and makes steps slower: optimizer (16 bytes per "
        "parameter with the summed gradients, divided by the GPUs; AdamW then runs on the CPU), or, with zeroStage 3, "
        "parameters as well.",
    )
    checkpoint_every_steps: int = Field(
        200,
        ge=1,
        description="A checkpoint is stored after every so many steps, and an interrupted training goes on from it.",
    )
    keep_checkpoints: int = Field(2, ge=1, le=100, description="How many checkpoints are kept; older ones are deleted.")
    validation: HeldOut = HeldOut()
    stop_on_loss_spike: bool = Field(
        True,
        description="Ends a training when its loss stays too high for 5 steps in a row: above the median of the 50 "
        "steps before by half of it and by 6 standard deviations. A single odd batch ends nothing.",
    )
    seed: int = Field(
        0,
        ge=0,
        description="Determines the order of the examples, which prompts are held out, and which rows get which wrong "
        "critique in an ablation.",
    )


class OnPolicy(Contract):
    """How a training learns from what its own student samples. `rounds` of steps take turns: the student of a round's
    beginning samples what the round's steps learn, and the teacher scores it."""

    share: Rate = 1.0
    """Of each step's examples; the others learn the stored text."""
    refresh: Positive
    """Steps of a round: after so many the student of the moment samples anew."""
    max_tokens: Positive
    """Of a sample; what is cut there has no end token."""
    engine: Engine
    """The student's, as it samples."""
    teacher: Model
    teacher_engine: Engine


class Lesson(Contract):
    """What a training learns, and the number of its processes."""

    kind: Literal["train"] = "train"
    name: str | None = None
    """A variant's; None: the training is called as its objective."""
    objective: Objective = "CGD"
    critique: Critique = Critique()
    """Only the objective CGD may have another kind than `matched`."""
    bare_share: Fraction = 0.0
    """The share of CGD's rows whose context is the prompt alone."""
    context: InstructionTurn = "user"
    """Where the instruction of CGD's and CFT's contexts stands."""
    student: Model
    chat: Chat = Chat()
    thinking: Learned = "drop"
    """Whether the teacher's thought before the target is learned too, in the student's own markup."""
    workers: int = 1
    processes_per_worker: int = 1
    start: StageName | None = None
    """The stage whose model the training starts from; None: the student as it is."""
    beta: float | None = None
    """Of DPO and GKD: see `method.losses`. Every other objective has none."""
    texts: Texts | None = None
    """Of SupervisedKD."""
    top_k: int | None = None
    """Of objectives that learn a divergence: how many of a position's likeliest tokens it tells apart."""
    form: Form | None = None
    """Of OPD."""
    on_policy: OnPolicy | None = None
    """Of OPD and GKD; None: only stored texts are learned."""

    @property
    def title(self) -> str:
        """What people call the training: `CGD`, or a variant's name such as `cgd-shuffled`."""
        return self.name or self.objective

    @property
    def stage(self) -> StageName:
        return train_stage(self.title)

    @property
    def scores(self) -> StageName | None:
        """The stage with the log-probabilities of stored texts that the training learns from; None: it needs none."""
        match self.objective:
            case "SupervisedKD":
                return score_stage(self.texts or "refined")
            case "GKD" if self.on_policy is None or self.on_policy.share < 1:
                return score_stage("refined")
            case "ContextDistillation":
                return score_stage(self.title)
            case _:
                return None

    @property
    def rollouts(self) -> StageName | None:
        """The stage with what the training's own student samples; None: it samples nothing."""
        return rollout_stage(self.title) if self.on_policy else None

    @property
    def scored_rollouts(self) -> StageName | None:
        """The stage with the teacher's log-probabilities of these samples."""
        return score_stage(self.title) if self.on_policy else None


class Train(Upkeep, Course, Lesson):  # pydantic takes the fields of the last base first
    """Supervised fine-tuning of the student on the stored rows."""

    validation: Validation = Validation()
    early: Early | None = None
    """None: no question is asked before the training has ended."""
    max_rejected: float
    common_rows: bool = False
    """Leave out the rows that check leaves out: for every training alike, so that trainings can be compared."""
