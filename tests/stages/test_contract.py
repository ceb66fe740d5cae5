"""What both worlds share: names of stages, and numbers that a manifest has as text."""

import copy
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from cgd_stages.contract import MANIFEST, Contract, HeldOut, Number, Sampling, StageName, StageTask

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "kind", "model"),
    [("train-cgd", "train", "cgd"), ("evaluate-base", "evaluate", "base"), ("answer", "answer", ""), ("", "", "")],
)
def test_a_stages_name_tells_its_kind_and_its_model(name: str, kind: str, model: str) -> None:
    assert (StageName(name).kind, StageName(name).model) == (kind, model)
    assert not model or StageName.of(kind, model) == name


def test_a_stages_name_is_stored_and_sent_as_the_text_that_it_is() -> None:
    class Told(Contract):
        stage: StageName

    read = Told.model_validate_json('{"stage":"train-cgd"}')
    assert (type(read.stage), read.stage.kind) == (StageName, "train")
    assert read.to_json() == '{"stage":"train-cgd"}'
    assert {read.stage: 1} == {"train-cgd": 1}
    assert StageTask.model_fields["stage"].annotation is StageName


def test_no_other_module_takes_the_name_of_a_stage_apart_or_puts_it_together() -> None:
    takes_apart = re.compile(r"""f?["'](train|evaluate|harness)-|(partition|split)\(["']-["']\)""")
    purposes = "multi_pass.py"  # of seeds, which are no stages
    code = [
        path
        for folder in ("operator/cgd_operator", "operator/cgd_cli", "images/cgd_stages")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != purposes and path.parent.name != "contract"
    ]
    assert len(code) > 100
    assert not [str(path) for path in code if takes_apart.search(path.read_text())]


@pytest.mark.parametrize(
    ("text", "value"), [("2%", 0.02), ("0%", 0.0), ("100%", 1.0), ("12.5%", 0.125), ("1e-6", 1e-6)]
)
def test_a_number_remembers_its_text(text: str, value: float) -> None:
    number = Number(text)
    assert (number, str(number), f"{number}") == (value, text, text)
    for twin in (copy.deepcopy(number), copy.copy(number)):
        assert (twin, twin.text) == (value, text)


def test_a_manifest_has_numbers_as_text_and_a_task_has_them_as_numbers() -> None:
    given = Sampling.model_validate_json('{"temperature":"0.50"}', strict=True)
    assert given.temperature == 0.5
    assert given.model_dump(mode="json", exclude_defaults=True, context=MANIFEST) == {"temperature": "0.50"}
    told = '{"maxTokens":16384,"temperature":0.5,"topP":1.0,"seed":0}'
    assert given.to_json() == told
    assert Sampling.model_validate_json(told) == given
    assert type(Sampling.model_validate_json(told).temperature) is float


def test_a_default_is_written_as_a_manifest_would_have_it() -> None:
    assert Sampling().model_dump(mode="json", context=MANIFEST, exclude_none=True) == {
        "max_tokens": 16384, "temperature": "0", "top_p": "1", "seed": 0,
    }  # fmt: skip


@pytest.mark.parametrize("value", ["0.5", "-1", "high", "0.7e", '"-1"', '"0.51"', '"1e400"'])
def test_a_manifest_takes_no_other_number(value: str) -> None:
    with pytest.raises(ValidationError):
        HeldOut.model_validate_json(f'{{"fraction":{value}}}', strict=True)


def test_the_bounds_are_a_tasks_too() -> None:
    with pytest.raises(ValidationError, match=r"from 0 to 0\.5"):
        HeldOut(fraction=0.51)
