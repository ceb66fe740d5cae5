"""Ask a model for answers, critiques, refinements, or a teacher's own answers.

    CGD_TASK='{...}' python -m cgd_stages.generate

Reads the rows of the stage before, asks the engine for every row that is not stored yet, and stores rows as they
finish. Interrupt it at any moment: the next attempt asks only for the rest. Several roles share one warm engine and go
hand in hand: a row's refinement is asked for as soon as its critique is there.
"""

from cgd_stages.runtime.supervisor import supervise

if __name__ == "__main__":
    supervise()  # before the other imports: SIGTERM may come while they last

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from cgd_stages.contract import Generate, Model, Role, Rows, Sampling, StageFacts
from cgd_stages.engines.base import Completion, Engine, Outcome, Request, VllmEngine, drive
from cgd_stages.engines.openai import EndpointEngine
from cgd_stages.engines.replies import judged, row_sampling
from cgd_stages.errors import RowsLost, UserError
from cgd_stages.generate.shard_writer import ShardWriter, owned_rows, packed
from cgd_stages.method import prompts
from cgd_stages.models import resolve
from cgd_stages.runtime.pace import Pace
from cgd_stages.runtime.program import Context, run, storing
from cgd_stages.store.folder import PARTS, REJECTED, Done, Folder, Part, ShardMarker
from cgd_stages.store.rows import KEY, Row, from_parquet, now

log = logging.getLogger(__name__)

UPSTREAM: dict[Role, str] = {"answer": "prepare", "critique": "answer", "refine": "critique", "distill": "prepare"}
REPORT_SECONDS = 3.0
LOG_SECONDS = 15.0
HINTS = {
    "truncated": "Raise spec.generation.{role}.maxTokens or spec.{model}.maxModelLen.",
    "too_long": "Raise spec.{model}.maxModelLen, or lower maxTokens of the stages before.",
    "empty": "Look at the examples: the model or its chat template does not suit this prompt.",
    "template": "The model's chat template fails on these rows: use another model, or a revision that is mended.",
    "repetition": "The model loops on these prompts: raise spec.generation.{role}.temperature, or use another model.",
    "endpoint": "Ask whoever runs the endpoint of spec.teacher why it refuses these requests.",
}


def main(context: Context) -> dict[str, StageFacts]:
    work = context.work_of(Generate)
    return generate(context, work, WarmEngine(lambda: start_engine(context, work)))


def generate(context: Context, work: Generate, warm: "WarmEngine") -> dict[str, StageFacts]:
    """Every role of the work, for this shard."""
    # A store that is away for some minutes costs no warm engine.
    context.store = context.store.waiting(context.stop)
    shards: list[Shard] = []
    before: Folder | None = None
    for role, sampling in zip(work.roles, work.sampling, strict=True):
        stage = _stage(context, work, role, sampling, _source(context, UPSTREAM[role], before))
        if facts := _reused(context, stage):
            context.facts[role] = facts
        else:
            shards.append(Shard(context, stage, feeder=shards[-1] if shards else None))
        before = stage.folder
    if shards:
        _fill(context, shards, warm)
    warm.close()
    return context.facts


@dataclass(frozen=True)
class Source:
    """The stage before. Without parts when it is under way in this very program, which then hands over its rows."""

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

    def __init__(self, start: Callable[[], Engine]) -> None:
        self._start = start
        self._engine: Engine | None = None

    def get(self) -> Engine:
        if self._engine is None:
            self._engine = self._start()
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


def start_engine(context: Context, work: Generate) -> Engine:
    if work.endpoint is not None:
        return EndpointEngine(work.endpoint)
    return VllmEngine(resolve.fetch(_model(context, work), context.store, context.scratch), work.engine)


def _model(context: Context, work: Generate) -> Model:
    if work.model is None:
        raise UserError("the task names neither a model nor an endpoint")
    return resolve.pinned(work.model, context.store)


def _source(context: Context, stage: str, before: Folder | None) -> Source:
    folder = before or context.store.input(stage)
    done = folder.done() if before else folder.require()
    if done is None:
        return Source(folder, (), folder.digest, None)
    # What prepare keeps depends on more than its rows do: the rows themselves say whether answers can be shared.
    identity = done.content() if stage == "prepare" else folder.digest
    return Source(folder, tuple(done.under(PARTS)), identity, done.rows.done)


def _stage(context: Context, work: Generate, role: Role, sampling: Sampling, source: Source) -> Stage:
    inputs: dict[str, Any] = {
        "stage": role,
        "model": _identity(context, work),
        "prompts": prompts.fingerprint(role),
        "sampling": sampling.model_dump(by_alias=True),
        "engine": {"maxModelLen": work.engine.max_model_len, "dtype": work.engine.dtype},
        "upstream": source.identity,
    }
    folder = context.store.folder(role, inputs)
    return Stage(role, sampling, source, folder, inputs, context.shard, work.shards, work.max_rejected)


def _identity(context: Context, work: Generate) -> dict[str, str]:
    if work.endpoint is not None:
        return {"name": work.endpoint.model, "endpoint": work.endpoint.url}
    return resolve.resolve(_model(context, work), context.store).identity()


def _reused(context: Context, stage: Stage) -> StageFacts | None:
    """Facts of a stage that is done already, told so that the sum over all shards is the whole stage."""
    done = stage.folder.done()
    if done is None:
        return None
    log.info("%s is done already: %s", stage.role, stage.folder.uri)
    context.store.point_at(done)
    marker = stage.folder.shard_marker(stage.shard, stage.shards)
    if marker is not None:
        return marker.facts
    nothing = StageFacts(digest=done.digest, output_uri=done.facts.output_uri)
    return done.facts if stage.shard == 0 else nothing


class Shard:
    """This program's share of one stage. A feeder is the stage before, under way as well."""

    def __init__(self, context: Context, stage: Stage, feeder: "Shard | None" = None) -> None:
        self.stage = stage
        self.started = now()
        self._context, self._feeder = context, feeder
        source: Collection[Hashable] = feeder.writer.kept if feeder else {packed(row) for row in _rows(stage, KEY)}
        self._owned = len(source)
        self.writer: ShardWriter = ShardWriter(stage.folder, stage.shard, stage.shards, source)
        self.fresh: Counter[str] = Counter()
        """What this attempt has added: rows, tokens, prompt_tokens, cached_tokens."""
        self._opened = time.monotonic()
        log.info("%s: %s in shard %d of %d", stage.role, self.rows, stage.shard, stage.shards)
        self.refuse_if_hopeless()

    @property
    def total(self) -> int:
        """Rows to do: what the stage before has kept, or will keep unless it rejects more."""
        return self._feeder.total - self._feeder.writer.counts["rejected"] if self._feeder else self._owned

    @property
    def stage_rows(self) -> int | None:
        """Rows of the whole stage, over all shards; of one that is fed, those that its feeder may yet give."""
        rows = self.stage.source.stage_rows
        if rows is not None or self._feeder is None or self._feeder.stage_rows is None:
            return rows
        return self._feeder.stage_rows - self._feeder.writer.counts["rejected"]

    @property
    def rows(self) -> Rows:
        return self.writer.rows(self.total)

    def backlog(self) -> Iterator[Row]:
        """Rows that can be asked for now. What a feeder keeps from now on comes on its own."""
        rows = self._feeder.stored() if self._feeder else _rows(self.stage)
        return (row for row in rows if packed(row) not in self.writer)

    def stored(self) -> Iterator[Row]:
        """Rows that are stored at the time of the call."""
        self.writer.flush()
        parts = [part for part in self.writer.parts if part.key.startswith(PARTS)]
        return (row for part in parts for row in from_parquet(self.stage.folder.read(part)))

    def request(self, row: Row) -> Request:
        stage = self.stage
        sampling = row_sampling(stage.sampling, stage.role, row)
        return Request(f"{row['id']}-{row['sample']}-{stage.role}", prompts.role_messages(stage.role, row), sampling)

    def take(self, row: Row, outcome: Outcome) -> Row | None:
        """Keep or reject a row by its outcome; the row with its new columns when it is kept."""
        kept, rejected = judged(self.stage.role, row, outcome)
        self.fresh.update(rows=1, prompt_tokens=outcome.prompt_tokens)
        if isinstance(outcome, Completion):
            self.fresh.update(tokens=outcome.tokens, cached_tokens=outcome.cached_tokens)
        if kept is not None:
            self.writer.keep(kept)
        if rejected is not None:
            self.writer.reject(rejected)
            self.refuse_if_hopeless()
        return kept

    def refuse_if_hopeless(self) -> None:
        """Stop as soon as this shard alone has more rejected rows than the whole stage may have."""
        total = self.stage_rows
        if total is not None and self.writer.counts["rejected"] > self.stage.max_rejected * total:
            self.writer.flush()
            raise _too_many_rejected(self.stage, self.writer.parts, total)

    @property
    def cache_hit_rate(self) -> float:
        """Share of the prompts' tokens that the engine had in its prefix cache, in this attempt."""
        return self.fresh["cached_tokens"] / max(self.fresh["prompt_tokens"], 1)

    @property
    def rows_left(self) -> int:
        rows = self.rows
        return rows.total - rows.done - rows.rejected

    def facts(self, speed: "Speed | None") -> StageFacts:
        """Rows and tokens of every attempt so far; seconds, speed and cache of this one."""
        measured = {"prompt_tokens_cached": float(self.fresh["cached_tokens"])} | speed.metrics(self) if speed else {}
        return StageFacts(
            rows=self.rows,
            prompt_tokens=self.writer.counts["prompt_tokens"],
            generated_tokens=self.writer.counts["tokens"],
            seconds=round(time.monotonic() - self._opened, 3),
            digest=self.stage.folder.digest,
            output_uri=self.stage.folder.uri,
            metrics=self.writer.metrics() | measured,
        )

    def end(self, settings: dict[str, Any]) -> None:
        """Promise this shard; when it is the last one, promise the stage."""
        stage, rows = self.stage, self.rows
        self.writer.flush()  # rows of another number of shards, which nothing need have been asked for
        stored = self.writer.stored_rows
        if not rows.total == rows.done + rows.rejected == stored:
            counts = f"read {rows.total}, kept {rows.done}, rejected {rows.rejected}, stored {stored}"
            raise RowsLost(f"{stage.role}: {counts}")
        marker = ShardMarker(
            stage=stage.role,
            digest=stage.folder.digest,
            parts=tuple(self.writer.parts),
            started=self.started,
            completed=now(),
            facts=self._context.facts[stage.role],
            shard=stage.shard,
            shards=stage.shards,
        )
        former = stage.folder.shard_marker(stage.shard, stage.shards)
        if former is None or former.parts != marker.parts:  # each attempt must get further than the one before
            stage.folder.mark_shard(marker)
        every = (stage.folder.shard_marker(shard, stage.shards) for shard in range(stage.shards))
        markers = [marker for marker in every if marker is not None]
        log.info("%s: shard %d has ended, %d of %d have", stage.role, stage.shard, len(markers), stage.shards)
        if len(markers) == stage.shards:
            self._context.store.point_at(_finish(stage, markers, settings))


class Questions:
    """What to ask next: the next role of a row that has just finished, then what is left from earlier attempts, the
    last role first, then new rows."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._after = dict(pairwise(shards))
        self._ready: deque[tuple[Shard, Row]] = deque()
        backlogs = [(shard, shard.backlog()) for shard in reversed(shards)]
        self._waiting = ((shard, row) for shard, rows in backlogs for row in rows)
        self._under_way: dict[str, tuple[Shard, Row]] = {}

    @property
    def under_way(self) -> int:
        """Those that the engine has."""
        return len(self._under_way)

    def any(self) -> bool:
        """Whether there is anything to ask now."""
        if not self._ready and (first := next(self._waiting, None)):
            self._ready.append(first)
        return bool(self._ready)

    def take(self) -> Request | None:
        if not self.any():
            return None
        shard, row = self._ready.popleft()
        request = shard.request(row)
        self._under_way[request.name] = shard, row
        return request

    def answered(self, outcome: Outcome) -> None:
        shard, row = self._under_way.pop(outcome.name)
        kept = shard.take(row, outcome)
        if kept is not None and (after := self._after.get(shard)):
            self._ready.append((after, kept))


def _fill(context: Context, shards: Sequence[Shard], warm: WarmEngine) -> None:
    """Ask for every row that is not stored, store every outcome, and promise what is complete."""
    engine, speed = None, None
    try:
        questions = Questions(shards)
        if questions.any():
            engine = warm.get()
            speed = Speed(context, shards, questions, engine)
            _ask(context, shards, questions, engine, speed)
    finally:
        context.facts |= {shard.stage.role: shard.facts(speed) for shard in shards}
    context.check()
    for shard in shards:
        shard.end(engine.settings if engine else {})


def _ask(context: Context, shards: Sequence[Shard], questions: Questions, engine: Engine, speed: "Speed") -> None:
    """Give the engine every question and the writers every row, until all are there or `stop`. All are stored."""

    def after_step() -> None:
        if any(shard.writer.due for shard in shards):
            all(shard.writer.try_flush() for shard in shards)
        speed.tell()

    def flush() -> None:
        for shard in shards:
            shard.writer.flush()

    with context.holding(), storing(flush):
        for outcome in drive(engine, questions.take, context.stop, on_step=after_step):
            questions.answered(outcome)


def _rows(stage: Stage, columns: Sequence[str] | None = None) -> Iterator[Row]:
    return owned_rows(stage.source.folder, stage.source.parts, stage.shard, stage.shards, columns)


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
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons)
    examples = "; ".join(f"{row['id']} {row['reason']}: {row['detail'][:200]}" for row in rows[:2])
    message = (
        f"{stage.role}: {len(rows)} of {total} rows rejected, more than the {stage.max_rejected:.1%} that "
        f"spec.generation.maxRejected allows ({counts}). Examples: {examples}. Everything finished is stored."
    )
    model = "student" if stage.role == "answer" else "teacher"
    hint = HINTS.get(reasons[0][0], "").format(role=stage.role, model=model) if reasons else ""
    return UserError(message, hint=f"{hint} Or raise spec.generation.maxRejected.".strip())


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


class Speed:
    """How fast this attempt goes, from when the engine is warm: told to the operator every few seconds, and to the log
    now and then."""

    def __init__(self, context: Context, shards: Sequence[Shard], questions: Questions, engine: Engine) -> None:
        self._context, self._shards, self._questions, self._engine = context, shards, questions, engine
        self._pace = Pace()
        self._reported = self._logged = time.monotonic()

    def tell(self) -> None:
        """Report and log, when it is time again."""
        now = time.monotonic()
        if now - self._reported >= REPORT_SECONDS:
            self._reported, eta = now, self._eta()
            for shard in self._shards:
                metrics = self.metrics(shard) | {"cache_hit_rate": shard.cache_hit_rate} | shard.writer.metrics()
                speed = metrics["tokens_per_second"]
                self._context.progress.report(
                    shard.stage.role, shard.rows, tokens_per_second=speed, eta=eta, metrics=metrics
                )
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            self._log()

    def metrics(self, shard: Shard) -> dict[str, float]:
        engine = self._engine.metrics()
        del engine["generated_tokens"]
        return engine | {
            "tokens_per_second": round(shard.fresh["tokens"] / self._pace.seconds, 1),
            "prompt_tokens_per_second": round(shard.fresh["prompt_tokens"] / self._pace.seconds, 1),
        }

    def _log(self) -> None:
        eta = self._eta()
        for shard in self._shards:
            rows = shard.rows
            log.info(
                "%s: %d of %d rows, %d rejected, %.0f tokens/s, %s s to go, %.0f%% of the prompts cached",
                shard.stage.role,
                rows.done + rows.rejected,
                rows.total,
                rows.rejected,
                self.metrics(shard)["tokens_per_second"],
                "?" if eta is None else round(eta),
                100 * shard.cache_hit_rate,
            )

    def _eta(self) -> float | None:
        """Seconds until every role has ended; the rows of all roles count together, for they go hand in hand."""
        finished = sum(shard.fresh["rows"] for shard in self._shards)
        left = sum(shard.rows_left for shard in self._shards)
        return self._pace.remaining(finished, left, under_way=self._questions.under_way)


if __name__ == "__main__":
    run(main)
