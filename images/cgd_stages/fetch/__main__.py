"""Keep the run's models in the cluster's cache (`spec.modelCache`), whole, before pods with GPUs load them.

    CGD_TASK='{...}' python -m cgd_stages.fetch

It runs on a CPU after `prepare`, at the revisions that prepare has found. A model that is there is not fetched again,
so runs share what they have in common; an interrupted download goes on where it stopped. It stores nothing in S3.
"""

from cgd_stages.runtime.supervisor import supervise

if __name__ == "__main__":
    supervise()  # before the other imports: SIGTERM may come while they last

import logging
import time

from cgd_stages.contract import Fetch, StageFacts
from cgd_stages.models import resolve
from cgd_stages.runtime.program import Context, run

log = logging.getLogger(__name__)


def main(context: Context) -> dict[str, StageFacts]:
    work, clock, size = context.work_of(Fetch), time.monotonic(), 0
    for model in work.models:
        folder = resolve.keep(resolve.pinned(model, context.store), context.store)
        stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        log.info("%s: %.1f GB in %s", model.name, stored / 1e9, folder)
        size += stored
    facts = StageFacts(
        seconds=round(time.monotonic() - clock, 3),
        metrics={"models": float(len(work.models)), "bytes": float(size)},
    )
    return {context.task.stage: facts}


if __name__ == "__main__":
    run(main)
