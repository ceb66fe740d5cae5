"""Benchmarks that a manifest may call by name alone: where they are, what their columns mean, how many questions.

A data set on the hub is read from the branch `refs/convert/parquet`, into which the hub itself converts every public
data set as `<config>/<split>/0000.parquet`; so repository, config and split say all. They, the columns and the numbers
were looked up on the data sets' pages and in public code that loads them, in November 2026. No row has been fetched by
this project yet: `prepare` refuses a file without the columns, and warns when the number of questions is another one.
"""

from dataclasses import dataclass

from cgd_stages.contract import BenchmarkFields

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."


@dataclass(frozen=True)
class Named:
    """One entry of the table; `questions` is the published number."""

    repository: str
    config: str
    split: str
    questions: int
    fields: BenchmarkFields
    tolerance: str | None = None

    @property
    def source(self) -> str:
        return f"hf://datasets/{self.repository}@refs/convert/parquet/{self.config}/{self.split}/*.parquet"


_QUESTION = BenchmarkFields(prompt="question", reference="answer")
_PROBLEM = BenchmarkFields(prompt="problem", reference="answer")

BENCHMARKS = {
    "MATH-500": Named("HuggingFaceH4/MATH-500", "default", "test", 500, _PROBLEM),
    "GSM8K": Named("openai/gsm8k", "main", "test", 1319, _QUESTION),
    "Minerva": Named("math-ai/minervamath", "default", "test", 272, _QUESTION),
    # Text only, mathematics, English. The paper counts 675; the hub has had 674 since July 2024.
    "OlympiadBench": Named(
        "Hothan/OlympiadBench",
        "OE_TO_maths_en_COMP",
        "train",
        674,
        BenchmarkFields(
            prompt="question", reference="final_answer", several="all", context="context", tolerance="error"
        ),
    ),
    "AMC23": Named("math-ai/amc23", "default", "test", 40, _QUESTION),
    "AIME24": Named("HuggingFaceH4/aime_2024", "default", "train", 30, _PROBLEM),
    "AIME25": Named("math-ai/aime25", "default", "test", 30, _PROBLEM),
    # Some questions have a picture, which no text model sees; the published 800 count them.
    "TheoremQA": Named(
        "TIGER-Lab/TheoremQA",
        "default",
        "test",
        800,
        BenchmarkFields(prompt="Question", reference="Answer"),
        tolerance="4%",
    ),
}
"""Name -> entry."""


@dataclass(frozen=True)
class Harnessed:
    """A general benchmark as lm-eval has it; `few_shot` None: what the task itself says."""

    task: str
    metric: str
    few_shot: int | None = None
    thoughts: bool = True
    """False: it compares the likelihoods of choices, or writes the beginning of each reply."""


TASKS = {
    "IFEval": Harnessed("ifeval", "prompt_level_strict_acc"),
    "IFEval-loose": Harnessed("ifeval", "prompt_level_loose_acc"),
    "GPQA-Diamond": Harnessed("gpqa_diamond_cot_zeroshot", "exact_match,flexible-extract"),
    "MMLU-Pro": Harnessed("mmlu_pro", "exact_match,custom-extract", 5),
    "MuSR": Harnessed("leaderboard_musr", "acc_norm", thoughts=False),
    "TruthfulQA": Harnessed("truthfulqa_mc1", "acc", thoughts=False),
    "BBH": Harnessed("bbh_cot_fewshot", "exact_match,get-answer", 3),
    "HumanEval": Harnessed("humaneval_instruct", "pass@1", thoughts=False),
}
"""Name -> task of lm-eval 0.4.13, and the metric that is right or wrong for every question."""

EXECUTED = ("humaneval", "humaneval_instruct")
"""Tasks of lm-eval whose documents are the head of a Python function and tests of it."""
