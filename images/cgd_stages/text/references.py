"""References with several right answers, in the form in which they are stored. Pure."""

import json
from collections.abc import Sequence


def any_of(answers: Sequence[str]) -> str:
    """A reference of several answers of which each is right by itself."""
    return json.dumps({"any": list(answers)}, ensure_ascii=False)


def in_words(reference: str) -> str:
    """The reference as a person reads it: of several right answers each on a line of its own."""
    return "\nor ".join(right_answers(reference))


def right_answers(reference: str) -> list[str]:
    """The texts of which each is a right answer: the reference itself, or those that `any_of` has joined."""
    if not reference.startswith('{"any":'):
        return [reference]
    try:
        answers = json.loads(reference)["any"]
    except (ValueError, RecursionError):  # a text of the source's own that only begins like one of ours
        return [reference]
    whole = isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers)
    return answers if whole else [reference]
