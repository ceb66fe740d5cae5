"""A stand-in for a model's tokenizer: its chat template, one id for each special token of the template, and bytes."""

import re
from functools import cache
from importlib import resources

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_TOKEN = re.compile(
    r"<\|[A-Za-z_>\"|]*?\|>|<\|[a-z_]+>|<[a-z_]+\|>|<\|\"\|>"
    r"|</?(?:(?:seed:|mm:)?think|tool_call|tool_response|start_of_turn|end_of_turn|s|sop|end_of_utterance|image)>"
    r"|<(?:start|end)_of_turn>|<\uff5c[^\uff5c]+\uff5c>|\[/?(?:INST|THINK)\]|\[gMASK\]"
)
_END_OF_TEXT = "<|endoftext|>"
_ENDS = (
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|return|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|eot_id|>",
    "<end_of_turn>",
)
_ENDS += ("<turn|>", "<|eot|>", "<end_of_utterance>", "<|im_end|>")
"""The tokens by which families end a reply, where that is not the end of text."""
PICTURES = ("idefics3", "llava_next", "smolvlm")
"""Templates whose messages are lists of pictures and texts: they do not work with texts alone."""


def _templates() -> resources.abc.Traversable:
    return resources.files("trl") / "chat_templates"


def template(name: str) -> str:
    """A chat template of TRL's package."""
    return (_templates() / f"{name}.jinja").read_text()


def originals() -> list[str]:
    """The names of the templates that TRL has from models as they are."""
    names = [path.name.removesuffix(".jinja") for path in _templates().iterdir() if path.name.endswith(".jinja")]
    return sorted(name for name in names if not name.endswith("_training"))


def markers(source: str) -> list[str]:
    """The special tokens in a template's source."""
    return sorted(set(_TOKEN.findall(source)))


@cache
def tokenizer(
    source: str | None, tokens: tuple[str, ...] | None = None, *, end: str | None = None, listed: bool = True
) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes in which each of `tokens`, by default the template's, is one id. `end`: the end of text, by
    default the token by which a known family ends a reply. `listed`: whether the tokens are among all special ids."""
    known = markers(source or "") if tokens is None else list(tokens)
    end = end or next((token for token in _ENDS if token in known), _END_OF_TEXT)
    alphabet = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, normalized=False) for token in dict.fromkeys((_END_OF_TEXT, end, "<bos>"))]
    )
    others = [
        AddedToken(token, special=listed, normalized=False) for token in known if token not in (end, _END_OF_TEXT)
    ]
    (backend.add_special_tokens if listed else backend.add_tokens)(others)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token=end,
        pad_token=_END_OF_TEXT,
        extra_special_tokens=[str(token) for token in others] if listed else [],
        chat_template=source,
        clean_up_tokenization_spaces=False,
    )


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The ids of a text in which the special tokens are written."""
    made: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return made
