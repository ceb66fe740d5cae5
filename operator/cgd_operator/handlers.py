"""The doors: what Kopf calls. Each says "look at this run"; everything else happens in `reconcile`.

Only `on.event` handlers are used: they put no finalizer and no annotation on anything.
"""

from typing import Any

import kopf

from cgd_operator import metrics
from cgd_operator.api import GROUP, VERSION
from cgd_operator.manifests import MANAGED_BY, MANAGER, RUN_LABEL
from cgd_operator.reconcile import Reconciler

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
    await memo.reconciler.stop()


@kopf.on.login()
def login(**everything: Any) -> kopf.ConnectionInfo | None:
    """The same credentials as `Cluster.connect` takes, without importing a second client for them."""
    return kopf.login_with_kubeconfig(**everything) or kopf.login_with_service_account(**everything)


@kopf.on.event(GROUP, VERSION, "cgdruns")
async def run_changed(namespace: str | None, name: str | None, memo: kopf.Memo, **_: Any) -> None:
    _poke(memo, namespace, name)


@kopf.on.event("batch", "v1", "jobs", labels=OURS)
@kopf.on.event("kubeflow.org", "v1", "pytorchjobs", labels=OURS)
@kopf.on.event("trainer.kubeflow.org", "v1alpha1", "trainjobs", labels=OURS)
@kopf.on.event("", "v1", "pods", labels=OURS)
async def child_changed(namespace: str | None, labels: kopf.Labels, memo: kopf.Memo, **_: Any) -> None:
    _poke(memo, namespace, labels[RUN_LABEL])


def _poke(memo: kopf.Memo, namespace: str | None, name: str | None) -> None:
    reconciler: Reconciler = memo.reconciler
    if namespace and name:
        metrics.LAST_EVENT.set_to_current_time()
        reconciler.poke(namespace, name)
