"""The tokenised examples of a training as tensors, mapped from disk: only their order and lengths are in memory."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from cgd_stages.contract import Lesson
from cgd_stages.engines.sampler import CUT
from cgd_stages.store.rows import Key
from cgd_stages.training.dataset import SOURCE_SAMPLE
from cgd_stages.training.job import REJECTED_IDS
from cgd_stages.training.rollouts import RolloutKey

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]
"""The model's inputs, and the target mask: `target[i, t]` says that token t+1 is learned from position t."""


class Examples:
    """Examples in the order of their keys. One has one text or, in `Pairs`, two, each a sequence of tokens."""

    def __init__(self, path: Path) -> None:
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        order = pc.sort_indices(self._table, [("id", "ascending"), ("sample", "ascending")]).to_numpy()
        self._rows: list[int] = order.tolist()
        self._chosen: list[int] = pc.list_value_length(self._table["input_ids"]).to_numpy()[order].tolist()
        self.lengths: list[int] = self._chosen
        """Of each example, the tokens that it takes of a micro-batch's room."""
        self.starts: list[int] = self._table["start"].to_numpy()[order].tolist()

    def key(self, index: int) -> str:
        row = self._rows[index]
        return f"{self._table['id'][row]}/{self._table['sample'][row]}"

    def keys(self) -> list[Key]:
        """Of all examples."""
        ids, samples = (list[Any](self._table[name].to_pylist()) for name in ("id", "sample"))
        return [(ids[row], samples[row]) for row in self._rows]

    def sequence_lengths(self, indices: Sequence[int]) -> list[int]:
        """Tokens of each sequence of these examples, in the order of `tensors`."""
        return [self._chosen[index] for index in indices]

    def target_lengths(self, indices: Sequence[int]) -> list[int]:
        """Target tokens of each of these sequences."""
        starts = self._starts(indices)
        return [length - start for length, start in zip(self.sequence_lengths(indices), starts, strict=True)]

    def learned(self, indices: Sequence[int]) -> int:
        """Target tokens of these examples."""
        return sum(self.target_lengths(indices))

    def tensors(self, indices: Sequence[int], *, packing: bool) -> Batch:
        """Each tensor is (sequences, longest), padded at the right; packed, (1, tokens), with positions that begin
        again at every sequence. Without examples it has one token and no target: a rank without work must still take
        part in every collective operation.
        """
        sequences, starts = self._sequences(indices), self._starts(indices)
        return _packed(sequences, starts) if packing and len(sequences) > 1 else _padded(sequences, starts)

    def _starts(self, indices: Sequence[int]) -> list[int]:
        return [self.starts[index] for index in indices]

    def _sequences(self, indices: Sequence[int]) -> list[torch.Tensor]:
        return [self._ids("input_ids", index) for index in indices]

    def _ids(self, column: str, index: int) -> torch.Tensor:
        return torch.from_numpy(self._table[column][self._rows[index]].values.to_numpy().astype("int64"))


class Pairs(Examples):
    """Examples of two texts below one context: first the preferred text of each, then the other of each."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._rejected: list[int] = pc.list_value_length(self._table[REJECTED_IDS]).to_numpy()[self._rows].tolist()
        self.lengths = [2 * max(both) for both in zip(self._chosen, self._rejected, strict=True)]

    def sequence_lengths(self, indices: Sequence[int]) -> list[int]:
        return super().sequence_lengths(indices) + [self._rejected[index] for index in indices]

    def _starts(self, indices: Sequence[int]) -> list[int]:
        return 2 * super()._starts(indices)

    def _sequences(self, indices: Sequence[int]) -> list[torch.Tensor]:
        return super()._sequences(indices) + [self._ids(REJECTED_IDS, index) for index in indices]


class Scored(Examples):
    """Examples with the log-probabilities of each target token's likeliest alternatives, `top_k` of those stored."""

    def __init__(self, path: Path, scores: Path, top_k: int) -> None:
        super().__init__(path)
        self._scores, self._top_k = pa.ipc.open_file(pa.memory_map(str(scores))).read_all(), top_k
        keys = zip(self._scores["id"].to_pylist(), self._scores["sample"].to_pylist(), strict=True)
        places = {key: place for place, key in enumerate(keys)}
        own = zip(self._table["id"].to_pylist(), self._table[SOURCE_SAMPLE].to_pylist(), strict=True)
        self._places = [places[key] for key in own]

    def scores(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids, and log-probabilities in float32, (positions, top_k) by rank: a row for each target token, in the
        order in which `tensors` has them."""
        return self._column("top_ids", "int64", indices), self._column("top_logprobs", "float32", indices)

    def _column(self, name: str, dtype: str, indices: Sequence[int]) -> torch.Tensor:
        found = [np.empty((0, self._top_k), dtype)]
        for index in indices:
            values = self._scores[name][self._places[self._rows[index]]].values.to_numpy(zero_copy_only=False)
            found.append(values.reshape(self.target_lengths([index])[0], -1)[:, : self._top_k].astype(dtype))
        return torch.from_numpy(np.concatenate(found))


class Sampled(Examples):
    """What the student has sampled in a round, with the sampler's and the teacher's log-probabilities of each sampled
    token, and `top_k` of the teacher's likeliest ones."""

    def __init__(self, path: Path, top_k: int) -> None:
        super().__init__(path)
        self._top_k = top_k
        named = zip(*(self._table[name].to_pylist() for name in ("id", "sample", "step")), strict=True)
        rows = {row: index for index, row in enumerate(self._rows)}
        self.places: dict[RolloutKey, int] = {key: rows[row] for row, key in enumerate(named)}
        """The index of each example."""

    def scores(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids, and the teacher's log-probabilities in float32, (positions, top_k + 1): the likeliest ones by
        rank and, last, the token that was sampled, which may be among them."""
        ids, logprobs = (
            self._by_position(name, dtype, indices)
            for name, dtype in (("top_ids", "int64"), ("top_logprobs", "float32"))
        )
        tokens = [self._ids("input_ids", index)[self.starts[index] :] for index in indices]
        own = torch.cat([torch.empty(0, dtype=torch.long), *tokens])
        return torch.cat([ids, own[:, None]], 1), torch.cat([logprobs, self.teacher(indices)[:, None]], 1)

    def teacher(self, indices: Sequence[int]) -> torch.Tensor:
        """The teacher's log-probability of each sampled token, in the order in which `tensors` has them."""
        return self._by_token("teacher_logprobs", indices)

    def sampler(self, indices: Sequence[int]) -> torch.Tensor:
        """The sampler's."""
        return self._by_token("logprobs", indices)

    def is_cut(self, index: int) -> bool:
        """Whether the sample has no end."""
        return bool(self._table["finish"][self._rows[index]].as_py() == CUT)

    def top_mass(self, index: int) -> float:
        """The probability of the teacher's likeliest tokens together, summed over the sampled positions; 0 where none
        are stored."""
        if not self._top_k:
            return 0.0
        return float(self._by_position("top_logprobs", "float32", [index]).double().exp().sum())

    def _by_token(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        found = [np.empty(0, "float32"), *(self._values(name, index) for index in indices)]
        return torch.from_numpy(np.concatenate(found))

    def _by_position(self, name: str, dtype: str, indices: Sequence[int]) -> torch.Tensor:
        found = [np.empty((0, self._top_k), dtype)]
        for index in indices:
            values = self._values(name, index).reshape(self.target_lengths([index])[0], -1)
            found.append(values[:, : self._top_k].astype(dtype))
        return torch.from_numpy(np.concatenate(found))

    def _values(self, name: str, index: int) -> NDArray[Any]:
        values: NDArray[Any] = self._table[name][self._rows[index]].values.to_numpy(zero_copy_only=False)
        return values


class Mixed(Examples):
    """A round's examples: those that the student has sampled and, of a share below 1, stored ones, as `parts` has
    them."""

    def __init__(self, parts: Sequence[tuple[Sampled | Scored, int]]) -> None:
        self._parts = parts
        self._chosen = self.lengths = [examples.lengths[index] for examples, index in parts]
        self.starts = [examples.starts[index] for examples, index in parts]

    def key(self, index: int) -> str:
        examples, place = self._parts[index]
        return examples.key(place)

    def scores(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """As in `Sampled`; where no token was sampled, the likeliest one stands there a second time."""
        found = [examples.scores([place]) for examples, place in self._of(indices)]
        width = max((ids.shape[1] for ids, _ in found), default=1)
        ids, logprobs = (
            zip(*(tuple(_widened(one, width) for one in both) for both in found), strict=True) if found else ((), ())
        )
        return torch.cat([torch.empty(0, width, dtype=torch.long), *ids]), torch.cat([torch.empty(0, width), *logprobs])

    def teacher(self, indices: Sequence[int]) -> torch.Tensor:
        """The teacher's log-probability of each target token that was sampled, nan of the others."""
        return torch.cat([torch.empty(0), *(self._of_sampled(Sampled.teacher, index) for index in indices)])

    def sampler(self, indices: Sequence[int]) -> torch.Tensor:
        """The sampler's."""
        return torch.cat([torch.empty(0), *(self._of_sampled(Sampled.sampler, index) for index in indices)])

    def sampled_tokens(self, indices: Sequence[int]) -> int:
        """How many target tokens of these examples were sampled."""
        return sum(examples.learned([place]) for examples, place in self._sampled(indices))

    def told(self, indices: Sequence[int]) -> dict[str, float]:
        """Figures of the samples among these examples."""
        sampled = self._sampled(indices)
        if not sampled:
            return {"samples": 0}
        tokens = self.sampled_tokens(indices)
        figures = {
            "samples": len(sampled),
            "sample_tokens": round(tokens / len(sampled), 2),
            "samples_cut": round(sum(examples.is_cut(place) for examples, place in sampled) / len(sampled), 4),
        }
        mass = sum(examples.top_mass(place) for examples, place in sampled)
        return figures | ({"teacher_top_mass": round(mass / tokens, 6)} if mass else {})

    def _of(self, indices: Sequence[int]) -> list[tuple[Sampled | Scored, int]]:
        return [self._parts[index] for index in indices]

    def _sampled(self, indices: Sequence[int]) -> list[tuple[Sampled, int]]:
        return [(examples, place) for examples, place in self._of(indices) if isinstance(examples, Sampled)]

    def _of_sampled(self, read: Callable[[Sampled, Sequence[int]], torch.Tensor], index: int) -> torch.Tensor:
        examples, place = self._parts[index]
        if isinstance(examples, Sampled):
            return read(examples, [place])
        return torch.full((examples.learned([place]),), torch.nan)

    def _ids(self, column: str, index: int) -> torch.Tensor:
        examples, place = self._parts[index]
        return examples._ids(column, place)


def examples_in(path: Path, scores: Path, work: Lesson) -> Examples:
    """The examples in a file, as the objective reads them."""
    if work.objective == "DPO":
        return Pairs(path)
    return Scored(path, scores, work.top_k or 0) if work.scores else Examples(path)


def _widened(values: torch.Tensor, width: int) -> torch.Tensor:
    """(positions, width), the first column again where there are fewer."""
    return torch.cat([values, values[:, :1].expand(-1, width - values.shape[1])], 1)


def _padded(sequences: Sequence[torch.Tensor], starts: Sequence[int]) -> Batch:
    longest = max(map(len, sequences), default=1)
    ids = torch.zeros(max(1, len(sequences)), longest, dtype=torch.long)
    attention, target = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        length = len(sequence)
        ids[row, :length] = sequence
        attention[row, :length] = 1
        target[row, start - 1 : length - 1] = True
    padded = any(len(sequence) < longest for sequence in sequences)
    return {"input_ids": ids} | ({"attention_mask": attention} if padded else {}), target


def _packed(sequences: Sequence[torch.Tensor], starts: Sequence[int]) -> Batch:
    """Without an attention mask, transformers keeps sequences apart wherever positions begin again."""
    ids = torch.cat(list(sequences))
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
    target, end = torch.zeros_like(ids, dtype=torch.bool), 0
    for sequence, start in zip(sequences, starts, strict=True):
        begin, end = end, end + len(sequence)
        target[begin + start - 1 : end - 1] = True
    return {"input_ids": ids[None], "position_ids": positions[None]}, target[None]
