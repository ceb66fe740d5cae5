"""`cgd init`: a manifest from answers, or from another run. Every answer is judged at once, as by `cgd validate`."""

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cgd_cli.errors import Wrong
from cgd_cli.manifest import judged
from cgd_cli.terminal import write
from cgd_operator.api import GROUP, VERSION
from cgd_operator.api.benchmarks import BENCHMARKS
from cgd_operator.api.spec import InvalidRun

Body = dict[str, Any]

FIRST: Body = {
    "apiVersion": f"{GROUP}/{VERSION}",
    "kind": "CGDRun",
    "metadata": {"name": "my-run"},
    "spec": {
        "student": {"model": "Qwen/Qwen3-8B", "maxModelLen": 8192},
        "teacher": {"model": "Qwen/Qwen3-32B", "tensorParallel": 2, "maxModelLen": 32768},
        "prompts": {"source": "s3://my-bucket/questions/*.parquet", "fields": {"prompt": "question"}, "limit": 10000},
        "training": {"objectives": ["CGD", "RefinedSFT"], "gpusPerWorker": 8},
        "evaluation": {"benchmarks": [{"name": "MATH-500"}]},
        "storage": {"uri": "s3://my-bucket/cgd", "credentialsSecretRef": {"name": "s3-keys"}},
    },
}
"""What the questions begin with. It is valid, so a fault is always in the last answer."""
NONE = "none"
"""The answer that leaves a field out."""


def _text(answer: str, _: Any) -> Any:
    return answer


def _number(answer: str, _: Any) -> Any:
    return int(answer) if answer.isdecimal() else answer


def _words(answer: str) -> list[str]:
    return [word.strip() for word in answer.split(",") if word.strip()]


def _secret(answer: str, old: Any) -> Any:
    return {**(old or {}), "name": answer}


def _token(answer: str, old: Any) -> Any:
    return {"key": "token", **(old or {}), "name": answer}


def _named(value: Any) -> str:
    return str(value["name"])


def _benchmarks(answer: str, old: Any) -> Any:
    """Those that the other run has keep their fields."""
    known = {one["name"]: one for one in (old or {}).get("benchmarks", ())}
    return {**(old or {}), "benchmarks": [known.get(name, {"name": name}) for name in _words(answer)]}


def _teacher(answer: str, old: Any) -> Any:
    """A model, or the URL of an endpoint, a blank and its model."""
    if not answer.startswith(("http://", "https://")):
        return {"model": answer, **{name: old[name] for name in old if name not in ("model", "endpoint", "revision")}}
    url, _, model = answer.partition(" ")
    if not model.strip():
        raise Wrong("write the endpoint's URL, a blank and the name of its model")
    return {"endpoint": {**old.get("endpoint", {}), "url": url, "model": model.strip()}}


def _teacher_shown(value: Any) -> str:
    endpoint = value.get("endpoint")
    return f"{endpoint['url']} {endpoint['model']}" if endpoint else str(value["model"])


@dataclass(frozen=True)
class Question:
    """How an answer is asked for, where it stands in a manifest, and how it is read and shown."""

    option: str
    text: str
    path: tuple[str, ...]
    read: Callable[[str, Any], Any] = _text
    shown: Callable[[Any], str] = str

    def find(self, body: Body) -> str:
        value: Any = body
        for name in self.path:
            value = value.get(name) or {}
        return self.shown(value) if value else NONE

    def put(self, body: Body, answer: str) -> Body:
        """The manifest with the answer."""
        made = copy.deepcopy(body)
        inner: Any = made
        for name in self.path[:-1]:
            inner = inner.setdefault(name, {})
        last = self.path[-1]
        if answer == NONE:
            inner.pop(last, None)
        else:
            inner[last] = self.read(answer, inner.get(last))
        return made


QUESTIONS = (
    Question("name", "Name of the run", ("metadata", "name")),
    Question("student", "Student: a model on the hub, or an s3:// folder", ("spec", "student", "model")),
    Question(
        "teacher",
        "Teacher: a model, or an endpoint's URL, a blank and its model",
        ("spec", "teacher"),
        _teacher,
        _teacher_shown,
    ),
    Question("prompts", "Prompts: s3://, hf:// or configmap://", ("spec", "prompts", "source")),
    Question("prompt-field", "Their field with the question", ("spec", "prompts", "fields", "prompt")),
    Question("reference-field", "Their field with the answer", ("spec", "prompts", "fields", "reference")),
    Question("limit", "How many of them; none: all", ("spec", "prompts", "limit"), _number),
    Question(
        "objectives",
        "Objectives: CGD, RefinedSFT, CFT, DistilledSFT, SFT",
        ("spec", "training", "objectives"),
        lambda answer, _: _words(answer),
        ",".join,
    ),
    Question("gpus", "GPUs of the training", ("spec", "training", "gpusPerWorker"), _number),
    Question(
        "benchmarks",
        f"Benchmarks, such as {', '.join(list(BENCHMARKS)[:3])}",
        ("spec", "evaluation"),
        _benchmarks,
        lambda value: ",".join(one["name"] for one in value["benchmarks"]),
    ),
    Question("storage", "Where the run stores its data", ("spec", "storage", "uri")),
    Question("storage-endpoint", "URL of that S3 server; none: AWS", ("spec", "storage", "endpoint")),
    Question(
        "storage-secret",
        "Secret with its keys; none: the pods' own cloud identity",
        ("spec", "storage", "credentialsSecretRef"),
        _secret,
        _named,
    ),
    Question("service-account", "ServiceAccount of the pods; none: default", ("spec", "serviceAccountName")),
    Question(
        "hub-secret",
        "Secret with a token of the hub, for gated models",
        ("spec", "hubTokenSecretRef"),
        _token,
        _named,
    ),
)


def copied(run: Body) -> Body:
    """Another run's manifest, as the start of a new one: without what the API server and tools have added."""
    meta = {"name": f"{run['metadata']['name']}-2"}
    return {"apiVersion": run["apiVersion"], "kind": run["kind"], "metadata": meta, "spec": copy.deepcopy(run["spec"])}


def filled(body: Body, given: Mapping[str, str], *, ask: bool) -> Body:
    """A manifest with the answers that were given as options; the others are asked for, or stay as they are. Raises
    Wrong."""
    for question in QUESTIONS:
        if (answer := given.get(question.option)) is not None:
            try:
                body = _judged(question, body, answer)
            except (Wrong, InvalidRun) as error:
                raise Wrong(f"--{question.option} {answer}: {error}") from error
        elif ask:
            body = _asked(question, body)
    return body


def _judged(question: Question, body: Body, answer: str) -> Body:
    made = question.put(body, answer)
    judged(made)
    return made


def _asked(question: Question, body: Body) -> Body:
    """Ask until the answer is right; an empty one is what stands there."""
    while True:
        write(f"{question.text} [{question.find(body)}]: ")
        sys.stdout.flush()
        if not (line := sys.stdin.readline()):
            raise Wrong("the input has ended: give the answers as options, and --yes to leave the others as they are")
        try:
            return _judged(question, body, line.strip()) if line.strip() else body
        except (Wrong, InvalidRun) as error:
            write(f"  {error}\n")
