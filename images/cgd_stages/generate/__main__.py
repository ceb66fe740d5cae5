"""Ask a model for answers, critiques, refinements, a teacher's own answers, or wrong critiques and what follows.

    CGD_TASK='{...}' python -m cgd_stages.generate

Reads the rows of the stage before, asks the engine for every row that is not stored yet, and stores rows as they
finish. It may be interrupted at any moment: the next attempt asks for the rest only. Several roles share one warm
engine and run side by side: a row's refinement is asked for as soon as its critique has come.
"""

from cgd_stages.runtime.supervisor import supervise

if __name__ == "__main__":
    supervise()  # before the other imports: SIGTERM may come while they last

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Generate, Model, Role, Rows, Sampling, StageFacts, Unfinished, settings_of
from cgd_stages.engines.base import Completion, Engine, Reply, Request, drive
from cgd_stages.engines.openai import EndpointEngine
from cgd_stages.engines.replies import NOT_WRONG, kept_or_rejected, row_sampling
from cgd_stages.engines.vllm import VllmEngine
from cgd_stages.errors import RowsLost, UserError
from cgd_stages.generate.shard_writer import ShardWriter, drawn, packed
from cgd_stages.method import prompts
from cgd_stages.models import resolve
from cgd_stages.runtime.pace import Pace
from cgd_stages.runtime.program import Context, run, storing
from cgd_stages.store.folder import PARTS, REJECTED, Folder, Part, ShardMarker
from cgd_stages.store.rows import KEY, Row, from_parquet, now
from cgd_stages.store.shards import mark, owned_rows, summed

log = logging.getLogger(__name__)

UPSTREAM: dict[Role, str] = {
    "answer": "prepare",
    "critique": "answer",
    "refine": "critique",
    "distill": "prepare",
    "miscritique": "critique",
    "misrefine": "miscritique",
}
REPORT_SECONDS = 3.0
LOG_SECONDS = 15.0
HINTS = {
    "truncated": "Raise spec.generation.{role}.maxTokens or spec.{model}.maxModelLen.",
    "too_long": "Raise spec.{model}.maxModelLen, or lower maxTokens of the stages before.",
    "empty": "Look at the examples: the model or its chat template does not suit this prompt.",
    "template": "The model's chat template fails on these rows: use another model, or a revision with a mended one.",
    "repetition": "The model loops on these prompts: raise spec.generation.{role}.temperature, or use another model. "
    "Where the repetition is right, set spec.generation.{role}.repetition.",
    "unfinished_thought": "The model ends its thoughts without an answer: set spec.{model}.chat.thinking to off, or "
    "use another model or chat template.",
    "control_tokens": "These texts hold control tokens: remove them from the prompts. Where the endpoint wrote them, "
    "have its server end a reply there, and leave them out of the text.",
    "engine": "Correct spec.{model} or spec.generation.{role}: vLLM's own words are in the examples.",
    "endpoint": "Ask the owner of the endpoint of spec.teacher why it refuses these requests.",
}


def main(context: Context) -> dict[str, StageFacts]:
    work = context.work_of(Generate)

    def start_engine() -> Engine:
        if work.endpoint is not None:
            return EndpointEngine(work.endpoint, chat=work.chat)
        model = _model(context, work)
        fetch = partial(resolve.fetch_pinned, store=context.store, scratch=context.scratch)
        return VllmEngine(fetch(model), resolve.with_drafts(work.engine, fetch), _template(context, work))

    return generate(context, work, start_engine)


def generate(context: Context, work: Generate, start_engine: Callable[[], Engine]) -> dict[str, StageFacts]:
    """Do every role of the work, for this shard. The roles share one engine, which starts when a row needs it."""
    # The warm engine outlives a store that is away for some minutes.
    context.store = context.store.waiting(context.stop)
    shards: list[Shard] = []
    before: Folder | None = None
    for role, sampling in zip(work.roles, work.sampling, strict=True):
        stage = _stage(context, work, role, sampling, before)
        if facts := _reused(context, stage):
            context.facts[role] = facts
        else:
            shards.append(Shard(context, stage, feeder=shards[-1] if shards else None))
        before = stage.folder
    if shards:
        _fill(context, shards, start_engine)
    return context.facts


@dataclass(frozen=True)
class Stage:
    """One role's work in this shard: which rows it reads, where it stores them, how it asks."""

    role: Role
    sampling: Sampling
    instruction: str | None
    """The manifest's own; None: ours."""
    draws: int
    """How many texts it asks for, for each row that it reads."""
    unfinished: Unfinished
    source: Folder
    """The stage before."""
    source_parts: tuple[Part, ...]
    """The rows of the stage before. It has none while this program itself runs it, and hands over its rows."""
    rows: int | None
    """Rows of this stage over all shards, once the stage before has ended."""
    folder: Folder
    inputs: dict[str, Any]
    shard: int
    shards: int
    max_rejected: float


def _template(context: Context, work: Generate) -> ChatTemplate:
    return resolve.spoken(_model(context, work), work.chat, context.store, context.scratch)


def _model(context: Context, work: Generate) -> Model:
    if work.model is None:
        raise UserError("the task names neither a model nor an endpoint")
    return resolve.pinned(work.model, context.store)


def _stage(context: Context, work: Generate, role: Role, sampling: Sampling, before: Folder | None) -> Stage:
    """`before`: the folder of the stage before, if this program runs that stage too."""
    source = before or context.store.input(UPSTREAM[role])
    done = before.done() if before else source.require()
    # The digest of prepare covers more than its rows. The hash of the rows themselves lets more runs share answers.
    upstream = done.content() if done and UPSTREAM[role] == "prepare" else source.digest
    if work.endpoint is not None:
        asked = work.chat.model_dump(by_alias=True, exclude_defaults=True, exclude={"date"})
        model, spoken = work.endpoint.identity(), {"chat": asked} if asked else {}
    else:
        model = resolve.resolve(_model(context, work), context.store).identity()
        spoken = _template(context, work).identity()
    instruction = resolve.pinned_text(work.instructions.of(role), context.store) if work.instructions else None
    inputs: dict[str, Any] = spoken | {
        "stage": role,
        "model": model,
        "prompts": prompts.fingerprint(role, instruction),
        "sampling": sampling.identity(),
        "engine": work.engine.identity(),
        "upstream": upstream,
    }
    draws = work.draws(role)
    unfinished: Unfinished = work.unfinished if role == "answer" else "reject"
    inputs |= {"samples": draws} if draws > 1 else {}
    inputs |= {"instruction": instruction} if instruction is not None else {}
    inputs |= {"unfinished": unfinished} if unfinished == "keep" else {}
    return Stage(
        role=role,
        sampling=sampling,
        instruction=instruction,
        draws=draws,
        unfinished=unfinished,
        source=source,
        source_parts=tuple(done.under(PARTS)) if done else (),
        rows=done.rows.done * draws if done else None,
        folder=context.store.folder(role, inputs),
        inputs=inputs,
        shard=context.shard,
        shards=work.shards,
        max_rejected=work.max_rejected,
    )


def _reused(context: Context, stage: Stage) -> StageFacts | None:
    """This shard's part of the facts of a finished stage; None while it is unfinished. Over all shards the parts sum up
    to the stage: without shard markers shard 0 has the facts and the others have none."""
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
    """This program's share of one stage. A feeder is its share of the stage before, when it runs both."""

    def __init__(self, context: Context, stage: Stage, feeder: "Shard | None" = None) -> None:
        self.stage = stage
        self.started = now()
        self._context, self._feeder = context, feeder
        keys: Collection[Hashable] = feeder.writer.kept if feeder else {packed(row) for row in _rows(stage, KEY)}
        self._owned = len(keys) * stage.draws
        self.writer: ShardWriter = ShardWriter(stage.folder, stage.shard, stage.shards, keys, stage.draws)
        self.fresh: Counter[str] = Counter()
        """What this attempt has added: `rows`, `tokens`, `prompt_tokens`, `cached_tokens`."""
        self._opened = time.monotonic()
        log.info("%s: %s in shard %d of %d", stage.role, self.rows, stage.shard, stage.shards)
        self.refuse_if_hopeless()

    @property
    def total(self) -> int:
        """Rows to do: a draw or more for each that the stage before has kept, or keeps unless it rejects more."""
        if self._feeder is None:
            return self._owned
        return (self._feeder.total - self._feeder.writer.counts["rejected"]) * self.stage.draws

    @property
    def stage_rows(self) -> int | None:
        """Rows of the stage over all shards, where known. With a feeder: the most rows that it can still hand over."""
        rows = self.stage.rows
        if rows is not None or self._feeder is None or self._feeder.stage_rows is None:
            return rows
        return (self._feeder.stage_rows - self._feeder.writer.counts["rejected"]) * self.stage.draws

    @property
    def rows(self) -> Rows:
        return self.writer.rows(self.total)

    def backlog(self) -> Iterator[Row]:
        """Rows that can be asked for now. `Questions` adds those that a feeder keeps from now on."""
        rows = self._feeder.stored() if self._feeder else _rows(self.stage)
        return (draw for row in rows for draw in drawn(row, self.stage.draws) if packed(draw) not in self.writer)

    def stored(self) -> Iterator[Row]:
        """Rows that are kept at the time of the call, from the store."""
        self.writer.flush()
        parts = [part for part in self.writer.parts if part.key.startswith(PARTS)]
        return (row for part in parts for row in from_parquet(self.stage.folder.read(part)))

    def request(self, row: Row) -> Request:
        stage = self.stage
        sampling = row_sampling(stage.sampling, stage.role, row)
        messages = prompts.role_messages(stage.role, row, stage.instruction)
        return Request(f"{row['id']}-{row['sample']}-{stage.role}", messages, sampling)

    def take(self, row: Row, reply: Reply) -> Row | None:
        """Keep or reject a row by its reply. Returns the row with its new columns if it is kept."""
        kept, rejected = kept_or_rejected(self.stage.role, row, reply, self.stage.sampling.loop, self.stage.unfinished)
        self.fresh.update(rows=1, prompt_tokens=reply.prompt_tokens)
        if isinstance(reply, Completion):
            self.fresh.update(tokens=reply.tokens, cached_tokens=reply.cached_tokens)
        if kept is not None:
            self.writer.keep(kept)
        if rejected is not None:
            self.writer.reject(rejected)
        return kept

    def refuse_if_hopeless(self) -> None:
        """Raise UserError when this shard alone has rejected more rows than the whole stage may reject. A miscritique
        that is not wrong does not count: its row keeps its critique."""
        total, lost = self.stage_rows, self.writer.counts["rejected"] - self.writer.counts[f"rejected_{NOT_WRONG}"]
        if total is not None and lost > self.stage.max_rejected * total:
            self.writer.flush()
            raise _too_many_rejected(self.stage, self.writer.parts, total)

    def facts(self, speed: "Speed | None") -> StageFacts:
        """Rows and tokens of all attempts so far; seconds, speed and cached tokens of this attempt."""
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
        """Store this shard's marker and, when all other shards have theirs, the marker of the stage."""
        stage, rows = self.stage, self.rows
        self.writer.flush()  # rows taken over from another number of shards may wait though nothing was asked for
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
        markers = mark(stage.folder, marker)
        log.info("%s: shard %d has ended, as have %d of %d", stage.role, stage.shard, len(markers), stage.shards)
        if len(markers) < stage.shards:
            return
        facts = summed([shard_marker.facts for shard_marker in markers])
        parts = [part for shard_marker in markers for part in shard_marker.parts]
        if stage.rows not in {None, facts.rows.total}:
            raise RowsLost(f"{stage.role}: the shards have {facts.rows.total} of {stage.rows} rows")
        not_wrong = int(facts.metrics.get(f"rejected_{NOT_WRONG}", 0))
        if facts.rows.rejected - not_wrong > stage.max_rejected * facts.rows.total:
            raise _too_many_rejected(stage, parts, facts.rows.total)
        if not_wrong and not facts.rows.done:
            raise UserError(
                f"{stage.role}: the teacher has turned round none of {facts.rows.total} verdicts",
                hint="`cgd rows --stage critique` shows whether its critiques end on a verdict. If they do, this "
                "teacher writes no wrong ones: use another, or take miscritique out of spec.training.",
            )
        done = self._context.store.finish(
            stage.folder,
            facts=facts,
            parts=parts,
            started=min(shard_marker.started for shard_marker in markers),
            inputs=stage.inputs,
            settings=settings | {"shards": stage.shards},
        )
        self._context.store.point_at(done)


class Questions:
    """What to ask next: first the next role of rows that have just been kept, then stored rows that lack a role. Among
    stored rows the last role comes first, so new rows of the first role come last."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards, self._hopeless = shards, False
        self._next = dict(pairwise(shards))
        self._ready: deque[tuple[Shard, Row]] = deque()
        backlogs = [(shard, shard.backlog()) for shard in reversed(shards)]
        self._waiting = ((shard, row) for shard, rows in backlogs for row in rows)
        self.under_way: dict[str, tuple[Shard, Row]] = {}
        """By the request's name: questions that the engine has not answered yet."""

    def any(self) -> bool:
        """Whether a question is ready now."""
        if not self._ready and (first := next(self._waiting, None)):
            self._ready.append(first)
        return bool(self._ready)

    def take(self) -> Request | None:
        if not self.any():
            return None
        shard, row = self._ready.popleft()
        request = shard.request(row)
        self.under_way[request.name] = shard, row
        return request

    def answered(self, reply: Reply) -> None:
        shard, row = self.under_way.pop(reply.name)
        kept = shard.take(row, reply)
        if kept is not None and (next_shard := self._next.get(shard)):
            self._ready.extend((next_shard, draw) for draw in drawn(kept, next_shard.stage.draws))

    def end_if_hopeless(self, engine: Engine) -> None:
        """End the engine when a shard has rejected too many rows. Replies that are paid for are still to come."""
        if self._hopeless:
            return
        try:
            for shard in self._shards:
                shard.refuse_if_hopeless()
        except UserError as error:
            self._hopeless = True
            engine.end(error)


def _fill(context: Context, shards: Sequence[Shard], start_engine: Callable[[], Engine]) -> None:
    """Ask for every row that is not stored until all are answered, too many are rejected or SIGTERM comes, store every
    reply, and write the markers of what is complete."""
    engine: Engine | None = None
    speed: Speed | None = None

    def after_step() -> None:
        if any(shard.writer.due for shard in shards):
            all(shard.writer.try_flush() for shard in shards)
        assert speed
        assert engine
        speed.report_when_due()
        questions.end_if_hopeless(engine)

    def flush() -> None:
        for shard in shards:
            shard.writer.flush()

    try:
        questions = Questions(shards)
        if questions.any():
            engine = start_engine()
            speed = Speed(context, shards, questions, engine)
            with context.holding(), storing(flush):
                for reply in drive(engine, questions.take, context.stop, on_step=after_step):
                    questions.answered(reply)
    finally:
        context.facts |= {shard.stage.role: shard.facts(speed) for shard in shards}
    context.check()
    for shard in shards:
        shard.end(engine.settings if engine else {})
    if engine:
        engine.close()


def _rows(stage: Stage, columns: Sequence[str] | None = None) -> Iterator[Row]:
    return owned_rows(stage.source, stage.source_parts, stage.shard, stage.shards, columns)


def _too_many_rejected(stage: Stage, parts: Sequence[Part], total: int) -> UserError:
    stored = (row for part in parts if part.key.startswith(REJECTED) for row in from_parquet(stage.folder.read(part)))
    rows = [row for row in stored if row["reason"] != NOT_WRONG]  # which is an outcome, and no fault
    reasons = Counter(str(row["reason"]) for row in rows).most_common()
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons)
    examples = "; ".join(f"{row['id']} {row['reason']}: {row['detail'][:200]}" for row in rows[:2])
    message = (
        f"{stage.role}: {len(rows)} of {total} rows rejected, more than the {stage.max_rejected:.1%} that "
        f"spec.generation.maxRejected allows ({counts}). Examples: {examples}. All finished rows are stored."
    )
    model = "student" if stage.role == "answer" else "teacher"
    hint = HINTS.get(reasons[0][0], "").format(role=settings_of(stage.role), model=model) if reasons else ""
    return UserError(message, hint=f"{hint} Or raise spec.generation.maxRejected.".strip())


class Speed:
    """How fast this attempt goes, counted from the moment when the engine is warm."""

    def __init__(self, context: Context, shards: Sequence[Shard], questions: Questions, engine: Engine) -> None:
        self._context, self._shards, self._questions, self._engine = context, shards, questions, engine
        self._pace = Pace()
        self._reported = self._logged = time.monotonic()

    def report_when_due(self) -> None:
        """Report to the operator every `REPORT_SECONDS`, and log every `LOG_SECONDS`."""
        clock = time.monotonic()
        if clock - self._reported < REPORT_SECONDS:
            return
        self._reported, with_log = clock, clock - self._logged >= LOG_SECONDS
        self._logged = clock if with_log else self._logged
        # The roles run side by side: the rows of all count together, and the estimate is for the last row of any.
        finished = sum(shard.fresh["rows"] for shard in self._shards)
        left = sum(shard.rows.total - shard.rows.done - shard.rows.rejected for shard in self._shards)
        eta = self._pace.remaining(finished, left, under_way=len(self._questions.under_way))
        for shard in self._shards:
            rows, role = shard.rows, shard.stage.role
            cache_hit_rate = shard.fresh["cached_tokens"] / max(shard.fresh["prompt_tokens"], 1)
            metrics = self.metrics(shard) | {"cache_hit_rate": cache_hit_rate} | shard.writer.metrics()
            speed = metrics["tokens_per_second"]
            self._context.progress.report(role, rows, tokens_per_second=speed, eta=eta, metrics=metrics)
            if with_log:
                log.info(
                    "%s: %d of %d rows, %d rejected, %.0f tokens/s, %s s to go, %.0f%% of the prompts cached",
                    role,
                    rows.done + rows.rejected,
                    rows.total,
                    rows.rejected,
                    speed,
                    "?" if eta is None else round(eta),
                    100 * cache_hit_rate,
                )

    def metrics(self, shard: Shard) -> dict[str, float]:
        engine = self._engine.metrics()
        del engine["generated_tokens"]
        return engine | {
            "tokens_per_second": round(shard.fresh["tokens"] / self._pace.seconds, 1),
            "prompt_tokens_per_second": round(shard.fresh["prompt_tokens"] / self._pace.seconds, 1),
        }


if __name__ == "__main__":
    run(main)
