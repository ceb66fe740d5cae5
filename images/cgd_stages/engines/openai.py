"""The endpoint engine: many threads send requests to an OpenAI-compatible chat server.

A request that the server refuses rejects its own row. A wrong key or a credit that is used up ends the program for
good, after the requests under way have ended; a server that is away for longer than the patience of a request ends it
for a retry. Neither rejects a row. What a server would refuse of every request, `openai_trial` finds out before the run
asks for a GPU.
"""

import json
import queue
import threading
import time
from typing import Any

from cgd_stages.chat.messages import turn_markers
from cgd_stages.contract import Chat, Endpoint
from cgd_stages.engines.base import Completion, Refused, Reply, Request
from cgd_stages.engines.openai_server import (
    BUSY_HINT,
    ENDPOINT_HINT,
    OF_KEY_OR_ROW,
    PROBE_SECONDS,
    Failed,
    Patience,
    ping,
    post,
    refuse_if_permanent,
)
from cgd_stages.engines.openai_texts import completion_of, request_body, shows_special_tokens
from cgd_stages.errors import StageError, TransientError

PATIENT = Patience()


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
            self._hurry.set()  # what fails from now on is not sent again
        replies = [result for result in results if not isinstance(result, StageError)]
        self._tokens += sum(reply.tokens for reply in replies if isinstance(reply, Completion))
        return replies

    def end(self, error: StageError) -> None:
        self._failure = self._failure or error
        self._hurry.set()

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
        completion = completion_of(
            request,
            post(self._endpoint, body, self._patience.seconds(self._endpoint)),
            shows_special_tokens=shows_special_tokens(self._endpoint),
        )
        self._answered_at = time.monotonic()
        return completion

    def _refused(self, request: Request, failed: Failed) -> Refused | None:
        """The reply to a request that the server refuses for what it asks; None: it may be sent again. Raises UserError
        for a refusal of every request."""
        refuse_if_permanent(self._endpoint, failed)
        if not failed.is_verdict:
            return None
        # A moderated prompt, or a wrong key or model? A short request tells.
        if failed.status in OF_KEY_OR_ROW and not self._is_alive():
            return None
        return Refused(request.name, "endpoint", str(failed))

    def _is_alive(self) -> bool:
        """Whether the server answers a short request, for when no other request has shown it."""
        try:
            ping(self._endpoint, min(self._patience.timeout, PROBE_SECONDS))
        except TransientError:
            return False
        return not self._closed.is_set()

    def _last_try(self, request: Request, body: bytes) -> Reply:
        """Try once more, as the server may have just come back. If it fails again, the request is at fault, unless the
        server only says to come later."""
        try:
            return self._ask(request, body)
        except Failed as failed:
            refuse_if_permanent(self._endpoint, failed)
            tries = f"{failed} ({self._patience.tries + 1} tries)"
            if failed.is_later:
                message = f"the endpoint {self._endpoint.url} puts a request off again and again: {tries}"
                raise TransientError(message, hint=BUSY_HINT) from failed
            return Refused(request.name, "endpoint", tries)
