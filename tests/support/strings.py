"""Strange but valid strings, for every border that names and texts cross; and strategies that join and grow them."""

import re

from hypothesis import strategies as st

STRANGE = (
    # Names that other programs take for something else.
    "a", "0", "007", "1e6", "0x10", "null", "true", "no", "nan", "con", "aux", "index.html", "a.b", "a--b", "0-0",
    "xn--fiq228c", "kube-system", "localhost", "done.json", 63 * "a", "a" + 61 * "-" + "z", 31 * "a." + "a",
    # Paths and URLs.
    ".", "..", "../..", "/", "//", "/etc", "a/../b", "a//b", "~", "~root", "C:\\x", "a\\b", "-", "--", "-rf", "-n",
    "a?b=c&d=e", "a#b", "a;b", "a:b@c", "%", "%2e%2e%2f", "%00", "a+b", "a b", "a=b,c", "s3://x/y", "//x/y", "[::1]",
    # Markup, templates and quotes.
    "[/INST]", "[INST] x", "[bold]", "[/]", "[link=x]y[/link]", ":smile:", "\\[", "<b>", "</script>", "<!--", "-->",
    "]]>", "&amp;", "&", "'", '"', "`x`", "{{ 7 * 7 }}", "{% x %}", "%s", "%(x)s", "{0}", "{x}",
    # Shells and the kubelet.
    "$", "$$", "$x", "$(x)", "$(PATH)", "$$(PATH)", "$(", "$()", "$(a$(HOME))", "${x}", "$$x^2$$", "!x", "*", "a|b",
    "a > b", "\\", "\\n", "# x", "",
    # Control characters, which move, clear, title, link and forge.
    "\t", "\n", "a\nb", "\r", "\r\n", "a\rb", "\b\b", "\a", "\v", "\f", "\x7f", "\x1b", "\x1b[2J", "\x1b[31mred",
    "\x9b2J", "\x1b]0;title\a", "\x1b]8;;x\x1b\\y", "\x85", "\x1cx", "\n12:00:00 INFO all is well", "\u2028", "\u2029",
    # Letters.
    "\xe9", "e\u0301", "\xdf", "\u0130", "\u4e2d\u6587", "\u05d0\u05d1", "\u202eabc", "\u2066x\u2069", "\u200b",
    "\u200d", "\ufeff", "\xa0", "\u202f", "\U0001f525", "\U0001f468\u200d\U0001f469", "\ufffd", "\uffff", "\U0010ffff",
    "\U000e0041",
)  # fmt: skip
"""Whole characters alone: each can be written in UTF-8."""
HALF = "\ud83d"
"""Half of a character, as JSON may bring it."""
NUL = "\0"
"""No part of a path, an argument or a variable."""

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
LABEL, NAME = re.compile(_LABEL), re.compile(rf"{_LABEL}(\.{_LABEL})*")
"""DNS names, without their limits of length."""
NAMES = tuple(one for one in STRANGE if NAME.fullmatch(one))
"""What the API server takes for the name of a run."""

names = st.sampled_from(NAMES) | st.from_regex(NAME, fullmatch=True).filter(lambda name: len(name) <= 63)
texts = st.lists(st.sampled_from((*STRANGE, NUL)) | st.text(max_size=4), max_size=4).map("".join)
"""Of whole characters."""
halves = st.lists(texts | st.just(HALF), max_size=3).map("".join)
"""Of anything that a Python string can hold."""
words = texts.map(lambda text: text.replace(NUL, ""))
"""What an argument of a program can be."""
