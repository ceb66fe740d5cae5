"""What a container gets when it starts: its volumes, its environment, its command line, and its user.

**The local deviation.** There are no mounts and no image: a container is a process of this machine. Each volume is a
folder below the pod's own folder. An environment value, command word or argument that *is* a mount path, or lies under
one, is rewritten to the real folder; so is `terminationMessagePath`. Paths inside longer texts such as options or JSON,
or compiled into programs, stay: pass them by environment. HOME is the pod's folder, for all of its containers.

Names of other pods resolve as `names` says: each pod has a file that is its /etc/hosts. Where this machine does not
allow that, no name of a pod resolves, and a literal MASTER_ADDR becomes 127.0.0.1.

All processes run as the user of this one. The user of an image matters only if a pod forbids root: `ROOT_IMAGES` run as
root, all other images, also ours, as another user.

Volumes are ConfigMaps, Secrets, projections of them, and emptyDir without a limit.
"""

import base64
import re
from pathlib import Path

from cgd_operator.kube.client import Cluster, Object
from cgd_operator.kube.kinds import CONFIGMAP, SECRET

TERMINATION_LOG = "/dev/termination-log"
_hosts = Path("/etc/hosts")
MACHINE_HOSTS = _hosts.read_text().rstrip("\n") + "\n" if _hosts.exists() else ""
"""The names that every pod also resolves: gloo needs that of the machine."""
ROOT_IMAGES = frozenset({"alpine", "busybox", "debian", "python", "ubuntu"})
"""Last parts of the names of public images that set no user, and so run as root."""


class NotReady(Exception):
    """An object that the pod refers to does not exist (yet); the message is the kubelet's."""


class NotMounted(NotReady):
    """A volume refers to an object that does not exist (yet)."""


class Sandbox:
    """One pod's folder on this machine."""

    def __init__(self, cluster: Cluster, pod: Object, folder: Path, *, own_names: bool = False) -> None:
        self._cluster, self._pod, self.folder, self._own_names = cluster, pod, folder, own_names
        self.namespace: str = pod["metadata"]["namespace"]
        self.hosts = folder / "hosts"
        (folder / "tmp").mkdir(parents=True)
        self.hosts.write_text(MACHINE_HOSTS)
        for container in (*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]):
            self.logs(container["name"]).mkdir(parents=True)

    def logs(self, container: str) -> Path:
        """The folder of a container's logs, with a file for each of its starts."""
        return self.folder / "logs" / container

    def know(self, names: list[str]) -> None:
        """Let the pod resolve these names, and otherwise only the machine's."""
        content = MACHINE_HOSTS + "".join(f"127.0.0.1 {name}\n" for name in names)
        before = self.hosts.read_text()
        if content != before.rstrip("\n") + "\n":  # written in place, as it is mounted, in one write, and never shorter
            with self.hosts.open("r+") as file:
                file.write(content.ljust(len(before), "\n"))

    def termination_file(self, container: str) -> Path:
        return self.folder / "logs" / f"{container}.last-words"

    async def mount(self) -> None:
        """Make and fill every volume; raises NotMounted for the first that cannot be filled."""
        for volume in self._pod["spec"].get("volumes") or []:
            folder = self.folder / "volumes" / volume["name"]
            folder.mkdir(parents=True, exist_ok=True)
            try:
                await self._fill(volume, folder)
            except NotReady as error:
                raise NotMounted(f'MountVolume.SetUp failed for volume "{volume["name"]}" : {error}') from error

    def refuse_root(self, container: Object) -> None:
        """Raises NotReady if the container would run as root, and it or its pod forbids that."""
        pod, context = self._pod["spec"].get("securityContext") or {}, container.get("securityContext", {})
        rules = pod | {field: value for field, value in context.items() if value is not None}
        if not rules.get("runAsNonRoot"):
            return
        meta = self._pod["metadata"]
        place = f'(pod: "{meta["name"]}_{meta["namespace"]}({meta["uid"]})", container: {container["name"]})'
        if rules.get("runAsUser") == 0:
            raise NotReady(f"container's runAsUser breaks non-root policy {place}")
        image = container.get("image", "").rpartition("/")[2].partition("@")[0].partition(":")[0]
        if rules.get("runAsUser") is None and image in ROOT_IMAGES:  # docker.io/library/alpine:3.10 is alpine
            raise NotReady(f"container has runAsNonRoot and image will run as root {place}")

    def command(self, container: Object, env: dict[str, str]) -> list[str]:
        words = [*(container.get("command") or []), *(container.get("args") or [])]
        if not words:
            raise NotReady("the local node has no images: the container must set its command")
        mounts = self._mounts(container)
        return [rewrite(expand(str(word), env), mounts) for word in words]

    def _mounts(self, container: Object) -> dict[str, Path]:
        last_words = self.termination_file(container["name"])
        mounts = {container.get("terminationMessagePath", TERMINATION_LOG): last_words}
        for entry in container.get("volumeMounts") or []:
            mounts[entry["mountPath"].rstrip("/")] = self.folder / "volumes" / entry["name"]
        return mounts

    async def environment(self, container: Object, image: dict[str, str]) -> dict[str, str]:
        """The image's environment, then `envFrom`, then `env`; later entries win and may use `$(EARLIER)`."""
        hostname = self._pod["spec"].get("hostname") or self._pod["metadata"]["name"]
        env = {"HOSTNAME": hostname, "HOME": str(self.folder), "TMPDIR": str(self.folder / "tmp")}
        env |= image
        mounts = self._mounts(container)
        for source in container.get("envFrom") or []:
            data = await self._data(source)
            env |= {source.get("prefix", "") + key: value.decode() for key, value in data.items()}
        for entry in container.get("env") or []:
            value = await self._value(entry, env)
            if value is not None:
                env[entry["name"]] = rewrite(value, mounts)
        return env

    async def _value(self, entry: Object, env: dict[str, str]) -> str | None:
        source = entry.get("valueFrom")
        if not source:
            literal = expand(str(entry.get("value") or ""), env)
            is_address = entry["name"] in ("MASTER_ADDR", "PET_MASTER_ADDR")
            return "127.0.0.1" if is_address and not self._own_names else literal
        if "fieldRef" in source:
            return field(self._pod, source["fieldRef"]["fieldPath"])
        data = await self._data(source)
        (reference,) = source.values()
        if reference["key"] in data:
            return data[reference["key"]].decode()
        if reference.get("optional"):
            return None
        kind = "Secret" if "secretKeyRef" in source else "ConfigMap"
        raise NotReady(f"couldn't find key {reference['key']} in {kind} {self.namespace}/{reference['name']}")

    async def _data(self, source: Object) -> dict[str, bytes]:
        """The content of the Secret or ConfigMap in a volume, a projection or an environment entry."""
        sort = next((key for key in source if key.startswith(("secret", "configMap"))), None)
        if sort is None:
            raise NotReady(f"the local node supports ConfigMaps and Secrets, not {', '.join(source)}")
        kind, reference = SECRET if sort.startswith("secret") else CONFIGMAP, source[sort]
        name = reference.get("secretName") or reference["name"]
        item = await self._cluster.get(kind, name, self.namespace)
        if item is None and not reference.get("optional"):
            raise NotReady(f'{kind.kind.lower()} "{name}" not found')
        data = (item or {}).get("data") or {}
        return {key: base64.b64decode(text) if kind is SECRET else text.encode() for key, text in data.items()}

    async def _fill(self, volume: Object, folder: Path) -> None:
        if "emptyDir" in volume:
            return
        sources = volume["projected"]["sources"] if "projected" in volume else [volume]
        for source in sources:
            data = await self._data(source)
            reference = source.get("configMap") or source["secret"]
            for item in reference.get("items") or [{"key": key, "path": key} for key in data]:
                if item["key"] in data:
                    target = folder / item["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(data[item["key"]])
                elif not reference.get("optional"):
                    raise NotReady(f"references non-existent key: {item['key']}")


def expand(text: str, env: dict[str, str]) -> str:
    """`$(NAME)` becomes its value, or stays if it has none; `$$` becomes a dollar sign. NAME ends at the next `)`."""
    return re.sub(r"\$(?:\$|\(([^)]*)\))", lambda m: "$" if m[1] is None else env.get(m[1], m[0]), text)


def rewrite(text: str, mounts: dict[str, Path]) -> str:
    """A path at or below a mount becomes the real path; of nested mounts the innermost counts."""
    inside = [path for path in mounts if text == path or text.startswith(path + "/")]
    path = max(inside, key=len, default="")
    return str(mounts[path]) + text[len(path) :] if inside else text


def field(pod: Object, path: str) -> str:
    """A downward API field of the metadata, such as `metadata.labels['app']`."""
    value = pod
    for key, part in re.findall(r"\['([^']+)'\]|([^.\[\]]+)", path):
        value = value.get(key or part, {})
    return str(value or "")
