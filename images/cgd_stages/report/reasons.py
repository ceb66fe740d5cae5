"""What may explain the outcome of a run: figures that go with it, and what each of them means. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from cgd_stages.quality.marks import Graded, Quality, Share
from cgd_stages.results.comparison import name_of
from cgd_stages.results.formatting import count, percent
from cgd_stages.results.model import ReportData, StageRecord, Step
from cgd_stages.results.scores import exported_step


@dataclass(frozen=True)
class Reason:
    """A figure, as people read it."""

    name: str
    figure: str
    means: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def reasons(report: ReportData, quality: Quality | None) -> list[Reason]:
    """Of a run that has trained by CGD and evaluated something: how far its context is from the prompt alone, and how
    good its drafts, critiques and targets are. Empty for any other run."""
    trained = [stage for stage in report.stages if stage.inputs.get("objective") == "CGD" and stage.facts]
    if not trained or not report.evaluations:
        return []
    logs = [(stage, report.training.get(stage.name, ())) for stage in trained]
    about_rows = _rows(quality.graded) if quality and quality.graded and quality.graded.rows else ()
    return [*(reason for stage, log in logs for reason in _contexts(stage, log)), *about_rows]


def _contexts(stage: StageRecord, log: Sequence[Step]) -> Iterator[Reason]:
    """The losses of one training in its context and on the prompt alone, where prompts were held out."""
    exported, name = exported_step(stage, log), name_of(stage.name.model, stage.inputs)
    if exported is None or exported.validation_loss is None or exported.bare_validation_loss is None:
        return
    inside, outside = exported.validation_loss, exported.bare_validation_loss
    first = f"; untrained {log[0].loss:.2f} in its context, on the first batch" if log[0].step == 1 else ""
    yield Reason(
        f"{name}: loss on held-out refinements",
        f"{inside:.2f} nats a token in its context, {outside:.2f} on the prompt alone{first}",
        f"The distance of {outside - inside:.2f} is what it learned for a context that no benchmark gives.",
    )


def _rows(graded: Graded) -> Iterator[Reason]:
    yield Reason("Right drafts", _share(graded.drafts_right), "A critique has something to mend in the others alone.")
    yield Reason(
        "Right verdicts",
        f"{_share(graded.verdicts_right)}; one verdict for every draft would reach {percent(graded.constant)}",
        "How far a critique can be trusted. Near the second figure, a verdict says little of its draft.",
    )
    yield Reason(
        "Right refinements",
        _share(graded.refinements_right),
        "What CGD and Refined SFT learn: neither can be expected to become better than its targets.",
    )


def _share(share: Share) -> str:
    return f"{percent(share.share)} of {count(share.n)} (95 % {100 * share.low:.1f} to {100 * share.high:.1f})"
