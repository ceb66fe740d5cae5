"""The head of the report: the outcome in words, the cautions, and the facts of the run. Pure."""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from cgd_stages.contract import METHODS
from cgd_stages.quality.marks import Quality
from cgd_stages.quality.marks import cautions as data_cautions
from cgd_stages.report.causes import causes, visible
from cgd_stages.report.drift import Sentence, drifts
from cgd_stages.report.head_to_head import headline
from cgd_stages.report.modes import modes
from cgd_stages.report.words import short_name
from cgd_stages.results.comparison import NAMES, Table, lm_eval_tasks, name_of
from cgd_stages.results.formatting import count, percent, probability
from cgd_stages.results.head_to_head import HeadToHead
from cgd_stages.results.model import ReportData, StageRecord, at
from cgd_stages.results.scores import NOISE, RIVALS, Comparison, comparisons, gpu_hours, models, scores, total_of

SENTENCES = 3
"""The most comparisons that get a sentence each; of more, each model gets one sentence."""


def head(
    report: ReportData, quality: Quality | None, table: Table, head_to_heads: Sequence[HeadToHead]
) -> dict[str, Any]:
    names = models(report)
    objectives = [objective(stage) for stage in report.stages if stage.name.kind == "train"]
    return {
        "headline": headline(table, head_to_heads),
        "verdicts": against_base(report, table),
        "data_cautions": data_cautions(quality) if quality else [],
        "cautions": cautions(report),
        "student": names.get("student", ""),
        "teacher": names.get("teacher", ""),
        "objectives": ", ".join(objectives),
        "modes": modes(report),
        "when": _when(report.stages),
        "prompt_tokens": total_of(report.stages, "prompt_tokens"),
        "generated_tokens": total_of(report.stages, "generated_tokens"),
        "seconds": total_of(report.stages, "seconds"),
        "gpu_hours": (hours := gpu_hours(report.stages)),
        "all_gpu_hours": math.fsum(hours.values()),
    }


def verdicts(report: ReportData, table: Table, head_to_heads: Sequence[HeadToHead]) -> list[Sentence]:
    """The outcome of the run: the trained models against each other, then each against the base, and whether lm-eval's
    tasks moved if it has any beside the benchmarks."""
    return headline(table, head_to_heads) + against_base(report, table)


def against_base(report: ReportData, table: Table) -> list[Sentence]:
    """Each evaluated model against the base, and whether its format drifted."""
    compared, general = comparisons(report), lm_eval_tasks(report)
    special = [pair for pair in compared if pair.benchmark not in general]
    student = short_name(models(report).get("student", ""))
    names = names_in_sentences(list(dict.fromkeys(pair.trained for pair in compared)), student)
    if special:
        return outcomes(special, names) + drifts(report, names, table)
    missing = [stage.name for stage in report.stages if stage.facts is None]
    detail = f"no output of {', '.join(missing)}" if missing else "the run evaluates no pair of models"
    none: Sentence = {"outcome": "noise", "claim": "No comparison of base and trained model", "detail": detail}
    return outcomes(compared, names) or [none]


def names_in_sentences(models: Sequence[str], student: str = "") -> dict[str, str]:
    """How sentences name the models that are compared with the base; of one alone with the student's name."""
    trained = [model for model in models if model not in RIVALS]
    of = f" {student}" if student and len(trained) == 1 else ""
    return {model: label(model) if model in RIVALS else f"{label(model)}-trained{of}" for model in models}


def outcomes(compared: Sequence[Comparison], names: Mapping[str, str]) -> list[Sentence]:
    """A sentence for each comparison, or for each trained model where there are more than `SENTENCES`."""
    if len(compared) <= SENTENCES:
        return [sentence(pair, names[pair.trained]) for pair in compared]
    groups: dict[str, list[Comparison]] = {}
    for pair in compared:
        groups.setdefault(pair.trained, []).append(pair)
    return [summary(group, names[model]) for model, group in groups.items()]


def summary(group: Sequence[Comparison], name: str) -> Sentence:
    """The outcome of one model on several benchmarks, which all have the same weight. `name` names the model."""
    after = math.fsum(pair.after for pair in group) / len(group)
    before = math.fsum(pair.before for pair in group) / len(group)
    better, worse = (sum(pair.outcome == outcome for pair in group) for outcome in ("better", "worse"))
    return {
        "outcome": "better" if better and not worse else "worse" if worse and not better else "noise",
        "claim": f"{name} {percent(after)}, base {percent(before)}: the mean of {len(group)} benchmarks",
        "detail": f"Better than chance explains on {better}, worse on {worse}, within noise on "
        f"{len(group) - better - worse} (p < {NOISE} each)",
    }


def sentence(pair: Comparison, name: str) -> Sentence:
    """The outcome of one comparison, which claims no more than its numbers show. `name` names the model."""
    verdict, judgement = {
        "better": ("better", f"better than chance explains ({probability(pair.p)})"),
        "worse": ("worse", f"worse than chance explains ({probability(pair.p)})"),
        "noise": ("no difference seen", f"a difference within noise ({probability(pair.p)}); {seen(pair)}"),
    }[pair.outcome]
    if pair.fixed == pair.broken == 0:
        judgement = f"no question changed sides; {seen(pair)}"
    questions = "question" if pair.n == 1 else "questions"
    return {
        "outcome": pair.outcome,
        "claim": f"{name} {percent(pair.after)}, base {percent(pair.before)} on {pair.benchmark}: {verdict}",
        "detail": f"{count(pair.n)} {questions}, {pair.fixed} fixed and {pair.broken} broken: {judgement}",
    }


def seen(pair: Comparison) -> str:
    """What difference so many questions could have shown, with a chance of 80 %."""
    least, questions = visible(pair), f"{count(pair.n)} question{'' if pair.n == 1 else 's'}"
    if least is None:
        return f"no gain can be seen with {questions}"
    return f"gains below {100 * least:.1f} points cannot be seen with {questions}"


def cautions(report: ReportData) -> list[str]:
    """What a reader should know before trusting the numbers."""
    sentences = causes(report)
    for score in scores(report):
        where = f"{'Base' if score.model == 'base' else label(score.model)} on {score.benchmark}"
        cut, unparsed, unfinished = (
            number / score.outputs for number in (score.truncated, score.unparsed, score.unfinished)
        )
        if cut > 1 / 20:
            sentences.append(f"{where}: {percent(cut)} of the outputs were cut by the token limit.")
        if unparsed > 1 / 20:
            thoughts = f"; in {percent(unfinished)} the thought never ended" if unfinished else ""
            sentences.append(f"{where}: no answer was found in {percent(unparsed)} of the outputs{thoughts}.")
        if score.refused:
            sentences.append(f"{where}: {score.refused} questions were never answered; they count as not correct.")
        if score.ungraded:
            sentences.append(f"{where}: {score.ungraded} outputs could not be graded; they count as not correct.")
    groups = report.audit.counts if report.audit else ()
    if alone := sum(group.lm_eval_alone for group in groups):
        sentences.append(
            f"lm-eval alone calls {count(alone)} of {count(sum(group.outputs for group in groups))} audited outputs "
            "right: the grader may be mistaken. They are listed below the results."
        )
    sentences += known_before(report) + learned_without_thought(report) + asked_without_thought(report)
    return sentences + told_apart(report)


KNOWN = 0.3
"""Nats a token: a student whose loss is below that before it is trained can mostly write the targets already."""


def known_before(report: ReportData) -> list[str]:
    """A sentence for each training with little to learn: the first step's loss is the untrained student's."""
    trained = [
        (stage, report.training.get(stage.name, ()))
        for stage in report.stages
        if stage.name.kind == "train" and stage.inputs.get("objective") not in METHODS and "start" not in stage.inputs
    ]
    return [
        f"{objective(stage)}: the untrained student's loss, on the first batch, was {log[0].loss:.2f} nats a token: in "
        "the context of this training it could write most of the targets already, so there was little to learn."
        for stage, log in trained
        if log and log[0].step == 1 and log[0].loss < KNOWN
    ]


TOLD = 0.9
"""The share of a distribution that the likeliest tokens should hold."""


def told_apart(report: ReportData) -> list[str]:
    """A sentence for each stage whose likeliest tokens hold little of the model's distribution: what they leave over is
    learned as one number."""
    scored = [(stage, stage.facts.metrics) for stage in report.stages if stage.name.kind == "score" and stage.facts]
    shares = [
        (stage, metrics["top_mass"] / metrics["scored_tokens"])
        for stage, metrics in scored
        if metrics.get("scored_tokens") and "top_mass" in metrics
    ]
    return [
        f"{stage.name}: the {stage.inputs.get('topK')} likeliest tokens hold {percent(share)} of the distribution that "
        "is learned; the rest is learned as one number. A higher topK tells more tokens apart."
        for stage, share in shares
        if share < TOLD
    ]


def learned_without_thought(report: ReportData) -> list[str]:
    """A sentence for each training that learned to answer at once, of a student that is asked to think."""
    trained = [(stage, stage.facts.metrics) for stage in report.stages if stage.name.kind == "train" and stage.facts]
    return [
        f"{objective(stage)}: {count(none)} of {count(examples)} targets have no thought of a teacher, so the student "
        "learned to answer them at once, but it thinks when it is evaluated."
        for stage, metrics in trained
        if (none := metrics.get("without_thought"))
        and (examples := metrics["train_examples"] + metrics["validation_examples"])
    ]


WITHOUT_THOUGHT = {
    "likelihood": "compares the likelihoods of its choices",
    "begun": "writes the beginning of each reply",
}
"""Why lm-eval asks a model that thinks without a thought: see `harness.backend`."""


def asked_without_thought(report: ReportData) -> list[str]:
    """A sentence for the tasks of lm-eval that a student that thinks was asked without thoughts, for each reason."""
    tasks = [
        (name, told["without_thought"])
        for stage in report.stages
        if stage.name.kind == "harness"
        for name, told in stage.settings.items()
        if told.get("without_thought")
    ]
    return [
        f"{', '.join(names)}: asked without thoughts, because lm-eval {why}. These figures are of another mode than "
        "the benchmarks'."
        for reason, why in WITHOUT_THOUGHT.items()
        if (names := list(dict.fromkeys(name for name, told in tasks if told == reason)))
    ]


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
    """The name of a training: its objective, or a variant's name with it, and the ablation of its critiques."""
    return name_of(stage.name.model, stage.inputs)


def moment(time: str, *, with_day: bool = True) -> str:
    return datetime.fromisoformat(time).astimezone(UTC).strftime("%-d %B %Y, %H:%M" if with_day else "%H:%M")
