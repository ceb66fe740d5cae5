"""A manifest in a file, judged as `kubectl apply --dry-run=server` would judge it."""

import re
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cgd_cli.errors import Wrong
from cgd_operator import yamls
from cgd_operator.api import GROUP, VERSION
from cgd_operator.api.benchmarks import BENCHMARKS
from cgd_operator.api.crd import crd
from cgd_operator.api.spec import InvalidRun
from cgd_operator.kube.kinds import is_label, is_name
from cgd_operator.planning.dag import Run
from cgd_operator.planning.tasks import published_of

if TYPE_CHECKING:
    from cgd_stages.results.published import PublishedTable

STDIN = Path("-")
FIELDS = ("apiVersion", "kind", "metadata", "spec", "status")
ANNOTATIONS_SIZE = 1 << 18
"""Bytes of all annotations of an object, names and values together (Kubernetes: 256 KiB)."""

_QUALIFIED = re.compile("[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")


def run_of(file: Path) -> Run:
    """The only CGDRun among the documents of a file. Raises Wrong and InvalidRun, which name the file."""
    body = body_of(file)
    try:
        return judged(body)
    except (Wrong, InvalidRun) as error:
        raise type(error)("\n".join(f"{file}: {line}" for line in str(error).splitlines())) from error


def body_of(file: Path) -> dict[str, Any]:
    """The only CGDRun among the documents of a file, not judged. Raises Wrong."""
    runs = [item for item in _documents(file) if isinstance(item, dict) and item.get("kind") == "CGDRun"]
    if len(runs) != 1:
        raise Wrong(f"{file} holds {len(runs) or 'no'} CGDRun{'s: give each a file of its own' if runs else ''}")
    body: dict[str, Any] = runs[0]
    return body


def judged(body: dict[str, Any]) -> Run:
    """A CGDRun as the API server would store it. Raises Wrong and InvalidRun, a line for each fault."""
    body = _stored(body, _schema())
    meta = body.get("metadata")
    if not isinstance(meta, dict) or not meta.get("name"):
        raise Wrong("metadata.name is missing")
    if faults := list(_faults(body)):
        raise Wrong("\n".join(faults))
    # The API server would set these.
    body["metadata"] = {"namespace": "default", "uid": "00000000-0000-0000-0000-000000000000", **meta}
    try:
        return Run.of(body)
    except InvalidRun as error:
        raise InvalidRun("\n".join(_with_likely(line, body) for line in str(error).splitlines())) from error


_UNKNOWN = re.compile(r"spec\.([\w.]+): there is no such field")
_SOURCELESS = re.compile(r"spec\.evaluation\.benchmarks\.(\d+): a benchmark needs a source")


def _with_likely(line: str, body: dict[str, Any]) -> str:
    """A fault with what may be meant: by the name of a field that there is not, or of a benchmark."""
    given, known = "", list[str]()
    if found := _UNKNOWN.match(line):
        *parents, given = found[1].split(".")
        schema: dict[str, Any] = _schema()["properties"]["spec"]
        for parent in parents:
            schema = schema.get("items", {}) if parent.isdecimal() else schema.get("properties", {}).get(parent, {})
        known = list(schema.get("properties", {}))
    elif found := _SOURCELESS.match(line):
        given, known = str(body["spec"]["evaluation"]["benchmarks"][int(found[1])]["name"]), list(BENCHMARKS)
    lowered = {name.lower(): name for name in known}
    near = get_close_matches(given.lower(), lowered, n=1)
    return f"{line}. Is {lowered[near[0]]} meant?" if near else line


@cache
def _schema() -> dict[str, Any]:
    schema: dict[str, Any] = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def published_tables(run: Run, file: Path, published: Path) -> "tuple[PublishedTable, ...]":
    """The published figures that the report of a run would show, from a local copy of their file. Raises Wrong, and
    UserError as prepare would."""
    from cgd_stages.results.published import read

    if (asked := published_of(run.spec)) is None:
        raise Wrong(f"{file} has no evaluation.published: set it to where the run finds {published}")
    try:
        return read(published.read_text(), asked)
    except UnicodeDecodeError as error:
        raise Wrong(f"{published} is not UTF-8: {error}") from error
    except OSError as error:
        raise Wrong(f"{published} cannot be read: {error.strerror}") from error


def _documents(file: Path) -> list[Any]:
    try:
        return list(yamls.load_all(sys.stdin.read() if file == STDIN else file.read_text()))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise Wrong(f"{file} is not YAML: {where}{error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Wrong(f"{file} is not YAML: {error}") from error
    except OSError as error:
        raise Wrong(f"{file} cannot be read: {error.strerror}") from error


def _stored(value: Any, schema: dict[str, Any]) -> Any:
    """As the API server stores it: a field that is null is missing, unless its schema takes nulls or anything."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return value
    match value:
        case dict():
            rest = schema.get("additionalProperties")
            parts = {name: schema.get("properties", {}).get(name, rest) for name in value}
            nulls = {name for name, part in parts.items() if part and value[name] is None and not part.get("nullable")}
            return {name: _stored(item, parts[name] or {}) for name, item in value.items() if name not in nulls}
        case list():
            return [_stored(item, schema.get("items", {})) for item in value]
        case _:
            return value


def _faults(body: dict[str, Any]) -> Iterator[str]:
    """What the API server would refuse outside the spec."""
    meta, version = body["metadata"], f"{GROUP}/{VERSION}"
    if body.get("apiVersion") != version:
        yield f"apiVersion must be {version} (it is {body.get('apiVersion')!r})"
    for name in body:
        if name not in FIELDS:
            yield f"{name} is no field of a CGDRun: a run's fields stand below spec"
    for field, is_valid in (("name", is_name), ("namespace", is_label)):
        value = meta.get(field, "default")
        if not isinstance(value, str) or len(value) > 63 or not is_valid(value):
            yield (
                f"metadata.{field} must be text of at most 63 small letters, digits and hyphens"
                f"{' (dots, too, in a name)' if field == 'name' else ''}, with a letter or digit at both ends (it is "
                f"{value!r})"
            )
    for field in ("labels", "annotations"):
        yield from _pair_faults(f"metadata.{field}", meta.get(field, {}))


def _pair_faults(where: str, pairs: Any) -> Iterator[str]:
    if not isinstance(pairs, dict):
        yield f"{where} must hold names and texts (it is {pairs!r})"
        return
    for name, value in pairs.items():
        prefix, slash, rest = name.rpartition("/")  # at most 63 characters, perhaps behind a DNS prefix
        if len(rest) > 63 or not _QUALIFIED.fullmatch(rest) or (slash and not is_name(prefix.lower())):
            yield f"{where}: {name!r} can be no name there: write letters, digits, '-', '_' and '.', or prefix/name"
        if not isinstance(value, str):
            yield f"{where}.{name} must be text: write it in quotes (it is {value!r})"
        elif where.endswith("labels") and value and not (len(value) <= 63 and _QUALIFIED.fullmatch(value)):
            yield f"{where}.{name} must have at most 63 letters, digits, '-', '_' and '.' (it is {value!r})"
    size = sum(len(str(text).encode()) for pair in pairs.items() for text in pair)
    if where.endswith("annotations") and size > ANNOTATIONS_SIZE:
        yield f"{where} has {size:,} bytes: the API server takes {ANNOTATIONS_SIZE:,} in all"
