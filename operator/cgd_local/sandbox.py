"""What a container finds when it starts: its volumes, its environment, its command line.

**The local deviation.** There are no mounts and no image: a container is a process of this machine. Each volume is a
folder below the pod's own folder, and every environment value, command word or argument that *is* a mount path or lies
under one is rewritten to the real folder (also after the `=` of `--option=/path`). The same holds for
`terminationMessagePath`. Paths inside files, inside longer texts such as JSON, or compiled into programs are not
rewritten: pass them by environment or argument. A literal environment value equal to the name of a pod of the
namespace becomes 127.0.0.1, because no DNS answers for it.
"""

import base64
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cgd_operator.cluster import CONFIGMAP, SECRET, Cluster, Kind, Object

TERMINATION_LOG = "/dev/termination-log"
SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


class NotReady(Exception):
    """Something the pod refers to is not there (yet); the message is the kubelet's."""


@dataclass(frozen=True)
class Mount:
    path: str
    folder: Path


class Sandbox:
    """One pod's folder on this machine."""

    def __init__(self, cluster: Cluster, pod: Object, folder: Path, is_pod_name: Callable[[str], bool]) -> None:
        self._cluster = cluster
        self._pod = pod
        self._namespace: str = pod["metadata"]["namespace"]
        self._is_pod_name = is_pod_name
        self.folder = folder

    async def mount(self) -> None:
        """Make and fill every volume; raises NotReady with the kubelet's message for the first that cannot be."""
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        for volume in self._volumes():
            try:
                await self._fill(volume)
            except NotReady as error:
                raise NotReady(f'MountVolume.SetUp failed for volume "{volume["name"]}" : {error}') from error

    def overfull(self) -> str | None:
        """The kubelet's message for an emptyDir that outgrew its limit."""
        for volume in self._volumes():
            limit = (volume.get("emptyDir") or {}).get("sizeLimit")
            if limit is not None and usage(self._folder(volume)) > quantity(str(limit)):
                return f'Usage of EmptyDir volume "{volume["name"]}" exceeds the limit "{limit}". '
        return None

    def own(self, container: str) -> Path:
        """The folder with what belongs to one container: its logs and its termination message."""
        folder = self.folder / "containers" / container
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def termination_file(self, container: Object) -> Path:
        return self.own(container["name"]) / "termination-log"

    def command(self, container: Object, env: dict[str, str]) -> list[str]:
        words = [*(container.get("command") or []), *(container.get("args") or [])]
        mounts = self._mounts(container)
        return [_rewrite_word(expand(str(word), env), mounts) for word in words]

    def working_folder(self, container: Object) -> Path:
        wanted = container.get("workingDir") or "/"
        real = rewrite(wanted, self._mounts(container))
        folder = Path(real) if real != wanted else self.folder / "root" / wanted.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    async def environment(self, container: Object, image: dict[str, str]) -> dict[str, str]:
        """The image's environment, then `envFrom`, then `env`; later entries win and may use `$(EARLIER)`."""
        hostname = self._pod["spec"].get("hostname") or self._pod["metadata"]["name"]
        env = {"HOSTNAME": hostname, "HOME": str(self.folder), "TMPDIR": str(self.folder / "tmp")} | image
        mounts = self._mounts(container)
        for source in container.get("envFrom") or []:
            env |= await self._env_from(source)
        for entry in container.get("env") or []:
            if "valueFrom" in entry:
                value = await self._value_from(entry["valueFrom"])
            else:
                value = self._resolve_name(expand(str(entry.get("value") or ""), env))
            if value is not None:
                env[entry["name"]] = rewrite(value, mounts)
        return env

    def _resolve_name(self, value: str) -> str:
        return "127.0.0.1" if self._is_pod_name(value) else value

    async def _env_from(self, source: Object) -> dict[str, str]:
        kind, ref = (SECRET, source["secretRef"]) if "secretRef" in source else (CONFIGMAP, source["configMapRef"])
        data = await self._data(kind, ref["name"], optional=bool(ref.get("optional")))
        return {source.get("prefix", "") + key: value.decode() for key, value in data.items()}

    async def _value_from(self, source: Object) -> str | None:
        if "fieldRef" in source:
            return field(self._pod, source["fieldRef"]["fieldPath"])
        for name, kind in (("secretKeyRef", SECRET), ("configMapKeyRef", CONFIGMAP)):
            if name in source:
                ref = source[name]
                data = await self._data(kind, ref["name"], optional=bool(ref.get("optional")))
                if ref["key"] in data:
                    return data[ref["key"]].decode()
                if ref.get("optional"):
                    return None
                raise NotReady(f"couldn't find key {ref['key']} in {kind.kind} {self._namespace}/{ref['name']}")
        raise NotReady(f"environment source {', '.join(source)} is not supported by the local node")

    async def _data(self, kind: Kind, name: str, *, optional: bool) -> dict[str, bytes]:
        item = await self._cluster.get(kind, name, self._namespace)
        if item is None:
            if optional:
                return {}
            raise NotReady(f'{kind.kind.lower()} "{name}" not found')
        binary = item.get("data") if kind is SECRET else item.get("binaryData")
        text = {} if kind is SECRET else item.get("data")
        decoded = {key: base64.b64decode(value) for key, value in (binary or {}).items()}
        return decoded | {key: value.encode() for key, value in (text or {}).items()}

    def _volumes(self) -> list[Object]:
        return self._pod["spec"].get("volumes") or []

    def _folder(self, volume: Object) -> Path:
        if "hostPath" in volume:
            return Path(volume["hostPath"]["path"])
        return self.folder / "volumes" / str(volume["name"])

    def _mounts(self, container: Object) -> list[Mount]:
        """Where this container's mount paths really are, the longest first."""
        volumes = {volume["name"]: volume for volume in self._volumes()}
        mounts = [Mount(container.get("terminationMessagePath", TERMINATION_LOG), self.termination_file(container))]
        for entry in container.get("volumeMounts") or []:
            folder = self._folder(volumes[entry["name"]])
            mounts.append(Mount(entry["mountPath"].rstrip("/"), folder / entry.get("subPath", "")))
        return sorted(mounts, key=lambda mount: -len(mount.path))

    async def _fill(self, volume: Object) -> None:
        if "hostPath" in volume:
            return
        folder = self._folder(volume)
        folder.mkdir(parents=True, exist_ok=True)
        if "emptyDir" in volume:
            return
        for source in _sources(volume):
            for path, content in (await self._files(source)).items():
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)

    async def _files(self, source: Object) -> dict[str, bytes]:
        for name, kind in (("secret", SECRET), ("configMap", CONFIGMAP)):
            if name in source:
                ref = source[name]
                optional = bool(ref.get("optional"))
                data = await self._data(kind, ref.get("secretName") or ref["name"], optional=optional)
                items = ref.get("items") or [{"key": key, "path": key} for key in data]
                absent = [item["key"] for item in items if item["key"] not in data]
                if absent and not optional:
                    raise NotReady(
                        f"references non-existent {'secret' if kind is SECRET else 'config'} key: {absent[0]}"
                    )
                return {item["path"]: data[item["key"]] for item in items if item["key"] in data}
        raise NotReady(f"volume source {', '.join(source)} is not supported by the local node")


def _sources(volume: Object) -> list[Object]:
    if "projected" in volume:
        return list(volume["projected"].get("sources") or [])
    return [{key: value for key, value in volume.items() if key != "name"}]


def expand(text: str, env: dict[str, str]) -> str:
    """`$(NAME)` becomes its value, or stays as it is when there is none; `$$` is a dollar sign."""
    return re.sub(r"\$(?:\$|\(([^()]+)\))", lambda m: "$" if m[1] is None else env.get(m[1], m[0]), text)


def rewrite(text: str, mounts: list[Mount]) -> str:
    for mount in mounts:
        if text == mount.path or text.startswith(mount.path + "/"):
            return str(mount.folder) + text[len(mount.path) :]
    return text


def _rewrite_word(word: str, mounts: list[Mount]) -> str:
    option, equals, value = word.partition("=")
    if option.startswith("-") and equals:
        return option + equals + rewrite(value, mounts)
    return rewrite(word, mounts)


def field(pod: Object, path: str) -> str:
    """A downward API field, such as `metadata.labels['app']` or `spec.nodeName`."""
    if path == "status.podIP":
        return "127.0.0.1"
    here: Any = pod
    for part in re.findall(r"\['([^']+)'\]|([^.\[\]]+)", path):
        here = here.get(part[0] or part[1], "") if isinstance(here, dict) else ""
    return str(here)


def usage(folder: Path) -> int:
    """Bytes of disk in use below a folder. Files that vanish meanwhile count nothing."""
    return sum(_sizes(str(folder)))


def _sizes(folder: str) -> Iterator[int]:
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.lstat(f"{parent}/{name}").st_blocks * 512
            except FileNotFoundError:
                continue


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number: `"64Mi"` -> 67108864."""
    number, suffix = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", text.strip()).groups()  # type: ignore[union-attr]
    return float(number) / 1000 if suffix == "m" else float(number) * SUFFIXES[suffix]
