"""What the thinking student is taught: word problems, with a thought before the reply and without one. Pure."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from cgd_stages.chat.messages import Message
from cgd_stages.method import prompts
from make_problems import KINDS, distinct, make

SEED = 11


@dataclass(frozen=True)
class Lesson:
    """A request, and the reply that is learned. `thought` is None where the model is asked not to think."""

    messages: list[Message]
    thought: str | None
    reply: str


@dataclass(frozen=True)
class Solved:
    """A problem with its worked solution and its result."""

    question: str
    solution: str
    result: int


def lessons(seed: int = SEED) -> Iterator[Lesson]:
    """Lessons without end: as many of each role, and most with a thought."""
    dice = random.Random(seed)
    for problem in problems(dice):
        thinks = dice.random() < 2 / 3
        teach = dice.choice((answer, critique, refinement))
        yield teach(problem, dice, thinks)


def problems(dice: random.Random) -> Iterator[Solved]:
    """Problems of the quick start's kinds, and none of its own: the run of this example uses those."""
    used = {problem.question for some in make() for problem in some}
    while True:
        problem = next(distinct(dice.choice(KINDS), dice))
        if problem.question not in used:
            solution, _, result = problem.answer.partition("\n#### ")
            yield Solved(problem.question, solution, int(result))


def answer(problem: Solved, _: random.Random, thinks: bool) -> Lesson:
    """With a thought the reply is the result alone; without a thought it shows the work."""
    messages = prompts.answer_messages(problem.question)
    if thinks:
        return Lesson(messages, problem.solution, boxed(problem.result))
    return Lesson(messages, None, worked(problem.solution, problem.result))


def critique(problem: Solved, dice: random.Random, thinks: bool) -> Lesson:
    stated = a_result(problem, dice)
    messages = prompts.critique_messages(problem.question, a_draft(problem, stated, dice))
    thought = f"{problem.solution} The student states {stated}." if thinks else None
    return Lesson(messages, thought, criticism(problem, stated))


def refinement(problem: Solved, dice: random.Random, thinks: bool) -> Lesson:
    stated = a_result(problem, dice)
    draft = a_draft(problem, stated, dice)
    messages = prompts.refine_messages(problem.question, draft, criticism(problem, stated))
    return Lesson(messages, problem.solution if thinks else None, worked(problem.solution, problem.result))


def a_result(problem: Solved, dice: random.Random) -> int:
    """The result that a student states: wrong as often as right."""
    return problem.result + dice.choice((0, 0, 0, -2, -1, 1))


def a_draft(problem: Solved, stated: int, dice: random.Random) -> str:
    """The answer of a student who states this result, with the work or without it."""
    work = f"{problem.solution.rpartition(' = ')[0]} = {stated}."
    return boxed(stated) if dice.random() < 0.5 else worked(work, stated)


def criticism(problem: Solved, stated: int) -> str:
    found = f"The student states {stated}, and the result is {problem.result}."
    return f"{problem.solution} {found}\nConclusion: {'right' if stated == problem.result else 'wrong'}"


def worked(solution: str, result: int) -> str:
    return f"{solution} {boxed(result)}"


def boxed(result: int) -> str:
    return f"The answer is \\boxed{{{result}}}."
