"""The replies of everyday.txt, each with references and whether it is right for them."""

from collections.abc import Iterator
from pathlib import Path

REPLIES = Path(__file__).with_name("everyday.txt")


def everyday() -> Iterator[tuple[str, list[tuple[str, bool]]]]:
    for part in f"\n{REPLIES.read_text(encoding='utf-8').strip()}".split("\nO ")[1:]:
        reply, *lines = part.split("\n")
        yield reply.replace("\u23ce", "\n"), [(line[2:], line[0] == "+") for line in lines]
