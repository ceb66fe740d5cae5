"""prepare has vLLM judge what only vLLM can judge, before the run asks for a GPU."""

import pytest
from support.stage_builders import bucket_of, context, prepare_work

from cgd_stages.contract import Engine, Sampling, Speculative
from cgd_stages.errors import UserError
from cgd_stages.prepare import __main__ as prepare
from cgd_stages.prepare.tryout import samplings_of

# vLLM and torch warn about themselves while they are imported.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def source(storage):
    bucket_of(storage).put("in/p.jsonl", b'{"question": "1 + 1?", "answer": "2"}\n')
    return bucket_of(storage).uri("in/p.jsonl")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_wrong_engine_is_refused_before_a_prompt_is_read(storage, tiny_model, tmp_path):
    work = prepare_work(tiny_model, "s3://data/nothing.jsonl", engine=Engine(quantization="fp9"))
    with pytest.raises(UserError, match="Unknown quantization method: fp9") as raised:
        prepare.main(context(storage, work, tmp_path))
    assert "spec.student.quantization" in raised.value.hint


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_model_of_drafts_in_the_store_is_judged_with_the_engine(storage, source, tiny_model, tmp_path):
    bucket = bucket_of(storage)
    for path in tiny_model.iterdir():
        bucket.upload(path, f"drafts/{path.name}")
    drafts = Speculative(method="draft_model", model=bucket.uri("drafts"), num_speculative_tokens=2)
    work = prepare_work(tiny_model, source, engine=Engine(dtype="float32", speculative=drafts))
    assert prepare.main(context(storage, work, tmp_path))["prepare"].rows.done == 1
    missing = drafts.model_copy(update={"model": bucket.uri("nothing")})
    work = prepare_work(tiny_model, source, engine=Engine(dtype="float32", speculative=missing))
    with pytest.raises(UserError, match=r"has no config\.json"):
        prepare.main(context(storage, work, tmp_path))


def test_each_model_is_judged_by_the_sampling_of_its_own_texts(tiny_model):
    of = {role: Sampling(seed=number) for number, role in enumerate(("answer", "critique", "refine", "distill"))}
    work = prepare_work(tiny_model, "", roles=tuple(of), sampling=tuple(of.values()), evaluation=Sampling(seed=9))
    assert [sampling.seed for sampling in samplings_of(work, "spec.student")] == [0, 9]
    assert [sampling.seed for sampling in samplings_of(work, "spec.teacher")] == [1, 2, 3]
