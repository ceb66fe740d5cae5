"""What is tried before the run asks for a GPU, with the real templates and tokenizers, vLLM's own checks and the
teacher's endpoint, so that what they refuse is known by then."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from jinja2.exceptions import TemplateError

from cgd_stages.chat.example import Unusable
from cgd_stages.chat.messages import Message
from cgd_stages.chat.template import ChatTemplate, ControlTokens
from cgd_stages.contract import (
    CONFIG_MAP,
    Chat,
    Endpoint,
    Instructions,
    Lesson,
    Model,
    Prepare,
    Published,
    Role,
    Sampling,
    method_of,
    settings_of,
)
from cgd_stages.engines import openai_trial
from cgd_stages.engines.base import Request
from cgd_stages.engines.replies import fault
from cgd_stages.engines.vllm_settings import needs_judging, refuse_wrong_engine
from cgd_stages.errors import UserError
from cgd_stages.method import wording
from cgd_stages.method.examples import each_example, examples_of, row_example
from cgd_stages.method.prompts import answer_messages, earlier_turns, role_messages
from cgd_stages.models import resolve
from cgd_stages.models.fit import Served
from cgd_stages.quality.marks import final_answer
from cgd_stages.results.published import HINT, contradictions, read
from cgd_stages.runtime.inputs import read_text
from cgd_stages.runtime.program import Context
from cgd_stages.store.folder import Folder, read_rows
from cgd_stages.store.rows import Row
from cgd_stages.training.dataset import no_examples

log = logging.getLogger(__name__)

ROW: Row = {
    "id": "",
    "sample": 0,
    "prompt": "What is 1 + 1?",
    "reference": "2",
    "answer": "1 + 1 = 3.",
    "critique": "The sum is wrong.\nConclusion: wrong",
    "critique_thinking": "1 + 1 is not 3.",
    "miscritique": "The sum is right.\nConclusion: right",
    "refinement": "1 + 1 = 2.",
    "refinement_thinking": "1 and 1 make 2.",
    "distilled": "2",
    "distilled_thinking": "1 and 1 make 2.",
}
"""A row as the stages store it."""
MOST_TOKENS = 1 << 20
"""The examples are tried for their form: the row is short."""
TRIALS = 2
"""How often an endpoint is asked for a text of each kind before its replies are found unusable."""
HINTS = {
    "truncated": "Raise {where}.maxTokens, which counts the thought and the text, or make the model think less.",
    "repetition": "Raise {where}.temperature, or use another model.",
    "unfinished_thought": "Set spec.teacher.chat.thinking to off, or use another model or server.",
    "empty": "Look at what the server says of the model: its replies hold no text.",
    "control_tokens": "Have the server end a reply at the end of its turn, and leave control tokens out of the text "
    "(spec.teacher.endpoint.extraBody may name them in stop).",
    "endpoint": "Look at what the server says of the model, and correct spec.teacher.endpoint.",
}
"""What to do when a reply of the trial would be rejected, by the reason."""


# --- templates --------------------------------------------------------------------------------------------------


def read_template(context: Context, chat: Chat, where: str) -> Chat:
    """The chat with the text of its template, which the run may name by its place: a key of a ConfigMap, or an object
    in S3. `where`: the model's place in the spec.

    Raises UserError when the file is no text or does not exist, TransientError when a ConfigMap is not mounted yet.
    """
    if (uri := chat.template_uri) is None:
        return chat
    hint = f"Correct {where}.chat.template, or the file."
    text = read_text(context, uri, "the chat template", hint)
    if "{" not in text:
        raise UserError(f"the file {uri} holds no Jinja template", hint=hint)
    return chat.model_copy(update={"template": text})


def read_instructions(context: Context, given: Instructions) -> Instructions:
    """The teacher's instructions as texts. Raises UserError for one that leaves out what the role is to read, and logs
    a critique's that asks for no verdict."""
    texts = {}
    for field, text in given.given.items():
        where, found = f"spec.generation.{field}.instruction", text
        if text.startswith((CONFIG_MAP, "s3://")):
            found = read_text(context, text, "the instruction", f"Correct {where}, or the file.").strip()
        if faults := wording.faults(field, found):
            needed = ", ".join(f"{{{name}}}" for name in wording.NEEDED[field])
            hint = f"Write {needed} where the row's texts go, or none of them: then they stand below the instruction."
            raise UserError(f"{where}: {'; '.join(faults)}", hint=hint)
        texts[field] = found
    if "critique" in texts and not wording.asks_for_verdict(texts["critique"]):
        log.warning(
            'spec.generation.critique.instruction asks for no last line "Conclusion: right" or "Conclusion: wrong": '
            "critiques will have no verdict, by which the report tells how good they are"
        )
    return Instructions(**texts)


def _asked(work: Prepare, role: Role) -> list[Message]:
    """The messages of a role for the row that is tried."""
    return role_messages(role, ROW, work.instructions.of(role) if work.instructions else None)


def try_out(work: Prepare, student: ChatTemplate, teacher: ChatTemplate | None) -> None:
    """Make a request of every role and an example of every training. Raises UserError for what the templates of
    student and teacher refuse. `teacher`: None behind an endpoint."""
    for role in get_args(Role) if teacher else ("answer",):
        template = student if role == "answer" or teacher is None else teacher
        _render(template, _asked(work, role), f"the request of {role}")
    _render(student, answer_messages(ROW["prompt"]), "the question of an evaluation")
    if tasks := ", ".join(work.without_thoughts or ()):
        try:
            student.without_thoughts()
        except UserError as error:
            hint = f"Remove {tasks} from spec.evaluation.tasks."
            raise UserError(f"{tasks}: lm-eval asks them without a thought, but {error}", hint=hint) from error
    for lesson in work.lessons or (work.training,):
        _learn(student, lesson)


def _render(template: ChatTemplate, messages: list[Message], what: str) -> None:
    try:
        template.token_ids(template.render(messages))
    except (TemplateError, ControlTokens) as error:
        hint = "Take another model or revision, or mend its template by chat.template."
        raise UserError(f"the chat template of {template.name} fails on {what}: {error}", hint=hint) from error


def _learn(template: ChatTemplate, lesson: Lesson) -> None:
    if lesson.thinking == "learn" and template.markup is None:
        raise UserError(
            f"the chat template of {template.name} has no place for the thoughts that spec.training.thinking learns",
            hint="Set spec.training.thinking to drop, or spec.student.chat to a template or reasoningParser with "
            "thoughts.",
        )
    scored = method_of(lesson.objective).scored
    try:
        for objective in (examples_of(lesson), *([scored] if scored else [])):
            row_example(
                template,
                objective,
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


def try_references(work: Prepare, student: ChatTemplate, prompts: Folder) -> dict[str, float]:
    """Make the examples that no model writes a text for, SFT's: which of them cannot be made is known before the run
    asks for a GPU. Returns the metric that counts these rows, which other objectives may use. Raises the UserError of
    `check` where they are all, or more than may be rejected."""
    lesson = next((lesson for lesson in work.lessons or (work.training,) if lesson.objective == "SFT"), None)
    if lesson is None:
        return {}
    rows, reasons, first = prompts.require().rows.done, Counter[str](), list[str]()
    log.info("%s: making the examples of %d rows, to see whether they can be made", lesson.title, rows)
    made = each_example(
        student,
        examples_of(lesson),
        read_rows(prompts),
        max_length=work.training.max_sequence_length,
        thinking=lesson.thinking,
        instruction_turn=lesson.context,
    )
    for row, example in made:
        if isinstance(example, Unusable):
            reasons[example.reason] += 1
            first = [*first, f"{row['id']} {example}"][:2]
    if unusable := reasons.total():
        refusal = no_examples(lesson, reasons, first, rows, work.max_rejected)
        if unusable == rows or unusable > work.max_rejected * rows:
            raise refusal
        log.warning("%s %s", refusal.message, refusal.hint)
    return {f"{lesson.stage.model}_rejected": float(unusable)}


def try_conversations(work: Prepare, teacher: ChatTemplate | None, prompts: Folder) -> dict[str, float]:
    """Render a request of the teacher for each order of turns that the rows have, with its own template: prepare has
    asked the student's alone about each row. `teacher`: None behind an endpoint. Returns the metric that counts the
    rows whose order it refuses. Raises UserError where these are all, or more than may be rejected."""
    if teacher is None or work.prompts.fields.messages is None:
        return {}
    orders = Counter(tuple(turn["role"] for turn in earlier_turns(row)) for row in read_rows(prompts, ["turns"]))
    refused: dict[str, int] = {}
    for order, count in orders.items():
        turns = [{"role": role, "content": f"Turn {place} is the {role}'s."} for place, role in enumerate(order)]
        try:
            teacher.render(role_messages("critique", ROW | {"turns": json.dumps(turns)}))
        except TemplateError as error:
            words = f"{', '.join([*order, 'user'])} ({error})"
            refused[words] = refused.get(words, 0) + count
    if not refused:
        return {}
    rows, bad = orders.total(), sum(refused.values())
    refusal = UserError(
        f"the chat template of {teacher.name} refuses {bad} of {rows} conversations for the order of their turns, "
        f"such as {max(refused, key=lambda words: refused[words])}",
        hint="Leave such rows out of spec.prompts.source, take another teacher, give it a spec.teacher.chat.template "
        "that takes them, or raise spec.generation.maxRejected.",
    )
    if bad == rows or bad > work.max_rejected * rows:
        raise refusal
    log.warning("%s. %s", refusal.message, refusal.hint)
    return {"teacher_template_rejected": float(bad)}


def try_grading(work: Prepare, prompts: Folder) -> dict[str, float]:
    """Where the run grades refinements: count the rows whose reference holds no value to grade with. Raises UserError
    where no row has one."""
    if not work.graded_by:
        return {}
    rows = bad = 0
    for row in read_rows(prompts, ["reference"]):
        rows += 1
        bad += final_answer(row["reference"] or "") is None
    fields = ", ".join(work.graded_by)
    if bad == rows:
        raise UserError(
            f"{fields} grades refinements, but none of {rows} rows has a reference with a value to grade with",
            hint="Set spec.prompts.fields.reference to a column whose texts are short or mark a value by \\boxed{} or "
            f"####, or leave {fields} out.",
        )
    if bad:
        log.warning("%d of %d references hold no readable value: %s cannot grade these rows", bad, rows, fields)
    return {"references_without_value": float(bad)}


# --- published figures ------------------------------------------------------------------------------------------


def check_published(context: Context, published: Published) -> None:
    """Read the file as the report will, and log what it has. Raises UserError for a file that is wrong."""
    tables = read(read_text(context, published.uri, "the file", HINT), published)
    log.info("published figures: %d rows of %s", sum(len(table.rows) for table in tables), published.student)
    for said in contradictions(tables):
        log.warning("published figures: an average is not the mean of its figures: %s", said)


# --- engines ----------------------------------------------------------------------------------------------------


def refuse_other_tokens(student: ChatTemplate, teacher: ChatTemplate) -> None:
    """Raise UserError unless every token of the student is the teacher's token of the same id: its probabilities are
    learned by id. The teacher may have more tokens."""
    own, others = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    different = sorted((number, token) for token, number in own.items() if others.get(token) != number)
    if not different:
        return
    number, token = different[0]
    raise UserError(
        f"{len(different)} of {len(own)} tokens of {student.name} are not tokens of {teacher.name} with the same id, "
        f"such as {token!r} ({number}); the kinds SupervisedKD, GKD and OPD learn probabilities by their ids",
        hint="Take a teacher of the student's family, or the kind DistilledSFT, which learns its texts.",
    )


def check_engine(context: Context, served: Served) -> dict[str, str]:
    """Raise UserError when vLLM refuses the engine's arguments or the sampling of its requests. Returns the commit of
    the model that writes its drafts, by name, if that is on the hub."""
    if not needs_judging(served.engine):
        return {}
    pins: dict[str, str] = {}

    def small_files(drafts: Model) -> Path:
        exact = resolve.resolve(drafts, context.store)
        if resolve.is_hub(drafts):
            pins[drafts.name] = exact.revision
            drafts = drafts.model_copy(update={"revision": exact.revision})
        return resolve.fetch(drafts, context.store, context.scratch, weights=False)

    folder = resolve.fetch(served.model, context.store, context.scratch, weights=False)
    samplings = samplings_of(context.work_of(Prepare), served.where)
    refuse_wrong_engine(folder, resolve.with_drafts(served.engine, small_files), samplings, served.where)
    return pins


def samplings_of(work: Prepare, where: str) -> Sequence[Sampling]:
    """How the student (`spec.student`) or the teacher writes in this run."""
    is_student = where == "spec.student"
    given = zip(work.roles, work.sampling, strict=True)
    own = [sampling for role, sampling in given if (role == "answer") == is_student]
    return [*own, work.evaluation] if is_student and work.evaluation else own


def check_endpoint(work: Prepare, endpoint: Endpoint) -> None:
    """Ask for its models, and for one whole text of each kind that the run asks it for. Raises UserError, also where
    the run would reject such texts, or TransientError."""
    log.info("teacher: %s", openai_trial.probe(endpoint))
    requests = [
        (role, Request(f"trial-{role}", _asked(work, role), sampling))
        for role, sampling in zip(work.roles, work.sampling, strict=True)
        if role != "answer"
    ]
    tried = [_try_role(work, endpoint, role, request) for role, request in requests]
    if tried and not any(trial.completion.tokens for trial in tried):
        log.warning("the endpoint counts no tokens: lengths and costs of the teacher's texts are not known")
    if requests and not any(trial.thinks for trial in tried):
        openai_trial.refuse_hidden_thoughts(endpoint, work.teacher_chat, requests[0][1])
    openai_trial.refuse_other_mode(work.teacher_chat, tried)
    if work.training.thinking == "learn":
        openai_trial.refuse_unseen_thoughts(tried)


def _try_role(work: Prepare, endpoint: Endpoint, role: Role, request: Request) -> openai_trial.Tried:
    """A reply to the request. Raises UserError when the run would reject it, and another one too: a model may fail once
    by chance, and where half of its texts may be rejected it may fail twice."""
    where = f"spec.generation.{settings_of(role)}"
    for _ in range(TRIALS):
        trial = openai_trial.try_request(endpoint, work.teacher_chat, request, where)
        if (found := fault(trial.completion, request.sampling.loop)) is None:
            log.info("teacher: takes the requests of %s, %d tokens", role, trial.completion.tokens)
            return trial
        reason, detail = found
        log.warning("teacher: its reply to a request of %s would be rejected as %s: %s", role, reason, detail)
    if work.max_rejected >= 1 / TRIALS:
        return trial
    raise UserError(
        f"the endpoint {endpoint.url} answers the requests of {role}, but the run would reject its replies as "
        f"{reason}: {detail}",
        hint=HINTS[reason].format(where=where),
    )
