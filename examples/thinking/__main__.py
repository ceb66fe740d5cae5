"""Make a small student that thinks: SmolLM2-135M-Instruct with a chat template like Qwen3's, tuned for some minutes.

    PYTHONPATH=examples python -m thinking [--folder FOLDER] [--steps STEPS]

It learns to write `<think>`, a thought, `</think>` and a reply, and to reply at once where `enable_thinking: false` has
written an empty thought. Prints the folder of the model. A folder that is whole is not made again.
"""

import argparse
import itertools
import json
import math
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from cgd_local import smollm2
from thinking.lessons import Lesson, lessons

NAME = "SmolLM2-135M-Thinking"
TEMPLATE = Path(__file__).with_name("template.jinja")
MARKERS = {"<jupyter_script>": "<think>", "<empty_output>": "</think>"}
"""Tokens that SmolLM2 has for code, and what they become: as in Qwen3, ordinary tokens that decoding keeps."""
BEGINNINGS = {"<think>": "To", "</think>": "\n\n"}
"""What SmolLM2 would write in the place of each marker: the marker's embedding begins as that of the last token."""
STEPS, BATCH, RATE, WARMUP = 60, 3, 5e-4, 3
TUNED_LAYERS = 8
"""The last layers, which learn together with the embeddings; the other 22 stay as they are, which halves the time."""
IGNORE = -100
Example = tuple[list[int], list[int]]
"""Token ids, and the labels: IGNORE in the request."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="thinking", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=smollm2.cache_home() / "models" / NAME)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps of {BATCH} examples")
    options = parser.parse_args()
    source = smollm2.ensure()
    smollm2.make_once(options.folder, lambda empty: make(source, empty, options.steps))
    print(options.folder)


def make(source: Path, folder: Path, steps: int) -> None:
    """Write the tuned model to an empty folder."""
    write_tokenizer(source, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
    begin_markers(model, tokenizer)
    tune(model, tokenizer, steps)
    model.to(torch.bfloat16).save_pretrained(folder)


def write_tokenizer(source: Path, folder: Path) -> None:
    """SmolLM2's tokenizer with the markers of a thought and our template; the vocabulary keeps its size."""
    shutil.copy(source / "tokenizer_config.json", folder)
    shutil.copy(TEMPLATE, folder / "chat_template.jinja")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        if new := MARKERS.get(token["content"]):
            token |= {"content": new, "special": False}
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {MARKERS.get(name, name): number for name, number in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))


def begin_markers(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Give the markers embeddings that are likely where they belong; SmolLM2 never writes the two tokens."""
    for weights in (model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data):
        for marker, text in BEGINNINGS.items():
            weights[tokenizer.convert_tokens_to_ids(marker)] = weights[tokenizer.encode(text)[-1]]


def tune(model: Any, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """AdamW on the replies alone. Where the CPU can, matrices are multiplied in bfloat16; elsewhere that is slow."""
    fast_bfloat16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    for layer in model.model.layers[:-TUNED_LAYERS]:
        layer.requires_grad_(False)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.0, weight_decay=0.0)
    model.train()
    for step, (ids, labels) in enumerate(itertools.islice(batches(tokenizer), steps)):
        optimizer.param_groups[0]["lr"] = rate(step, steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16):
            embedded = model.get_input_embeddings()(ids).detach()  # the tied weights learn as the head
            mask = (ids != tokenizer.pad_token_id).long()
            hidden = model.model(inputs_embeds=embedded, attention_mask=mask)[0][:, :-1]
            learned = labels[:, 1:] != IGNORE
            logits = model.lm_head(hidden[learned])
        loss = cross_entropy(logits.float(), labels[:, 1:][learned])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", file=sys.stderr)


def rate(step: int, steps: int) -> float:
    """The learning rate: it rises over WARMUP steps and falls along a cosine."""
    return RATE * min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2


def batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels, each (BATCH, longest); examples of like length together."""
    dice, examples = random.Random(0), (example(tokenizer, lesson) for lesson in lessons())
    while True:
        some = sorted(itertools.islice(examples, 8 * BATCH), key=lambda one: len(one[0]))
        chosen = [some[at : at + BATCH] for at in range(0, len(some), BATCH)]
        dice.shuffle(chosen)
        for rows in chosen:
            longest = len(rows[-1][0])
            ids = [ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in rows]
            labels = [labels + [IGNORE] * (longest - len(labels)) for _, labels in rows]
            yield torch.tensor(ids), torch.tensor(labels)


def example(tokenizer: PreTrainedTokenizerFast, lesson: Lesson) -> Example:
    """The request as the template writes it, then what the model writes: a thought if it is to think, the reply, the
    end of the turn."""
    asked = tokenizer.apply_chat_template(
        lesson.messages, tokenize=False, add_generation_prompt=True, enable_thinking=lesson.thought is not None
    )
    thought = "" if lesson.thought is None else f"<think>\n{lesson.thought}\n</think>\n\n"
    context = tokenizer(asked, add_special_tokens=False)["input_ids"]
    target = tokenizer(f"{thought}{lesson.reply}<|im_end|>", add_special_tokens=False)["input_ids"]
    return context + target, [IGNORE] * len(context) + target


if __name__ == "__main__":
    main()
