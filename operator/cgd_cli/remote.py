"""The cluster as the commands ask it."""

import base64
import os
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import yaml
from kubernetes.aio import config as kubeconfigs
from kubernetes.aio.config.config_exception import ConfigException

from cgd_operator.kube.client import Cluster, Object
from cgd_operator.kube.kinds import POD, RUN, SECRET, ApiError, equal, one_of
from cgd_operator.planning.dag import Run, storage_of
from cgd_operator.planning.manifests import STAGE_LABEL, UID_LABEL
from cgd_stages.contract import Storage
from cgd_stages.errors import UserError

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


class Remote:
    """A connection to the cluster of the kubeconfig, looking at one namespace."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace

    @classmethod
    async def connect(cls, namespace: str | None) -> Self:
        """Raises UserError when no kubeconfig names a cluster."""
        try:
            cluster = await Cluster.connect(manager="cgd")
            return cls(cluster, namespace or _context_namespace())
        except (ConfigException, OSError, ValueError, TypeError, yaml.YAMLError) as error:  # as the client reads it
            hint = "Let KUBECONFIG name a kubeconfig with a current context, as kubectl needs it."
            raise UserError(f"no cluster is configured: {error}", hint=hint) from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.cluster.close()

    async def run(self, name: str) -> Object:
        """The CGDRun. Raises ApiError (404) when there is none of that name, UserError when there is no such kind."""
        found = await self.cluster.get(RUN, name, self.namespace)
        if found is None:
            await self._require_kind()
            raise ApiError(404, "NotFound", f"there is no CGDRun {name} in namespace {self.namespace}")
        return found

    async def _require_kind(self) -> None:
        try:
            await self.cluster.list(RUN, self.namespace)
        except ApiError as error:
            if error.status != 404:
                raise
            raise UserError("the cluster knows no CGDRuns", hint="Install cgd-operator, as README.md says.") from error

    async def follow(self, name: str) -> AsyncIterator[Object]:
        """The run now and after every change, until it is deleted."""
        yield await self.run(name)
        async for event, item in self.cluster.watch(RUN, self.namespace, fields=equal("metadata.name", name)):
            if event == "DELETED":
                return
            if event != "SYNCED":
                yield item

    async def logs(self, run: Object, stage: str) -> list[tuple[str, str]]:
        """Name and log of every pod of a stage's child; of the child that the run is at when none is named."""
        status = run.get("status", {})
        wanted = stage or str(status.get("stage") or "")
        child = next((one.get("child") for one in status.get("stages", []) if one["name"] == wanted), None)
        pods, _ = await self.cluster.list(
            POD, self.namespace, labels=f"{one_of(UID_LABEL, [run['metadata']['uid']])},{STAGE_LABEL}"
        )
        mine = [pod for pod in pods if child and pod["metadata"]["name"].startswith(child)]
        if not mine:
            raise ApiError(404, "NotFound", f"stage {wanted or '(none)'} of {run['metadata']['name']} has no pods")
        names = sorted(pod["metadata"]["name"] for pod in mine)
        return [(name, await self.cluster.log(name, self.namespace)) for name in names]

    async def run_and_storage(self, name: str) -> tuple[Object, Storage]:
        """The run, and its object store; the environment has credentials for it afterwards, if the run has any."""
        run = await self.run(name)
        spec = Run.of(run).spec
        reference = spec.storage.credentials_secret_ref
        if reference and not os.environ.get(KEYS[0]):
            secret = await self.cluster.get(SECRET, reference.name, self.namespace)
            if secret is None:
                raise ApiError(404, "NotFound", f"there is no Secret {reference.name} in namespace {self.namespace}")
            held: dict[str, str] = secret.get("data", {})
            os.environ |= {key: base64.b64decode(held[key]).decode() for key in KEYS if key in held}
        # The path of the CA is that of the pods; here AWS_CA_BUNDLE says where it is.
        return run, storage_of(spec.storage).model_copy(update={"ca_bundle": None})


def _context_namespace() -> str:
    """That of the kubeconfig's context."""
    _, active = kubeconfigs.list_kube_config_contexts(os.environ.get("KUBECONFIG"))
    context: dict[str, Any] = active["context"]
    return str(context.get("namespace") or "default")
