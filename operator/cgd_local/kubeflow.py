"""What the controllers of Kubeflow's kinds share: CRDs, and the port at which a job's pods meet."""

import zlib

from cgd_operator.kube.client import Object
from cgd_operator.kube.kinds import Kind

LOOSE: Object = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
_PORTS = range(27000, 32000)  # below the ports that Linux gives to clients, above those of `s3`


def port(job: Object) -> str:
    """The job's own port: all jobs run on one machine and must not share a port."""
    return str(_PORTS[zlib.crc32(job["metadata"]["uid"].encode()) % len(_PORTS)])


def struct(required: list[str], **properties: Object) -> Object:
    return {"type": "object", "required": required, "properties": properties}


def definition(kind: Kind, spec: Object) -> Object:
    """A CRD with a small structural schema, which checks `spec` and accepts any status."""
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
