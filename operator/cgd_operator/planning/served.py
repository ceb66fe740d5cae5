"""The two models of a run, as tasks name them. Pure."""

from cgd_operator.api.generation import ServedModel
from cgd_operator.api.spec import CGDRunSpec
from cgd_stages import contract


def student(spec: CGDRunSpec) -> contract.Model:
    return contract.Model(name=spec.student.model, revision=spec.student.revision)


def teacher(spec: CGDRunSpec) -> contract.Model | None:
    """None where it is an endpoint."""
    return contract.Model(name=spec.teacher.model, revision=spec.teacher.revision) if spec.teacher.model else None


def chat(model: ServedModel) -> contract.Chat:
    return contract.Chat.part_of(model.chat)


def without_drafts(model: ServedModel) -> contract.Engine:
    """The engine of a model that writes nothing, or whose weights change while the model of its drafts would not."""
    return contract.Engine.part_of(model).model_copy(update={"speculative": None})
