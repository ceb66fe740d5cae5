"""What a model thinks of tokens that are there already: vLLM in this process computes their log-probabilities.

vLLM 0.32 gives log-probabilities of a prompt's tokens for the whole prompt, before any temperature: at each position
the K likeliest tokens by rank, and the token that stands there, which makes K or K + 1; none for the first position.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import numpy as np
from numpy.typing import NDArray

from cgd_stages import contract
from cgd_stages.engines.vllm import TokenText, device_of, finished, start_vllm

BATCH_TOKENS = 4096
"""Tokens of an engine step, unless the run says otherwise: each has a row of logits as wide as the vocabulary."""
ROOM = 64
"""Texts that the engine has at a time."""


@dataclass(frozen=True)
class Scores:
    """Log-probabilities (positions,) of the scored tokens, and of the K likeliest tokens of each position, by rank."""

    name: str
    logprobs: NDArray[np.float32]
    top_ids: NDArray[np.int32]
    """(positions, K)"""
    top_logprobs: NDArray[np.float32]
    """(positions, K)"""

    @property
    def mass(self) -> float:
        """The probability of the likeliest tokens together, summed over the positions."""
        return float(np.exp(self.top_logprobs.astype(np.float64)).sum())


class Scorer:
    """A warm model that scores. Raises UserError when the model does not load."""

    def __init__(self, model: Path, engine: contract.Engine, top_k: int) -> None:
        given = engine.model_copy(update={"max_num_batched_tokens": engine.max_num_batched_tokens or BATCH_TOKENS})
        self._llm, self._top_k = start_vllm(model, given, None), top_k
        config = self._llm.vllm_config
        self.limit = int(config.model_config.max_model_len) - 1
        """The most tokens of a text: the engine writes one more."""
        self.vocabulary = int(config.model_config.get_vocab_size())
        """The tokens that the model has; it takes no text with others."""
        self.settings = {"engine": "vllm", **device_of(config), "maxModelLen": self.limit + 1}

    def scores(self, texts: Iterable[TokenText], stop: Event) -> Iterator[Scores]:
        """The scores of each text that is within the limit, in no promised order, until `stop`.

        Raises TransientError when the engine dies.
        """
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=self._top_k, detokenize=False, flat_logprobs=False
        )
        for text, output in finished(self._llm, ((text, params) for text in texts), stop, ROOM):
            yield self._scores(text, output.prompt_logprobs)

    def _scores(self, text: TokenText, told: Sequence[dict[int, object]]) -> Scores:
        """`told`: for each position of the prompt, token id -> vLLM's Logprob (logprob, rank)."""
        count = len(text.ids) - text.start
        own, ids = np.empty(count, np.float32), np.empty((count, self._top_k), np.int32)
        logprobs = np.empty((count, self._top_k), np.float32)
        for place, position in enumerate(range(text.start, len(text.ids))):
            entries = told[position]
            own[place] = entries[text.ids[position]].logprob  # type: ignore[attr-defined]
            by_rank = sorted(entries.items(), key=lambda entry: entry[1].rank)[: self._top_k]  # type: ignore[attr-defined]
            ids[place] = [token for token, _ in by_rank]
            logprobs[place] = [entry.logprob for _, entry in by_rank]  # type: ignore[attr-defined]
        return Scores(text.name, own, ids, logprobs)

    def close(self) -> None:
        self._llm.engine_core.shutdown()


def is_sound(scores: Scores) -> bool:
    """Whether the scores are a distribution: numbers below 0, of which -inf is one, that sum up to no more than 1."""
    sums = np.exp(scores.top_logprobs.astype(np.float64)).sum(axis=1)
    return not np.isnan(scores.top_logprobs).any() and bool((sums <= 1 + 1e-3).all()) and not math.isnan(scores.mass)
