"""Trainings that learn what their own student samples: three children that start together and go on round by round, one
samples, one scores and one trains (`cgd_stages.training.conveyor`). Pure."""

from cgd_operator.api.spec import CGDRunSpec
from cgd_operator.api.training import Variant
from cgd_operator.planning import scoring, served
from cgd_stages import contract


def on_policy(spec: CGDRunSpec, variant: Variant) -> contract.OnPolicy | None:
    """How a training samples, with what the manifest leaves out; None: it does not."""
    teacher = served.teacher(spec)
    if teacher is None or not variant.samples:
        return None
    return contract.OnPolicy(
        share=variant.samples,
        refresh=variant.refresh or contract.REFRESH,
        max_tokens=variant.max_tokens or contract.ROLLOUT_TOKENS,
        engine=served.without_drafts(spec.student),
        teacher=teacher,
        teacher_engine=served.without_drafts(spec.teacher),
    )


def rollout(spec: CGDRunSpec, train: contract.Train) -> contract.Rollout:
    return contract.Rollout(training=train, shards=spec.student.shards)


def score(spec: CGDRunSpec, train: contract.Train) -> contract.Score:
    return scoring.of_samples(spec, train.top_k or 0).model_copy(update={"training": train})
