"""The review of the rows that a run learns from: `check` counts and grades them, `report` shows the outcome."""

import heapq
from collections.abc import Iterator

from pydantic import ValidationError

from cgd_stages.contract import Contract, Keep
from cgd_stages.grading.grader import Grader
from cgd_stages.method.prompts import whole_prompt
from cgd_stages.quality.marks import SAMPLED, Marks, Quality, Tally, grade_rows
from cgd_stages.results.model import Quadruple, Quadruples
from cgd_stages.store.folder import Folder, Part, read_rows
from cgd_stages.store.rows import Row
from cgd_stages.text.references import in_words

SHOWN = 200
"""The most quadruples on the page: the first in the order of their hash ids, which is an even sample."""
PROMPT_LIMIT = 1000
"""The most characters of a prompt that is shown as a near-duplicate."""
REVIEW = "review.json"
GRADERS = 2
GRADE_SECONDS = 10.0


class Review(Contract):
    """The figures of the rows, and some of the rows to look at."""

    quadruples: Quadruples
    quality: Quality


def review_rows(folder: Folder, rows: Folder, keep: Keep = "all") -> tuple[Review, Part]:
    """Count and grade the rows of `refine`, and store the review in the folder. A review that an earlier attempt has
    stored is used unless it is damaged, because the grader may miss other deadlines now and the same rows must have the
    same review. `keep` says which of the rows are learned."""
    stored = folder.bucket.get(folder.key(REVIEW)) or b""
    try:
        review = Review.model_validate_json(stored)
    except ValidationError:
        folder.bucket.delete(folder.key(REVIEW))
        with Grader(workers=GRADERS, seconds=GRADE_SECONDS) as grader:
            review = read_quadruples(rows, grader)
        review = review.model_copy(update={"quality": review.quality.model_copy(update={"keep": keep})})
        stored = review.to_json().encode()
    return review, folder.put(REVIEW, stored)


def read_quadruples(folder: Folder, grader: Grader, *, shown: int = SHOWN) -> Review:
    """Count all rows, grade a sample and keep the first `shown`. One part and the sample are in memory at a time."""
    tally = Tally()

    def counted_rows() -> Iterator[Row]:
        for row in read_rows(folder):
            tally.add(row)
            yield row

    sample = heapq.nsmallest(max(SAMPLED, shown), counted_rows(), key=lambda row: (row["id"], row["sample"]))
    graded, marks = grade_rows(sample, grader)
    shown_rows = tuple(quadruple(row, mark) for row, mark in zip(sample[:shown], marks, strict=False))
    quadruples = Quadruples(total=tally.verdicts.total(), verdicts=dict(tally.verdicts), shown=shown_rows)
    return Review(quadruples=quadruples, quality=tally.quality(graded, lambda ids: read_prompts(folder, ids)))


def read_prompts(folder: Folder, ids: set[str]) -> dict[str, str]:
    """The prompts by id, cut to `PROMPT_LIMIT`. Without ids it reads nothing."""
    rows = read_rows(folder, ["id", "prompt", "turns"]) if ids else iter(())
    return {row["id"]: whole_prompt(row)[:PROMPT_LIMIT] for row in rows if row["id"] in ids}


def quadruple(row: Row, marks: Marks) -> Quadruple:
    thoughts = {name: row.get(name) or "" for name in ("answer_thinking", "critique_thinking", "refinement_thinking")}
    return Quadruple(
        id=row["id"],
        sample=row["sample"],
        prompt=whole_prompt(row),
        reference=in_words(row.get("reference") or ""),
        answer=row["answer"],
        critique=row["critique"],
        refinement=row["refinement"],
        **thoughts,
        verdict=row["verdict"] or "missing",
        tokens={text: row[f"{text}_tokens"] or 0 for text in ("answer", "critique", "refinement")},
        draft_right=marks.draft,
        refinement_right=marks.refinement,
    )
