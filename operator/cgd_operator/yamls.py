"""YAML that kubectl reads back as it was meant."""

import re
from collections.abc import Iterator
from typing import Any

import yaml


class _Loader(yaml.CSafeLoader):
    """Reads numbers as kubectl does: PyYAML takes 1e-6, which has no point, for a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _Dumper(yaml.CSafeDumper):
    """PyYAML reads YAML 1.1, where 1e-6 is a string; kubectl reads 1.2, where it is a float: quote what has a digit."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = "'" if text[:1].isdigit() else None
        return self.represent_scalar("tag:yaml.org,2002:str", str(text), style)

    def ignore_aliases(self, _data: Any) -> bool:
        """What is there twice is written twice."""
        return True


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_multi_representer(str, _Dumper.represent_text)  # names of stages, which are strings


def load_all(text: str) -> Iterator[Any]:
    """The documents of a text."""
    documents: Iterator[Any] = yaml.load_all(text, Loader=_Loader)
    return documents


def dump(value: Any) -> str:
    """Block style, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)
