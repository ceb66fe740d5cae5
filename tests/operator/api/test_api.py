"""What a user may write, and what is answered to what he may not."""

from typing import Any

import pytest
from support.builders import manifest

from cgd_operator.api.spec import CGDRunSpec, InvalidRun, parse_spec


def nested(value: Any, levels: int) -> Any:
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    "changes",
    [{"training.objectives": ["x" * 5000]}, {"teacher.chat.templateKwargs": nested("x" * 5000, 400)}],
    ids=["long", "nested"],
)
def test_a_large_wrong_value_is_shown_in_part(changes: dict[str, Any]) -> None:
    """Several conditions of a status repeat the message."""
    with pytest.raises(InvalidRun, match="it is '") as refused:
        parse_spec(manifest(changes))
    assert len(str(refused.value)) < 1000


def test_a_short_manifest_gets_the_papers_defaults() -> None:
    spec = parse_spec(manifest())
    assert spec.training.learning_rate == 1e-6
    assert spec.training.global_batch_size == 64
    assert spec.training.epochs == 1
    assert spec.generation.answer.max_tokens == 16384
    assert spec.generation.answer.temperature == 0
    assert spec.teacher.fused


@pytest.mark.parametrize(
    ("path", "value", "field", "mend"),
    [
        ("studnet", {}, "spec.studnet", "there is no such field"),
        ("training.learningrate", "1e-6", "spec.training.learningrate", "kubectl explain cgdrun.spec.training"),
        ("training.learningRate", 1e-6, "spec.training.learningRate", 'write it in quotes: "1e-06"'),
        ("training.learningRate", "0", "spec.training.learningRate", "above 0"),
        ("training.learningRate", "fast", "spec.training.learningRate", 'in quotes: "0.5"'),
        ("training.epochs", 1.5, "spec.training.epochs", "integer"),
        ("training.epochs", 0, "spec.training.epochs", "greater than or equal to 1"),
        (
            "evaluation.published",
            "hf://datasets/a/b.json",
            "spec.evaluation.published",
            "write s3://bucket/key or conf",
        ),
        ("training.zeroStage", 4, "spec.training.zeroStage", "less than or equal to 3"),
        ("training", {"offload": "parameters", "zeroStage": 2}, "spec.training", "set zeroStage to 3 for parameters"),
        ("training", {"offload": "optimizer", "zeroStage": 0}, "spec.training", "to 1 or more for the optimizer"),
        ("training.adapter", {"rank": 0}, "spec.training.adapter.rank", "greater than or equal to 1"),
        ("training.adapter", {"rank": 513}, "spec.training.adapter.rank", "less than or equal to 512"),
        ("training.adapter", {"dropout": "0.9"}, "spec.training.adapter.dropout", "from 0 to 0.5"),
        ("training.adapter", {"targets": ["q proj"]}, "spec.training.adapter.targets.0", "should match pattern"),
        ("training.adapter", {"initLoraWeights": "pissa"}, "spec.training.adapter.initLoraWeights", "no such field"),
        ("training.globalBatchSize", 4, "spec.training", "raise globalBatchSize"),
        ("training.objectives", ["CDG"], "spec.training.objectives.0", "'CGD'"),
        ("training.objectives", ["CGD", "CGD"], "spec.training", "objectives: name each of them once"),
        ("training.objectives", [], "spec.training", "there is nothing to learn: name an objective or a variant"),
        ("training.variants", [{"kind": "CGD"}], "spec.training.variants.0.name", "is required"),
        ("training.variants", [{"name": "x", "kind": "GCD"}], "spec.training.variants.0.kind", "'CGD'"),
        ("training.variants", [{"name": "CGD-x", "kind": "CGD"}], "spec.training.variants.0.name", "small letters"),
        ("training.variants", [{"name": "x-", "kind": "CGD"}], "spec.training.variants.0.name", "no hyphen last"),
        ("training.variants", [{"name": "x" * 25, "kind": "CGD"}], "spec.training.variants.0.name", "at most 24"),
        ("training.variants", [{"name": "cft", "kind": "CGD"}], "spec.training.variants.0", "take another one"),
        ("training.variants", [{"name": "base", "kind": "CGD"}], "spec.training.variants.0", "take another one"),
        ("training.variants", [{"name": "x", "kind": "CGD"}] * 2, "spec.training", "variants: name each of them once"),
        (
            "training.variants",
            [{"name": "x", "kind": "CFT", "bareShare": "0.5"}],
            "spec.training.variants.0",
            "for the kind CGD: remove them",
        ),
        (
            "training.variants",
            [{"name": "x", "kind": "SFT", "context": "system"}],
            "spec.training.variants.0",
            "for the kinds CGD and CFT",
        ),
        (
            "training.variants",
            [{"name": "x", "kind": "CGD", "critique": {"kind": "corrupted"}}],
            "spec.training.variants.0.critique",
            "needs a rate",
        ),
        (
            "training.variants",
            [{"name": "x", "kind": "CGD", "learningRate": 1e-5}],
            "spec.training.variants.0.learningRate",
            "in quotes",
        ),
        ("training.bareShare", "1.5", "spec.training.bareShare", "from 0 to 1"),
        ("training", {"objectives": ["SFT"], "bareShare": "0.5"}, "spec.training", "or leave bareShare out"),
        ("training.context", "assistant", "spec.training.context", "'system'"),
        ("generation.answer.unfinished", "drop", "spec.generation.answer.unfinished", "'reject'"),
        ("generation.refine.unfinished", "keep", "spec.generation.refine.unfinished", "no such field"),
        ("training.critique", {"kind": "corrupted"}, "spec.training.critique", "needs a rate"),
        ("training.critique", {"kind": "shuffled", "rate": "0.3"}, "spec.training.critique", "no other kind has one"),
        ("training.critique", {"kind": "miscritique", "target": "kept"}, "spec.training.critique", "needs a rate"),
        ("training.critique", {"kind": "miscritique", "rate": "1"}, "spec.training.critique", "needs a target"),
        (
            "training.critique",
            {"kind": "corrupted", "rate": "0.5", "target": "kept"},
            "spec.training.critique",
            "a miscritique needs a target, kept or refined, and no other kind has one",
        ),
        (
            "training.critique",
            {"kind": "miscritique", "rate": "1.5", "target": "kept"},
            "spec.training.critique.rate",
            "at most 1",
        ),
        (
            "training.critique",
            {"kind": "miscritique", "rate": "1", "target": "wrong"},
            "spec.training.critique.target",
            "'refined'",
        ),
        ("training.validation", {"fraction": "0", "select": "bare"}, "spec.training.validation", "hold out a fraction"),
        ("training.validation", {"select": "best"}, "spec.training.validation.select", "best is called context now"),
        ("training.validation", {"select": "first"}, "spec.training.validation.select", "'context'"),
        ("training.validation", {"fraction": "0.6"}, "spec.training.validation.fraction", "from 0 to 0.5"),
        ("training.critique", {"kind": "corrupted", "rate": "0"}, "spec.training.critique.rate", "above 0"),
        ("training", {"objectives": ["CFT"], "critique": {"kind": "none"}}, "spec.training", "add CGD to objectives"),
        ("generation.maxRejected", "2", "spec.generation.maxRejected", "%"),
        ("generation.answer.topP", "1.5", "spec.generation.answer.topP", "at most 1"),
        ("generation.answer.temperature", "3", "spec.generation.answer.temperature", "from 0.01 to 2, or 0"),
        ("generation.answer.temperature", "1e-400", "spec.generation.answer.temperature", "write a number"),
        ("training.learningRate", "1e400", "spec.training.learningRate", "write a number"),
        (
            "evaluation.benchmarks",
            [{"name": "AIME24", "tolerance": "1e400"}],
            "spec.evaluation.benchmarks.0.tolerance",
            "write how far",
        ),
        (
            "evaluation.benchmarks",
            [{"name": "mean"}],
            "spec.evaluation.benchmarks.0.name",
            "the column of the average",
        ),
        ("generation.answer.temperature", "0.001", "spec.generation.answer.temperature", "from 0.01 to 2, or 0"),
        ("teacher.model", None, "spec.teacher", "exactly one of model"),
        ("teacher.endpoint", {"url": "http://t", "model": "m"}, "spec.teacher", "exactly one of model"),
        ("prompts.source", "http://host/file", "spec.prompts.source", "s3://bucket/key"),
        ("prompts.source", "configmap://only-a-name", "spec.prompts.source", "configmap://name/key"),
        ("prompts.limit", 0, "spec.prompts.limit", "greater than or equal to 1"),
        ("prompts.source", "hf://datasets/only-a-name", "spec.prompts.source", "hf://datasets/owner/name/path"),
        ("prompts.source", "hf://datasets/owner/name", "spec.prompts.source", "hf://datasets/owner/name/path"),
        ("prompts.seed", 1, "spec.prompts", "set limit as well"),
        ("generation.answer", {"samples": 4}, "spec.generation.answer", "set temperature above 0, or samples to 1"),
        ("generation.refine", {"samples": 2, "temperature": "0"}, "spec.generation.refine", "set temperature above 0"),
        ("generation.critique", {"samples": 2}, "spec.generation.critique.samples", "no such field"),
        ("generation.refine.select", "best", "spec.generation.refine.select", "'shortest-right'"),
        ("training.keep", "wrong", "spec.training.keep", "'one-right'"),
        ("prompts.decontaminate", {"ngram": 4}, "spec.prompts.decontaminate.ngram", "greater than or equal to 5"),
        ("prompts.decontaminate", {"similarity": "0.5"}, "spec.prompts.decontaminate", "set paraphrases as well"),
        (
            "prompts.decontaminate",
            {"paraphrases": "drop"},
            "spec.prompts.decontaminate.paraphrases",
            "'keep' or 'remove'",
        ),
        (
            "prompts.decontaminate",
            {"paraphrases": "keep", "similarity": "0.2"},
            "spec.prompts.decontaminate.similarity",
            "from 0.3 to 1",
        ),
        ("prompts.nearDuplicates", "drop", "spec.prompts.nearDuplicates", "'keep' or 'remove'"),
        ("prompts.decontaminate", {"against": ["arithmetics"]}, "spec", "takes names of evaluation.benchmarks"),
        ("budget", {}, "spec.budget", "gpuHours, deadlineSeconds or both"),
        ("budget.gpuHours", 400, "spec.budget.gpuHours", 'write it in quotes: "400"'),
        (
            "podMetadata.annotations",
            {"account": 123456789012},
            "spec.podMetadata.annotations.account",
            '"123456789012"',
        ),
        ("podMetadata.annotations", {"inject": False}, "spec.podMetadata.annotations.inject", "or false; write it in"),
        ("podMetadata.annotations", {"inject": False}, "spec.podMetadata.annotations.inject", ': "false"'),
        ("generation.maxRejected", "200%", "spec.generation.maxRejected", 'from 0 to 100, in quotes: "2%"'),
        ("training.learningRate", "-1e-6", "spec.training.learningRate", "is not negative"),
        ("budget.gpuHours", "0", "spec.budget.gpuHours", "above 0"),
        ("budget.deadlineSeconds", 0, "spec.budget.deadlineSeconds", "greater than or equal to 1"),
        ("placement.gpuMemory", "80GB", "spec.placement.gpuMemory", '"80Gi" or "80G"'),
        ("placement.gpuMemory", "0Gi", "spec.placement.gpuMemory", '"80Gi" or "80G"'),
        ("placement", {"gpuMemory": "80Gi", "accelerator": "none"}, "spec.placement", "leave one of them out"),
        ("placement.cpu.resources", {"limits": {"cpu": "a lot"}}, "spec.placement.cpu.resources.limits.cpu", "64Gi"),
        ("placement.cpu.resources", {"limits": {"cpu": -1}}, "spec.placement.cpu.resources.limits.cpu", "64Gi"),
        ("placement.cpu.resources", {"limits": "all"}, "spec.placement.cpu.resources.limits", "an object"),
        ("evaluation.audit", 201, "spec.evaluation.audit", "less than or equal to 200"),
        ("training.stopUnless", {}, "spec", "set evaluation.early"),
        ("training.stopUnless", {"after": "0"}, "spec.training.stopUnless.after", "above 0 and at most 1"),
        ("training.stopUnless", {"gain": "-0.1"}, "spec.training.stopUnless.gain", "is not negative"),
        ("evaluation.early", 64, "spec.evaluation.early", "an object"),
        ("evaluation.early", {"questions": 0}, "spec.evaluation.early.questions", "greater than or equal to 1"),
        ("evaluation.audit", -1, "spec.evaluation.audit", "greater than or equal to 0"),
        ("evaluation.tasks", [{"name": "gsm8k"}], "spec.evaluation.tasks.0", "needs a metric, or one of the names"),
        ("evaluation.tasks", [{"name": "a b", "metric": "m"}], "spec.evaluation.tasks.0.name", "pattern"),
        ("placement.cpu.resources", {"limit": {}}, "spec.placement.cpu.resources.limit", "no such field"),
        ("placement.schedulingPolicy", {}, "spec.placement.schedulingPolicy.gang", "is required"),
        ("placement.schedulingPolicy", {"gang": "yes"}, "spec.placement.schedulingPolicy.gang", "'volcano'"),
        (
            "placement.schedulingPolicy",
            {"gang": "coscheduling", "queue": "q"},
            "spec.placement.schedulingPolicy",
            "leave it out for coscheduling",
        ),
        ("storage.uri", "bucket/prefix", "spec.storage.uri", "s3://bucket/prefix"),
        ("storage.uri", "s3://b/prefix", "spec.storage.uri", "name of 3 or more"),
        ("storage.endpoint", "localhost:9000", "spec.storage.endpoint", "https://host:port"),
        ("storage", None, "spec.storage", "is required"),
        ("student", None, "spec.student", "is required"),
        ("student.model", "", "spec.student.model", "at least 1 character"),
        ("student.tensorParallel", "8", "spec.student.tensorParallel", "integer"),
    ],
)
def test_a_wrong_field_is_named_with_its_mend(path: str, value: Any, field: str, mend: str) -> None:
    with pytest.raises(InvalidRun) as refused:
        parse_spec(manifest({path: value}))
    lines = [line for line in str(refused.value).splitlines() if line.startswith(f"{field}:")]
    assert lines, str(refused.value)
    assert mend in lines[0]


def test_every_wrong_field_is_told_at_once() -> None:
    with pytest.raises(InvalidRun) as refused:
        parse_spec(manifest({"storage": None, "student": None, "typo": 1}))
    assert len(str(refused.value).splitlines()) == 3


def test_what_only_follows_from_an_error_is_not_told() -> None:
    wrong = {"name": "[/INST]", "source": "s3://data/b.jsonl", "fields": {"reference": "a"}, "typo": 1}
    with pytest.raises(InvalidRun) as refused:
        parse_spec(manifest({"evaluation.benchmarks": [wrong]}))
    name, typo = str(refused.value).splitlines()
    assert name.startswith("spec.evaluation.benchmarks.0.name: write at most 40 letters, digits and hyphens")
    assert typo.startswith("spec.evaluation.benchmarks.0.typo: there is no such field")
    assert "`kubectl explain cgdrun.spec.evaluation.benchmarks`" in typo


def test_a_benchmark_without_reference_answers_cannot_be_graded() -> None:
    bare = {"name": "b", "source": "s3://data/b.jsonl"}
    with pytest.raises(InvalidRun, match=r"a benchmark needs fields\.reference"):
        parse_spec(manifest({"evaluation.benchmarks": [bare]}))


def test_a_benchmark_without_a_source_must_be_known_by_its_name() -> None:
    known = parse_spec(manifest({"evaluation.benchmarks": [{"name": "MATH-500"}, {"name": "AIME25", "samples": 1}]}))
    assert known.evaluation
    with pytest.raises(InvalidRun, match="one of the names that are known: MATH-500, GSM8K, Minerva"):
        parse_spec(manifest({"evaluation.benchmarks": [{"name": "math-500", "fields": {"reference": "a"}}]}))
    with pytest.raises(InvalidRun, match=r"a benchmark needs fields\.reference"):
        parse_spec(manifest({"evaluation.benchmarks": [{"name": "MATH-500", "fields": {"prompt": "q"}}]}))


def test_a_benchmark_is_not_sampled() -> None:
    sampled = {"name": "b", "source": "s3://data/b.jsonl", "fields": {"reference": "a"}, "limit": 3, "seed": 1}
    with pytest.raises(InvalidRun, match=r"spec\.evaluation\.benchmarks\.0\.seed: there is no such field"):
        parse_spec(manifest({"evaluation.benchmarks": [sampled]}))


@pytest.mark.parametrize("task", [{"name": "HumanEval"}, {"name": "humaneval", "metric": "pass@1"}])
def test_what_a_model_writes_is_executed_only_where_that_is_allowed(task: dict[str, Any]) -> None:
    tasks: dict[str, Any] = {"evaluation.tasks": [{"name": "IFEval"}, task]}
    with pytest.raises(InvalidRun, match=r"spec\.evaluation: HumanEval executes .* set executeCode to true"):
        parse_spec(manifest(tasks))
    spec = parse_spec(manifest(tasks | {"evaluation.executeCode": True}))
    assert spec.evaluation
    assert spec.evaluation.execute_code


def test_several_outputs_of_a_question_need_a_temperature() -> None:
    benchmark = {"name": "b", "source": "s3://data/b.jsonl", "fields": {"reference": "a"}, "samples": 4}
    several: dict[str, Any] = {"evaluation.benchmarks": [benchmark]}
    with pytest.raises(InvalidRun, match=r"spec\.evaluation: greedy decoding .* set sampling\.temperature above 0"):
        parse_spec(manifest(several))
    spec = parse_spec(manifest(several | {"evaluation.sampling": {"temperature": "0.7"}}))
    assert spec.evaluation
    assert spec.evaluation.benchmarks[0].samples == 4


@pytest.mark.parametrize("kind", ["Majority", "BestOfN"])
def test_drawing_answers_needs_a_temperature(kind: str) -> None:
    drawn: dict[str, Any] = {"evaluation.rivals": [{"kind": kind, "samples": 4}]}
    with pytest.raises(InvalidRun, match=r"Majority and BestOfN need sampling\.temperature above 0"):
        parse_spec(manifest(drawn))
    spec = parse_spec(manifest(drawn | {"evaluation.sampling": {"temperature": "0.7"}}))
    assert spec.evaluation
    assert [rival.draws for rival in spec.evaluation.rivals] == [4]


@pytest.mark.parametrize("rival", [{"kind": "Majority", "rounds": 2}, {"kind": "SelfRefine", "samples": 4}])
def test_rounds_and_drawn_answers_belong_to_different_rivals(rival: dict[str, Any]) -> None:
    given = {"evaluation.rivals": [rival], "evaluation.sampling": {"temperature": "0.7"}}
    with pytest.raises(InvalidRun, match="rounds belong to SelfRefine and Reflexion, samples to Majority and BestOfN"):
        parse_spec(manifest(given))


def test_decontamination_needs_benchmarks() -> None:
    with pytest.raises(InvalidRun, match="and there must be some"):
        parse_spec(manifest({"prompts.decontaminate": {}, "evaluation": None}))


@pytest.mark.parametrize(
    "source",
    [
        "hf://datasets/owner/name/p.jsonl",
        "hf://datasets/owner/name@v1/data/train-*.parquet",
        "hf://datasets/owner/name@refs/convert/parquet/default/train/*.parquet",
    ],
)
def test_data_sets_on_the_hub_are_sources(source: str) -> None:
    assert parse_spec(manifest({"prompts.source": source})).prompts.source == source


def test_sft_without_reference_answers_is_refused() -> None:
    sft = {"training.objectives": ["CGD", "SFT"]}
    assert parse_spec(manifest(sft)).training.objectives == ("CGD", "SFT")
    with pytest.raises(InvalidRun, match=r"set prompts\.fields\.reference"):
        parse_spec(manifest(sft | {"prompts.fields.reference": None}))


def test_a_spec_survives_a_round_trip() -> None:
    spec = parse_spec(manifest())
    assert CGDRunSpec.model_validate(spec.model_dump(by_alias=True, exclude_none=True, mode="json")) == spec


@pytest.mark.parametrize(
    "choice", [{"training.keep": "right"}, {"training.keep": "one-right"}, {"generation.refine.select": "all-right"}]
)
def test_a_choice_by_grades_needs_references(choice: dict[str, Any]) -> None:
    assert parse_spec(manifest(choice))
    assert parse_spec(manifest(choice | {"prompts.fields": {"messages": "messages"}}))
    with pytest.raises(InvalidRun, match=r"need references to grade with: set prompts\.fields\.reference"):
        parse_spec(manifest(choice | {"prompts.fields.reference": None}))


def test_the_last_assistant_turns_of_conversations_are_references() -> None:
    chats = {"prompts.fields": {"messages": "messages"}, "training.objectives": ["SFT"]}
    assert parse_spec(manifest(chats))
    benchmark = {"name": "b", "source": "s3://data/b.jsonl", "fields": {"messages": "messages"}}
    assert parse_spec(manifest(chats | {"evaluation.benchmarks": [benchmark]}))


@pytest.mark.parametrize("own", [{"seed": 1}, {"temperature": 0}])
@pytest.mark.parametrize("kind", ["refine", "distill"])
def test_a_field_of_an_endpoint_that_makes_all_samples_the_same_is_refused(own: dict[str, Any], kind: str) -> None:
    def spec(samples: int, extra: dict[str, Any]) -> Any:
        endpoint = {"url": "http://t", "model": "m", "extraBody": extra}
        drawn = {"samples": samples, "temperature": "0.7"}
        return parse_spec(manifest({"teacher": {"endpoint": endpoint}, f"generation.{kind}": drawn}))

    with pytest.raises(InvalidRun, match=f"its {next(iter(own))} would make all samples of generation.{kind} the same"):
        spec(2, own)
    spec(1, own)
    spec(2, {"temperature": 1, "seed": None})
