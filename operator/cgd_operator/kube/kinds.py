"""The kinds of objects that the operator knows, their paths and names, the labels by which it finds them, and the
errors of an API server. Pure."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote

_WORD = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_LABEL = re.compile(_WORD)
_SUBDOMAIN = re.compile(rf"{_WORD}(\.{_WORD})*")
_UID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_SELECTED = re.compile("([A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?)?")


class ApiError(Exception):
    """The API server refused a request; `status` is the HTTP code, 0 without an answer that can be trusted."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}" if status else f"{reason}: {message}")
        self.status, self.reason, self.message = status, reason, message


class AlreadyExists(ApiError):
    """An object of that name exists already: for deterministic names, the same as success."""


class Gone(ApiError):
    """The watch's version is too old: list again."""


class InvalidName(ApiError):
    """No request was sent: the given text cannot be in a path or a selector."""

    def __init__(self, what: str, given: str) -> None:
        super().__init__(400, "InvalidName", f"{given!r} cannot be {what} in Kubernetes: correct it")


def is_label(text: str) -> bool:
    """Whether it can be the name of a namespace or of a stage: a DNS label."""
    return len(text) <= 63 and _LABEL.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Whether it can be the name of an object: a DNS subdomain."""
    return len(text) <= 253 and _SUBDOMAIN.fullmatch(text) is not None


def is_uid(text: str) -> bool:
    return _UID.fullmatch(text) is not None


@dataclass(frozen=True)
class Kind:
    api_version: str
    kind: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str = "") -> str:
        """The path of the kind's objects in all namespaces or in one, of one object, or of a part of it. Every request
        takes its path from here.

        Raises:
            InvalidName: no namespace or object can have this name; such a path might lead elsewhere.
        """
        parts = ["apis" if "/" in self.api_version else "api", *self.api_version.split("/")]
        if self.namespaced and namespace is not None:
            if not is_label(namespace):
                raise InvalidName("the name of a namespace", namespace)
            parts += ["namespaces", namespace]
        parts.append(self.plural)
        if name is not None:
            if not is_name(name):
                raise InvalidName(f"the name of a {self.kind}", name)
            parts += [name, *filter(None, [subresource])]
        return "".join(f"/{quote(part, safe='')}" for part in parts)


def equal(field: str, value: str) -> str:
    """A field selector.

    Raises:
        InvalidName: the value would be read as more than a value.
    """
    return f"{field}={_selected(value)}"


def one_of(label: str, values: Iterable[str]) -> str:
    """A label selector.

    Raises:
        InvalidName: a value would be read as more than a value.
    """
    return f"{label} in ({','.join(map(_selected, values))})"


def _selected(value: str) -> str:
    if len(value) > 253 or not _SELECTED.fullmatch(value):
        raise InvalidName("a value in a selector", value)
    return value


RUN = Kind("cgd.dev/v1alpha1", "CGDRun", "cgdruns")
JOB = Kind("batch/v1", "Job", "jobs")
PYTORCHJOB = Kind("kubeflow.org/v1", "PyTorchJob", "pytorchjobs")
TRAINJOB = Kind("trainer.kubeflow.org/v1alpha1", "TrainJob", "trainjobs")
TRAININGRUNTIME = Kind("trainer.kubeflow.org/v1alpha1", "TrainingRuntime", "trainingruntimes")
WORKLOADS = tuple(Kind(f"kueue.x-k8s.io/{version}", "Workload", "workloads") for version in ("v1beta2", "v1beta1"))
"""Kueue serves the first since 0.15, and the other until 0.19: what the operator reads and writes is alike in both."""
POD = Kind("v1", "Pod", "pods")
EVENT = Kind("v1", "Event", "events")
LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")
NODE = Kind("v1", "Node", "nodes", namespaced=False)
NAMESPACE = Kind("v1", "Namespace", "namespaces", namespaced=False)
SECRET = Kind("v1", "Secret", "secrets")
CONFIGMAP = Kind("v1", "ConfigMap", "configmaps")
CRD = Kind("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions", namespaced=False)

QUEUE_LABEL, PRIORITY_LABEL = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
QUEUE_LABELS = (QUEUE_LABEL, PRIORITY_LABEL)
"""Labels of a run that every child gets."""
JOB_UID_LABEL = "kueue.x-k8s.io/job-uid"
"""Label of a Workload: the uid of the child that it stands for."""
SUSPENDED_BY_RUN = "cgd.dev/suspended-by-run"
"""Annotation on what the operator suspended, a child or its Workload: only that is resumed by it."""
