"""Sends CloudEvents to one address outside of the cluster."""

import asyncio
import json
import logging
import os
from dataclasses import dataclass
from typing import Any

import aiohttp

log = logging.getLogger(__name__)

PAUSES = (0.5, 2.0)
"""Seconds before another try."""
WITHIN_SECONDS = 10.0
"""For all tries together: the run's look waits for them."""


@dataclass(frozen=True)
class Webhook:
    """Where the ends of runs are told. Neither address nor authorization is ever logged: both may be keys."""

    url: str
    authorization: str = ""
    """The value of the header of that name; empty: none."""

    @classmethod
    def of_environment(cls) -> "Webhook | None":
        url = os.environ.get("CGD_WEBHOOK_URL", "")
        return cls(url, os.environ.get("CGD_WEBHOOK_AUTHORIZATION", "")) if url else None

    async def send(self, event: dict[str, Any]) -> bool:
        """Whether the receiver has taken the event. A receiver that is away, slow or refuses stops no run: after some
        tries the log says so."""
        headers = {"Content-Type": "application/cloudevents+json; charset=utf-8"}
        if self.authorization:
            headers["Authorization"] = self.authorization
        trouble = "no answer"
        try:
            async with (
                asyncio.timeout(WITHIN_SECONDS),
                aiohttp.ClientSession(headers=headers, trust_env=True) as session,
            ):
                for pause in (*PAUSES, None):
                    trouble, again = await self._try(session, json.dumps(event))
                    if not trouble:
                        return True
                    if not again or pause is None:
                        break
                    await asyncio.sleep(pause)
        except TimeoutError:
            trouble = f"{trouble}; it took more than {WITHIN_SECONDS:g} s"
        log.warning("the webhook was not told of %s: %s", event["id"], trouble)
        return False

    async def _try(self, session: aiohttp.ClientSession, body: str) -> tuple[str, bool]:
        """What went wrong, and whether another try may go better."""
        try:
            async with session.post(self.url, data=body, allow_redirects=False) as answer:
                code = answer.status
        except (aiohttp.ClientError, ValueError, OSError) as error:
            return type(error).__name__, not isinstance(error, aiohttp.InvalidURL | ValueError)
        return ("", False) if code < 300 else (f"HTTP {code}", code == 429 or code >= 500)
