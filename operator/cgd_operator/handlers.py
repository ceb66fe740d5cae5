"""The door: what Kopf calls. It says when to look at which run; everything else happens in `controller`.

Only an `on.event` handler is used: it puts no finalizer and no annotation on anything. `controller.queue` watches the
children: Kopf would read and remember every existing object, even with label selectors. 2,000 Jobs and pods took 43 MB,
by `initial_streaming` 74 MB; a thousand runs have up to 16,000 of them. A watch that lists nothing took less than 1 MB.
"""

from typing import Any

import kopf

from cgd_operator import metrics
from cgd_operator.api import GROUP, VERSION
from cgd_operator.controller.queue import Loop
from cgd_operator.facts.due import Due, due


class NoDiffs(kopf.DiffBaseStorage):
    """Kopf copies and compares every object of a watch, for handlers of changes. We have no such handlers."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        raise NotImplementedError  # Kopf stores only for handlers of changes: whoever adds such a handler needs this


@kopf.on.startup()
async def configure(settings: kopf.OperatorSettings, memo: kopf.Memo, **_: Any) -> None:
    settings.scanning.disabled = bool(memo.loop.namespaces)  # no rights on the whole cluster: no list of its namespaces
    settings.posting.enabled = False  # Events are our own: transitions, not log lines
    settings.persistence.diffbase_storage = NoDiffs()
    settings.networking.connect_timeout = 5
    settings.networking.request_timeout = 30
    settings.watching.connect_timeout = 5
    settings.watching.server_timeout = 240
    settings.watching.client_timeout = 300  # a watch that froze is opened anew


@kopf.on.cleanup()
async def let_go(memo: kopf.Memo, **_: Any) -> None:
    """Stop before Kopf looks for tasks that are left: it would wait five seconds for ours."""
    await memo.loop.stop()


@kopf.on.login()
def login(**everything: Any) -> kopf.ConnectionInfo | None:
    """The same credentials as `Cluster.connect` takes, without importing a second client for them."""
    return kopf.login_with_kubeconfig(**everything) or kopf.login_with_service_account(**everything)


@kopf.on.event(GROUP, VERSION, "cgdruns")
async def run_changed(body: kopf.Body, memo: kopf.Memo, **what: Any) -> None:
    """Look at the run at once if the user changed something. Our own writes of the status change nothing, and the sweep
    looks at the runs with which the watch begins."""
    loop: Loop = memo.loop
    metrics.LAST_EVENT.set_to_current_time()
    key, uid = (body.metadata["namespace"], body.metadata["name"]), body.metadata["uid"]
    if what["type"] == "DELETED":
        loop.gone(key, uid)
        return
    loop.there(key, uid)
    if what["type"]:  # none: the watch begins with it
        loop.changed(key)
    match due(dict(body), loop.clock.now()):
        case Due.NOTHING:
            loop.over(key, uid)
        case Due.TELLING | Due.ACTING:
            loop.poke(*key)
        case Due.CHILDREN:  # the events of its children say more
            pass
