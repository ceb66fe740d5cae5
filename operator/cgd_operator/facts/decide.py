"""What to do next. Pure and without memory: the plan and the facts in, actions out."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from cgd_operator.facts.children import ChildFacts, Fate
from cgd_operator.facts.pods import LOST, PodFacts
from cgd_operator.planning.dag import Child


@dataclass(frozen=True)
class Start:
    child: Child


@dataclass(frozen=True)
class Hold:
    """Suspend a child: its pods end, their stored rows stay."""

    facts: ChildFacts


@dataclass(frozen=True)
class Resume:
    """Resume a child that the operator has suspended."""

    facts: ChildFacts


@dataclass(frozen=True)
class GiveUp:
    """Fail a child that its controller would retry for ever."""

    facts: ChildFacts
    why: str


@dataclass(frozen=True)
class Keep:
    """Keep a failed child that its controller would delete after a time: without it, its stage would be tried again."""

    facts: ChildFacts


@dataclass(frozen=True)
class Replace:
    """Replace a pod of a lost node: declare it failed, and delete it without waiting for its node."""

    stage: str
    pod: PodFacts


Action = Start | Hold | Resume | GiveUp | Keep | Replace


def decide(
    children: tuple[Child, ...], facts: Mapping[str, ChildFacts], *, stop: bool, enough: Mapping[str, str]
) -> tuple[Action, ...]:
    """The actions to take now; none if the run waits or has ended. `stop`: the run is suspended or has reached a limit.
    `enough`: the stages whose child has used up its retries, and why."""
    started = [facts[child.stage] for child in children if child.stage in facts]
    active = [child for child in started if child.fate in (Fate.WAITING, Fate.RUNNING)]
    if stop or any(child.fate is Fate.FAILED for child in started):
        kept = [Keep(child) for child in started if child.fate is Fate.FAILED and child.expires]
        return (*kept, *(Hold(child) for child in active if not _deactivated(child)))
    if hopeless := [child for child in active if child.stage in enough]:
        return tuple(GiveUp(child, enough[child.stage]) for child in hopeless)
    held = [child for child in started if _deactivated(child) or (child.fate is Fate.SUSPENDED and child.held)]
    done = done_stages(children, facts)
    ready = [child for child in children if done.issuperset(child.after) and not done.issuperset(child.stages)]
    return (*(Resume(child) for child in held), *(Start(child) for child in ready if child.stage not in facts))


def replacements(facts: Mapping[str, ChildFacts], patience: int | None, now: datetime) -> tuple[Replace, ...]:
    """Replacements for pods on lost nodes that are overdue by `patience` seconds; None: replace no pod."""
    if patience is None:
        return ()
    pods = [(child.stage, pod) for child in facts.values() for pod in child.pods if pod.phase == LOST and pod.due]
    return tuple(Replace(stage, pod) for stage, pod in pods if pod.due and now - pod.due >= timedelta(seconds=patience))


def _deactivated(facts: ChildFacts) -> bool:
    """Whether the operator has deactivated the child's Workload. Kueue may not have stopped the child yet."""
    return facts.workload is not None and facts.workload.held


def done_stages(children: tuple[Child, ...], facts: Mapping[str, ChildFacts]) -> frozenset[str]:
    """Stages that have succeeded: their child has, or a child exists that only starts after them.

    The second rule keeps a finished stage finished after somebody has deleted its Job.
    """
    done: set[str] = set()
    for child in reversed(children):
        fate = facts[child.stage].fate if child.stage in facts else Fate.ABSENT
        if fate is Fate.SUCCEEDED or done.intersection(child.stages):
            done.update(child.stages)
        if fate is not Fate.ABSENT or done.issuperset(child.stages):
            done.update(child.after)
    return frozenset(done)
