"""A stand-in for a model's tokenizer: its chat template, one id for each of the template's special tokens, and bytes."""

import re
from importlib import resources

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_TOKEN = re.compile(
    r"<\|[A-Za-z_>\"|]*?\|>|<\|[a-z_]+>|<[a-z_]+\|>|<\|\"\|>|</?(?:think|tool_call|tool_response|start_of_turn|end_of_turn|s|sop"
    r"|end_of_utterance|start_of_image|eos|bos|image|row_\d_col_\d)>|<(?:start|end)_of_turn>|<\uff5c[^\uff5c]+\uff5c>"
    r"|\[/?INST\]|\[gMASK\]"
)
_ENDS = ("<\uff5cend\u2581of\u2581sentence\uff5c>", "<|return|>", "<|END_OF_TURN_TOKEN|>", "<|eot_id|>", "<end_of_turn>")
_ENDS += ("<turn|>", "<|eot|>", "<end_of_utterance>", "<|im_end|>")


def template(name: str) -> str:
    """A chat template of TRL's package."""
    return (resources.files("trl") / "chat_templates" / f"{name}.jinja").read_text()


def originals() -> list[str]:
    """The names of the templates that TRL has from models as they are."""
    names = [path.name.removesuffix(".jinja") for path in (resources.files("trl") / "chat_templates").iterdir()]
    return sorted(name for name in names if not name.endswith(("_training", ".md")))


def markers(source: str) -> list[str]:
    """The special tokens in a template's source."""
    return sorted(set(_TOKEN.findall(source)))


def tokenizer(source: str | None, *, tokens: list[str] | None = None, end: str | None = None, listed: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with `tokens`, by default the template's. `end`: its end of text, by default a token that the
    template does not name, or the one by which its family ends a turn. `listed`: whether the tokens are special."""
    tokens = markers(source or "") if tokens is None else tokens
    end = end or next((token for token in _ENDS if token in tokens), "<|endoftext|>")
    backend = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    add = [AddedToken(token, special=listed, normalized=False) for token in sorted({*tokens, end} - {"<|endoftext|>"})]
    (backend.add_special_tokens if listed else backend.add_tokens)(add)
    extra = sorted(set(tokens) - {end}) if listed else []
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin|>" if False else None, eos_token=end, pad_token="<|endoftext|>",
        extra_special_tokens=extra, chat_template=source, clean_up_tokenization_spaces=False,
    )
