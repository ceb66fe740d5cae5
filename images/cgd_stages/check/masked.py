"""One example of each training as text, for the page: what the student reads, and what it learns.

Shown is the row that comes first by its key of those that every training learns, so that the trainings show the same
row wherever one of them is no exception. Of each training the first `KEPT` examples are kept until that is known.
"""

import json
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from cgd_stages.chat.example import Example
from cgd_stages.results.model import MASKED, Masked
from cgd_stages.store.folder import Folder, Part
from cgd_stages.store.rows import Key
from cgd_stages.training.dataset import Dataset

KEPT = 20


@dataclass
class FirstExamples:
    """The first examples of one training, by their keys; held-out rows, which are not learned, are left out."""

    dataset: Dataset
    kept: list[tuple[Key, Example]] = field(default_factory=list)

    def add(self, key: Key, example: Example) -> None:
        is_later = len(self.kept) == KEPT and key > self.kept[-1][0]
        if not is_later and key[0] not in self.dataset.held_out:
            insort(self.kept, (key, example), key=lambda pair: pair[0])
            del self.kept[KEPT:]

    def masked(self, learned: Iterable[Key]) -> Masked | None:
        """The first of the rows that are learned; None if none of the kept ones is."""
        keys = set(learned)
        first = next(((key, example) for key, example in self.kept if key in keys), None)
        if first is None:
            return None
        (identity, sample), example = first
        decode, start = self.dataset.template.tokenizer.decode, example.start
        return Masked(
            stage=self.dataset.work.stage,
            title=self.dataset.work.title,
            id=identity,
            sample=sample,
            context=decode(example.input_ids[:start]),
            target=decode(example.input_ids[start:]),
            context_tokens=start,
            target_tokens=len(example.input_ids) - start,
        )


def store(folder: Folder, examples: Iterable[FirstExamples], learned: Iterable[Key]) -> Part:
    """Store the example of every training that has one."""
    keys = set(learned)
    shown = [masked.model_dump(by_alias=True) for one in examples if (masked := one.masked(keys))]
    return folder.put(MASKED, json.dumps(shown, ensure_ascii=False).encode(errors="replace"), alone=True)
