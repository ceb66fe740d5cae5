"""What a user sees: kubectl against the generated definition."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.builders import manifest

KUBECTL = str(Path(sys.executable).parent / "kubectl")
SAMPLED = {"name": "sums", "source": "s3://data/sums.jsonl", "fields": {"reference": "answer"}, "samples": 2}


async def kubectl(world: Any, *arguments: str, body: dict[str, Any] | None = None, fails: bool = False) -> str:
    home = world.kubeconfig.parent
    process = await asyncio.create_subprocess_exec(
        KUBECTL,
        *arguments,
        env={**os.environ, "KUBECONFIG": str(world.kubeconfig), "HOME": str(home)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate(json.dumps(body).encode() if body else b"")
    assert bool(process.returncode) == fails, out.decode()
    return out.decode()


def user_manifest(changes: dict[str, Any] | None = None, name: str = "demo") -> dict[str, Any]:
    body = manifest(changes, name=name)
    body["metadata"] = {"name": name}
    return body


async def test_a_short_manifest_is_accepted_and_filled_in(world: Any) -> None:
    await kubectl(world, "apply", "-f", "-", body=user_manifest())
    spec = (await world.get())["spec"]
    assert spec["training"]["learningRate"] == "1e-6"
    assert spec["generation"]["maxRejected"] == "2%"
    assert spec["placement"]["accelerator"] == "nvidia.com/gpu"


async def test_prompts_of_the_hub_sampled_and_decontaminated_are_accepted(world: Any) -> None:
    changes = {
        "prompts.source": "hf://datasets/owner/name@v1/data/*.parquet",
        "prompts.limit": 10,
        "prompts.seed": 0,
        "prompts.decontaminate": {},
    }
    await kubectl(world, "apply", "-f", "-", body=user_manifest(changes))
    assert (await world.get())["spec"]["prompts"]["decontaminate"] == {"against": [], "ngram": 13}


async def test_benchmarks_that_are_known_by_name_are_accepted(world: Any) -> None:
    changes = {"evaluation": {"benchmarks": [{"name": "MATH-500"}, {"name": "AIME24", "source": "s3://data/a.jsonl"}]}}
    await kubectl(world, "apply", "-f", "-", body=user_manifest(changes))
    assert (await world.get())["spec"]["evaluation"]["benchmarks"][0] == {"name": "MATH-500", "samples": 1}


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("trainin", {}, 'unknown field "spec.trainin"'),
        ("training.epoch", 2, 'unknown field "spec.training.epoch"'),
        ("training.learningRate", 0.5, 'spec.training.learningRate in body must be of type string: "number"'),
        ("training.learningRate", "2", "write a number above 0 and at most 1, in quotes"),
        ("training.learningRate", "fast", "spec.training.learningRate in body should match"),
        ("training.globalBatchSize", 4, "raise globalBatchSize to at least workers * gpusPerWorker"),
        (
            "training",
            {"offload": "parameters", "zeroStage": 2},
            "only what ZeRO partitions is offloaded: set zeroStage",
        ),
        ("training", {"offload": "optimizer", "zeroStage": 0}, "only what ZeRO partitions is offloaded: set zeroStage"),
        ("training.zeroStage", 7, "spec.training.zeroStage in body should be less than or equal to 3"),
        ("training.objectives", ["CDG"], 'supported values: "CGD"'),
        ("training.objectives", ["CGD", "CGD"], 'spec.training.objectives[1]: Duplicate value: "CGD"'),
        ("training.objectives", [], "there is nothing to learn: name an objective or a variant"),
        ("training.variants", [{"name": "x", "kind": "CGD"}] * 2, "spec.training.variants[1]: Duplicate value"),
        ("training.variants", [{"name": "cgd", "kind": "CGD"}], "belong to models that a run has anyway"),
        ("training.variants", [{"name": "x", "kind": "CFT", "bareShare": "1"}], "are for the kind CGD: remove them"),
        (
            "training.variants",
            [{"name": "x", "kind": "SFT", "context": "user"}],
            "context is for the kinds CGD and CFT",
        ),
        ("training.variants", [{"name": "x", "kind": "DPO", "from": "SFT"}], "from names one of objectives"),
        ("training.variants", [{"name": "x", "kind": "DPO", "from": "x"}], "and in no circle"),
        (
            "training.variants",
            [{"name": "x", "kind": "DPO", "from": "y"}, {"name": "y", "kind": "CFT", "from": "x"}],
            "and in no circle",
        ),
        ("training.variants", [{"name": "x", "kind": "DPO", "texts": "refined"}], "texts is for the kind SupervisedKD"),
        ("training.bareShare", "2", "write a number from 0 to 1, in quotes"),
        ("training", {"objectives": ["SFT"], "bareShare": "0.5"}, "or leave bareShare out"),
        ("generation.answer.unfinished", "drop", 'supported values: "keep", "reject"'),
        ("training.critique", {"kind": "corrupted"}, "a corrupted critique or a miscritique needs a rate"),
        ("training.critique", {"kind": "miscritique", "rate": "0.3"}, "a miscritique needs a target, kept or refined"),
        ("training.critique", {"kind": "none", "rate": "0.3"}, "no other kind has one"),
        ("training", {"objectives": ["CFT"], "critique": {"kind": "none"}}, "add CGD to objectives, or leave"),
        ("generation.maxRejected", "2", "spec.generation.maxRejected in body should match"),
        ("teacher", {}, "set exactly one of model (served here) and endpoint"),
        ("prompts.source", "hf://datasets/owner/name", "hf://datasets/owner/name/path"),
        ("prompts.seed", 1, "seed says how the limit rows are drawn: set limit as well"),
        ("generation.answer", {"samples": 4}, "greedy decoding gives the same text every time"),
        (
            "prompts.fields",
            {"prompt": "question", "choices": "options", "several": "some"},
            'supported values: "any", "all"',
        ),
        ("prompts.decontaminate", {"against": ["sums"]}, "takes names of evaluation.benchmarks"),
        ("evaluation", {"benchmarks": [{"name": "math-500"}]}, "one of the names that are known: MATH-500, GSM8K"),
        ("evaluation", {"benchmarks": [{"name": "GSM8K", "fields": {}}]}, "a benchmark needs fields.reference"),
        ("evaluation.tasks", [{"name": "HumanEval"}], "set executeCode to true to have it done, in a sandbox"),
        ("evaluation", {"benchmarks": [SAMPLED]}, "greedy decoding gives the same output every time"),
        ("evaluation.rivals", [{"kind": "BestOfN"}], "Majority and BestOfN need sampling.temperature above 0"),
        ("evaluation.rivals", [{"kind": "Reflexion", "samples": 4}], "samples to Majority and BestOfN"),
        (
            "teacher.endpoint",
            {"url": "http://t/v1", "model": "m"},
            "set exactly one of model (served here) and endpoint",
        ),
        ("budget", {}, "a budget sets gpuHours, deadlineSeconds or both"),
        ("budget", {"gpuHours": "0"}, "write a number above 0 and at most 100000, in quotes"),
        ("budget", {"gpuHours": 400}, 'spec.budget.gpuHours in body must be of type string: "integer"'),
        ("storage.uri", "bucket/prefix", "write s3://bucket/prefix"),
        ("storage.endpoint", "localhost:9000", "write the whole URL: https://host:port"),
        ("storage", None, "spec.storage: Required value"),
        ("prompts.source", "https://host/f.jsonl", "write s3://bucket/key"),
        ("student.tensorParallel", 0, "spec.student.tensorParallel in body should be greater than or equal to 1"),
    ],
)
async def test_a_wrong_manifest_is_refused_with_field_and_mend(world: Any, path: str, value: Any, told: str) -> None:
    out = await kubectl(world, "apply", "-f", "-", body=user_manifest({path: value}), fails=True)
    assert told in out


async def test_a_chain_of_trainings_is_taken_and_the_probabilities_of_an_endpoint_are_not(world: Any) -> None:
    chain = [
        {"name": "a", "kind": "DPO", "from": "b"},
        {"name": "b", "kind": "CFT", "from": "c"},
        {"name": "c", "kind": "SupervisedKD", "from": "CGD"},
    ]
    endpoint = {"endpoint": {"url": "https://teacher.example/v1", "model": "large"}}
    wrong = user_manifest({"training.variants": chain, "teacher": endpoint})
    out = await kubectl(world, "apply", "-f", "-", body=wrong, fails=True)
    assert "which endpoints do not give: set teacher.model" in out
    longer = user_manifest({"training.variants": [*chain, {"name": "d", "kind": "DPO", "from": "a"}]})
    assert "in no circle" in await kubectl(world, "apply", "-f", "-", body=longer, fails=True)
    await kubectl(world, "apply", "-f", "-", body=user_manifest({"training.variants": chain}))


async def test_the_example_of_all_methods_is_taken_as_it_is(world: Any) -> None:
    given = yaml.safe_load((Path(__file__).parents[2] / "examples/methods/run.yaml").read_text())
    await kubectl(world, "apply", "-f", "-", body=given)
    stored = await kubectl(world, "get", "cgdrun", given["metadata"]["name"], "-o", "json")
    assert json.loads(stored)["spec"]["training"]["variants"] == given["spec"]["training"]["variants"]


async def test_keep_without_references_is_refused_and_with_them_taken(world: Any) -> None:
    changes: dict[str, Any] = {"training.keep": "right", "generation.refine": {"samples": 2, "temperature": "0.7"}}
    bare = user_manifest(changes | {"prompts.fields.reference": None})
    out = await kubectl(world, "apply", "-f", "-", body=bare, fails=True)
    assert "need references to grade with: set prompts.fields.reference" in out
    await kubectl(world, "apply", "-f", "-", body=user_manifest(changes))


async def test_sft_without_reference_answers_is_refused_and_with_them_taken(world: Any) -> None:
    changes: dict[str, Any] = {"training.objectives": ["CGD", "SFT"]}
    bare = user_manifest(changes | {"prompts.fields.reference": None})
    out = await kubectl(world, "apply", "-f", "-", body=bare, fails=True)
    assert "set prompts.fields.reference to the column that has it" in out
    await kubectl(world, "apply", "-f", "-", body=user_manifest(changes))


async def test_variants_are_taken_and_left_as_they_are(world: Any) -> None:
    given = [
        {"name": "cgd-bare", "kind": "CGD", "bareShare": "0.25"},
        {"name": "cgd-none", "kind": "CGD", "critique": {"kind": "none"}, "learningRate": "5e-6", "epochs": 2},
    ]
    await kubectl(world, "apply", "-f", "-", body=user_manifest({"training": {"objectives": [], "variants": given}}))
    stored = (await world.get())["spec"]["training"]
    assert (stored["objectives"], stored["variants"]) == ([], given)
    out = await kubectl(
        world, "apply", "-f", "-", body=user_manifest({"training": {"variants": given[:1]}}), fails=True
    )
    assert "training cannot change" in out


async def test_an_ablation_is_taken_and_filled_in(world: Any) -> None:
    given = {"kind": "miscritique", "rate": "0.3", "target": "refined"}
    await kubectl(world, "apply", "-f", "-", body=user_manifest({"training.critique": given}))
    assert (await world.get())["spec"]["training"]["critique"] == given


@pytest.mark.parametrize(("offload", "zero_stage"), [("optimizer", 1), ("parameters", 3)])
async def test_offloading_what_zero_partitions_is_taken(world: Any, offload: str, zero_stage: int) -> None:
    await kubectl(
        world, "apply", "-f", "-", body=user_manifest({"training": {"offload": offload, "zeroStage": zero_stage}})
    )
    assert (await world.get())["spec"]["training"]["offload"] == offload


async def test_the_memory_of_gpus_that_a_run_does_not_use_is_refused(world: Any) -> None:
    body = user_manifest({"placement": {"accelerator": "none", "gpuMemory": "80Gi"}})
    assert "leave one of them out" in await kubectl(world, "apply", "-f", "-", body=body, fails=True)
    body = user_manifest({"placement": {"gpuMemory": "80Gi"}})
    await kubectl(world, "apply", "-f", "-", body=body)


async def test_a_queue_of_volcano_is_not_one_of_coscheduling(world: Any) -> None:
    policy = {"gang": "coscheduling", "queue": "research"}
    body = user_manifest({"placement.schedulingPolicy": policy})
    assert "leave it out for coscheduling" in await kubectl(world, "apply", "-f", "-", body=body, fails=True)
    body = user_manifest({"placement.schedulingPolicy": policy | {"gang": "volcano"}})
    await kubectl(world, "apply", "-f", "-", body=body)


async def test_a_name_that_cannot_be_a_label_is_refused(world: Any) -> None:
    out = await kubectl(world, "apply", "-f", "-", body=user_manifest(name="x" * 64), fails=True)
    assert "at most 63 characters" in out


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("training.epochs", 2, "training"),
        ("budget", {"gpuHours": "1"}, "budget"),
        ("student.model", "s3://data/other", "student"),
    ],
)
async def test_a_running_run_cannot_be_changed(world: Any, path: str, value: Any, field: str) -> None:
    await kubectl(world, "apply", "-f", "-", body=user_manifest())
    out = await kubectl(world, "apply", "-f", "-", body=user_manifest({path: value}), fails=True)
    assert f"{field} cannot change: apply a new CGDRun under another name" in out


async def test_suspend_can_be_changed(world: Any) -> None:
    await kubectl(world, "apply", "-f", "-", body=user_manifest())
    await kubectl(world, "apply", "-f", "-", body=user_manifest({"suspend": True}))
    assert (await world.get())["spec"]["suspend"] is True


async def test_the_columns_move(world: Any) -> None:
    async with world.operator():
        await kubectl(world, "apply", "-f", "-", body=user_manifest())
        await world.end("prepare")
        await kubectl(world, "wait", "cgd/demo", "--for=jsonpath={.status.stage}=answer", "--timeout=150s")
        head, row = (await kubectl(world, "get", "cgd")).splitlines()
    assert head.split() == ["NAME", "STATE", "STAGE", "PROGRESS", "ETA", "GPU-HOURS", "AGE"]
    assert row.split()[:4] == ["demo", "Answering", "answer", "0%"]


async def test_wide_columns_say_why_a_run_has_not_succeeded(world: Any) -> None:
    async with world.operator():
        await kubectl(world, "apply", "-f", "-", body=user_manifest())
        await world.end("prepare", "Failed")
        await kubectl(world, "wait", "cgd/demo", "--for=condition=Succeeded=false", "--timeout=20s")
        head, row = (await kubectl(world, "get", "cgd", "-o", "wide")).splitlines()
    assert head.split()[-3:] == ["AGE", "REASON", "MESSAGE"]
    assert "stage prepare: " in row


async def test_describe_tells_conditions_and_events(world: Any) -> None:
    async with world.operator():
        await kubectl(world, "apply", "-f", "-", body=user_manifest())
        await world.end("prepare", "Failed")
        await kubectl(world, "wait", "cgd/demo", "--for=condition=Stalled", "--timeout=150s")
        await kubectl(world, "wait", "cgd/demo", "--for=condition=Succeeded=false", "--timeout=150s")
        out = await kubectl(world, "describe", "cgd", "demo")
    assert "stage prepare: " in out


async def test_explain_tells_what_a_field_means(world: Any) -> None:
    out = await kubectl(world, "explain", "cgdrun.spec.training.learningRate")
    assert "highest learning rate" in out


async def test_managers_that_apply_the_same_manifest_do_not_fight_over_defaults(world: Any) -> None:
    example = yaml.safe_load((Path(__file__).parents[2] / "examples/quickstart.yaml").read_text())
    example["spec"]["suspend"] = True

    async def apply(manager: str) -> dict[str, Any]:
        await kubectl(world, "apply", "--server-side", f"--field-manager={manager}", "-f", "-", body=example)
        found: dict[str, Any] = (await world.get("quickstart"))["metadata"]
        return found

    async with world.operator():
        await apply("argocd")
        await kubectl(world, "wait", "cgd/quickstart", "--for=condition=Suspended", "--timeout=150s")
        await apply("argocd")
        both = await apply("flux")
        again = [await apply(manager) for manager in ("argocd", "flux", "argocd")]
    assert {one["generation"] for one in (both, *again)} == {1}
    assert {one["resourceVersion"] for one in again} == {both["resourceVersion"]}


async def test_the_operator_owns_the_status_and_nobody_owns_defaults(world: Any) -> None:
    async with world.operator():
        await kubectl(world, "apply", "--server-side", "--field-manager=argocd", "-f", "-", body=user_manifest())
        await world.end("prepare")
        await kubectl(world, "wait", "cgd/demo", "--for=jsonpath={.status.stage}=answer", "--timeout=150s")
    owned = {one["manager"]: one["fieldsV1"] for one in (await world.get())["metadata"]["managedFields"]}
    assert set(owned) == {"argocd", "cgd-operator"}
    assert set(owned["cgd-operator"]) == {"f:status"}
    written = {f"f:{name}" for name in user_manifest()["spec"]}
    assert (set(owned["argocd"]), set(owned["argocd"]["f:spec"])) == ({"f:spec"}, written)
