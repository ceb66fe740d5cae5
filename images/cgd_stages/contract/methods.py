"""What each objective needs of a run beside its rows, in one table: the API refuses by it, and the plan follows it."""

from dataclasses import dataclass
from typing import Literal, get_args

from cgd_stages.contract.training import Objective, Supervised

DPO_BETA = 0.1
"""How far DPO lets the student go from its start, unless a run says otherwise: the paper's."""
ON_POLICY = 0.5
"""The share of GKD's examples that the student samples, unless a run says otherwise: one of the paper's."""
GKD_BETA = 0.5
"""GKD's divergence unless a run says otherwise: halfway between forward and reverse KL."""
REFRESH, ROLLOUT_TOKENS = 8, 512
"""Steps that learn what one state of the student has sampled, and the most tokens of a sample, by default."""
TOP_K, MOST_TOP_K = 16, 20
"""The likeliest tokens of a position that are told apart by default, and at most: vLLM gives no more by itself."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """An objective that is not a supervised one: what it needs, and where it was published."""

    source: str
    scored_by: Literal["teacher", "start"] | None = None
    """Whose log-probabilities it learns from: the teacher's, or those of the model that the training starts from."""
    scored: Supervised | None = None
    """As which objective's examples, where that is no setting: the context that the scoring model reads."""
    samples: bool = False
    """Whether the student samples what it learns while it is trained."""


METHODS: dict[Objective, Method] = {
    "DPO": Method(source="arXiv 2305.18290"),
    "ContextDistillation": Method(source="arXiv 2209.15189", scored_by="start", scored="CGD"),
    "SupervisedKD": Method(source="arXiv 2306.13649, section 2", scored_by="teacher"),
    "GKD": Method(source="arXiv 2306.13649", scored_by="teacher", samples=True),
    "OPD": Method(source="Thinking Machines Lab, On-Policy Distillation (2025)", scored_by="teacher", samples=True),
}
"""Every objective but the supervised ones."""
SUPERVISED = Method(source="arXiv 2505.11628")


def method_of(objective: Objective) -> Method:
    return METHODS.get(objective, SUPERVISED)


assert {*METHODS, *get_args(Supervised)} == {*get_args(Objective)}

SETTINGS: dict[str, tuple[Objective, ...]] = {
    "critique": ("CGD",),
    "bare_share": ("CGD",),
    "context": ("CGD", "CFT", "ContextDistillation"),
    "beta": ("DPO", "GKD"),
    "texts": ("SupervisedKD",),
    "top_k": ("ContextDistillation", "SupervisedKD", "GKD"),
    "on_policy": ("GKD",),
    "form": ("OPD",),
    "refresh": ("GKD", "OPD"),
    "max_tokens": ("GKD", "OPD"),
}
"""The settings of a training that only some objectives read."""
