"""The teacher's endpoint, tried before the run asks for a GPU: that it serves the model, takes the run's requests, and
thinks as the run says."""

import logging

from cgd_stages.contract import Endpoint, Prepare
from cgd_stages.engines import openai
from cgd_stages.engines.base import Request
from cgd_stages.method import prompts
from cgd_stages.prepare.tryout import ROW

log = logging.getLogger(__name__)


def check_endpoint(work: Prepare, endpoint: Endpoint) -> None:
    """Ask for its models, and for one whole text of each kind that the run asks it for. Raises UserError or
    TransientError."""
    log.info("teacher: %s", openai.probe(endpoint))
    requests = [
        (role, Request(f"trial-{role}", prompts.role_messages(role, ROW), sampling))
        for role, sampling in zip(work.roles, work.sampling, strict=True)
        if role != "answer"
    ]
    tried = []
    for role, request in requests:
        tried.append(openai.try_request(endpoint, work.teacher_chat, request, f"spec.generation.{role}"))
        log.info("teacher: takes the requests of %s, %d tokens", role, tried[-1].completion.tokens)
    if requests and not any(trial.thinks for trial in tried):
        openai.refuse_hidden_thoughts(endpoint, work.teacher_chat, requests[0][1])
    openai.refuse_other_mode(work.teacher_chat, tried)
    if work.training.thinking == "learn":
        openai.refuse_unseen_thoughts(tried)
