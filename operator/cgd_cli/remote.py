"""What the commands ask the cluster for."""

import base64
import os
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import yaml
from kubernetes.aio import config as kubeconfigs
from kubernetes.aio.config.config_exception import ConfigException

from cgd_cli.terminal import likely
from cgd_cli.view import command
from cgd_operator.kube.client import Cluster, Object
from cgd_operator.kube.kinds import JOB, POD, PYTORCHJOB, RUN, SECRET, TRAINJOB, ApiError, equal, one_of
from cgd_operator.planning.dag import Run
from cgd_operator.planning.manifests import CONTAINERS, STAGE_LABEL, UID_LABEL
from cgd_operator.planning.tasks import storage_of
from cgd_stages.contract import Storage
from cgd_stages.errors import UserError

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


class Remote:
    """A connection to the cluster of the kubeconfig, for one namespace of it."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace

    @classmethod
    async def connect(cls, namespace: str | None) -> Self:
        """Raises UserError when no kubeconfig names a cluster."""
        hint = "Let KUBECONFIG name a kubeconfig with a current context, as kubectl needs it."
        named = os.environ.get("KUBECONFIG", "")
        if named and not any(map(os.path.exists, named.split(os.pathsep))):
            raise UserError(f"no cluster is configured: KUBECONFIG names {named}, which is not there", hint=hint)
        try:
            cluster = await Cluster.connect(manager="cgd")
            if not namespace:
                _, active = kubeconfigs.list_kube_config_contexts(os.environ.get("KUBECONFIG"))
                namespace = str(active["context"].get("namespace") or "default")
            return cls(cluster, namespace)
        except (ConfigException, OSError, ValueError, TypeError, yaml.YAMLError) as error:  # what the client raises
            raise UserError(f"no cluster is configured: {error}", hint=hint) from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.cluster.close()

    async def run(self, name: str) -> Object:
        """The CGDRun. Raises ApiError (404) if no CGDRun has this name, UserError if the cluster lacks the kind."""
        if run := await self.cluster.get(RUN, name, self.namespace):
            return run
        try:
            runs, _ = await self.cluster.list(RUN, self.namespace)
        except ApiError as error:
            if error.status != 404:
                raise
            raise UserError("the cluster knows no CGDRuns", hint="Install cgd-operator, as README.md says.") from error
        hint = likely(name, [run["metadata"]["name"] for run in runs]) if runs else "It has none: name another with -n."
        raise UserError(f"there is no CGDRun {name} in namespace {self.namespace}", hint=hint)

    async def follow(self, name: str) -> AsyncIterator[Object]:
        """The run now and after every change, until it is deleted."""
        yield await self.run(name)
        async for event, item in self.cluster.watch(RUN, self.namespace, fields=equal("metadata.name", name)):
            if event == "DELETED":
                return
            if event != "SYNCED":
                yield item

    async def runs(self, *, everywhere: bool) -> list[Object]:
        """All CGDRuns of the namespace, or of all namespaces, by namespace and name."""
        runs, _ = await self.cluster.list(RUN, None if everywhere else self.namespace)
        return sorted(runs, key=lambda run: (run["metadata"]["namespace"], run["metadata"]["name"]))

    async def suspend(self, name: str, *, suspended: bool) -> None:
        """Suspend a run, or let it go on. Raises UserError if it has ended or is in that state already."""
        run = await self.run(name)
        if (state := run.get("status", {}).get("state")) in {"Succeeded", "Failed"}:
            raise UserError(f"{name} has ended: {state}")
        if bool(run["spec"].get("suspend")) == suspended:
            raise UserError(f"{name} is {'suspended already' if suspended else 'not suspended'}")
        await self.cluster.patch(RUN, name, self.namespace, {"spec": {"suspend": suspended}})

    async def retry(self, name: str) -> list[str]:
        """Delete the children of the failed stages, so that the operator makes them anew; the stages. Raises UserError
        if no stage has failed."""
        run = await self.run(name)
        failed = [stage for stage in run.get("status", {}).get("stages", []) if stage.get("state") == "Failed"]
        if not failed:
            raise UserError(f"no stage of {name} has failed", hint="Its stages: " + command("status", name))
        for child in {stage["child"] for stage in failed if stage.get("child")}:
            for kind in (JOB, PYTORCHJOB, TRAINJOB):
                if item := await self.cluster.get(kind, child, self.namespace):
                    await self.cluster.delete(kind, child, self.namespace, uid=item["metadata"]["uid"])
        return [stage["name"] for stage in failed]

    async def logs(self, run: Object, stage: str) -> list[tuple[str, str]]:
        """Name and log of every pod of a stage; of the run's current stage if `stage` is empty."""
        stage = stage or str(run.get("status", {}).get("stage") or "")
        if not stage or not (pods := await self.pods(run, stage)):
            name = run["metadata"]["name"]
            raise UserError(f"stage {stage or '(none)'} of {name} has no pods", hint=f"See {command('status', name)}.")
        names = {pod["metadata"]["name"]: container_of(pod) for pod in pods}
        return [(name, await self.cluster.log(name, self.namespace, container=names[name])) for name in sorted(names)]

    async def last_lines(self, run: Object, lines: int) -> tuple[str, str]:
        """The newest pod of the run's current stage that has begun, and the last lines of its log. Raises UserError if
        there is none."""
        stage = str(run.get("status", {}).get("stage") or "")
        pods = await self.pods(run, stage) if stage else []
        begun = [pod for pod in pods if pod.get("status", {}).get("phase", "Pending") != "Pending"]
        if not begun:
            raise UserError(f"No pod of {stage} has begun, or it is deleted." if stage else "No stage is under way.")
        newest = max(begun, key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))
        name = newest["metadata"]["name"]
        return name, await self.cluster.log(name, self.namespace, container=container_of(newest), last=lines)

    async def pods(self, run: Object, stage: str) -> list[Object]:
        """The pods of a stage, or of all stages if `stage` is empty. Raises UserError for a stage that the run does not
        have."""
        children = {entry["name"]: entry.get("child") for entry in run.get("status", {}).get("stages", [])}
        if stage and stage not in children:
            raise UserError(f"{run['metadata']['name']} has no stage {stage}", hint=likely(stage, list(children)))
        labels = f"{one_of(UID_LABEL, [run['metadata']['uid']])},{STAGE_LABEL}"
        pods, _ = await self.cluster.list(POD, self.namespace, labels=labels)
        wanted = {child for name, child in children.items() if child and stage in ("", name)}
        return [pod for pod in pods if any(pod["metadata"]["name"].startswith(child) for child in wanted)]

    async def run_and_storage(self, name: str) -> tuple[Object, Storage]:
        """The run and its object store. Puts the credentials of the run's Secret, if it names one, into the
        environment, unless that holds some already."""
        run = await self.run(name)
        spec = Run.of(run).spec
        reference = spec.storage.credentials_secret_ref
        if reference and not os.environ.get(KEYS[0]):
            secret = await self.cluster.get(SECRET, reference.name, self.namespace)
            if secret is None:
                raise ApiError(404, "NotFound", f"there is no Secret {reference.name} in namespace {self.namespace}")
            data: dict[str, str] = secret.get("data", {})
            os.environ |= {key: base64.b64decode(data[key]).decode() for key in KEYS if key in data}
        # The path of the CA is one in the pods; here AWS_CA_BUNDLE names the file.
        return run, storage_of(spec.storage).model_copy(update={"ca_bundle": None})


def container_of(pod: Object) -> str:
    """The container of our program in a pod, whatever others have added."""
    names = [str(container["name"]) for container in pod["spec"]["containers"]]
    return next((name for name in names if name in CONTAINERS.values()), names[0])
