"""The endpoint engine: many threads send requests to an OpenAI-compatible chat server.

A request that the server refuses rejects its own row. A wrong key or a credit that is used up ends the program for
good, after the requests under way have ended; a server that is away for longer than the patience of a request ends it
for a retry. Neither rejects a row. What a server would refuse of every request, `try_request` finds out before the run
asks for a GPU.

It does not use openai's own client (3.54), which loses the status of a refusal with a broken body and decompresses
answers without a bound. Only the names of two paths would be left of it.
"""

import json
import logging
import math
import os
import queue
import random
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from pydantic.alias_generators import to_camel

from cgd_stages.chat.messages import turn_markers
from cgd_stages.chat.thoughts import Split, given_thought, split_text
from cgd_stages.contract import TEACHER_API_KEY, Chat, Endpoint
from cgd_stages.engines.base import Completion, Refused, Reply, Request
from cgd_stages.errors import StageError, TransientError, UserError
from cgd_stages.keys import without_keys
from cgd_stages.runtime.web import Status, exchange

log = logging.getLogger(__name__)

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
LONGEST_ID, LONGEST_REASON = 200, 40
"""The most characters that are kept of a model's id and of a finish reason."""
SPECIAL_TOKENS = "skip_special_tokens"
"""A parameter of vLLM's and SGLang's servers: false leaves special tokens in the text."""
_LATER = {408, 409, 425, 429}
"""The statuses that say to ask again later, and nothing of what was asked."""
_FINISHED = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "model_length", "model_context_window_exceeded"), "length"),
}
"""What servers call the two ends of a text, in small letters -> what a row has. The names are those of OpenAI,
Together, Text Generation Inference, Anthropic, Google (in capitals), Cohere and Mistral."""
_BROKEN_OFF = {"error", "abort", "insufficient_system_resource"}
"""Finish reasons of a text that the server itself has broken off: another try may end otherwise."""
_OF_KEY_OR_ROW = {403, 404}
"""The statuses of a wrong key or model, and of a single prompt: some servers moderate with 403, or find no provider for
a request with 404."""
REFUSAL = "refusal"
"""The finish reason of a reply in which the model declines, and the field and the part that OpenAI has for it."""
REDACTED = "redacted_thinking"
"""Anthropic's part with an encrypted thought."""


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


PATIENT = Patience()
TRIAL = Patience(tries=4)


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


class EndpointEngine:
    """Runs up to `max_concurrency` threads, each with one request. Sends again what fails without a verdict."""

    def __init__(self, endpoint: Endpoint, patience: Patience = PATIENT, chat: Chat | None = None) -> None:
        self._endpoint, self._patience, self._chat = endpoint, patience, chat or Chat()
        self._requests: queue.Queue[Request] = queue.Queue()
        self._replies: queue.Queue[Reply | StageError] = queue.Queue()
        self._threads = self._retries = self._tokens = 0
        self._under_way = 0
        self._answered_at = 0.0
        self._failure: StageError | None = None
        self._closed, self._hurry = threading.Event(), threading.Event()
        self.settings: dict[str, Any] = {"engine": "endpoint", "maxConcurrency": endpoint.max_concurrency}

    @property
    def room(self) -> int:
        return 0 if self._failure else self._endpoint.max_concurrency - self._under_way

    @property
    def busy(self) -> bool:
        return self._under_way > 0 or self._failure is not None

    def submit(self, request: Request) -> None:
        self._under_way += 1
        self._requests.put(request)
        if self._threads < min(self._under_way, self._endpoint.max_concurrency):
            self._threads += 1
            # A daemon thread: a request that hangs must not keep the process from ending.
            threading.Thread(target=self._work, name=f"endpoint-{self._threads}", daemon=True).start()

    def step(self) -> list[Reply]:
        """Wait up to a second for replies. Raises TransientError if the server does not answer, and UserError for a
        wrong key or URL, or a credit that is used up, when the requests under way have ended: they are paid for."""
        if isinstance(self._failure, TransientError) or (self._failure and not self._under_way):
            raise self._failure
        try:
            results = [self._replies.get(timeout=1.0)]
        except queue.Empty:
            return []
        while not self._replies.empty():
            results.append(self._replies.get_nowait())
        self._under_way -= len(results)
        # A failure is raised at the next step, so that the replies beside it are kept and not asked for again.
        self._failure = self._failure or next((result for result in results if isinstance(result, StageError)), None)
        if self._failure:
            self._hurry.set()
        replies = [result for result in results if not isinstance(result, StageError)]
        self._tokens += sum(reply.tokens for reply in replies if isinstance(reply, Completion))
        return replies

    def metrics(self) -> dict[str, float]:
        return {"generated_tokens": float(self._tokens), "retries": float(self._retries)}

    def close(self) -> None:
        self._closed.set()
        self._hurry.set()

    def _work(self) -> None:
        while not self._closed.is_set():
            try:
                request = self._requests.get(timeout=1.0)
            except queue.Empty:
                continue
            try:
                self._replies.put(self._answer(request))
            except StageError as error:
                self._replies.put(error)
            except Exception as error:  # noqa: BLE001 (if the thread ended, its request would never get an reply)
                self._replies.put(TransientError(f"the endpoint engine failed: {error!r}"))

    def _answer(self, request: Request) -> Reply:
        """Try until the server answers. If it never does, decide whether the request or the server is at fault."""
        if markers := sorted({marker for message in request.messages for marker in turn_markers(message["content"])}):
            detail = f"the server may read {', '.join(markers)} in a text as the end of a turn"
            return Refused(request.name, "control_tokens", detail)
        body = json.dumps(request_body(self._endpoint, self._chat, request)).encode()
        last, failed_at = Failed("nothing", "never tried"), time.monotonic()
        sent = failures = 0
        while failures < self._patience.tries:
            try:
                return self._ask(request, body)
            except Failed as failed:
                last, failed_at = failed, failed_at if failures else time.monotonic()
                if refused := self._refused(request, failed):
                    return refused
                # A busy server that others get through to is waited for, however long it takes.
                is_busy = failed.is_later and self._answered_at > failed_at
                failures = 0 if is_busy else failures + 1
                if failures < self._patience.tries:
                    self._retries += 1
                    self._hurry.wait(self._patience.pause(sent, failed.retry_after))
                sent += 1
            if self._hurry.is_set():
                raise TransientError(f"the endpoint {self._endpoint.url} is no longer asked: {last}")
        # Only an answer after the first failure proves that the server is alive: a server that dies fails all requests.
        if self._answered_at > failed_at or self._is_alive():
            return self._last_try(request, body)
        message = f"the endpoint {self._endpoint.url} does not answer: {last}"
        raise TransientError(message, hint=BUSY_HINT if last.is_later else ENDPOINT_HINT)

    def _ask(self, request: Request, body: bytes) -> Completion:
        completion = _completion(
            request.name,
            post(self._endpoint, body, self._patience.seconds(self._endpoint)),
            shows_special_tokens=shows_special_tokens(self._endpoint),
        )
        self._answered_at = time.monotonic()
        return completion

    def _refused(self, request: Request, failed: Failed) -> Refused | None:
        """The reply to a request that the server refuses for what it asks; None: it may be sent again. Raises UserError
        for a refusal of every request."""
        _refuse_if_permanent(self._endpoint, failed)
        if not failed.is_verdict:
            return None
        # A moderated prompt, or a wrong key or model? A short request tells.
        if failed.status in _OF_KEY_OR_ROW and not self._is_alive():
            return None
        return Refused(request.name, "endpoint", str(failed))

    def _is_alive(self) -> bool:
        """Whether the server answers a short request, for when no other request has shown it."""
        try:
            _ping(self._endpoint, min(self._patience.timeout, PROBE_SECONDS))
        except TransientError:
            return False
        return not self._closed.is_set()

    def _last_try(self, request: Request, body: bytes) -> Reply:
        """Try once more, as the server may have just come back. If it fails again, the request is at fault, unless the
        server only says to come later."""
        try:
            return self._ask(request, body)
        except Failed as failed:
            _refuse_if_permanent(self._endpoint, failed)
            tries = f"{failed} ({self._patience.tries + 1} tries)"
            if failed.is_later:
                message = f"the endpoint {self._endpoint.url} puts a request off again and again: {tries}"
                raise TransientError(message, hint=BUSY_HINT) from failed
            return Refused(request.name, "endpoint", tries)


def probe(endpoint: Endpoint, timeout: float = PROBE_SECONDS) -> str:
    """Ask the server for its models, and say in a sentence that it serves the run's. Raises UserError or
    TransientError."""
    try:
        answer = call(endpoint, "/models", None, timeout)
    except Failed as failed:
        if failed.status != 404:
            _refuse_of_all(endpoint, failed)
        if failed.status in {404, 405}:
            _ping(endpoint, timeout)
            return f"{endpoint.url} answers as {endpoint.model}"
        raise TransientError(f"the endpoint {endpoint.url} does not answer: {failed}", hint=ENDPOINT_HINT) from failed
    models = answer.get("data") if isinstance(answer, dict) else None
    served = [str(model["id"])[:LONGEST_ID] for model in models or [] if isinstance(model, dict) and "id" in model]
    if served and endpoint.model not in served:
        message = f"the endpoint {endpoint.url} does not serve {endpoint.model}, but {', '.join(served[:5])}"
        raise UserError(message, hint="Correct spec.teacher.endpoint.model.")
    return f"{endpoint.url} serves {endpoint.model}"


def _ping(endpoint: Endpoint, timeout: float) -> None:
    """Ask for one token, to see that the server answers. Raises TransientError if it does not. A server that refuses
    this request is there; what it refuses of the run's requests, `try_request` finds."""
    messages = [{"role": "user", "content": "Hi"}]
    body = {"model": endpoint.model, "messages": messages, endpoint.token_field: 1} | endpoint.extra_body
    try:
        post(endpoint, json.dumps(body).encode(), timeout)
    except Failed as failed:
        _refuse_of_all(endpoint, failed)
        if not failed.is_verdict:
            raise TransientError(f"the endpoint does not answer: {failed}", hint=ENDPOINT_HINT) from failed


# --- a trial ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tried:
    """A reply of the trial, and whether the model has thought before it, be the thought shown or only counted."""

    completion: Completion
    thinks: bool


def try_request(endpoint: Endpoint, chat: Chat, request: Request, where: str, patience: Patience = TRIAL) -> Tried:
    """One whole completion with the body that the run is going to send. `where` is the place of its sampling in the
    spec.

    Raises UserError with the parameter that the server refuses, TransientError if it does not answer.
    """
    body = request_body(endpoint, chat, request)
    last: Failed | None = None
    for attempt in range(patience.tries):
        try:
            answer = post(endpoint, json.dumps(body).encode(), patience.seconds(endpoint))
            completion = _completion(request.name, answer, shows_special_tokens=shows_special_tokens(endpoint))
            return Tried(completion, thinks=bool(completion.thinking) or _hides_thought(answer))
        except Failed as failed:
            _refuse_of_all(endpoint, failed)
            if failed.is_verdict:
                raise _refusal(endpoint, body, failed, where) from failed
            last = failed
            time.sleep(patience.pause(attempt, failed.retry_after) if attempt + 1 < patience.tries else 0)
    raise TransientError(f"the endpoint {endpoint.url} does not answer: {last}", hint=ENDPOINT_HINT) from last


def refuse_hidden_thoughts(endpoint: Endpoint, chat: Chat, request: Request, patience: Patience = TRIAL) -> None:
    """Raise UserError when the server leaves a thought in the text and takes its markers, which are special tokens, out
    of it. A server that can show special tokens is asked to; of another one, nothing can be known."""
    if SPECIAL_TOKENS in endpoint.extra_body:
        return
    shown = endpoint.model_copy(update={"extra_body": {**endpoint.extra_body, SPECIAL_TOKENS: False}})
    try:
        answer = post(shown, json.dumps(request_body(shown, chat, request)).encode(), patience.seconds(shown))
        completion = _completion(request.name, answer, shows_special_tokens=True)
    except Failed as failed:
        log.info("the endpoint does not show special tokens: %s", failed)
        return
    if completion.thinking or completion.unfinished_thinking:
        raise UserError(
            f"{endpoint.model} at {endpoint.url} thinks, and the server leaves the thought in the text without its "
            "markers, where nothing tells it from the answer",
            hint=f"Start the server with a reasoning parser, or set spec.teacher.endpoint.extraBody to "
            f"{{{SPECIAL_TOKENS}: false}}.",
        )


def refuse_other_mode(chat: Chat, tried: Sequence[Tried]) -> None:
    """Raise UserError when a model behind an endpoint thinks although it must not, or never does although it must."""
    thinks = any(trial.thinks for trial in tried)
    if chat.thinking == "auto" or not tried or thinks == (chat.thinking == "on"):
        return
    shown = "no reply has a thought" if chat.thinking == "on" else "a reply has a thought"
    message = (
        f"spec.teacher.chat.thinking is {chat.thinking}, but {shown}: the server does not use chat_template_kwargs"
    )
    hint = (
        "Set spec.teacher.chat.thinking to auto, and write the parameter that the server has for it into "
        "spec.teacher.endpoint.extraBody, such as reasoning_effort."
    )
    raise UserError(message, hint=hint)


def refuse_unseen_thoughts(tried: Sequence[Tried]) -> None:
    """Raise UserError when thoughts are to be learned and the server counts them but does not give their text."""
    if any(trial.completion.thinking for trial in tried):
        return
    if any(trial.thinks for trial in tried):
        raise UserError(
            "spec.training.thinking is learn, but the endpoint does not give the text of its thoughts, so that every "
            "row would learn an empty one",
            hint="Set spec.training.thinking to drop, or use a server that returns its reasoning.",
        )
    if tried:
        log.warning("no reply of the trial has a thought: rows without one learn an empty thought")


def _refusal(endpoint: Endpoint, body: dict[str, Any], failed: Failed, where: str) -> UserError:
    answer = failed.answer
    try:  # servers name the parameter in the field for it
        error = json.loads(answer)["error"]
        named = [error["param"]] if error["param"] in body else []
    except (ValueError, LookupError, TypeError, RecursionError):
        named = []
    in_text = [name for name in body if re.search(rf"\b{re.escape(name)}\b", answer)]
    names = list(dict.fromkeys([*named, *(name for name in in_text if name not in ("model", "messages"))]))
    why = f", because of its {', '.join(names)}" if names else ""
    message = f"the endpoint {endpoint.url} refuses a request with the sampling of {where}{why}: {failed}"
    general = f"See what the server says of {endpoint.model}, and correct spec.teacher.endpoint."
    return UserError(message, hint=" Or: ".join(_mend(endpoint, name, where) for name in names) or general)


def _mend(endpoint: Endpoint, name: str, where: str) -> str:
    if name in endpoint.extra_body:
        return f"Correct {name} in spec.teacher.endpoint.extraBody."
    match name:
        case "max_tokens" | "max_completion_tokens":
            other = "max_tokens" if name == "max_completion_tokens" else "max_completion_tokens"
            return f"Set spec.teacher.endpoint.tokenField to {other}, or lower {where}.maxTokens."
        case "temperature":
            return (
                f"Add temperature to spec.teacher.endpoint.omit, which leaves it to the server, or change "
                f"{where}.temperature."
            )
        case "seed":
            return "Add seed to spec.teacher.endpoint.omit."
        case "top_p" | "top_k" | "min_p":
            return f"Remove {to_camel(name)} from {where}."
        case "thinking_token_budget":
            return "Remove spec.teacher.chat.thinkingBudget."
        case "chat_template_kwargs":
            return (
                "Remove thinking and templateKwargs from spec.teacher.chat, and write the server's own parameter into "
                "spec.teacher.endpoint.extraBody."
            )
        case _:
            return f"Correct {name} of the model or the messages: see what the server says."


# --- HTTP -------------------------------------------------------------------------------------------------------


def post(endpoint: Endpoint, body: bytes, timeout: float) -> Any:
    """One chat completion, as the server's JSON. Raises Failed, also for a failure that comes with status 200, as
    OpenRouter reports what fails after the beginning of its answer."""
    match answer := call(endpoint, "/chat/completions", body, timeout):
        case {"error": {"code": int(code)} as error} | {"choices": [{"error": {"code": int(code)} as error}, *_]}:
            status = code if 400 <= code < 600 else None
            raise Failed(f"an error {code} in the answer", json.dumps(error), status=status)
    return answer


def call(endpoint: Endpoint, path: str, body: bytes | None, timeout: float) -> Any:
    """Make one HTTP exchange. Raises UserError for a bad key or a redirect, Failed for any answer but JSON."""
    key = os.environ.get(TEACHER_API_KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError("the endpoint's key has characters that an HTTP header cannot hold", hint=KEY_HINT)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = endpoint.url.rstrip("/") + path
    most = min(MOST_BYTES, max(LEAST_BYTES, TOTAL_BYTES // endpoint.max_concurrency))
    try:
        return json.loads(exchange(url, body, headers=headers, seconds=timeout, most=most))
    except Status as status:
        if status.redirect:
            target = without_keys(status.redirect)[:300]
            message = f"the endpoint {endpoint.url} redirects to {target}, which would receive the key"
            hint = f"Set spec.teacher.endpoint.url to {target.removesuffix(path)} if that server may have the key, "
            raise UserError(message, hint=hint + "or to a URL that does not redirect.") from status
        answer, retry_after = status.body.decode(errors="replace"), _retry_after(status.headers.get("Retry-After"))
        raise Failed(f"HTTP {status.code}", answer, status=status.code, retry_after=retry_after) from status
    except (OSError, ValueError, RecursionError) as error:
        raise Failed(type(error).__name__, error) from error


def _refuse_if_permanent(endpoint: Endpoint, failed: Failed) -> None:
    """Raise UserError for a failure that every other request would have too, whatever it asks."""
    if failed.status == 401:
        raise UserError(f"the endpoint {endpoint.url} does not accept the key: {failed}", hint=KEY_HINT) from failed
    # OpenAI's name of it, which comes with 429
    if failed.status == 402 or (failed.status == 429 and "insufficient_quota" in failed.answer):
        message = f"the credit at the endpoint {endpoint.url} is used up: {failed}"
        raise UserError(message, hint=CREDIT_HINT) from failed
    if failed.status == 407:
        message = f"a proxy in front of the endpoint {endpoint.url} asks for a login: {failed}"
        raise UserError(
            message, hint="An admin must let the pods through, or give the URL of a way past it."
        ) from failed


def _refuse_of_all(endpoint: Endpoint, failed: Failed) -> None:
    """`_refuse_if_permanent` for a request whose text gives no reason to refuse it: 403 is of the key, and 404 of the
    model."""
    _refuse_if_permanent(endpoint, failed)
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


def request_body(endpoint: Endpoint, chat: Chat, request: Request) -> dict[str, Any]:
    """The body of a chat completion. It leaves out every parameter that changes nothing, because servers refuse some
    parameters, and some pairs of them, whatever their values are."""
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": endpoint.model,
        "messages": request.messages,
        endpoint.token_field: sampling.max_tokens,
        "temperature": sampling.temperature,
    }
    if sampling.temperature > 0 or "temperature" in endpoint.omit:
        neutral = {"top_p": 1.0, "top_k": None, "min_p": 0.0, "seed": None}
        drawn = {name: getattr(sampling, name) for name in neutral}
        body |= {name: value for name, value in drawn.items() if value not in (None, neutral[name])}
    body = {name: value for name, value in body.items() if name not in endpoint.omit}
    # The mode in the words of vLLM's server, which SGLang and others share. Templates have two names for the switch; a
    # template that does not use a name ignores it.
    switch = {} if chat.thinking == "auto" else dict.fromkeys(("enable_thinking", "thinking"), chat.thinking == "on")
    if kwargs := switch | chat.template_kwargs:
        body["chat_template_kwargs"] = kwargs
    if chat.thinking_budget is not None:
        body["thinking_token_budget"] = chat.thinking_budget
    extra = endpoint.extra_body
    if isinstance(given := extra.get("chat_template_kwargs"), dict):  # it wins by its fields, and keeps the others
        extra = extra | {"chat_template_kwargs": kwargs | given}
    return body | extra


def shows_special_tokens(endpoint: Endpoint) -> bool:
    """Whether the server is asked to leave special tokens, such as the end of the turn, in the text."""
    return endpoint.extra_body.get(SPECIAL_TOKENS) is False


def _completion(name: str, answer: Any, *, shows_special_tokens: bool) -> Completion:
    """The reply in a server's answer. Raises Failed when there is none, or when the server has broken it off."""
    try:
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        message = choice["message"]
        text, thought = map(_without_key, _parts(message))
        thought = given_thought(thought)
        parts = split_text(text, lone_end=not thought, with_end=shows_special_tokens)
        if thought:
            parts = Split(parts.text, thought, unfinished_thinking=not parts.text)
        reason = REFUSAL if _declines(message) else _without_key(str(choice.get("finish_reason") or "stop"))
        if reason.lower() in _BROKEN_OFF:
            raise Failed(f"the server has broken off a text with {reason!r}", text[-100:])
        return Completion(
            name=name,
            text=parts.text,
            thinking=parts.thinking,
            unfinished_thinking=parts.unfinished_thinking,
            finish_reason=_FINISHED.get(reason.lower(), reason[:LONGEST_REASON]),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            tokens=int(usage.get("completion_tokens") or 0),
            cached_tokens=int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
        )
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise Failed("the answer is not a chat completion", answer) from error


def _parts(message: Any) -> tuple[str, str]:
    """The text and the thought of a message. The thought has a field of its own (vLLM's server and OpenRouter say
    `reasoning`, DeepSeek and older servers `reasoning_content`), or is a part of the content, as Mistral and Anthropic
    have it."""
    texts, thoughts = list[str](), list[str]()
    for part in _pieces(message):
        if part.get("type") != REDACTED:
            (thoughts if part.get("type") in ("thinking", "reasoning") else texts).append(_flat(part))
    fields = (message.get("reasoning"), message.get("reasoning_content"), thoughts)
    return "".join(texts) or _flat(message.get(REFUSAL)), next(filter(str.strip, map(_flat, fields)), "")


def _pieces(message: Any) -> list[dict[str, Any]]:
    """The parts of a message's content, of which a plain text is one."""
    content = message.get("content")
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _declines(message: Any) -> bool:
    """Whether the message is the model's refusal, in the field or in a part for it."""
    return bool(message.get(REFUSAL)) or any(part.get("type") == REFUSAL for part in _pieces(message))


def _hides_thought(answer: Any) -> bool:
    """Whether a completion counts the tokens of a thought, or holds one that is encrypted."""
    match answer:
        case {"usage": {"completion_tokens_details": {"reasoning_tokens": int(counted)}}} if counted > 0:
            return True
    return any(part.get("type") == REDACTED for part in _pieces(answer["choices"][0]["message"]))


def _flat(part: Any) -> str:
    """The text of a part of a message, whatever it is wrapped into. Raises TypeError for what holds none."""
    match part:
        case None:
            return ""
        case str():
            return part
        case list():
            return "".join(map(_flat, part))
        case (
            {"thinking": inner}
            | {"reasoning": inner}
            | {"text": inner}
            | {"summary": inner}
            | {"content": inner}
            | {"refusal": inner}
        ):
            return _flat(inner)
    raise TypeError(f"a part of a message that holds no text: {part!r:.100}")


def _without_key(text: str | None) -> str:
    """A server's text without the endpoint's key, the only key that it knows. A change is logged, because a key that
    is an ordinary word would change many texts."""
    stored_text = without_keys(text or "", only=TEACHER_API_KEY)
    if stored_text != (text or ""):
        log.warning("an answer holds the endpoint's key; <%s> is stored in its place", TEACHER_API_KEY)
    return stored_text
