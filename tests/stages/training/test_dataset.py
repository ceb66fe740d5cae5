"""The rows of a training: which they are for each objective, what is counted, and when there are too few."""

from pathlib import Path
from typing import Any

import pytest
from support.stage_builders import RUN
from support.tiny import END, thinking
from support.train_builders import distilled, misrefined, quadruple, refined, train_work
from transformers import PreTrainedTokenizerFast

from cgd_stages.chat.example import IGNORE, Example
from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Chat, Critique, Objective, Rows, Target, Validation
from cgd_stages.errors import RowsLost, UserError
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.rows import Row
from cgd_stages.store.run import RunStore
from cgd_stages.training.dataset import Dataset, ExampleCounts

MODEL = Path("/models/student")
ROWS = [quadruple(number, reference=f"It is {2 * number + 1}.") for number in range(6)]


@pytest.fixture
def tokens(tiny_model: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny_model)


def counts_of(bucket: Bucket, model: Path, tokens: PreTrainedTokenizerFast, **work: Any) -> ExampleCounts:
    """The counts of a training over what is stored."""
    dataset = Dataset.of(RunStore(bucket, RUN), train_work(model, **work), ChatTemplate(tokens))
    counts = ExampleCounts.of(dataset)
    for row, found in dataset.examples():
        counts.add(row, found)
    return counts


def test_own_answers_of_the_teacher_are_learned_for_the_rows_that_refine_has_kept_and_no_others(
    bucket: Bucket, tiny_model: Path, tokens: PreTrainedTokenizerFast
) -> None:
    refined(bucket, ROWS[:4])
    distilled(bucket, {str(row["id"]): f"answer {row['id']}" for row in ROWS[1:]})
    dataset = Dataset.of(RunStore(bucket, RUN), train_work(tiny_model, objective="DistilledSFT"), ChatTemplate(tokens))
    found = {row["id"]: made for row, made in dataset.examples()}
    assert set(found) == {row["id"] for row in ROWS[:4]}
    told = {
        i: tokens.decode([one for one in made.labels if one != IGNORE]) for i, made in found.items() if is_whole(made)
    }
    assert told == {row["id"]: f"answer {row['id']}{END}" for row in ROWS[1:4]}


def is_whole(made: object) -> bool:
    return isinstance(made, Example)


def test_a_row_that_the_teacher_did_not_answer_is_counted_as_missing(
    bucket: Bucket, tiny_model: Path, tokens: PreTrainedTokenizerFast
) -> None:
    refined(bucket, ROWS)
    distilled(bucket, {str(row["id"]): "yes" for row in ROWS[:5]})
    counts = counts_of(bucket, tiny_model, tokens, objective="DistilledSFT")
    assert counts.rows == Rows(total=6, done=5, rejected=1)
    assert [(row["id"], row["reason"]) for row in counts.rejected] == [(ROWS[5]["id"], "missing")]


def test_a_row_without_a_reference_is_missing_for_sft_and_for_no_other_objective(
    bucket: Bucket, tiny_model: Path, tokens: PreTrainedTokenizerFast
) -> None:
    refined(bucket, [*ROWS[:5], ROWS[5] | {"reference": None}])
    assert counts_of(bucket, tiny_model, tokens, objective="SFT").rows == Rows(total=6, done=5, rejected=1)
    assert counts_of(bucket, tiny_model, tokens, objective="RefinedSFT").rows == Rows(total=6, done=6)


def test_tokens_and_lengths_are_counted_over_all_examples(
    bucket: Bucket, tiny_model: Path, tokens: PreTrainedTokenizerFast
) -> None:
    refined(bucket, ROWS)
    dataset = Dataset.of(RunStore(bucket, RUN), train_work(tiny_model), ChatTemplate(tokens))
    made = [found for _, found in dataset.examples() if isinstance(found, Example)]
    lengths = [len(one.input_ids) for one in made]
    metrics = counts_of(bucket, tiny_model, tokens).metrics()
    assert metrics["example_tokens"] == sum(lengths)
    assert metrics["learned_tokens"] == sum(label != IGNORE for one in made for label in one.labels)
    assert metrics["longest_example"] == max(lengths)
    histogram = {
        int(name.removeprefix("length_to_")): n for name, n in metrics.items() if name.startswith("length_to_")
    }
    assert histogram == {most: sum(most // 2 < length <= most for length in lengths) for most in histogram}
    assert sum(histogram.values()) == 6


def test_shuffled_critiques_are_taken_from_all_stored_rows(
    bucket: Bucket, tiny_model: Path, tokens: PreTrainedTokenizerFast
) -> None:
    refined(bucket, [quadruple(number, critique=f"Critique of {number}.") for number in range(6)])
    work = train_work(tiny_model, critique=Critique(kind="shuffled"))
    dataset = Dataset.of(RunStore(bucket, RUN), work, ChatTemplate(tokens))
    for row, made in dataset.examples():
        assert isinstance(made, Example)
        shown = tokens.decode(made.input_ids[: made.start])
        assert "Critique of " in shown
        assert str(row["critique"]) not in shown


def test_a_run_with_one_row_cannot_be_shuffled(
    bucket: Bucket, tiny_model: Path, tokens: PreTrainedTokenizerFast
) -> None:
    refined(bucket, ROWS[:1])
    with pytest.raises(UserError, match="cannot exchange their critiques") as caught:
        counts_of(bucket, tiny_model, tokens, critique=Critique(kind="shuffled"))
    assert "spec.training.critique" in caught.value.hint


@pytest.mark.parametrize(
    ("objective", "reason", "hint"),
    [
        ("SFT", "missing", "do not have the reference answer"),
        ("SFT", "missing", "take SFT out of spec.training"),
        ("CGD", "empty", "nothing to learn in the teacher's refinement"),
        ("CGD", "too_long", "maxSequenceLength"),
        ("SFT", "markers", "take them out of the reference answer"),
    ],
)
def test_too_many_rows_without_an_example_are_refused_with_the_mend(
    objective: Objective, reason: str, hint: str
) -> None:
    counts = ExampleCounts(train_work(MODEL, objective=objective), kept=7, rejected=[rejected(reason)] * 3)
    with pytest.raises(
        UserError, match=rf"{objective}: 3 of 10 rows make no example, 20.0% may \({reason} 3\)"
    ) as caught:
        counts.refuse_unless_enough(10, 0.2)
    assert hint in caught.value.hint


def rejected(reason: str) -> Row:
    return {"id": "0", "sample": 0, "stage": "train-x", "reason": reason, "detail": ""}


def test_as_many_rejected_rows_as_the_limit_allows_are_no_reason_to_refuse() -> None:
    ExampleCounts(train_work(MODEL), kept=8, rejected=[rejected("empty")] * 2).refuse_unless_enough(10, 0.2)


def test_books_that_do_not_balance_are_an_error() -> None:
    with pytest.raises(RowsLost, match="9 of the 10 rows"):
        ExampleCounts(train_work(MODEL), kept=9).refuse_unless_enough(10, 0.2)


def test_every_objective_holds_out_the_same_prompts_with_all_their_samples(
    bucket: Bucket, tiny_model: Path, tokens: PreTrainedTokenizerFast
) -> None:
    refined(bucket, [row | {"sample": sample} for row in ROWS for sample in range(2)])
    validation = Validation(fraction=0.34)
    chosen = {
        objective: Dataset.of(
            RunStore(bucket, RUN),
            train_work(tiny_model, objective=objective, validation=validation),
            ChatTemplate(tokens),
        ).held_out
        for objective in ("CGD", "CFT", "SFT", "RefinedSFT")
    }
    assert len(set(chosen.values())) == 1
    assert len(chosen["CGD"]) == 2
    counts = counts_of(bucket, tiny_model, tokens, validation=validation)
    assert counts.rows == Rows(total=12, done=12)
    metrics = counts.metrics()
    assert (metrics["train_examples"], metrics["validation_examples"]) == (8, 4)
    whole = counts_of(bucket, tiny_model, tokens, validation=Validation(fraction=0)).metrics()
    assert metrics["learned_tokens"] + metrics["validation_tokens"] == whole["learned_tokens"]
    assert whole["validation_tokens"] == whole["validation_examples"] == 0


@pytest.mark.parametrize(("validation", "told"), [(0, "none is left to measure"), (7, "none is left to learn")])
def test_held_out_prompts_of_which_no_example_is_on_one_side_are_refused(validation: int, told: str) -> None:
    counts = ExampleCounts(train_work(MODEL), frozenset({"1"}), kept=7, validation=validation)
    with pytest.raises(UserError, match=told) as caught:
        counts.refuse_unless_enough(7, 0.0)
    assert "validation.fraction" in caught.value.hint


def share(bucket: Bucket, model: Path, tokens: PreTrainedTokenizerFast, **work: Any) -> Dataset:
    return Dataset.of(RunStore(bucket, RUN), train_work(model, **work), ChatTemplate(tokens))


def contexts(dataset: Dataset) -> dict[str, str]:
    """What stands before the target of each row, by id."""
    decode = dataset.template.tokenizer.decode
    return {
        row["id"]: decode(made.input_ids[: made.start]) for row, made in dataset.examples() if isinstance(made, Example)
    }


def test_a_bare_share_of_the_rows_reads_what_inference_reads_and_the_others_as_ever(
    bucket: Bucket, tiny_model: Path, tokens: PreTrainedTokenizerFast
) -> None:
    refined(bucket, ROWS)
    mixed = share(bucket, tiny_model, tokens, bare_share=0.5)
    found = contexts(mixed)
    bare, whole = (
        contexts(share(bucket, tiny_model, tokens, objective=objective)) for objective in ("RefinedSFT", "CGD")
    )
    alone = {identity for identity in found if found[identity] == bare[identity]}
    assert alone == {identity for identity, _ in mixed.bare}
    assert len(alone) == 3
    assert all(found[identity] == whole[identity] for identity in set(found) - alone)


def test_a_bare_row_keeps_its_target_whatever_stands_in_the_critiques_place(
    bucket: Bucket, tiny_model: Path, tokens: PreTrainedTokenizerFast
) -> None:
    refined(bucket, ROWS)
    shuffled = share(bucket, tiny_model, tokens, bare_share=1.0, critique=Critique(kind="shuffled"))
    refinements = share(bucket, tiny_model, tokens, objective="RefinedSFT")
    made = ({row["id"]: found for row, found in dataset.examples()} for dataset in (shuffled, refinements))
    assert next(made) == next(made)


def test_the_bare_rows_are_the_same_each_time_and_more_with_a_higher_share(
    bucket: Bucket, tiny_model: Path, tokens: PreTrainedTokenizerFast
) -> None:
    refined(bucket, ROWS)
    few, many = (share(bucket, tiny_model, tokens, bare_share=rate).bare for rate in (0.34, 0.67))
    assert (len(few), len(many)) == (2, 4)
    assert few < many
    refined(bucket, ROWS[::-1])
    assert share(bucket, tiny_model, tokens, bare_share=0.34).bare == few
    assert share(bucket, tiny_model, tokens, bare_share=0.34, seed=1).bare != few


def test_bare_examples_are_counted_where_there_is_a_share(
    bucket: Bucket, tiny_model: Path, tokens: PreTrainedTokenizerFast
) -> None:
    refined(bucket, [*ROWS[:5], ROWS[5] | {"refinement": ""}])
    assert "bare_examples" not in counts_of(bucket, tiny_model, tokens).metrics()
    assert counts_of(bucket, tiny_model, tokens, bare_share=1.0).metrics()["bare_examples"] == 5


def test_a_share_and_an_instructions_turn_are_part_of_the_digest_and_the_papers_share_is_not(
    bucket: Bucket, tiny_model: Path, tokens: PreTrainedTokenizerFast
) -> None:
    refined(bucket, ROWS)
    plain = share(bucket, tiny_model, tokens).identity()
    assert share(bucket, tiny_model, tokens, bare_share=0.0, name="cgd-again").identity() == plain
    assert share(bucket, tiny_model, tokens, bare_share=0.25).identity() == plain | {"bareShare": 0.25}
    system = share(bucket, tiny_model, tokens, context="system").identity()
    assert {name for name in plain if system[name] != plain[name]} == {"prompts"}


def test_a_held_out_row_that_cannot_be_measured_given_the_prompt_alone_is_rejected_with_the_reason(
    bucket: Bucket, tiny_model: Path, tokens: PreTrainedTokenizerFast
) -> None:
    """CFT's own target is the critique, and the refinement of its held-out rows may be too long."""
    refined(bucket, [row | {"refinement": "So it is. " * 100} for row in ROWS])
    held_out = share(bucket, tiny_model, tokens, validation=Validation(fraction=0.34)).held_out
    counts = counts_of(bucket, tiny_model, tokens, objective="CFT", validation=Validation(fraction=0.34))
    assert {row["id"] for row in counts.rejected} == held_out
    assert {row["reason"] for row in counts.rejected} == {"too_long"}
    assert counts.rows == Rows(total=6, done=4, rejected=2)
    whole = counts_of(bucket, tiny_model, tokens, objective="CFT", validation=Validation(fraction=0))
    assert whole.rows == Rows(total=6, done=6)


@pytest.mark.parametrize(
    ("work", "twice"),
    [
        ({}, True),
        ({"objective": "CFT"}, True),
        ({"bare_share": 0.5}, True),
        ({"bare_share": 1.0}, False),
        ({"objective": "RefinedSFT"}, False),
        ({"objective": "SFT"}, False),
    ],
    ids=str,
)
def test_rows_are_measured_twice_where_the_context_is_not_the_prompt_alone(
    bucket: Bucket, tiny_model: Path, tokens: PreTrainedTokenizerFast, work: dict[str, Any], twice: bool
) -> None:
    refined(bucket, ROWS)
    assert share(bucket, tiny_model, tokens, **work).measures_bare == twice


# --- miscritiques


def wrong(target: Target, rate: float = 0.5) -> dict[str, Any]:
    return {"critique": Critique(kind="miscritique", rate=rate, target=target)}


def texts(dataset: Dataset) -> dict[str, tuple[str, str]]:
    """Context and target of each row, by id."""
    decode = dataset.template.tokenizer.decode
    return {
        row["id"]: (decode(made.input_ids[: made.start]), decode(made.input_ids[made.start :]))
        for row, made in dataset.examples()
        if isinstance(made, Example)
    }


@pytest.mark.parametrize("target", ["kept", "refined"])
def test_a_chosen_row_reads_the_miscritique_and_learns_what_the_target_says(
    bucket: Bucket, tiny_model: Path, tokens: PreTrainedTokenizerFast, target: Target
) -> None:
    refined(bucket, ROWS)
    misrefined(bucket, ROWS)
    own = texts(share(bucket, tiny_model, tokens))
    misled = share(bucket, tiny_model, tokens, **wrong(target))
    found = texts(misled)
    assert len(misled.misled) == 3
    for identity, (context, learned) in found.items():
        if (identity, 0) not in misled.misled:
            assert (context, learned) == own[identity]
            continue
        assert f"Critique: Trust {identity}.\nConclusion: right" in context
        assert "Conclusion: wrong" not in context
        assert learned == (own[identity][1] if target == "kept" else f"Wrongly {identity}.{END}")


def test_a_thought_is_that_of_the_target(bucket: Bucket, tmp_path: Path) -> None:
    model = thinking(tmp_path / "thinker")
    rows = [row | {"refinement_thinking": "Truly thought."} for row in ROWS]
    refined(bucket, rows)
    misrefined(bucket, rows)
    for target, told in (("kept", "Truly thought."), ("refined", "Wrongly thought.")):
        work = train_work(model, thinking="learn", **wrong(target, rate=1.0))
        dataset = Dataset.of(RunStore(bucket, RUN), work, ChatTemplate.load(model, Chat(thinking="on")))
        assert all(told in learned for _, learned in texts(dataset).values())


def test_the_rows_are_those_that_corrupted_chooses_and_all_with_a_rate_of_1(
    bucket: Bucket, tiny_model: Path, tokens: PreTrainedTokenizerFast
) -> None:
    rows = [quadruple(number, critique=f"Critique of {number}.") for number in range(6)]
    refined(bucket, rows)
    misrefined(bucket, rows)
    for seed in range(3):
        plain = contexts(share(bucket, tiny_model, tokens, seed=seed))
        corrupted = share(bucket, tiny_model, tokens, critique=Critique(kind="corrupted", rate=0.5), seed=seed)
        changed = {identity for identity, context in contexts(corrupted).items() if context != plain[identity]}
        found = share(bucket, tiny_model, tokens, **wrong("kept"), seed=seed).misled
        assert {identity for identity, _ in found} == changed
    assert len(share(bucket, tiny_model, tokens, **wrong("kept", rate=1.0)).misled) == 6


def test_a_row_without_a_miscritique_keeps_its_critique_and_is_missing_in_the_count(
    bucket: Bucket, tiny_model: Path, tokens: PreTrainedTokenizerFast
) -> None:
    refined(bucket, ROWS)
    misrefined(bucket, ROWS[:4])
    own = texts(share(bucket, tiny_model, tokens))
    found = texts(share(bucket, tiny_model, tokens, **wrong("refined", rate=1.0)))
    assert {identity for identity in own if found[identity] == own[identity]} == {row["id"] for row in ROWS[4:]}
    metrics = counts_of(bucket, tiny_model, tokens, **wrong("refined", rate=1.0)).metrics()
    assert (metrics["misled_examples"], metrics["train_examples"]) == (4, 6)
    assert "misled_examples" not in counts_of(bucket, tiny_model, tokens).metrics()


def test_held_out_rows_keep_critique_and_target(
    bucket: Bucket, tiny_model: Path, tokens: PreTrainedTokenizerFast
) -> None:
    refined(bucket, ROWS)
    misrefined(bucket, ROWS)
    held = {"validation": Validation(fraction=0.34)}
    dataset = share(bucket, tiny_model, tokens, **held, **wrong("refined", rate=1.0))
    own, found = texts(share(bucket, tiny_model, tokens)), texts(dataset)
    assert len(dataset.held_out) == 2
    assert {identity for identity in own if found[identity] == own[identity]} == dataset.held_out
    metrics = counts_of(bucket, tiny_model, tokens, **held, **wrong("refined", rate=1.0)).metrics()
    assert (metrics["misled_examples"], metrics["train_examples"], metrics["validation_examples"]) == (4, 4, 2)


def test_a_bare_row_is_misled_by_a_refined_target_alone(
    bucket: Bucket, tiny_model: Path, tokens: PreTrainedTokenizerFast
) -> None:
    refined(bucket, ROWS)
    misrefined(bucket, ROWS)
    kept, changed = (
        share(bucket, tiny_model, tokens, bare_share=0.5, **wrong(target, rate=1.0)) for target in ("kept", "refined")
    )
    assert (len(kept.misled), len(changed.misled)) == (3, 6)
    assert not kept.bare & kept.misled.keys()
    assert all(learned.startswith("Wrongly") for _, learned in texts(changed).values())


def test_a_miscritique_and_its_target_are_part_of_the_digest_and_other_kinds_have_no_target(
    bucket: Bucket, tiny_model: Path, tokens: PreTrainedTokenizerFast
) -> None:
    refined(bucket, ROWS)
    misrefined(bucket, ROWS[:4])
    fewer = share(bucket, tiny_model, tokens, **wrong("kept")).identity()
    folder = misrefined(bucket, ROWS)
    kept, changed = (share(bucket, tiny_model, tokens, **wrong(target)).identity() for target in ("kept", "refined"))
    assert kept["misrefine"] == folder.digest != fewer["misrefine"]
    assert kept["critique"] == {"kind": "miscritique", "rate": 0.5, "target": "kept"}
    assert {name for name in kept if kept[name] != changed[name]} == {"critique"}
    plain = share(bucket, tiny_model, tokens, critique=Critique(kind="corrupted", rate=0.5)).identity()
    assert plain["critique"] == {"kind": "corrupted", "rate": 0.5}
    assert "misrefine" not in plain
