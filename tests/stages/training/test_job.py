"""The inputs of a training's digest: what was trained before this or that setting existed is found again."""

from pathlib import Path
from typing import Any

import pytest
from support import families
from support.stage_builders import RUN
from support.train_builders import quadruple, refined, train_work

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Validation
from cgd_stages.models.resolve import Resolved
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.run import RunStore
from cgd_stages.training.dataset import Dataset
from cgd_stages.training.job import inputs_of, router_loss_weight


@pytest.mark.parametrize(
    ("family", "set_to", "weight"),
    [
        ("OLMo 2", None, 0.0),
        ("Mixtral", None, 0.02),
        ("gpt-oss", None, 0.9),
        ("gpt-oss", 0.001, 0.001),
        ("gpt-oss", 0.0, 0.0),
    ],
)
def test_the_router_s_loss_has_the_weight_of_the_config_unless_the_run_has_its_own(
    family: str, set_to: float | None, weight: float
) -> None:
    work = train_work(Path("student"), router_loss_weight=set_to)
    assert router_loss_weight(work, families.config_of(family)) == weight


def test_the_router_s_loss_enters_the_digest_where_there_is_such_a_loss(bucket: Bucket, tiny_model: Path) -> None:
    refined(bucket, [quadruple(1)])
    work = train_work(Path("student"), router_loss_weight=0.0)
    dataset = Dataset.of(RunStore(bucket, RUN), work, ChatTemplate.load(tiny_model))
    student = Resolved("student", "1")
    without, with_one = (inputs_of("train-cgd", dataset, student, weight)["training"] for weight in (0.0, 0.02))
    assert with_one == without | {"routerLossWeight": 0.02}
    assert set(without) == {
        "epochs", "globalBatchSize", "learningRate", "warmupRatio", "weightDecay", "maxSequenceLength", "dtype", "seed",
        "validation",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("select", "work", "named"),
    [
        ("bare", {}, "bare"),
        ("bare", {"objective": "CFT"}, "bare"),
        ("bare", {"objective": "RefinedSFT"}, "best"),
        ("bare", {"bare_share": 1.0}, "best"),
        ("context", {}, "best"),
        ("last", {}, "last"),
    ],
    ids=str,
)
def test_only_another_choice_of_the_model_has_another_digest(
    bucket: Bucket, tiny_model: Path, select: Any, work: dict[str, Any], named: str
) -> None:
    """`best` is what digests said before the prompt alone could choose; of four prompts none is held out unasked."""
    refined(bucket, [quadruple(number) for number in range(4)])
    nothing_held_out = "last" if select == "last" else "best"
    for fraction, expected in {0.3: named, 0.0: nothing_held_out, None: nothing_held_out}.items():
        given = train_work(Path("student"), validation=Validation(fraction=fraction, select=select), **work)
        dataset = Dataset.of(RunStore(bucket, RUN), given, ChatTemplate.load(tiny_model))
        told = inputs_of("train-cgd", dataset, Resolved("student", "1"), 0.0)["training"]["validation"]
        assert told == {"fraction": fraction, "everySteps": 200, "select": expected}
