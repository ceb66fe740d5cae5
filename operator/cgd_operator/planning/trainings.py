"""The task of each training: one for each objective, and one for each variant. Pure."""

from typing import Any

from cgd_operator.api.spec import CGDRunSpec
from cgd_operator.api.training import Variant
from cgd_operator.planning import conveyor, served, tasks
from cgd_stages import contract


def trainings(spec: CGDRunSpec) -> tuple[contract.Train, ...]:
    """All trainings, in order: one for each objective, then one for each variant."""
    plain = (_train(spec, objective, {}) for objective in spec.training.objectives)
    varied = (_train(spec, variant.kind, _own(spec, variant)) for variant in spec.training.ordered)
    return _judged((*plain, *varied))


def _judged(trains: tuple[contract.Train, ...]) -> tuple[contract.Train, ...]:
    """`stopUnless` judges CGD with its own critiques: a baseline or an ablation that falls behind is a result, and does
    not end the run. Where no training is such a CGD, it judges all."""
    judged = [train for train in trains if train.objective == "CGD" and train.critique.kind == "matched"]
    return tuple(train if not judged or train in judged else _unjudged(train) for train in trains)


def _unjudged(train: contract.Train) -> contract.Train:
    early = train.early and train.early.model_copy(update={"stop_unless": None})
    return train.model_copy(update={"early": early})


def _own(spec: CGDRunSpec, variant: Variant) -> dict[str, Any]:
    """The settings of a variant, with what its kind needs and the manifest leaves out."""
    sampling = {"on_policy", "refresh", "max_tokens"}
    own = variant.model_dump(exclude={"kind", "from_", *sampling}, exclude_none=True)
    beta = contract.GKD_BETA if variant.kind == "GKD" else contract.DPO_BETA
    defaults = {"beta": beta, "texts": "refined", "top_k": contract.TOP_K, "form": "reward"}
    own = {name: value for name, value in defaults.items() if variant.kind in contract.SETTINGS[name]} | own
    if drawn := conveyor.on_policy(spec, variant):
        own["on_policy"] = drawn
    return own | ({"start": contract.train_stage(variant.from_)} if variant.from_ else {})


def _train(spec: CGDRunSpec, objective: contract.Objective, own: dict[str, Any]) -> contract.Train:
    """A training of an objective; `own` are the settings of a variant. What the manifest leaves out of critique and
    validation is what a task says by itself."""
    elsewhere = {"objectives", "variants", "keep", "stop_unless"}
    elsewhere |= {"parallel", "backend", "gpus_per_worker", "termination_grace_period_seconds"}
    elsewhere |= {setting for setting, readers in contract.SETTINGS.items() if objective not in readers}
    return contract.Train(
        **spec.training.model_dump(exclude=elsewhere, exclude_none=True) | own,
        objective=objective,
        student=served.student(spec),
        chat=served.chat(spec.student),
        processes_per_worker=spec.training.gpus_per_worker,
        early=_early(spec),
        max_rejected=spec.generation.max_rejected,
        common_rows=_chooses_rows(spec),
    )


def _early(spec: CGDRunSpec) -> contract.Early | None:
    evaluation = spec.evaluation
    if evaluation is None or evaluation.early is None:
        return None
    return contract.Early(
        **evaluation.early.model_dump(),
        instructions={benchmark.name: tasks.benchmark(benchmark).instruction for benchmark in evaluation.benchmarks},
        stop_unless=spec.training.stop_unless,
    )


def _chooses_rows(spec: CGDRunSpec) -> bool:
    """Whether a training may learn fewer rows than its objective could use."""
    several = len(spec.training.titles) > 1 or spec.generation.refine.samples > 1
    decontaminate = spec.prompts.decontaminate
    removes = decontaminate is not None and decontaminate.paraphrases == "remove"
    return several or removes or spec.training.keep != "all"
