"""Which prompts nearly repeat others, in time and memory linear in their number. Pure; the order of adding is nothing.

Two prompts are alike when the sets of their word triples have a Jaccard similarity (shared of all) of `ALIKE` or more.
It is estimated by MinHash (Broder, 1997): the share of `HASHES` hash functions with the same least value over both
sets. Its standard error at a similarity s is the root of s (1 - s) / HASHES, 3.5 points at 0.8: of pairs at 0.7 one in
200 is called alike, of pairs at 0.9 one in 2,800 is not. Pairs are looked for among those that agree in one of `BANDS`
groups of hash functions (at 0.8 all but one in 20 million do), and of these only among those that follow each other, so
that a text that all prompts share costs no more than another.

Not by datasketch (2.0): it counts as well, but takes five times as long and three times the memory for 20,000 prompts,
and its groups are others than those that runs have stored.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

ALIKE = 0.8
WORDS = 3
"""Words in a row that are compared as one. A shorter prompt is one such run as a whole."""
HASHES, BANDS = 128, 32

Pair = tuple[int, int]
Words64 = npt.NDArray[np.uint64]

_RANDOM = np.random.default_rng(20250516)
_FACTORS = _RANDOM.integers(2**64, size=(HASHES, 1), dtype=np.uint64) | np.uint64(1)
_OFFSETS = _RANDOM.integers(2**64, size=(HASHES, 1), dtype=np.uint64)
_PLACES = _RANDOM.integers(2**64, size=max(WORDS, HASHES // BANDS), dtype=np.uint64) | np.uint64(1)


@dataclass(frozen=True)
class Group:
    """Prompts that hang together by pairs that are alike; its ends may be less so."""

    ids: tuple[str, ...]
    """Sorted."""
    pair: tuple[str, str]
    """The first and the first that is like it."""


@dataclass
class Signatures:
    """Half a kilobyte for each prompt, and as much again when they are grouped."""

    ids: list[str] = field(default_factory=list)
    _data: bytearray = field(default_factory=bytearray)

    def add(self, identity: str, words: Iterable[str]) -> None:
        self.ids.append(identity)
        self._data += signature(words).tobytes()

    def groups(self) -> list[Group]:
        """Groups of two or more, the largest first."""
        order = sorted(range(len(self.ids)), key=self.ids.__getitem__)
        pairs = alike(np.frombuffer(self._data, np.uint32).reshape(-1, HASHES)[order])
        members: dict[int, list[int]] = {}
        for place, head in _heads(pairs).items():
            members.setdefault(head, []).append(place)
        # The head is the first of its group, so that a pair that holds it is there, and the first that does comes last.
        first = dict(reversed(pairs))
        ids = [self.ids[place] for place in order]
        groups = [
            Group(ids=tuple(ids[place] for place in sorted(places)), pair=(ids[head], ids[first[head]]))
            for head, places in members.items()
        ]
        return sorted(groups, key=lambda group: (-len(group.ids), group.ids))


def _heads(pairs: list[Pair]) -> dict[int, int]:
    """Of everything in a pair, the first of what hangs together with it."""
    heads: dict[int, int] = {}

    def head(place: int) -> int:
        while (above := heads.setdefault(place, place)) != place:
            heads[place] = place = heads[above]
        return place

    for one, other in pairs:
        first, second = sorted((head(one), head(other)))
        heads[second] = first
    return {place: head(place) for place in list(heads)}


def signature(words: Iterable[str]) -> npt.NDArray[np.uint32]:
    """The least value of each hash function over the runs of `WORDS` words, of at least one word."""
    hashes = np.array([zlib.crc32(word.encode()) for word in words], np.uint64)
    runs = _mixed(np.lib.stride_tricks.sliding_window_view(hashes, min(WORDS, len(hashes))))
    least: npt.NDArray[np.uint64] = (_FACTORS * runs + _OFFSETS).min(axis=1)
    return (least >> np.uint64(32)).astype(np.uint32)


def alike(signatures: npt.NDArray[np.uint32]) -> list[Pair]:
    """Places of signatures that agree in the share `ALIKE` or more, each pair once, sorted."""
    size = HASHES // BANDS
    found: set[Pair] = set()
    for first in range(0, HASHES, size):
        band = _mixed(signatures[:, first : first + size].astype(np.uint64))
        order = np.argsort(band, kind="stable")  # the first of a pair stays the first
        meet = np.flatnonzero(band[order[1:]] == band[order[:-1]])
        for start in range(0, len(meet), 4096):
            places = meet[start : start + 4096]
            one, other = order[places], order[places + 1]
            enough = (signatures[one] == signatures[other]).mean(axis=1) >= ALIKE
            found.update(zip(one[enough].tolist(), other[enough].tolist(), strict=True))
    return sorted(found)


def _mixed(rows: Words64) -> Words64:
    """One well-mixed number for each row."""
    mixed: Words64 = (rows * _PLACES[: rows.shape[1]]).sum(axis=1, dtype=np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return mixed ^ (mixed >> np.uint64(29))
