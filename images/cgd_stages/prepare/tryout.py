"""Makes one example of every training, and one request of every role, with the real templates and tokenizers, so that
what a template refuses is known before a GPU is asked for."""

from jinja2.exceptions import TemplateError

from cgd_stages.chat.example import Unusable
from cgd_stages.chat.messages import Message
from cgd_stages.chat.template import ChatTemplate, ControlTokens
from cgd_stages.contract import Lesson, Prepare, Role
from cgd_stages.errors import UserError
from cgd_stages.method.examples import row_example
from cgd_stages.method.prompts import answer_messages, role_messages
from cgd_stages.store.rows import Row

ROW: Row = {
    "id": "",
    "sample": 0,
    "prompt": "What is 1 + 1?",
    "reference": "2",
    "answer": "1 + 1 = 3.",
    "critique": "The sum is wrong.\nConclusion: wrong",
    "critique_thinking": "1 + 1 is not 3.",
    "refinement": "1 + 1 = 2.",
    "refinement_thinking": "1 and 1 make 2.",
    "distilled": "2",
    "distilled_thinking": "1 and 1 make 2.",
}
"""A row as the stages store it."""
MOST_TOKENS = 1 << 20
"""The examples are tried for their form: the row is short."""


def try_out(work: Prepare, student: ChatTemplate, teacher: ChatTemplate | None) -> None:
    """Raise UserError for what the templates of student and teacher refuse. `teacher`: None behind an endpoint."""
    for role in ("answer", "critique", "refine", "distill") if teacher else ("answer",):
        _ask(student if role == "answer" or teacher is None else teacher, role)
    _render(student, answer_messages(ROW["prompt"]), "the question of an evaluation")
    if work.without_thoughts:
        _answer_at_once(student, work.without_thoughts)
    for lesson in work.lessons or (work.training,):
        _learn(student, lesson)


def _ask(template: ChatTemplate, role: Role) -> None:
    _render(template, role_messages(role, ROW), f"the request of {role}")


def _render(template: ChatTemplate, messages: list[Message], what: str) -> None:
    try:
        template.token_ids(template.render(messages))
    except (TemplateError, ControlTokens) as error:
        hint = "Take another model or revision, or mend its template by chat.template."
        raise UserError(f"the chat template of {template.name} fails on {what}: {error}", hint=hint) from error


def _answer_at_once(template: ChatTemplate, tasks: tuple[str, ...]) -> None:
    """Refuse tasks of lm-eval that leave no room for a thought, for a student that always thinks."""
    try:
        template.without_thoughts()
    except UserError as error:
        hint = f"Remove {', '.join(tasks)} from spec.evaluation.tasks."
        raise UserError(f"{', '.join(tasks)}: lm-eval asks them without a thought, but {error}", hint=hint) from error


def _learn(template: ChatTemplate, lesson: Lesson) -> None:
    if lesson.thinking == "learn" and template.markup is None:
        raise UserError(
            f"the chat template of {template.name} has no place for the thoughts that spec.training.thinking learns",
            hint="Set spec.training.thinking to drop, or spec.student.chat to a template or reasoningParser with "
            "thoughts.",
        )
    try:
        row_example(
            template,
            lesson.objective,
            ROW,
            max_length=MOST_TOKENS,
            thinking=lesson.thinking,
            instruction_turn=lesson.context,
        )
    except Unusable as error:
        raise UserError(
            f"the chat template of {template.name} makes no example of {lesson.title}: {error.detail}",
            hint="Take another student or revision, or mend its template by spec.student.chat.template.",
        ) from error
