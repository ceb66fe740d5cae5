"""What a run has in the store: pointers to the folders of its stages, and claims that keep these from being deleted.

<namespace>/runs/<run>/<stage>.json              pointer of a run to the folder of its stage
<namespace>/claims/<uid>/<stage>/<digest>        empty: the run of this uid makes or uses the folder
"""

import re

from pydantic import ValidationError

from cgd_stages.contract import Contract, RunRef, StageFacts
from cgd_stages.errors import TransientError, UserError
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import Digest, Done, Folder

_CLAIM = re.compile(r"([^/]+)/([a-z0-9-]+)/([0-9a-f]+)")


class Pointer(Contract):
    """Where a run's stage has its output."""

    run_uid: str
    stage: str
    digest: Digest
    uri: str
    facts: StageFacts


def claim(folder: Folder, run: RunRef) -> None:
    """Say that the run makes or uses the folder, before it does: the stage clean deletes what nobody claims."""
    key = _claim_key(run.namespace, run.uid, folder.stage, folder.digest)
    if folder.bucket.get(key) is None:
        folder.bucket.put(key, b"")


def read_claims(bucket: Bucket, namespace: str) -> dict[str, set[Folder]]:
    """The folders of every run that has ever begun one, by the run's uid. Other objects that somebody has stored below
    the same prefix are no claims."""
    found: dict[str, set[Folder]] = {}
    for stored in bucket.list(_claim_key(namespace)):
        if claimed := _CLAIM.fullmatch(stored.key.removeprefix(_claim_key(namespace))):
            uid, stage, digest = claimed.groups()
            found.setdefault(uid, set()).add(Folder(bucket, namespace, stage, digest))
    return found


def withdraw(folder: Folder, run: RunRef) -> None:
    """Take a claim back."""
    folder.bucket.delete(_claim_key(run.namespace, run.uid, folder.stage, folder.digest))


def write_pointer(bucket: Bucket, run: RunRef, done: Done) -> Pointer:
    """Link the run to the folder of one of its stages. Doing it twice is doing it once."""
    pointer = Pointer(
        run_uid=run.uid, stage=done.stage, digest=done.digest, uri=done.facts.output_uri, facts=done.facts
    )
    key, data = _pointer_key(run, done.stage), pointer.to_json().encode()
    if bucket.get(key) != data:
        bucket.put(key, data)
    return pointer


def read_pointer(bucket: Bucket, run: RunRef, stage: str) -> Pointer:
    """Where the run's stage has its output. Raises TransientError when it has none, or one of another run's life."""
    data = bucket.get(_pointer_key(run, stage))
    hint = f"The stage {stage} of {run.namespace}/{run.name} has not ended yet: its output is there when it has."
    if data is None:
        raise TransientError(f"the run {run.name} has no output of {stage}", hint=hint)
    pointer = _pointer(data)
    if pointer is None:
        what = f"{bucket.uri(_pointer_key(run, stage))} is no pointer of this format"
        raise UserError(what, hint=f"Delete the object and the Job of the stage {stage}, which makes it anew.")
    if pointer.run_uid != run.uid:
        raise TransientError(f"the output of {stage} belongs to an earlier run named {run.name}", hint=hint)
    return pointer


def open_input(bucket: Bucket, run: RunRef, stage: str) -> Folder:
    """The finished folder of an earlier stage of the run."""
    return Folder(bucket, run.namespace, stage, read_pointer(bucket, run, stage).digest)


def delete_pointers(bucket: Bucket, run: RunRef) -> None:
    """Delete the run's pointers, not those of another run of its name."""
    for stored in list(bucket.list(_pointer_key(run))):
        data = bucket.get(stored.key)
        pointer = None if data is None else _pointer(data)
        if pointer and pointer.run_uid == run.uid:
            bucket.delete(stored.key)


def _pointer(data: bytes) -> Pointer | None:
    """None: it is none, but an object of somebody else's below the same prefix."""
    try:
        return Pointer.model_validate_json(data)
    except ValidationError:
        return None


def _pointer_key(run: RunRef, stage: str = "") -> str:
    """Key of a pointer; without a stage, what those of the run begin with."""
    return f"{run.namespace}/runs/{run.name}/" + (f"{stage}.json" if stage else "")


def _claim_key(namespace: str, *rest: str) -> str:
    """Key of a claim; without the rest, what all keys of claims begin with."""
    return f"{namespace}/claims/{'/'.join(rest)}"
