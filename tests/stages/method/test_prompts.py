"""The words: which slots each role fills, what survives which template, and how replies are read."""

from typing import get_args

import pytest
from support import tiny
from transformers import AutoTokenizer

from cgd_stages.chat.template import ChatTemplate, token_ids
from cgd_stages.contract import Repetition, Role
from cgd_stages.method import prompts

STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}"
)
DROPPING = "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer)


def render(template, messages):
    return template.render(messages).text


def test_the_answer_is_asked_with_the_prompt_and_nothing_else():
    assert prompts.answer_messages("2 + 2?") == [{"role": "user", "content": "2 + 2?"}]


def test_the_slots_of_the_critique_are_exact():
    system, user = prompts.critique_messages("2 + 2?", "5")
    assert system["role"] == "system"
    assert '"Conclusion: right"' in system["content"]
    assert '"Conclusion: wrong"' in system["content"]
    assert user == {"role": "user", "content": "Question: 2 + 2?\n\nStudent's Initial Answer: 5\n\nWrite the critique."}


SLOTS = "Question: 2 + 2?\n\nStudent's Initial Answer: 5\n\nCritique: off by one"


def test_the_slots_of_the_refinement_and_of_training_are_the_same():
    asked = prompts.refine_messages("2 + 2?", "5", "off by one")
    (trained,) = prompts.training_context("2 + 2?", "5", "off by one")
    assert asked[1] == {"role": "user", "content": f"{SLOTS}\n\nWrite the improved answer."}
    assert "your critique" in asked[0]["content"]
    assert "the teacher's critique" in prompts.TRAINING
    assert trained == {"role": "user", "content": f"{prompts.TRAINING}\n{SLOTS}"}


def test_a_miscritique_sees_the_critique_that_it_turns_round_and_ends_in_its_format():
    system, user = prompts.miscritique_messages("2 + 2?", "5", "off by one")
    assert user == {"role": "user", "content": f"{SLOTS}\n\nWrite the critique with the opposite verdict."}
    assert 'exactly "Conclusion: right" or "Conclusion: wrong"' in system["content"]


def test_what_is_refined_from_a_miscritique_is_asked_in_the_words_of_refine_and_sees_no_true_critique():
    row = {"prompt": "2 + 2?", "answer": "5", "critique": "off by one", "miscritique": "all is well"}
    asked = prompts.role_messages("misrefine", row)
    assert asked == prompts.refine_messages("2 + 2?", "5", "all is well")
    assert "off by one" not in str(asked)


def test_cgds_instruction_may_stand_in_a_system_turn():
    system, user = prompts.training_context("2 + 2?", "5", "off by one", instruction_turn="system")
    assert system == {"role": "system", "content": prompts.TRAINING}
    assert user == {"role": "user", "content": SLOTS}


def test_cfts_record_is_its_authors():
    (user,) = prompts.cft_context("2 + 2?", "5")
    assert user == {"role": "user", "content": f"{prompts.CFT}\nQuestion:\n2 + 2?\n\nSolution:\n5"}
    assert '"Conclusion: right" or "Conclusion: wrong"' in prompts.CFT
    system, below = prompts.cft_context("2 + 2?", "5", instruction_turn="system")
    assert [system["role"], below["content"]] == ["system", "Question:\n2 + 2?\n\nSolution:\n5"]


def test_without_a_critique_neither_its_slot_nor_its_name_is_in_the_context():
    (user,) = prompts.training_context("2 + 2?", "5", None)
    assert user["content"] == f"{prompts.UNCRITICISED}\nQuestion: 2 + 2?\n\nStudent's Initial Answer: 5"


def test_critique_and_refinement_begin_alike_up_to_the_end_of_the_answer(tokenizer):
    chat = with_template(tokenizer, tiny.TEMPLATE)
    critique = render(chat, prompts.critique_messages("2 + 2?", "5"))
    refine = render(chat, prompts.refine_messages("2 + 2?", "5", "off by one"))
    shared, _, _ = critique.partition("Write the critique.")
    assert shared.endswith("Question: 2 + 2?\n\nStudent's Initial Answer: 5\n\n")
    assert refine.startswith(shared)


def test_a_template_is_used_as_it_is(tokenizer):
    text = render(with_template(tokenizer, tiny.TEMPLATE), prompts.critique_messages("x", "y"))
    assert text.startswith(f"{tiny.START}system\n{prompts.TEACHER}{tiny.END}")
    assert text.endswith(f"{tiny.START}assistant\n")


@pytest.mark.parametrize("template", [STRICT, DROPPING])
def test_a_template_without_a_system_turn_keeps_the_instruction(tokenizer, template):
    text = render(with_template(tokenizer, template), prompts.critique_messages("x", "y"))
    assert text.startswith(f"[user]{prompts.TEACHER}\n\nQuestion: x")
    assert text.count(prompts.TEACHER) == 1


def test_a_model_without_a_template_gets_a_plain_frame(tokenizer):
    bare = with_template(tokenizer, None)
    assert render(bare, prompts.answer_messages("2 + 2?")) == "Question: 2 + 2?\n\nAnswer:"
    asked = render(bare, prompts.refine_messages("x", "y", "c"))
    assert asked.startswith(prompts.TEACHER)
    assert asked.endswith("Critique: c\n\nWrite the improved answer.\n\nResponse:")


def test_the_plain_frame_begins_as_the_tokenizer_begins_a_text(tokenizer):
    class Opening:
        chat_template = None
        bos_token, bos_token_id = "<s>", 1

        eos_token_id, added_tokens_decoder, all_special_tokens = 2, {}, ()

        def __call__(self, text, **_):
            return {"input_ids": [1]}

    assert render(ChatTemplate(Opening()), prompts.answer_messages("x")).startswith("<s>Question: x")


def test_special_tokens_of_a_rendered_text_are_single_tokens(tokenizer):
    text = render(with_template(tokenizer, tiny.TEMPLATE), prompts.answer_messages("x"))
    ids = token_ids(tokenizer, text)
    assert ids.count(tokenizer.convert_tokens_to_ids(tiny.START)) == 2
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["7 \u00d7 8 = 56", "naïve 東京 \U0001f34e", " two  blanks\n\n"])
def test_the_tiny_tokenizer_loses_no_text(tokenizer, text):
    assert tokenizer.decode(token_ids(tokenizer, text)) == text


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("So it is " + "I am sure. " * 43, "I am sure."),
        ("So it is " + "I am sure. " * 42, ""),
        ("yes " * 128, "yes"),
        ("yes " * 127, ""),
        ("1" + "0" * 400, ""),
        ("1" + " 0" * 100, ""),
        (f"{' '.join(map(str, range(20)))} " * 7, ""),
        (f"{' '.join(map(str, range(20)))} " * 8, " ".join(map(str, range(20)))),
        ("I am sure. " * 60 + "The answer is 4.", ""),
        (" ".join(f"{n} plus {n} is {2 * n}." for n in range(100)), ""),
        ("", ""),
    ],
)
def test_a_text_loops_when_its_end_repeats(text, loop):
    assert prompts.loops(text) == loop


def test_what_a_loop_is_can_be_set_and_switched_off():
    text = "yes " * 200
    assert prompts.loops(text, Repetition(min_tokens=1024)) == ""
    assert prompts.loops("yes " * 256, Repetition(min_tokens=1024)) == "yes"
    assert prompts.loops(text, Repetition(stop=False)) == ""


@pytest.mark.parametrize(
    ("critique", "verdict"),
    [
        ("Fine.\nConclusion: right", "right"),
        ("Conclusion: wrong", "wrong"),
        ("Off.\n**Conclusion: Wrong.**\n\n", "wrong"),
        ("Off.\n\\textbf{Conclusion: wrong}", "wrong"),
        ("\\textbf{Conclusion:} right.", "right"),
        ("Conclusion: \\textbf{wrong}", "wrong"),
        ("{\\bf Conclusion}: \\boxed{\\text{right}}", "right"),
        ("\\textbf{Conclusion: right or wrong}", None),
        ("\\textbfConclusion: right", None),
        ("Conclusion: right\nBut then again", None),
        ("Conclusion: right or wrong", None),
        ("In conclusion: wrong", None),
        ("", None),
    ],
)
def test_the_verdict_is_the_last_line_or_none(critique, verdict):
    assert prompts.verdict(critique) == verdict


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("TEACHER", ["critique", "refine", "misrefine"]),
        ("CRITIQUE", ["critique"]),
        ("REFINE", ["refine", "misrefine"]),
        ("MISCRITIQUE", ["miscritique"]),
        ("OPPOSITE", ["miscritique"]),
    ],
)
def test_a_roles_fingerprint_follows_its_own_words_only(monkeypatch, name, changed):
    before = {role: prompts.fingerprint(role) for role in get_args(Role)}
    monkeypatch.setattr(prompts, name, "Look at this.")
    after = {role: prompts.fingerprint(role) for role in get_args(Role)}
    assert [role for role in before if before[role] != after[role]] == changed


@pytest.mark.parametrize(
    ("critique", "changed"),
    [
        ("Off.\nConclusion: wrong", "Off.\nConclusion: right"),
        ("Off.\n**Conclusion: Wrong**\n", "Off.\nConclusion: right"),
        ("Off.\n\\textbf{Conclusion: wrong}", "Off.\nConclusion: right"),
        ("Off.", "Off.\nConclusion: right"),
        ("Conclusion: wrong", "Conclusion: right"),
    ],
)
def test_a_critique_can_be_given_another_verdict(critique, changed):
    assert prompts.with_verdict(critique, "right") == changed
