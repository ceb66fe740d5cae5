"""CEL rules of custom resources (`x-kubernetes-validations`), on the package common-expression-language.

Gaps of that package against the real server, and what is done about them: `size` of a string counts bytes there and
characters here; names that CEL reserves are escaped (`self.__namespace__`); Kubernetes' own functions are added below.
Not available: `self.?field` (refused by its parser, so refused here when the CRD is stored) and two-variable macros.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import cel
from cel.stdlib import STDLIB_FUNCTIONS

from cgd_local.statuses import Cause, Json, duplicate, forbidden, required, wrong

if TYPE_CHECKING:
    from cgd_local.schema import Node

_RESERVED = set(re.findall(r"\w+", "as break const continue else false for function if import in let loop namespace"))
_RESERVED |= {"null", "package", "return", "true", "var", "void", "while"}
_ESCAPES = {"__": "__underscores__", ".": "__dot__", "-": "__dash__", "/": "__slash__"}
_SIZE = re.compile(r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|\bsize(?=\s*\()""")
_NATIVE = {"size", "contains", "startsWith", "endsWith", "matches", "int", "uint", "double", "string", "bytes", "type"}
_NATIVE |= {"timestamp", "duration", "dyn", "hasValue", "value", "orValue", "optional.of", "optional.none"}
_NATIVE |= {f"get{part}" for part in ("FullYear", "Month", "Date", "DayOfWeek", "Hours", "Minutes", "Seconds")}


def _is_url(text: str) -> bool:
    parts = urlsplit(text)
    return bool(parts.scheme and (parts.netloc or parts.path.startswith("/")))


def _url(text: str) -> Json:
    if not _is_url(text):
        raise ValueError(f"URL parse error during conversion from string: {text}")
    parts = urlsplit(text)
    return {"scheme": parts.scheme, "host": parts.netloc, "path": parts.path, "hostname": parts.hostname or ""}


_FUNCTIONS: dict[str, Callable[..., Any]] = STDLIB_FUNCTIONS | {
    "characters": len,
    "format": lambda text, values: text % tuple(values),
    "isSorted": lambda items: list(items) == sorted(items),
    "find": lambda text, pattern: found[0] if (found := re.search(pattern, text)) else "",
    "findAll": lambda text, pattern: [found[0] for found in re.finditer(pattern, text)],
    "isURL": _is_url,
    "url": _url,
    "getScheme": lambda url: url["scheme"],
    "getHost": lambda url: url["host"],
    "getHostname": lambda url: url["hostname"],
    "getEscapedPath": lambda url: url["path"],
}


def _compiled(expression: str) -> cel.Program:
    return cel.compile(_SIZE.sub(lambda found: found[1] or "characters", expression))


class Rule:
    """One rule, compiled when its schema is first used."""

    def __init__(self, raw: Json) -> None:
        self.raw = raw
        self.program = _compiled(raw["rule"])
        self.message_program = _compiled(raw["messageExpression"]) if "messageExpression" in raw else None
        self.transition = "oldSelf" in self.program.variables()

    def check(self, now: Any, before: Any, *, known: bool, shown: Any, path: str) -> Cause | None:
        """The cause if the rule fails; a transition rule has nothing to say where no former value is known."""
        optional = self.raw.get("optionalOldSelf", False)
        if self.transition and not known and not optional:
            return None
        variables = {"self": now, "oldSelf": before}
        if optional:
            variables["oldSelf"] = cel.OptionalValue.of(before) if known else cel.OptionalValue.none()
        context = cel.Context(variables=variables, functions=_FUNCTIONS)
        try:
            held = self.program.execute(context)
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError, ArithmeticError) as error:
            return wrong(path or "<nil>", shown, f"rule evaluation error: {error}: {self.raw['rule']}")
        return None if held is True else self._cause(context, shown, path)

    def _cause(self, context: cel.Context, shown: Any, path: str) -> Cause:
        where = path + self.raw.get("fieldPath", "")
        where = where.removeprefix(".") or "<nil>"
        message = str(self.message_program.execute(context)) if self.message_program else self.raw.get("message")
        message = message or f"failed rule: {self.raw['rule']}"
        match self.raw.get("reason"):
            case "FieldValueForbidden":
                return forbidden(where, message)
            case "FieldValueRequired":
                return required(where, message)
            case "FieldValueDuplicate":
                return duplicate(where, shown)
            case _:
                return wrong(where, shown, message)


def to_cel(node: Node, value: Any) -> Any:
    """A value as rules see it: escaped field names, times as times, numbers of type `number` as doubles."""
    match value:
        case dict():
            return {
                _escaped(name) if name in node.properties else name: to_cel(child, item) if child else item
                for name, item in value.items()
                for child in [node.child(name)]
            }
        case list():
            return [to_cel(node.items, item) for item in value]
        case str() if node.raw.get("format") == "date-time":
            return dt.datetime.fromisoformat(value)
        case int() if node.types == {"number"}:
            return float(value)
        case _:
            return value


def _escaped(name: str) -> str:
    if name in _RESERVED:
        return f"__{name}__"
    for mark, word in _ESCAPES.items():
        name = name.replace(mark, word)
    return name


def compile_errors(raw: Json, path: str) -> list[Cause]:
    """What the real server would say about a schema's rules when the CRD is stored: syntax, names, functions."""
    causes = []
    for index, rule in enumerate(raw.get("x-kubernetes-validations") or []):
        where = f"{path}.x-kubernetes-validations[{index}]"
        told = {word: _trouble(raw, rule[word]) for word in ("rule", "messageExpression") if word in rule}
        causes += [wrong(f"{where}.{w}", rule[w], f"compilation failed: {why}") for w, why in told.items() if why]
    for name, child in (raw.get("properties") or {}).items():
        causes += compile_errors(child, f"{path}.properties[{name}]")
    for word in ("items", "additionalProperties"):
        if isinstance(raw.get(word), dict):
            causes += compile_errors(raw[word], f"{path}.{word}")
    return causes


def _trouble(raw: Json, expression: str) -> str | None:
    try:
        references = _compiled(expression).references()
    except ValueError as error:
        return str(error)
    words = {name for name in references["functions"] if name[0].isalpha()}
    if strange := words - _NATIVE - _FUNCTIONS.keys():
        return f"undeclared reference to '{min(strange)}'"
    return _undefined_field(raw, expression)


def _undefined_field(raw: Json, expression: str) -> str | None:
    """A rule that names a field its schema lacks never holds: the real type checker refuses it, and so do we."""
    if "properties" not in raw or raw.get("x-kubernetes-preserve-unknown-fields"):
        return None
    known = {_escaped(name) for name in raw["properties"]} | {"apiVersion", "kind", "metadata"}
    bare = re.sub(r""""(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'""", "''", expression)
    named = re.findall(r"\b(?:self|oldSelf)\.(\w+)\b(?!\s*\()", bare)
    strange = [name for name in named if name not in known]
    return f"undefined field '{strange[0]}'" if strange else None
