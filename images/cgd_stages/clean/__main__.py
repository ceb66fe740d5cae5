"""Delete what a run has stored, as `deletionPolicy: Delete` asks for.

    CGD_TASK='{...}' python -m cgd_stages.clean

Folders are shared: runs with the same inputs use the same one. So a folder goes only when no other run claims it, also
none that is gone and whose data were to stay. The promise of a folder goes first: nobody can take the rest for whole.
The claims go last: an interrupted attempt is made again.
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
    own = claims.pop(store.run.uid, set())
    shared = own & set[Folder]().union(*claims.values())
    store.delete_pointers()
    objects = sum(_delete(folder) for folder in sorted(own - shared, key=lambda folder: folder.uri))
    for folder in own:
        store.withdraw(folder)
    log.info("%d folders deleted, %d stay because other runs use them", len(own - shared), len(shared))
    facts = StageFacts(
        rows=Rows(total=len(own), done=len(own - shared)),
        seconds=round(time.monotonic() - clock, 3),
        metrics={"folders": len(own - shared), "shared": len(shared), "objects": objects},
    )
    return {context.task.stage: facts}


def _delete(folder: Folder) -> int:
    """Delete a folder; its number of objects."""
    keys = [stored.key for stored in folder.bucket.list(folder.key())]
    folder.bucket.delete(folder.key(DONE))
    for key in keys:
        folder.bucket.delete(key)
    log.info("%s: %d objects deleted", folder.uri, len(keys))
    return len(keys)


if __name__ == "__main__":
    run(main)
