"""Where the commands print. They print text as text: no markup has an effect, no control character gets through."""

import sys
from difflib import get_close_matches
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.style import Style
from rich.text import Text

from cgd_stages.text.printable import printable


class Terminal(Console):
    """A console that shows each string, also in cells and titles of tables, as one line of plain text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, **options)

    def render_str(self, text: str, *, style: str | Style = "", **layout: Any) -> Text:
        """Rich calls this for every string that it shows."""
        return plain(text, style, justify=layout.get("justify"), overflow=layout.get("overflow"))


def plain(text: str, style: str | Style = "", *, lines: bool = False, **layout: Any) -> Text:
    """A text in a style; with `lines` it keeps its line breaks and tabs."""
    return Text(printable(text, lines=lines), style, **layout)


def panel(body: Text, title: str, *, border: str = "none") -> Panel:
    """A text in a frame. Rich reads markup from a title that is a string, whatever the console says."""
    return Panel(body, title=plain(title), title_align="left", border_style=border)


def write(text: str) -> None:
    """Write the lines of a text to standard output without fitting them to the terminal's width."""
    sys.stdout.write(printable(text, lines=True))


def likely(name: str, names: list[str]) -> str:
    """What may be meant by a name that is not among `names`, or all of them, as a hint."""
    if near := get_close_matches(name, names, n=3):
        return f"Is {' or '.join(near)} meant?"
    return f"There are {', '.join(sorted(names)[:20])}{' and more' if len(names) > 20 else ''}." if names else ""
