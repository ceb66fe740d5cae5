"""The quick start's sums: the committed files are what the script makes, and every answer is right."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from cgd_stages.grading.reference import reference_answer
from replicate import tutor
from replicate.arithmetic import read_question
from replicate.study import sums_of

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS, EXAM = EXAMPLES / "quickstart-rows.jsonl", EXAMPLES / "quickstart-exam.jsonl"


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def result_of(question: str) -> int:
    """Read off the question's words, not off the script."""
    found = re.fullmatch(r"What is ([\d +-]+)\? End with \"(#### N|\\boxed\{N\})\"\.", question)
    assert found, question
    return sum(int(number.replace(" ", "")) for number in re.findall(r"[+-]? ?\d+", found[1]))


@pytest.fixture(scope="module")
def everything() -> list[dict[str, str]]:
    return read(ROWS) + read(EXAM)


def test_the_files_are_what_the_script_makes() -> None:
    script: dict[str, Any] = runpy.run_path(str(EXAMPLES / "make_sums.py"))
    rows, exam = script["make"]()
    assert ROWS.read_text() == script["to_jsonl"](rows, "row", worked=True)
    assert EXAM.read_text() == script["to_jsonl"](exam, "exam", worked=False)
    assert (len(rows), len(exam)) == (64, 128)


def test_every_answer_is_right_and_its_value_is_found(everything: list[dict[str, str]]) -> None:
    for row in everything:
        assert reference_answer(row["answer"]) == str(result_of(row["question"])), row


def test_no_sum_and_no_id_comes_twice(everything: list[dict[str, str]]) -> None:
    sums = {sums_of(read_question(row["question"])) for row in everything}
    assert len(sums) == len({row["id"] for row in everything}) == len(everything)


def test_the_tutor_that_the_demo_starts_can_check_every_question(everything: list[dict[str, str]]) -> None:
    for row in everything:
        assert tutor.reply([{"role": "user", "content": row["question"]}]) != tutor.UNKNOWN


def test_the_manifest_reads_these_files_and_names_the_addresses_of_the_demo() -> None:
    from cgd_local import background

    spec = yaml.safe_load((EXAMPLES / "quickstart.yaml").read_text())["spec"]
    files = dict(file.split("=") for file in background.QUICKSTART)
    for source, path in (
        (spec["prompts"]["source"], ROWS),
        (spec["evaluation"]["benchmarks"][0]["source"], EXAM),
    ):
        assert EXAMPLES.parent / files[source.removeprefix("configmap://")] == path
    assert spec["teacher"]["endpoint"] == {
        "url": background.TUTOR,
        "model": tutor.MODEL,
        "maxConcurrency": 8,
    }
    assert spec["storage"]["endpoint"] == f"http://127.0.0.1:{background.S3_PORT}"
    assert spec["storage"]["credentialsSecretRef"]["name"] == background.SECRET
