"""Is there anything to do for a run? One answer for events, sweeps and looks."""

from datetime import UTC, datetime
from typing import Any

import pytest
from support.builders import CHILDREN, Object, job, pod
from support.status_builders import NOW, finished, render_of, shown

from cgd_operator.api.status import CGDRunStatus
from cgd_operator.facts.due import Due, Outlook, due, has_untold_end
from cgd_operator.facts.progress import StageProgress
from cgd_operator.planning.manifests import FINALIZER
from cgd_operator.status.render import refused
from cgd_stages.contract import Rows

LATER = datetime(2027, 1, 1, tzinfo=UTC)
GOING = render_of(*finished("prepare"), job("answer"), pods=(pod("answer"),))
SUCCEEDED = render_of(*finished(*CHILDREN))
FAILED = render_of(job("prepare", "Failed"))
REFUSED = refused(1, "spec.typo: there is no such field", CGDRunStatus(), NOW)
UNREADABLE: Object = {"stages": "of another kind", "conditions": [{"type": "Succeeded", "status": "True"}]}


def run(status: CGDRunStatus | Object | None = None, generation: int = 1, **spec: Any) -> Object:
    """A run without our finalizer that has this status."""
    body = shown(CGDRunStatus(), generation)
    if status is None:
        del body["status"]
    else:
        body["status"] = status if isinstance(status, dict) else shown(status)["status"]
    body["spec"] |= spec
    return body


def finalized(body: Object, *finalizers: str, deleted: bool = False) -> Object:
    body["metadata"] |= {"finalizers": list(finalizers)} | (
        {"deletionTimestamp": "2026-01-01T00:10:00Z"} if deleted else {}
    )
    return body


DELETE = {"deletionPolicy": "Delete"}
TTL = {"ttlSecondsAfterFinished": 3600}


@pytest.mark.parametrize(
    ("manifest", "answer"),
    [
        # nobody has looked at it, or at its last change
        (run(), Due.TELLING),
        (run(CGDRunStatus()), Due.TELLING),
        (run(GOING, generation=2), Due.TELLING),
        (run(FAILED, generation=2), Due.TELLING),
        (run(REFUSED, generation=2), Due.TELLING),
        (run(SUCCEEDED, generation=2), Due.TELLING),
        # all of it is known
        (run(GOING), Due.CHILDREN),
        (run(FAILED), Due.CHILDREN),  # somebody may have deleted the Job, so that it is tried again
        (run(REFUSED), Due.CHILDREN),  # this version of the operator may accept it
        (run(SUCCEEDED), Due.NOTHING),
        (run(UNREADABLE, generation=7), Due.NOTHING),
        (run(UNREADABLE, generation=7, **TTL), Due.NOTHING),
        # its finalizer
        (run(GOING, **DELETE), Due.TELLING),
        (run(SUCCEEDED, **DELETE), Due.TELLING),
        (run(REFUSED, **DELETE), Due.TELLING),
        (finalized(run(GOING, **DELETE), FINALIZER), Due.CHILDREN),
        (finalized(run(SUCCEEDED, **DELETE), FINALIZER, "example.org/other"), Due.NOTHING),
        (finalized(run(SUCCEEDED), FINALIZER), Due.TELLING),
        (finalized(run(SUCCEEDED), "example.org/other"), Due.NOTHING),
        # its deletion
        (finalized(run(GOING, **DELETE), FINALIZER, deleted=True), Due.ACTING),
        (finalized(run(SUCCEEDED, **DELETE), FINALIZER, deleted=True), Due.ACTING),
        (finalized(run(GOING, generation=2), "example.org/other", deleted=True), Due.NOTHING),
        (finalized(run(GOING, **DELETE), "example.org/other", deleted=True), Due.NOTHING),
    ],
)
def test_what_a_run_needs_before_its_children_are_read(manifest: Object, answer: Due) -> None:
    assert due(manifest, NOW) is answer


@pytest.mark.parametrize(("now", "answer"), [(NOW, Due.NOTHING), (LATER, Due.TELLING)])
def test_a_run_that_has_succeeded_is_deleted_when_its_time_is_over(now: datetime, answer: Due) -> None:
    assert due(run(SUCCEEDED, **TTL), now) is answer


FURTHER = render_of(
    *finished("prepare"),
    job("answer"),
    pods=(pod("answer"),),
    progress={"answer": StageProgress(Rows(total=48, done=30, rejected=2), 66, 812, 130)},
)
LONGER = render_of(*finished("prepare"), job("answer"), pods=(pod("answer"),), previous=GOING, now=LATER)


@pytest.mark.parametrize(
    ("manifest", "outlook", "answer"),
    [
        (run(GOING), Outlook(acts=False, status=GOING), Due.NOTHING),
        (run(GOING), Outlook(acts=True, status=GOING), Due.ACTING),
        (run(), Outlook(acts=True, status=GOING), Due.ACTING),
        (run(), Outlook(acts=False, status=GOING), Due.TELLING),
        (run(GOING), Outlook(acts=False, status=FAILED), Due.TELLING),
        (run(GOING), Outlook(acts=False, status=FURTHER), Due.NOTHING),  # its reports have that written
        (run(GOING), Outlook(acts=False, status=LONGER), Due.NOTHING),  # GPU time grows by itself
        (run(GOING, **DELETE), Outlook(acts=False, status=GOING), Due.TELLING),
        (run(GOING, **DELETE), Outlook(acts=True, status=GOING), Due.ACTING),
        (run(REFUSED), Outlook(acts=False, status=REFUSED), Due.NOTHING),
        (run(GOING), Outlook(acts=False, status=REFUSED), Due.TELLING),
        (run(FAILED), Outlook(acts=False, status=FAILED), Due.NOTHING),
        (run(FAILED, **TTL), Outlook(acts=False, status=FAILED), Due.NOTHING),
        (run(SUCCEEDED), Outlook(acts=True, status=GOING), Due.NOTHING),  # somebody has cleaned up its Jobs
        (finalized(run(GOING), deleted=True), Outlook(acts=True, status=GOING), Due.NOTHING),
    ],
)
def test_what_a_run_needs_by_what_its_children_say(manifest: Object, outlook: Outlook, answer: Due) -> None:
    assert due(manifest, NOW, outlook) is answer


def test_a_run_that_has_failed_is_deleted_when_its_time_is_over() -> None:
    assert due(run(FAILED, **TTL), LATER, Outlook(acts=False, status=FAILED)) is Due.TELLING


HALF = render_of(*finished("prepare", "answer"), job("teacher"), pods=(pod("teacher"),))
HALF_TOLD = HALF.model_copy(
    update={
        "stages": tuple(
            one.model_copy(update={"state": "Succeeded"}) if one.name == "critique" else one for one in HALF.stages
        )
    }
)


@pytest.mark.parametrize(
    ("status", "children", "untold"),
    [
        (GOING, (*finished("prepare"), job("answer")), False),
        (GOING, (*finished("prepare"), job("answer", "Complete")), True),
        (GOING, (*finished("prepare"), job("answer", "Failed")), True),
        (FAILED, (job("prepare", "Failed"),), False),
        (GOING, (job("answer"),), False),  # a Job that was cleaned up
        (HALF_TOLD, (*finished("prepare", "answer"), job("teacher")), False),
        (HALF_TOLD, (*finished("prepare", "answer"), job("teacher", "Complete")), True),  # refine is not told
        (None, (job("prepare", "Complete"),), True),
        (None, (job("prepare"),), False),
        ({"stages": "of another kind"}, (job("prepare", "Complete"),), True),
    ],
)
def test_whether_a_child_has_ended_of_which_the_status_says_nothing(
    status: CGDRunStatus | Object | None, children: tuple[Object, ...], untold: bool
) -> None:
    assert has_untold_end(run(status), children) is untold


def marked(body: Object) -> Object:
    """As Argo CD marks what it applies."""
    body["metadata"]["annotations"] = {"argocd.argoproj.io/tracking-id": "runs:cgd.dev/CGDRun:default/demo"}
    return body


def test_a_run_that_would_be_made_again_is_done_with_once() -> None:
    assert due(marked(run(SUCCEEDED, **TTL)), NOW) is Due.NOTHING
    assert due(marked(run(SUCCEEDED, **TTL)), LATER) is Due.TELLING
    settled = SUCCEEDED.model_copy(update={"children_deleted": True})
    assert due(marked(run(settled, **TTL)), LATER) is Due.NOTHING
    assert due(run(settled, **TTL), LATER) is Due.TELLING, "nobody keeps it any more"


def test_a_failed_run_that_would_be_made_again_keeps_its_children() -> None:
    assert due(marked(run(FAILED, **TTL)), LATER, Outlook(acts=False, status=FAILED)) is Due.NOTHING
