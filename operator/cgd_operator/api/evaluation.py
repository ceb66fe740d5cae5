"""What the trained student is measured on, and against what."""

import json
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from cgd_operator.api.benchmarks import BENCHMARKS, EXECUTED, TASKS
from cgd_operator.api.fields import FILE, NOT_MEAN, BenchmarkName, S3Uri, Text, rules
from cgd_operator.api.generation import SourceUri
from cgd_stages.contract import DRAWS, TOLERANCE, BenchmarkFields, Contract, EarlyLook, Positive, Rival, Sampling

_KNOWN_NAME = f"self.name in {json.dumps(list(BENCHMARKS))}"
SOURCELESS_RULE = (
    f"has(self.source) || {_KNOWN_NAME}",
    f"a benchmark needs a source, or one of the names that are known: {', '.join(BENCHMARKS)}",
)
GRADED_RULE = (
    f"has(self.fields) ? has(self.fields.reference) || has(self.fields.messages) : {_KNOWN_NAME}",
    "a benchmark needs fields.reference, or fields.messages with a last assistant turn",
)


class Benchmark(Contract):
    """Questions with reference answers. The model sees the question and the instruction alone.

    The operator knows MATH-500, GSM8K, Minerva, OlympiadBench, AMC23, AIME24, AIME25 and TheoremQA by their names, and
    fills in the fields that you leave out: for a mirror, set the source alone.
    """

    model_config = ConfigDict(json_schema_extra=rules(SOURCELESS_RULE, GRADED_RULE))

    name: BenchmarkName = Field(description="The name in the report and in commands.")
    source: SourceUri | None = Field(
        None, description="One file, or several that a * stands for; default: the known benchmark on the hub."
    )
    fields: BenchmarkFields | None = Field(
        None, description="The names of the columns; default: the known benchmark's."
    )
    limit: Positive | None = Field(None, description="The most questions that are asked: the first ones.")
    instruction: str | None = Field(
        None,
        max_length=2000,
        description="A text that follows every question after a blank line. By default a known benchmark asks for the "
        "final answer in \\boxed{}, and another one has no instruction.",
    )
    tolerance: Annotated[str, Field(max_length=20, pattern=TOLERANCE)] | None = Field(
        None,
        description='How far an answer may be off a decimal reference: "0.01", or "4%" of the reference. By default as '
        "far as the known benchmark says, and otherwise not at all.",
    )
    samples: int = Field(
        1,
        ge=1,
        le=256,
        description="How often the model answers each question. Accuracy is the mean, and the report tells Pass@k for "
        "k up to this. More than 1 needs evaluation.sampling.temperature above 0.",
    )

    @model_validator(mode="after")
    def _known_or_whole(self) -> "Benchmark":
        if self.source is None and self.name not in BENCHMARKS:
            raise ValueError(SOURCELESS_RULE[1])
        fields = self.fields
        if fields.reference is None and fields.messages is None if fields else self.name not in BENCHMARKS:
            raise ValueError(GRADED_RULE[1])
        return self


TASK_RULE = (
    f"self.name in {json.dumps(list(TASKS))} || has(self.metric)",
    f"a task of lm-eval needs a metric, or one of the names that are known: {', '.join(TASKS)}",
)


class Task(Contract):
    """A task that lm-eval asks and grades by its own code. The operator knows IFEval, IFEval-loose, GPQA-Diamond,
    MMLU-Pro, MuSR, TruthfulQA, BBH and HumanEval. Any other task has lm-eval's own name and needs a metric."""

    model_config = ConfigDict(json_schema_extra=rules(TASK_RULE))

    name: Annotated[str, Field(max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"), NOT_MEAN] = Field(
        description="A known name, or the name that lm-eval has for the task."
    )
    metric: Annotated[str, Field(min_length=1, max_length=100)] | None = Field(
        None,
        description="A metric of the task that is right or wrong for every document. The filter follows after a comma: "
        "exact_match,strict-match. Default: the known task's.",
    )
    few_shot: int | None = Field(
        None, ge=0, le=64, description="How many examples stand before each question; default: the task's own number."
    )
    limit: Positive | None = Field(None, description="The most documents of every part of the task: the first ones.")
    own_code: bool = Field(
        False,
        description="Allows the task's definition, below tasks/ in taskData, to name Python functions, metrics that "
        "are programs, and any path or URL as its data. Whoever can write there then runs code in pods that hold this "
        "run's keys. lm-eval's own tasks do not need it.",
    )

    @model_validator(mode="after")
    def _known_or_measured(self) -> "Task":
        if self.metric is None and self.name not in TASKS:
            raise ValueError(TASK_RULE[1])
        return self


SAMPLES_RULE = (
    "double(self.sampling.temperature) > 0.0 || self.benchmarks.all(one, one.samples == 1)",
    "greedy decoding gives the same output every time: set sampling.temperature above 0, or samples to 1",
)

_DRAWS = json.dumps(list(DRAWS))
DRAWN_RULE = (
    f"double(self.sampling.temperature) > 0.0 || self.rivals.all(one, !(one.kind in {_DRAWS}))",
    "greedy decoding gives the same output every time: Majority and BestOfN need sampling.temperature above 0",
)
RIVALS_RULE = (
    f"self.rivals.all(one, one.kind in {_DRAWS} ? one.rounds == 1 : !has(one.samples))",
    "rounds belong to SelfRefine and Reflexion, samples to Majority and BestOfN",
)

_EXECUTED_NAMES = [*EXECUTED, *(name for name, known in TASKS.items() if known.task in EXECUTED)]
EXECUTION_RULE = (
    f"self.executeCode || self.tasks.all(one, !(one.name in {json.dumps(_EXECUTED_NAMES)}))",
    "HumanEval executes what the model writes: set executeCode to true to have it done, in a sandbox",
)


class Evaluation(Contract):
    """What the models are measured on. Without it the run ends after training, with a report."""

    model_config = ConfigDict(json_schema_extra=rules(SAMPLES_RULE, DRAWN_RULE, RIVALS_RULE, EXECUTION_RULE))

    benchmarks: tuple[Benchmark, ...] = Field(
        min_length=1,
        max_length=32,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        description="The benchmarks that every model is asked.",
    )
    models: tuple[Literal["base", "trained"], ...] = Field(
        ("base", "trained"),
        min_length=1,
        max_length=2,
        json_schema_extra={"x-kubernetes-list-type": "set"},
        description="Which models are measured: the untrained student (base), and the trained ones.",
    )
    rivals: tuple[Rival, ...] = Field(
        (),
        max_length=4,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["kind"]},
        description="Methods to compare with. Each is evaluated like a model, in a stage of its own, and the tokens of "
        "all its passes count.",
    )
    sampling: Sampling = Field(Sampling(), description="How the models write their answers to the benchmarks.")
    tasks: tuple[Task, ...] = Field(
        (),
        max_length=32,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        description="General benchmarks, such as instruction following, which show what training costs elsewhere. "
        "Every model gets one more stage for them.",
    )
    execute_code: bool = Field(
        False,
        description="Allows tasks that execute what the model writes (HumanEval). The code runs in the stage's pod, "
        "without network, files, environment or other processes. The nodes need Landlock (Linux 5.13 or newer).",
    )
    task_data: Annotated[S3Uri, Text("^s3://[^/]+/.+", "write s3://bucket/folder")] | None = Field(
        None,
        description="An s3:// folder for clusters without the hub. It holds a copy of the HF_HOME of a machine on "
        "which the tasks have run once. Default: the hub.",
    )
    audit: int = Field(
        0,
        ge=0,
        le=200,
        description="How many outputs of each benchmark and model lm-eval judges again, half of them right and half "
        "wrong where there are enough of both. The report shows where it disagrees with the grades. 0: none.",
    )
    early: EarlyLook | None = Field(
        None,
        description="Asks every student in training a few questions of the benchmarks, the prompt alone and greedily: "
        "before the first step and after 10, 25 and 50 % of the steps. It shows early whether a training transfers. {} "
        "takes the defaults.",
    )
    published: Annotated[S3Uri, Text(FILE, "write s3://bucket/key or configmap://name/key")] | None = Field(
        None,
        description="A JSON file with figures that others have published: the report shows them beside the run's own. "
        "prepare refuses a file with an unknown benchmark or method. It is no part of what the run makes but for the "
        "report.",
    )

    @model_validator(mode="after")
    def _samples_differ(self) -> "Evaluation":
        if self.sampling.temperature == 0 and any(one.samples > 1 for one in self.benchmarks):
            raise ValueError(SAMPLES_RULE[1])
        if self.sampling.temperature == 0 and any(one.kind in DRAWS for one in self.rivals):
            raise ValueError(DRAWN_RULE[1])
        if any(one.rounds > 1 if one.kind in DRAWS else one.samples for one in self.rivals):
            raise ValueError(RIVALS_RULE[1])
        if not self.execute_code and any(one.name in _EXECUTED_NAMES for one in self.tasks):
            raise ValueError(EXECUTION_RULE[1])
        return self
