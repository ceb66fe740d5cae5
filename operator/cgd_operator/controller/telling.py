"""Tells people what has become of a run: Events, and the status, once for each look and only when it says more."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cgd_operator.api.status import CGDRunStatus
from cgd_operator.facts.due import body_of, says_more
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import EVENT, RUN, AlreadyExists, ApiError

log = logging.getLogger(__name__)

Object = dict[str, Any]


@dataclass(frozen=True)
class Teller:
    cluster: Cluster

    async def tell(self, manifest: Object, status: CGDRunStatus, news: Iterable[Object]) -> bool:
        """Write the status if it says more, and nobody has changed the run since it was read: what was read may have
        been old already. Whether it said more. Events go first: their names make them safe to post again, and a status
        that was written is no reason for news any more."""
        if not says_more(status, manifest):
            return False
        await self.announce(news)
        meta = {key: manifest["metadata"][key] for key in ("namespace", "name", "uid", "resourceVersion")}
        try:
            applied = await self.cluster.apply(RUN, {"metadata": meta, "status": body_of(status)}, subresource="status")
            manifest["metadata"] = applied["metadata"]
        except ApiError as error:
            if error.status != 404:  # deleted meanwhile
                raise
        return True

    async def announce(self, bodies: Iterable[Object]) -> None:
        for body in bodies:
            try:
                await self.cluster.create(EVENT, body)
            except AlreadyExists:
                continue
            except ApiError as error:  # an Event is a courtesy: never the reason why a run stands still
                log.warning("event %s was not posted: %s", body["reason"], error)
