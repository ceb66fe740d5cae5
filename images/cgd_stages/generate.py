"""Ask a model for answers, critiques or refinements.

    CGD_TASK='{...}' python -m cgd_stages.generate

Reads the rows of the stage before, asks the engine for every row that is not stored yet, and stores rows as they
finish. Interrupt it at any moment: the next attempt asks only for the rest. Several roles share one warm engine.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cgd_stages import models, prompts
from cgd_stages.contract import Generate, Model, Role, Rows, Sampling, StageFacts
from cgd_stages.endpoint import EndpointEngine
from cgd_stages.engines import Completion, Engine, Outcome, Request, VllmEngine, drive
from cgd_stages.errors import RowsLost, UserError
from cgd_stages.folders import (
    PARTS,
    REJECTED,
    Done,
    Folder,
    Part,
    Row,
    ShardMarker,
    digest_of,
    from_parquet,
    now,
    open_input,
    write_pointer,
)
from cgd_stages.ledger import KEY, Ledger, key_of, owned_rows
from cgd_stages.outcomes import judged, row_sampling
from cgd_stages.program import Context, run

log = logging.getLogger(__name__)

UPSTREAM: dict[Role, str] = {"answer": "prepare", "critique": "answer", "refine": "critique"}
REPORT_SECONDS = 3.0
LOG_SECONDS = 15.0
HINTS = {
    "truncated": "Raise spec.generation.{role}.maxTokens or maxModelLen.",
    "too_long": "Raise spec.generation.{role}.maxModelLen, or lower maxTokens of the stages before.",
    "empty": "Look at the examples: the model or its chat template does not suit this prompt.",
    "template": "The model's chat template fails on these rows: use another model, or a revision that is mended.",
    "endpoint": "Ask whoever runs the endpoint of spec.teacher why it refuses these requests.",
}


def main(context: Context) -> dict[str, StageFacts]:
    work = context.work_of(Generate)
    return generate(context, work, WarmEngine(context, lambda: start_engine(context, work)))


def generate(context: Context, work: Generate, warm: "WarmEngine") -> dict[str, StageFacts]:
    """Every role of the work, one after the other, for this shard."""
    # A store that is away for some minutes costs no warm engine.
    context.bucket = context.bucket.waiting(context.stop)
    before: Folder | None = None
    for role, sampling in zip(work.roles, work.sampling, strict=True):
        source = _source(context, work, UPSTREAM[role], before)
        stage = _stage(context, work, role, sampling, source)
        context.facts[role] = _reused(context, stage) or _generate(context, stage, warm)
        before = stage.folder
    warm.close()
    return context.facts


@dataclass(frozen=True)
class Source:
    """Rows of the stage before: those of the whole stage, or only this shard's where the others are still at it."""

    folder: Folder
    parts: tuple[Part, ...]
    identity: str
    """What the digest of the next stage takes from this one."""
    stage_rows: int | None
    """Rows of the whole stage, when they are known yet."""


@dataclass(frozen=True)
class Stage:
    """One role's work in this shard: where from, where to, how to ask."""

    role: Role
    sampling: Sampling
    source: Source
    folder: Folder
    inputs: dict[str, Any]
    shard: int
    shards: int
    max_rejected: float


class WarmEngine:
    """The engine, started when the first row needs it, and shared by every role of this process."""

    def __init__(self, context: Context, start: Callable[[], Engine]) -> None:
        self._context, self._start = context, start
        self._engine: Engine | None = None

    def get(self) -> Engine:
        if self._engine is None:
            with self._context.interruptible():
                self._engine = self._start()
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


def start_engine(context: Context, work: Generate) -> Engine:
    if work.endpoint is not None:
        return EndpointEngine(work.endpoint)
    model = _pinned(context, _model(work))
    return VllmEngine(models.fetch(model, context.bucket, context.task.run, context.scratch), work.engine)


def _model(work: Generate) -> Model:
    if work.model is None:
        raise UserError("the task names neither a model nor an endpoint")
    return work.model


def _pinned(context: Context, model: Model) -> Model:
    """The model at the revision that prepare has found, so that a branch that moves does not mix two models."""
    prepared = open_input(context.bucket, context.task.run, "prepare").require()
    pins: dict[str, str] = prepared.inputs.get("pins", {})
    return model if model.revision else model.model_copy(update={"revision": pins.get(model.name)})


def _source(context: Context, work: Generate, stage: str, before: Folder | None) -> Source:
    folder = before or open_input(context.bucket, context.task.run, stage)
    done = folder.done()
    if done is not None:
        # What prepare keeps depends on more than its rows do: the rows themselves say whether answers can be shared.
        identity = done.content() if stage == "prepare" else folder.digest
        return Source(folder, done.parts, identity, done.rows.done)
    marker = folder.shard_marker(context.shard, work.shards) if before else None
    parts = marker.parts if marker else folder.require().parts
    return Source(folder, parts, folder.digest, None)


def _stage(context: Context, work: Generate, role: Role, sampling: Sampling, source: Source) -> Stage:
    inputs: dict[str, Any] = {
        "stage": role,
        "model": _identity(context, work),
        "prompts": prompts.fingerprint(role),
        "sampling": sampling.model_dump(by_alias=True),
        "engine": {"maxModelLen": work.engine.max_model_len, "dtype": work.engine.dtype},
        "upstream": source.identity,
    }
    folder = Folder(context.bucket, context.task.run.namespace, role, digest_of(**inputs))
    return Stage(role, sampling, source, folder, inputs, context.shard, work.shards, work.max_rejected)


def _identity(context: Context, work: Generate) -> dict[str, str]:
    if work.endpoint is not None:
        return {"name": work.endpoint.model, "endpoint": work.endpoint.url}
    resolved = models.resolve(_pinned(context, _model(work)), context.bucket, context.task.run)
    return {"name": resolved.name, "revision": resolved.revision}


def _reused(context: Context, stage: Stage) -> StageFacts | None:
    """Facts of a stage that is done already, told so that the sum over all shards is the whole stage."""
    done = stage.folder.done()
    if done is None:
        return None
    log.info("%s is done already: %s", stage.role, stage.folder.uri)
    write_pointer(context.bucket, context.task.run, done)
    marker = stage.folder.shard_marker(stage.shard, stage.shards)
    if marker is not None:
        return marker.facts
    nothing = StageFacts(digest=done.digest, output_uri=done.facts.output_uri)
    return done.facts if stage.shard == 0 else nothing


def _generate(context: Context, stage: Stage, warm: WarmEngine) -> StageFacts:
    started, clock = now(), time.monotonic()
    keys = [key_of(row) for row in _rows(stage, KEY)]
    ledger = Ledger(stage.folder, stage.shard, stage.shards, keys)
    missing = sum(1 for key in keys if key not in ledger)
    log.info("%s: %d rows in shard %d of %d, %d to do", stage.role, len(keys), stage.shard, stage.shards, missing)
    _refuse_if_hopeless(stage, ledger)
    settings: dict[str, Any] = {}
    pace = Pace(context, stage.role, ledger, len(keys))
    try:
        with ledger:
            if missing:
                engine = warm.get()
                settings = engine.settings
                _ask(context, stage, ledger, engine, pace)
    finally:
        facts = context.facts[stage.role] = _facts(stage, ledger, pace, time.monotonic() - clock)
    context.check()
    if len(keys) != facts.rows.done + facts.rows.rejected:
        raise RowsLost(f"{stage.role}: read {len(keys)}, kept {facts.rows.done}, rejected {facts.rows.rejected}")
    _end(context, stage, ledger, facts, started, settings)
    return facts


def _rows(stage: Stage, columns: Sequence[str] | None = None) -> Iterator[Row]:
    parts = [part for part in stage.source.parts if part.key.startswith(PARTS)]
    return owned_rows(stage.source.folder, parts, stage.shard, stage.shards, columns)


def _ask(context: Context, stage: Stage, ledger: Ledger, engine: Engine, pace: "Pace") -> None:
    """Give the engine every row that is not stored, and the ledger every outcome, until all are there or `stop`."""
    under_way: dict[str, Row] = {}
    pace.start()

    def requests() -> Iterator[Request]:
        for row in _rows(stage):
            if key_of(row) in ledger:
                continue
            name = f"{row['id']}-{row['sample']}"
            under_way[name] = row
            sampling = row_sampling(stage.sampling, stage.role, row)
            yield Request(name, prompts.role_messages(stage.role, row), sampling)

    def after_step() -> None:
        ledger.flush_if_due()
        pace.tell()

    for outcome in drive(engine, requests(), context.stop, on_step=after_step):
        kept, rejected = judged(stage.role, under_way.pop(outcome.name), outcome)
        if kept is not None:
            ledger.keep(kept)
        if rejected is not None:
            ledger.reject(rejected)
            _refuse_if_hopeless(stage, ledger)
        pace.note(outcome)


def _refuse_if_hopeless(stage: Stage, ledger: Ledger) -> None:
    """Stop as soon as this shard alone has more rejected rows than the whole stage may have."""
    total = stage.source.stage_rows
    if total is not None and ledger.tally["rejected"] > stage.max_rejected * total:
        ledger.flush()
        raise _too_many_rejected(stage, ledger.parts, total)


def _end(
    context: Context, stage: Stage, ledger: Ledger, facts: StageFacts, started: str, settings: dict[str, Any]
) -> None:
    """Promise this shard; when it is the last one, promise the stage."""
    marker = ShardMarker(
        stage=stage.role,
        digest=stage.folder.digest,
        parts=tuple(ledger.parts),
        started=started,
        completed=now(),
        facts=facts,
        shard=stage.shard,
        shards=stage.shards,
    )
    stage.folder.mark_shard(marker)
    found = [stage.folder.shard_marker(shard, stage.shards) for shard in range(stage.shards)]
    markers = [marker for marker in found if marker is not None]
    log.info("%s: shard %d has ended, %d of %d have", stage.role, stage.shard, len(markers), stage.shards)
    if len(markers) == stage.shards:
        write_pointer(context.bucket, context.task.run, _finish(stage, markers, settings))


def _finish(stage: Stage, markers: list[ShardMarker], settings: dict[str, Any]) -> Done:
    facts = summed([marker.facts for marker in markers])
    parts = [part for marker in markers for part in marker.parts]
    if stage.source.stage_rows not in {None, facts.rows.total}:
        raise RowsLost(f"{stage.role}: the shards have {facts.rows.total} rows of {stage.source.stage_rows}")
    if facts.rows.rejected > stage.max_rejected * facts.rows.total:
        raise _too_many_rejected(stage, parts, facts.rows.total)
    return stage.folder.finish(
        facts=facts,
        parts=parts,
        started=min(marker.started for marker in markers),
        inputs=stage.inputs,
        settings=settings | {"shards": stage.shards},
    )


def _too_many_rejected(stage: Stage, parts: Sequence[Part], total: int) -> UserError:
    rows = [row for part in parts if part.key.startswith(REJECTED) for row in from_parquet(stage.folder.read(part))]
    reasons = Counter(str(row["reason"]) for row in rows).most_common()
    told = ", ".join(f"{reason} {count}" for reason, count in reasons)
    examples = "; ".join(f"{row['id']} {row['reason']}: {row['detail'][:200]}" for row in rows[:2])
    message = (
        f"{stage.role}: {len(rows)} of {total} rows rejected, more than the {stage.max_rejected:.1%} that "
        f"spec.generation.maxRejected allows ({told}). Examples: {examples}. Everything finished is stored."
    )
    hint = HINTS.get(reasons[0][0], "").format(role=stage.role) if reasons else ""
    return UserError(message, hint=f"{hint} Or raise spec.generation.maxRejected.".strip())


def _facts(stage: Stage, ledger: Ledger, pace: "Pace", seconds: float) -> StageFacts:
    """Rows and tokens of every attempt so far, seconds and speed of this one."""
    return StageFacts(
        rows=ledger.rows(pace.total),
        prompt_tokens=ledger.tally["prompt_tokens"],
        generated_tokens=ledger.tally["tokens"],
        seconds=round(seconds, 3),
        digest=stage.folder.digest,
        output_uri=stage.folder.uri,
        metrics=ledger.metrics() | pace.metrics(),
    )


def summed(facts: Sequence[StageFacts]) -> StageFacts:
    """One stage's facts from those of its shards. They run side by side: seconds are the longest's."""
    metrics: Counter[str] = Counter()
    for shard in facts:
        metrics.update(shard.metrics)
    return StageFacts(
        rows=Rows(
            total=sum(shard.rows.total for shard in facts),
            done=sum(shard.rows.done for shard in facts),
            rejected=sum(shard.rows.rejected for shard in facts),
        ),
        prompt_tokens=sum(shard.prompt_tokens for shard in facts),
        generated_tokens=sum(shard.generated_tokens for shard in facts),
        seconds=max((shard.seconds for shard in facts), default=0.0),
        metrics=dict(metrics),
    )


class Pace:
    """How fast this attempt goes: reports to the operator every few seconds, and to the log now and then."""

    def __init__(self, context: Context, stage: str, ledger: Ledger, total: int) -> None:
        self.total = total
        self._context, self._stage, self._ledger = context, stage, ledger
        self._rows = self._prompt_tokens = self._tokens = 0
        self.start()

    def start(self) -> None:
        """The engine is warm: speed and remaining time count from here."""
        self._started = self._reported = self._logged = time.monotonic()

    def note(self, outcome: Outcome) -> None:
        self._rows += 1
        self._prompt_tokens += outcome.prompt_tokens
        self._tokens += outcome.tokens if isinstance(outcome, Completion) else 0

    def tell(self) -> None:
        """Report and log, when it is time again."""
        now = time.monotonic()
        if now - self._reported >= REPORT_SECONDS:
            self._reported = now
            self.report()
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            self.log()

    def metrics(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self._started, 1e-3)
        if not self._rows:
            return {}
        return {
            "tokens_per_second": round(self._tokens / seconds, 1),
            "prompt_tokens_per_second": round(self._prompt_tokens / seconds, 1),
        }

    def report(self) -> None:
        rows, speed = self._ledger.rows(self.total), self.metrics()
        self._context.progress.report(
            self._stage,
            rows,
            tokens_per_second=speed.get("tokens_per_second"),
            eta=self._eta(rows),
            metrics=self._ledger.metrics() | speed,
        )

    def log(self) -> None:
        rows = self._ledger.rows(self.total)
        log.info(
            "%s: %d of %d rows, %d rejected, %.0f tokens/s, %s s to go",
            self._stage,
            rows.done + rows.rejected,
            rows.total,
            rows.rejected,
            self.metrics().get("tokens_per_second", 0.0),
            "?" if (eta := self._eta(rows)) is None else round(eta),
        )

    def _eta(self, rows: Rows) -> float | None:
        remaining = rows.total - rows.done - rows.rejected
        return remaining * (time.monotonic() - self._started) / self._rows if self._rows else None


if __name__ == "__main__":
    run(main)
