"""One request to the teacher's endpoint, and whose fault its failure is: the request's, the user's or the server's.

It does not use openai's own client (3.54), which loses the status of a refusal with a broken body and decompresses
answers without a bound. Only the names of two paths would be left of it.
"""

import json
import math
import os
import random
import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from cgd_stages.contract import TEACHER_API_KEY, Endpoint
from cgd_stages.errors import TransientError, UserError
from cgd_stages.keys import without_keys
from cgd_stages.runtime.web import Status, exchange

PROBE_SECONDS = 30.0
ENDPOINT_HINT = "Check url and model in spec.teacher.endpoint, and that the server is running."
KEY_HINT = "Check the Secret of spec.teacher.endpoint.apiKeySecretRef."
BUSY_HINT = (
    "Lower spec.teacher.endpoint.maxConcurrency, or have the server's limits raised. All finished rows are stored."
)
CREDIT_HINT = (
    "Top up the account of spec.teacher.endpoint, then create the run again: all finished rows are stored, and it asks "
    "only for the others."
)
MOST_BYTES, LEAST_BYTES, TOTAL_BYTES = 8 << 20, 1 << 20, 512 << 20
"""The limit of an answer is `MOST_BYTES`, which is more than any model's context. With many requests at once it is
lower, so that all answers together have at most `TOTAL_BYTES`, but never below `LEAST_BYTES`."""
_LATER = {408, 409, 425, 429}
"""The statuses that say to ask again later, and nothing of what was asked."""
OF_KEY_OR_ROW = {403, 404}
"""The statuses of a wrong key or model, and of a single prompt: some servers moderate with 403, or find no provider for
a request with 404."""
_NAMED = {
    "invalid_request_error": 400,
    "context_length_exceeded": 400,
    "content_filter": 400,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "billing_error": 402,
    "insufficient_quota": 402,
    "permission_error": 403,
    "model_not_found": 404,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "api_error": 500,
    "server_error": 500,
    "overloaded_error": 529,
}
"""The names that OpenAI and Anthropic give to failures -> the status that they belong to."""
_NO_CREDIT = re.compile(
    r"insufficient[_ ](?:account[_ ])?(?:quota|balance|credit|fund)|exceeded_current_quota|used all available credits"
    r"|credit balance is too low|arrearage",
    re.IGNORECASE,
)
"""The words of OpenAI, DeepSeek, OpenRouter, Moonshot, xAI, Anthropic and Alibaba for a credit that is used up, which
have several statuses."""


@dataclass(frozen=True)
class Patience:
    """How long a request is tried: at most so many seconds for each answer (the endpoint has its own limit as well),
    tries, and the first and longest pause between two tries.

    With tenacity the loop would be as long, because it must decide after each try whose fault the failure is.
    """

    timeout: float = math.inf
    tries: int = 8
    first_pause: float = 1.0
    longest_pause: float = 60.0

    def seconds(self, endpoint: Endpoint) -> float:
        """The most seconds of one answer."""
        return min(self.timeout, endpoint.timeout_seconds)

    def pause(self, attempt: int, retry_after: float | None) -> float:
        """Seconds before the next try: as the server asks, else doubling, with jitter so that requests spread out."""
        if retry_after is not None:
            return min(retry_after, 10 * self.longest_pause)
        longest: float = min(self.first_pause * 2 ** min(attempt, 30), self.longest_pause)
        return random.uniform(0.5, 1.0) * longest  # noqa: S311


class Failed(Exception):
    """One try failed. `status` is None when no HTTP answer came. The message quotes the first characters of the
    server's answer, without keys, which it may echo."""

    def __init__(
        self, what: str, answer: object, *, status: int | None = None, retry_after: float | None = None
    ) -> None:
        self.answer = without_keys(str(answer))
        super().__init__(f"{what}: {self.answer[:300]}")
        self.status = status
        self.retry_after = retry_after

    @property
    def is_verdict(self) -> bool:
        """Whether the server has judged what was asked, so that the same request would fail again."""
        return self.status is not None and (self.status == 501 or 400 <= self.status < 500) and not self.is_later

    @property
    def is_later(self) -> bool:
        """Whether the server only wants to be asked later."""
        return self.status in _LATER


def post(endpoint: Endpoint, body: bytes, timeout: float) -> Any:
    """One chat completion, as the server's JSON. Raises Failed, also for a failure that comes with status 200, as
    OpenRouter reports what fails after the beginning of its answer."""
    answer = call(endpoint, "/chat/completions", body, timeout)
    if error := _error_in(answer):
        status = _status_of(error)
        raise Failed(f"an error {status or ''}".strip() + " in the answer", json.dumps(error), status=status)
    return answer


def _error_in(answer: Any) -> Any:
    """What an answer with status 200 says of a failure; nothing where it has a text."""
    match answer:
        case {"error": error} | {"choices": [{"error": error}, *_]} if error:
            return error
        case {"choices": [_, *_]}:
            return None
        case {"base_resp": {"status_code": code} as error} if code:  # MiniMax
            return error
        case {"code": _} | {"status": _} | {"type": "error"} | {"object": "error"}:
            return answer
    return None


def _status_of(error: Any) -> int | None:
    """The HTTP status that an error's code, status or type stands for."""
    values = [error.get(name) for name in ("code", "status", "status_code", "type")] if isinstance(error, dict) else []
    for value in values:
        number = _NAMED.get(value) if isinstance(value, str) and not value.isdecimal() else value
        if number is not None and str(number).isdecimal() and 400 <= int(number) < 600:
            return int(number)
    return None


def call(endpoint: Endpoint, path: str, body: bytes | None, timeout: float) -> Any:
    """Make one HTTP exchange. Raises UserError for a bad key or a redirect, Failed for any answer but JSON."""
    key = os.environ.get(TEACHER_API_KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError("the endpoint's key has characters that an HTTP header cannot hold", hint=KEY_HINT)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = endpoint.url.rstrip("/") + path
    most = min(MOST_BYTES, max(LEAST_BYTES, TOTAL_BYTES // endpoint.max_concurrency))
    try:
        return _decoded(exchange(url, body, headers=headers, seconds=timeout, most=most))
    except Status as status:
        if status.redirect:
            target = without_keys(status.redirect)[:300]
            message = f"the endpoint {endpoint.url} redirects to {target}, which would receive the key"
            hint = f"Set spec.teacher.endpoint.url to {target.removesuffix(path)} if that server may have the key, "
            raise UserError(message, hint=hint + "or to a URL that does not redirect.") from status
        answer, retry_after = status.body.decode(errors="replace"), _retry_after(status.headers.get("Retry-After"))
        raise Failed(f"HTTP {status.code}", answer, status=status.code, retry_after=retry_after) from status
    except (OSError, ValueError, RecursionError, AttributeError, TypeError) as error:
        raise Failed(type(error).__name__, error) from error


def _decoded(data: bytes) -> Any:
    """The JSON of an answer. Raises ValueError.

    Some gateways stream whatever they are asked for. Of such an answer the pieces are put together, and one without an
    end is none.
    """
    if not data.lstrip().startswith((b"data:", b"event:", b":")):
        return json.loads(data)
    message: dict[str, list[Any]] = {}
    finish = usage = None
    ended = False
    for line in data.decode().split("\n"):
        name, _, value = line.partition(":")
        ended = ended or value.strip() == "[DONE]"
        if name != "data" or ended or not value.strip():
            continue
        piece = json.loads(value)
        if _error_in(piece):
            return piece
        usage = piece.get("usage") or usage
        for choice in piece.get("choices") or []:
            for field, text in (choice.get("delta") or {}).items():
                message.setdefault(field, []).extend(text if isinstance(text, list) else [text])
            finish = choice.get("finish_reason") or finish
    if finish is None and not ended:
        raise ValueError("the server streams, and the stream has no end")
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}


def refuse_if_permanent(endpoint: Endpoint, failed: Failed) -> None:
    """Raise UserError for a failure that every other request would have too, whatever it asks."""
    if failed.status == 401:
        raise UserError(f"the endpoint {endpoint.url} does not accept the key: {failed}", hint=KEY_HINT) from failed
    if failed.status == 402 or (failed.status in {None, 400, 403, 429} and _NO_CREDIT.search(_reason(failed))):
        message = f"the credit at the endpoint {endpoint.url} is used up: {failed}"
        raise UserError(message, hint=CREDIT_HINT) from failed
    if failed.status == 407:
        message = f"a proxy in front of the endpoint {endpoint.url} asks for a login: {failed}"
        raise UserError(
            message, hint="An admin must let the pods through, or give the URL of a way past it."
        ) from failed


def _reason(failed: Failed) -> str:
    """The server's own words for a failure, without what it may echo of a prompt."""
    try:
        answer = json.loads(failed.answer)
    except (ValueError, RecursionError):
        return ""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    names = ("code", "type", "message", "status_msg")
    return " ".join(str(error.get(name)) for name in names) if isinstance(error, dict) else str(error)


def refuse_of_all(endpoint: Endpoint, failed: Failed) -> None:
    """`refuse_if_permanent` for a request whose text gives no reason to refuse it: 403 is of the key, and 404 of the
    model."""
    refuse_if_permanent(endpoint, failed)
    if failed.status == 403:
        raise UserError(f"the endpoint {endpoint.url} does not accept the key: {failed}", hint=KEY_HINT) from failed
    if failed.status == 404:
        raise UserError(f"{endpoint.url} has no such model or URL: {failed}", hint=ENDPOINT_HINT) from failed


def _retry_after(value: str | None) -> float | None:
    """The seconds of a Retry-After header, which holds a number or a date."""
    if not value:
        return None
    try:
        if value.strip().isdecimal():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def ping(endpoint: Endpoint, timeout: float) -> None:
    """Ask for one token, to see that the server answers. Raises TransientError if it does not. A server that refuses
    this request is there; what it refuses of the run's requests, `try_request` finds."""
    messages = [{"role": "user", "content": "Hi"}]
    body = {"model": endpoint.model, "messages": messages, endpoint.token_field: 1} | endpoint.extra_body
    try:
        post(endpoint, json.dumps(body).encode(), timeout)
    except Failed as failed:
        refuse_of_all(endpoint, failed)
        if not failed.is_verdict:
            raise TransientError(f"the endpoint does not answer: {failed}", hint=ENDPOINT_HINT) from failed
