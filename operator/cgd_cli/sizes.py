"""What an estimate knows by itself: GPUs, by the data sheets of their maker, and the size of the tasks of lm-eval;
and the sizes that names of models tell."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU: FLOP/s in bfloat16 (dense), bytes/s, bytes."""

    flops: float
    bandwidth: float
    memory: float


GPUS = {
    "a100-40gb": Gpu(312e12, 1555e9, 40e9),
    "a100-80gb": Gpu(312e12, 2039e9, 80e9),
    "h100-80gb": Gpu(989e12, 3350e9, 80e9),
    "h200": Gpu(989e12, 4800e9, 141e9),
    "l40s": Gpu(362e12, 864e9, 48e9),
}


@dataclass(frozen=True, kw_only=True)
class TaskSize:
    """The size of a task. `characters` counts a question with everything that the task puts before it except shots."""

    parts: tuple[int, ...]
    """Documents of each part; a limit applies to each part."""
    characters: int
    shot: int = 0
    """Characters of an example."""
    choices: int = 0
    """Mean requests for a document where the task compares the likelihoods of choices; 0: the model writes one text."""
    max_tokens: int = 1
    """Tokens that a request may write."""

    def documents(self, limit: int | None) -> int:
        return sum(part if limit is None else min(part, limit) for part in self.parts)


# EvalScope's documentation publishes the numbers of documents and the mean prompts (looked up in November 2026). We
# counted the examples of BBH in lm-eval's files, and split the prompt of MMLU-Pro by the sizes in its data card.
# TruthfulQA: lm-eval's preamble, counted, and a guess for question and choice. HumanEval: the heads of its functions,
# which the task for chat models states twice. We found no published mean of the choices: MuSR has 2 and 3 in two of
# its parts, and 3 is a guess for all three; 5 is a guess for TruthfulQA. `max_tokens` comes from lm-eval's files; GPQA
# sets none there and gets what the stage gives such tasks.
TASK_SIZES = {
    "ifeval": TaskSize(parts=(541,), characters=211, max_tokens=1280),
    "gpqa_diamond_cot_zeroshot": TaskSize(parts=(198,), characters=841, max_tokens=4096),
    "mmlu_pro": TaskSize(
        parts=(717, 789, 1132, 410, 844, 969, 818, 381, 1101, 1351, 924, 499, 1299, 798),
        characters=600,
        shot=870,
        max_tokens=2048,
    ),
    "leaderboard_musr": TaskSize(parts=(250, 256, 250), characters=4892, choices=3),
    "truthfulqa_mc1": TaskSize(parts=(817,), characters=700, choices=5),
    "humaneval": TaskSize(parts=(164,), characters=460, max_tokens=1024),
    "humaneval_instruct": TaskSize(parts=(164,), characters=1040, max_tokens=1024),
    "bbh_cot_fewshot": TaskSize(parts=(*24 * (250,), 187, 146, 178), characters=540, shot=923, max_tokens=1024),
}
"""lm-eval's name of a task -> its size."""


# --- sizes in names

_SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s?([BM])(?![A-Za-z])", re.IGNORECASE)
_UNITS = {"B": 1e9, "M": 1e6}


_GPT_OSS = re.compile(r"(?<![a-z])gpt-oss-(20|120)b(?![a-z0-9])[^/]*$", re.IGNORECASE)
GPT_OSS_ACTIVE = {"20": 3.6e9, "120": 5.1e9}
"""What a token meets of a gpt-oss, whose names do not say it (its model card)."""
_ACTIVE = re.compile(r"(?<=-)A(\d+(?:\.\d+)?)\s?([BM])(?![A-Za-z])", re.IGNORECASE)
_ACTIVE_FIRST = re.compile(r"moe.*?(?<![\w.])(\d+(?:\.\d+)?)([BM])-(\d+(?:\.\d+)?)([BM])(?![A-Za-z])", re.IGNORECASE)
"""OLMoE-1B-7B: what a token meets, and all."""
_BESIDE_EXPERTS = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)([BM])-\d+E(?![A-Za-z])", re.IGNORECASE)
"""Llama-4-Scout-17B-16E: what a token meets, and a number of experts."""


def size_in(text: str) -> float | None:
    """The number of parameters in a name or an option: 8B, Llama-3.1-8B-Instruct, SmolLM2-135M; None without one, and
    for a mixture whose name does not say which of its parameters it counts."""
    name = text.rsplit("/", 1)[-1]
    if both := _ACTIVE_FIRST.search(name):
        return float(both[3]) * _UNITS[both[4].upper()]
    if _BESIDE_EXPERTS.search(name) or ("moe" in name.lower() and not _ACTIVE.search(name)):
        return None
    size = _SIZE.search(name)
    return float(size[1]) * _UNITS[size[2].upper()] if size else None


def active_in(text: str) -> float | None:
    """The number of parameters that a token meets of a mixture, in such a name or option: Qwen3-30B-A3B, 47B-A13B."""
    if gpt_oss := _GPT_OSS.search(text):
        return GPT_OSS_ACTIVE[gpt_oss[1]]
    name = text.rsplit("/", 1)[-1]
    size = _ACTIVE.search(name) or _ACTIVE_FIRST.search(name) or _BESIDE_EXPERTS.search(name)
    return float(size[1]) * _UNITS[size[2].upper()] if size else None
