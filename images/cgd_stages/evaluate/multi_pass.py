"""What the base model can do with more passes instead of training: Self-Refine and Reflexion.

Self-Refine (Madaan et al., 2023): the model criticises its own answer and improves it, round by round. Reflexion (Shinn
et al., 2023): it reflects on its answer and answers anew, with its last three reflections in view and the answers out
of it. The critique of the one is the reflection of the other, asked for in the words that the teacher is asked in, and
its verdict is the only signal: no reference is looked at. A round ends the dialogue where the critique finds the answer
right, or where a pass comes to nothing; the last answer that has an end is what is graded, and the tokens of all passes
are its cost. Without a rival this is the single pass of every other model.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from cgd_stages.contract import Rival, Role, Sampling
from cgd_stages.engines.base import Completion, Outcome, Request
from cgd_stages.engines.replies import row_sampling
from cgd_stages.method.prompts import Message, read_reply, retry_messages, role_messages, verdict
from cgd_stages.store.rows import Row

MEMORY = 3
"""Reflections that the next attempt sees, as in the paper."""


@dataclass
class Dialogue:
    """One question on its way: what was said last, and what it has cost."""

    name: str
    question: Row
    role: Role = "answer"
    answer: Outcome | None = None
    texts: Row = field(default_factory=dict)
    """`answer` and `critique`, as the next pass is given them."""
    reflections: list[str] = field(default_factory=list)
    passes: int = 0
    prompt_tokens: int = 0
    tokens: int = 0

    @property
    def outcome(self) -> Outcome:
        """The answer that counts, with the cost of all passes."""
        assert self.answer is not None
        if isinstance(self.answer, Completion):
            return replace(self.answer, name=self.name, prompt_tokens=self.prompt_tokens, tokens=self.tokens)
        return self.answer


class Dialogues:
    """Dialogues as the rival has them; `take` is for `engines.drive`."""

    def __init__(self, questions: Iterable[tuple[str, Row]], sampling: Sampling, rival: Rival | None) -> None:
        self._waiting = deque(Dialogue(name, question) for name, question in questions)
        self._under_way: dict[str, Dialogue] = {}
        self._sampling, self._kind = sampling, rival.kind if rival else None
        self._passes = 1 + 2 * rival.rounds if rival else 1

    @property
    def under_way(self) -> int:
        """Dialogues that have begun and not ended: the engine has them, or gets them next."""
        return len(self._under_way) + sum(dialogue.passes > 0 for dialogue in self._waiting)

    def take(self) -> Request | None:
        if not self._waiting:
            return None
        dialogue = self._waiting.popleft()
        request = self._request(dialogue)
        self._under_way[request.name] = dialogue
        return request

    def note(self, outcome: Outcome) -> Dialogue | None:
        """Enter an outcome; the dialogue, if that was its last pass."""
        dialogue = self._under_way.pop(outcome.name)
        text = _text(outcome)
        dialogue.passes += 1
        dialogue.prompt_tokens += outcome.prompt_tokens
        dialogue.tokens += outcome.tokens if isinstance(outcome, Completion) else 0
        if dialogue.answer is None or (dialogue.role == "refine" and text):
            dialogue.answer = outcome
        if not text or not self._goes_on(dialogue, text):
            return dialogue
        # First in the line, so that a dialogue's prefix is still in the engine's cache.
        self._waiting.appendleft(dialogue)
        return None

    def _goes_on(self, dialogue: Dialogue, text: str) -> bool:
        """Prepare the next pass, if there is one."""
        if dialogue.role == "critique":
            dialogue.texts["critique"], dialogue.role = text, "refine"
            dialogue.reflections.append(text)
            return verdict(text) != "right"
        dialogue.texts["answer"], dialogue.role = text, "critique"
        return dialogue.passes < self._passes

    def _request(self, dialogue: Dialogue) -> Request:
        # Not the stage's name: base, trained model and rival shall draw their first answers with the same seeds.
        purpose = f"evaluate-{dialogue.passes}" if dialogue.passes else "evaluate"
        sampling = row_sampling(self._sampling, purpose, dialogue.question)
        return Request(f"{dialogue.name}#{dialogue.passes}", self._messages(dialogue), sampling)

    def _messages(self, dialogue: Dialogue) -> list[Message]:
        if dialogue.role == "refine" and self._kind == "Reflexion":
            return retry_messages(dialogue.question["prompt"], dialogue.reflections[-MEMORY:])
        return role_messages(dialogue.role, dialogue.question | dialogue.texts)


def _text(outcome: Outcome) -> str:
    """What a pass has said, without its thoughts; empty where it has no end, or nothing to go on with."""
    if not isinstance(outcome, Completion) or outcome.finish_reason != "stop":
        return ""
    return read_reply(outcome.text).text
