"""Makes a stored row or a rejection of a model's reply, and the seed that a row is sampled with. Pure."""

import hashlib
from dataclasses import replace

from cgd_stages.contract import Repetition, Role, Sampling, Unfinished
from cgd_stages.engines.base import Completion, Refused, Reply
from cgd_stages.method.prompts import Verdict, loops, verdict
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


NOT_WRONG = "not_wrong"
"""The reason to reject a miscritique that does not turn the critique's verdict round."""
ENDLESS = {"truncated": "length", "repetition": "repetition"}
"""The reasons to reject a text without an end -> the finish reason of such a text where it is kept."""


def kept_or_rejected(
    role: Role, row: Row, reply: Reply, loop: Repetition, unfinished: Unfinished = "reject"
) -> tuple[Row | None, Row | None]:
    """Either the row with the stage's columns added, or the rejection with the reason; the other is None.

    `unfinished` says what becomes of a text without an end. A reply that was cut within its thought has no text.
    """
    if isinstance(reply, Refused):
        rejected = rejection(role, row, reply.reason, reply.detail, prompt_tokens=reply.prompt_tokens)
        return None, rejected
    wrong = fault(reply, loop) or (_not_wrong(row["verdict"], reply.text) if role == "miscritique" else None)
    if wrong and unfinished == "keep" and wrong[0] in ENDLESS and reply.text.strip() and not reply.unfinished_thinking:
        reply, wrong = replace(reply, finish_reason=ENDLESS[wrong[0]]), None
    if wrong:
        reason, detail = wrong
        cost = {"prompt_tokens": reply.prompt_tokens, "tokens": reply.tokens}
        return None, rejection(role, row, reason, detail, **cost)
    name = text_column(role)
    columns: Row = {
        name: reply.text,
        f"{name}_thinking": reply.thinking or None,
        f"{name}_tokens": reply.tokens,
        f"{name}_finish_reason": reply.finish_reason,
        prompt_tokens_column(role): reply.prompt_tokens,
    }
    if role == "critique":
        columns["verdict"] = verdict(reply.text)
    return row | columns, None


def _not_wrong(given: Verdict | None, miscritique: str) -> tuple[str, str] | None:
    """The reason and the detail of a miscritique's rejection; `given` is the critique's verdict."""
    found = verdict(miscritique)
    if given and found and given != found:
        return None
    return NOT_WRONG, f"verdict {found or 'missing'}, of the critique {given or 'missing'}: ...{miscritique[-100:]!r}"


def fault(completion: Completion, loop: Repetition) -> tuple[str, str] | None:
    """The reason and the detail of a completion's rejection, as a text that must have an end; None: it is whole."""
    written = completion.text or completion.thinking
    end = written[-100:]
    if completion.control_tokens:
        return "control_tokens", f"the endpoint's text holds {completion.control_tokens}: ...{end!r}"
    if completion.finish_reason == "repetition" or loops(written, loop):
        return "repetition", f"repeats itself after {completion.tokens} tokens: ...{end!r}"
    if completion.finish_reason == "length":
        return "truncated", f"no end after {completion.tokens} tokens: ...{end!r}"
    if completion.finish_reason != "stop":
        return "endpoint", f"the reply ended with {completion.finish_reason!r}: ...{end!r}"
    if completion.unfinished_thinking:
        return "unfinished_thought", f"the thought of {completion.tokens} tokens has no end: ...{end!r}"
    if not completion.text:
        return "empty", f"no text in {completion.tokens} tokens"
    return None
