"""The endpoint engine: any OpenAI-compatible chat server, asked by many threads at once.

A request that the server refuses rejects its own row. A wrong key ends the program for good; a server that is away
for longer than the patience of a request ends it for a retry.

Not through openai's own client (3.54): it loses the status of a refusal whose body is broken and unpacks what a server
has packed, without a bound, so that nothing of it would be left but the names of two paths.
"""

import json
import logging
import os
import queue
import random
import threading
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from cgd_stages.contract import TEACHER_API_KEY, Endpoint
from cgd_stages.engines.base import Completion, Outcome, Refused, Request
from cgd_stages.errors import StageError, TransientError, UserError
from cgd_stages.keys import without_keys
from cgd_stages.runtime.web import Status, exchange

log = logging.getLogger(__name__)

PROBE_SECONDS = 30.0
ENDPOINT_HINT = "Check url and model in spec.teacher.endpoint, and that the server is running."
KEY_HINT = "Check the Secret of spec.teacher.endpoint.apiKeySecretRef."
MOST, LEAST, WHOLE = 8 << 20, 1 << 20, 512 << 20
"""Bytes of an answer: more than any model's context, and less where so many requests are under way that all of their
answers together would be more than `WHOLE`, but never less than `LEAST`."""
LONGEST_ID, LONGEST_REASON = 200, 40
"""Characters that are kept of a model's id and of a reason to finish."""
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}


@dataclass(frozen=True)
class Patience:
    """How long one request is tried: seconds for one answer, tries, and the first and longest pause between two.

    In tenacity's words the loop would be as long, for who is to blame is decided between two tries.
    """

    timeout: float = 600.0
    tries: int = 8
    first_pause: float = 1.0
    longest_pause: float = 60.0

    def pause(self, attempt: int, wanted: float | None) -> float:
        """Seconds before the next try: what the server asks for, else doubling, with jitter so that no herd forms."""
        if wanted is not None:
            return min(wanted, 10 * self.longest_pause)
        longest: float = min(self.first_pause * 2**attempt, self.longest_pause)
        return random.uniform(0.5, 1.0) * longest  # noqa: S311


PATIENT = Patience()


class Failed(Exception):
    """One try failed. `status` is None when no HTTP answer came. Of what the server said, which may echo the key, the
    first characters are told."""

    def __init__(self, what: str, said: object, *, status: int | None = None, wait: float | None = None) -> None:
        super().__init__(f"{what}: {without_keys(str(said))[:300]}")
        self.status = status
        self.wait = wait


class EndpointEngine:
    """As many threads as `max_concurrency`, each with one request. Redoes what may pass, see `_RETRIED`."""

    def __init__(self, endpoint: Endpoint, patience: Patience = PATIENT) -> None:
        self._endpoint, self._patience = endpoint, patience
        self._requests: queue.Queue[Request] = queue.Queue()
        self._outcomes: queue.Queue[Outcome | StageError] = queue.Queue()
        self._threads = self._retries = self._tokens = 0
        self._under_way = 0
        self._answered_at = 0.0
        self._failure: StageError | None = None
        self._closed = threading.Event()
        self.settings: dict[str, Any] = {"engine": "endpoint", "maxConcurrency": endpoint.max_concurrency}

    @property
    def room(self) -> int:
        return self._endpoint.max_concurrency - self._under_way

    @property
    def busy(self) -> bool:
        return self._under_way > 0 or self._failure is not None

    def submit(self, request: Request) -> None:
        self._under_way += 1
        self._requests.put(request)
        if self._threads < min(self._under_way, self._endpoint.max_concurrency):
            self._threads += 1
            # Daemons: a request that hangs must not keep the process from ending.
            threading.Thread(target=self._work, name=f"endpoint-{self._threads}", daemon=True).start()

    def step(self) -> list[Outcome]:
        """Wait up to a second for outcomes. Raises UserError for a wrong key or URL, TransientError when it is away."""
        if self._failure is not None:
            raise self._failure
        found = self._collect()
        self._under_way -= len(found)
        failures = [error for error in found if isinstance(error, StageError)]
        outcomes = [outcome for outcome in found if not isinstance(outcome, StageError)]
        self._tokens += sum(outcome.tokens for outcome in outcomes if isinstance(outcome, Completion))
        if failures:
            # What was answered beside the failure is handed out first: it must not be asked for again.
            self._failure = failures[0]
        return outcomes

    def metrics(self) -> dict[str, float]:
        return {"generated_tokens": float(self._tokens), "retries": float(self._retries)}

    def close(self) -> None:
        self._closed.set()

    def _collect(self) -> list[Outcome | StageError]:
        try:
            found = [self._outcomes.get(timeout=1.0)]
        except queue.Empty:
            return []
        while not self._outcomes.empty():
            found.append(self._outcomes.get_nowait())
        return found

    def _work(self) -> None:
        while not self._closed.is_set():
            try:
                request = self._requests.get(timeout=1.0)
            except queue.Empty:
                continue
            try:
                self._outcomes.put(self._answer(request))
            except StageError as error:
                self._outcomes.put(error)
            except Exception as error:  # noqa: BLE001 (a thread's end would leave its request under way for ever)
                self._outcomes.put(TransientError(f"the endpoint engine failed: {error!r}"))

    def _answer(self, request: Request) -> Outcome:
        """Try until there is an answer; decide whose fault it is when there is none."""
        body = _body(self._endpoint, request)
        last, failed_at = Failed("nothing", "never tried"), time.monotonic()
        for attempt in range(self._patience.tries):
            try:
                outcome = _completion(request.name, post(self._endpoint, body, self._patience.timeout))
            except Failed as failed:
                _refuse_if_permanent(self._endpoint, failed)
                last, failed_at = failed, time.monotonic() if attempt == 0 else failed_at
                if failed.status is not None and failed.status not in _RETRIED:
                    return Refused(request.name, "endpoint", str(failed))
                if attempt + 1 < self._patience.tries:
                    self._retries += 1
                    self._closed.wait(self._patience.pause(attempt, failed.wait))
                if self._closed.is_set():
                    break
            else:
                self._answered_at = time.monotonic()
                return outcome
        # Answers from before it failed prove nothing: when a server dies, all that is under way fails.
        if self._answered_at > failed_at or self._is_alive():
            return self._last_try(request, body)
        message = f"the endpoint {self._endpoint.url} does not answer: {last}"
        raise TransientError(message, hint=ENDPOINT_HINT)

    def _is_alive(self) -> bool:
        """Whether the server answers anything; asked when no other request can tell."""
        try:
            _probe_by_asking(self._endpoint, min(self._patience.timeout, PROBE_SECONDS))
        except TransientError:
            return False
        return not self._closed.is_set()

    def _last_try(self, request: Request, body: bytes) -> Outcome:
        """The server answers others, so it is this request that it cannot bear, unless it has just come back."""
        try:
            outcome = _completion(request.name, post(self._endpoint, body, self._patience.timeout))
        except Failed as failed:
            return Refused(request.name, "endpoint", f"{failed} ({self._patience.tries + 1} tries)")
        self._answered_at = time.monotonic()
        return outcome


def probe(endpoint: Endpoint, timeout: float = PROBE_SECONDS) -> str:
    """Ask the server for its models; say what was found. Raises UserError or TransientError with a hint."""
    try:
        served = _served(call(endpoint, "/models", None, timeout))
    except Failed as failed:
        _refuse_if_permanent(endpoint, failed, but=404)
        if failed.status in {404, 405}:
            return _probe_by_asking(endpoint, timeout)
        raise TransientError(f"the endpoint {endpoint.url} does not answer: {failed}", hint=ENDPOINT_HINT) from failed
    if served and endpoint.model not in served:
        message = f"the endpoint {endpoint.url} does not serve {endpoint.model}, but {', '.join(served[:5])}"
        raise UserError(message, hint="Correct spec.teacher.endpoint.model.")
    return f"{endpoint.url} serves {endpoint.model}"


def _probe_by_asking(endpoint: Endpoint, timeout: float) -> str:
    """For servers that do not list their models: one token."""
    body = {"model": endpoint.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    try:
        post(endpoint, json.dumps(body).encode(), timeout)
    except Failed as failed:
        _refuse_if_permanent(endpoint, failed)
        if failed.status is None or failed.status in _RETRIED:
            raise TransientError(f"the endpoint does not answer: {failed}", hint=ENDPOINT_HINT) from failed
        raise UserError(f"the endpoint {endpoint.url} refuses a request: {failed}", hint=ENDPOINT_HINT) from failed
    return f"{endpoint.url} answers as {endpoint.model}"


def post(endpoint: Endpoint, body: bytes, timeout: float) -> Any:
    """One chat completion, as the server's JSON. Raises Failed."""
    return call(endpoint, "/chat/completions", body, timeout)


def call(endpoint: Endpoint, path: str, body: bytes | None, timeout: float) -> Any:
    """One HTTP exchange. Raises Failed for everything but an answer in JSON, UserError for a redirect."""
    url, most = endpoint.url.rstrip("/") + path, min(MOST, max(LEAST, WHOLE // endpoint.max_concurrency))
    try:
        return json.loads(exchange(url, body, headers=_authorization(), seconds=timeout, most=most))
    except Status as status:
        if status.redirect:
            raise _redirected(endpoint, path, status.redirect) from status
        wait = _retry_after(status.headers.get("Retry-After"))
        raise Failed(
            f"HTTP {status.code}", status.body.decode(errors="replace"), status=status.code, wait=wait
        ) from status
    except (OSError, ValueError, RecursionError) as error:
        raise Failed(type(error).__name__, error) from error


def _authorization() -> dict[str, str]:
    key = os.environ.get(TEACHER_API_KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError("the endpoint's key has characters that no header of HTTP can hold", hint=KEY_HINT)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _redirected(endpoint: Endpoint, path: str, url: str) -> UserError:
    where = without_keys(url)[:300]
    return UserError(
        f"the endpoint {endpoint.url} redirects to {where}, which is not followed: the key would go along",
        hint=f"Set spec.teacher.endpoint.url to {where.removesuffix(path)} if that server may have the key, "
        "or to a URL that answers itself.",
    )


def _refuse_if_permanent(endpoint: Endpoint, failed: Failed, but: int | None = None) -> None:
    """Raise UserError for what every other request would meet as well."""
    if failed.status in {401, 403}:
        raise UserError(f"the endpoint {endpoint.url} does not accept the key: {failed}", hint=KEY_HINT) from failed
    if failed.status == 404 and but != 404:
        raise UserError(f"there is no such model or URL at {endpoint.url}: {failed}", hint=ENDPOINT_HINT) from failed


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date."""
    if not value:
        return None
    try:
        if value.strip().isdecimal():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def _body(endpoint: Endpoint, request: Request) -> bytes:
    ask = request.sampling
    body: dict[str, Any] = {
        "model": endpoint.model,
        "messages": request.messages,
        "max_tokens": ask.max_tokens,
        "temperature": ask.temperature,
        "top_p": ask.top_p,
    }
    return json.dumps(body | ({"seed": ask.seed} if ask.temperature > 0 else {})).encode()


def _completion(name: str, answer: Any) -> Completion:
    try:
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        said = choice["message"]
        return Completion(
            name=name,
            text=_said(said.get("content")),
            # vLLM's server and OpenRouter say "reasoning", DeepSeek and older servers "reasoning_content".
            thinking=_said(said.get("reasoning") or said.get("reasoning_content")),
            finish_reason=_said(str(choice.get("finish_reason") or "stop"))[:LONGEST_REASON],
            prompt_tokens=int(usage.get("prompt_tokens", 0)),
            tokens=int(usage.get("completion_tokens", 0)),
            cached_tokens=int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
        )
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise Failed("the answer is not a chat completion", answer) from error


def _said(text: str | None) -> str:
    """What a row may keep of a text of the server, which knows no key but its own. A change is told: a key that is an
    ordinary word would change many."""
    kept = without_keys(text or "", only=TEACHER_API_KEY)
    if kept != (text or ""):
        log.warning("the endpoint's key is in an answer, and <%s> is stored in its place", TEACHER_API_KEY)
    return kept


def _served(answer: Any) -> list[str]:
    """Ids of the models that `/models` lists; empty when the list is not one that we know."""
    listed = answer.get("data") if isinstance(answer, dict) else None
    return [str(model["id"])[:LONGEST_ID] for model in listed or [] if isinstance(model, dict) and "id" in model]
