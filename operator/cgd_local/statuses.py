"""Errors in the form of the Kubernetes API: an exception that becomes a `Status` object."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any, NamedTuple

Json = dict[str, Any]

_REASONS = {410: "Expired", 422: "Invalid", 500: "InternalError", 504: "Timeout"}  # the others are HTTP's own phrases


class Cause(NamedTuple):
    """One invalid field: its path, the reason for programs, and the message for people."""

    field: str
    reason: str
    message: str


class ApiError(Exception):
    """Any answer of 400 and above."""

    def __init__(self, code: int, message: str, *, reason: str = "", details: Json | None = None) -> None:
        super().__init__(message)
        self.code, self.message = code, message
        self.reason = reason or _REASONS.get(code) or HTTPStatus(code).phrase.replace(" ", "")
        self.details = details or {}

    def status(self) -> Json:
        """The body of the answer; clients read reason and details, people read message."""
        error = {"message": self.message, "reason": self.reason, "details": self.details, "code": self.code}
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"} | error


def success(details: Json) -> Json:
    """The answer to a finished deletion."""
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}


def bad_request(message: str) -> ApiError:
    return ApiError(400, message)


def required(field: str, why: str = "") -> Cause:
    return Cause(field, "FieldValueRequired", f"Required value: {why}" if why else "Required value")


def wrong(field: str, value: object, why: str) -> Cause:
    return Cause(field, "FieldValueInvalid", f"Invalid value: {show(value)}: {why}")


def show(value: object) -> str:
    """A value as API messages print it; of an object or a list only its type."""
    printed = "object" if isinstance(value, dict) else "array" if isinstance(value, list) else value
    return json.dumps(printed, ensure_ascii=False)
