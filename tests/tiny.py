"""A tiny random Llama with a real tokenizer and chat template: every test of a program stands on the same one."""

from pathlib import Path
from typing import TYPE_CHECKING

from cgd_stages import prompts

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

WORDS = (
    "Ann has 12 apples and gives 7 to Ben. How many apples are left? Conclusion: right, Conclusion: wrong. "
    "The answer is 3 + 4 = 7, and 10 - 2 = 8."
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(
    folder: Path,
    *,
    seed: int = 1,
    context: int = 2048,
    template: str | None = TEMPLATE,
    always: str | None = None,
    end_weight: float = 4.0,
) -> Path:
    """Write the model into `folder` (float32, 2 layers, hidden 64, heads of 32; under a second) and return it.

    `context` is the model's own limit in tokens. `end_weight` scales how strongly it feels about ending its reply:
    random models rarely end by themselves. As it stands every reply ends after 1 to 20 tokens, and none is empty. With
    `always` it says that one token for ever: END gives empty replies.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(template)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= end_weight
        if always is not None:
            _constant(model, tokenizer.convert_tokens_to_ids(always))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(template: str | None) -> "PreTrainedTokenizerFast":
    """Byte-level BPE: any text survives the way there and back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bare.train_from_iterator([WORDS, prompts.CRITIQUE, prompts.REFINE, prompts.TRAINING], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token=START, eos_token=END, pad_token=PAD, chat_template=template
    )


def _constant(model: "LlamaForCausalLM", token: int) -> None:
    """Let every position end in the same hidden state, which points at one token."""
    model.model.embed_tokens.weight.zero_()
    model.model.embed_tokens.weight[:, 0] = 1.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.lm_head.weight.zero_()
    model.lm_head.weight[token, 0] = 1.0
