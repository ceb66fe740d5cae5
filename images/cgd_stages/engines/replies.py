"""Makes a stored row or a rejection of a model's outcome, and the seed that a row is sampled with. Pure."""

import hashlib

from cgd_stages.contract import Role, Sampling
from cgd_stages.engines.base import Completion, Outcome, Refused
from cgd_stages.method.prompts import loops, read_reply, verdict
from cgd_stages.store.rows import Row, prompt_tokens_column, text_column


def row_sampling(sampling: Sampling, stage: str, row: Row) -> Sampling:
    """The sampling with a seed for this row, so that the order of rows and the number of shards change no text."""
    text = f"{sampling.seed}/{stage}/{row['id']}/{row['sample']}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
    return sampling.model_copy(update={"seed": seed})


def rejection(stage: str, row: Row, reason: str, detail: str, *, prompt_tokens: int = 0, tokens: int = 0) -> Row:
    """A row in the list of rejected rows: see `rows.REJECTION_SCHEMA`."""
    return {
        "id": row["id"],
        "sample": row["sample"],
        "stage": stage,
        "reason": reason,
        "detail": detail[:500],
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
    }


def judged(role: Role, row: Row, outcome: Outcome) -> tuple[Row | None, Row | None]:
    """Either the row with the stage's columns added, or the rejection with the reason; the other is None."""
    if isinstance(outcome, Refused):
        rejected = rejection(role, row, outcome.reason, outcome.detail, prompt_tokens=outcome.prompt_tokens)
        return None, rejected
    if fault := _fault(outcome):
        reason, detail = fault
        cost = {"prompt_tokens": outcome.prompt_tokens, "tokens": outcome.tokens}
        return None, rejection(role, row, reason, detail, **cost)
    reply, name = read_reply(outcome.text), text_column(role)
    columns: Row = {
        name: reply.text,
        f"{name}_thinking": outcome.thinking or reply.thinking or None,
        f"{name}_tokens": outcome.tokens,
        f"{name}_finish_reason": outcome.finish_reason,
        prompt_tokens_column(role): outcome.prompt_tokens,
    }
    if role == "critique":
        columns["verdict"] = verdict(reply.text)
    return row | columns, None


def _fault(completion: Completion) -> tuple[str, str] | None:
    """The reason and the detail of a completion's rejection."""
    if completion.finish_reason == "repetition" or loops(completion.text):
        return "repetition", f"repeats itself after {completion.tokens} tokens: ...{completion.text[-100:]!r}"
    if completion.finish_reason == "length":
        return "truncated", f"no end after {completion.tokens} tokens: ...{completion.text[-100:]!r}"
    if completion.finish_reason != "stop":
        return "endpoint", f"the engine ended with {completion.finish_reason!r}"
    reply = read_reply(completion.text)
    if not reply.text:
        thinking = "; the thinking part never ended" if reply.unfinished_thinking else ""
        return "empty", f"no text in {completion.tokens} tokens{thinking}"
    return None
