"""A student that samples while it is trained: vLLM in this process, which takes new weights without a new start.

Samples are drawn at temperature 1 from all tokens, with the log-probability of each, so that they are the model's own
distribution and nothing has to be corrected later.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import numpy as np
from numpy.typing import NDArray

from cgd_stages import contract
from cgd_stages.chat.template import ChatTemplate
from cgd_stages.engines.vllm import SETTINGS_HINT, TokenText, device_of, finished, start_vllm
from cgd_stages.errors import UserError

log = logging.getLogger(__name__)

CUT = "length"
"""How a sample ends that has no end token."""


@dataclass(frozen=True)
class Prompt(TokenText):
    """A context, `ids[:start]`, of which at most `most` more tokens are sampled, by a seed of its own where the device
    can do that."""

    most: int
    seed: int


@dataclass(frozen=True)
class Sample:
    """The tokens that the model has sampled behind a prompt's context, with the one that ended them unless `finish` is
    CUT, and the log-probability (tokens,) of each."""

    name: str
    ids: list[int]
    logprobs: NDArray[np.float32]
    finish: str


class Sampler:
    """A warm model that samples. Raises UserError when the model does not load."""

    def __init__(self, model: Path, engine: contract.Engine, template: ChatTemplate) -> None:
        self._llm, self._stops = start_vllm(model, engine, template), list(template.extra_stops)
        config = self._llm.vllm_config
        self._room = 2 * int(config.scheduler_config.max_num_seqs)
        self.settings = {
            "engine": "vllm",
            **device_of(config),
            "maxModelLen": int(config.model_config.max_model_len),
        }

    def take(self, weights: Path) -> None:
        """Take the weights of the folder, which has a model of the same shape, in place of those it had. Call it when
        no sample is under way. Raises UserError when they do not fit."""
        started = time.monotonic()
        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(weights)})
        except (ValueError, KeyError, AttributeError, NotImplementedError, AssertionError) as error:
            message = f"vLLM cannot take the weights of a round: {type(error).__name__}: {error}"
            raise UserError(message, hint=SETTINGS_HINT) from error
        # What the cache holds was computed with the weights before.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM's prefix cache was not emptied: samples are under way")
        log.info("new weights in %.1f s", time.monotonic() - started)

    def samples(self, prompts: Iterable[Prompt], stop: Event) -> Iterator[Sample]:
        """A sample of each prompt, in no promised order, until `stop`. Raises TransientError when the engine dies."""
        asked = ((prompt, self._params(prompt)) for prompt in prompts)
        for prompt, output in finished(self._llm, asked, stop, self._room):
            (drawn,) = output.outputs
            ids = list(drawn.token_ids)
            own = [given[token].logprob for token, given in zip(ids, drawn.logprobs, strict=True)]
            yield Sample(prompt.name, ids, np.asarray(own, np.float32), str(drawn.finish_reason))

    def _params(self, prompt: Prompt) -> object:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=prompt.most,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            seed=prompt.seed,
            logprobs=0,
            flat_logprobs=False,
            detokenize=False,
            stop_token_ids=self._stops,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def close(self) -> None:
        self._llm.engine_core.shutdown()
