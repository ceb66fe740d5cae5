"""What vLLM says of a model's engine before there is a GPU."""

from collections.abc import Sequence
from pathlib import Path

from cgd_stages.contract import Model, Prepare, Sampling
from cgd_stages.engines.vllm_settings import needs_judging, refuse_wrong_engine
from cgd_stages.models import resolve
from cgd_stages.models.fit import Served
from cgd_stages.runtime.program import Context


def check_engine(context: Context, served: Served) -> dict[str, str]:
    """Raise UserError when vLLM refuses the engine's arguments or the sampling of its requests. Returns the commit of
    the model that writes its drafts, by name, if that is on the hub."""
    if not needs_judging(served.engine):
        return {}
    pins: dict[str, str] = {}

    def small_files(drafts: Model) -> Path:
        exact = resolve.resolve(drafts, context.store)
        if resolve.is_hub(drafts):
            pins[drafts.name] = exact.revision
            drafts = drafts.model_copy(update={"revision": exact.revision})
        return resolve.fetch(drafts, context.store, context.scratch, weights=False)

    folder = resolve.fetch(served.model, context.store, context.scratch, weights=False)
    samplings = samplings_of(context.work_of(Prepare), served.where)
    refuse_wrong_engine(folder, resolve.with_drafts(served.engine, small_files), samplings, served.where)
    return pins


def samplings_of(work: Prepare, where: str) -> Sequence[Sampling]:
    """How the student (`spec.student`) or the teacher writes in this run."""
    is_student = where == "spec.student"
    given = zip(work.roles, work.sampling, strict=True)
    own = [sampling for role, sampling in given if (role == "answer") == is_student]
    return [*own, work.evaluation] if is_student and work.evaluation else own
