"""Texts in a normal form. Pure."""

import re
import unicodedata

_HALF = re.compile("[\ud800-\udfff]")


def normalised(text: str) -> str:
    """The text with composed characters and single blanks. Prompts with the same normalised text are the same."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def valid_unicode(text: str) -> str:
    """The text with U+FFFD for every half of a surrogate pair: JSON can spell one, files and tokenizers refuse it."""
    return _HALF.sub("\ufffd", text)
