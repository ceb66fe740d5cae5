"""Texts that differ in nothing that a reader sees."""

import unicodedata


def normalised(text: str) -> str:
    """The text up to Unicode composition and blanks: what makes two prompts the same prompt."""
    return " ".join(unicodedata.normalize("NFC", text).split())
