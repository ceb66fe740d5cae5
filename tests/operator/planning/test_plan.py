"""The plan: stages, their order, who does what with which model."""

import re
from typing import Any, TypeVar

import pytest
from support.builders import run

from cgd_operator import yamls
from cgd_operator.api.generation import Endpoint, ServedModel
from cgd_operator.planning.dag import Child, choose_backend, plan
from cgd_stages import contract


def children(changes: dict[str, Any] | None = None) -> dict[str, Child]:
    return {child.stage: child for child in plan(run(changes))}


def test_a_fused_teacher_is_one_child_with_two_stages() -> None:
    assert list(children()) == [
        "prepare", "answer", "teacher", "check", "train-cgd", "evaluate-base", "evaluate-cgd", "report",
    ]  # fmt: skip
    assert children()["teacher"].stages == ("critique", "refine")


def test_separate_stages_are_two_children() -> None:
    separate = children({"teacher.fused": False})
    assert "teacher" not in separate
    assert separate["refine"].after == ("critique",)


def test_the_status_lists_the_same_stages_either_way() -> None:
    fused, separate = plan(run()), plan(run({"teacher.fused": False}))
    assert [stage for child in fused for stage in child.stages] == [child.stage for child in separate]


def test_every_stage_waits_for_stages_of_earlier_children() -> None:
    before: set[str] = set()
    for child in plan(run({"training.objectives": FIVE})):
        assert before.issuperset(child.after), child.stage
        before.update(child.stages)


def test_nothing_but_prepare_starts_by_itself() -> None:
    assert [child.stage for child in plan(run()) if not child.after] == ["prepare"]


def test_the_answer_is_the_students_and_the_rest_the_teachers() -> None:
    answer, teacher = children()["answer"].task.work, children()["teacher"].task.work
    assert isinstance(answer, contract.Generate)
    assert isinstance(teacher, contract.Generate)
    assert answer.model == contract.Model(name="s3://data/models/student")
    assert teacher.model == contract.Model(name="s3://data/models/teacher")


def prompts(changes: dict[str, Any]) -> contract.Prompts:
    prepare = children(changes)["prepare"].task.work
    assert isinstance(prepare, contract.Prepare)
    return prepare.prompts


def test_prompts_are_held_against_all_benchmarks_unless_some_are_named() -> None:
    bench = {"source": "s3://data/b.jsonl", "fields": {"reference": "answer"}}
    two = {"evaluation.benchmarks": [{**bench, "name": "one"}, {**bench, "name": "two"}]}
    everything = contract.Decontaminate(against=("one", "two"), ngram=13)
    assert prompts({**two, "prompts.decontaminate": {}}).decontaminate == everything
    some = contract.Decontaminate(against=("two",), ngram=8)
    assert prompts({**two, "prompts.decontaminate": {"against": ["two"], "ngram": 8}}).decontaminate == some
    assert prompts(two).decontaminate is None


def test_with_paraphrases_the_tasks_of_lm_eval_are_compared_too() -> None:
    tasks = {
        "evaluation.tasks": [{"name": "IFEval", "limit": 9}, {"name": "BBH"}],
        "evaluation.taskData": "s3://data/hf",
    }
    planned = children({**tasks, "prompts.decontaminate": {"paraphrases": "remove", "similarity": "0.6"}})
    prepare, check, train = (planned[name].task.work for name in ("prepare", "check", "train-cgd"))
    assert isinstance(prepare, contract.Prepare)
    assert isinstance(check, contract.Check)
    assert isinstance(train, contract.Train)
    decontaminate = prepare.prompts.decontaminate
    assert decontaminate
    assert decontaminate.against == ("arithmetic", "IFEval", "BBH")
    assert (decontaminate.paraphrases, decontaminate.share) == ("remove", 0.6)
    assert [(task.task, task.limit) for task in prepare.tasks or ()] == [("ifeval", 9), ("bbh_cot_fewshot", None)]
    assert (prepare.task_data, check.decontaminate, train.common_rows) == ("s3://data/hf", decontaminate, True)


def test_a_run_that_asks_for_copies_alone_is_planned_as_before() -> None:
    tasks = {"evaluation.tasks": [{"name": "IFEval"}], "evaluation.taskData": "s3://data/hf"}
    planned = children({**tasks, "prompts.decontaminate": {}})
    prepare, check, train = (planned[name].task.work for name in ("prepare", "check", "train-cgd"))
    assert isinstance(prepare, contract.Prepare)
    assert isinstance(check, contract.Check)
    assert isinstance(train, contract.Train)
    assert prepare.prompts.decontaminate == contract.Decontaminate(against=("arithmetic",))
    assert (prepare.tasks, prepare.task_data, check.decontaminate, train.common_rows) == (None, None, None, False)


def test_limit_and_seed_reach_prepare() -> None:
    given = prompts({"prompts.limit": 7, "prompts.seed": 0})
    assert (given.limit, given.seed) == (7, 0)


FIVE = ["CGD", "CFT", "DistilledSFT", "SFT", "RefinedSFT"]


def test_every_objective_is_trained_and_evaluated_by_a_child_of_its_own() -> None:
    names = [name.lower() for name in FIVE]
    made = list(children({"training.objectives": FIVE}))
    assert made[made.index("check") + 1 :] == [
        *(f"train-{name}" for name in names),
        "evaluate-base",
        *(f"evaluate-{name}" for name in names),
        "report",
    ]


def test_trainings_come_one_after_another_in_the_order_of_the_spec() -> None:
    made = children({"training.objectives": ["SFT", "CGD", "CFT"]})
    assert made["train-sft"].after == ("check",)
    assert made["train-cgd"].after == ("check", "train-sft")
    assert made["train-cft"].after == ("check", "train-cgd")


def test_an_evaluation_waits_for_its_own_training_alone() -> None:
    made = children({"training.objectives": ["SFT", "CGD"]})
    assert made["evaluate-sft"].after == ("train-sft",)
    assert works(made, "evaluate-sft", contract.Evaluate).model.name == "stage://train-sft"


@pytest.mark.parametrize("objectives", [["CGD"], ["CFT", "SFT", "RefinedSFT"]])
def test_the_teachers_own_pass_is_made_only_when_it_is_asked_for(objectives: list[str]) -> None:
    assert "distill" not in children({"training.objectives": objectives})


def test_the_teachers_own_answers_come_from_the_teacher_after_its_other_work_and_before_the_check() -> None:
    made = children({"training.objectives": ["CGD", "DistilledSFT"], "teacher.shards": 3})
    distill = made["distill"]
    assert (distill.pool, distill.pods, distill.after) == ("teacher", 3, ("refine",))
    assert works(made, "distill", contract.Generate).model == contract.Model(name="s3://data/models/teacher")
    assert made["check"].after == ("refine", "distill")


WRONG = {"kind": "miscritique", "rate": "0.5", "target": "refined"}


@pytest.mark.parametrize(
    ("training", "asked"),
    [
        ({"critique": WRONG}, True),
        ({"variants": [{"name": "cgd-mis", "kind": "CGD", "critique": WRONG}]}, True),
        ({"objectives": [], "critique": WRONG, "variants": [{"name": "x", "kind": "CGD"}]}, True),
        ({"objectives": ["SFT"], "critique": WRONG, "variants": [
            {"name": "x", "kind": "CGD", "critique": {"kind": "matched"}}
        ]}, False),
        ({"critique": {"kind": "corrupted", "rate": "0.5"}}, False),
    ],
)  # fmt: skip
def test_miscritiques_are_written_only_when_a_training_reads_them(training: dict[str, Any], asked: bool) -> None:
    made = children({f"training.{name}": value for name, value in training.items()})
    assert ("misteacher" in made) == asked
    assert ("miscritique" in works(made, "prepare", contract.Prepare).roles) == asked


def test_miscritiques_and_what_follows_come_from_one_child_of_the_teacher_after_its_other_work() -> None:
    written = {"critique": {"maxTokens": 11}, "refine": {"maxTokens": 12, "temperature": "0.5", "samples": 3}}
    changes = {"training.objectives": ["CGD", "DistilledSFT"], "training.critique": WRONG, "generation": written}
    made = children(changes | {"teacher.shards": 3})
    child = made["misteacher"]
    assert child.stages == ("miscritique", "misrefine")
    assert (child.pool, child.pods, child.after) == ("teacher", 3, ("refine", "distill"))
    assert made["check"].after == ("refine", "distill", "misrefine")
    own, teachers = works(made, "misteacher", contract.Generate), works(made, "teacher", contract.Generate)
    assert own == teachers.model_copy(update={"roles": ("miscritique", "misrefine")})
    assert [own.draws(role) for role in own.roles] == [1, 3]


def test_every_rate_and_both_targets_share_one_pass() -> None:
    rates = [("half", "0.5", "kept"), ("all", "1", "kept"), ("all-again", "1", "refined")]
    variants = [
        {"name": name, "kind": "CGD", "critique": {"kind": "miscritique", "rate": rate, "target": target}}
        for name, rate, target in rates
    ]
    made = children({"training.variants": variants})
    assert [child.stages for child in made.values()].count(("miscritique", "misrefine")) == 1
    read = [works(made, f"train-{name}", contract.Train).critique for name, _, _ in rates]
    assert read == [contract.Critique(kind="miscritique", rate=float(rate), target=target) for _, rate, target in rates]


def test_the_check_sees_what_is_trained_and_asks_for_no_gpu() -> None:
    made = children({"training.objectives": ["CGD", "SFT"]})
    assert (made["check"].pool, made["check"].gpus, made["check"].kind) == ("cpu", 0, "Job")
    trained = tuple(works(made, stage, contract.Train) for stage in ("train-cgd", "train-sft"))
    assert works(made, "check", contract.Check).trainings == trained


def test_an_ablation_of_the_critique_is_one_of_cgd_alone() -> None:
    critique = {"kind": "corrupted", "rate": "0.3"}
    made = children({"training.objectives": ["CGD", "SFT"], "training.critique": critique})
    assert works(made, "train-cgd", contract.Train).critique == contract.Critique(kind="corrupted", rate=0.3)
    assert works(made, "train-sft", contract.Train).critique == contract.Critique()


VARIANTS: list[dict[str, Any]] = [
    {"name": "cgd-shuffled", "kind": "CGD", "critique": {"kind": "shuffled"}},
    {"name": "cgd-fast", "kind": "CGD", "learningRate": "5e-6", "epochs": 3, "bareShare": "0.25"},
    {"name": "cft-system", "kind": "CFT", "context": "system"},
]


def test_a_variant_is_a_training_with_a_stage_a_model_and_a_measurement_of_its_own() -> None:
    made = children({"training.objectives": ["CGD"], "training.variants": VARIANTS})
    names = ["cgd", "cgd-shuffled", "cgd-fast", "cft-system"]
    assert [stage for stage in made if stage.startswith("train-")] == [f"train-{name}" for name in names]
    assert made["train-cft-system"].after == ("check", "train-cgd-fast")
    assert made["evaluate-cgd-fast"].after == ("train-cgd-fast",)
    assert works(made, "evaluate-cgd-fast", contract.Evaluate).model.name == "stage://train-cgd-fast"
    checked = works(made, "check", contract.Check).trainings
    assert checked == tuple(works(made, f"train-{name}", contract.Train) for name in names)
    assert all(training.common_rows for training in checked)
    assert [lesson.title for lesson in works(made, "prepare", contract.Prepare).lessons] == ["CGD", *names[1:]]


def test_a_variant_has_its_own_settings_and_the_trainings_where_it_has_none() -> None:
    given = {"critique": {"kind": "generic"}, "bareShare": "0.1", "context": "system", "learningRate": "2e-6"}
    made = children({"training": given | {"objectives": ["CGD", "SFT"], "variants": VARIANTS, "gpusPerWorker": 1}})
    plain, shuffled, fast = (
        works(made, stage, contract.Train) for stage in ("train-cgd", "train-cgd-shuffled", "train-cgd-fast")
    )
    assert (plain.critique.kind, plain.bare_share, plain.context, plain.learning_rate) == (
        "generic", 0.1, "system", 2e-6,
    )  # fmt: skip
    own = {"name": "cgd-shuffled", "critique": contract.Critique(kind="shuffled")}
    assert shuffled == plain.model_copy(update=own)
    assert (fast.critique.kind, fast.bare_share, fast.learning_rate, fast.epochs) == ("generic", 0.25, 5e-6, 3)
    sft, cft = (works(made, stage, contract.Train) for stage in ("train-sft", "train-cft-system"))
    assert (sft.critique.kind, sft.bare_share, sft.context) == ("matched", 0.0, "user")
    assert (cft.critique.kind, cft.bare_share, cft.context) == ("matched", 0.0, "system")


def test_variants_alone_are_a_run_and_bring_the_teachers_own_pass_where_one_learns_it() -> None:
    own = {"name": "own", "kind": "DistilledSFT", "learningRate": "1e-5"}
    made = children({"training.objectives": [], "training.variants": [own]})
    assert [stage for stage in made if stage.startswith(("train", "distill"))] == ["distill", "train-own"]
    assert "distill" in works(made, "prepare", contract.Prepare).roles


def test_an_objective_by_its_short_name_is_trained_as_before_there_were_variants() -> None:
    made = children({"training.objectives": ["CGD"], "training.variants": VARIANTS})
    work = works(made, "train-cgd", contract.Train)
    assert work == works(children({}), "train-cgd", contract.Train).model_copy(update={"common_rows": True})
    assert (work.name, work.title, work.stage) == (None, "CGD", "train-cgd")


@pytest.mark.parametrize("unfinished", ["keep", "reject"])
def test_what_becomes_of_unfinished_answers_is_a_matter_of_the_answers_alone(unfinished: str) -> None:
    made = children({"generation.answer": {"unfinished": unfinished}})
    assert works(made, "answer", contract.Generate).unfinished == unfinished
    assert works(made, "teacher", contract.Generate).unfinished == "reject"
    assert works(children({}), "answer", contract.Generate).unfinished == "keep"


def test_every_objective_is_measured_on_the_same_held_out_prompts() -> None:
    given = {"fraction": "0.05", "everySteps": 7}
    made = children({"training.objectives": ["CGD", "SFT"], "training.validation": given, "training.seed": 3})
    for stage in ("train-cgd", "train-sft"):
        work = works(made, stage, contract.Train)
        assert work.validation == contract.Validation(fraction=0.05, every_steps=7, select="bare")
        assert work.seed == 3


def test_how_much_is_held_out_unasked_is_left_to_the_stage_that_knows_the_rows() -> None:
    assert works(children(), "train-cgd", contract.Train).validation == contract.Validation(fraction=None)


W = TypeVar("W")


def works(made: dict[str, Child], stage: str, kind: type[W]) -> W:
    work = made[stage].task.work
    assert isinstance(work, kind)
    return work


def test_training_starts_from_the_student_and_evaluation_looks_at_what_was_trained() -> None:
    train, base, trained = (children()[name].task.work for name in ("train-cgd", "evaluate-base", "evaluate-cgd"))
    assert isinstance(train, contract.Train)
    assert isinstance(base, contract.Evaluate)
    assert isinstance(trained, contract.Evaluate)
    assert train.student == base.model == contract.Model(name="s3://data/models/student")
    assert trained.model.name == "stage://train-cgd"


def test_without_evaluation_there_is_none() -> None:
    assert not [name for name in children({"evaluation": None}) if name.startswith("evaluate")]


def test_evaluation_of_the_base_alone() -> None:
    assert "evaluate-cgd" not in children({"evaluation.models": ["base"]})


def test_an_endpoint_teacher_asks_for_no_gpu() -> None:
    endpoint = {"url": "https://t.example/v1", "model": "big"}
    teacher = children({"teacher.model": None, "teacher.endpoint": endpoint})["teacher"]
    assert (teacher.pool, teacher.gpus) == ("cpu", 0)
    assert isinstance(teacher.task.work, contract.Generate)
    assert teacher.task.work.model is None


@pytest.mark.parametrize(
    ("stage", "gpus"), [("prepare", 0), ("answer", 2), ("teacher", 8), ("train-cgd", 4), ("report", 0)]
)
def test_gpus_of_a_pod(stage: str, gpus: int) -> None:
    changes = {"student.tensorParallel": 2, "teacher.tensorParallel": 8, "training.gpusPerWorker": 4}
    assert children(changes)[stage].gpus == gpus


def test_a_cpu_run_asks_for_no_gpu_at_all() -> None:
    assert {child.gpus for child in plan(run({"placement.accelerator": "none"}))} == {0}


@pytest.mark.parametrize(("memory", "size"), [("80Gi", 80 * 2**30), ("24G", 24 * 10**9)])
def test_prepare_is_told_how_large_the_gpus_are_and_what_they_train(memory: str, size: int) -> None:
    changes = {"placement.gpuMemory": memory, "training.workers": 2, "training.objectives": FIVE}
    work = children(changes)["prepare"].task.work
    assert isinstance(work, contract.Prepare)
    assert (work.gpu_memory, work.training) == (size, children(changes)["train-cgd"].task.work)


def test_prepare_checks_no_gpu_whose_size_it_does_not_know() -> None:
    work = children()["prepare"].task.work
    assert isinstance(work, contract.Prepare)
    assert work.gpu_memory is None


def test_shards_become_pods() -> None:
    assert children({"student.shards": 8})["answer"].pods == 8
    assert children({"training.workers": 2})["train-cgd"].pods == 2


def test_names_are_the_same_every_time_and_differ_between_runs() -> None:
    assert [child.name for child in plan(run())] == [child.name for child in plan(run())]
    assert not {child.name for child in plan(run())} & {child.name for child in plan(run(name="other"))}


@pytest.mark.parametrize(
    "name",
    ["x" * 63, "9" * 63, "9", "x", "1st", "1.2.3", "a.b", f"{'x' * 18}.y", f"{'1' * 14}-.y", f"{'x' * 17}--y", "x-9"],
)
def test_a_childs_name_is_one_that_services_and_pods_can_have(name: str) -> None:
    longest = [{"name": "a" * size, "kind": "CGD"} for size in (1, 12, 13, 23, 24)]
    children = plan(run({"training.objectives": FIVE, "training.variants": longest}, name=name))
    for child in children:
        last = "node-0-511-xxxxx" if child.image == "train" else "1023-xxxxx"
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", child.name)
        assert len(f"{child.name}-{last}") <= 63
    assert len({child.name for child in children}) == len(children)


@pytest.mark.parametrize(
    ("wanted", "served", "started", "chosen"),
    [
        ("auto", ["PyTorchJob", "TrainJob"], [], "PyTorchJob"),
        ("auto", ["TrainJob"], [], "TrainJob"),
        ("auto", [], [], None),
        ("auto", ["PyTorchJob", "TrainJob"], ["Job", "TrainJob"], "TrainJob"),
        ("TrainJob", ["PyTorchJob", "TrainJob"], [], "TrainJob"),
        ("TrainJob", ["PyTorchJob"], [], None),
        ("PyTorchJob", ["TrainJob"], ["Job"], None),
    ],
)
def test_the_backend_is_the_one_that_trains_already_or_is_asked_for_or_served(
    wanted: str, served: Any, started: list[str], chosen: str | None
) -> None:
    assert choose_backend(run({"training.backend": wanted}), served, started) == chosen


@pytest.mark.parametrize("backend", ["PyTorchJob", "TrainJob"])
def test_the_backend_is_the_kind_of_trainings_alone_and_no_part_of_a_task(backend: Any) -> None:
    this = run()
    for child, usual in zip(plan(this, backend), plan(this), strict=True):
        assert child.kind == (backend if child.stage == "train-cgd" else "Job")
        assert (child.name, child.task) == (usual.name, usual.task)


def test_a_task_survives_its_journey_through_the_environment() -> None:
    for child in plan(run()):
        assert contract.StageTask.model_validate_json(child.task.to_json()) == child.task


def test_the_name_of_a_stage_is_written_to_yaml_as_the_text_it_is() -> None:
    assert yamls.dump({"stage": plan(run())[0].stage}) == "stage: prepare\n"


def test_no_secret_and_nothing_that_may_change_is_part_of_a_task() -> None:
    changes = {"storage.credentialsSecretRef": {"name": "keys"}, "suspend": True, "ttlSecondsAfterFinished": 60}
    for child in plan(run(changes)):
        if child.stage != "report":  # which shows the spec, with the Secret's name
            assert "keys" not in child.task.to_json()
        assert "suspend" not in child.task.to_json()
        assert "ttlSeconds" not in child.task.to_json()


def test_numbers_are_numbers_in_a_task_and_in_the_report_what_the_user_wrote() -> None:
    made = children({"training.learningRate": "2.50e-6", "generation.maxRejected": "2.0%"})
    train, report = made["train-cgd"].task, made["report"].task
    assert '"learningRate":2.5e-6' in train.to_json()
    assert '"maxRejected":0.02' in train.to_json()
    assert isinstance(report.work, contract.Report)
    assert "learningRate: '2.50e-6'" in report.work.spec
    assert "warmupRatio" not in report.work.spec, "a default"


def test_early_questions_reach_the_trainings_as_the_evaluation_asks_them() -> None:
    named = {"name": "sums", "source": "s3://b/sums.jsonl", "fields": {"reference": "answer"}, "instruction": "Box it."}
    asked = {"evaluation.benchmarks": [{"name": "GSM8K"}, named], "evaluation.early": {"questions": 8}}
    plain, evaluated = (children(asked)[stage].task.work for stage in ("train-cgd", "evaluate-cgd"))
    instructions = {one.name: one.instruction for one in evaluated.benchmarks}
    assert "boxed" in instructions["GSM8K"]
    assert plain.early == contract.Early(questions=8, instructions=instructions)
    judged = children(asked | {"training.stopUnless": {"gain": "0.05"}})["train-cgd"].task.work
    assert judged.early.stop_unless == contract.StopUnless(after=0.1, gain=0.05)
    assert judged.model_copy(update={"early": None}) == plain.model_copy(update={"early": None})


def test_a_run_ends_for_its_method_and_not_for_a_baseline_or_an_ablation() -> None:
    ablation = {"name": "blind", "kind": "CGD", "critique": {"kind": "none"}}
    asked = {
        "evaluation.benchmarks": [{"name": "GSM8K"}],
        "evaluation.early": {"questions": 8},
        "training.stopUnless": {"gain": "0.05"},
        "training.variants": [{"name": "cgd-slow", "kind": "CGD", "learningRate": "1e-7"}, ablation],
    }

    def judged(*objectives: str) -> list[str]:
        made = children(asked | {"training.objectives": list(objectives)})
        works = [made[stage].task.work for stage in made if stage.startswith("train-")]
        assert all(work.early.questions == 8 for work in works)
        return [work.title for work in works if work.early.stop_unless]

    assert judged("CGD", "CFT", "RefinedSFT") == ["CGD", "cgd-slow"]
    asked["training.variants"] = [ablation]
    assert judged("CFT", "RefinedSFT") == ["CFT", "RefinedSFT", "blind"]


def test_published_figures_change_the_tasks_that_read_them_and_no_other() -> None:
    plain, asking = children(), children({"evaluation.published": "s3://data/figures.json"})
    assert "published" not in plain["report"].task.to_json()
    for stage in ("prepare", "report"):
        published = asking[stage].task.work.published
        assert published is not None
        assert (published.uri, published.student) == ("s3://data/figures.json", "s3://data/models/student")
        assert {"arithmetic", "MATH-500", "IFEval"} <= set(published.benchmarks)
    changed = [stage for stage in plain if plain[stage].task != asking[stage].task]
    assert changed == ["prepare", "report"]


def test_an_audit_changes_the_report_and_no_other_task() -> None:
    plain, audited = children(), children({"evaluation.audit": 40})
    assert "audit" not in plain["report"].task.to_json()
    report = audited["report"].task.work
    assert isinstance(report, contract.Report)
    assert report.audit == 40
    changed = [stage for stage in plain if plain[stage].task != audited[stage].task]
    assert changed == ["report"]


@pytest.mark.parametrize(("told", "written"), [(contract.Engine, ServedModel), (contract.Endpoint, Endpoint)])
def test_what_a_task_takes_from_a_manifest_by_its_names_is_there(told: type[Any], written: type[Any]) -> None:
    assert told.model_fields.keys() <= written.model_fields.keys()


def test_a_rival_is_the_base_model_with_more_passes_in_a_stage_of_its_own() -> None:
    made = children({"evaluation.rivals": [{"kind": "SelfRefine", "rounds": 3}, {"kind": "Reflexion"}]})
    base, rival = made["evaluate-base"].task.work, made["evaluate-selfrefine"].task.work
    assert isinstance(base, contract.Evaluate)
    assert rival == base.model_copy(update={"rival": contract.Rival(kind="SelfRefine", rounds=3)})
    assert made["evaluate-reflexion"].task.work.rival == contract.Rival(kind="Reflexion", rounds=1)
    assert base.rival is None
    assert made["evaluate-selfrefine"].after == made["evaluate-base"].after
    assert "evaluate-selfrefine" in made["report"].after


@pytest.mark.parametrize(("given", "told"), [(None, None), ("70%", 0.7), ("0%", 0.0)])
def test_the_check_is_told_how_many_refinements_must_be_right(given: str | None, told: float | None) -> None:
    children = plan(run({"generation.minRightRefinements": given}))
    (work,) = (child.task.work for child in children if child.stage == "check")
    assert isinstance(work, contract.Check)
    assert work.min_right_refinements == told


def test_tasks_of_lm_eval_are_a_stage_of_every_model_with_what_is_known_filled_in() -> None:
    tasks = [{"name": "IFEval"}, {"name": "MMLU-Pro", "limit": 10}, {"name": "gsm8k", "metric": "m,f", "fewShot": 3}]
    code = {"evaluation.tasks": [*tasks, {"name": "HumanEval"}], "evaluation.executeCode": True}
    made = children(code | {"evaluation.taskData": "s3://data/mirror"})
    base, trained = made["harness-base"], made["harness-cgd"]
    assert base.task.work.tasks == (
        contract.HarnessTask(name="IFEval", task="ifeval", metric="prompt_level_strict_acc"),
        contract.HarnessTask(
            name="MMLU-Pro", task="mmlu_pro", metric="exact_match,custom-extract", few_shot=5, limit=10
        ),
        contract.HarnessTask(name="gsm8k", task="gsm8k", metric="m,f", few_shot=3),
        contract.HarnessTask(name="HumanEval", task="humaneval_instruct", metric="pass@1", executes=True),
    )
    assert base.task.work.data == "s3://data/mirror"
    assert trained.task.work == base.task.work.model_copy(update={"model": contract.Model(name="stage://train-cgd")})
    assert (base.after, trained.after) == (made["evaluate-base"].after, ("train-cgd",))
    assert {"harness-base", "harness-cgd"} <= set(made["report"].after)


TASKS_OF_ALL_KINDS = [{"name": name} for name in ("IFEval", "TruthfulQA", "MuSR", "HumanEval")]


@pytest.mark.parametrize(
    ("thinking", "limit", "named"),
    [("on", 4000, ("TruthfulQA", "MuSR", "HumanEval")), ("off", None, None), ("auto", None, None)],
)
def test_tasks_of_a_student_that_thinks_get_the_runs_limit_and_prepare_knows_those_without_room_for_a_thought(
    thinking: str, limit: int | None, named: tuple[str, ...] | None
) -> None:
    changes = {
        "student.chat": {"thinking": thinking},
        "evaluation.tasks": TASKS_OF_ALL_KINDS,
        "evaluation.executeCode": True,
        "evaluation.sampling": {"maxTokens": 4000},
    }
    made = children(changes)
    assert made["harness-base"].task.work.max_tokens == made["harness-cgd"].task.work.max_tokens == limit
    assert made["prepare"].task.work.without_thoughts == named


def test_tasks_are_asked_of_the_models_that_are_evaluated() -> None:
    made = children({"evaluation.tasks": [{"name": "IFEval"}], "evaluation.models": ["trained"]})
    assert [name for name in made if name.startswith("harness")] == ["harness-cgd"]


def test_samples_select_and_keep_reach_the_stages_that_they_concern() -> None:
    generation = {
        "answer": {"samples": 4, "temperature": "0.7"},
        "refine": {"samples": 2, "temperature": "0.5", "select": "all-right"},
    }
    works = {child.stage: child.task.work for child in plan(run({"generation": generation, "training.keep": "right"}))}
    answer, teacher, check, train = (works[stage] for stage in ("answer", "teacher", "check", "train-cgd"))
    assert isinstance(answer, contract.Generate)
    assert isinstance(teacher, contract.Generate)
    assert isinstance(check, contract.Check)
    assert isinstance(train, contract.Train)
    assert answer.draws("answer") == 4
    assert [teacher.draws(role) for role in teacher.roles] == [1, 2]
    assert (check.select, check.keep, train.common_rows) == ("all-right", "right", True)


@pytest.mark.parametrize(
    ("changes", "common"),
    [
        ({}, False),
        ({"training.objectives": ["CGD", "CFT"]}, True),
        ({"training.keep": "right"}, True),
        ({"generation.refine": {"samples": 2, "temperature": "0.5"}}, True),
        ({"generation.answer": {"samples": 2, "temperature": "0.5"}}, False),
    ],
)
def test_a_training_asks_for_the_common_rows_where_they_may_be_fewer(changes: dict[str, Any], common: bool) -> None:
    works = [child.task.work for child in plan(run(changes))]
    assert {work.common_rows for work in works if isinstance(work, contract.Train)} == {common}


def test_a_plan_makes_no_task_before_it_is_asked_for() -> None:
    """Most reconciles start no child, and tasks are most of the work of a plan."""
    made = plan(run())
    assert made[0].task is made[0].task
    assert [child.stage for child in made if "task" in vars(child)] == ["prepare"]


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({}, None),
        ({"training.keep": "one-right"}, ("spec.training.keep",)),
        (
            {"generation.refine.select": "all-right", "generation.minRightRefinements": "70%"},
            ("spec.generation.refine.select", "spec.generation.minRightRefinements"),
        ),
    ],
)
def test_prepare_is_told_which_fields_have_refinements_graded(
    changes: dict[str, Any], fields: tuple[str, ...] | None
) -> None:
    work = children(changes)["prepare"].task.work
    assert isinstance(work, contract.Prepare)
    assert work.graded_by == fields
    assert ("gradedBy" in work.to_json()) == bool(fields)
