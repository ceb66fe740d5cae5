"""What can be a name in Kubernetes. Pure."""

import re

_WORD = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
LABEL = re.compile(_WORD)
SUBDOMAIN = re.compile(rf"{_WORD}(\.{_WORD})*")
UID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
SELECTED = re.compile("([A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?)?")


def is_label(text: str) -> bool:
    """Whether it can be the name of a namespace or of a stage: a DNS label."""
    return len(text) <= 63 and LABEL.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Whether it can be the name of an object: a DNS subdomain."""
    return len(text) <= 253 and SUBDOMAIN.fullmatch(text) is not None


def is_uid(text: str) -> bool:
    return UID.fullmatch(text) is not None


def is_selected(text: str) -> bool:
    """Whether it can be a value in a selector: nothing that ends it there, such as a comma."""
    return len(text) <= 253 and SELECTED.fullmatch(text) is not None
