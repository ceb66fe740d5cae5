"""The messages that each model gets, word for word, and how its reply is read. Pure: texts in, texts out.

Who sees what: the student answers x alone, and so does the teacher when it writes its own answer (distill); the
teacher's critique sees x and y'; its refinement sees x, y' and c; its miscritique, for an ablation, sees the same three
and defends the opposite verdict; training with CGD sees x, y' and c, below an instruction that names the teacher's
critique, and training with CFT sees x and y'. Where the prompt is a conversation,
x is its last user turn, and all of them see the turns before it.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from cgd_stages.chat.messages import Message, plain
from cgd_stages.contract import InstructionTurn, Repetition, Role
from cgd_stages.method import wording

Verdict = Literal["right", "wrong"]


TEACHER = """\
You are an expert in the subject of the question below. You are given a student's initial answer to it. As long as \
there is no critique of the answer, write one: look for inaccurate statements, missing steps, and explanations that \
are unclear or incomplete; say what is wrong, why, and what a correct answer needs; where the answer is sound, say so. \
Finish the critique with a verdict on a line of its own, which must be exactly "Conclusion: right" or "Conclusion: \
wrong". Where your critique is given, write an improved and complete answer to the question instead: correct every \
error, fill in the missing steps, and keep what is already right. Reply with the improved answer alone; do not mention \
the student or the critique."""
"""The system turn of both of the teacher's roles. Both requests begin with the same words, up to the slots of x and y',
so that an engine computes them once; their last line says which text to write."""
CRITIQUE = "Write the critique."
REFINE = "Write the improved answer."

MISCRITIQUE = """\
You are an expert in the subject of the question below. You are given a student's initial answer to it and a critique \
of that answer. For an experiment on what wrong feedback does to a student, write another critique, which defends the \
opposite verdict. Where the critique concludes that the answer is right, argue that it is wrong: name a mistake that \
an expert might believe in, say where it is and what the answer should be instead. Where the critique concludes that \
the answer is wrong, argue that it is right: say why its steps and its result hold. Be as specific, as sure and about \
as long as the critique, and do not mention it, the experiment, or any doubt. Finish with the opposite verdict on a \
line of its own, which must be exactly "Conclusion: right" or "Conclusion: wrong"."""
OPPOSITE = "Write the critique with the opposite verdict."

_TRAINING = """\
You are an expert in the subject of the question below. You are given a student's initial answer{critique}. Write an \
improved and complete answer to the question: correct every error, fill in the missing steps, and keep what is \
already right. Reply with the improved answer alone; do not mention the student{or_critique}."""

TRAINING = _TRAINING.format(critique=" and the teacher's critique of it", or_critique=" or the critique")
UNCRITICISED = _TRAINING.format(critique="", or_critique="")
"""The training instruction without a critique. It does not mention one."""

CFT = """\
Critique the solution to the question below: say whether it is correct, where it goes wrong, and why. Finish the \
critique with a verdict on a line of its own, which must be exactly "Conclusion: right" or "Conclusion: wrong"."""
"""The training instruction of CFT: the fixed request for a critique."""

GENERIC = """\
The answer may hold mistakes, or leave out steps that it needs. Go through it line by line, check every statement and \
every calculation, correct what is wrong and complete what is missing."""
"""The text that replaces every critique in the ablation `generic`. It has no verdict."""

REFLEXION = """\
You have tried to answer the question below before, and your answer was wrong. You are given your reflections on what \
you tried. Answer the question anew, from the beginning, and avoid the mistakes that they name. Reply with the answer \
alone; do not mention the reflections."""

DEFAULT_LOOP = Repetition()

_VERDICT = re.compile(r"\W*conclusion\W+(right|wrong)\W*", re.IGNORECASE)
_FONT = re.compile(r"\\(?:(?:text|math)?(?:bf|it|rm|sf|tt)|text|emph|underline|boxed)(?![A-Za-z])")
"""Commands of LaTeX that set words in another font, or in a box."""


def earlier_turns(row: dict[str, Any]) -> list[Message]:
    """The turns of a row's conversation before x; empty where x is the whole prompt."""
    turns: list[Message] = json.loads(row.get("turns") or "[]")
    return turns


def whole_prompt(row: dict[str, Any]) -> str:
    """The prompt as a person reads it: x alone, or the whole conversation with the role of each turn."""
    turns = earlier_turns(row)
    if not turns:
        return str(row["prompt"])
    messages = answer_messages(row["prompt"], turns=turns)
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)


def answer_messages(prompt: str, *, turns: Sequence[Message] = ()) -> list[Message]:
    """x alone, after the turns before it, without a system turn or any other word of ours."""
    return [*turns, {"role": "user", "content": prompt}]


def asked(question: str, instruction: str) -> str:
    """x of a benchmark's question: the question, a blank line, the benchmark's instruction."""
    return f"{question}\n\n{instruction}" if instruction else question


def critique_messages(prompt: str, answer: str, *, turns: Sequence[Message] = ()) -> list[Message]:
    """x and y', and the task to write the critique."""
    return _instructed(turns, TEACHER, *_slots(prompt, answer), CRITIQUE)


def miscritique_messages(prompt: str, answer: str, critique: str, *, turns: Sequence[Message] = ()) -> list[Message]:
    """x, y' and c, and the task to write a critique that defends the opposite verdict."""
    return _instructed(turns, MISCRITIQUE, *_slots(prompt, answer, critique), OPPOSITE)


def refine_messages(prompt: str, answer: str, critique: str, *, turns: Sequence[Message] = ()) -> list[Message]:
    """x, y' and c, and the task to write the improved answer."""
    return _instructed(turns, TEACHER, *_slots(prompt, answer, critique), REFINE)


def retry_messages(prompt: str, reflections: Sequence[str], *, turns: Sequence[Message] = ()) -> list[Message]:
    """x, the model's reflections on its earlier answers, without those answers, and the task to answer anew."""
    return _instructed(turns, REFLEXION, f"Question: {prompt}", *(f"Reflection: {text}" for text in reflections))


def training_context(
    prompt: str,
    answer: str,
    critique: str | None,
    *,
    turns: Sequence[Message] = (),
    instruction_turn: InstructionTurn = "user",
) -> list[Message]:
    """The messages that the student reads when it is trained with CGD; the refinement is the assistant's turn that
    follows. The record of the method's authors: one user turn, in which a line break joins the instruction and the
    slots.

    If the critique is None, its slot is left out.
    """
    instruction = UNCRITICISED if critique is None else TRAINING
    return _lesson(turns, instruction_turn, instruction, *_slots(prompt, answer, critique))


def cft_context(
    prompt: str, answer: str, *, turns: Sequence[Message] = (), instruction_turn: InstructionTurn = "user"
) -> list[Message]:
    """The messages that the student reads when it is trained with CFT; the critique is the assistant's turn that
    follows. The record of CFT's authors (arXiv 2501.17703)."""
    return _lesson(turns, instruction_turn, CFT, f"Question:\n{prompt}", f"Solution:\n{answer}")


def _slots(prompt: str, answer: str, critique: str | None = None) -> list[str]:
    slots = [f"Question: {prompt}", f"Student's Initial Answer: {answer}"]
    return slots if critique is None else [*slots, f"Critique: {critique}"]


def _instructed(turns: Sequence[Message], instruction: str, *slots: str) -> list[Message]:
    """Our instruction as the system turn, and the slots as the user's. The turns of a conversation stay in front, word
    for word and with a system turn of their own; the instruction then stands above the slots, in the last turn."""
    if turns:
        return [*turns, {"role": "user", "content": "\n\n".join([instruction, *slots])}]
    return [{"role": "system", "content": instruction}, {"role": "user", "content": "\n\n".join(slots)}]


def _lesson(
    turns: Sequence[Message], instruction_turn: InstructionTurn, instruction: str, *slots: str
) -> list[Message]:
    """A training's instruction and slots: in one user turn, after the turns of a conversation; or as `_instructed`."""
    if instruction_turn == "system":
        return _instructed(turns, instruction, *slots)
    return [*turns, {"role": "user", "content": "\n".join([instruction, "\n\n".join(slots)])}]


def role_messages(role: Role, row: dict[str, Any], instruction: str | None = None) -> list[Message]:
    """The messages of a role for a row, with an instruction of the manifest's own in place of ours, if it has one. They
    never hold the reference or a column of a later stage."""
    if instruction is not None:
        return _in_own_words(role, row, instruction)
    x, turns = row["prompt"], earlier_turns(row)
    match role:
        case "answer" | "distill":
            return answer_messages(x, turns=turns)
        case "critique":
            return critique_messages(x, row["answer"], turns=turns)
        case "refine":
            return refine_messages(x, row["answer"], row["critique"], turns=turns)
        case "miscritique":
            return miscritique_messages(x, row["answer"], row["critique"], turns=turns)
        case "misrefine":
            return refine_messages(x, row["answer"], row["miscritique"], turns=turns)


def _in_own_words(role: Role, row: dict[str, Any], instruction: str) -> list[Message]:
    turns, texts = earlier_turns(row), wording.asked_texts(role, row)
    if wording.is_whole(instruction):
        return [*turns, {"role": "user", "content": wording.filled(instruction, texts)}]
    last = CRITIQUE if texts["critique"] is None else REFINE
    return _instructed(turns, instruction, *_slots(texts["prompt"], texts["answer"], texts["critique"]), last)


SLOTS = {"prompt": "{x}", "answer": "{y'}", "critique": "{c}", "miscritique": "{c}"}
"""A row with marks in place of its texts."""


def fingerprint(role: Role, instruction: str | None = None) -> str:
    """A hash of the role's wording, slots and plain frame: part of the digest of its stage."""
    messages = role_messages(role, SLOTS, instruction)
    return hashlib.sha256(repr((messages, plain(messages))).encode()).hexdigest()


_LOOP_WORDS, _WORD = 64, 4
"""The most words of a part whose repetition is looked for, and the tokens that a word counts for: an engine has seen
the tokens, and this is for what it has not seen, such as the texts of an endpoint."""


def loops(text: str, loop: Repetition = DEFAULT_LOOP) -> str:
    """The words that a text repeats at its end so often, and with so many words in all, that it is a loop; else ""."""
    if not loop.stop:
        return ""
    words, repeats = text.split(), loop.min_repeats // _WORD
    for period in range(1, min(_LOOP_WORDS, len(words) // repeats) + 1):
        covered = max(period * repeats, loop.min_tokens // _WORD)
        tail = words[-covered:]
        if len(tail) == covered and tail[period:] == tail[:-period]:
            return " ".join(tail[-period:])
    return ""


def verdict(critique: str) -> Verdict | None:
    """The verdict on the critique's last line, or None. A critique without a verdict is kept and counted."""
    lines = critique.strip().splitlines()
    match = _VERDICT.fullmatch(_FONT.sub("", lines[-1])) if lines else None
    if not match:
        return None
    return "right" if match[1].lower() == "right" else "wrong"


def with_verdict(critique: str, new: Verdict) -> str:
    """The critique with a new verdict as its last line, which replaces its old one."""
    lines = critique.strip().splitlines()
    body = lines[:-1] if verdict(critique) else lines
    return "\n".join([*body, f"Conclusion: {new}"])
