"""Errors as the Kubernetes API tells them: an exception that becomes a `Status` object."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

Json = dict[str, Any]

REASONS = {
    400: "BadRequest",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    409: "Conflict",
    410: "Expired",
    415: "UnsupportedMediaType",
    422: "Invalid",
    500: "InternalError",
    504: "Timeout",
}


class Cause(NamedTuple):
    """One invalid field: its path, the machine's word for the trouble, and the sentence for people."""

    field: str
    reason: str
    message: str


class ApiError(Exception):
    """Any answer of 400 and above."""

    def __init__(self, code: int, message: str, *, reason: str | None = None, details: Json | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.reason = REASONS.get(code, "") if reason is None else reason
        self.details = details or {}

    def status(self) -> Json:
        """The body of the answer; clients read reason and details, people read message."""
        body = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": self.message}
        return body | {"reason": self.reason, "details": self.details, "code": self.code}


def success(details: Json) -> Json:
    """What a finished deletion answers."""
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}


def bad_request(message: str) -> ApiError:
    return ApiError(400, message)


def gone(message: str) -> ApiError:
    return ApiError(410, message)


def invalid(group: str, kind: str, name: str, causes: Iterable[Cause]) -> ApiError:
    """422 with one cause per field, worded so that kubectl prints its usual list."""
    found = list(causes)
    lines = [f"{c.field}: {c.message}" for c in found]
    told = lines[0] if len(lines) == 1 else "[" + ", ".join(lines) + "]"
    subject = f"{kind}.{group}" if group else kind
    details = {
        "name": name,
        "group": group,
        "kind": kind,
        "causes": [{"reason": c.reason, "message": c.message, "field": c.field} for c in found],
    }
    return ApiError(422, f'{subject} "{name}" is invalid: {told}', details=details)


def required(field: str, why: str = "") -> Cause:
    return Cause(field, "FieldValueRequired", f"Required value: {why}" if why else "Required value")


def wrong(field: str, value: object, why: str) -> Cause:
    return Cause(field, "FieldValueInvalid", f"Invalid value: {show(value)}: {why}")


def forbidden(field: str, why: str) -> Cause:
    return Cause(field, "FieldValueForbidden", f"Forbidden: {why}")


def unsupported(field: str, value: object, allowed: Iterable[object]) -> Cause:
    told = ", ".join(show(item) for item in allowed)
    return Cause(field, "FieldValueNotSupported", f"Unsupported value: {show(value)}: supported values: {told}")


def duplicate(field: str, value: object) -> Cause:
    return Cause(field, "FieldValueDuplicate", f"Duplicate value: {show(value)}")


def show(value: object) -> str:
    """A value as API messages print it; whole objects are only named."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return str(value)
        case dict():
            return '"object"'
        case list():
            return '"array"'
        case _:
            return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
