"""A few of the strange manifests of `make fuzz`: each is refused with a message or leads to a child."""

import itertools
from typing import Any

import pytest
from support import fuzz

embedded = pytest.mark.parametrize("world", ["embedded"], indirect=True)


@embedded
@pytest.mark.parametrize("seed", [1, 2])
async def test_every_manifest_is_refused_with_a_message_or_started(world: Any, seed: int) -> None:
    found = await fuzz.fates(60, seed, str(world.kubeconfig))
    assert {name: runs for name, runs in found.items() if name not in fuzz.FATES} == {}
    assert {"not taken", "started"} <= found.keys()


@embedded
async def test_an_operator_that_breaks_and_a_run_that_nothing_happens_to_are_found(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("oops")

    with monkeypatch.context() as patch:
        patch.setattr("cgd_operator.controller.view.plan", broken)
        assert "KeyError: 'oops'" in await fuzz.fates(20, 1, str(world.kubeconfig))
    monkeypatch.setattr("cgd_operator.controller.view.decide", lambda *_, **__: ())
    assert [name for name in await fuzz.fates(20, 1, str(world.kubeconfig)) if name.startswith("stuck")]


def test_mutants_are_the_same_for_a_seed_and_differ_from_what_they_were_made_of() -> None:
    one, again = (list(itertools.islice(fuzz.mutants(7), 50)) for _ in range(2))
    specs = [run["spec"] for run in fuzz.seeds()]
    assert one == again
    assert sum(run["spec"] in specs for run in one) < 5
