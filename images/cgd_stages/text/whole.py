"""Text from outside, made valid Unicode. Pure."""

import re

_HALF = re.compile("[\ud800-\udfff]")


def whole(text: str) -> str:
    """The text with U+FFFD for every half of a surrogate pair: JSON can spell one, files and tokenizers refuse it."""
    return _HALF.sub("\ufffd", text)
