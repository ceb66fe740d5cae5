"""A run's part of the store: pointers to the folders of its stages, and claims that protect these from deletion.

<namespace>/runs/<run>/<stage>.json              pointer of a run to the folder of its stage
<namespace>/claims/<uid>/<stage>/<digest>        empty: the run of this uid makes or uses the folder
"""

import logging
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from cgd_stages.contract import Contract, RunRef, StageFacts
from cgd_stages.errors import TransientError, UserError
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import Digest, Done, Folder, Part
from cgd_stages.store.maker import made_by
from cgd_stages.store.rows import digest_of, now

log = logging.getLogger(__name__)

_CLAIM = re.compile(r"([^/]+)/([a-z0-9-]+)/([0-9a-f]+)")


class Pointer(Contract):
    """Where a run's stage has its output."""

    run_uid: str
    stage: str
    digest: Digest
    uri: str
    facts: StageFacts


@dataclass(frozen=True)
class Product:
    """A stage's output in its folder, in the words of its promise."""

    facts: StageFacts
    parts: Sequence[Part]
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that ran the stage without determining its output."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Entries for later stages, stored among the inputs; they are no part of the digest."""


@dataclass(frozen=True)
class RunStore:
    """The store as one run uses it: the folders of its earlier stages, and the folder of its next one."""

    bucket: Bucket
    run: RunRef

    def waiting(self, stop: threading.Event) -> "RunStore":
        """The same store for a program that waits while the store is away, see `Bucket.waiting`."""
        return replace(self, bucket=self.bucket.waiting(stop))

    def input(self, stage: str) -> Folder:
        """The finished folder of an earlier stage. Raises TransientError when the stage has not ended."""
        return Folder(self.bucket, self.run.namespace, stage, self.pointer(stage).digest)

    def place(self, stage: str, inputs: dict[str, Any]) -> Folder:
        """The folder of the output that these inputs determine; another run may have made it."""
        return Folder(self.bucket, self.run.namespace, stage, digest_of(**inputs))

    def folder(self, stage: str, inputs: dict[str, Any]) -> Folder:
        """The same folder, claimed for this run, which is going to make or use it."""
        folder = self.place(stage, inputs)
        self.claim(folder)
        return folder

    def produce(self, stage: str, inputs: dict[str, Any], make: Callable[[Folder], Product]) -> Done:
        """The promise of a stage's output, and a pointer of the run to it. `make` fills the folder, unless an earlier
        attempt or another run with the same inputs has done so."""
        done = self.make_once(stage, inputs, make)
        self.point_at(done)
        return done

    def make_once(self, stage: str, inputs: dict[str, Any], make: Callable[[Folder], Product]) -> Done:
        """`produce` without the pointer."""
        folder = self.folder(stage, inputs)
        if done := folder.done():
            log.info("%s is done already: %s", stage, folder.uri)
            return done
        started = now()
        product = make(folder)
        return self.finish(
            folder,
            facts=product.facts,
            parts=product.parts,
            started=started,
            inputs=inputs | product.notes,
            settings=product.settings,
        )

    def finish(
        self,
        folder: Folder,
        *,
        facts: StageFacts,
        parts: Iterable[Part],
        started: str,
        inputs: dict[str, Any],
        settings: dict[str, Any],
    ) -> Done:
        """Write a folder's promise, which names this run as its maker; see `Folder.finish`."""
        made = settings | made_by(self.run)
        return folder.finish(facts=facts, parts=parts, started=started, inputs=inputs, settings=made)

    # --- pointers -----------------------------------------------------------------------------------------------

    def point_at(self, done: Done) -> None:
        """Point from the run to the folder of one of its stages. Doing it twice is doing it once."""
        pointer = Pointer(
            run_uid=self.run.uid, stage=done.stage, digest=done.digest, uri=done.facts.output_uri, facts=done.facts
        )
        key, data = self._pointer_key(done.stage), pointer.to_json().encode()
        if self.bucket.get(key) != data:
            self.bucket.put(key, data)

    def pointer(self, stage: str) -> Pointer:
        """Where a stage has its output. Raises TransientError when it has none, or only an earlier run's."""
        data, name = self.bucket.get(self._pointer_key(stage)), self.run.name
        hint = f"The stage {stage} of {self.run.namespace}/{name} has not ended yet: its output is there when it has."
        if data is None:
            raise TransientError(f"the run {name} has no output of {stage}", hint=hint)
        pointer = _pointer(data)
        if pointer is None:
            message = f"{self.bucket.uri(self._pointer_key(stage))} is no pointer of this format"
            raise UserError(message, hint=f"Delete the object and the Job of the stage {stage}, which makes it anew.")
        if pointer.run_uid != self.run.uid:
            raise TransientError(f"the output of {stage} belongs to an earlier run named {name}", hint=hint)
        return pointer

    def stages(self) -> set[str]:
        """The stages that have a pointer."""
        pointers = self._pointer_key()
        return {stored.key.removeprefix(pointers).removesuffix(".json") for stored in self.bucket.list(pointers)}

    def delete_pointers(self) -> None:
        """Delete the run's pointers, not those of another run of its name."""
        for stored in self.bucket.list(self._pointer_key()):
            data = self.bucket.get(stored.key)
            pointer = None if data is None else _pointer(data)
            if pointer and pointer.run_uid == self.run.uid:
                self.bucket.delete(stored.key)

    def _pointer_key(self, stage: str = "") -> str:
        """Key of a pointer; without a stage, the prefix of the run's pointers."""
        return f"{self.run.namespace}/runs/{self.run.name}/" + (f"{stage}.json" if stage else "")

    # --- logs ---------------------------------------------------------------------------------------------------

    def keep_log(self, stage: str, text: bytes) -> None:
        """Store the end of a program's log beside those of its other pods and tries."""
        self.bucket.put(self._log_key(f"{stage}/{now()}-{uuid.uuid4().hex[:6]}.log"), text)

    def logs(self, stage: str = "") -> list[tuple[str, bytes]]:
        """The name and the text of each log of a stage, or of all stages, oldest first."""
        prefix = self._log_key(f"{stage}/" if stage else "")
        names = (stored.key.removeprefix(self._log_key()) for stored in self.bucket.list(prefix))
        texts = ((name, self.bucket.get(self._log_key(name))) for name in sorted(names, key=_when))
        return [(name, text) for name, text in texts if text is not None]

    def delete_logs(self) -> int:
        """Delete the run's logs; how many there were."""
        keys = [stored.key for stored in self.bucket.list(self._log_key())]
        for key in keys:
            self.bucket.delete(key)
        return len(keys)

    def _log_key(self, name: str = "") -> str:
        """Key of a log; without a name, the prefix of the run's logs. They belong to no other run of its name."""
        return f"{self.run.namespace}/logs/{self.run.name}/{self.run.uid}/{name}"

    # --- claims -------------------------------------------------------------------------------------------------

    def claim(self, folder: Folder) -> None:
        """Say that the run makes or uses the folder, before it does: clean deletes folders without a claim."""
        key = self._claim_key(self.run.uid, folder.stage, folder.digest)
        if self.bucket.get(key) is None:
            self.bucket.put(key, b"")

    def withdraw(self, folder: Folder) -> None:
        """Take a claim back."""
        self.bucket.delete(self._claim_key(self.run.uid, folder.stage, folder.digest))

    def claims(self) -> dict[str, set[Folder]]:
        """The folders that the namespace's runs claim, by the run's uid. Other objects below the same prefix are no
        claims."""
        prefix = self._claim_key()
        claims: dict[str, set[Folder]] = {}
        for stored in self.bucket.list(prefix):
            if claim := _CLAIM.fullmatch(stored.key.removeprefix(prefix)):
                uid, stage, digest = claim.groups()
                claims.setdefault(uid, set()).add(Folder(self.bucket, self.run.namespace, stage, digest))
        return claims

    def _claim_key(self, *rest: str) -> str:
        """Key of a claim; without `rest`, the prefix of all claims."""
        return f"{self.run.namespace}/claims/{'/'.join(rest)}"


def _when(log: str) -> str:
    return log.rpartition("/")[2]


def _pointer(data: bytes) -> Pointer | None:
    """None: the object is no pointer."""
    try:
        return Pointer.model_validate_json(data)
    except ValidationError:
        return None
