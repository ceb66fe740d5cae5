"""The teacher's endpoint, tried before the run asks for a GPU: that it serves the model, takes the run's requests, and
thinks as the run says."""

import logging

from cgd_stages.contract import Endpoint, Prepare
from cgd_stages.engines import openai
from cgd_stages.engines.base import Request
from cgd_stages.method import prompts

log = logging.getLogger(__name__)

EXAMPLE = {
    "prompt": "What is 17 times 23?",
    "answer": "17 times 23 is 17 times 20 and 17 times 3, which is 340 + 41 = 381.",
    "critique": "17 times 3 is 51, not 41. Conclusion: wrong",
}


def check_endpoint(work: Prepare, endpoint: Endpoint) -> None:
    """Ask for its models, and for one whole text of each kind that the run asks it for. Raises UserError or
    TransientError."""
    log.info("teacher: %s", openai.probe(endpoint))
    tried = []
    for role, sampling in zip(work.roles, work.sampling, strict=True):
        if role != "answer":
            request = Request(f"trial-{role}", prompts.role_messages(role, EXAMPLE), sampling)
            tried.append(openai.try_request(endpoint, work.teacher_chat, request, f"spec.generation.{role}"))
            log.info("teacher: takes the requests of %s, %d tokens", role, tried[-1].completion.tokens)
    openai.refuse_other_mode(work.teacher_chat, tried)
