"""Budgets: what ends a run, what does not, and how it is told."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from support.builders import CHILDREN, job, run

from cgd_operator.api.status import CGDRunStatus, Condition
from cgd_operator.facts.children import observe
from cgd_operator.facts.due import expired
from cgd_operator.facts.trouble import Trouble, exceeded
from cgd_operator.planning.dag import plan

HOUR = 3600


def finished(*stages: str) -> list[dict[str, Any]]:
    return [job(stage, "Complete") for stage in stages]


def limit(
    budget: dict[str, Any] | None, *children: dict[str, Any], gpu_seconds: int = 0, age: int = 0
) -> Trouble | None:
    this = run({"budget": budget} if budget else None)
    return exceeded(this, plan(this), observe(children, []), gpu_seconds, timedelta(seconds=age))


@pytest.mark.parametrize(
    ("budget", "gpu_seconds", "age", "reason"),
    [
        ({"gpuHours": "400"}, 400 * HOUR - 1, 10**9, None),
        ({"gpuHours": "400"}, 400 * HOUR, 0, "BudgetExceeded"),
        ({"gpuHours": "0.5"}, 1800, 0, "BudgetExceeded"),
        ({"deadlineSeconds": 60}, 10**9, 59, None),
        ({"deadlineSeconds": 60}, 0, 60, "DeadlineExceeded"),
        ({"gpuHours": "1", "deadlineSeconds": 60}, HOUR - 1, 60, "DeadlineExceeded"),
        (None, 10**9, 10**9, None),
    ],
)
def test_a_limit_is_met_when_it_is_reached(
    budget: dict[str, Any] | None, gpu_seconds: int, age: int, reason: str | None
) -> None:
    met = limit(budget, job("prepare"), gpu_seconds=gpu_seconds, age=age)
    assert (met.reason if met else None) == reason


def test_a_run_that_is_through_met_no_limit_however_late_it_is_looked_at() -> None:
    assert limit({"deadlineSeconds": 60}, *finished(*CHILDREN), age=61) is None
    assert limit({"deadlineSeconds": 60}, *finished(*CHILDREN[:-1]), age=61) is not None


def test_a_stage_that_failed_stays_the_reason() -> None:
    assert limit({"deadlineSeconds": 60}, job("prepare", "Failed"), age=61) is None


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        ({"gpuHours": "400"}, "401.50 GPU-hours are used, of 400 in spec.budget.gpuHours"),
        ({"deadlineSeconds": 60}, "the run did not end within 60 s of its creation (spec.budget.deadlineSeconds)"),
    ],
)
def test_the_message_has_the_numbers_and_says_what_to_do(budget: dict[str, Any], told: str) -> None:
    met = limit(budget, gpu_seconds=int(401.5 * HOUR), age=61)
    assert met is not None
    assert met.message == (
        f"{told}; the pods are stopped, what they stored stays: apply a new run under another name with a larger "
        "budget, and it goes on from there"
    )


@pytest.mark.parametrize(
    ("ttl", "state", "succeeded", "minutes", "expected"),
    [
        (3600, "Succeeded", "True", 60, True),
        (3600, "Succeeded", "True", 59, False),
        (3600, "Failed", "False", 60, True),
        (0, "Succeeded", "True", 0, True),
        (0, "Training", "Unknown", 60, False),
        (0, "Refused", "False", 60, False),
        (None, "Succeeded", "True", 10**6, False),
    ],
)
def test_a_run_expires_so_long_after_its_end(
    ttl: int | None, state: str, succeeded: str, minutes: int, expected: bool
) -> None:
    end = datetime(2026, 1, 1, tzinfo=UTC)
    condition = Condition.model_validate(
        {"type": "Succeeded", "status": succeeded, "reason": "Any", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    )
    status = CGDRunStatus(state=state, conditions=(condition,))
    assert expired(ttl, status, end + timedelta(minutes=minutes)) is expected


def test_a_run_that_nobody_has_looked_at_does_not_expire() -> None:
    assert not expired(0, CGDRunStatus(), datetime(2026, 1, 1, tzinfo=UTC))
