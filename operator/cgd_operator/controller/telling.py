"""Writes Events and the status of a run: once per reconcile, and only when they say something new."""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cgd_operator.api.status import CGDRunStatus
from cgd_operator.facts.due import body_of, says_more
from cgd_operator.kube.client import Cluster
from cgd_operator.kube.kinds import EVENT, RUN, AlreadyExists, ApiError

log = logging.getLogger(__name__)

Object = dict[str, Any]

OLD_DEFINITION = (
    "the CGDRun definition is not the one of this release, so no status can be written: "
    "kubectl apply --server-side --force-conflicts -f crds/"
)


@dataclass(frozen=True)
class Teller:
    cluster: Cluster

    async def tell(self, manifest: Object, status: CGDRunStatus, news: Iterable[Object]) -> bool:
        """Write the status if it says something new, on the condition that nobody has changed the run since it was
        read. Returns whether it said something new. Events are posted first: their names make posting twice harmless,
        and after the status is written the same Events would not be due again."""
        if not says_more(status, manifest):
            return False
        await self.announce(news)
        meta = {key: manifest["metadata"][key] for key in ("namespace", "name", "uid", "resourceVersion")}
        try:
            applied = await self.cluster.apply(RUN, {"metadata": meta, "status": body_of(status)}, subresource="status")
            manifest["metadata"] = applied["metadata"]
        except ApiError as error:
            if error.status == 404 and f'"{meta["name"]}" not found' in error.message:  # deleted meanwhile
                return True
            if error.status == 404 or re.search("not declared in schema|unknown field", error.message):
                raise ApiError(error.status, error.reason, f"{error.message}; {OLD_DEFINITION}") from error
            raise
        return True

    async def announce(self, bodies: Iterable[Object]) -> None:
        for body in bodies:
            try:
                await self.cluster.create(EVENT, body)
            except AlreadyExists:
                continue
            except ApiError as error:  # a missing Event must never stop a run
                log.warning("event %s was not posted: %s", body["reason"], error)
