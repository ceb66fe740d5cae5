"""What the page says word for word: the prompts of each stage, the run's whole manifest, where its models are and how
to serve them, and what made them. Pure."""

import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from cgd_stages.chat.messages import Message
from cgd_stages.contract import Role, StageName
from cgd_stages.method.prompts import SLOTS, answer_messages, role_messages
from cgd_stages.results.formatting import listed
from cgd_stages.results.model import ReportData

API_VERSION = "cgd.dev/v1alpha1"

METRICS = {
    "train_examples": "Examples learned",
    "validation_examples": "Examples held out",
    "trained_tokens": "Tokens in all",
    "supervised_tokens": "Target tokens",
    "tokens_per_second": "Target tokens a second",
    "first_loss": "First loss",
    "final_loss": "Last loss",
    "validation_loss": "Loss on held-out prompts",
    "exported_step": "Step of the exported model",
    "steps": "Optimizer steps",
    "mfu": "Share of the GPUs' peak (MFU)",
    "peak_memory_bytes": "Peak memory of a GPU, bytes",
    "without_thought": "Targets without a thought",
    "misled_examples": "Examples with a miscritique",
    "bare_examples": "Examples of the prompt alone",
    "router_loss": "Loss of the routers",
    "early_accuracy": "Right early questions, share",
    "early_accuracy_before": "Right early questions before the training, share",
    "bare_validation_loss": "Loss on held-out prompts, the prompt alone",
}
"""What figures of a training are called; others have the words of their keys."""


def short_name(model: str) -> str:
    """A hub id unchanged; the last part of a path or a URI."""
    return model.rstrip("/").rsplit("/", 1)[-1] if model.startswith(("/", ".", "~", "s3://")) else model


def named(metric: str) -> str:
    """How people call a figure: never its raw key."""
    return METRICS.get(metric) or metric.replace("_", " ").capitalize()


@dataclass(frozen=True)
class Asked:
    """The messages of a stage, with marks in place of a row's texts."""

    what: str
    messages: tuple[Message, ...]
    own: bool = False
    """Whether the manifest has words of its own."""


def asked(report: ReportData) -> tuple[Asked, ...]:
    """What each model was asked, of the stages that have ended; and what evaluation asks, which is x alone."""
    return tuple(_asked(report))


def _asked(report: ReportData) -> Iterator[Asked]:
    for stage in report.stages:
        if stage.facts is None:
            continue
        if stage.name in get_args(Role):
            role: Role = next(role for role in get_args(Role) if role == stage.name)
            instruction = stage.inputs.get("instruction")
            yield Asked(stage.name, tuple(role_messages(role, SLOTS, instruction)), own=instruction is not None)
    if report.evaluations:
        yield Asked("evaluation", tuple(answer_messages("{question} and the benchmark's instruction")))


def manifest(report: ReportData) -> str:
    """The run as a manifest that `kubectl apply` takes, under its own name."""
    run = report.run
    head = f"apiVersion: {API_VERSION}\nkind: CGDRun\nmetadata:\n  name: {run.name}\n  namespace: {run.namespace}\n"
    return f"{head}spec:\n{textwrap.indent(report.spec.rstrip(), '  ')}\n"


@dataclass(frozen=True)
class Place:
    """A trained model: the address of its files, and the commands that serve it here, or bring it here."""

    stage: StageName
    uri: str
    commands: str


def places(report: ReportData) -> tuple[Place, ...]:
    """The trained models that are stored."""
    run, found = report.run, []
    for stage in report.stages:
        if stage.name.kind == "train" and stage.facts and stage.facts.output_uri:
            folder = f"{run.name}-{stage.name.model}"
            words = ["cgd", "pull", run.name, "-n", run.namespace, "--stage", stage.name, "-o", folder]
            run_it = ["cgd", "serve", *words[2:], "--run"]
            commands = f"{shlex.join(run_it)}\n# or the files alone:\n{shlex.join(words)}"
            found.append(Place(stage.name, f"{stage.facts.output_uri.rstrip('/')}/model", commands))
    return tuple(found)


# --- what made it --------------------------------------------------------------------------------------------------


def made_with(report: ReportData) -> list[tuple[str, str]]:
    """The versions and devices that made the run's outputs, by what they are of; with the stages where they differ."""
    found: dict[str, dict[str, list[str]]] = {}
    for stage in report.stages:
        told = dict(stage.made.get("versions", {}))
        if device := stage.settings.get("deviceName"):
            told["Device"] = device
        for what, name in told.items():
            found.setdefault(what, {}).setdefault(str(name), []).append(stage.name)
    return [(what, _where(names)) for what, names in found.items()]


def _where(names: dict[str, list[str]]) -> str:
    if len(names) == 1:
        return next(iter(names))
    return "; ".join(f"{name} ({', '.join(stages)})" for name, stages in names.items())


def found_stages(report: ReportData) -> dict[str, str]:
    """The stages that another run had made before, or a run of this name that is deleted: stage -> that run's name."""
    return {
        stage.name: str(stage.made.get("run", ""))
        for stage in report.stages
        if stage.made and stage.made.get("uid") != report.run.uid
    }


def told_of_found(found: dict[str, str]) -> str:
    """Which they are, in a sentence; empty without any."""
    runs: dict[str, list[str]] = {}
    for stage, run in found.items():
        runs.setdefault(run, []).append(stage)
    of = [f"{listed(stages)} (by {run})" for run, stages in runs.items()]
    return f"Found in the store, made by an earlier run: {'; '.join(of)}." if of else ""
