"""YAML is read as the real kubectl reads it."""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.local_world import KUBECTL

from cgd_operator import yamls

HEAD = "apiVersion: cgd.dev/v1alpha1\nkind: CGDRun\nmetadata: {name: a}\nspec:\n"
WORDS = (
    "y Y yes Yes YES yEs n N no No NO on On ON oN off Off OFF true True TRUE tRue false False FALSE null Null NULL nUll"
)
NUMBERS = (
    "0 -0 +0 01 010 08 0o10 0O10 -0o7 0x1F 0X1f -0xa 0b11 0B1 -0b1 0b12 0xg 0o8 0777 0o 0x 0b 1_000 _1 1_ -_1 1__0 0_1 "
    "0x_f 12_3.5 1. 1.0 4.0 .5 -.5 +.5 ._5 .5_0 5e3 5E3 1e-6 1E-06 1e+3 .5e1 1.e2 1e 1e+ e1 1e5_0 1.2.3 1e400 -1e400 "
    "1e-400 -0.0 9223372036854775807 -9223372036854775808 9223372036854775809 99999999999999999999 inf NaN nan Infinity"
)
OTHERS = "~ 1:30 1:30:00 2024-05-01 2024-05-01T10:00:00Z 12:00 = . + - _ +1 -1 +-1 --1 1,000 100% 1Gi .in"
SCALARS = f"{WORDS} {NUMBERS} {OTHERS}".split()


def as_kubectl_reads(text: str, folder: Path) -> Any:
    (folder / "run.yaml").write_text(text)
    words = [KUBECTL, "annotate", "--local", "--filename", str(folder / "run.yaml"), "--output", "json", "a=b"]
    process = subprocess.run(words, capture_output=True, text=True, check=False)
    return json.loads(process.stdout)["spec"] if process.returncode == 0 else process.stderr


def read(text: str) -> Any:
    (document,) = yamls.load_all(text)
    return document["spec"]


def kinds(value: list[Any]) -> list[tuple[str, Any]]:
    """With their types, because 1 == True in Python. An integer that the API server reads as a float is one."""
    items = (float(item) if isinstance(item, int) and abs(item) > 1 << 63 else item for item in value)
    return [(type(item).__name__, item) for item in items]


def test_plain_scalars(tmp_path: Path) -> None:
    dice = random.Random(1)
    made = ["".join(dice.choices("0123456789.eE+-_xobyn", k=dice.randint(1, 6))) for _ in range(3000)]
    scalars = [scalar for scalar in (*SCALARS, *made) if scalar not in {"-", "---"}]
    text = HEAD + "".join(f"- {scalar}\n" for scalar in scalars)
    ours, theirs = kinds(read(text)), kinds(as_kubectl_reads(text, tmp_path))
    assert [pair for pair in zip(scalars, ours, theirs, strict=True) if pair[1] != pair[2]] == []


def test_keys_tags_and_merges(tmp_path: Path) -> None:
    text = HEAD + (
        "  1: a\n  1.5: b\n  yes: c\n  off: d\n  2024-05-01: e\n  0x10: f\n"
        "  t: &t {a: 1, b: 2}\n  u: {<<: *t, b: 3}\n  v: !!str 12\n  w: '1e-6'\n  x: !!float 3\n"
        "  y y: [1, [2, {a: ~}]]\n"
    )
    assert read(text) == as_kubectl_reads(text, tmp_path)


@pytest.mark.parametrize("wrong", [".inf", "-.Inf", ".nan", "{~: 1}", "{[1]: 2}", "{{a: 1}: 2}", "!!int x", "a: b: c"])
def test_what_json_cannot_hold_is_refused(wrong: str, tmp_path: Path) -> None:
    text = f"{HEAD}  a: {wrong}\n"
    assert "error converting YAML to JSON" in as_kubectl_reads(text, tmp_path)
    with pytest.raises(yaml.YAMLError):
        read(text)


@pytest.mark.parametrize(
    "tagged", ["!!set {a}", "!!binary aGk=", "!!omap [a: 1]", "!!pairs [a: 1, a: 2]", "!!timestamp 2024-01-01"]
)
def test_tags_that_python_has_own_types_for_are_read_as_json_has_them(tagged: str, tmp_path: Path) -> None:
    text = f"{HEAD}  a: {tagged}\n"
    assert read(text) == as_kubectl_reads(text, tmp_path)


@pytest.mark.parametrize("mark", ["\ufeff", "\ufeff\n"])
def test_a_mark_of_byte_order_within_a_text_is_refused(mark: str, tmp_path: Path) -> None:
    """kubectl refuses it, or loses what follows without a word."""
    text = f"{HEAD}  a: 1\n{mark}  b: 2\n"
    assert as_kubectl_reads(text, tmp_path) != {"a": 1, "b": 2}
    with pytest.raises(yaml.YAMLError, match="byte order mark"):
        read(text)


def test_what_is_written_is_read_back_by_both(tmp_path: Path) -> None:
    texts = [*SCALARS, "", " ", "a\nb", "a: b", "#", "\u00e9", "'", '"', "[", "{", "*a", "&a", "!a", "|", ">", "%", "@"]
    text = HEAD.replace("spec:\n", "") + yamls.dump({"spec": texts})
    assert kinds(read(text)) == kinds(texts) == kinds(as_kubectl_reads(text, tmp_path))
