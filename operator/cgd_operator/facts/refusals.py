"""Why a cluster refuses an object, and who must act. Pure: the API server's words in, a verdict out.

Admission has a single code, 403, for a full quota, a quota's demand, a policy, an absent object and a missing right.
Its words differ, and are the same in an answer to the operator and in the Events of a refused controller.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    reason: str
    mend: str
    """Who must act, and what to change."""
    passing: bool = False
    """It may pass by itself."""


POOL = "the stage's pool in spec.placement"

QUOTA_FULL = Refusal(
    "QuotaExceeded",
    "it goes on by itself when enough of the ResourceQuota is free; where the quota is less than one pod asks for, its "
    "owner must raise it",
    passing=True,
)
QUOTA_UNCOUNTED = Refusal(
    "QuotaNotCounted", "the ResourceQuota is new: it goes on by itself when the cluster has counted it", passing=True
)
UNJUDGED = Refusal("NotJudged", "the webhook cannot judge what is only tried", passing=True)
WEBHOOK_DOWN = Refusal(
    "WebhookUnavailable",
    "the cluster's administrator must see to the webhook that is named; then it goes on by itself",
    passing=True,
)
BUSY = Refusal("ServerBusy", "the API server or its store was too slow: it is tried again", passing=True)
NAMESPACE_GOES = Refusal("NamespaceTerminating", "the namespace is being deleted", passing=True)
NO_RIGHT = Refusal(
    "RightMissing",
    "the cluster's administrator must give this user the right; the operator's own come with its chart: upgrade it",
)
POLICY = Refusal(
    "PolicyDenied",
    "change what the policy names (spec.podMetadata, spec.placement, spec.images) in a new run, or have its owner "
    "exempt pods with the label app.kubernetes.io/managed-by: cgd-operator",
)
OTHER = Refusal("Refused", "")

VERDICTS = (
    (r"exceeded quota", QUOTA_FULL),
    (r"status unknown for quota", QUOTA_UNCOUNTED),
    (
        r"failed quota: ",
        Refusal("ResourcesRequired", f"set what the ResourceQuota asks for in resources of {POOL}, in a new run"),
    ),
    (
        r"usage per (Container|Pod) is|limit to request ratio per",
        Refusal("LimitRange", f"change resources of {POOL} in a new run, or have the LimitRange changed"),
    ),
    (
        r"service ?account .*not found",
        Refusal("ServiceAccountMissing", "create the ServiceAccount, or name another in spec.serviceAccountName"),
    ),
    (
        r"no PriorityClass with name",
        Refusal("PriorityClassMissing", f"have it created, or name another in priorityClassName of {POOL}"),
    ),
    (
        r"violates PodSecurity",
        Refusal(
            "PodSecurity",
            "the stage's own container passes `restricted`: find what adds to its pods, or have the label "
            "pod-security.kubernetes.io/enforce of the namespace changed",
        ),
    ),
    (r'User "[^"]*" cannot ', NO_RIGHT),
    (r"does not support dry run", UNJUDGED),
    (r"failed calling webhook", WEBHOOK_DOWN),
    (r"because it is being terminated", NAMESPACE_GOES),
    (r"admission webhook .* denied|ValidatingAdmissionPolicy|security context constraint", POLICY),
    (r"timed out|[Tt]imeout|please apply your changes to the latest version", BUSY),
)


def judge(words: str) -> Refusal:
    return next((verdict for pattern, verdict in VERDICTS if re.search(pattern, words)), OTHER)


def explain(words: str) -> str:
    """The API server's words and what to do, without the generated names of pods, which differ from try to try."""
    words = words.removeprefix("(combined from similar events): ").removeprefix("Error creating: ")
    words = re.sub(r'^job "[^"]*" creation failed with error: ', "", words)
    words = re.sub(r'^[\w.]+ "[^"]*" is forbidden: ', "", words).rstrip(".")
    mend = judge(words).mend
    return f"{words}; {mend}" if mend else words
