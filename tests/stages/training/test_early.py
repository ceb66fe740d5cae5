"""Which questions a student in training is asked, when, and when its training ends."""

from pathlib import Path
from typing import Any

import pytest
from support.train_builders import question, train_work

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import NO_TRANSFER, Early, StopUnless
from cgd_stages.errors import NoTransfer, UserError
from cgd_stages.training import early
from cgd_stages.training.job import Record

SUMS = [question(number, str(number)) for number in range(6)]
PROOFS = [question(number, "yes", "proofs") for number in range(2)]
OTHERS = [question(number, "no", "others") for number in range(9)]
INSTRUCTIONS = {"sums": "Box it.", "proofs": ""}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    from support import tiny

    return ChatTemplate.load(tiny.make(tmp_path_factory.mktemp("early") / "tiny"))


def choose(template: ChatTemplate, questions: int, **changes: Any) -> list[early.EarlyQuestion]:
    asked = Early(questions=questions, instructions=INSTRUCTIONS)
    return early.choose([*OTHERS, *SUMS, *PROOFS], train_work(Path("x"), **changes), asked, template)


def benchmarks(chosen: list[early.EarlyQuestion]) -> list[str]:
    return [of.name.partition("/")[0] for of in chosen]


def test_each_benchmark_of_the_run_gives_as_many_questions_as_it_can(template: ChatTemplate) -> None:
    assert sorted(benchmarks(choose(template, 4))) == ["proofs", "proofs", "sums", "sums"]
    assert sorted(benchmarks(choose(template, 7))) == ["proofs"] * 2 + ["sums"] * 5
    assert len(choose(template, 100)) == len(SUMS + PROOFS), "none of a benchmark that the run does not name"


def test_the_seed_of_the_training_chooses_them(template: ChatTemplate) -> None:
    names = [[of.name for of in choose(template, 5, seed=seed)] for seed in (1, 1, 2)]
    assert names[0] == names[1] != names[2]


def test_a_question_is_asked_as_the_evaluation_asks_it(template: ChatTemplate) -> None:
    prompts = {of.name: template.tokenizer.decode(of.ids) for of in choose(template, 100)}
    begin, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert prompts[f"sums/{0:020x}"] == f"{begin}What is 0 + 1?\n\nBox it.{end}"
    assert prompts[f"proofs/{0:020x}"] == f"{begin}What is 0 + 1?{end}"


def test_a_question_without_room_for_a_reply_is_not_asked(template: ChatTemplate) -> None:
    lengths = sorted(len(of.ids) for of in choose(template, 100))
    kept = choose(template, 100, max_sequence_length=lengths[3])
    assert sorted(len(of.ids) for of in kept) == [length for length in lengths if length < lengths[3]]
    with pytest.raises(UserError, match="leaves room for a reply") as error:
        choose(template, 100, max_sequence_length=16)
    assert "maxSequenceLength" in error.value.hint


def test_questions_are_read_as_they_were_written(template: ChatTemplate, tmp_path: Path) -> None:
    chosen = choose(template, 100)
    early.write_questions(tmp_path / "q", chosen)
    assert early.read_questions(tmp_path / "q") == chosen
    assert early.read_questions(tmp_path / "missing") == []


@pytest.mark.parametrize(
    ("steps", "stop", "expected"),
    [
        (100, None, {10, 25, 50}),
        (18, None, {2, 5, 9}),
        (3, None, {1, 2}),
        (2, None, {1}),
        (1, None, set()),
        (100, StopUnless(after=0.07), {7, 10, 25, 50}),
        (100, StopUnless(after=1.0), {10, 25, 50}),
    ],
)
def test_the_looks_are_after_shares_of_the_steps_and_never_after_the_last(
    steps: int, stop: StopUnless | None, expected: set[int]
) -> None:
    assert early.looks(Early(instructions={}, stop_unless=stop), steps) == expected


def curve(*looks: tuple[int, float]) -> list[Record]:
    found = dict(looks)
    figures = {early.BEFORE: 0.2}
    return [
        {"step": step, "loss": 1.0} | (figures | {early.EARLY: found[step]} if step in found else {})
        for step in range(1, 60)
    ]


@pytest.mark.parametrize(
    ("gain", "looks", "judged"),
    [
        (0.0, [(10, 0.19)], 10),
        (0.0, [(10, 0.2)], None),
        (0.1, [(10, 0.3)], None),  # 0.3 - 0.2 is below 0.1 in floats
        (0.1, [(10, 0.29)], 10),
        (0.1, [(10, 0.3), (25, 0.2)], None),  # judged once
        (0.1, [(5, 0.2)], None),  # too early
        (0.1, [(5, 0.2), (25, 0.25)], 25),  # the look after step 10 was interrupted
        (0.1, [], None),
    ],
)
def test_a_training_is_judged_by_its_first_look_after_the_share(
    gain: float, looks: list[tuple[int, float]], judged: int | None
) -> None:
    found = early.falls_short(curve(*looks), StopUnless(after=0.1, gain=gain), steps=100)
    assert (found and found["step"]) == judged


def test_the_operator_knows_the_error_by_its_name() -> None:
    assert NoTransfer.__name__ == NO_TRANSFER
