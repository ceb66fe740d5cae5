"""Make the quick start's questions: 64 sums to learn from, 128 others to evaluate on.

    python examples/make_sums.py        writes quickstart-rows.jsonl and quickstart-exam.jsonl beside itself

They are questions of the study in `replicate`, whose tutor can check them; always the same. No sum is in both files.
A line is {"id", "question", "answer"}; an answer to learn from is worked.
"""

import json
from pathlib import Path

from replicate.arithmetic import SUMS, Problem
from replicate.study import ASKED, questions

ROWS, EXAM = 64, 128


def make() -> tuple[list[Problem], list[Problem]]:
    """The sums to learn from, and those of the exam."""
    exam = questions("quick start, exam", EXAM, SUMS, ASKED)
    return questions("quick start", ROWS, SUMS, ASKED, but=exam), exam


def to_jsonl(problems: list[Problem], prefix: str, *, worked: bool) -> str:
    lines = [
        {
            "id": f"{prefix}-{number:03d}",
            "question": problem.question,
            "answer": problem.reference if worked else str(problem.result),
        }
        for number, problem in enumerate(problems, 1)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def main() -> None:
    rows, exam = make()
    folder = Path(__file__).parent
    (folder / "quickstart-rows.jsonl").write_text(to_jsonl(rows, "row", worked=True))
    (folder / "quickstart-exam.jsonl").write_text(to_jsonl(exam, "exam", worked=False))


if __name__ == "__main__":
    main()
