"""The mask: what of a quadruple is learned, what is not, and which rows make no example at all."""

from pathlib import Path

import pytest
import tiny
from transformers import PreTrainedTokenizerFast

from cgd_stages.examples import IGNORE, Example, Unusable, cgd_example, each_example, example, show
from cgd_stages.prompts import TRAINING, render, token_ids, training_context

ROW = {
    "id": "0" * 20,
    "sample": 0,
    "prompt": "How many apples are left?",
    "answer": "12 apples.",
    "critique": "Ann gives 7 to Ben.\nConclusion: wrong",
    "refinement": "12 - 7 = 5 apples are left.",
}


def tokenizer(folder: Path, template: str | None = tiny.TEMPLATE) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny.make(folder / "model", template=template))


@pytest.fixture
def chat(tmp_path: Path) -> PreTrainedTokenizerFast:
    return tokenizer(tmp_path)


def learned(tokens: PreTrainedTokenizerFast, made: Example) -> str:
    return str(tokens.decode([label for label in made.labels if label != IGNORE]))


def test_the_refinement_and_its_end_of_turn_are_learned_and_nothing_else(chat: PreTrainedTokenizerFast) -> None:
    made = cgd_example(chat, ROW, max_length=1000)
    assert learned(chat, made) == f"{ROW['refinement']}{tiny.END}"
    context = chat.decode(made.input_ids[: made.start])
    assert [part in context for part in (TRAINING, ROW["prompt"], ROW["answer"], ROW["critique"])] == [True] * 4
    assert str(ROW["refinement"]) not in context


def test_the_context_is_token_for_token_what_a_model_is_given(chat: PreTrainedTokenizerFast) -> None:
    made = cgd_example(chat, ROW, max_length=1000)
    context = training_context(ROW["prompt"], ROW["answer"], ROW["critique"])  # type: ignore[arg-type]
    assert made.input_ids[: made.start] == token_ids(chat, render(chat, context))


def test_labels_are_the_tokens_themselves_after_the_context(chat: PreTrainedTokenizerFast) -> None:
    made = cgd_example(chat, ROW, max_length=1000)
    assert len(made.labels) == len(made.input_ids)
    assert set(made.labels[: made.start]) == {IGNORE}
    assert made.labels[made.start :] == made.input_ids[made.start :]


def test_what_the_template_writes_after_the_end_of_turn_is_not_learned(chat: PreTrainedTokenizerFast) -> None:
    assert chat.decode(cgd_example(chat, ROW, max_length=1000).input_ids).endswith(f"left.{tiny.END}")


def test_the_mask_can_be_shown(chat: PreTrainedTokenizerFast) -> None:
    assert show(["2+2", "=5", "wrong", "4", "</s>"], [IGNORE] * 3 + [7, 2]) == "2+2 =5 wrong [4] [</s>]"
    made = cgd_example(chat, ROW, max_length=1000)
    shown = show(chat.convert_ids_to_tokens(made.input_ids), made.labels)
    assert shown.endswith(f"[{tiny.END}]")
    assert shown.count("[") >= len(made.input_ids) - made.start


@pytest.mark.parametrize("target", ["", "  \n"])
def test_an_empty_target_is_refused(chat: PreTrainedTokenizerFast, target: str) -> None:
    with pytest.raises(Unusable, match="empty"):
        cgd_example(chat, ROW | {"refinement": target}, max_length=1000)


def test_a_row_one_token_too_long_is_refused_and_never_cut(chat: PreTrainedTokenizerFast) -> None:
    length = len(cgd_example(chat, ROW, max_length=1000).input_ids)
    assert len(cgd_example(chat, ROW, max_length=length).input_ids) == length
    with pytest.raises(Unusable, match=f"too_long: {length} tokens, .* limit {length - 1}"):
        cgd_example(chat, ROW, max_length=length - 1)


def test_without_a_chat_template_the_plain_frame_is_used_and_the_end_of_text_is_learned(tmp_path: Path) -> None:
    plain = tokenizer(tmp_path, template=None)
    made = cgd_example(plain, ROW, max_length=1000)
    assert learned(plain, made) == f" {ROW['refinement']}{tiny.END}"
    assert TRAINING in plain.decode(made.input_ids[: made.start])


def test_a_template_without_an_end_of_turn_gets_the_end_of_text(tmp_path: Path) -> None:
    turns = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    bare = turns + "{% if add_generation_prompt %}assistant: {% endif %}"
    tokens = tokenizer(tmp_path, bare)
    assert learned(tokens, cgd_example(tokens, ROW, max_length=1000)) == f"{ROW['refinement']}\n{tiny.END}"


def test_a_model_without_any_end_token_is_refused(tmp_path: Path) -> None:
    tokens = tokenizer(tmp_path, template=None)
    tokens.eos_token = None
    with pytest.raises(Unusable, match="neither an end-of-turn nor"):
        cgd_example(tokens, ROW, max_length=1000)


def test_a_template_that_takes_no_system_turn_keeps_the_instruction(tmp_path: Path) -> None:
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + tiny.TEMPLATE
    )
    tokens = tokenizer(tmp_path, strict)
    made = cgd_example(tokens, ROW, max_length=1000)
    assert TRAINING in tokens.decode(made.input_ids[: made.start])
    assert learned(tokens, made) == f"{ROW['refinement']}{tiny.END}"


def test_a_template_whose_context_changes_with_the_reply_is_refused(tmp_path: Path) -> None:
    shifty = "{% if messages[-1]['role'] == 'assistant' %}transcript: {% endif %}" + tiny.TEMPLATE
    with pytest.raises(Unusable, match="template: with a reply"):
        cgd_example(tokenizer(tmp_path, shifty), ROW, max_length=1000)


def test_a_template_that_writes_more_turns_after_the_reply_is_refused(tmp_path: Path) -> None:
    chatty = tiny.TEMPLATE + "{% if not add_generation_prompt %}and so on{% endif %}"
    with pytest.raises(Unusable, match="after the end of the reply"):
        cgd_example(tokenizer(tmp_path, chatty), ROW, max_length=1000)


def test_a_target_that_holds_a_special_token_is_refused(chat: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Unusable, match="special token"):
        cgd_example(chat, ROW | {"refinement": f"5 {tiny.END} and more"}, max_length=1000)


def test_tokens_that_would_merge_across_the_border_stay_apart(tmp_path: Path) -> None:
    glued = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}ans{% endif %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}ans{% endif %}"
    )
    tokens = tokenizer(tmp_path, glued)
    before, whole = tokens("an ans")["input_ids"], tokens("an answer")["input_ids"]
    assert whole[: len(before)] != before
    made = example(tokens, [{"role": "user", "content": "an "}], "wer is left", max_length=100)
    assert made.input_ids[: made.start] == before
    assert learned(tokens, made) == f"wer is left{tiny.END}"


def test_every_row_comes_back_with_an_example_or_a_reason(chat: PreTrainedTokenizerFast) -> None:
    rows = [ROW, ROW | {"refinement": ""}, ROW]
    outcomes = [found for _, found in each_example(chat, iter(rows), max_length=1000)]
    assert [isinstance(found, Example) for found in outcomes] == [True, False, True]
