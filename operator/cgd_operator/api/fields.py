"""What every part of the resource is made of: texts with what they must match, references."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core.core_schema import CoreSchema, no_info_after_validator_function

from cgd_stages.contract import NUMBER, TOLERANCE, AsText, Between, Contract, Decimal, Name

Rule = dict[str, str]
"""One of `x-kubernetes-validations`: rule, message, fieldPath?, reason?"""


def rules(*pairs: tuple[str, str]) -> dict[str, Any]:
    """CEL rules for a schema, as (rule, message) pairs."""
    return {"x-kubernetes-validations": [{"rule": rule, "message": message} for rule, message in pairs]}


@dataclass(frozen=True)
class Text:
    """A text that has to match a pattern, or (`absent`) must not: for CEL in the CRD, for pydantic here. The pattern is
    one that RE2 and Python read alike, without quotes and backslashes."""

    pattern: str
    mend: str
    absent: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core)
        before = schema.get("x-kubernetes-validations", [])
        pattern = self.pattern.replace("\\", "\\\\")  # as a text of CEL has it
        rule = {"rule": f"{'!' if self.absent else ''}self.matches('{pattern}')", "message": self.mend}
        return {**schema, "x-kubernetes-validations": [*before, rule]}

    def check(self, value: str) -> str:
        found = re.search(self.pattern.replace("$", r"\Z"), value)  # RE2's $ is the end, also before a line's end
        if (found is None) != self.absent:
            raise ValueError(self.mend)
        return value


HTTP = r"^https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[!%->@-~]*)?$"
"""A base URL that clients take apart as it is meant: a host, a port in digits, a path of visible characters. What
stands before a / in a password would else be a host and its port."""
PLAIN = "without ? and #, blanks, or a port that is no number"


def no_user(secret: str) -> Text:
    """A URL with a user and a password would be shown in reports, events and logs; `secret` is where they belong."""
    mend = f"take user and password out of the URL, and name the Secret that holds them in {secret}"
    return Text("^[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*@", mend, absent=True)


PARTS = "^[a-z0-9]+://[^/]*/(.*/)?(/|[.][.]?(/|$))"
PLAIN_PARTS = "take empty parts (//), . and .. out of the path: stores read them in ways of their own"


def plain_parts() -> Text:
    """An address whose path has no empty part, no . and no .. (a slash at its end is fine): S3 takes `a//b` for another
    key than `a/b`, many stores do not, and a file system has no such name."""
    return Text(PARTS, PLAIN_PARTS, absent=True)


def without_user(text: str) -> str:
    """A text for people, without what stands before the @ of URLs in it."""
    return re.sub(r"://[^/?#\s]*@", "://***@", text)


FILE = "^(s3://[^/]+/.+|configmap://[^/]+/[^/]+)$"
"""The place of a file that prepare reads as a whole."""
PERCENT = r"^(100|[0-9]{1,2}(\.[0-9]+)?)%$"
MEMORY = r"^[1-9][0-9]{0,4}(Gi|G)$"
WORD = r"^[A-Za-z0-9]([A-Za-z0-9-]{0,38}[A-Za-z0-9])?$"
VARIANT = r"^[a-z]([a-z0-9-]*[a-z0-9])?$"
SHAPES = {
    NUMBER: 'write a number that is not negative, in quotes: "0.5"',
    TOLERANCE: 'write how far an answer may be off, in quotes: "0.01", or "4%" of a decimal reference',
    PERCENT: 'write a percentage from 0 to 100, in quotes: "2%"',
    MEMORY: 'write whole gibibytes or gigabytes: "80Gi" or "80G"',
    VARIANT: "write small letters, digits and hyphens, with a letter first and no hyphen last",
    WORD: "write at most 40 letters, digits and hyphens, with no hyphen at either end",
}
"""What is said in place of a pattern."""

GpuHours = Annotated[Decimal, Between(0, 100_000, open_low=True)]
Percent = Annotated[float, AsText(PERCENT, max_length=8)]
Uri = Annotated[str, Field(min_length=1, max_length=1024)]
ModelUri = Annotated[Uri, plain_parts(), no_user("storage.credentialsSecretRef (s3://) or hubTokenSecretRef (the hub)")]
S3Uri = Annotated[Uri, plain_parts(), no_user("storage.credentialsSecretRef")]
Image = Annotated[Uri, no_user("imagePullSecrets of the ServiceAccount of serviceAccountName")]
Memory = Annotated[str, Field(max_length=8, pattern=MEMORY)]
NOT_MEAN = Text("^mean$", "take another name: mean is the column of the average in every report", absent=True)
BenchmarkName = Annotated[str, Field(max_length=40, pattern=WORD), NOT_MEAN]


class KeyRef(Contract):
    """A key of an object in the run's namespace."""

    name: Name
    key: Name


class NameRef(Contract):
    """An object in the run's namespace."""

    name: Name


def bytes_of(memory: str) -> int:
    """`80Gi` -> 85899345920"""
    binary = memory.endswith("i")
    return int(memory.rstrip("Gi")) * (2**30 if binary else 10**9)
