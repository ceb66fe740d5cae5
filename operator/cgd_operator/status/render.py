"""The status of a run, computed from the plan and the facts. Pure.

The previous status supplies the last words of pods that are gone, and the time at which a condition last changed.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cgd_operator.api.status import Artifacts, CGDRunStatus, Condition, Rows, StageState, StageStatus, Usage
from cgd_operator.facts.children import ChildFacts, Fate
from cgd_operator.facts.decide import done_stages
from cgd_operator.facts.gpu_usage import Used, hours, total
from cgd_operator.facts.kueue import WAITS
from cgd_operator.facts.progress import StageProgress, percent_of
from cgd_operator.facts.retries import attempts
from cgd_operator.facts.trouble import Trouble
from cgd_operator.facts.waiting import BEGINNING, RETRYING
from cgd_operator.kube.outside import moment
from cgd_operator.planning.dag import Child, Run
from cgd_operator.planning.requests import UNKNOWN, Sizes
from cgd_stages.contract import ACCURACY, MOST, NO_TRANSFER, StageFacts, train_stage

ProgressOf = Callable[[str], StageProgress | None]

STALLED_AFTER = timedelta(minutes=5)
"""The time that a person has to mend something before the run is called stalled, which raises alarms."""

WORDS = {
    "prepare": "Preparing",
    "fetch": "Fetching",
    "answer": "Answering",
    "critique": "Critiquing",
    "refine": "Refining",
    "distill": "Distilling",
    "miscritique": "Miscritiquing",
    "misrefine": "Misrefining",
    "rollout": "Sampling",
    "score": "Scoring",
    "check": "Checking",
    "train": "Training",
    "evaluate": "Evaluating",
    "harness": "Evaluating",
    "report": "Reporting",
}


@dataclass(frozen=True)
class Seen:
    """The inputs of a status."""

    run: Run
    children: tuple[Child, ...]
    facts: Mapping[str, ChildFacts]
    used: Mapping[str, Used]
    progress: ProgressOf
    previous: CGDRunStatus
    now: datetime
    trouble: Trouble | None = None
    stalled_after: timedelta = STALLED_AFTER
    sizes: Sizes = UNKNOWN


def render(seen: Seen) -> CGDRunStatus:
    """The whole status."""
    stages = tuple(_stages(seen))
    current = _current(stages)
    state = _state(seen, stages, current)
    return CGDRunStatus(
        observed_generation=seen.run.generation,
        state=state,
        stage=current.name if current else None,
        progress=_progress(stages, current),
        eta=duration(current.eta_seconds) if current and current.eta_seconds is not None else None,
        conditions=_conditions(seen, state, stages, current),
        stages=stages,
        artifacts=_artifacts(seen.run, stages),
        usage=Usage(gpu_hours=hours(total(seen.used)), tokens=sum(stage.tokens for stage in stages)),
        checkpoint_bytes=seen.sizes.checkpoint or None,
        student_bytes=seen.sizes.student or None,
        teacher_bytes=seen.sizes.teacher or None,
    )


def refused(generation: int, message: str, previous: CGDRunStatus, now: datetime) -> CGDRunStatus:
    """The status of a run with an invalid spec. The stages that an earlier operator has written stay."""
    conditions = {
        "Accepted": ("False", "InvalidSpec", message),
        "Reconciling": ("False", "InvalidSpec", ""),
        "Stalled": ("True", "InvalidSpec", message),
        "Ready": ("False", "InvalidSpec", message),
        "Succeeded": ("False", "InvalidSpec", message),
        "Suspended": ("False", "InvalidSpec", ""),
    }
    changed = {"observed_generation": generation, "state": "Refused", "stage": None, "progress": None, "eta": None}
    return previous.model_copy(update={**changed, "conditions": _timed(conditions, previous, generation, now)})


def acknowledged(settled: CGDRunStatus, generation: int) -> CGDRunStatus:
    """The status of a succeeded run after a change of a mutable field: tools wait for its observedGeneration."""
    conditions = [condition.model_copy(update={"observed_generation": generation}) for condition in settled.conditions]
    return settled.model_copy(update={"observed_generation": generation, "conditions": tuple(conditions)})


def _stages(seen: Seen) -> Iterable[StageStatus]:
    before = {stage.name: stage for stage in seen.previous.stages}
    done = done_stages(seen.children, seen.facts)
    for child in seen.children:
        facts = seen.facts.get(child.stage)
        for name in child.stages:
            old = before.get(name, StageStatus(name=name))
            used = seen.used.get(name, Used(0, {}))
            paid: Any = {"gpu_seconds": used.gpu_seconds, "pod_gpu_seconds": dict(used.pods)}
            if facts is not None:
                yield _stage(seen, child, facts, used, old)
            elif name in done:  # its Job was cleaned up
                yield old.model_copy(update={"state": "Succeeded", **paid})
            else:
                yield StageStatus(name=name, **paid)


def _stage(seen: Seen, child: Child, facts: ChildFacts, used: Used, old: StageStatus) -> StageStatus:
    name = old.name
    progress = seen.progress(name)
    last = {pod.shard: pod.words for pod in facts.gone + facts.pods if pod.words and name in pod.words.stages}
    words = tuple(shard.stages[name] for shard in last.values())
    state = _stage_state(facts, name, child, progress, old)
    ended = state in ("Succeeded", "Failed")
    rows = _rows(words, progress, old, ended)
    goes_on = state == "Running" and not (rows and 0 < rows.total <= rows.done + rows.rejected)
    if state == "Succeeded":
        percent: int | None = 100
    elif rows and rows.total:
        percent = percent_of(rows.done + rows.rejected, rows.total)
    else:
        known = (progress.percent if progress else None, old.percent)
        percent = max((share for share in known if share is not None), default=None)
    speed = progress.tokens_per_second if progress else None
    if speed is None:
        timed = [shard for shard in words if shard.seconds and shard.generated_tokens]
        rates = [shard.generated_tokens / max(shard.seconds, 0.001) for shard in timed]
        speed = round(min(MOST, sum(rates))) if rates else old.tokens_per_second
    end = _text(facts.end) if facts.end else old.completion_time
    made = attempts(facts, old)
    return StageStatus(
        name=name,
        state=state,
        reason=facts.reason or None,
        message=_message(facts, old)[:1000] or None,
        child=facts.name,
        start_time=_text(facts.start) if facts.start else old.start_time,
        completion_time=end if ended else None,
        attempts=max(facts.attempts, old.attempts, *(pod.attempts for pod in made)),
        pod_attempts=made,
        rows=rows,
        tokens_per_second=speed,
        percent=percent,
        eta_seconds=progress.eta_seconds if progress and goes_on else None,
        gpu_seconds=used.gpu_seconds,
        pod_gpu_seconds=dict(used.pods),
        tokens=sum(shard.prompt_tokens + shard.generated_tokens for shard in words) or old.tokens,
        accuracy=_accuracy(words) or old.accuracy,
        round=None if ended else (_round(progress) or old.round),
        loss=_loss(words, progress) or old.loss,
        output_uri=next((shard.output_uri for shard in words if shard.output_uri), None) or old.output_uri,
        digest=next((shard.digest for shard in words if shard.digest), None) or old.digest,
    )


def _accuracy(words: tuple[StageFacts, ...]) -> str | None:
    """The mean over the benchmarks of an evaluation, each with the same weight; None: it has told none."""
    told = [value for stage in words for name, value in stage.metrics.items() if name.endswith(ACCURACY)]
    shares = [share for share in told if 0 <= share <= 1]
    return f"{100 * sum(shares) / len(shares):.1f}%" if shares else None


def _round(progress: StageProgress | None) -> str | None:
    """In which round a stage is; None: it has none, or has not told."""
    if progress is None or progress.round is None:
        return None
    at = progress.round
    return f"{at.number} of {at.of}" + (f", waits for {at.waits_for}" if at.waits_for else "")


def _loss(words: tuple[StageFacts, ...], progress: StageProgress | None) -> str | None:
    """Of a training's last step; None: neither its last words nor a report has told one."""
    told = [loss for stage in words if (loss := stage.metrics.get("final_loss")) is not None and math.isfinite(loss)]
    told += [progress.loss] if progress and progress.loss is not None else []
    return f"{told[0]:.4g}" if told else None


def _message(facts: ChildFacts, old: StageStatus) -> str:
    """The message of a stage. If the pods of a failed stage are gone, their last message stays: it says more than their
    controller's."""
    if facts.fate is not Fate.FAILED or any(pod.failed for pod in facts.gone + facts.pods):
        return facts.message
    if old.state == "Failed" and old.message:
        return old.message
    _, _, before = (old.message or "").partition(RETRYING)
    return f"{facts.message}; {before}" if before else facts.message


def _stage_state(
    facts: ChildFacts, name: str, child: Child, progress: StageProgress | None, old: StageStatus
) -> StageState:
    """The state of a stage. Of stages that share a running pod it comes from their reports, or from the previous
    status before the first report."""
    states: dict[Fate, StageState] = {
        Fate.SUCCEEDED: "Succeeded",
        Fate.FAILED: "Failed",
        Fate.SUSPENDED: "Suspended",
        Fate.RUNNING: "Running",
    }
    if facts.fate is not Fate.RUNNING or len(child.stages) == 1:
        return states.get(facts.fate, "Waiting")
    if progress and progress.rows:
        return "Succeeded" if progress.is_through(child.pods) else "Running"
    if old.rows:
        return "Succeeded" if old.state == "Succeeded" else "Running"
    return "Running" if name == child.stages[0] else "Pending"


def _rows(words: tuple[StageFacts, ...], progress: StageProgress | None, old: StageStatus, ended: bool) -> Rows | None:
    """The sum of the last words of all shards when the stage has ended. Before that the count that is furthest: of the
    last words so far, the reports, and the previous status (an operator that has just started has no report yet)."""
    said = Rows(
        total=sum(shard.rows.total for shard in words),
        done=sum(shard.rows.done for shard in words),
        rejected=sum(shard.rows.rejected for shard in words),
    )
    if words and ended:
        return said
    reported = Rows(**dict(progress.rows)) if progress and progress.rows else None
    known = [rows for rows in (said if words else None, reported, old.rows) if rows]
    return max(known, key=lambda rows: rows.done + rows.rejected, default=None)


def _current(stages: tuple[StageStatus, ...]) -> StageStatus | None:
    """The stage that people look at: the failed stage, else the first that runs (the others wait for it), else the
    first that has not ended."""
    for states in (("Failed",), ("Running",), ("Waiting", "Suspended")):
        for stage in stages:
            if stage.state in states:
                return stage
    return next((stage for stage in stages if stage.state == "Pending"), None)


def _state(seen: Seen, stages: tuple[StageStatus, ...], current: StageStatus | None) -> str:
    if seen.trouble and seen.trouble.final:
        return "Failed"
    if any(stage.state == "Failed" for stage in stages):
        return "Failed"
    if current is None:
        return "Succeeded"
    if seen.run.spec.suspend and not seen.trouble:
        return "Suspended"
    if not seen.run.spec.suspend and (seen.trouble or all(stage.state == "Pending" for stage in stages)):
        return "Pending"
    if _is_held_up(current):
        return "Queued" if current.reason in WAITS else "Waiting"
    return WORDS[current.name.kind]


def _is_held_up(stage: StageStatus) -> bool:
    """Whether it waits for more than the usual start of its pods, or for somebody who has suspended it."""
    if stage.state == "Suspended":
        return stage.message is not None
    return stage.state == "Waiting" and stage.reason not in BEGINNING


def _progress(stages: tuple[StageStatus, ...], current: StageStatus | None) -> str:
    if current is None:
        return f"{len(stages)}/{len(stages)} stages"
    if current.rows and current.rows.total:
        done = current.rows.done + current.rows.rejected
        return f"{current.percent or 0}% ({done}/{current.rows.total})"
    if current.percent is None and _is_held_up(current):
        return f"{sum(stage.state == 'Succeeded' for stage in stages)}/{len(stages)} stages"
    return f"{current.percent or 0}%"


def _modes(run: Run) -> str:
    """Whether the models think and what the training learns of it, if the manifest sets anything of chats."""
    if not run.names_modes:
        return ""
    spec = run.resolved
    student, teacher, learned = spec.student.chat.thinking, spec.teacher.chat.thinking, spec.training.thinking
    return f"student.chat.thinking is {student}, training.thinking {learned}, teacher.chat.thinking {teacher}"


def _conditions(
    seen: Seen, state: str, stages: tuple[StageStatus, ...], current: StageStatus | None
) -> tuple[Condition, ...]:
    failed = next((stage for stage in stages if stage.state == "Failed"), None)
    held = seen.trouble or _wait(seen, stages)
    overdue = held and held.since and seen.now - held.since >= seen.stalled_after
    accepted = {"Accepted": ("True", "Valid", _modes(seen.run))}
    stopped = {"Suspended": ("True" if state == "Suspended" else "False", state, "")}
    match state:
        case "Succeeded":
            rest = _group("False", "False", "True", "True", "Succeeded", "every stage has succeeded")
        case "Failed" if failed:
            message = f"stage {failed.name}: {failed.message or failed.reason}"
            reason = NO_TRANSFER if failed.reason == NO_TRANSFER else "StageFailed"
            rest = _group("False", "True", "False", "False", reason, message)
        case "Failed":
            assert seen.trouble
            rest = _group("False", "True", "False", "False", seen.trouble.reason, seen.trouble.message)
        case "Suspended":
            rest = _group("False", "False", "False", "Unknown", "Suspended", "set spec.suspend to false to go on")
        case _ if held and overdue:
            rest = _group("False", "True", "False", "Unknown", held.reason, held.message)
        case _ if held:
            rest = _group("True", "False", "False", "Unknown", held.reason, held.message)
        case _:
            rest = _group("True", "False", "False", "Unknown", state, f"at stage {current.name}" if current else "")
    return _timed({**accepted, **rest, **stopped}, seen.previous, seen.run.generation, seen.now)


def _wait(seen: Seen, stages: tuple[StageStatus, ...]) -> Trouble | None:
    """What a stage waits for, before others what a person must mend."""
    waits = [
        Trouble(stage.reason, f"stage {stage.name} waits: {stage.message}", since=seen.facts[child.stage].stuck)
        for child in seen.children
        for stage in stages
        if stage.name in child.stages and stage.reason and stage.message
        if stage.state in ("Waiting", "Suspended", "Running")
    ]
    return next((wait for wait in waits if wait.since), None) or next(iter(waits), None)


def _group(
    reconciling: str, stalled: str, ready: str, succeeded: str, reason: str, message: str
) -> dict[str, tuple[str, str, str]]:
    statuses = {"Reconciling": reconciling, "Stalled": stalled, "Ready": ready, "Succeeded": succeeded}
    return {name: (status, reason, message[:2000]) for name, status in statuses.items()}


def _timed(
    conditions: Mapping[str, tuple[str, str, str]], previous: CGDRunStatus, generation: int, now: datetime
) -> tuple[Condition, ...]:
    since: dict[tuple[str, str], str] = {
        (condition.type, condition.status): condition.last_transition_time for condition in previous.conditions
    }
    return tuple(
        Condition(
            type=name,
            status=status,
            reason=reason,
            message=message,
            last_transition_time=since.get((name, status), _text(now)),
            observed_generation=generation,
        )
        for name, (status, reason, message) in conditions.items()
    )


def _artifacts(run: Run, stages: tuple[StageStatus, ...]) -> Artifacts:
    """The folders of what the run made. If the pod that knew its folder was gone before the operator read it: the run's
    pointer to the folder, which the stage has stored."""
    root = f"{run.spec.storage.uri.rstrip('/')}/{run.namespace}/runs/{run.name}"
    ended = [stage for stage in stages if stage.state == "Succeeded"]
    done: dict[str, str] = {stage.name: stage.output_uri or f"{root}/{stage.name}.json" for stage in ended}
    titles = run.spec.training.titles
    models = {title: done[train_stage(title)] for title in titles if train_stage(title) in done}
    return Artifacts(quadruples=done.get("refine"), checkpoints=models, report=done.get("report"))


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds_between(start: str, end: str) -> float:
    """The seconds between two times in a status; 0 if one of them is no valid time."""
    began, ended = moment(start), moment(end)
    return (ended - began).total_seconds() if began and ended else 0.0


def duration(seconds: int) -> str:
    """`1h02m`, `4m10s`, `7s`"""
    minutes, seconds = divmod(max(0, seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
