"""YAML as kubectl reads it, and written so that kubectl reads it back as it was meant.

kubectl (1.32, `sigs.k8s.io/yaml`) turns a manifest into JSON first. It reads neither YAML 1.1, as PyYAML does, nor 1.2:
`y` and `off` are booleans, `1e-6` is a number, `010` is 8, `1:30` and `2024-05-01` are texts, and every key is a text.
"""

import base64
import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_WORDS: dict[str, Any] = dict.fromkeys(("", "~", "null", "Null", "NULL"))
for _words, _value in (("y yes on true", True), ("n no off false", False)):
    for _word in _words.split():
        _WORDS |= dict.fromkeys((_word, _word.title(), _word.upper()), _value)
_INTEGER = re.compile(r"([-+]?)(?:0[xX]([0-9a-fA-F]+)|0[bB]([01]+)|0[oO]?([0-7]+)|(0|[1-9][0-9]*))")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_BETWEEN_DIGITS = re.compile(r"(?<=[0-9])_(?=[0-9])")
_NOT_JSON = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_END = 1 << 63
"""The API server reads a whole number from -2^63 to below 2^63 as an integer, every other number as a float."""


class _Loader(yaml.CSafeLoader):
    """Reads plain scalars as kubectl does."""

    def resolve(self, kind: type[yaml.Node], value: str, implicit: Any) -> str:
        """The tag of a node that has none. PyYAML calls this for every node."""
        if kind is yaml.ScalarNode and implicit[0] and value != "<<":
            return f"{_TAG}{_type(_plain(value))}"
        return str(super().resolve(kind, value, implicit))  # type: ignore[no-untyped-call]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == f"{_TAG}null":
                raise yaml.constructor.ConstructorError(None, None, "a key must be a text", key.start_mark)
        pairs = ((self.construct_object(key, deep=True), value) for key, value in node.value)
        return {
            str(key).lower() if isinstance(key, bool) else str(key): self.construct_object(value, deep=deep)
            for key, value in pairs
        }


def _construct(_: _Loader, node: yaml.ScalarNode) -> Any:
    value = _plain(node.value)
    expected = {"int", "float"} if node.tag == f"{_TAG}float" else {node.tag.removeprefix(_TAG)}
    if _type(value) not in expected or value != value:
        raise yaml.constructor.ConstructorError(None, None, f"JSON has no such value: {node.value}", node.start_mark)
    return value


def _decoded(_: _Loader, node: yaml.ScalarNode) -> str:
    try:
        return base64.b64decode(node.value).decode()
    except ValueError as error:
        raise yaml.constructor.ConstructorError(None, None, f"no text: {error}", node.start_mark) from error


def _as_written(_: _Loader, node: yaml.ScalarNode) -> str:
    return str(node.value)


def _as_list(loader: _Loader, node: yaml.Node) -> list[Any]:
    if not isinstance(node, yaml.SequenceNode):
        raise yaml.constructor.ConstructorError(None, None, "a list is expected", node.start_mark)
    return loader.construct_sequence(node, deep=True)


def _as_mapping(loader: _Loader, node: yaml.Node) -> dict[Any, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(None, None, "a mapping is expected", node.start_mark)
    return loader.construct_mapping(node, deep=True)


for _name in ("null", "bool", "int", "float"):
    _Loader.add_constructor(f"{_TAG}{_name}", _construct)
# By tags that somebody writes. PyYAML makes Python's own types of them, which no JSON has.
_Loader.add_constructor(f"{_TAG}binary", _decoded)
_Loader.add_constructor(f"{_TAG}timestamp", _as_written)
_Loader.add_constructor(f"{_TAG}set", _as_mapping)
for _name in ("omap", "pairs"):
    _Loader.add_constructor(f"{_TAG}{_name}", _as_list)


def _plain(text: str) -> Any:
    """The value of a scalar without quotes or tag."""
    if text in _WORDS:
        return _WORDS[text]
    if _NOT_JSON.fullmatch(text):
        return math.nan
    digits = _BETWEEN_DIGITS.sub("", text) if text.startswith(".") else text.replace("_", "")
    if not text.startswith("_") and (match := _INTEGER.fullmatch(digits)):
        sign, *forms = match.groups()
        number = next(int(form, base) for form, base in zip(forms, (16, 2, 8, 10), strict=True) if form)
        number = -number if sign == "-" else number
        return number if -_END <= number < _END else float(number)
    if not text.startswith("_") and _FLOAT.fullmatch(digits) and math.isfinite(real := float(digits)):
        return int(real) if real.is_integer() and -_END <= real < _END else real
    return text


def _type(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "bool"
        case int():
            return "int"
        case float():
            return "float"
        case _:
            return "str"


class _Dumper(yaml.CSafeDumper):
    """PyYAML reads YAML 1.1, where 1e-6 is a string; kubectl reads a number: quote what has a digit."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = "'" if not isinstance(_plain(text), str) or text[:1].isdigit() else None
        return self.represent_scalar(f"{_TAG}str", str(text), style)

    def ignore_aliases(self, _data: Any) -> bool:
        """A value that occurs twice is written twice."""
        return True


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_multi_representer(str, _Dumper.represent_text)  # names of stages, which are strings


def load_all(text: str) -> Iterator[Any]:
    """The documents of a text, each as kubectl makes JSON of it. Raises yaml.YAMLError."""
    if "\n\ufeff" in text:
        raise yaml.YAMLError("a byte order mark begins a line that is not the first: delete the invisible character")
    documents: Iterator[Any] = yaml.load_all(text, Loader=_Loader)
    return documents


def dump(value: Any) -> str:
    """Block style, keys in their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)
