"""What a run will cost: the arithmetic, and `cgd plan` as a user runs it."""

import dataclasses
import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import tiny
from support.builders import manifest
from support.stage_builders import context
from transformers import AutoConfig, AutoModelForCausalLM, OlmoeConfig

from cgd_cli.estimate import INSTRUCTION, RESERVED, Assumptions, Cost, Fit, Size, costs, fits, lengths
from cgd_cli.models import read
from cgd_cli.price import price_json, price_table
from cgd_cli.sizes import GPUS, TASK_SIZES, active_in, size_in
from cgd_cli.terminal import Terminal
from cgd_operator.api.benchmarks import TASKS
from cgd_operator.planning.dag import Run, plan
from cgd_stages.contract import Storage
from cgd_stages.errors import UserError
from cgd_stages.models.fit import Misfit
from cgd_stages.prepare import __main__ as prepare
from cgd_stages.store.bucket import Bucket

A100 = GPUS["a100-80gb"]
SERVED = {
    "student": {"model": "org/Student-8B", "shards": 4},
    "teacher": {"model": "org/Teacher-70B", "tensorParallel": 8},
    "generation": {role: {"maxTokens": 4096} for role in ("answer", "critique", "refine")},
}
TRAINING = {"objectives": ["CGD"], "workers": 2, "gpusPerWorker": 8, "globalBatchSize": 64}


def run_of(**changes: Any) -> Run:
    return Run.of(manifest({**SERVED, "training": TRAINING, **changes}))


def assumed(**changes: Any) -> Assumptions:
    return Assumptions(**{"rows": 1000, "student": 8e9, "teacher": 70e9, "gpu": A100, **changes})


def by_stage(run: Run, given: Assumptions) -> dict[str, Cost]:
    return {cost.stage: cost for cost in costs(run, given)}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8B", 8e9),
        ("1.7b", 1.7e9),
        ("meta-llama/Llama-3.1-8B-Instruct", 8e9),
        ("Qwen/Qwen2.5-Math-7B", 7e9),
        ("s3://cgd/models/SmolLM2-135M-Instruct", 135e6),
        ("Llama-3.3-70B", 70e9),
        ("mistralai/Mixtral-8x7B-v0.1", None),
        ("allenai/OLMoE-1B-7B-0924", 7e9),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", None),
        ("org/Some-MoE-14B", None),
        ("Qwen1.5-MoE-A2.7B", None),
        ("org/moe/model-8B", 8e9),
        ("org/model-v2", None),
        ("/models/10BetterThings", None),
        ("8B-family/model", None),
    ],
)
def test_a_size_is_read_off_a_name_or_not_at_all(text: str, size: float | None) -> None:
    assert size_in(text) == size


@pytest.mark.parametrize(
    ("text", "active"),
    [
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", 3e9),
        ("Qwen3-235B-A22B", 22e9),
        ("47B-a12.9B", 12.9e9),
        ("allenai/OLMoE-1B-7B-0924", 1e9),
        ("meta-llama/Llama-4-Scout-17B-16E-Instruct", 17e9),
        ("Qwen1.5-MoE-A2.7B", 2.7e9),
        ("Llama-3.3-70B", None),
        ("org/A3B-7B/model", None),
        ("openai/gpt-oss-20b", 3.6e9),
        ("s3://cgd/models/gpt-oss-120b-BF16", 5.1e9),
        ("org/gpt-oss-20b/8B", None),
    ],
)
def test_what_a_token_meets_of_a_mixture_is_read_off_a_name(text: str, active: float | None) -> None:
    assert active_in(text) == active


def test_a_mixture_is_priced_by_what_a_token_meets_and_fits_by_all_of_it() -> None:
    dense, mixture = assumed(start_minutes=0), assumed(start_minutes=0, student_active=1e9, teacher_active=7e9)
    whole, active = by_stage(run_of(), dense), by_stage(run_of(), mixture)
    assert active["train-cgd"].gpu_hours == pytest.approx(whole["train-cgd"].gpu_hours / 8)
    # 256 rows in flight meet all experts, so that reading the weights limits writing.
    teacher = whole["critique"]
    read = teacher.read * 2 * 7e9 / (0.5 * A100.flops * teacher.gpus)
    written = teacher.written * 2 * 70e9 / (0.6 * A100.bandwidth * teacher.gpus * 256)
    assert active["critique"].seconds == pytest.approx(read + written)
    assert fits(run_of(), mixture) == fits(run_of(), dense)


def test_early_questions_are_priced_beside_their_training() -> None:
    """16 steps: asked before the first one, and after 2, 4 and 8. Each of 16 GPUs answers 4 questions in one batch, and
    each token takes a pass over the weights."""
    early = {"benchmarks": [{"name": "GSM8K"}], "early": {"questions": 64, "maxTokens": 500}}
    plain, asking = by_stage(run_of(), assumed()), by_stage(run_of(evaluation=early), assumed())
    cost = asking["train-cgd early"]
    assert (cost.rows, cost.read, cost.written, cost.gpus) == (4 * 64, 4 * 64 * 200, 4 * 64 * 500, 16)
    reading = 4 * 200 * 2 * 8e9 / (0.5 * A100.flops)
    assert cost.seconds == pytest.approx(4 * (500 * 2 * 8e9 / (0.6 * A100.bandwidth) + reading))
    assert asking["train-cgd"] == plain["train-cgd"]
    judged = {**TRAINING, "stopUnless": {"after": "0.9"}}
    assert by_stage(run_of(evaluation=early, training=judged), assumed())["train-cgd early"].rows == 5 * 64


def test_early_questions_that_do_not_fit_a_batch_are_answered_one_batch_after_another() -> None:
    early = {"benchmarks": [{"name": "GSM8K"}], "early": {"questions": 64, "maxTokens": 500}}
    small = by_stage(run_of(evaluation=early, training={**TRAINING, "maxSequenceLength": 700}), assumed())
    large = by_stage(run_of(evaluation=early, training={**TRAINING, "maxSequenceLength": 2800}), assumed())
    one, four = (found["train-cgd early"].seconds for found in (small, large))
    assert 3.9 < one / four < 4.0  # reading is as much for both


def test_every_stage_with_gpus_has_a_cost_and_no_other() -> None:
    stages = ["answer", "critique", "refine", "train-cgd", "evaluate-base", "evaluate-cgd"]
    assert list(by_stage(run_of(), assumed())) == stages


def test_training_is_eight_flops_for_each_parameter_and_token() -> None:
    cost = by_stage(run_of(), assumed(start_minutes=0))["train-cgd"]
    tokens = 1000 * (170 + 200 + 700 + 500 + 800)
    assert cost.read == tokens
    assert cost.gpus == 16
    assert cost.gpu_hours == pytest.approx(8 * 8e9 * tokens / (0.4 * 312e12) / 3600)


def test_every_sample_of_a_benchmark_is_paid_for() -> None:
    benchmark = {"name": "sums", "source": "s3://data/sums.jsonl", "fields": {"reference": "answer"}, "limit": 10}
    sampled = {"benchmarks": [{**benchmark, "samples": 4}], "sampling": {"temperature": "0.7"}}
    assert by_stage(run_of(evaluation=sampled), assumed())["evaluate-cgd"].rows == 40


def test_the_rounds_of_self_refine_are_paid_for() -> None:
    benchmark = {"name": "sums", "source": "s3://data/sums.jsonl", "fields": {"reference": "answer"}, "limit": 10}
    rivals = {"benchmarks": [benchmark], "rivals": [{"kind": "SelfRefine", "rounds": 2}]}
    given = assumed()
    cost = by_stage(run_of(evaluation=rivals), given)["evaluate-selfrefine"]
    assert cost.written == 10 * (3 * given.answer + 2 * given.critique)


@pytest.mark.parametrize(("kind", "answers", "critiques", "read_again"), [("Majority", 4, 0, 0), ("BestOfN", 4, 4, 4)])
def test_every_drawn_answer_is_paid_for_and_its_prompt_once(
    kind: str, answers: int, critiques: int, read_again: int
) -> None:
    benchmark = {"name": "sums", "source": "s3://data/sums.jsonl", "fields": {"reference": "answer"}, "limit": 10}
    rivals = {
        "benchmarks": [benchmark],
        "rivals": [{"kind": kind, "samples": 4}],
        "sampling": {"temperature": "0.7"},
    }
    given = assumed()
    cost = by_stage(run_of(evaluation=rivals), given)[f"evaluate-{kind.lower()}"]
    assert cost.written == 10 * (answers * given.answer + critiques * given.critique)
    assert cost.read == 10 * (given.prompt + read_again * (INSTRUCTION + given.prompt + given.answer))


def with_tasks(*tasks: dict[str, Any]) -> Run:
    benchmark = {"name": "sums", "source": "s3://data/sums.jsonl", "fields": {"reference": "answer"}, "limit": 10}
    return run_of(evaluation={"benchmarks": [benchmark], "tasks": list(tasks)})


def shown(run: Run, misfits: list[Misfit] | None = None) -> str:
    console = Terminal(width=120, record=True)
    with console.capture() as told:
        console.print(price_table(run, assumed(), "a100", misfits))
    return told.get()


def test_a_task_of_lm_eval_is_priced_for_every_model_by_its_documents() -> None:
    found = by_stage(with_tasks({"name": "IFEval"}), assumed())
    assert found["harness-base"].rows == 541
    assert found["harness-base"].read == 541 * 53  # 211 characters
    assert found["harness-base"].written == 541 * 700
    assert found["harness-cgd"].money == found["harness-base"].money > 0


def test_a_limit_holds_for_every_part_of_a_task() -> None:
    limited = with_tasks({"name": "MMLU-Pro", "limit": 400}, {"name": "BBH", "limit": 180})
    assert by_stage(limited, assumed())["harness-cgd"].rows == (13 * 400 + 381) + (25 * 180 + 146 + 178)


@pytest.mark.parametrize(
    ("name", "documents"), [("MMLU-Pro", 12_032), ("BBH", 6_511), ("MuSR", 756), ("TruthfulQA", 817)]
)
def test_the_parts_of_a_task_add_up_to_what_is_published(name: str, documents: int) -> None:
    assert by_stage(with_tasks({"name": name}), assumed())["harness-base"].rows == documents


def test_every_known_task_has_an_extent() -> None:
    assert {one.task for one in TASKS.values()} <= TASK_SIZES.keys()


def test_choices_are_read_one_by_one_and_write_a_token_each() -> None:
    cost = by_stage(with_tasks({"name": "MuSR", "limit": 1}), assumed())["harness-base"]
    assert (cost.rows, cost.read, cost.written) == (3, 9 * 1223, 9)


def test_shots_are_read_and_no_more_is_written_than_the_task_allows() -> None:
    none, five = (
        by_stage(with_tasks({"name": "MMLU-Pro", "limit": 1, "fewShot": n}), assumed())["harness-base"] for n in (0, 5)
    )
    assert (none.read, five.read) == (14 * 150, 14 * math.ceil((600 + 5 * 870) / 4))
    long = dataclasses.replace(assumed(), answer=9000)
    assert by_stage(with_tasks({"name": "GPQA-Diamond", "limit": 1}), long)["harness-base"].written == 4096


BENCH = {"name": "sums", "source": "s3://data/sums.jsonl", "fields": {"reference": "answer"}, "limit": 10}
ON = {"student": {**SERVED["student"], "chat": {"thinking": "on"}}}
GENEROUS = {"generation": {role: {"maxTokens": 16384} for role in ("answer", "critique", "refine")}}


def test_a_student_that_thinks_pays_for_its_thoughts_in_answers_and_evaluation() -> None:
    rivals = [{"kind": "SelfRefine", "rounds": 2}]
    evaluation = {"benchmarks": [BENCH], "rivals": rivals, "tasks": [{"name": "IFEval"}, {"name": "MuSR"}]}
    found, plainly = (by_stage(run_of(**GENEROUS, **on, evaluation=evaluation), assumed()) for on in (ON, {}))
    more = {stage: found[stage].written - plainly[stage].written for stage in found}
    assert more["answer"] == 1000 * 4000
    assert more["evaluate-base"] == more["evaluate-cgd"] == 10 * 4000
    assert more["evaluate-selfrefine"] == 10 * 5 * 4000
    assert more["harness-base"] == 541 * 4000, "choices are compared, not written"


def test_a_thought_is_at_most_as_long_as_its_budget_and_no_text_longer_than_the_limit() -> None:
    budget = {"student": {**SERVED["student"], "chat": {"thinking": "on", "thinkingBudget": 100}}}
    assert by_stage(run_of(**budget), assumed())["answer"].written == 1000 * (700 + 100)
    assert by_stage(run_of(**ON), assumed())["answer"].written == 1000 * 4096


def test_thoughts_of_the_teacher_are_paid_for_where_it_thinks_and_learned_where_the_student_learns_them() -> None:
    on = {"teacher": {**SERVED["teacher"], "chat": {"thinking": "on"}}}
    off = {"teacher": {**SERVED["teacher"], "chat": {"thinking": "off"}}}
    learn = {"training": {**TRAINING, "objectives": ["CGD", "SFT"], "thinking": "learn"}}

    def more(**changes: Any) -> tuple[int, int, int]:
        objectives = {"training": {**TRAINING, "objectives": ["CGD", "SFT"]}}
        found, plainly = (
            by_stage(run_of(**GENEROUS, **with_), assumed()) for with_ in ({**objectives, **changes}, objectives)
        )
        written = found["refine"].written - plainly["refine"].written
        return written, *(found[stage].read - plainly[stage].read for stage in ("train-cgd", "train-sft"))

    assert more(**on) == (1000 * 4000, 0, 0)
    assert more(**learn) == more(**learn, **on) == (1000 * 4000, 1000 * 4000, 0)
    assert more(**learn, **off) == (0, 0, 0)


def test_a_teacher_whose_template_decides_is_priced_as_its_files_say_and_else_both_ways() -> None:
    left, on = run_of(**GENEROUS), run_of(**GENEROUS, teacher={**SERVED["teacher"], "chat": {"thinking": "on"}})
    learn = run_of(**GENEROUS, training={**TRAINING, "thinking": "learn"})
    dear, cheap = by_stage(on, assumed()), by_stage(left, assumed())
    assert by_stage(left, assumed(teacher_thinks=True)) == dear
    assert by_stage(left, assumed(teacher_thinks=False)) == cheap != dear
    found = by_stage(learn, assumed(teacher_thinks=False))
    assert found["refine"].written < by_stage(learn, assumed())["refine"].written
    hours, money = (sum(getattr(cost, name) for cost in dear.values()) for name in ("gpu_hours", "money"))
    told = f"If it thinks by itself, as many do: {hours:,.1f} GPU-hours, {money:,.0f} USD."
    assert told in shown(left)
    assert "by itself" not in shown(on) + shown(learn)


def test_texts_that_do_not_fit_the_manifests_limits_are_told() -> None:
    small = {
        "student": {**SERVED["student"], "maxModelLen": 2048},
        "teacher": {**SERVED["teacher"], "maxModelLen": 8192},
    }
    assert [one.fits for one in lengths(run_of(**GENEROUS, **small), assumed())] == [True] * 6
    thinking = {**small, "student": {**small["student"], "chat": {"thinking": "on"}}}
    long = [one.text for one in lengths(run_of(**GENEROUS, **thinking), assumed()) if not one.fits]
    assert long == ["student.maxModelLen: 4900 of 2048 tokens: is TOO LONG"]
    assert long[0] in shown(run_of(**GENEROUS, **thinking))
    assert "TOO LONG" not in shown(run_of(**GENEROUS, **small))


def test_the_modes_are_told() -> None:
    words = " ".join(shown(run_of(**ON, teacher={**SERVED["teacher"], "chat": {"template": "s3://b/t.jinja"}})).split())
    assert "Thinking of the student on, as training.thinking learn has it, with 4000 tokens a thought" in words
    assert "of the teacher auto, with 4000" in words
    assert "Chat template of the teacher: s3://b/t.jinja" in words
    assert "Thinking of the student off, as training.thinking drop has it" in " ".join(shown(run_of()).split())


def test_a_variant_is_paid_for_and_its_bare_examples_are_shorter() -> None:
    bare = {"name": "cgd-bare", "kind": "CGD", "bareShare": "0.5"}
    twice = {"name": "cgd-twice", "kind": "CGD", "epochs": 2}
    made = {**TRAINING, "objectives": ["CGD", "RefinedSFT"], "variants": [bare, twice]}
    found = by_stage(run_of(training=made), assumed())
    whole, alone = found["train-cgd"].read, found["train-refinedsft"].read
    assert found["train-cgd-bare"].read == (whole + alone) / 2
    assert found["train-cgd-twice"].read == 2 * whole
    assert "evaluate-cgd-twice" in found


def test_a_pair_is_read_with_both_its_texts_and_its_reference_costs_a_third_of_one_epoch() -> None:
    variants = [{"name": "dpo", "kind": "DPO"}, {"name": "dpo-twice", "kind": "DPO", "epochs": 2}]
    made = {**TRAINING, "variants": variants, "activationCheckpointing": "never"}
    found = by_stage(run_of(training=made), assumed(start_minutes=0))
    cgd, dpo, twice = (found[f"train-{name}"] for name in ("cgd", "dpo", "dpo-twice"))
    assert dpo.read == 1000 * (2 * 200 + 800 + 700)
    assert dpo.seconds / dpo.read == pytest.approx(cgd.seconds / cgd.read * 8 / 6)
    assert twice.seconds / dpo.seconds == pytest.approx(14 / 8)


def test_scores_are_read_once_and_nothing_is_written() -> None:
    drawn = {"answer": {"samples": 3}, "refine": {"samples": 2}, "distill": {"samples": 5}}
    warm = {role: {"temperature": "0.7", **given} for role, given in drawn.items()}
    variants = [
        {"name": "kd", "kind": "SupervisedKD"},
        {"name": "kd-more", "kind": "SupervisedKD", "topK": 20},
        {"name": "kd-own", "kind": "SupervisedKD", "texts": "distilled"},
        {"name": "inner", "kind": "ContextDistillation", "from": "CGD"},
    ]
    found = by_stage(run_of(training={**TRAINING, "variants": variants}, generation=warm), assumed())
    refined, own, inner = (found[f"score-{name}"] for name in ("refined", "distilled", "inner"))
    assert [(one.rows, one.read, one.written) for one in (refined, own, inner)] == [
        (6000, 6000 * (200 + 800), 0),
        (5000, 5000 * (200 + 800), 0),
        (6000, 6000 * (170 + 200 + 700 + 500 + 800), 0),
    ]
    assert (refined.gpus, inner.gpus) == (8, 4), "the teacher's, and the student's"
    assert found["train-kd"].seconds == found["train-kd-more"].seconds


def sampled(**own: Any) -> dict[str, Any]:
    return {**TRAINING, "variants": [{"name": "gkd", "kind": "GKD", "onPolicy": "0.5", **own}]}


def test_samples_are_written_and_read_again_and_each_holds_its_gpus_while_the_others_work() -> None:
    given = assumed(start_minutes=3)
    found = by_stage(run_of(training=sampled(maxTokens=300)), given)
    rollout, score, train = three = [found[f"{kind}-gkd"] for kind in ("rollout", "score", "train")]
    assert (rollout.rows, rollout.read, rollout.written) == (500, 500 * 200, 500 * 300)
    assert (score.rows, score.read, score.written) == (500, 500 * (200 + 300), 0)
    assert train.read == 1000 * ((200 + 800) + (200 + 300)) / 2
    busy = sum(cost.seconds - 180 for cost in three)
    for cost in three:
        assert cost.seconds + cost.waits == pytest.approx(busy + 180)
        assert cost.money == pytest.approx(cost.gpus * (busy + 180) / 3600 * given.gpu_hour)
        assert cost.gpu_hours == pytest.approx(cost.gpus * (busy + 180) / 3600)
    assert (rollout.gpus, score.gpus) == (4, 8), "the student's, and the teacher's"
    assert found["train-cgd"].waits == 0


def test_a_smaller_refresh_samples_fewer_texts_at_a_time_which_takes_longer() -> None:
    often, seldom = (
        by_stage(run_of(training=sampled(refresh=refresh)), assumed())["rollout-gkd"].seconds for refresh in (1, 64)
    )
    assert often > seldom


@pytest.mark.parametrize("fused", [True, False])
def test_miscritiques_are_one_more_pass_of_the_teacher_with_one_start(fused: bool) -> None:
    wrong = {"critique": {"kind": "miscritique", "rate": "0.1", "target": "kept"}}
    teacher = {**SERVED["teacher"], "fused": fused}
    warm: dict[str, Any] = {role: {"temperature": "0.7", "samples": n} for role, n in (("answer", 3), ("refine", 2))}
    found = by_stage(run_of(training=TRAINING | wrong, teacher=teacher, generation=warm), assumed(start_minutes=60))
    plain = by_stage(run_of(teacher={**teacher, "fused": False}, generation=warm), assumed(start_minutes=60))
    assert set(found) == set(plain) | {"miscritique", "misrefine"}
    assert (found["miscritique"].rows, found["misrefine"].rows) == (3000, 6000)
    assert found["misrefine"].written == plain["refine"].written
    assert found["misrefine"].read == plain["refine"].read
    assert found["miscritique"].read == plain["critique"].read + 3000 * 500
    assert plain["refine"].seconds - found["misrefine"].seconds == pytest.approx(3600)
    assert found["miscritique"].seconds > 3600


def test_every_text_that_is_drawn_is_paid_for() -> None:
    drawn = {"answer": {"samples": 3}, "refine": {"samples": 2}, "distill": {"samples": 5}}
    warm = {role: {"temperature": "0.7", **given} for role, given in drawn.items()}
    both = {**TRAINING, "objectives": ["CGD", "DistilledSFT"]}
    found = by_stage(run_of(generation=warm, training=both), assumed())
    assert [found[stage].rows for stage in ("answer", "critique", "refine", "distill", "train-cgd")] == [
        3000, 3000, 6000, 5000, 3000,
    ]  # fmt: skip
    every = {**warm, "refine": {**warm["refine"], "select": "all-right"}}
    assert by_stage(run_of(generation=every), assumed())["train-cgd"].rows == 6000


def test_two_metrics_of_a_task_are_asked_once() -> None:
    both = with_tasks({"name": "IFEval"}, {"name": "IFEval-loose"})
    assert by_stage(both, assumed()) == by_stage(with_tasks({"name": "IFEval"}), assumed())


def test_an_own_task_is_priced_by_its_limit_and_named_as_unpriced_without() -> None:
    own = {"name": "own", "metric": "acc", "fewShot": 2}
    limited = by_stage(with_tasks(own | {"limit": 10}), assumed())["harness-base"]
    assert (limited.rows, limited.read, limited.written) == (10, 10 * (200 + 2 * 900), 7000)
    run = with_tasks(own, {"name": "IFEval"})
    assert json.loads(price_json(run, assumed()))["unpriced"] == ["own"]
    assert by_stage(run, assumed())["harness-base"].rows == 541
    assert "not in it: own: their numbers of documents are not known" in shown(run)


def test_what_is_assumed_of_a_task_is_told() -> None:
    run = with_tasks({"name": "IFEval"}, {"name": "MuSR"})
    words = shown(run)
    assert "numbers of documents" not in words
    assert "IFEval: 541 requests, each 53 tokens read and 700 written" in words
    assert "MuSR: 2268 requests (756 documents), each 1223 tokens read and 1 written" in words
    assert [one["requests"] for one in json.loads(price_json(run, assumed()))["tasks"]] == [541, 2268]


def test_without_checkpointing_it_is_six() -> None:
    never = run_of(training={**TRAINING, "activationCheckpointing": "never"})
    given = assumed(start_minutes=0)
    assert by_stage(never, given)["train-cgd"].seconds == pytest.approx(
        by_stage(run_of(), given)["train-cgd"].seconds * 6 / 8
    )


def test_with_an_adapter_the_frozen_parameters_need_no_gradients() -> None:
    given = assumed(start_minutes=0)
    whole, adapter, kept = (
        by_stage(run_of(training={**TRAINING, **changes}), given)["train-cgd"].seconds
        for changes in ({}, {"adapter": {}}, {"adapter": {}, "activationCheckpointing": "never"})
    )
    assert adapter == pytest.approx(6 / 8 * whole)
    assert kept == pytest.approx(4 / 8 * whole)


def test_an_adapter_trains_where_all_parameters_do_not_fit() -> None:
    alone = {**TRAINING, "workers": 1, "gpusPerWorker": 1, "zeroStage": 0}
    whole, adapter = (
        fit_of("train-cgd", run_of(training={**alone, **changes}), assumed())
        for changes in ({}, {"adapter": {"rank": 64}})
    )
    assert not whole.fits
    assert adapter.fits
    assert adapter.need == pytest.approx(2 * 8e9 + 22 * 168e6, rel=0.1), "a rank of 64 has 168 million parameters"


def test_writing_with_few_rows_in_flight_is_bound_by_bandwidth() -> None:
    given = assumed(start_minutes=0, in_flight=1, prompt=1, critique=1, refinement=1)
    cost = by_stage(run_of(), given)["answer"]
    alone = 2 * 8e9 / (0.6 * 2039e9)  # seconds a token: all weights are read for it
    assert cost.seconds == pytest.approx(1000 * 700 * alone / 4, rel=1e-3)


def test_writing_with_many_rows_in_flight_is_bound_by_flops() -> None:
    few, many = (by_stage(run_of(), assumed(in_flight=n))["answer"].seconds for n in (10_000, 20_000))
    assert few == many


def test_shards_share_the_time_and_not_the_price() -> None:
    one, four = (
        by_stage(run_of(student={**SERVED["student"], "shards": n}), assumed(start_minutes=0))["answer"] for n in (1, 4)
    )
    assert one.seconds == pytest.approx(4 * four.seconds)
    assert one.money == pytest.approx(four.money)


def test_a_fused_teacher_reads_the_prompt_once_and_starts_once() -> None:
    fused, apart = (by_stage(run_of(teacher={**SERVED["teacher"], "fused": on}), assumed()) for on in (True, False))
    assert fused["refine"].read == 1000 * 500
    assert apart["refine"].read == 1000 * (170 + 200 + 700 + 500)
    assert apart["refine"].seconds > fused["refine"].seconds + 299


def test_no_more_is_written_than_the_manifest_allows() -> None:
    short = run_of(generation={"answer": {"maxTokens": 64}, "critique": {"maxTokens": 32}, "refine": {"maxTokens": 16}})
    found = by_stage(short, assumed())
    assert [found[stage].written for stage in ("answer", "critique", "refine")] == [64_000, 32_000, 16_000]


WARM = {"temperature": "0.7"}


def test_every_draw_is_written_and_its_prompt_is_read_once() -> None:
    one = by_stage(run_of(), assumed())
    several = by_stage(
        run_of(generation={"answer": {**WARM, "samples": 4}, "refine": {**WARM, "samples": 2}}), assumed()
    )
    rows = {"answer": 4, "critique": 4, "refine": 8, "train-cgd": 4}
    reads = {"answer": 1, "critique": 4, "refine": 4, "train-cgd": 4}
    for stage, times in rows.items():
        assert several[stage].rows == times * one[stage].rows
        assert several[stage].written == times * one[stage].written
        assert several[stage].read == reads[stage] * one[stage].read


def test_an_endpoint_bills_the_prompt_of_every_draw() -> None:
    endpoint = {"endpoint": {"url": "https://api.example.com/v1", "model": "big"}}
    one, two = (
        by_stage(run_of(teacher=endpoint, generation={"refine": {**WARM, "samples": n}}), assumed()) for n in (1, 2)
    )
    assert two["refine"].read == 2 * one["refine"].read


@pytest.mark.parametrize(
    ("select", "keep", "examples"),
    [("first", "all", 4), ("shortest-right", "right", 4), ("all-right", "right", 8), ("all-right", "one-right", 1)],
)
def test_training_is_paid_for_the_rows_that_may_be_kept(select: str, keep: str, examples: int) -> None:
    generation = {"answer": {**WARM, "samples": 4}, "refine": {**WARM, "samples": 2, "select": select}}
    found = by_stage(run_of(generation=generation, training={**TRAINING, "keep": keep}), assumed())
    assert found["train-cgd"].rows == 1000 * examples


def test_an_endpoint_costs_tokens_and_no_gpu() -> None:
    endpoint = {"endpoint": {"url": "https://api.example.com/v1", "model": "big"}}
    found = by_stage(run_of(teacher=endpoint), assumed(teacher=0.0, input_million=3.0, output_million=15.0))
    assert (found["critique"].gpus, found["critique"].seconds) == (0, 0.0)
    assert found["critique"].money == pytest.approx((170 + 200 + 700) / 1000 * 3 + 500 / 1000 * 15)


def test_money_is_gpu_hours_times_their_price() -> None:
    cost = by_stage(run_of(), assumed(gpu_hour=2.0))["train-cgd"]
    assert cost.money == pytest.approx(2 * cost.gpu_hours)


def fit_of(what: str, run: Run, given: Assumptions) -> Fit:
    return next(one for one in fits(run, given) if one.what.startswith(what))


@pytest.mark.parametrize(("gpus", "fit"), [(1, False), (2, False), (4, True), (8, True)])
def test_a_70b_teacher_needs_four_gpus_of_80_gb(gpus: int, fit: bool) -> None:
    run = run_of(teacher={**SERVED["teacher"], "tensorParallel": gpus})
    found = fit_of("teacher", run, assumed())
    assert found.need == 140e9 / gpus
    assert found.room == pytest.approx(0.92 * 80e9 - RESERVED)
    assert found.fits is fit


@pytest.mark.parametrize(("zero", "workers", "gpus", "fit"), [(3, 2, 8, True), (0, 1, 1, False), (3, 1, 1, False)])
def test_an_8b_student_trains_on_16_gpus_and_not_on_one(zero: int, workers: int, gpus: int, fit: bool) -> None:
    run = run_of(training={**TRAINING, "workers": workers, "gpusPerWorker": gpus, "zeroStage": zero})
    assert fit_of("train-cgd", run, assumed()).fits is fit


def test_an_endpoint_must_fit_nowhere() -> None:
    endpoint = {"endpoint": {"url": "https://api.example.com/v1", "model": "big"}}
    assert not [one for one in fits(run_of(teacher=endpoint), assumed()) if one.what.startswith("teacher")]


def test_the_json_adds_up() -> None:
    told = json.loads(price_json(run_of(), assumed()))
    assert told["total"]["gpu_hours"] == pytest.approx(sum(one["gpu_hours"] for one in told["stages"]))
    assert told["assumed"]["rows"] == 1000


# --- as a user runs it


def cgd_plan(path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cgd_cli", "plan", str(path), *words]
    env = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def written(folder: Path, **changes: Any) -> Path:
    body = manifest({**SERVED, "training": TRAINING, **changes})
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


def test_a_table_tells_stages_price_fit_and_assumptions(tmp_path: Path) -> None:
    told = cgd_plan(written(tmp_path), "--rows", "100000", "--gpu-hour", "2").stdout
    assert "GPU-hours" in told
    assert "train-cgd" in told
    assert "teacher, weights (tensorParallel 8): 17.5 GB" in told
    assert "student 8 B, teacher 70 B parameters;\na100-80gb at 2 USD an hour" in told


@pytest.mark.parametrize(
    ("changes", "words", "told"),
    [
        ({}, [], "how many rows? Set prompts.limit in the manifest, or add an option such as --rows 100000"),
        ({}, ["--rows", "5", "--gpu", "abacus"], "--gpu abacus must be one of a100-40gb"),
        (
            {"student": {"model": "org/model"}},
            ["--rows", "5"],
            "org/model names no number of parameters: add an option such as --student-",
        ),
        (
            {},
            ["--rows", "5", "--teacher-params", "many"],
            "many names no number of parameters: add an option such as --teacher-params 8B",
        ),
        ({"placement": {"accelerator": "none"}}, ["--rows", "5"], "asks for no GPU"),
    ],
)
def test_what_is_missing_is_said_with_the_mend(
    tmp_path: Path, changes: dict[str, Any], words: list[str], told: str
) -> None:
    ended = cgd_plan(written(tmp_path, **changes), *words)
    assert ended.returncode == 1
    assert told in ended.stderr


# --- what the models' own files tell


@pytest.fixture
def large(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with 3 billion parameters by its config and the header of its weights; their data is not there."""
    folder = tmp_path / "large"
    shutil.copytree(tiny_model, folder)
    config = AutoConfig.from_pretrained(tiny_model)
    with torch.device("meta"):
        others = AutoModelForCausalLM.from_config(config).num_parameters()
    wide = 3 * config.hidden_size * config.num_hidden_layers
    config.intermediate_size += (3_000_000_000 - others) // wide
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors, end = {}, 0
    for name, tensor in model.state_dict().items():
        begin, end = end, end + 2 * tensor.numel()
        tensors[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(tensors).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


def stored_run(model: str, storage: Storage, teacher: dict[str, Any] | None = None, **placement: str) -> Run:
    place = {"uri": storage.uri, "endpoint": storage.endpoint, "pathStyle": True}
    return run_of(student={"model": model}, teacher=teacher or {"model": model}, storage=place, placement=placement)


@pytest.mark.parametrize("where", ["folder", "S3"])
def test_prepare_refuses_in_the_words_of_the_plan(
    where: str, bucket: Bucket, storage: Storage, large: Path, tmp_path: Path
) -> None:
    model = str(large) if where == "folder" else bucket.uri("model")
    for path in large.iterdir():
        bucket.upload(path, f"model/{path.name}")
    run = stored_run(model, storage, gpuMemory="1G")
    found = read(run, A100.memory).misfits
    assert [one.message.partition(":")[0] for one in found] == ["spec.student", "spec.teacher", "spec.training"]
    with pytest.raises(UserError) as refused:
        prepare.main(context(storage, plan(run)[0].task.work, tmp_path))
    assert refused.value.message == "; ".join(one.message for one in found)
    assert json.loads(price_json(run, assumed(), found))["misfits"][0]["hint"] == found[0].hint


def test_without_gpu_memory_the_plan_s_gpu_counts(storage: Storage, tiny_model: Path) -> None:
    run = stored_run(str(tiny_model), storage)
    assert read(run, A100.memory).misfits == []
    assert [one.message.partition(":")[0] for one in read(run, 1e5).misfits][-1] == "spec.training"
    assert "they fit" in shown(run, [])
    assert json.loads(price_json(run, assumed()))["misfits"] is None


def test_a_mixture_is_priced_by_what_its_files_say_and_not_by_its_name(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "Dense-8B"
    shutil.copytree(tiny_model, folder)
    OlmoeConfig(intermediate_size=1024).save_pretrained(folder)
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": 64_000_000, "model.embed_tokens.weight": 2_000_000}
    header: dict[str, Any] = {}
    for name, size in tensors.items():
        header[name] = {"dtype": "BF16", "shape": [size], "data_offsets": [0, 2 * size]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    found = read(run_of(student={"model": str(folder)}, teacher={"model": str(tiny_model)}), A100.memory)
    assert found.student == Size(66e6, 10e6)
    assert found.teacher
    assert found.teacher.parameters == found.teacher.active > 1e3


def test_whether_a_teacher_thinks_is_read_off_its_template(storage: Storage, tiny_model: Path, tmp_path: Path) -> None:
    thinker, template = str(tiny.thinking(tmp_path / "thinker")), "configmap://templates/teacher.jinja"
    chats: dict[str, Any] = {"left": {}, "off": {"thinking": "off"}, "elsewhere": {"template": template}}
    found = {
        name: read(stored_run(str(tiny_model), storage, teacher={"model": thinker, "chat": chat}), A100.memory)
        for name, chat in chats.items()
    }
    assert {name: one.teacher_thinks for name, one in found.items()} == {"left": True, "off": False, "elsewhere": None}
    assert read(stored_run(str(tiny_model), storage), A100.memory).teacher_thinks is False


def test_models_are_read_where_there_is_no_torch(tmp_path: Path, large: Path) -> None:
    model = {"model": str(large)}
    path = written(tmp_path, student=model, teacher=model, placement={"gpuMemory": "1G"})
    start = "import sys; sys.modules['torch'] = None; from cgd_cli.__main__ import main; main()"
    sizes = ["--teacher-params", "1M"]
    command = [sys.executable, "-c", start, "plan", str(path), "--rows", "5", "--read-models", *sizes]
    env = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "spec.training: each of 16 GPUs needs" in " ".join(ended.stdout.split())
    assert "assumed: student 3 B, teacher 0.001 B parameters" in ended.stdout
    assert "or lower maxSequenceLength" in " ".join(ended.stdout.split())
