"""The contract between the operator and the stage programs: a task goes in, progress and last words come out.

This is the one module that both worlds import, so it needs pydantic and nothing else. The operator passes a
`StageTask` as JSON in the environment variable `CGD_TASK`; unknown fields are refused on both sides, so that an
operator and an image of different versions fail loudly and at once.
"""

from enum import IntEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

FORMAT: Literal[2] = 2
"""Version of the stored rows, prompts and markers. It is part of every digest: raising it starts new folders."""

TASK = "CGD_TASK"
"""Environment variable: the task, as JSON."""
INPUTS = "CGD_INPUTS"
"""Environment variable: the folder where `configmap://name/key` is mounted as `name/key`."""
SCRATCH = "CGD_SCRATCH"
"""Environment variable: a writable folder that lives as long as the pod (model cache, checkpoints on their way)."""
TERMINATION_LOG = "CGD_TERMINATION_LOG"
"""Environment variable: the file that takes the last words."""
TEACHER_API_KEY = "CGD_TEACHER_API_KEY"
"""Environment variable: the key of the teacher's endpoint. Never logged, never part of a digest."""
PROGRESS_URL = "KUBEFLOW_TRAINER_SERVER_URL"
"""Environment variable, named as Kubeflow Trainer names it, as are the next two: where to POST `Progress`."""
PROGRESS_CA = "KUBEFLOW_TRAINER_SERVER_CA_CERT"
"""Environment variable: path of the PEM file that the progress server's certificate is checked with, if it has one."""
PROGRESS_TOKEN = "KUBEFLOW_TRAINER_SERVER_TOKEN"  # noqa: S105
"""Environment variable: path of the file that holds the bearer token; read anew for every report."""

LAST_WORDS_LIMIT = 4096
"""Bytes of a termination message that Kubernetes keeps."""


class Exit(IntEnum):
    """What a program's exit code asks of the controllers. Every code that is not listed is retried."""

    DONE = 0
    PERMANENT = 3
    """The user must change something; a retry would fail the same way."""
    RETRY = 201
    """Worth another try. Above 127, because a PyTorchJob takes 1-127 as permanent."""
    INTERRUPTED = 143
    """SIGTERM: everything finished so far is stored."""


class Contract(BaseModel):
    """Strict and frozen; camelCase on the wire, snake_case in Python."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True)

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, exclude_none=True)


class RunRef(Contract):
    namespace: str
    name: str
    uid: str


class Storage(Contract):
    """Where everything is kept. Credentials come from the environment (the default chain of the AWS SDK)."""

    uri: str
    """`s3://bucket/prefix`, without a trailing slash."""
    endpoint: str | None = None
    region: str | None = None
    path_style: bool = False
    ca_bundle: str | None = None
    """Path of a PEM file, mounted into the pod."""


class Model(Contract):
    """A model: a hub id, an `s3://` folder, a path in the image, or `stage://train-cgd`, the output of a stage."""

    name: str
    revision: str | None = None


class Endpoint(Contract):
    """An OpenAI-compatible chat server. Its key, if it wants one, is in `CGD_TEACHER_API_KEY`."""

    url: str
    model: str
    max_concurrency: int = 64


class Fields(Contract):
    """Names of the columns in a source of prompts."""

    prompt: str = "prompt"
    reference: str | None = None

    @property
    def columns(self) -> list[str]:
        """All that are named."""
        return list(self.model_dump(exclude_none=True).values())


class BenchmarkFields(Fields):
    """The columns of a benchmark. Rows may lack the last two."""

    context: str | None = None
    """Text that stands before the question."""
    tolerance: str | None = None
    """How far an answer may be off, as a number or text."""


class Source(Contract):
    """Rows in JSON lines or Parquet: `s3://bucket/key`, `hf://datasets/owner/name@revision/path` (in both, `*` is
    allowed in the last part) or `configmap://name/key`."""

    source: str
    fields: Fields = Fields()
    limit: int | None = None
    """Rows to take at most: the first ones that can be used."""


class Decontaminate(Contract):
    """Remove prompts that share `ngram` words in a row with a question of these benchmarks."""

    against: tuple[str, ...]
    ngram: int


class Prompts(Source):
    """The rows to learn from. With a seed, `limit` of them are drawn evenly from the whole source."""

    seed: int | None = None
    decontaminate: Decontaminate | None = None


class Benchmark(Source):
    """Questions with reference answers. `instruction` follows the question after a blank line."""

    name: str
    fields: BenchmarkFields = BenchmarkFields()
    instruction: str = ""
    tolerance: str | None = None
    """How far answers to decimal references may be off: `0.01`, or `4%` of the reference. None: not at all."""
    questions: int | None = None
    """How many the benchmark is known to have."""
    samples: int = 1
    """Outputs of every question; more than one need a temperature."""


class Sampling(Contract):
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Engine(Contract):
    """Arguments of the vLLM engine; what is None is left to `engines`, which knows the hardware, or to the model."""

    max_model_len: int | None = None
    tensor_parallel: int = 1
    dtype: str = "auto"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float | None = None


Role = Literal["answer", "critique", "refine", "distill"]
"""What a model is asked for. `distill`: the teacher's own answer to the prompt alone."""

Objective = Literal["CGD", "CFT", "DistilledSFT", "SFT", "RefinedSFT"]
"""What a student is conditioned on and what it learns: the table is `examples.conversation`."""


def train_stage(objective: Objective) -> str:
    """Name of the stage that trains an objective."""
    return f"train-{objective.lower()}"


RivalKind = Literal["SelfRefine", "Reflexion"]
CritiqueKind = Literal["matched", "shuffled", "generic", "none", "corrupted"]
"""What stands in the critique's place when CGD is trained: see `examples.critic`."""


class Generate(Contract):
    """Ask a model for what its roles are. Several roles share one warm engine, in this order."""

    kind: Literal["generate"] = "generate"
    roles: tuple[Role, ...]
    sampling: tuple[Sampling, ...]
    """One for each role."""
    model: Model | None = None
    endpoint: Endpoint | None = None
    engine: Engine = Engine()
    shards: int = 1
    max_rejected: float
    """Fraction of a stage's rows that may be rejected before the stage fails."""


class Critique(Contract):
    """The critique that training is conditioned on. `rate`: the fraction of rows that `corrupted` gives a wrong one."""

    kind: CritiqueKind = "matched"
    rate: float = 0.0


class Validation(Contract):
    """The loss on prompts that are held out of training. `fraction` None: of large runs (training.validation_split)."""

    fraction: float | None = None
    every_steps: int = 200
    select: Literal["best", "last"] = "best"


class Train(Contract):
    """Supervised fine-tuning of the student on the stored rows."""

    kind: Literal["train"] = "train"
    objective: Objective = "CGD"
    critique: Critique = Critique()
    """Of the objective CGD; the others have it matched."""
    student: Model
    workers: int = 1
    processes_per_worker: int = 1
    epochs: int = 1
    global_batch_size: int
    learning_rate: float
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    max_sequence_length: int
    packing: bool = False
    zero_stage: Literal[0, 1, 2, 3] = 2
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    activation_checkpointing: Literal["auto", "always", "never"] = "auto"
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What the host's memory holds instead of the GPU's; parameters: both."""
    checkpoint_every_steps: int
    keep_checkpoints: int = 2
    validation: Validation = Validation()
    stop_on_loss_spike: bool = True
    seed: int = 0
    max_rejected: float


CHECKPOINT_BYTES = "checkpoint_bytes"
"""Metric of prepare's last words: bytes of a checkpoint on the node that stores most of it."""


class Prepare(Contract):
    """Read, check and store the prompts; refuse here what would fail on a GPU later."""

    kind: Literal["prepare"] = "prepare"
    prompts: Prompts
    benchmarks: tuple[Benchmark, ...] = ()
    student: Model
    student_engine: Engine
    teacher: Model | None = None
    """None when the teacher is an endpoint."""
    teacher_engine: Engine = Engine()
    endpoint: Endpoint | None = None
    max_rejected: float
    training: Train
    """One of the run's; all are laid out alike."""
    gpu_memory: int | None = None
    """Bytes of each GPU; None: the run does not say, or has none."""


class Check(Contract):
    """Make the examples of every training on a CPU, and refuse there what would waste a GPU."""

    kind: Literal["check"] = "check"
    trainings: tuple[Train, ...]
    min_right_refinements: float | None = None
    """Fraction of the graded refinements that must be right."""


class Rival(Contract):
    """A method that lets the base model make more than one pass."""

    kind: RivalKind
    rounds: int = Field(ge=1)


class Evaluate(Contract):
    """Give a model every benchmark question alone, and grade what it says."""

    kind: Literal["evaluate"] = "evaluate"
    model: Model
    benchmarks: tuple[Benchmark, ...]
    sampling: Sampling
    engine: Engine = Engine()
    rival: Rival | None = None
    """None: one pass."""


class HarnessTask(Contract):
    """A task of lm-eval. `name` is what the report calls it; `metric` is right or wrong (1 or 0) for every document,
    with the filter that it is read through after a comma, if there is one."""

    name: str
    task: str
    metric: str
    few_shot: int | None = None
    """None: as many as the task has by itself."""
    limit: int | None = None
    """Documents of every part of the task."""
    executes: bool = False
    """What the model writes is a program, which is right when it ends well with the task's tests."""
    own_code: bool = False
    """Its definition may bring code of its own, see harness.task_guard."""

    @property
    def measure(self) -> str:
        return self.metric.partition(",")[0]

    @property
    def filter(self) -> str:
        return self.metric.partition(",")[2]


class Harness(Contract):
    """Evaluate a model on tasks of lm-eval."""

    kind: Literal["harness"] = "harness"
    model: Model
    tasks: tuple[HarnessTask, ...]
    data: str | None = None
    """s3:// folder with a copy of an HF_HOME; None: the hub."""
    engine: Engine = Engine()


class Report(Contract):
    """Tell the whole run on one page. `spec` is the run's own, as YAML, for display."""

    kind: Literal["report"] = "report"
    stages: tuple[str, ...]
    """Every stage before this one, in order."""
    spec: str


class Clean(Contract):
    """Delete what the run has stored and no other run claims."""

    kind: Literal["clean"] = "clean"


Work = Annotated[Prepare | Generate | Check | Train | Evaluate | Harness | Report | Clean, Field(discriminator="kind")]


class StageTask(Contract):
    """All a stage program is told. `stage` names the child: `teacher` for a fused teacher, else the stage itself."""

    format: Literal[2] = FORMAT
    run: RunRef
    stage: str
    storage: Storage
    work: Work


MOST = 10**15
"""No number that a pod tells is larger: a sum over its pods and stages is an integer of 64 bits."""
Count = Annotated[int, Field(ge=0, le=MOST)]
Measure = Annotated[float, Field(ge=0, le=MOST)]
"""Neither infinite nor NaN, which no bound holds for."""


class Rows(Contract):
    """Rows of a stage (or of one shard of it): total = done + rejected when it has ended."""

    total: Count = 0
    done: Count = 0
    rejected: Count = 0


LENGTH = "length_to_"
"""A metric's name: this and a power of two; its value: examples of at most so many tokens, and of more than half."""


class StageFacts(Contract):
    """What a program knows about one stage at its end; of one shard where the stage has several."""

    rows: Rows = Rows()
    prompt_tokens: Count = 0
    generated_tokens: Count = 0
    seconds: Measure = 0.0
    digest: str = ""
    output_uri: str = Field(default="", alias="outputURI")
    metrics: dict[str, float] = {}
    """Whatever is worth telling. Names that begin with LENGTH and end in a number are a histogram."""


class LastWords(Contract):
    """The termination message of a pod: JSON, at most `LAST_WORDS_LIMIT` bytes."""

    outcome: Literal["done", "failed", "interrupted"]
    stages: dict[str, StageFacts] = {}
    error: str = ""
    """Class of the error."""
    message: str = ""
    hint: str = ""
    """What to change, and who must."""


class Metric(Contract):
    name: str
    value: str


class TrainerStatus(Contract):
    """The status that Kubeflow Trainer's server takes, as transformers reports it by itself."""

    model_config = ConfigDict(extra="ignore")

    progress_percentage: Annotated[int, Field(ge=0, le=100)] | None = None
    estimated_remaining_seconds: Count | None = None
    metrics: tuple[Metric, ...] = ()
    last_updated_time: str | None = None


class Progress(Contract):
    """Body of a progress report. A report without a stage (transformers' own) counts for the child's first stage."""

    trainer_status: TrainerStatus
    stage: str | None = None
    shard: Annotated[int, Field(ge=0)] = 0
    rows: Rows | None = None
    tokens_per_second: Measure | None = None


class ProgressAnswer(Contract):
    """What the operator answers to a report."""

    next_report_seconds: float = 0
    """The next report is wanted after so long, or as soon as a stage begins or is through."""
