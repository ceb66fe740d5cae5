"""What the controllers of Kubeflow's kinds share: definitions, and the port where a job's pods meet."""

import zlib

from cgd_operator.kube.client import Object
from cgd_operator.kube.kinds import Kind

LOOSE: Object = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
_PORTS = range(27000, 32000)  # below what Linux hands out to clients, above those of `s3`


def port(job: Object) -> str:
    """The job's own port: all jobs are on one machine, and two must not meet."""
    return str(_PORTS[zlib.crc32(job["metadata"]["uid"].encode()) % len(_PORTS)])


def struct(required: list[str], **properties: Object) -> Object:
    return {"type": "object", "required": required, "properties": properties}


def definition(kind: Kind, spec: Object) -> Object:
    """A small structural schema: `spec` is checked, the status is taken as it comes."""
    group, _, version = kind.api_version.rpartition("/")
    served = {
        "name": version,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": struct(required=["spec"], spec=spec, status=LOOSE)},
        "subresources": {"status": {}},
        "additionalPrinterColumns": [
            {"name": "State", "type": "string", "jsonPath": ".status.conditions[-1].type"},
            {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
        ],
    }
    names = {"kind": kind.kind, "listKind": f"{kind.kind}List", "plural": kind.plural, "singular": kind.kind.lower()}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{group}"},
        "spec": {"group": group, "scope": "Namespaced", "names": names, "versions": [served]},
    }
