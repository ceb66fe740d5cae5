"""Splits a model's output into its thinking and the text that counts. Pure."""

from dataclasses import dataclass

END_OF_THINKING = "</think>"
_START_OF_THINKING = "<think>"


@dataclass(frozen=True)
class Split:
    """A model's output in two parts, without blanks at the ends: its thinking, and the text that counts."""

    text: str
    thinking: str = ""
    unfinished_thinking: bool = False


def split_output(output: str) -> Split:
    """Split an output after its last end-of-thinking marker. If the thinking never ends, the text is empty."""
    thinking, marker, text = output.rpartition(END_OF_THINKING)
    if not marker and output.lstrip().startswith(_START_OF_THINKING):
        return Split("", output.strip().removeprefix(_START_OF_THINKING).strip(), unfinished_thinking=True)
    return Split(text.strip(), thinking.strip().removeprefix(_START_OF_THINKING).strip())
