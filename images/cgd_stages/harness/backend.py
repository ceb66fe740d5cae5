"""lm-eval's vLLM backend, with the settings of our engines, and the run's way to speak to the model. Imports vLLM.

The room `chat` writes what the model reads and splits what it writes, as in every other stage. lm-eval 0.4.13 has means
of its own for models that think, and none of them is used: its vLLM backend drops `enable_thinking: False` (templates
get None, and the model thinks), takes a thought that never ended for the answer, and stops in a thought at the task's
limit of tokens, which is meant for an answer.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval.models.vllm_causallms import VLLM

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Harness, Repetition
from cgd_stages.engines.vllm_settings import loop_detection, vllm_arguments
from cgd_stages.errors import UserError
from cgd_stages.harness.replies import Reply

DEFAULT_TOKENS = 4096
"""The most output tokens, for tasks that set no limit; lm-eval's 256 would cut the reasoning of GPQA-Diamond."""
NO_MARKER = "\0no marker\0"
"""An end of thoughts that no text holds. With one, lm-eval leaves the stops of a task to its own cut after the thought,
and gives none of them to vLLM, which would stop inside the thought."""


class Backend(VLLM):  # type: ignore[misc]  # lm-eval has no types
    """The model, as lm-eval asks it. `replies` maps the id of a request's arguments to its first reply."""

    def __init__(self, model: Path, work: Harness, chat: ChatTemplate) -> None:
        arguments = vllm_arguments(model, work.engine, chat)
        super().__init__(pretrained=arguments.pop("model"), batch_size="auto", **arguments)
        self._max_gen_toks = min(DEFAULT_TOKENS, self.max_length // 2)  # the question needs the rest of the context
        self._most_tokens = work.max_tokens or self.max_length
        self.chat = chat
        self.add_bos_token = False if self.chat.templated else None  # a template has written it, if the model wants it
        self.replies: dict[int, Reply] = {}
        self.begun: set[str] = set()
        """The texts that end in the beginning of a reply, which the task has written."""
        self._asked: dict[str, list[Any]] = {}
        """A text that asks for a thought -> its messages."""
        self._plain: dict[str, list[int]] = {}
        """A text with a control token in a question -> its ids, in which the question is plain text."""

    def apply_chat_template(self, chat_history: list[Any], add_generation_prompt: bool = True) -> str:
        """The text that the model reads. Where the task begins the reply, no thought can come before it."""
        if not add_generation_prompt:
            *asked, reply = chat_history
            text = self._at_once.render(asked).text + self._at_once.turn.header + str(reply["content"])
            self.begun.add(text)
            return text
        rendered = self.chat.render(chat_history)
        if self.chat.thinks:
            self._asked[rendered.text] = chat_history
        if len(rendered.pieces) > 1:
            self._plain[rendered.text] = self.chat.token_ids(rendered)
        return rendered.text

    @cached_property
    def _at_once(self) -> ChatTemplate:
        """The chat in which the model replies without a thought. Raises UserError for a model that always thinks."""
        try:
            return self.chat.without_thoughts()
        except UserError as error:
            hint = "Remove the task from spec.evaluation.tasks."
            raise UserError(f"lm-eval asks this task without a thought, but {error}", hint=hint) from error

    def tok_encode(self, string: Any, add_special_tokens: bool | None = None, **settings: Any) -> Any:
        ids = super().tok_encode(string, add_special_tokens, **settings)
        if isinstance(string, str):  # a part of a request for likelihoods, whose ids must continue each other
            return ids
        return [self._plain.get(text, found) for text, found in zip(string, ids, strict=True)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        answers: dict[int, str] = {}
        for begun in (False, True):
            places = [place for place, request in enumerate(requests) if (request.args[0] in self.begun) is begun]
            self._splits = not begun
            self._thinks = self.chat.thinks and not begun
            self.think_end_token = NO_MARKER if self._thinks else None
            replies = super().generate_until([requests[place] for place in places], disable_tqdm) if places else []
            for place, reply in zip(places, replies, strict=True):
                self.replies.setdefault(id(requests[place].args), reply)
                answers[place] = str(reply)  # tasks check for the type str
        return [answers[place] for place in range(len(requests))]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The likelihoods of choices as replies without a thought. The model would give each of them after a thought of
        its own, which is not known."""
        for request in requests:
            text, choice = request.args
            if messages := self._asked.get(text):
                request.arguments = (self._at_once.render(messages).text, choice)
        likelihoods: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return likelihoods

    def modify_gen_kwargs(self, gen_kwargs: dict[str, Any], **settings: Any) -> tuple[dict[str, Any], list[str], int]:
        parameters, until, most = super().modify_gen_kwargs(gen_kwargs, **settings)
        parameters["stop_token_ids"] = self.chat.extra_stops
        if self._thinks:  # a loop would go on to the run's limit
            budget = self.chat.chat.thinking_budget
            parameters |= {"thinking_token_budget": budget, "repetition_detection": loop_detection(Repetition())}
        return parameters, until, most

    def _model_generate(self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None) -> Any:
        if not generate:
            return super()._model_generate(requests, generate, sampling_params)
        if self._thinks:  # the task's own limit is meant for an answer
            for ids, params in zip(requests, sampling_params, strict=True):
                params.max_tokens = min(self._most_tokens, self.max_length - len(ids))
        outputs = super()._model_generate(requests, generate, sampling_params)
        for output in outputs:
            output.outputs[0].text = self._reply(output.outputs[0])
        return outputs

    def _reply(self, completion: Any) -> Reply:
        reason = str(completion.finish_reason)
        if not self._splits:
            return Reply.of(completion.text, reason)
        parts = self.chat.split(completion.token_ids, completion.text)
        if self.chat.markup is None and not parts.thinking and not parts.unfinished_thinking:
            return Reply.of(completion.text, reason)  # with its blanks, which count in a program
        return Reply.of(parts.text, reason, thinking=parts.thinking, unfinished_thought=parts.unfinished_thinking)
