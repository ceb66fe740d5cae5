"""The small student that thinks: what it is taught, its tokenizer, and that what it learns fits its template."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch
from support import tiny
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import thinking.__main__ as thinking
from cgd_stages.method.prompts import verdict
from thinking.lessons import Lesson, lessons, problems

SOME: list[Lesson] = list(itertools.islice(lessons(), 400))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, whose tokenizer has SmolLM2's two tokens for code."""
    folder = tiny.make(tmp_path_factory.mktemp("source"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in thinking.MARKERS])
    tokenizer.save(str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(tokenizer.get_vocab_size(), mean_resizing=False)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    thinking.make(source, folder, steps=2)
    return folder


@pytest.fixture(scope="module")
def tokenizer(made: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(made)


def boxed(text: str) -> int:
    (number,) = re.findall(r"\\boxed\{(-?\d+)\}", text)
    return int(number)


def test_every_role_is_taught_with_a_thought_and_without_one() -> None:
    kinds = {(len(lesson.messages[-1]["content"].split("\n\n")), lesson.thought is None) for lesson in SOME}
    assert kinds == {(slots, none) for slots in (1, 3, 4) for none in (True, False)}


def test_the_results_of_answers_and_refinements_are_those_of_their_thoughts() -> None:
    thoughtful = [lesson for lesson in SOME if lesson.thought and "boxed" in lesson.reply]
    assert len(thoughtful) > 100
    assert all(lesson.thought.endswith(f"= {boxed(lesson.reply)}.") for lesson in thoughtful if lesson.thought)


def test_a_critique_ends_with_the_verdict_that_the_draft_deserves() -> None:
    verdicts = set()
    for lesson in SOME:
        if said := verdict(lesson.reply):
            draft = boxed(lesson.messages[-1]["content"])
            stated, result = map(int, re.findall(r"states (\d+), and the result is (\d+)\.", lesson.reply)[0])
            assert (stated, said) == (draft, "right" if draft == result else "wrong")
            verdicts.add(said)
    assert verdicts == {"right", "wrong"}


def test_the_problems_are_not_those_of_the_quick_start() -> None:
    files = [Path(__file__).parents[2] / "examples" / f"quickstart-{name}.jsonl" for name in ("problems", "heldout")]
    known = {json.loads(line)["question"] for file in files for line in file.read_text().splitlines()}
    drawn = {problem.question for problem in itertools.islice(problems(random.Random(11)), 300)}
    assert len(known) == 80
    assert not known & drawn


def test_the_markers_of_a_thought_are_single_tokens_that_decoding_keeps(
    source: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = AutoTokenizer.from_pretrained(source)
    for old, new in thinking.MARKERS.items():
        assert tokenizer.encode(new) == before.encode(old) == [tokenizer.convert_tokens_to_ids(new)]
    assert tokenizer.decode(tokenizer.encode("<think>\n2\n</think>\n\n4"), skip_special_tokens=True).startswith(
        "<think>"
    )
    assert len(tokenizer) == len(before)


@pytest.mark.parametrize("thought", ["7 + 9 = 16.", None])
def test_what_is_learned_is_what_the_template_writes_of_such_a_reply(
    tokenizer: PreTrainedTokenizerFast, thought: str | None
) -> None:
    lesson = Lesson([{"role": "user", "content": "What is 7 + 9?"}], thought, "16.")
    ids, labels = thinking.example(tokenizer, lesson)
    learned = tokenizer.decode([label for label in labels if label != thinking.IGNORE])
    assert learned == ("16.<|im_end|>" if thought is None else f"<think>\n{thought}\n</think>\n\n16.<|im_end|>")
    reply = {"role": "assistant", "content": "16.", "reasoning_content": thought or ""}
    assert tokenizer.decode(ids) + "\n" == tokenizer.apply_chat_template([*lesson.messages, reply], tokenize=False)


def test_the_model_is_tuned_and_whole(source: Path, made: Path) -> None:
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, made))
    assert after.dtype == torch.bfloat16
    assert not torch.equal(before.lm_head.weight.bfloat16(), after.lm_head.weight)
    assert (made / "generation_config.json").exists()
