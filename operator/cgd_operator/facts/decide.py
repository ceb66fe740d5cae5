"""What to do next. Pure: the plan and the facts in, actions out; nothing is remembered."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from cgd_operator.facts.children import LOST, ChildFacts, Fate, PodFacts
from cgd_operator.planning.dag import Child


@dataclass(frozen=True)
class Start:
    child: Child


@dataclass(frozen=True)
class Hold:
    """Suspend a child: its pods go, what they stored stays."""

    facts: ChildFacts


@dataclass(frozen=True)
class Resume:
    """Let go of a child that the operator held."""

    facts: ChildFacts


@dataclass(frozen=True)
class GiveUp:
    """End a child that its controller would try for ever: it has failed."""

    facts: ChildFacts
    why: str


@dataclass(frozen=True)
class Replace:
    """Have the pod of a lost node made again: it is declared failed, and deleted without its node's word."""

    stage: str
    pod: PodFacts


Action = Start | Hold | Resume | GiveUp | Replace

ACTIVE = (Fate.WAITING, Fate.RUNNING)


def decide(
    children: tuple[Child, ...], facts: Mapping[str, ChildFacts], *, stop: bool, enough: Mapping[str, str]
) -> tuple[Action, ...]:
    """The actions of this moment; none when there is only to wait, or nothing more to do. `stop`: the run is suspended,
    or has met a limit. `enough`: the stages whose child was tried often enough, and why."""
    there = [facts[child.stage] for child in children if child.stage in facts]
    if stop or any(one.fate is Fate.FAILED for one in there):
        return tuple(Hold(one) for one in there if one.fate in ACTIVE and not _deactivated(one))
    if hopeless := [one for one in there if one.stage in enough and one.fate in ACTIVE]:
        return tuple(GiveUp(one, enough[one.stage]) for one in hopeless)
    resumed = tuple(Resume(one) for one in there if _deactivated(one) or (one.fate is Fate.SUSPENDED and one.held))
    done = done_stages(children, facts)
    ready = (child for child in children if child.stage not in facts and _may_start(child, done))
    return resumed + tuple(Start(child) for child in ready)


def replacements(facts: Mapping[str, ChildFacts], patience: int | None, now: datetime) -> tuple[Replace, ...]:
    """The pods of lost nodes that should have been gone for `patience` seconds; None: they are left alone."""
    if patience is None:
        return ()
    pods = [(one.stage, pod) for one in facts.values() for pod in one.pods if pod.phase == LOST and pod.due]
    return tuple(Replace(stage, pod) for stage, pod in pods if pod.due and now - pod.due >= timedelta(seconds=patience))


def _deactivated(facts: ChildFacts) -> bool:
    """The operator has deactivated its Workload; Kueue may not have stopped it yet."""
    return facts.workload is not None and facts.workload.held


def _may_start(child: Child, done: frozenset[str]) -> bool:
    return done.issuperset(child.after) and not done.issuperset(child.stages)


def done_stages(children: tuple[Child, ...], facts: Mapping[str, ChildFacts]) -> frozenset[str]:
    """Stages that have succeeded: their child says so, or a later child exists that only starts after them.

    The second half keeps a finished stage finished when somebody has cleaned up its Job.
    """
    done: set[str] = set()
    for child in reversed(children):
        fate = facts[child.stage].fate if child.stage in facts else Fate.ABSENT
        if fate is Fate.SUCCEEDED or done.intersection(child.stages):
            done.update(child.stages)
        if fate is not Fate.ABSENT or done.issuperset(child.stages):
            done.update(child.after)
    return frozenset(done)
