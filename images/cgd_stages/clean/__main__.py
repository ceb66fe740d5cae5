"""Delete what a run has stored, as `deletionPolicy: Delete` asks for.

    CGD_TASK='{...}' python -m cgd_stages.clean

Runs with the same inputs share a folder. So a folder is deleted only when no other run claims it; a deleted run whose
data stay keeps its claim. The marker of a folder is deleted first, so that nobody takes the rest for complete. The
claims are deleted last, so that the next attempt goes on where this one was interrupted.
"""

from cgd_stages.runtime.supervisor import supervise

if __name__ == "__main__":
    supervise()  # before the other imports: SIGTERM may come while they last

import logging
import time

from cgd_stages.contract import Clean, Rows, StageFacts
from cgd_stages.runtime.program import Context, run
from cgd_stages.store.folder import DONE, Folder

log = logging.getLogger(__name__)


def main(context: Context) -> dict[str, StageFacts]:
    context.work_of(Clean)
    clock, store = time.monotonic(), context.store
    claims = store.claims()
    claimed = claims.pop(store.run.uid, set())
    shared = claimed & set[Folder]().union(*claims.values())
    store.delete_pointers()
    objects = store.delete_logs()
    for folder in sorted(claimed - shared, key=lambda folder: folder.uri):
        keys = [stored.key for stored in folder.bucket.list(folder.key())]
        for key in (folder.key(DONE), *keys):
            folder.bucket.delete(key)
        log.info("%s: %d objects deleted", folder.uri, len(keys))
        objects += len(keys)
    for folder in claimed:
        store.withdraw(folder)
    log.info("%d folders deleted, %d stay because other runs use them", len(claimed - shared), len(shared))
    facts = StageFacts(
        rows=Rows(total=len(claimed), done=len(claimed - shared)),
        seconds=round(time.monotonic() - clock, 3),
        metrics={"folders": len(claimed - shared), "shared": len(shared), "objects": objects},
    )
    return {context.task.stage: facts}


if __name__ == "__main__":
    run(main)
