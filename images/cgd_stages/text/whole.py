"""Text from outside. Pure."""

import re

_HALF = re.compile("[\ud800-\udfff]")


def whole(text: str) -> str:
    """The text as files and tokenizers take it: half of a surrogate pair, which JSON can spell, becomes U+FFFD."""
    return _HALF.sub("\ufffd", text)
