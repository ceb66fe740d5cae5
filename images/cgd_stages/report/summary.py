"""What the report says first: the outcome in words, what to beware of, and the facts of the run. Pure."""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from cgd_stages.contract import Critique
from cgd_stages.quality.marks import Quality
from cgd_stages.quality.marks import cautions as data_cautions
from cgd_stages.report.drift import Sentence, drifts
from cgd_stages.results.comparison import NAMES, lm_eval_tasks, name_of
from cgd_stages.results.formatting import count, percent, probability
from cgd_stages.results.model import ReportData, StageRecord, at
from cgd_stages.results.scores import NOISE, RIVALS, Comparison, comparisons, gpu_hours, models, scores, total_of

SENTENCES = 3
"""More comparisons than this are summed up, one sentence a model."""
CAUTIONS = 5
"""More of them are folded."""


def head(report: ReportData, quality: Quality | None) -> dict[str, Any]:
    names = models(report)
    objectives = [objective(stage) for stage in report.stages if stage.name.kind == "train"]
    return {
        "verdicts": verdicts(report),
        "data_cautions": data_cautions(quality) if quality else [],
        "cautions": cautions(report),
        "shown": CAUTIONS,
        "student": names.get("student", ""),
        "teacher": names.get("teacher", ""),
        "objectives": ", ".join(objectives),
        "when": _when(report.stages),
        "prompt_tokens": total_of(report.stages, "prompt_tokens"),
        "generated_tokens": total_of(report.stages, "generated_tokens"),
        "seconds": total_of(report.stages, "seconds"),
        "gpu_hours": (hours := gpu_hours(report.stages)),
        "all_gpu_hours": math.fsum(hours.values()),
    }


def verdicts(report: ReportData) -> list[Sentence]:
    """What the run's comparisons come to; with tasks of lm-eval beside the benchmarks, what became of these besides."""
    compared, general = comparisons(report), lm_eval_tasks(report)
    special = [one for one in compared if one.benchmark not in general]
    named = names_in_sentences(list(dict.fromkeys(one.trained for one in compared)))
    if not special:
        return outcomes(compared, named) or [_without_comparison(report)]
    return outcomes(special, named) + drifts(report, named)


def names_in_sentences(models: Sequence[str]) -> dict[str, str]:
    """How sentences name the models that are compared with the base."""
    trained = [model for model in models if model not in RIVALS]
    named = {model: label(model) for model in models}
    return named | {model: f"{label(model)}-trained" if len(trained) > 1 else "Trained" for model in trained}


def outcomes(compared: Sequence[Comparison], named: Mapping[str, str]) -> list[Sentence]:
    """One for each comparison, or for each trained model where that would be many."""
    if len(compared) <= SENTENCES:
        return [sentence(one, named[one.trained]) for one in compared]
    groups = {one.trained: [other for other in compared if other.trained == one.trained] for one in compared}
    return [summary(group, named[model]) for model, group in groups.items()]


def summary(group: Sequence[Comparison], trained: str) -> Sentence:
    """What a model's comparisons on several benchmarks come to; every benchmark weighs the same."""
    after = math.fsum(one.after for one in group) / len(group)
    before = math.fsum(one.before for one in group) / len(group)
    better, worse = (sum(one.outcome == outcome for one in group) for outcome in ("better", "worse"))
    return {
        "outcome": "better" if better and not worse else "worse" if worse and not better else "noise",
        "claim": f"{trained} {percent(after)}, base {percent(before)}: the mean of {len(group)} benchmarks",
        "detail": f"Better than chance explains on {better}, worse on {worse}, within noise on "
        f"{len(group) - better - worse} (p < {NOISE} each)",
    }


def sentence(one: Comparison, trained: str) -> Sentence:
    """What a comparison comes to, in words that claim no more than its numbers do; `trained` names the model."""
    judgement = {
        "better": f"better than chance explains ({probability(one.p)})",
        "worse": f"worse than chance explains ({probability(one.p)})",
        "noise": f"a difference within noise ({probability(one.p)})",
    }[one.outcome]
    if one.fixed == one.broken == 0:
        judgement = "no question changed sides"
    questions = "question" if one.n == 1 else "questions"
    return {
        "outcome": one.outcome,
        "claim": f"{trained} {percent(one.after)}, base {percent(one.before)} on {one.benchmark}",
        "detail": f"{count(one.n)} {questions}, {one.fixed} fixed and {one.broken} broken: {judgement}",
    }


def _without_comparison(report: ReportData) -> Sentence:
    missing = [stage.name for stage in report.stages if stage.facts is None]
    detail = f"no output of {', '.join(missing)}" if missing else "the run evaluates no pair of models"
    return {"outcome": "noise", "claim": "No comparison of base and trained model", "detail": detail}


def cautions(report: ReportData) -> list[str]:
    """What a reader should know before believing the numbers."""
    found = []
    for one in scores(report):
        who = f"{label(one.model).capitalize() if one.model == 'base' else label(one.model)} on {one.benchmark}"
        if one.truncated > one.outputs / 20:
            found.append(f"{who}: {percent(one.truncated / one.outputs)} of the outputs were cut by the token limit.")
        if one.unparsed > one.outputs / 20:
            found.append(f"{who}: no answer was found in {percent(one.unparsed / one.outputs)} of the outputs.")
        if one.refused:
            found.append(f"{who}: {one.refused} questions were never answered; they count as not correct.")
        if one.ungraded:
            found.append(f"{who}: {one.ungraded} outputs could not be graded; they count as not correct.")
    sizes = {one.benchmark: one.n for one in scores(report)}
    found += [f"{name} has only {n} questions: intervals are wide." for name, n in sizes.items() if n < 100]
    return found


def _when(stages: Sequence[StageRecord]) -> str:
    times = [time for stage in stages for time in (stage.started, stage.completed) if time]
    if not times:
        return "not yet run"
    first, last = moment(min(times, key=at)), moment(max(times, key=at))
    same_day = first.partition(",")[0] == last.partition(",")[0]
    return f"{first}\u2013{last.rpartition(', ')[2] if same_day else last} UTC"


def label(model: str) -> str:
    """How people write the label of an evaluated model or an objective."""
    return NAMES.get(model, model)


def objective(stage: StageRecord) -> str:
    """What a training learned, with the ablation of its critiques if it had one."""
    critique = Critique.model_validate(stage.inputs.get("critique", {}))
    return name_of(stage.name.model, critique)


def moment(time: str, *, with_day: bool = True) -> str:
    return datetime.fromisoformat(time).astimezone(UTC).strftime("%-d %B %Y, %H:%M" if with_day else "%H:%M")
