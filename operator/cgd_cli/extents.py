"""How much the tasks of lm-eval that are known by name ask a model, for the estimate of their cost."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much a task of lm-eval asks. `characters`: of a question with all that the task puts before it but shots."""

    parts: tuple[int, ...]
    """Documents of each part, to which a limit is applied."""
    characters: int
    shot: int = 0
    """Characters of an example."""
    choices: int = 0
    """Requests of a document, where the likelihoods of choices are compared, on average; 0: one text is written."""
    most: int = 1
    """Tokens that a request may write."""

    def documents(self, limit: int | None) -> int:
        return sum(part if limit is None else min(part, limit) for part in self.parts)


# Documents and mean prompts are those that EvalScope's documentation publishes, looked up in November 2026. Examples
# of BBH were counted in lm-eval's files; MMLU-Pro's prompt is split by the sizes that its card tells. TruthfulQA's is
# lm-eval's preamble, counted, with a guess at question and choice; HumanEval's are the heads of its functions, which
# the task for chat models tells twice. No published mean of the choices was found: MuSR has 2 and 3 in two of its
# parts, and 3 is a guess for all, as 5 is for TruthfulQA. `most` stands in lm-eval's files; GPQA names none and gets
# what the stage gives such tasks.
EXTENTS = {
    "ifeval": Extent(parts=(541,), characters=211, most=1280),
    "gpqa_diamond_cot_zeroshot": Extent(parts=(198,), characters=841, most=4096),
    "mmlu_pro": Extent(
        parts=(717, 789, 1132, 410, 844, 969, 818, 381, 1101, 1351, 924, 499, 1299, 798),
        characters=600,
        shot=870,
        most=2048,
    ),
    "leaderboard_musr": Extent(parts=(250, 256, 250), characters=4892, choices=3),
    "truthfulqa_mc1": Extent(parts=(817,), characters=700, choices=5),
    "humaneval": Extent(parts=(164,), characters=460, most=1024),
    "humaneval_instruct": Extent(parts=(164,), characters=1040, most=1024),
    "bbh_cot_fewshot": Extent(parts=(*24 * (250,), 187, 146, 178), characters=540, shot=923, most=1024),
}
"""Task of lm-eval -> how much it asks."""
