"""Makes the student: a small Llama and its tokenizer.

It is trained on the corpus until it can work sums, and then until it would rather guess. The result is a folder as
any student's: config, safetensors, tokenizer with chat template.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cgd_stages.chat.template import ChatTemplate, token_ids
from cgd_stages.method import prompts
from replicate.corpus import JUMPS, LATER_JUMPS, Conversation, conversations

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = 1024
BATCH = 32
PEAK_RATE, MATRIX_RATE, WARMUP = 3e-3, 0.02, 50
"""Of AdamW and of Muon, and the steps in which they rise."""
LATER = 2 / 15
"""Share of the steps that make the habit of guessing."""
VOCABULARY = 700


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the corpus and over the texts of the method; every digit is a token of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=START, eos_token=END, pad_token=PAD, model_max_length=CONTEXT
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _texts() -> Iterator[str]:
    method = (
        prompts.TEACHER,
        prompts.CRITIQUE,
        prompts.REFINE,
        prompts.TRAINING,
        prompts.UNCRITICISED,
        prompts.GENERIC,
    )
    for _ in range(20):  # as often as makes their words whole
        yield from method
    for one in itertools.islice(conversations(0), 500):
        yield from (message["content"] for message in one.messages)
        yield one.reply


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    return LlamaForCausalLM(config)


def pretrain(folder: Path, *, steps: int, seed: int, tell: Callable[[int, float], None]) -> None:
    """Train for so many steps and write the student into the folder. `tell`: the step and its loss."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed).train()
    muon, adam = _optimizers(model)
    later = round(steps * LATER)
    skill, habit = batches(tokenizer, seed + 1, JUMPS), batches(tokenizer, seed + 2, LATER_JUMPS)
    chosen = itertools.chain(itertools.islice(skill, steps - later), itertools.islice(habit, later))
    for step, ids in enumerate(chosen):
        share = min(1.0, (step + 1) / WARMUP) * math.cos(step / steps * math.pi / 2)
        real = ids != tokenizer.pad_token_id
        logits = model(input_ids=ids, attention_mask=real.long()).logits[:, :-1]
        loss: torch.Tensor = cross_entropy(logits[real[:, 1:]], ids[:, 1:][real[:, 1:]])
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.param_groups[0]["lr"] = PEAK_RATE * share
        adam.step()
        muon.step(MATRIX_RATE * share)
        model.zero_grad()
        tell(step + 1, loss.item())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, jumps: float = JUMPS) -> Iterator[torch.Tensor]:
    """Token ids, each (BATCH, longest); conversations of like length together."""
    dice = random.Random(seed)
    template = ChatTemplate(tokenizer)
    examples = (_encoded(template, one) for one in conversations(seed, jumps))
    while True:
        some = sorted(itertools.islice(examples, 16 * BATCH), key=len)
        chosen = [some[at : at + BATCH] for at in range(0, len(some), BATCH)]
        dice.shuffle(chosen)
        for rows in chosen:
            longest = max(map(len, rows))
            yield torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in rows])


def _encoded(template: ChatTemplate, one: Conversation) -> list[int]:
    return token_ids(template.tokenizer, template.render(one.messages).text + one.reply + END)


def _optimizers(model: LlamaForCausalLM) -> tuple["Muon", torch.optim.AdamW]:
    """Muon for the matrices inside the layers, AdamW for the rest."""
    inner = {name for name, weight in model.named_parameters() if weight.ndim == 2 and ".layers." in name}
    matrices = [weight for name, weight in model.named_parameters() if name in inner]
    others = [weight for name, weight in model.named_parameters() if name not in inner]
    return Muon(matrices), torch.optim.AdamW(others, lr=0.0, weight_decay=0.0, betas=(0.9, 0.95))


class Muon:
    """Momentum whose every update is made orthogonal (K. Jordan, 2024), in float32: torch's own computes in bfloat16,
    which most CPUs do ten times slower. With it the student learns to copy numbers in half of AdamW's steps or less."""

    def __init__(self, matrices: list[torch.nn.Parameter]) -> None:
        self._moving = [(matrix, torch.zeros_like(matrix)) for matrix in matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for matrix, momentum in self._moving:
            assert matrix.grad is not None
            momentum.lerp_(matrix.grad, 0.05)
            update = orthogonal(matrix.grad.lerp(momentum, 0.95))
            matrix.add_(update, alpha=-rate * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with singular values about 1, by five Newton-Schulz iterations of the fifth order."""
    a, b, c = 3.4445, -4.775, 2.0315
    x: torch.Tensor = matrix / (torch.linalg.matrix_norm(matrix) + 1e-7)
    for _ in range(5):
        gram = x.T @ x
        x = x @ (a * torch.eye(len(gram)) + b * gram + c * gram @ gram)
    return x
