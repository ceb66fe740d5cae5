"""GPU-hours by stage: what counts, once, and when nothing is said."""

from support.report_builders import stage

from cgd_stages.results.model import StageRecord
from cgd_stages.results.scores import gpu_hours

TRAINED = {"workers": 1, "processes": 1}
ENGINE = {"engine": "vllm", "device": "cuda", "tensorParallel": 2, "shards": 4}


def test_gpu_hours_are_the_time_of_a_stage_times_its_gpus() -> None:
    stages = (
        stage("prepare", 0, 3600),
        stage("answer", 0, 1800, settings=ENGINE),
        stage("train-cgd", 0, 3600, settings={"workers": 2, "processes": 8}),
        stage("evaluate-base", 0, 900, settings={"device": "cuda", "tensorParallel": 1}),
        stage("evaluate-cgd", 0, 900),
        StageRecord(name="evaluate-sft", settings=ENGINE),
    )
    assert gpu_hours(stages) == {"answer": 4, "train-cgd": 16, "evaluate-base": 0.25}


def test_a_run_without_gpus_has_no_gpu_hours() -> None:
    assert gpu_hours((stage("answer", settings=ENGINE | {"device": "cpu"}), stage("train-cgd", settings=TRAINED))) == {}
    assert gpu_hours((stage("train-cgd", settings=TRAINED),)) == {}


def test_a_fused_teacher_is_counted_once() -> None:
    critique = stage("critique", 0, 3600, settings=ENGINE)
    fused = gpu_hours((critique, stage("refine", 1, 5400, settings=ENGINE)))
    assert fused == {"critique": 8, "refine": 4}
    wrong = gpu_hours((stage("miscritique", 0, 3600, settings=ENGINE), stage("misrefine", 1, 5400, settings=ENGINE)))
    assert wrong == {"miscritique": 8, "misrefine": 4}
    apart = gpu_hours((critique, stage("refine", 3600, 5400, settings=ENGINE)))
    assert apart == {"critique": 8, "refine": 4}
