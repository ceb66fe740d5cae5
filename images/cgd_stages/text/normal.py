"""Texts that look the same to a reader."""

import unicodedata


def normalised(text: str) -> str:
    """The text with composed characters and single blanks. Prompts with the same normalised text are the same."""
    return " ".join(unicodedata.normalize("NFC", text).split())
