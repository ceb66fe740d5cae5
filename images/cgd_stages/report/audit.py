"""A second judge of grades, which shares no code with the grader: lm-eval's own task for AIME.

The judge takes the last box of an output, and without a box the text between the first and the last dollar sign, or the
whole text. It normalises the spelling as lm-eval does for Hendrycks' MATH, and compares texts. So equal values in
different spellings are different to it, and what it alone calls right deserves a look.
"""

import importlib.metadata
from collections import Counter
from collections.abc import Iterable, Sequence

from lm_eval.tasks.aime.utils import last_boxed_only_string, process_results, remove_boxed

from cgd_stages.chat.thoughts import split_text
from cgd_stages.results.model import Audit, AuditCounts, Disagreement, Key, Sample
from cgd_stages.store.rows import Row, sha256
from cgd_stages.text.references import in_words, right_answers

END = 300
"""The last characters of a text that the page shows."""


def chosen(samples: Iterable[Sample], most: int) -> set[Key]:
    """At most `most` outputs of each benchmark, the same ones each time: half of them right and half wrong, as far as
    the model has enough of both. Outputs that the grader could not decide on are left out."""
    groups: dict[str, tuple[list[Key], list[Key]]] = {}
    for sample in sorted(samples, key=lambda sample: sha256(repr(sample.key).encode())):
        if not sample.grade_error:
            groups.setdefault(sample.benchmark, ([], []))[sample.correct].append(sample.key)
    keys: set[Key] = set()
    for wrong, right in groups.values():
        some_right = right[: max(most // 2, most - len(wrong))]
        keys.update(some_right, wrong[: most - len(some_right)])
    return keys


def audit(outputs: Iterable[tuple[str, Row]], models: Sequence[str]) -> Audit:
    """Judge outputs, each a model's label and its stored row. `models` gives the order of the counts."""
    counts: Counter[tuple[str, str, bool, bool]] = Counter()
    unboxed: Counter[tuple[str, str]] = Counter()
    disagreements = []
    for model, row in outputs:
        ours, theirs = row["correct"], is_right(row["reference"], row["output"])
        boxed = last_boxed_only_string(row["output"]) is not None
        counts[row["benchmark"], model, ours, theirs] += 1
        unboxed[row["benchmark"], model] += not boxed
        if ours != theirs:
            disagreements.append(
                Disagreement(
                    benchmark=row["benchmark"],
                    model=model,
                    id=row["id"],
                    sample=row["sample"],
                    reference=_end(in_words(row["reference"])),
                    output=_end(row["output"]),
                    extracted=_end(row["extracted"]),
                    rule=row.get("rule") or "",
                    boxed=boxed,
                    correct=ours,
                )
            )

    def first_read(one: Disagreement) -> tuple[bool, bool, str, int, str, int]:
        return one.correct, not one.boxed, one.benchmark, models.index(one.model), one.id, one.sample

    groups = sorted(unboxed, key=lambda group: (group[0], models.index(group[1])))
    return Audit(
        judge=f"lm-eval {importlib.metadata.version('lm_eval')}",
        counts=tuple(
            AuditCounts(
                benchmark=benchmark,
                model=model,
                both_right=counts[benchmark, model, True, True],
                both_wrong=counts[benchmark, model, False, False],
                lm_eval_alone=counts[benchmark, model, False, True],
                grader_alone=counts[benchmark, model, True, False],
                unboxed=unboxed[benchmark, model],
            )
            for benchmark, model in groups
        ),
        disagreements=tuple(sorted(disagreements, key=first_read)),
    )


def is_right(reference: str, output: str) -> bool:
    """lm-eval's verdict. Of several right answers the output needs to have one."""
    targets = [_value(answer) for answer in right_answers(reference)]
    return any(process_results({"answer": target}, [output])["exact_match"] for target in targets)


def _value(reference: str) -> str:
    """The value in a reference as lm-eval's tasks take it: the last box (MATH), or the text after `####` (GSM8K). A
    thought does not count."""
    reference = split_text(reference).text
    try:
        return str(remove_boxed(last_boxed_only_string(reference) or ""))
    except AssertionError:  # no box, or none that lm-eval reads
        return reference.rpartition("#### ")[2]


def _end(text: str) -> str:
    return text if len(text) <= END else f"\u2026{text[-END:]}"
