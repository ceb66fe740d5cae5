"""The exam: a model is given questions alone, one pass, greedy, in batches.

python -m replicate.exam <model> <questions.jsonl> <answers.jsonl>
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.method import prompts

MOST_TOKENS = 160
BATCH = 100


def main(model: Path, questions: Path, answers: Path) -> None:
    asked = [json.loads(line)["question"] for line in questions.read_text().splitlines()]
    with answers.open("w") as file:
        for question, (output, tokens, ended) in zip(asked, taken(model, asked), strict=True):
            line = {"question": question, "output": output, "tokens": tokens, "ended": ended}
            file.write(json.dumps(line) + "\n")


def taken(folder: Path, questions: list[str]) -> Iterator[tuple[str, int, bool]]:
    """For each question: the output, its tokens, and whether it came to an end by itself."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    template = ChatTemplate(tokenizer)
    for at in range(0, len(questions), BATCH):
        texts = [template.render(prompts.answer_messages(one)).text for one in questions[at : at + BATCH]]
        given = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        with torch.inference_mode():
            made = model.generate(
                input_ids=given["input_ids"],
                attention_mask=given["attention_mask"],
                do_sample=False,
                max_new_tokens=MOST_TOKENS,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )[:, given["input_ids"].shape[1] :]
        for row in made.tolist():
            ended = tokenizer.eos_token_id in row
            said = row[: row.index(tokenizer.eos_token_id)] if ended else row
            yield tokenizer.decode(said, skip_special_tokens=True), len(said), ended


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
