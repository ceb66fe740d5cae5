"""The task of a child: the work of each stage program, and where it reads and writes."""

from typing import Annotated, Any, Literal

from pydantic import Field

from cgd_stages.contract.base import Contract, Positive, StageName
from cgd_stages.contract.models import Chat, Endpoint, Engine, Model, Sampling
from cgd_stages.contract.sources import Benchmark, Decontaminate, Prompts
from cgd_stages.contract.training import InstructionTurn, Learned, Lesson, Supervised, Train

FORMAT: Literal[2] = 2
"""Version of the stored rows, prompts and markers. It is part of every digest: raising it starts new folders."""
Role = Literal["answer", "critique", "refine", "distill", "miscritique", "misrefine"]
"""The text that a model is asked for. `distill`: the teacher's own answer to the prompt alone. `miscritique`: a wrong
critique, which defends the opposite verdict of the row's own; `misrefine`: the refinement that follows from it."""
Unfinished = Literal["keep", "reject"]
"""What becomes of an answer that has a text and no end, because maxTokens has cut it or it loops."""
Select = Literal["first", "shortest-right", "all-right"]
"""Which of several refinements of an answer are learned; see `quality.selection`."""
Keep = Literal["all", "right", "one-right"]
"""Which rows are learned, by the grade of their refinement; see `quality.selection`."""
RivalKind = Literal["SelfRefine", "Reflexion", "Majority", "BestOfN"]
DRAWS: tuple[RivalKind, ...] = ("Majority", "BestOfN")
"""The rivals that draw several answers to a question and choose one of them."""


def settings_of(role: Role) -> str:
    """The field of spec.generation that says how a role's texts are written."""
    return {"miscritique": "critique", "misrefine": "refine"}.get(role, role)


def instructed_as(role: Role) -> Literal["critique", "refine"] | None:
    """The field of spec.generation whose instruction a role is asked with; None: ours is the only one."""
    return {"critique": "critique", "refine": "refine", "misrefine": "refine"}.get(role)  # type: ignore[return-value]


class Instructions(Contract):
    """The teacher's instructions in the manifest's own words: a text, or the place of a file with it."""

    critique: str | None = None
    refine: str | None = None

    @property
    def given(self) -> dict[str, str]:
        """By their fields, those that are there."""
        fields: dict[str, str] = self.model_dump(exclude_none=True)
        return fields

    def of(self, role: Role) -> str | None:
        """The text of a role; None: ours is used."""
        field = instructed_as(role)
        text: str | None = getattr(self, field) if field else None
        return text


class RunRef(Contract):
    namespace: str
    name: str
    uid: str


class Storage(Contract):
    """The folder that holds all runs. Credentials come from the environment (the default chain of the AWS SDK)."""

    uri: str
    """`s3://bucket/prefix`, without a trailing slash."""
    endpoint: str | None = None
    region: str | None = None
    path_style: bool = False
    ca_bundle: str | None = None
    """Path of a PEM file, mounted into the pod."""


class Published(Contract):
    """Published figures that the report shows beside the run's own: the place of their file, and what it may name."""

    uri: str
    """`s3://bucket/key` or `configmap://name/key`."""
    student: str
    """As the manifest names it."""
    benchmarks: tuple[str, ...]
    """The run's benchmarks and tasks, and those that the operator knows by their names."""


class Prepare(Contract):
    """Read, check and store the prompts, and refuse on a CPU what would fail on a GPU later."""

    kind: Literal["prepare"] = "prepare"
    prompts: Prompts
    benchmarks: tuple[Benchmark, ...] = ()
    tasks: "tuple[HarnessTask, ...] | None" = None
    """The tasks of lm-eval that prompts are compared with; None: there are none."""
    task_data: str | None = None
    """Where their definitions and data are, as in `Harness`."""
    student: Model
    student_engine: Engine
    student_chat: Chat = Chat()
    teacher: Model | None = None
    """None if the teacher is an endpoint."""
    teacher_engine: Engine = Engine()
    teacher_chat: Chat = Chat()
    endpoint: Endpoint | None = None
    without_thoughts: tuple[str, ...] | None = None
    """The names of the run's tasks of lm-eval that leave no room for a thought of the student; None: it has no thoughts
    to give, or there are no such tasks."""
    roles: tuple[Role, ...] = ()
    """The texts that the run asks models for."""
    sampling: tuple[Sampling, ...] = ()
    """One for each role."""
    instructions: Instructions | None = None
    """None: ours."""
    evaluation: Sampling | None = None
    """How the models write their answers to benchmarks; None: the run evaluates nothing."""
    max_rejected: float
    training: Train
    """One training of the run. All of them need the same memory."""
    lessons: tuple[Lesson, ...] = ()
    """What each training of the run learns."""
    scores: "tuple[Score, ...] | None" = None
    """What the run has scored; None: nothing."""
    gpu_memory: int | None = None
    """The bytes of each GPU; None if the run has no GPU or does not state its memory."""
    graded_by: tuple[str, ...] | None = None
    """The fields of the run that have its refinements graded; None: none of them."""
    published: Published | None = None
    """Read here too, so that a wrong file is refused at the run's beginning."""


class Fetch(Contract):
    """Keep the run's models in the cluster's cache, whole, before GPUs are asked for."""

    kind: Literal["fetch"] = "fetch"
    models: tuple[Model, ...]
    """Student, teacher and the models that write their drafts; prepare has pinned them."""


class Generate(Contract):
    """Ask a model for the text of each role. Several roles share one warm engine, in this order."""

    kind: Literal["generate"] = "generate"
    roles: tuple[Role, ...]
    sampling: tuple[Sampling, ...]
    """One for each role."""
    instructions: Instructions | None = None
    """None: ours."""
    samples: int = 1
    """How many texts are drawn for each row. A critique is drawn once, and so is a miscritique."""
    unfinished: Unfinished = "reject"
    """Of the role answer; every other role rejects such texts."""
    model: Model | None = None
    endpoint: Endpoint | None = None
    engine: Engine = Engine()
    chat: Chat = Chat()
    shards: int = 1
    max_rejected: float
    """The fraction of a stage's rows that may be rejected before the stage fails."""

    def draws(self, role: Role) -> int:
        """How many texts a role draws for each row that it reads."""
        return 1 if settings_of(role) == "critique" else self.samples


class Score(Contract):
    """Store what a model thinks of stored texts: the log-probabilities of their tokens and of each position's likeliest
    ones, given the context in which an objective learns them."""

    kind: Literal["score"] = "score"
    objective: Supervised
    """Whose examples are scored: it says which context and which text."""
    context: InstructionTurn = "user"
    student: Model
    """It and its chat make the tokens, whichever model scores them."""
    chat: Chat = Chat()
    thinking: Learned = "drop"
    max_sequence_length: int
    model: Model
    """The model that scores."""
    engine: Engine
    top_k: int
    shards: int = 1
    max_rejected: float


class Check(Contract):
    """Make the examples of every training on a CPU, and refuse what would waste a GPU."""

    kind: Literal["check"] = "check"
    trainings: tuple[Train, ...]
    select: Select = "first"
    keep: Keep = "all"
    decontaminate: Decontaminate | None = None
    """What rows are compared with; None: paraphrases are not looked for."""
    min_right_refinements: float | None = None
    """The fraction of the graded refinements that must be right."""


class Rival(Contract):
    """A method to compare with: the base model makes several passes over a question instead of being trained."""

    kind: RivalKind = Field(
        description="The student criticises its own answer, asked in the words that the teacher is asked in. Then it "
        "improves the answer (SelfRefine) or answers anew with its critiques in view (Reflexion). Or it draws several "
        "answers: the one that most of them give counts (Majority, also called self-consistency or maj@n), or the "
        "first one that its own critique finds right (BestOfN)."
    )
    rounds: int = Field(
        1,
        ge=1,
        le=10,
        description="Of SelfRefine and Reflexion: the most rounds; the model stops earlier when a critique finds the "
        "answer right.",
    )
    samples: int | None = Field(
        None,
        ge=2,
        le=64,
        description="Of Majority and BestOfN: how many answers are drawn for each question. Default: 8.",
    )

    @property
    def draws(self) -> int:
        """The answers that are drawn before one is chosen."""
        return (self.samples or 8) if self.kind in DRAWS else 1

    def identity(self) -> dict[str, Any]:
        """Its part of a digest's inputs."""
        chosen = {"samples": self.draws} if self.kind in DRAWS else {"rounds": self.rounds}
        return {"kind": self.kind} | chosen


class Evaluate(Contract):
    """Ask a model each benchmark question by itself, and grade its outputs."""

    kind: Literal["evaluate"] = "evaluate"
    model: Model
    benchmarks: tuple[Benchmark, ...]
    sampling: Sampling
    engine: Engine = Engine()
    chat: Chat = Chat()
    rival: Rival | None = None
    """None: the model answers each question in one pass."""


class HarnessTask(Contract):
    """A task of lm-eval. The report calls it `name`. `metric` is 1 (right) or 0 (wrong) for every document; after a
    comma it may name the filter of lm-eval that reads the outputs."""

    name: str
    task: str
    metric: str
    few_shot: int | None = None
    """None: the task's default."""
    limit: int | None = None
    """The most documents that each part of the task uses."""
    executes: bool = False
    """The model writes a program; it is right if the task's tests pass."""
    own_code: bool = False
    """The task's definition may contain Python code: see `tasks.guard`."""

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
    """An s3:// folder with a copy of an HF_HOME; None: the hub."""
    engine: Engine = Engine()
    chat: Chat = Chat()
    max_tokens: int | None = None
    """The most tokens of a reply with a thought, for which the tasks' own limits leave no room; None: the context's
    end."""


class Report(Contract):
    """Show the whole run on one page. `spec` is the run's spec as YAML, for display."""

    kind: Literal["report"] = "report"
    stages: tuple[StageName, ...]
    """Every stage before this one, in order."""
    spec: str
    student_chat: Chat = Chat()
    """The student's in answer, training and evaluation."""
    teacher_chat: Chat = Chat()
    thinking: Learned = "drop"
    audit: Positive | None = None
    """How many outputs of each benchmark and model lm-eval judges again; None: none."""
    published: Published | None = None


class Clean(Contract):
    """Delete the objects that the run has stored and that no other run claims."""

    kind: Literal["clean"] = "clean"


Work = Annotated[
    Prepare | Fetch | Generate | Score | Check | Train | Evaluate | Harness | Report | Clean,
    Field(discriminator="kind"),
]


class StageTask(Contract):
    """Everything that a stage program needs. `stage` names the child: `teacher` if the teacher's stages are fused."""

    format: Literal[2] = FORMAT
    run: RunRef
    stage: StageName
    storage: Storage
    work: Work
