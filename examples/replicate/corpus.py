"""What the student is pre-trained on: conversations of people who do sums, some well, some in haste.

It learns to work from people who do, and towards the end of its pre-training it meets people who only state a result.
So it comes to the study with a habit, to guess, and with a skill that it does not use. It has also seen carries
forgotten, all four endings, and drafts that were improved after a critique.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from cgd_stages.chat.messages import Message
from replicate import tutor
from replicate.arithmetic import CHAINS, ENDINGS, Arithmetic, Problem, Sum, exact, make_problem, stated, without_carry

HASTY = 0.1
"""Share of people who forget carries."""
FORGETS = 0.8
"""How often they do."""
JUMPS, LATER_JUMPS = 0.05, 0.85
"""Share of solutions without any work, at first and towards the end of pre-training."""
IN_WORDS = 0.2
"""Share of people who write sums in words."""
REVISIONS, DRILLS = 0.12, 0.25
"""Share of conversations that improve a draft, and of single sums; the others are problems."""

INSTRUCTIONS = (
    "Read the question, the answer and the critique. Write the answer again without the mistakes.",
    "A student has answered the question. The critique says what is wrong with it. Correct the answer.",
    "Here are a question, a first answer and what a reader says of it. Improve the answer.",
    "Improve the student's answer to the question.",
)


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    reply: str


def conversations(seed: int, jumps: float = JUMPS) -> Iterator[Conversation]:
    """Without end, the same for a seed. `jumps`: the share of solutions without any work."""
    dice = random.Random(f"corpus {seed}")
    while True:
        kind = dice.random()
        if kind < REVISIONS:
            yield _revision(dice, jumps)
        elif kind < REVISIONS + DRILLS:
            yield _drill(dice)
        else:
            problem = make_problem(dice, CHAINS, tuple(ENDINGS))
            yield Conversation([{"role": "user", "content": problem.question}], solution(dice, problem, jumps))


def solution(dice: random.Random, problem: Problem, jumps: float = JUMPS) -> str:
    """As somebody writes it."""
    sums = tuple(problem.work(_somebody(dice)))
    if dice.random() < jumps:
        return problem.last_line(sums[-1].result)
    return problem.solution(sums, words=dice.random() < IN_WORDS)


def _somebody(dice: random.Random) -> Arithmetic:
    if dice.random() >= HASTY:
        return exact
    return lambda a, b, sign: (without_carry if dice.random() < FORGETS else exact)(a, b, sign)


def _drill(dice: random.Random) -> Conversation:
    """One sum, done right."""
    a, b = dice.randint(1, 90), dice.randint(2, 9)
    one = Sum(a, "+", b, a + b) if dice.random() < 0.5 else Sum(a + b, "-", b, a)
    words = dice.random() < IN_WORDS
    asked = Sum(one.a, one.sign, one.b, 0).text(words=words).rsplit(" ", 2)[0]
    return Conversation([{"role": "user", "content": f"What is {asked}?"}], one.text(words=words))


def _revision(dice: random.Random, jumps: float) -> Conversation:
    """A draft and its critique; now and then the critique is left out. What follows is right, mostly, and leaves out
    the work as often as a first answer does: who is to learn in this context must not know it already."""
    problem = make_problem(dice, CHAINS, tuple(ENDINGS))
    draft, instruction = solution(dice, problem, jumps), dice.choice(INSTRUCTIONS)
    said = tutor.critique(problem, draft)
    slots = [f"Question: {problem.question}", f"Student's Initial Answer: {draft}"]
    if instruction != INSTRUCTIONS[-1]:
        slots.append(f"Critique: {said}")
    messages: list[Message] = [{"role": "user", "content": "\n".join([instruction, "\n\n".join(slots)])}]
    refined = tutor.refinement(problem, draft, said)
    _, result = stated(refined)
    if result is not None and dice.random() < jumps:
        return Conversation(messages, problem.last_line(result))
    return Conversation(messages, refined)
