"""Models: which exact model a name means (`resolve`), and its files on this machine (`fetch`).

A name is a hub id, an `s3://` folder, a path in the image, or `stage://<stage>`, the model that a stage of this run
has made. Name and revision identify a model; the revision is a commit on the hub, a fingerprint of a folder's files, or
the digest of a stage.
"""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import CONFIG_MAP, MODEL_CACHE, Chat, Engine, Model
from cgd_stages.errors import TransientError, UserError
from cgd_stages.store.bucket import Bucket, place, places
from cgd_stages.store.folder import Folder
from cgd_stages.store.rows import digest_of, file_sha256
from cgd_stages.store.run import RunStore

log = logging.getLogger(__name__)

STAGE = "stage://"
TEMPLATES = "templates"
"""The entry of prepare's inputs with the text of each chat template and instruction that the run names by its place."""
MODEL = "model/"
"""Prefix of the model's files in the folder of a stage that makes one."""
ADAPTER = "adapter/"
"""Prefix of the files of the adapter that was trained, in the same folder."""
LONGEST_HEADER = 100_000_000
"""Bytes of a safetensors file's header, the limit of the safetensors library."""
LARGEST = 1 << 60
"""Bytes, or parameters, of a tensor."""
_ODD = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""Errors of the hub's library for an index or a header with unexpected values."""
_SAMPLE = 1 << 20
_NEEDED = "config.json"
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SMALL = ["*.json", "*.model", "*.txt", "*.jinja"]
_WEIGHTS = ["*.safetensors"]
_FILES = _SMALL + _WEIGHTS
_CACHE_HINT = (
    "spec.modelCache: the claim or folder must exist, and the stage fetch must be able to write there as group 65532."
)
_COMMIT = re.compile("[0-9a-f]{40}")
_STORED = "s3"
"""The folder of the model cache with models of S3, beside the hub's own layout."""
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")

T = TypeVar("T")


@dataclass(frozen=True)
class Resolved:
    """An exact model. Two models with the same name and revision have the same weights, tokenizer and template."""

    name: str
    revision: str

    def identity(self) -> dict[str, str]:
        """The model's part of a digest's inputs."""
        return {"name": self.name, "revision": self.revision}


def resolve(model: Model, store: RunStore) -> Resolved:
    """The exact model that a name means. Raises UserError when it does not exist, TransientError when out of reach."""
    if model.name.startswith(STAGE):
        return Resolved(model.name, store.input(model.name.removeprefix(STAGE)).digest)
    if model.name.startswith("s3://"):
        return Resolved(model.name, _stored_fingerprint(model.name, store.bucket))
    if _is_path(model.name):
        folder = _folder(model.name)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        entries = [[str(path.relative_to(folder)), path.stat().st_size, _sampled(path)] for path in files]
        return Resolved(model.name, digest_of(files=entries))
    return Resolved(model.name, _hub(model.name, lambda: _snapshot(model, [_NEEDED]).name))


def pinned(model: Model, store: RunStore) -> Model:
    """The model at the revision that prepare has found, so that a moving branch does not mix two models."""
    pins: dict[str, str] = store.input("prepare").require().inputs.get("pins", {})
    return model if model.revision else model.model_copy(update={"revision": pins.get(model.name)})


def pinned_chat(chat: Chat, store: RunStore) -> Chat:
    """The chat with the text of its template as prepare has read it, so that a file that changes does not mix two
    templates in one run."""
    if chat.template_uri is None:
        return chat
    return chat.model_copy(update={"template": pinned_text(chat.template_uri, store)})


def pinned_text(text: str | None, store: RunStore) -> str | None:
    """A text that the run may name by its place, as prepare has read it there."""
    if text is None or not text.startswith((CONFIG_MAP, "s3://")):
        return text
    texts: dict[str, str] = store.input("prepare").require().inputs.get(TEMPLATES, {})
    if text not in texts:
        message = f"prepare has not read {text}"
        raise UserError(message, hint="Delete the run and apply it again: this stage does not belong to its prepare.")
    return texts[text]


def spoken(model: Model, chat: Chat, store: RunStore, scratch: Path) -> ChatTemplate:
    """How the model is spoken to. Raises UserError when its tokenizer does not load or its template cannot do it."""
    folder = fetch(model, store, scratch, weights=False)
    pinned = pinned_chat(chat, store)
    with reading(model, "spec.student or spec.teacher", "tokenizer"):
        template = ChatTemplate.load(folder, pinned, name=model.name)
    return template  # noqa: RET504 - mypy: the block above might swallow an error


def with_drafts(engine: Engine, folder_of: Callable[[Model], Path]) -> Engine:
    """The engine with a local folder in place of the model that writes its drafts, if it has one."""
    drafts = engine.speculative
    if drafts is None or drafts.model is None:
        return engine
    folder = folder_of(Model(name=drafts.model))
    return engine.model_copy(update={"speculative": drafts.model_copy(update={"model": str(folder)})})


def fetch_pinned(model: Model, store: RunStore, scratch: Path) -> Path:
    """`fetch` at the revision that prepare has found."""
    return fetch(pinned(model, store), store, scratch)


def fetch(model: Model, store: RunStore, scratch: Path, *, weights: bool = True) -> Path:
    """A local folder with the model's files; files of an earlier call are not fetched again.

    Without `weights` the large files may be missing: config, tokenizer and template need none.
    """
    if model.name.startswith(STAGE):
        return _fetch_stage(store.input(model.name.removeprefix(STAGE)), scratch, weights=weights)
    if model.name.startswith("s3://"):
        return _fetch_stored(model.name, store.bucket, scratch, weights=weights)
    if _is_path(model.name):
        return _folder(model.name)
    return _hub(model.name, lambda: _snapshot(model, _FILES if weights else _SMALL))


def keep(model: Model, store: RunStore) -> Path:
    """The model's folder in the cluster's cache, with all its files; it is filled if it has not the model yet. What is
    a path in the image stays there. `model`: pinned.

    Raises:
        UserError: there is no cache, or it cannot be written.
        TransientError: the hub or the store is out of reach.
    """
    if _is_path(model.name):
        return _folder(model.name)
    if (cache := _cache()) is None or not os.access(cache, os.R_OK | os.X_OK):
        raise UserError("the model cache is not mounted", hint=_CACHE_HINT)
    stored = model.name.startswith("s3://")
    if found := _kept_stored(_stored_fingerprint(model.name, store.bucket)) if stored else _kept(model, _FILES):
        log.info("%s is kept already: %s", model.name, found)
        return found
    if not os.access(cache, os.W_OK):
        raise UserError(f"the model cache has not {model.name} and cannot be written", hint=_CACHE_HINT)
    if not stored:
        return _hub(model.name, lambda: _snapshot(model, _FILES, cache))
    filling = cache / _STORED / f".filling-{store.run.uid}"
    whole = _fetch_stored(model.name, store.bucket, filling, weights=True)
    target = cache / _STORED / whole.name
    if not target.exists():  # another run may have kept it meanwhile
        whole.rename(target)
    shutil.rmtree(filling, ignore_errors=True)
    return target


def _cache() -> Path | None:
    """The cluster's cache of models, if this pod has it."""
    given = os.environ.get(MODEL_CACHE)
    return Path(given) if given else None


def _kept_stored(fingerprint: str) -> Path | None:
    """The folder of a model of S3 in the cache. It is renamed to that name when it is whole."""
    folder = cache / _STORED / fingerprint if (cache := _cache()) else None
    return folder if folder and folder.is_dir() else None


def _kept(model: Model, patterns: list[str]) -> Path | None:
    """The folder of a hub's model in the cache, if these files are whole there. Only for a commit: a branch moves."""
    from huggingface_hub import errors, get_cached_repo_tree, snapshot_download

    cache, commit = _cache(), model.revision or ""
    if cache is None or not _COMMIT.fullmatch(commit):
        return None
    try:
        get_cached_repo_tree(model.name, revision=commit, cache_dir=cache)  # without it nothing tells what is missing
        kept = snapshot_download(
            model.name, revision=commit, allow_patterns=patterns, cache_dir=cache, local_files_only=True
        )
    except (errors.LocalEntryNotFoundError, errors.CachedRepoTreeNotFoundError):
        return None
    return Path(kept)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a model's weights. `dtype`: its name in safetensors; `size`: in bytes."""

    name: str
    dtype: str
    parameters: int
    size: int
    shape: tuple[int, ...] = ()


def tensors(model: Model, bucket: Bucket, scratch: Path) -> list[Tensor] | None:
    """Every tensor, from the headers of the model's safetensors alone; None when they cannot be read.

    Raises TransientError when the store or the hub is out of reach.
    """
    from huggingface_hub import HfApi, constants, errors, get_local_safetensors_metadata

    try:
        if model.name.startswith("s3://"):
            metadata = get_local_safetensors_metadata(_stored_headers(model.name, bucket, scratch))
        elif _is_path(model.name):
            metadata = get_local_safetensors_metadata(_folder(model.name))
        elif constants.HF_HUB_OFFLINE:
            metadata = get_local_safetensors_metadata(_hub(model.name, lambda: _snapshot(model, _SMALL)))
        else:
            metadata = _hub(model.name, lambda: HfApi().get_safetensors_metadata(model.name, revision=model.revision))
        files = metadata.files_metadata.values()
        return [_tensor(name, tensor) for file in files for name, tensor in file.tensors.items()]
    except (errors.NotASafetensorsRepoError, errors.SafetensorsParsingError, FileNotFoundError, *_ODD) as error:
        log.warning("the weights of %s cannot be read: %s: %s", model.name, type(error).__name__, error)
        return None


def _tensor(name: str, info: Any) -> Tensor:
    """Raises ValueError for impossible sizes."""
    begin, end = info.data_offsets
    counts = (info.parameter_count, end - begin)
    if not all(type(count) is int and 0 <= count < LARGEST for count in counts):
        raise ValueError(f"{name} has {counts[0]} parameters in {counts[1]} bytes")
    return Tensor(name, str(info.dtype), *counts, tuple(info.shape))


class _Index(BaseModel):
    """The part of a safetensors index that names the tensors' files."""

    weight_map: dict[str, str]


def _stored_headers(uri: str, bucket: Bucket, scratch: Path) -> Path:
    """A folder with the headers of a stored model's safetensors, which name the tensors.

    Raises SafetensorsParsingError for a file that is no such index or header.
    """
    from huggingface_hub.errors import SafetensorsParsingError

    source, folder = bucket.at(uri), scratch / "headers" / _stored_fingerprint(uri, bucket)
    names = {stored.key for stored in source.list()}
    folder.mkdir(parents=True, exist_ok=True)
    files = {_WHOLE}
    if _WHOLE not in names and _INDEX in names:
        source.download(_INDEX, place(folder, _INDEX))
        try:
            files = set(_Index.model_validate_json((folder / _INDEX).read_bytes()).weight_map.values())
        except ValidationError as error:
            raise SafetensorsParsingError(f"{source.uri(_INDEX)} is no index of safetensors: {error}") from error
    paths = places(folder, sorted(files))  # readers of the folder follow the index too
    for name in files & names:
        length = int.from_bytes(source.beginning(name, 8), "little")
        if length > LONGEST_HEADER:
            raise SafetensorsParsingError(f"{source.uri(name)} says that its header has {length} bytes")
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        paths[name].write_bytes(source.beginning(name, 8 + length))
    return folder


@contextmanager
def reading(model: Model, where: str, what: str) -> Iterator[None]:
    """Turn every error of a library that reads the model's own files (`what`: config or tokenizer) into `unloadable`.

    transformers 5.19 raises ValueError, KeyError and, for a dtype that torch lacks, AttributeError; huggingface_hub 2.4
    StrictDataclassError for a field of another type, which is none of these; tokenizers 0.23 a bare Exception.
    """
    try:
        yield
    except (UserError, TransientError, MemoryError):
        raise
    except Exception as error:
        raise unloadable(model, where, what, error) from error


def unloadable(model: Model, where: str, what: str, error: Exception) -> UserError:
    """The error of a model whose config or tokenizer (`what`) transformers does not load; `where` names it in the spec.

    No code that comes with a model ever runs: every loader says `trust_remote_code=False`, because without it
    transformers asks on a terminal. Its own error names an option that users do not have.
    """
    if "trust_remote_code" in str(error):
        return UserError(
            f"the {what} of the model {model.name} needs code from the model's own repository, which is never run",
            hint=f"Set {where}.model to a model whose architecture and tokenizer are part of transformers.",
        )
    hint = f"Correct {where}.model: its {what} must load in transformers."
    return UserError(f"the model {model.name} cannot be loaded: {error}", hint=hint)


def is_hub(model: Model) -> bool:
    """Whether the name is a hub id, whose revision can be pinned to a commit."""
    return not (_is_path(model.name) or model.name.startswith((STAGE, "s3://")))


def _is_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~"))


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if not (folder / _NEEDED).is_file():
        state = "has no config.json" if folder.is_dir() else "does not exist"
        raise UserError(f"the model {name} {state}", hint=_hint(name))
    return folder


def _hint(name: str) -> str:
    return (
        f"Correct the model {name!r} in spec.student or spec.teacher: a hub id, an s3:// folder or a path in the image."
    )


def _sampled(path: Path) -> str:
    """Hash of a file of up to 64 MiB, or of 64 samples of 1 MiB (training changes every weight, so samples suffice)."""
    size, digest = path.stat().st_size, hashlib.sha256()
    if size <= 64 * _SAMPLE:
        return file_sha256(path)
    with path.open("rb") as file:
        for index in range(64):
            file.seek((size - _SAMPLE) * index // 63)
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def _stored_fingerprint(uri: str, bucket: Bucket) -> str:
    files = [[stored.key, stored.size, stored.etag] for stored in bucket.at(uri).list()]
    if not any(name == _NEEDED for name, _, _ in files):
        raise UserError(f"the model {uri} has no config.json", hint=_hint(uri))
    return digest_of(files=files)


def _fetch_stored(uri: str, bucket: Bucket, scratch: Path, *, weights: bool) -> Path:
    source, fingerprint = bucket.at(uri), _stored_fingerprint(uri, bucket)
    if kept := _kept_stored(fingerprint):
        return _folder(str(kept))
    folder, objects = scratch / "models" / fingerprint, list(source.list())
    paths = places(folder, [stored.key for stored in objects])
    for stored in objects:
        if not weights and stored.key.endswith(_WEIGHT_SUFFIXES):
            continue
        path = paths[stored.key]
        if not (path.is_file() and path.stat().st_size == stored.size):
            log.info("fetching %s (%.1f MB)", source.uri(stored.key), stored.size / 1e6)
            source.download(stored.key, path)
        if path.stat().st_size != stored.size:
            raise TransientError(f"{source.uri(stored.key)} is incomplete on this machine")
    return _folder(str(folder))


def _fetch_stage(stage: Folder, scratch: Path, *, weights: bool) -> Path:
    folder, parts = scratch / "models" / stage.digest, stage.require().under(MODEL)
    paths = places(folder, [part.key.removeprefix(MODEL) for part in parts])
    for part in parts:
        if not weights and part.key.endswith(_WEIGHT_SUFFIXES):
            continue
        path = paths[part.key.removeprefix(MODEL)]
        if not (path.is_file() and file_sha256(path) == part.sha256):
            stage.bucket.download(stage.key(part.key), path)
        if file_sha256(path) != part.sha256:
            path.unlink()
            raise TransientError(f"{stage.uri}/{part.key} is not what its marker promises")
    return _folder(str(folder))


def _snapshot(model: Model, patterns: list[str], cache: Path | None = None) -> Path:
    """The hub's files, in the cluster's cache if it has them, else in this pod's or in `cache`. The commit is the
    folder's name."""
    from huggingface_hub import snapshot_download

    kept = _kept(model, patterns)
    return kept or Path(
        snapshot_download(model.name, revision=model.revision, allow_patterns=patterns, cache_dir=cache)
    )


def _hub(name: str, ask: Callable[[], T]) -> T:
    import httpx2
    from huggingface_hub import constants, errors

    try:
        return ask()
    except (errors.HFValidationError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(f"there is no model {name} on the hub: {error}", hint=_hint(name)) from error
    except (httpx2.HTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        hint = f"{_hint(name)} The hub may be out of reach from this pod, or want a token (HF_TOKEN)."
        if constants.HF_HUB_OFFLINE:
            message = f"the model {name} is not in the local cache, and HF_HUB_OFFLINE switches the hub off"
            raise UserError(message, hint=hint) from error
        raise TransientError(f"the model {name} cannot be fetched from the hub: {error}", hint=hint) from error
