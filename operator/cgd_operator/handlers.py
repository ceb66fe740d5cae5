"""The doors: what Kopf calls. Each says when to look at which run; everything else happens in `reconcile`.

Only `on.event` handlers are used: they put no finalizer and no annotation on anything. The objects that a watch begins
with have no event type; they ask for a sweep, which looks at all of them together.
"""

from typing import Any

import kopf

from cgd_operator import metrics
from cgd_operator.api import GROUP, VERSION
from cgd_operator.loop import Loop
from cgd_operator.manifests import MANAGED_BY, MANAGER, RUN_LABEL
from cgd_operator.observe import has_ended

OURS: dict[str, Any] = {MANAGED_BY: MANAGER, RUN_LABEL: kopf.PRESENT}


@kopf.on.startup()
async def configure(settings: kopf.OperatorSettings, **_: Any) -> None:
    settings.posting.enabled = False  # Events are our own: transitions, not log lines
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
async def run_changed(event: kopf.RawEvent, body: kopf.Body, memo: kopf.Memo, **_: Any) -> None:
    """At once if the user changed something; our own writes of the status are no news."""
    unseen = body.get("status", {}).get("observedGeneration", 0) != body.metadata["generation"]
    if event["type"] is None or unseen or "deletionTimestamp" in body.metadata:
        _look(memo, event, body.metadata["name"], at_once=True)


@kopf.on.event("batch", "v1", "jobs", labels=OURS)
@kopf.on.event("kubeflow.org", "v1", "pytorchjobs", labels=OURS)
@kopf.on.event("trainer.kubeflow.org", "v1alpha1", "trainjobs", labels=OURS)
async def child_changed(event: kopf.RawEvent, body: kopf.Body, memo: kopf.Memo, **_: Any) -> None:
    over = event["type"] == "DELETED" or has_ended(body)
    _look(memo, event, body.metadata["labels"][RUN_LABEL], at_once=over)


@kopf.on.event("", "v1", "pods", labels=OURS)
async def pod_changed(event: kopf.RawEvent, body: kopf.Body, memo: kopf.Memo, **_: Any) -> None:
    _look(memo, event, body.metadata["labels"][RUN_LABEL], at_once=False)


def _look(memo: kopf.Memo, event: kopf.RawEvent, name: str, *, at_once: bool) -> None:
    loop: Loop = memo.loop
    metrics.LAST_EVENT.set_to_current_time()
    namespace = event["object"]["metadata"]["namespace"]
    if event["type"] is None:
        loop.sweep_soon()
    elif at_once:
        loop.poke(namespace, name)
    else:
        loop.soon(namespace, name)
