"""What models answered, question by question: as text in a table, as numbers for a test. Pure."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cgd_stages.results.model import Evaluations, Sample

PATTERN = r"^(\d{1,4}/\d{1,4}( \d{1,4}/\d{1,4})*)?$"
"""Of the text: `right/graded` for each question, in the order of their ids; `0/0` where the model has no grade."""


@dataclass(frozen=True)
class Answers:
    """A model's outputs on the questions of a benchmark. Outputs that the grader could not decide on are no part."""

    right: NDArray[np.int64]
    """For each question, the outputs that are right."""
    graded: NDArray[np.int64]
    """For each question, the outputs that have a grade."""

    @classmethod
    def read(cls, text: str) -> "Answers":
        """The answers in a text of `PATTERN`."""
        pairs = [pair.split("/") for pair in text.split()]
        right, graded = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return cls(right, graded)

    @property
    def text(self) -> str:
        return " ".join(f"{right}/{graded}" for right, graded in zip(self.right, self.graded, strict=True))


def answers_of(evaluations: Evaluations) -> dict[tuple[str, str], str]:
    """Model and benchmark -> the text of the model's answers to all questions that a model of the run was asked."""
    ids: dict[str, set[str]] = {}
    outputs: dict[tuple[str, str], list[Sample]] = {}
    for model, samples in evaluations.items():
        for sample in samples:
            ids.setdefault(sample.benchmark, set()).add(sample.id)
            outputs.setdefault((model, sample.benchmark), []).append(sample)
    places = {benchmark: {name: i for i, name in enumerate(sorted(names))} for benchmark, names in ids.items()}
    texts = {}
    for (model, benchmark), group in outputs.items():
        right, graded = np.zeros((2, len(places[benchmark])), dtype=np.int64)
        for output in group:
            if not output.grade_error:
                right[places[benchmark][output.id]] += output.correct
                graded[places[benchmark][output.id]] += 1
        texts[model, benchmark] = Answers(right, graded).text
    return texts
