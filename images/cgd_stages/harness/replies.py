"""The model's replies on their way through lm-eval, which passes on texts alone. Pure."""

from typing import Self, SupportsIndex


class Reply(str):
    """The answer in an output, and what lm-eval does not pass on: why the output ended, and the thought before it.

    lm-eval cuts texts at the stops of a task; what is left is a Reply, too.
    """

    finish_reason: str
    thinking: str = ""
    unfinished_thought: bool = False
    """The thought never ended, so the output holds no answer, and the text is empty."""

    @classmethod
    def of(cls, text: str, finish_reason: str, *, thinking: str = "", unfinished_thought: bool = False) -> Self:
        reply = cls(text)
        reply.finish_reason, reply.thinking, reply.unfinished_thought = finish_reason, thinking, unfinished_thought
        return reply

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        first, *rest = super().split(sep, maxsplit) or [""]
        return [self._with(first, "stop" if rest else self.finish_reason), *rest]

    def lstrip(self, characters: str | None = None) -> str:
        return self._with(super().lstrip(characters), self.finish_reason)

    def _with(self, text: str, finish_reason: str) -> "Reply":
        return Reply.of(text, finish_reason, thinking=self.thinking, unfinished_thought=self.unfinished_thought)
