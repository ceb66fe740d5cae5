"""How well and how fast paraphrases of questions are found, and near-duplicates grouped.

    python tests/bench/paraphrases.py PROMPTS.jsonl QUESTIONS.jsonl ... [--count 100000]

Both are JSON lines with a question in `question` or `problem` and its solution in `answer` or `solution`, such as
GSM8K's training set, and GSM8K's test set with MATH-500. It changes each question and looks for it, and looks for the
questions in the prompts, which are of another set. Then it compares `--count` prompts, made of the given ones with
changed words, with 2,000 questions.
"""

import argparse
import json
import random
import re
import resource
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from cgd_stages.quality.near_duplicates import Signatures, outline
from cgd_stages.quality.paraphrases import Findings, Originals
from cgd_stages.store.rows import Row

NAMES = ("Olivia", "Noah", "Amara", "Kenji", "Priya", "Mateo", "Ingrid", "Omar", "Sofia", "Tariq", "Hana", "Diego")
NO_NAMES = set(
    "How The If She He They It In On At Each What When There After Every His Her For And Then To Find Let Given".split()  # noqa: SIM905
)
SYNONYMS = {
    "buys": "purchases", "bought": "purchased", "how many": "what number of", "how much": "what amount of",
    "total": "overall", "altogether": "in all", "each": "every", "makes": "earns", "gave": "handed", "has": "owns",
    "needs": "requires", "takes": "needs", "more than": "above", "less than": "below", "twice": "two times",
    "half": "50%", "does": "will", "friends": "buddies",
}  # fmt: skip


def other_names(text: str, rng: random.Random) -> str:
    found = {name for name in re.findall(r"\b[A-Z][a-z]{2,}\b", text) if name not in NO_NAMES}
    names = {name: rng.choice(NAMES) for name in sorted(found)}
    return re.sub(r"\b[A-Z][a-z]{2,}\b", lambda match: names.get(match[0], match[0]), text)


def other_numbers(text: str, rng: random.Random) -> str:
    return re.sub(r"\d+", lambda match: str(int(match[0]) + rng.randint(1, 9)), text)


def other_order(text: str, rng: random.Random) -> str:
    *sentences, last = re.split(r"(?<=[.?!])\s+", text)
    return " ".join([*rng.sample(sentences, len(sentences)), last])


def other_words(text: str, _: random.Random) -> str:
    for word, other in SYNONYMS.items():
        text = re.sub(rf"\b{word}\b", other, text, flags=re.IGNORECASE)
    return text


def names_and_words(text: str, rng: random.Random) -> str:
    return other_words(other_names(text, rng), rng)


def names_and_numbers(text: str, rng: random.Random) -> str:
    return other_numbers(other_names(text, rng), rng)


def inside(text: str, rng: random.Random) -> str:
    """With other names, inside a longer prompt."""
    before = "Solve the following task, and explain each step in detail so that a beginner can follow it."
    after = "Check the units, write the number on a line of its own, and say which assumptions you make on the way."
    return f"{before} {other_names(text, rng)} {after}"


CHANGES: tuple[Callable[[str, random.Random], str], ...] = (
    other_names, other_numbers, other_order, other_words, names_and_words, names_and_numbers, inside
)  # fmt: skip


def read(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text().splitlines()):
        given = json.loads(line)
        texts = {
            "prompt": given.get("question") or given["problem"],
            "reference": given.get("solution") or given["answer"],
        }
        rows.append({"benchmark": path.stem, "id": f"{number:06d}", "sample": 0, **texts})
    return rows


def recall(questions: list[Row], similarity: float) -> None:
    originals = Originals(questions, similarity)
    for change in CHANGES:
        rng = random.Random(1)
        made = [(row, text) for row in questions if (text := change(row["prompt"], rng)) != row["prompt"]]
        hits = sum(any(match.question == row["id"] for match in originals.paraphrased(text)) for row, text in made)
        print(f"  {change.__name__}: {hits} of {len(made)} found, {hits / len(made):.1%}")


def false_finds(prompts: list[Row], questions: list[Row], similarity: float) -> None:
    originals = Originals(questions, similarity)
    for column in ("prompt", "reference"):
        hits = [row for row in prompts if originals.paraphrased(row[column])]
        print(f"  {column}s of another set: {len(hits)} of {len(prompts)} found")


def many(prompts: list[Row], count: int) -> Iterable[Row]:
    """As many different prompts as are asked for, with every tenth word changed."""
    rng = random.Random(2)
    words = sorted({word for row in prompts for word in row["prompt"].split()})
    for number in range(count):
        row = prompts[number % len(prompts)]
        texts = {}
        for column in ("prompt", "reference"):
            changed = [rng.choice(words) if rng.random() < 0.1 else word for word in row[column].split()]
            texts[column] = " ".join(changed)
        yield row | texts | {"id": f"{number:08d}"}


def speed(prompts: list[Row], questions: list[Row], count: int, similarity: float) -> None:
    rows = list(many(prompts, count))
    before = peak()
    clock = time.process_time()
    findings = Findings(Originals(questions[:2000], similarity))
    built = time.process_time() - clock
    for row in rows:
        findings.add(row, {"prompt": row["prompt"], "reference": row["reference"]})
    passed = time.process_time() - clock
    print(f"  paraphrases of {len(questions[:2000])} questions in {count} prompts and references: {passed:.1f} s,")
    print(f"  {built:.2f} s of it for the index; {peak() - before:.0f} MB; {findings.rows} rows found")
    before, clock = peak(), time.process_time()
    signatures = Signatures()
    for row in rows:
        signatures.add(row["id"], outline(row))
    groups = signatures.groups()
    passed = time.process_time() - clock
    print(f"  near-duplicates: {passed:.1f} s, {peak() - before:.0f} MB, {len(groups)} groups")


def peak() -> float:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("prompts", type=Path)
    parser.add_argument("questions", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=100_000)
    given = parser.parse_args()
    prompts, sets = read(given.prompts), {path.stem: read(path) for path in given.questions}
    questions = [row for rows in sets.values() for row in rows]
    for similarity in (0.4, 0.5, 0.6):
        print(f"similarity {similarity}")
        for name, rows in sets.items():
            print(f" {name}")
            recall(rows, similarity)
        false_finds(prompts, questions, similarity)
    print(f"{given.count} prompts of {len(prompts)}")
    speed(prompts, questions, given.count, 0.5)


if __name__ == "__main__":
    main()
