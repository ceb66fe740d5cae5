"""Finds prompts that nearly repeat others, in time and memory linear in their number. Pure; independent of their order.

Two prompts are alike when the sets of their word triples have a Jaccard similarity (shared of all) of `ALIKE` or more.
MinHash (Broder, 1997) estimates it: the share of `HASHES` hash functions with the same least value over both sets. The
standard error at a similarity s is the root of s (1 - s) / HASHES, 3.5 points at 0.8: one in 200 pairs at 0.7 counts as
alike, and one in 2,800 pairs at 0.9 does not. Only pairs that agree in one of `BANDS` groups of hash functions are
compared (at 0.8 all but one in 20 million do), and of these only neighbours, so that a text that all prompts share
costs no more than another.

It does not use datasketch (2.0), which is as exact but takes five times as long and three times the memory for 20,000
prompts, and would form other groups than those that runs have stored.
"""

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cgd_stages.quality.contamination import words_of
from cgd_stages.store.rows import Row

ALIKE = 0.8
WORDS = 3
"""The words in a row that are compared as one. A shorter prompt is compared as a whole."""
HASHES, BANDS = 128, 32

Pair = tuple[int, int]
Words64 = npt.NDArray[np.uint64]

_RANDOM = np.random.default_rng(20250516)
_FACTORS = _RANDOM.integers(2**64, size=(HASHES, 1), dtype=np.uint64) | np.uint64(1)
_OFFSETS = _RANDOM.integers(2**64, size=(HASHES, 1), dtype=np.uint64)
_PLACES = _RANDOM.integers(2**64, size=max(WORDS, HASHES // BANDS), dtype=np.uint64) | np.uint64(1)


@dataclass(frozen=True)
class Group:
    """Prompts that pairs connect, each of two prompts that are alike. Two prompts of a group may be less alike."""

    ids: tuple[str, ...]
    """Sorted."""
    pair: tuple[str, str]
    """The first prompt, and the first that is like it."""


def outline(row: Row) -> list[str]:
    """The words of a row's prompt and of the turns before it that are compared: without numbers, case and punctuation.
    A prompt without words is a word itself."""
    prompt = row["prompt"] + (row.get("turns") or "")
    return (re.sub(r"\d+", "0", " ".join(words_of(prompt))) or prompt).split(" ")


@dataclass
class Signatures:
    """The signatures of prompts: half a kilobyte for each, and as much again while they are grouped."""

    ids: list[str] = field(default_factory=list)
    _data: bytearray = field(default_factory=bytearray)

    def add(self, identity: str, words: Iterable[str]) -> None:
        self.ids.append(identity)
        self._data += signature(words).tobytes()

    def groups(self) -> list[Group]:
        """The groups of two or more prompts, the largest first."""
        order = sorted(range(len(self.ids)), key=self.ids.__getitem__)
        pairs = alike(np.frombuffer(self._data, np.uint32).reshape(-1, HASHES)[order])
        members: dict[int, list[int]] = {}
        for place, head in _heads(pairs).items():
            members.setdefault(head, []).append(place)
        # A head is the first of its group, so it begins a pair; reversed, the first such pair is the one that stays.
        partners = dict(reversed(pairs))
        ids = [self.ids[place] for place in order]
        groups = [
            Group(ids=tuple(ids[place] for place in sorted(places)), pair=(ids[head], ids[partners[head]]))
            for head, places in members.items()
        ]
        return sorted(groups, key=lambda group: (-len(group.ids), group.ids))


def _heads(pairs: list[Pair]) -> dict[int, int]:
    """Maps every place in a pair to the first place of its group (union-find)."""
    parents: dict[int, int] = {}

    def head(place: int) -> int:
        while (parent := parents.setdefault(place, place)) != place:
            parents[place] = place = parents[parent]
        return place

    for left, right in pairs:
        first, second = sorted((head(left), head(right)))
        parents[second] = first
    return {place: head(place) for place in list(parents)}


def signature(words: Iterable[str]) -> npt.NDArray[np.uint32]:
    """The least value of each hash function over the runs of `WORDS` words. There must be at least one word."""
    hashes = np.array([zlib.crc32(word.encode()) for word in words], np.uint64)
    runs = _mixed(np.lib.stride_tricks.sliding_window_view(hashes, min(WORDS, len(hashes))))
    least: npt.NDArray[np.uint64] = (_FACTORS * runs + _OFFSETS).min(axis=1)
    return (least >> np.uint64(32)).astype(np.uint32)


def alike(signatures: npt.NDArray[np.uint32]) -> list[Pair]:
    """The places of signatures that agree in the share `ALIKE` or more, each pair once, sorted."""
    size = HASHES // BANDS
    pairs: set[Pair] = set()
    for first in range(0, HASHES, size):
        band = _mixed(signatures[:, first : first + size].astype(np.uint64))
        order = np.argsort(band, kind="stable")  # the first of a pair stays the first
        equal_neighbours = np.flatnonzero(band[order[1:]] == band[order[:-1]])
        for start in range(0, len(equal_neighbours), 4096):
            places = equal_neighbours[start : start + 4096]
            left, right = order[places], order[places + 1]
            similar = (signatures[left] == signatures[right]).mean(axis=1) >= ALIKE
            pairs.update(zip(left[similar].tolist(), right[similar].tolist(), strict=True))
    return sorted(pairs)


def _mixed(rows: Words64) -> Words64:
    """A hash of each row."""
    mixed: Words64 = (rows * _PLACES[: rows.shape[1]]).sum(axis=1, dtype=np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return mixed ^ (mixed >> np.uint64(29))
