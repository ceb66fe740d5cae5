"""How a model's outcome becomes a stored row or a rejection, and the seed that a row is sampled with. Pure."""

import hashlib

from cgd_stages.contract import Role, Sampling
from cgd_stages.engines.base import Completion, Outcome, Refused
from cgd_stages.method.prompts import loops, read_reply, verdict
from cgd_stages.store.rows import Row, prompt_tokens_column, text_column


def row_sampling(sampling: Sampling, stage: str, row: Row) -> Sampling:
    """Sampling with a seed of the row's own, so that the order of rows and the number of shards change no text."""
    text = f"{sampling.seed}/{stage}/{row['id']}/{row['sample']}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
    return sampling.model_copy(update={"seed": seed})


def rejection(stage: str, row: Row, reason: str, detail: str, *, prompt_tokens: int = 0, tokens: int = 0) -> Row:
    """One line of the list of rejected rows; see folders.REJECTION_SCHEMA."""
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
    """The row with the stage's columns added, or the rejection that says why not: exactly one of the two."""
    if isinstance(outcome, Refused):
        rejected = rejection(role, row, outcome.reason, outcome.detail, prompt_tokens=outcome.prompt_tokens)
        return None, rejected
    if fault := _fault(outcome):
        reason, detail = fault
        cost = {"prompt_tokens": outcome.prompt_tokens, "tokens": outcome.tokens}
        return None, rejection(role, row, reason, detail, **cost)
    return row | _columns(role, outcome), None


def _fault(said: Completion) -> tuple[str, str] | None:
    if said.finish_reason == "repetition" or loops(said.text):
        return "repetition", f"repeats itself after {said.tokens} tokens: ...{said.text[-100:]!r}"
    if said.finish_reason == "length":
        return "truncated", f"no end after {said.tokens} tokens: ...{said.text[-100:]!r}"
    if said.finish_reason != "stop":
        return "endpoint", f"the engine ended with {said.finish_reason!r}"
    reply = read_reply(said.text)
    if not reply.text:
        thinking = "; the thinking part never ended" if reply.unfinished_thinking else ""
        return "empty", f"no text in {said.tokens} tokens{thinking}"
    return None


def _columns(role: Role, said: Completion) -> Row:
    reply, name = read_reply(said.text), text_column(role)
    columns: Row = {
        name: reply.text,
        f"{name}_thinking": said.thinking or reply.thinking or None,
        f"{name}_tokens": said.tokens,
        f"{name}_finish_reason": said.finish_reason,
        prompt_tokens_column(role): said.prompt_tokens,
    }
    return columns | ({"verdict": verdict(reply.text)} if role == "critique" else {})
