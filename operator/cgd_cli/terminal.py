"""Where the commands print. Text is text: no markup is read from it, and no control character reaches the terminal."""

import sys
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.style import Style
from rich.text import Text

from cgd_stages.text.printable import printable


class Terminal(Console):
    """Shows strings, also those in cells and titles of tables, as one line of plain text each."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, **options)

    def render_str(self, text: str, *, style: str | Style = "", **layout: Any) -> Text:
        """What Rich calls for every string that it meets."""
        return plain(text, style, justify=layout.get("justify"), overflow=layout.get("overflow"))


def plain(text: str, style: str | Style = "", *, lines: bool = False, **layout: Any) -> Text:
    """A text in a style; with `lines` it keeps its line breaks and tabs."""
    return Text(printable(text, lines=lines), style, **layout)


def panel(body: Text, title: str, *, border: str = "none") -> Panel:
    """A text in a frame. Rich reads markup from a title that is a string, whatever the console says."""
    return Panel(body, title=plain(title), title_align="left", border_style=border)


def write(text: str) -> None:
    """The lines of a text on standard output as they are, not laid out for a terminal's width."""
    sys.stdout.write(printable(text, lines=True))
