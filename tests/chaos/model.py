"""A model for the interruption suite: an OpenAI-compatible server whose answer is a pure function of what it is asked.

It notes every answer and who asked, so that what is generated twice is counted here, and nowhere guessed.
"""

import asyncio
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from aiohttp import web

LATENCY = (0.02, 0.12)
"""Seconds for an answer: the least and the most."""


@dataclass(frozen=True)
class Answer:
    """One generation that ended: which pod had asked, and when it ended."""

    pod: str
    at: float


def reply(messages: Sequence[Any]) -> str:
    """What the model says to these messages."""
    mark = name(messages)
    return f"{mark} {' '.join(mark[:9])}\nConclusion: {'right' if mark[0] in '01234567' else 'wrong'}"


def name(messages: Sequence[Any]) -> str:
    """The same for the same messages: one row of one role."""
    return hashlib.sha256(json.dumps(list(messages), sort_keys=True).encode()).hexdigest()[:24]


class ModelServer:
    """`away` makes it drop every connection, as a server that crashed does; `failing` makes it answer 503."""

    def __init__(self, seed: int = 0) -> None:
        self.answers: dict[str, list[Answer]] = defaultdict(list)
        self.first_asked: dict[str, float] = {}
        """By pod: when its first request came."""
        self.asked = asyncio.Condition()
        self.away = self.failing = False
        self.faults = 0
        self.port = 0
        self._random = Random(seed)
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner:
            await self._runner.cleanup()

    async def first_request(self, pod: str) -> None:
        """Wait until the pod has asked something."""
        async with self.asked:
            await self.asked.wait_for(lambda: pod in self.first_asked)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        messages = (await request.json())["messages"]
        pod = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if pod not in self.first_asked:
            async with self.asked:
                self.first_asked[pod] = time.monotonic()
                self.asked.notify_all()
        await asyncio.sleep(self._random.uniform(*LATENCY))
        if self.away or self.failing:
            self.faults += 1
            if self.away and request.transport:
                request.transport.abort()
            return web.Response(status=503, text="overloaded")
        self.answers[name(messages)].append(Answer(pod, time.monotonic()))
        text = reply(messages)
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": len(str(messages)) // 4, "completion_tokens": len(text) // 4}
        return web.json_response({"choices": [choice], "usage": usage})
