"""What every pod of a run gets beside what the run needs: variables, volumes, pull secrets, and a cache of models."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator

from cgd_operator.api.fields import VARIANT, KeyRef, NameRef, Text, rules
from cgd_stages.contract import Contract, Name

OURS = (
    "^(CGD_.*|PET_.*|KUBEFLOW_TRAINER_.*|HOME|TMPDIR|HF_TOKEN|"
    "AWS_ACCESS_KEY_ID|AWS_SECRET_ACCESS_KEY|AWS_SESSION_TOKEN)$"
)
OURS_MEND = (
    "the run sets this variable itself (keys: storage.credentialsSecretRef; the hub's token: hubTokenSecretRef): "
    "leave it out"
)
PLACED = "^/[A-Za-z0-9._/-]*$"
NO_DOTS = "/(/|[.][.]?(/|$))"
TAKEN = "^/(scratch|tmp|models|dev|proc|sys|etc|opt|usr|lib|bin)?(/|$)"
TAKEN_MEND = "the image or the run has something there: mount it elsewhere, such as below /data or /mnt"
DOTS_MEND = "take //, . and .. out of the path"
PATH_MEND = "write an absolute path of letters, digits, dots, hyphens and slashes"

HostDirectory = Annotated[str, Field(max_length=255), Text(PLACED, PATH_MEND), Text(NO_DOTS, DOTS_MEND, absent=True)]
MountPath = Annotated[HostDirectory, Text(TAKEN, TAKEN_MEND, absent=True)]


class ValueFrom(Contract):
    """Where a variable has its value from."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "has(self.secretKeyRef) != has(self.configMapKeyRef)",
                "set exactly one of secretKeyRef and configMapKeyRef",
            )
        )
    )

    secret_key_ref: KeyRef | None = None
    config_map_key_ref: KeyRef | None = None

    @model_validator(mode="after")
    def _one_place(self) -> "ValueFrom":
        if (self.secret_key_ref is None) == (self.config_map_key_ref is None):
            raise ValueError("set exactly one of secretKeyRef and configMapKeyRef")
        return self


class Variable(Contract):
    """An environment variable, with its value or with the place that has it."""

    model_config = ConfigDict(
        json_schema_extra=rules(("has(self.value) != has(self.valueFrom)", "set exactly one of value and valueFrom"))
    )

    name: Annotated[str, Field(max_length=253, pattern="^[A-Za-z_][A-Za-z0-9_]*$"), Text(OURS, OURS_MEND, absent=True)]
    value: Annotated[str, Field(max_length=4096)] | None = Field(None, description="Taken as it stands: no $(NAME).")
    value_from: ValueFrom | None = None

    @model_validator(mode="after")
    def _one_value(self) -> "Variable":
        if (self.value is None) == (self.value_from is None):
            raise ValueError("set exactly one of value and valueFrom")
        return self


class Claim(Contract):
    """A PersistentVolumeClaim in the run's namespace."""

    claim_name: Name


class SecretFiles(Contract):
    """A Secret, each key a file."""

    secret_name: Name


class HostPath(Contract):
    """A folder of the node. Namespaces that enforce Pod Security `baseline` or `restricted` refuse it."""

    path: HostDirectory


def _one_of(*fields: str) -> tuple[str, str]:
    """A rule that one of the fields is there, and no other."""
    there = " + ".join(f"(has(self.{field}) ? 1 : 0)" for field in fields)
    return f"{there} == 1", f"set exactly one of {', '.join(fields)}"


VOLUME_RULE = _one_of("persistentVolumeClaim", "configMap", "secret", "hostPath")


class Volume(Contract):
    """A volume and where it is mounted, read-only unless it says otherwise. The fields are those of Kubernetes."""

    model_config = ConfigDict(json_schema_extra=rules(VOLUME_RULE))

    name: Annotated[str, Field(max_length=40, pattern=VARIANT)]
    mount_path: MountPath
    read_only: bool = True
    persistent_volume_claim: Claim | None = None
    config_map: NameRef | None = None
    secret: SecretFiles | None = None
    host_path: HostPath | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "Volume":
        if sum(one is not None for one in self._sources) != 1:
            raise ValueError(VOLUME_RULE[1])
        return self

    @property
    def _sources(self) -> tuple[Contract | None, ...]:
        return self.persistent_volume_claim, self.config_map, self.secret, self.host_path

    def source(self) -> dict[str, Any]:
        """The volume's source, as a PodSpec has it."""
        return self.model_dump(by_alias=True, exclude_none=True, exclude={"name", "mount_path", "read_only"})


class Pods(Contract):
    """What every pod of the run gets: a proxy, the hub's address, settings of NCCL, drivers, more data."""

    env: tuple[Variable, ...] = Field(
        (),
        max_length=64,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        description="Environment variables, such as HTTPS_PROXY, NO_PROXY, HF_ENDPOINT, NCCL_SOCKET_IFNAME.",
    )
    volumes: tuple[Volume, ...] = Field(
        (),
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    image_pull_secrets: tuple[NameRef, ...] = Field(
        (),
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        description="Secrets for the registry of the images, beside those of the ServiceAccount.",
    )


CACHE_RULE = _one_of("persistentVolumeClaim", "hostPath")


class ModelCache(Contract):
    """Where the models of the hub and of S3 are kept on the cluster. The stage `fetch` fills it on a CPU; the pods with
    GPUs mount it read-only and load from it."""

    model_config = ConfigDict(json_schema_extra=rules(CACHE_RULE))

    persistent_volume_claim: Claim | None = Field(
        None, description="A claim that is there, and that the nodes of all pools can mount: ReadWriteMany."
    )
    host_path: HostPath | None = Field(
        None,
        description="A folder that every node has, such as a shared file system. On a node that has not the model the "
        "pod downloads it, as without a cache.",
    )

    @model_validator(mode="after")
    def _one_place(self) -> "ModelCache":
        if (self.persistent_volume_claim is None) == (self.host_path is None):
            raise ValueError(CACHE_RULE[1])
        return self

    def source(self) -> dict[str, Any]:
        """The volume's source, as a PodSpec has it."""
        return self.model_dump(by_alias=True, exclude_none=True)
