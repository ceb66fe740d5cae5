"""The rivals, which give the base model more passes instead of training.

Self-Refine (Madaan et al., 2023): the model criticises its own answer and improves it, round by round. Reflexion (Shinn
et al., 2023): it reflects on its answer and answers anew, and then sees its last three reflections but no earlier
answer. Critique and reflection are asked for with the teacher's prompt for critiques. The verdict in it is the only
signal; no reference is used. A dialogue ends when a critique finds the answer right, when a pass is cut or empty, or
after the last round. The last complete answer is graded, and the tokens of all passes are its cost. Without a rival a
dialogue is one pass.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from cgd_stages.contract import Rival, Role, Sampling
from cgd_stages.engines.base import Completion, Refused, Reply, Request
from cgd_stages.engines.replies import row_sampling
from cgd_stages.grading.compare import compare_at_once
from cgd_stages.grading.extraction import find_answer
from cgd_stages.method.prompts import earlier_turns, retry_messages, role_messages, verdict
from cgd_stages.store.rows import Row

MEMORY = 3
"""Reflections that the next answer sees, as in the paper."""


@dataclass
class Dialogue:
    """One question on its way: its last texts, and what they have cost."""

    name: str
    question: Row
    role: Role = "answer"
    answer: Reply | None = None
    texts: Row = field(default_factory=dict)
    """The `answer` and `critique` that the next pass sees."""
    reflections: list[str] = field(default_factory=list)
    drafts: list[Completion] = field(default_factory=list)
    """The complete answers that have been drawn, among which one is chosen."""
    passes: int = 0
    prompt_tokens: int = 0
    tokens: int = 0

    @property
    def reply(self) -> Reply:
        """The answer that is graded, with the cost of all passes."""
        assert self.answer is not None
        if isinstance(self.answer, Completion):
            return replace(self.answer, name=self.name, prompt_tokens=self.prompt_tokens, tokens=self.tokens)
        return self.answer


class Dialogues:
    """All dialogues of an evaluation; `engines.drive` calls `take`."""

    def __init__(self, questions: Iterable[tuple[str, Row]], sampling: Sampling, rival: Rival | None) -> None:
        self._waiting = deque(Dialogue(name, question) for name, question in questions)
        self._under_way: dict[str, Dialogue] = {}
        self._sampling, self._kind = sampling, rival.kind if rival else None
        self._passes = 1 + 2 * rival.rounds if rival else 1
        self._draws = rival.draws if rival else 1

    @property
    def under_way(self) -> int:
        """Dialogues that have begun and not ended: the engine works on them, or gets their next pass first."""
        return len(self._under_way) + sum(dialogue.passes > 0 for dialogue in self._waiting)

    def take(self) -> Request | None:
        if not self._waiting:
            return None
        dialogue = self._waiting.popleft()
        request = self._request(dialogue)
        self._under_way[request.name] = dialogue
        return request

    def note(self, reply: Reply) -> Dialogue | None:
        """Enter the reply of a pass. Returns the dialogue if that was its last pass."""
        dialogue = self._under_way.pop(reply.name)
        whole = reply if isinstance(reply, Completion) and reply.finish_reason == "stop" and reply.text else None
        text = whole.text if whole else ""
        dialogue.passes += 1
        dialogue.prompt_tokens += reply.prompt_tokens
        dialogue.tokens += reply.tokens if isinstance(reply, Completion) else 0
        if dialogue.answer is None or (dialogue.role == "refine" and text):
            dialogue.answer = reply
        goes_on = self._chooses(dialogue, whole) if self._draws > 1 else bool(text) and self._goes_on(dialogue, text)
        if not goes_on:
            return dialogue
        # Its next pass comes first, while its prefix is in the engine's cache.
        self._waiting.appendleft(dialogue)
        return None

    def _goes_on(self, dialogue: Dialogue, text: str) -> bool:
        """Prepare the next pass. Returns whether there is one."""
        if dialogue.role == "critique":
            dialogue.texts["critique"], dialogue.role = text, "refine"
            dialogue.reflections.append(text)
            return verdict(text) != "right"
        dialogue.texts["answer"], dialogue.role = text, "critique"
        return dialogue.passes < self._passes

    def _chooses(self, dialogue: Dialogue, whole: Completion | None) -> bool:
        """Prepare the next pass of a dialogue that draws several answers. Returns whether there is one."""
        drafts = dialogue.drafts
        if dialogue.role == "answer":
            drafts += [whole] if whole else []
            if dialogue.passes < self._draws and not isinstance(dialogue.answer, Refused):
                return True
            if self._kind == "Majority" or not drafts:
                dialogue.answer = most_given(drafts) or dialogue.answer
                return False
            dialogue.role, dialogue.answer = "critique", drafts[0]
        else:
            judged = drafts[dialogue.passes - self._draws - 1]
            if whole and verdict(whole.text) == "right":
                dialogue.answer = judged
                return False
        place = dialogue.passes - self._draws
        if place == len(drafts):
            return False
        dialogue.texts["answer"] = drafts[place].text
        return True

    def _request(self, dialogue: Dialogue) -> Request:
        # The purpose is not the stage's name: base, trained model and rival draw their first answers with equal seeds.
        purpose = f"evaluate-{dialogue.passes}" if dialogue.passes else "evaluate"
        sampling = row_sampling(self._sampling, purpose, dialogue.question)
        if dialogue.role == "refine" and self._kind == "Reflexion":
            turns = earlier_turns(dialogue.question)
            messages = retry_messages(dialogue.question["prompt"], dialogue.reflections[-MEMORY:], turns=turns)
        else:
            messages = role_messages(dialogue.role, dialogue.question | dialogue.texts)
        return Request(f"{dialogue.name}#{dialogue.passes}", messages, sampling)


def most_given(drafts: Sequence[Completion]) -> Completion | None:
    """The first of the outputs whose answer most of them give. Answers are the same as far as that is seen without a
    parser of expressions: 1,000 and 1000, but not 1/2 and 0.5. An output without an answer has no vote; None: none has
    one."""
    votes: list[tuple[str, list[Completion]]] = []
    for draft in drafts:
        answer = find_answer(draft.text)
        if answer.source == "none":
            continue
        same = next((voters for given, voters in votes if _is_same(given, answer.text)), None)
        if same is None:
            votes.append((answer.text, [draft]))
        else:
            same.append(draft)
    return max(votes, key=lambda vote: len(vote[1]))[1][0] if votes else None


def _is_same(one: str, other: str) -> bool:
    same = compare_at_once(one, other)
    return same is not None and same.equal
