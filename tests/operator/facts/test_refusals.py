"""What the API server says when it will not have an object, and who is told to act."""

import pytest

from cgd_operator.facts.refusals import explain, judge

FORBIDDEN = 'pods "demo-answer-0-x7k2p" is forbidden: '


@pytest.mark.parametrize(
    ("words", "reason", "mend"),
    [
        (
            'error looking up service account team/trainer: serviceaccount "trainer" not found',
            "ServiceAccountMissing",
            "create the ServiceAccount, or name another in spec.serviceAccountName",
        ),
        ("no PriorityClass with name urgent was found", "PriorityClassMissing", "have it created"),
        ("failed quota: compute: must specify limits.cpu for: stage", "ResourcesRequired", "resources of the stage's"),
        ("maximum cpu usage per Container is 1, but limit is 2", "LimitRange", "have the LimitRange changed"),
        ('violates PodSecurity "restricted:latest": runAsNonRoot != true', "PodSecurity", "what adds to its pods"),
        ('admission webhook "validate.kyverno.svc-fail" denied the request: no', "PolicyDenied", "the policy names"),
        (
            'admission webhook "pods.example.com" denied the request: containers must specify a seccomp profile',
            "PolicyDenied",
            "the policy names",
        ),
        ("ValidatingAdmissionPolicy 'owners' with binding 'all' denied request: no", "PolicyDenied", "exempt pods"),
    ],
)
def test_what_a_person_must_mend_says_who_and_what(words: str, reason: str, mend: str) -> None:
    verdict = judge(FORBIDDEN + words)
    assert (verdict.reason, verdict.passing) == (reason, False)
    assert explain(FORBIDDEN + words).startswith(f"{words}; ")
    assert mend in explain(FORBIDDEN + words)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (f"{FORBIDDEN}exceeded quota: gpus, requested: pods=1, used: pods=4, limited: pods=4", "QuotaExceeded"),
        (f"{FORBIDDEN}status unknown for quota: gpus, resources: requests.cpu", "QuotaNotCounted"),
        (
            'failed calling webhook "mjob.kb.io": failed to call webhook: Post "https://kueue": connection refused',
            "WebhookUnavailable",
        ),
        (
            'admission webhook "x.example" does not support dry run because the sideEffects field is not set to None',
            "NotJudged",
        ),
        (
            f"{FORBIDDEN}unable to create new content in namespace team because it is being terminated",
            "NamespaceTerminating",
        ),
        ("etcdserver: request timed out", "ServerBusy"),
        ("resource quota evaluation timed out", "ServerBusy"),
        ('Post "https://10.0.0.1/api/v1/namespaces/a/pods": net/http: TLS handshake timeout', "ServerBusy"),
    ],
)
def test_what_may_pass_by_itself_is_no_refusal(words: str, reason: str) -> None:
    assert (judge(words).reason, judge(words).passing) == (reason, True)


def test_a_missing_right_is_not_taken_for_a_policy() -> None:
    words = 'pods is forbidden: User "system:serviceaccount:cgd:cgd" cannot create resource "pods" in API group ""'
    assert judge(words).reason == "RightMissing"
    assert "upgrade it" in explain(words)


def test_the_same_refusal_of_the_next_try_has_the_same_words() -> None:
    cause = "exceeded quota: gpus, requested: pods=1, used: pods=4, limited: pods=4"
    tries = [f'Error creating: pods "demo-answer-0-{name}" is forbidden: {cause}' for name in ("x7k2p", "q4m8z")]
    combined = f"(combined from similar events): {tries[0]}"
    job = f'job "demo-node-0" creation failed with error: jobs.batch "demo-node-0" is forbidden: {cause}'
    assert len({explain(one) for one in (*tries, combined, job)}) == 1


def test_what_nobody_foresaw_is_told_as_it_is() -> None:
    assert judge("Job.batch is invalid: spec").reason == "Refused"
    assert explain("Job.batch is invalid: spec") == "Job.batch is invalid: spec"
