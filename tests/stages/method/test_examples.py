"""The mask: what of a quadruple is learned, what is not, and which rows make no example at all."""

from pathlib import Path
from typing import Any

import pytest
from support import tiny

from cgd_stages.chat.example import IGNORE, Example, Unusable, example, show
from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Critique
from cgd_stages.errors import UserError
from cgd_stages.method import prompts
from cgd_stages.method.examples import (
    BARE,
    Critic,
    chosen,
    conversation,
    critic,
    each_example,
    exchanged,
    row_example,
    wording,
)
from cgd_stages.method.prompts import TRAINING, training_context, verdict
from cgd_stages.store.rows import Key, Row

ROW = {
    "id": "0" * 20,
    "sample": 0,
    "prompt": "How many apples are left?",
    "answer": "12 apples.",
    "critique": "Ann gives 7 to Ben.\nConclusion: wrong",
    "refinement": "12 - 7 = 5 apples are left.",
}


def spoken(folder: Path, template: str | None = tiny.TEMPLATE) -> ChatTemplate:
    return ChatTemplate.load(tiny.make(folder / "model", template=template))


@pytest.fixture
def chat(tmp_path: Path) -> ChatTemplate:
    return spoken(tmp_path)


def learned(template: ChatTemplate, made: Example) -> str:
    return str(template.tokenizer.decode([label for label in made.labels if label != IGNORE]))


def test_the_refinement_and_its_end_of_turn_are_learned_and_nothing_else(chat: ChatTemplate) -> None:
    made = row_example(chat, "CGD", ROW, max_length=1000)
    assert learned(chat, made) == f"{ROW['refinement']}{tiny.END}"
    context = chat.tokenizer.decode(made.input_ids[: made.start])
    assert [part in context for part in (TRAINING, ROW["prompt"], ROW["answer"], ROW["critique"])] == [True] * 4
    assert str(ROW["refinement"]) not in context


def test_the_context_is_token_for_token_what_a_model_is_given(chat: ChatTemplate) -> None:
    made = row_example(chat, "CGD", ROW, max_length=1000)
    context = training_context(ROW["prompt"], ROW["answer"], ROW["critique"])  # type: ignore[arg-type]
    assert made.input_ids[: made.start] == chat.token_ids(chat.render(context))


def test_labels_are_the_tokens_themselves_after_the_context(chat: ChatTemplate) -> None:
    made = row_example(chat, "CGD", ROW, max_length=1000)
    assert len(made.labels) == len(made.input_ids)
    assert set(made.labels[: made.start]) == {IGNORE}
    assert made.labels[made.start :] == made.input_ids[made.start :]


def test_what_the_template_writes_after_the_end_of_turn_is_not_learned(chat: ChatTemplate) -> None:
    assert chat.tokenizer.decode(row_example(chat, "CGD", ROW, max_length=1000).input_ids).endswith(f"left.{tiny.END}")


def test_the_mask_can_be_shown(chat: ChatTemplate) -> None:
    assert show(["2+2", "=5", "wrong", "4", "</s>"], [IGNORE] * 3 + [7, 2]) == "2+2 =5 wrong [4] [</s>]"
    made = row_example(chat, "CGD", ROW, max_length=1000)
    shown = show(chat.tokenizer.convert_ids_to_tokens(made.input_ids), made.labels)
    assert shown.endswith(f"[{tiny.END}]")
    assert shown.count("[") >= len(made.input_ids) - made.start


@pytest.mark.parametrize("target", ["", "  \n"])
def test_an_empty_target_is_refused(chat: ChatTemplate, target: str) -> None:
    with pytest.raises(Unusable, match="empty"):
        row_example(chat, "CGD", ROW | {"refinement": target}, max_length=1000)


def test_a_row_one_token_too_long_is_refused_and_never_cut(chat: ChatTemplate) -> None:
    length = len(row_example(chat, "CGD", ROW, max_length=1000).input_ids)
    assert len(row_example(chat, "CGD", ROW, max_length=length).input_ids) == length
    with pytest.raises(Unusable, match=f"too_long: {length} tokens, .* limit {length - 1}"):
        row_example(chat, "CGD", ROW, max_length=length - 1)


def test_without_a_chat_template_the_plain_frame_is_used_and_the_end_of_text_is_learned(tmp_path: Path) -> None:
    plain = spoken(tmp_path, template=None)
    made = row_example(plain, "CGD", ROW, max_length=1000)
    assert learned(plain, made) == f" {ROW['refinement']}{tiny.END}"
    assert TRAINING in plain.tokenizer.decode(made.input_ids[: made.start])


def test_a_template_without_an_end_of_turn_gets_the_end_of_text(tmp_path: Path) -> None:
    turns = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    bare = turns + "{% if add_generation_prompt %}assistant: {% endif %}"
    tokens = spoken(tmp_path, bare)
    assert learned(tokens, row_example(tokens, "CGD", ROW, max_length=1000)) == f"{ROW['refinement']}\n{tiny.END}"


def test_a_model_without_any_end_token_can_be_asked_and_has_no_example(tmp_path: Path) -> None:
    tokens = spoken(tmp_path, template=None).tokenizer
    tokens.eos_token = None
    template = ChatTemplate(tokens)
    assert (template.extra_stops, template.ending(), template.identity()) == ([], {}, {})
    assert template.split(tokens("It is 4.")["input_ids"], "It is 4.").text == "It is 4."
    with pytest.raises(Unusable, match="neither an end-of-turn nor an end-of-text token"):
        row_example(template, "CGD", ROW, max_length=1000)


def test_a_template_that_takes_no_system_turn_keeps_the_instruction(tmp_path: Path) -> None:
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + tiny.TEMPLATE
    )
    tokens = spoken(tmp_path, strict)
    made = row_example(tokens, "CGD", ROW, max_length=1000, instruction_turn="system")
    assert TRAINING in tokens.tokenizer.decode(made.input_ids[: made.start])
    assert learned(tokens, made) == f"{ROW['refinement']}{tiny.END}"


def test_a_template_whose_context_changes_with_the_reply_is_refused(tmp_path: Path) -> None:
    shifty = "{% if messages[-1]['role'] == 'assistant' %}transcript: {% endif %}" + tiny.TEMPLATE
    with pytest.raises(UserError, match="begins differently when a reply follows"):
        spoken(tmp_path, shifty)


def test_a_template_that_writes_more_turns_after_the_reply_is_refused(tmp_path: Path) -> None:
    chatty = tiny.TEMPLATE + "{% if not add_generation_prompt %}and so on{% endif %}"
    with pytest.raises(UserError, match="after the end of the reply"):
        spoken(tmp_path, chatty)


def test_a_special_token_in_a_target_is_learned_as_the_text_that_it_is(chat: ChatTemplate) -> None:
    made = row_example(chat, "CGD", ROW | {"refinement": f"5 {tiny.END} and more"}, max_length=1000)
    assert learned(chat, made) == f"5 {tiny.END} and more{tiny.END}"
    assert made.input_ids[made.start :].count(chat.tokenizer.eos_token_id) == 1


def test_tokens_that_would_merge_across_the_border_stay_apart(tmp_path: Path) -> None:
    glued = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}ans{% endif %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}ans{% endif %}"
    )
    tokens = spoken(tmp_path, glued)
    before, whole = (tokens.tokenizer(text)["input_ids"] for text in ("an ans", "an answer"))
    assert whole[: len(before)] != before
    made = example(tokens, [{"role": "user", "content": "an "}], "wer is left", max_length=100)
    assert made.input_ids[: made.start] == before
    assert learned(tokens, made) == f"wer is left{tiny.END}"


def test_every_row_comes_back_with_an_example_or_a_reason(chat: ChatTemplate) -> None:
    rows = [ROW, ROW | {"refinement": ""}, ROW]
    outcomes = [found for _, found in each_example(chat, "CGD", rows, max_length=1000)]
    assert [isinstance(found, Example) for found in outcomes] == [True, False, True]


def test_a_row_without_the_target_is_missing_it_and_not_empty(chat: ChatTemplate) -> None:
    with pytest.raises(Unusable, match="missing: the row does not have the reference answer"):
        row_example(chat, "SFT", ROW | {"reference": None}, max_length=1000)


# --- what stands in the critique's place -------------------------------------------------------------------------

ROWS: list[Row] = [
    ROW | {"id": f"{n:020x}", "critique": f"Look at {n}.\nConclusion: {'right' if n % 3 else 'wrong'}"}
    for n in range(20)
]


def given(rows: list[Row] = ROWS, seed: int = 0, **critique: Any) -> dict[str, str | None]:
    """What every row has in the critique's place, by id."""
    made: Critic = critic(Critique(**critique), seed, iter(rows))
    return {row["id"]: made(row) for row in rows}


OWN = {row["id"]: row["critique"] for row in ROWS}


def test_a_matched_critique_is_the_rows_own() -> None:
    assert given(kind="matched") == OWN


def test_shuffled_gives_every_critique_to_another_row_once() -> None:
    shuffled = given(kind="shuffled")
    assert sorted(map(str, shuffled.values())) == sorted(OWN.values())
    assert not [i for i in OWN if shuffled[i] == OWN[i]]


@pytest.mark.parametrize("kind", ["shuffled", "corrupted"])
def test_who_gets_what_follows_from_the_seed_and_not_from_the_order_of_rows(kind: str) -> None:
    assert given(ROWS[::-1], kind=kind, rate=0.5) == given(kind=kind, rate=0.5)
    assert given(seed=1, kind=kind, rate=0.5) != given(kind=kind, rate=0.5)


@pytest.mark.parametrize("seed", range(5))
def test_nobody_gets_a_critique_of_his_own_prompt_even_with_several_samples(seed: int) -> None:
    keys: list[Key] = [(f"{n:x}", sample) for n in range(5) for sample in range(1 + n)]
    others = exchanged(keys, seed)
    assert sorted(others.values()) == sorted(keys)
    assert not [key for key, other in others.items() if key[0] == other[0]]


def test_critiques_of_one_prompt_alone_cannot_change_places() -> None:
    with pytest.raises(ValueError, match="too few of them have other prompts"):
        exchanged([("a", 0), ("a", 1), ("b", 0)], 0)


def test_generic_is_one_text_that_knows_neither_row_nor_verdict() -> None:
    assert set(given(kind="generic").values()) == {prompts.GENERIC}
    assert verdict(prompts.GENERIC) is None


def test_without_a_critique_the_context_holds_neither_its_slot_nor_a_word_of_it() -> None:
    assert set(given(kind="none").values()) == {None}
    context, _ = conversation("CGD", ROW | {"critique": None})
    text = context[-1]["content"]
    assert ROW["prompt"] in text
    assert ROW["answer"] in text
    assert "ritique" not in text


@pytest.mark.parametrize(("rate", "wrong"), [(0.05, 1), (0.3, 6), (1.0, 20)])
def test_corrupted_changes_exactly_the_fraction_of_the_rows(rate: float, wrong: int) -> None:
    corrupted = given(kind="corrupted", rate=rate)
    assert len([i for i in OWN if corrupted[i] != OWN[i]]) == wrong


def test_a_corrupted_critique_is_another_rows_under_the_opposite_verdict() -> None:
    corrupted, shuffled = given(kind="corrupted", rate=1.0), given(kind="shuffled")
    for i, own in OWN.items():
        assert {verdict(str(corrupted[i])), verdict(own)} == {"right", "wrong"}
        assert str(corrupted[i]).splitlines()[0] == str(shuffled[i]).splitlines()[0]


def test_where_the_verdict_is_not_known_the_corrupted_critique_is_another_rows_as_it_is() -> None:
    rows = [row | {"critique": f"Look at {row['id']}."} for row in ROWS]
    assert given(rows, kind="corrupted", rate=1.0) == given(rows, kind="shuffled")


def test_a_higher_rate_corrupts_the_same_rows_and_more() -> None:
    keys = [(i, 0) for i in OWN]
    assert chosen(keys, 0.2, 0, "corrupt") < chosen(keys, 0.6, 0, "corrupt") < chosen(keys, 1.0, 0, "corrupt")


def test_which_rows_are_bare_says_nothing_about_which_are_corrupted() -> None:
    keys = [(i, 0) for i in OWN]
    assert chosen(keys, 0.5, 0, "bare") != chosen(keys, 0.5, 0, "corrupt")
    assert chosen(keys, 0.5, 0, "bare") == chosen(keys[::-1], 0.5, 0, "bare")


@pytest.mark.parametrize("kind", ["shuffled", "generic", "none", "corrupted"])
def test_every_ablation_leaves_the_targets_as_they_are(chat: ChatTemplate, kind: str) -> None:
    made = critic(Critique.model_validate({"kind": kind, "rate": 1.0}), 0, ROWS)
    plain = dict(learnt(chat, None))
    assert dict(learnt(chat, made)) == plain


def learnt(tokens: ChatTemplate, critic: Critic | None) -> list[tuple[str, str]]:
    found = each_example(tokens, "CGD", ROWS, critic, max_length=1000)
    return [(row["id"], learned(tokens, made)) for row, made in found if isinstance(made, Example)]


def test_the_wording_of_every_context_has_its_own_hash() -> None:
    kinds = [Critique(kind="matched"), Critique(kind="generic"), Critique(kind="none")]
    hashes = {wording("CGD", kind) for kind in kinds} | {wording("CFT", Critique()), wording("SFT", Critique())}
    assert len(hashes) == 5
    assert wording("SFT", Critique()) == wording("RefinedSFT", Critique())
    assert wording("CGD", Critique()) != wording("CGD", Critique(), "system")
    assert wording("SFT", Critique()) == wording("SFT", Critique(), "system")


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        ("matched", "ee237d5cf17a5273b7a405dfb2be892d7297f8d22c4961e90478b43deae1ade2"),
        ("generic", "95fc502280c6701385850bc84abfbb899737db9550f7ff654450a5a77b8f659d"),
        ("none", "7386a34a070f67587fe4abb9cd03594694d5fba83fe0be3f3a720f72bc4c92ec"),
    ],
)
def test_with_its_system_turn_cgd_is_worded_as_when_there_was_no_other(kind: str, stored: str) -> None:
    assert wording("CGD", Critique.model_validate({"kind": kind}), "system") == stored


def test_a_bare_row_is_asked_as_in_an_evaluation_and_keeps_its_target() -> None:
    bare, target = conversation(BARE, ROW)
    assert bare == prompts.answer_messages(str(ROW["prompt"]))
    assert target == conversation("CGD", ROW)[1]
