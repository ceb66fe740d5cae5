"""Which log-probabilities a run stores for its trainings, and the task of each stage that does so. Pure."""

from cgd_operator.api.generation import ServedModel
from cgd_operator.api.spec import CGDRunSpec
from cgd_operator.api.training import Variant
from cgd_operator.planning import served
from cgd_stages import contract

OBJECTIVES: dict[contract.Texts, contract.Supervised] = {"refined": "RefinedSFT", "distilled": "DistilledSFT"}
"""As whose examples the texts are scored."""


def by_teacher(spec: CGDRunSpec) -> dict[contract.Texts, int]:
    """The texts that the teacher scores, each kind once for all trainings, with the most top tokens that one needs."""
    most = dict[contract.Texts, int]()
    for variant in spec.training.variants:
        if contract.method_of(variant.kind).scored_by == "teacher" and variant.samples < 1:
            texts = variant.texts or "refined"
            most[texts] = max(most.get(texts, 0), variant.top_k or contract.TOP_K)
    return most


def by_start(spec: CGDRunSpec) -> tuple[Variant, ...]:
    """The trainings for which the model that they start from scores."""
    return tuple(one for one in spec.training.ordered if contract.method_of(one.kind).scored_by == "start")


def of_teacher(spec: CGDRunSpec, texts: contract.Texts) -> contract.Score:
    """What the teacher scores of these texts."""
    return _score(spec, OBJECTIVES[texts], served.teacher(spec), spec.teacher, by_teacher(spec)[texts])


def of_start(spec: CGDRunSpec, variant: Variant) -> contract.Score:
    """What the model that a training starts from scores for it: the context is another objective's."""
    model = served.student(spec)
    if variant.from_:
        model = contract.Model(name=f"stage://{contract.train_stage(variant.from_)}")
    objective = contract.method_of(variant.kind).scored
    score = _score(spec, objective, model, spec.student, variant.top_k or contract.TOP_K)
    return score.model_copy(update={"context": variant.context or spec.training.context})


def of_samples(spec: CGDRunSpec, top_k: int) -> contract.Score:
    """What the teacher scores of a student's samples, behind the context that RefinedSFT has. `top_k` 0: the sampled
    tokens alone."""
    return _score(spec, "RefinedSFT", served.teacher(spec), spec.teacher, top_k)


def everything(spec: CGDRunSpec) -> tuple[contract.Score, ...] | None:
    """All of it; None: nothing."""
    of_texts = (of_teacher(spec, texts) for texts in by_teacher(spec))
    sampled = (one for one in spec.training.ordered if contract.method_of(one.kind).samples)
    of_sampled = (of_samples(spec, variant.top_k or 0) for variant in sampled)
    return (*of_texts, *of_sampled, *(of_start(spec, variant) for variant in by_start(spec))) or None


def _score(
    spec: CGDRunSpec,
    objective: contract.Supervised | None,
    model: contract.Model | None,
    engine: ServedModel,
    top_k: int,
) -> contract.Score:
    assert objective
    assert model
    return contract.Score(
        objective=objective,
        student=served.student(spec),
        chat=served.chat(spec.student),
        thinking=spec.training.thinking or "drop",
        max_sequence_length=spec.training.max_sequence_length,
        model=model,
        engine=served.without_drafts(engine),
        top_k=top_k,
        shards=engine.shards,
        max_rejected=spec.generation.max_rejected,
    )
