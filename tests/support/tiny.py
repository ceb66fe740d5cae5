"""A tiny random Llama with a real tokenizer and chat template: every test of a program stands on the same one."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from cgd_stages.method import prompts

Array = numpy.ndarray[Any, Any]
Weights = dict[str, Array]
HIDDEN, LAYERS = 64, 2
NEWLINE = "\u010a"
"""How byte-level BPE spells a newline."""
THINKING = Path(__file__).parents[2] / "examples/thinking/template.jinja"
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
    seed: int = 0,
    context: int = 2048,
    template: str | None = TEMPLATE,
    always: str | None = None,
    end_weight: float = 2.0,
    markers: tuple[str, ...] = (),
    chain: tuple[str, ...] = (),
) -> Path:
    """Write the model into `folder` (float32, 2 layers, hidden 64, heads of 32; milliseconds) and return it.

    `context` is the model's own limit in tokens. `end_weight` scales how strongly it feels about ending its reply:
    random models rarely end by themselves. As it stands every reply ends after a few tokens, and none is empty (with
    other seeds some are). With `always` it says that one token for ever: END gives empty replies. `markers` are tokens
    of their own that decoding keeps, such as <think>. With a `chain` of tokens it says after each of them the next one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in markers])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": START, "eos_token": END, "pad_token": PAD, "model_max_length": context}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}
    _write(folder / "tokenizer_config.json", settings | ({"chat_template": template} if template else {}))
    ids = {name: tokenizer.token_to_id(token) for name, token in (("bos", START), ("eos", END), ("pad", PAD))}
    special = {f"{name}_token_id": number for name, number in ids.items()}
    _write(folder / "config.json", _config(tokenizer.get_vocab_size(), context) | special)
    _write(folder / "generation_config.json", {"do_sample": False, **special})
    weights = _random_weights(tokenizer.get_vocab_size(), seed)
    _end_sometimes(weights, ids["eos"], tokenizer.token_to_id(NEWLINE), end_weight)
    if always is not None:
        _constant(weights, tokenizer.token_to_id(always))
    if chain:
        _follow(weights, [tokenizer.token_to_id(token) for token in chain])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def thinking(folder: Path) -> Path:
    """The tiny model with a template like Qwen3's. It writes a thought where the template does not write an empty one,
    and says 4: `<think>a</think>`, an empty line, `4`."""
    template = THINKING.read_text()
    end_of_thought = ("</think>", "\n\n")
    chain = (NEWLINE, "<think>", "a", *end_of_thought, "4", END)
    return make(folder, template=template, markers=("<think>", *end_of_thought), chain=chain)


def change(path: Path, **values: Any) -> None:
    """Set fields of a JSON file; None takes a field out."""
    found = json.loads(path.read_text()) | values
    _write(path, {name: value for name, value in found.items() if value is not None})


def misnamed(folder: Path, **settings: Any) -> Path:
    """The tiny model, whose tokenizer is a byte-level BPE, with the class of another kind of BPE in
    tokenizer_config.json, as in DeepSeek-R1-Distill-Llama. It says three words for ever."""
    make(folder, chain=(NEWLINE, "Ann", "\u012012", "\u0120apples", "Ann"))
    change(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", **settings)
    return folder


def _write(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=1))


def _config(vocabulary: int, context: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": context,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }


def _tokenizer() -> Tokenizer:
    """Byte-level BPE: any text survives the way there and back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[PAD, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS, prompts.TEACHER, prompts.TRAINING], trainer)
    return tokenizer


def _random_weights(vocabulary: int, seed: int) -> Weights:
    """Weights without torch: a test that never runs the model need not import it."""
    random = numpy.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> Array:
        return random.normal(0.0, 0.2, (rows, columns)).astype(numpy.float32)

    shapes = {"mlp.gate_proj": (2, 1), "mlp.up_proj": (2, 1), "mlp.down_proj": (1, 2)}
    shapes |= {f"self_attn.{name}_proj": (1, 1) for name in "qkvo"}
    weights = {"model.embed_tokens.weight": matrix(vocabulary, HIDDEN), "lm_head.weight": matrix(vocabulary, HIDDEN)}
    norms = ["model.norm"]
    for layer in (f"model.layers.{number}" for number in range(LAYERS)):
        for name, (rows, columns) in shapes.items():
            weights[f"{layer}.{name}.weight"] = matrix(rows * HIDDEN, columns * HIDDEN)
        norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
    return weights | {f"{norm}.weight": numpy.ones(HIDDEN, numpy.float32) for norm in norms}


def _end_sometimes(weights: Weights, end: int, newline: int, end_weight: float) -> None:
    """Make the end of a reply likely, except right after a newline, which is where a reply begins."""
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embedding *= 5.0
    head[end] *= end_weight
    head[end] -= embedding[newline]


def _follow(weights: Weights, chain: list[int]) -> None:
    """Let every position end in a hidden state that only its own token determines, and that points at the next one."""
    _mute(weights)
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embedding[:, 0] = 1.0
    for place, (token, following) in enumerate(pairwise(chain), 1):
        embedding[token] = numpy.eye(HIDDEN, dtype=numpy.float32)[place]
        head[following, place] = 2.0
    head[chain[-1], 0] = 2.0


def _constant(weights: Weights, token: int) -> None:
    """Let every position end in the same hidden state, which points at one token."""
    _mute(weights)
    weights["model.embed_tokens.weight"][:, 0] = 1.0
    weights["lm_head.weight"][token, 0] = 1.0


def _mute(weights: Weights) -> None:
    """No layer adds anything to the embedding of a token, and no token is likely."""
    for name, weight in weights.items():
        if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight", "lm_head.weight")):
            weight[:] = 0.0
