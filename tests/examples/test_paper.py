"""The paper's runs: their settings are the paper's, their prices those that are told, and so are their figures."""

import json
import re
from pathlib import Path

import pytest

from cgd_cli.estimate import Assumptions, costs, fits, lengths
from cgd_cli.manifest import published_tables, run_of
from cgd_cli.sizes import GPUS, active_in, size_in
from cgd_operator.planning.dag import Run
from cgd_stages.results.published import contradictions

FOLDER = Path(__file__).parents[2] / "examples/paper"
PUBLISHED = FOLDER / "published.json"
FAMILIES = {path.stem: run_of(path) for path in sorted(FOLDER.glob("*.yaml"))}
SIZES = {"mixtral": "47B-A13B"}
"""Options for names that no number of parameters can be read off."""
PAPER = pytest.mark.parametrize("family", FAMILIES)
REPEATED = ("llama", "s1", "qwen-math")
"""Those whose figures the paper's tables have."""


def priced(family: str) -> tuple[Run, Assumptions]:
    run = FAMILIES[family]
    name, teacher = SIZES.get(family, run.spec.student.model), run.spec.teacher.model or ""
    student, taught = size_in(name), size_in(teacher)
    assert student is not None
    assert taught is not None
    given = {"rows": run.spec.prompts.limit, "student": student, "teacher": taught, "student_active": active_in(name)}
    return run, Assumptions(gpu=GPUS["a100-80gb"], **given)


def test_there_is_a_run_for_each_family_of_students() -> None:
    assert sorted(FAMILIES) == ["llama", "mixtral", "olmo", "qwen-math", "s1"]


@PAPER
def test_a_run_has_the_papers_settings(family: str) -> None:
    spec = FAMILIES[family].spec
    training, generation = spec.training, spec.generation
    assert spec.prompts.limit == 100_000
    assert set(training.objectives) == {"SFT", "DistilledSFT", "CFT", "RefinedSFT", "CGD"}
    assert (training.global_batch_size, training.epochs, training.learning_rate) == (64, 1, 1e-6)
    assert training.workers * training.gpus_per_worker == 16
    assert training.packing
    texts = (generation.answer, generation.critique, generation.refine, generation.distill)
    assert {(text.temperature, text.max_tokens) for text in texts} == {(0, 16384)}
    assert spec.evaluation
    assert (spec.evaluation.sampling.temperature, spec.evaluation.sampling.max_tokens) == (0, 8192)
    assert (spec.teacher.tensor_parallel, spec.teacher.max_model_len) == (8, 32768)
    assert spec.prompts.decontaminate


@PAPER
def test_a_run_asks_for_the_16_gpus_of_the_paper_and_no_more(family: str) -> None:
    run, assumptions = priced(family)
    stages = costs(run, assumptions)
    assert max(cost.gpus for cost in stages) == 16
    assert {cost.gpus for cost in stages if cost.stage.startswith("train-")} == {16}


@PAPER
def test_its_models_fit_and_so_do_the_lengths_that_are_expected(family: str) -> None:
    run, assumptions = priced(family)
    assert [fit.text for fit in fits(run, assumptions) if not fit.fits] == []
    assert [length.text for length in lengths(run, assumptions) if not length.fits] == []


@PAPER
def test_the_price_in_the_readme_is_that_of_the_plan(family: str) -> None:
    readme = (FOLDER / "README.md").read_text()
    told = re.search(rf"^\| \[{family}\.yaml\].*\| ([\d,.]+) \| ([\d,.]+) \| ([\d,]+) \|$", readme, re.MULTILINE)
    assert told
    run, assumptions = priced(family)
    stages = costs(run, assumptions)
    cgd = next(cost for cost in stages if cost.stage == "train-cgd")
    hours, money = sum(cost.gpu_hours for cost in stages), sum(cost.money for cost in stages)
    assert told.groups() == (f"{cgd.gpu_hours:,.1f}", f"{hours:,.1f}", f"{money:,.0f}")


@pytest.mark.parametrize("family", REPEATED)
def test_the_published_figures_are_about_the_runs_student_and_benchmarks(family: str) -> None:
    run = FAMILIES[family]
    tables = published_tables(run, FOLDER / f"{family}.yaml", PUBLISHED)
    assert run.spec.evaluation
    asked = {one.name for one in (*run.spec.evaluation.benchmarks, *run.spec.evaluation.tasks)}
    assert asked >= {name for table in tables for name in table.benchmarks}
    assert {row.method for table in tables for row in table.rows} <= {"base", *run.spec.training.objectives}


def test_the_averages_that_contradict_their_figures_are_these_five() -> None:
    found = [
        said
        for family in REPEATED
        for said in contradictions(published_tables(FAMILIES[family], FOLDER / f"{family}.yaml", PUBLISHED))
    ]
    assert found == [
        "CFT: Avg. (G2) 32.4, its figures give 32.2",
        "CFT, teacher GPT-4o: Avg. (G2) 36.4, its figures give 35.4",
        "base: Avg. (G1) 35.4, its figures give 39.7",
        "base: Avg. (G2) 17.9, its figures give 17.3",
        "CFT, teacher simplescaling/s1.1-32B: Avg. 46.9, its figures give 42.2",
    ]


def test_every_table_and_row_names_its_source() -> None:
    tables = json.loads(PUBLISHED.read_text())["tables"]
    assert all(table["source"] and all(row["source"] for row in table["rows"]) for table in tables)
    assert sum(len(row["figures"]) for table in tables for row in table["rows"]) == 11 * 8 + 5 * 5 + 5 * 5
