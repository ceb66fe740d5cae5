"""A model's tokenizer: loaded so that it gives the ids of its tokenizer.json, and written beside a trained model.

transformers 5.19 builds most tokenizers anew, from the vocabulary of tokenizer.json and the rules of the class that
tokenizer_config.json names. Some checkpoints name a class with other rules: a byte-level BPE that is called a
LlamaTokenizer loses every blank. transformers knows some of them by the name under which they are loaded
(deepseek-ai/DeepSeek-R1-Distill-Llama-*), which a snapshot or a copy does not have. The generic class runs
tokenizer.json as it is, but for two settings that override it under any class (`_heard`); what it gives without them
decides.
"""

import json
import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cgd_stages.errors import UserError

log = logging.getLogger(__name__)

WHOLE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
"""Where transformers reads a chat template first."""
OLD_TEMPLATE = "chat_template.json"
"""Where older models of pictures and texts have it: transformers reads it for a processor, and not for a tokenizer."""
TEKKEN = "tekken.json"
"""The tokenizer's file of mistral-common, whose code writes prompts without a chat template."""
GENERIC = "PreTrainedTokenizerFast"
"""The class that runs tokenizer.json as it is, by the name that earlier transformers know too."""
_FILES = (
    *(WHOLE, SETTINGS, "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("tokenizer.model", "spiece.model", TEMPLATE, OLD_TEMPLATE),
)
"""All that transformers reads of a tokenizer with a tokenizer.json, but templates of other names, which go into the
settings: a stored model has no folders. Not TEKKEN, which it would prefer."""
_TEXTS = (
    "",
    "How many apples are left?\n\n  Ben has 12,345 of them;\tAnn's 7, and they'LL share 0.5e-3.",
    " a blank before, and two after  ",
    "def f(x):\r\n    return x**2  # 2^10 = 1024\n\n\n",
    "\\frac{3}{8}\\left( \\sqrt{2} \\right) \\cdot 12345678901234567890",
    "Ünïcödé — “quotes” … \u00a0 e\u0301 \ufb01 ① \u2581 naïve",
    "日本語 中文。 한국어 नमस्ते שלום مرحبا Привет",
    "\U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467",
)
"""What tokenizers treat differently: blanks at every place, lines, digits, code, capitals, marks, scripts."""
_SPLIT = "split_special_tokens"
_RULES = ("lstrip", "rstrip", "single_word", "normalized")
"""What an added token's entry says of the text around it."""
_MOST_TOKENS = 512
"""Added tokens that are compared; Gemma has thousands without a use."""


@dataclass(frozen=True)
class Loaded:
    """A tokenizer, and the folder whose files give it under any name. `mended`: that is not the model's own folder,
    because the class that the model names gives other ids. The folder of a mended one goes with the tokenizer."""

    tokenizer: Any
    folder: Path
    mended: bool = False


def load_tokenizer(folder: Path, name: str) -> Loaded:
    """The tokenizer of a model's folder. `name` names the model in errors.

    Raises what AutoTokenizer raises, and UserError for a model whose tokenizer transformers gives other ids than its
    tokenizer.json, whatever class is named.
    """
    from transformers import AutoTokenizer

    folder = folder.absolute()  # a relative path may be one of the names that transformers knows
    if not (folder / WHOLE).is_file():
        return Loaded(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), folder)
    named = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, mistral_format=False)
    if _is_generic(named) and _heard(folder) == _settings(folder):
        return Loaded(named, folder)
    copy = Path(tempfile.mkdtemp(prefix="tokenizer-"))
    _copy(folder, copy, _mended_settings(folder, named))
    if (config := folder / "config.json").is_file():
        shutil.copyfile(config, copy / config.name)  # AutoTokenizer looks at the model's type, too
    generic = _generic(copy)
    weakref.finalize(generic, shutil.rmtree, copy, ignore_errors=True)
    if agree(named, generic):
        return Loaded(named, folder)
    if not _right(copy, generic):
        (copy / "config.json").unlink(missing_ok=True)  # for types such as qwen2 it decides, whatever the settings say
    if not _right(copy, generic):
        raise UserError(
            f"the tokenizer of the model {name} does not load as its {WHOLE} says: transformers makes a "
            f"{type(named).__name__} of it, which gives other token ids, whatever class is named",
            hint="Take another model or revision: one whose tokenizer.json has the rules of its type.",
        )
    log.warning(
        "the %s of %s gives other token ids (as a %s) than its %s; the file's own rules are used",
        SETTINGS,
        name,
        type(named).__name__,
        WHOLE,
    )
    return Loaded(generic, copy, mended=True)


def _right(folder: Path, generic: Any) -> bool:
    from transformers import AutoTokenizer

    return agree(AutoTokenizer.from_pretrained(folder, trust_remote_code=False, mistral_format=False), generic)


def agree(one: Any, other: Any) -> bool:
    """Whether two tokenizers make the same ids of texts, and the same texts of ids."""
    tokens = list(other.added_tokens_encoder)[:_MOST_TOKENS]
    return _seen(one, tokens) == _seen(other, tokens)


def store_tokenizer(folder: Path, target: Path, *, name: str, template: str | None = None) -> None:
    """Write a model's tokenizer into the folder of a model that was trained from it, such that it loads alike under any
    name: tokenizer.json byte for byte. `template`: the chat template that the run has set in place of the model's own.

    Raises what `load_tokenizer` raises.
    """
    loaded = load_tokenizer(folder, name)
    if (folder / WHOLE).is_file():
        settings = _settings(loaded.folder)
        settings.pop("auto_map", None)  # no code is stored
        if template is not None:
            settings.pop("chat_template", None)
        _copy(loaded.folder, target, settings)
    else:
        loaded.tokenizer.save_pretrained(target, save_jinja_files=False)
    if template is not None:
        (target / TEMPLATE).write_text(template, encoding="utf-8")


def _is_generic(tokenizer: Any) -> bool:
    """Whether transformers has taken the rules of tokenizer.json, as it does for classes that state none."""
    from transformers import TokenizersBackend

    kind = type(tokenizer)
    return kind is TokenizersBackend or (isinstance(tokenizer, TokenizersBackend) and "__init__" not in vars(kind))


def _generic(folder: Path) -> Any:
    from transformers import TokenizersBackend

    return TokenizersBackend.from_pretrained(folder, trust_remote_code=False)


def _seen(tokenizer: Any, tokens: Iterable[str]) -> list[Any]:
    """The ids of the texts, of control tokens among words and by themselves, and the texts of the ids."""
    tokens = list(tokens)
    texts = [*_TEXTS, *(f"a {token} b{token}\nc" for token in tokens)]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [ids, [tokenizer.decode(each) for each in ids], tokenizer.convert_tokens_to_ids(tokens)]


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if more := _more_templates(folder):
        paths = [path for path in (folder / TEMPLATE, *more) if path.is_file()]
        names = ["default" if path.name == TEMPLATE else path.stem for path in paths]
        texts = [path.read_text(encoding="utf-8") for path in paths]
        settings["chat_template"] = [{"name": name, "template": text} for name, text in zip(names, texts, strict=True)]
    return settings


def _more_templates(folder: Path) -> list[Path]:
    """The files of templates that have a name, such as rag."""
    return sorted(folder.glob("additional_chat_templates/*.jinja"))


def _mended_settings(folder: Path, named: Any) -> dict[str, Any]:
    """The model's settings with the generic class, and with the control tokens that the class that it names brings
    along, as far as the vocabulary has them."""
    settings = _heard(folder)
    settings.pop("auto_map", None)
    whole = _whole(folder)
    pieces = whole["model"]["vocab"]
    known = set(pieces) if isinstance(pieces, dict) else {piece for piece, _ in pieces}
    known |= {token["content"] for token in whole.get("added_tokens", ())}
    own = {kind: str(token) for kind, token in named.special_tokens_map.items() if isinstance(token, str)}
    brought = {kind: token for kind, token in own.items() if token in known and settings.get(kind) is None}
    return settings | brought | {"tokenizer_class": GENERIC}


def _heard(folder: Path) -> dict[str, Any]:
    """The settings without those by which transformers 5.19 overrides the rules of tokenizer.json, whatever class is
    named: that control tokens are taken apart, and other rules for the tokens of the file. They may add tokens."""
    settings = {name: value for name, value in _settings(folder).items() if not (name == _SPLIT and value)}
    if given := settings.get("added_tokens_decoder"):
        own = {str(token["id"]): token for token in _whole(folder).get("added_tokens", ())}
        settings["added_tokens_decoder"] = {
            number: token | {rule: own[number][rule] for rule in _RULES if rule in own[number]}
            if token["content"] == own.get(number, {}).get("content")
            else token
            for number, token in given.items()
        }
    return settings


def _whole(folder: Path) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads((folder / WHOLE).read_text(encoding="utf-8"))
    return whole


def _copy(folder: Path, target: Path, settings: dict[str, Any]) -> None:
    """Copy a tokenizer's files, with these settings."""
    target.mkdir(parents=True, exist_ok=True)
    left_out = {TEMPLATE} if _more_templates(folder) else set()
    for name in _FILES:
        if name not in left_out and (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    if left_out or settings != _settings(folder):
        (target / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
