"""Admission of pods: nothing is enforced but by objects that are there, and then in the real plugins' words."""

from __future__ import annotations

from typing import Any

import pytest

PODS = "/api/v1/namespaces/default/pods"
DRY = f"{PODS}?dryRun=All"
SAFE = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}
PROFILES = '"RuntimeDefault" or "Localhost"'


def pod(name: str = "p", *, security: Any = None, **spec: Any) -> dict[str, Any]:
    resources = {"limits": spec.pop("limits", {}), "requests": spec.pop("requests", {})}
    container = {"name": "c", "image": "i", "resources": resources, "securityContext": security or {}}
    return {"metadata": {"name": name}, "spec": {"containers": [container], **spec}}


async def refusal(client: Any, body: dict[str, Any]) -> str:
    """Why a pod is refused, in earnest and as a dry run, without its first words."""
    answers = [await client.post(path, body, code=403) for path in (PODS, DRY)]
    assert answers[0] == answers[1]
    first = f'pods "{body["metadata"]["name"]}" is forbidden: '
    assert answers[0]["message"].startswith(first)
    return str(answers[0]["message"].removeprefix(first))


async def test_a_service_account_must_be_there_unless_it_is_the_default(client: Any) -> None:
    await client.post(PODS, pod(serviceAccountName="default"))
    told = await refusal(client, pod("q", serviceAccountName="trainer"))
    assert told == 'error looking up service account default/trainer: serviceaccount "trainer" not found'
    await client.post("/api/v1/namespaces/default/serviceaccounts", {"metadata": {"name": "trainer"}})
    await client.post(PODS, pod("q", serviceAccountName="trainer"))


async def test_a_priority_class_must_be_there_unless_it_is_the_systems(client: Any) -> None:
    assert await refusal(client, pod(priorityClassName="urgent")) == "no PriorityClass with name urgent was found"
    await client.post(PODS, pod(priorityClassName="system-cluster-critical"))
    await client.post("/apis/scheduling.k8s.io/v1/priorityclasses", {"metadata": {"name": "urgent"}, "value": 1})
    await client.post(PODS, pod("q", priorityClassName="urgent"))


async def quota(client: Any, **hard: str) -> None:
    spec = {"hard": {name.replace("__", ".").replace("_gpu", "nvidia.com/gpu"): most for name, most in hard.items()}}
    await client.post("/api/v1/namespaces/default/resourcequotas", {"metadata": {"name": "q"}, "spec": spec})


async def test_a_quota_of_pods_is_full_until_one_ends(client: Any) -> None:
    await quota(client, pods="1")
    await client.post(PODS, pod())
    assert await refusal(client, pod("two")) == "exceeded quota: q, requested: pods=1, used: pods=1, limited: pods=1"
    await client.patch(f"{PODS}/p/status", {"status": {"phase": "Succeeded"}})
    await client.post(PODS, pod("two"))


async def test_a_quota_of_memory_and_gpus_counts_what_is_asked_for(client: Any) -> None:
    await quota(client, requests__memory="3Gi", requests___gpu="8")
    await client.post(PODS, pod(limits={"memory": "2Gi", "nvidia.com/gpu": "4"}))
    told = await refusal(client, pod("two", limits={"memory": "1Gi", "nvidia.com/gpu": "8"}))
    assert told.startswith("exceeded quota: q, requested: requests.nvidia.com/gpu=8, used: requests.nvidia.com/gpu=4")
    await client.post(PODS, pod("two", limits={"memory": "512Mi", "nvidia.com/gpu": "4"}))


async def test_a_quota_of_cpus_wants_them_named_by_each_container(client: Any) -> None:
    await quota(client, limits__cpu="4", requests__memory="4Gi")
    told = await refusal(client, pod(requests={"memory": "1Gi"}))
    assert told == "failed quota: q: must specify limits.cpu for: c"
    await client.post(PODS, pod(requests={"memory": "1Gi"}, limits={"cpu": "500m"}))


async def test_a_limit_range_refuses_more_than_its_most_and_fills_in_what_is_unsaid(client: Any) -> None:
    limit = {"type": "Container", "max": {"cpu": "1"}, "min": {"memory": "1Gi"}, "default": {"memory": "2Gi"}}
    body = {"metadata": {"name": "small"}, "spec": {"limits": [limit]}}
    await client.post("/api/v1/namespaces/default/limitranges", body)
    told = await refusal(client, pod(limits={"cpu": "1500m"}))
    assert told == "maximum cpu usage per Container is 1, but limit is 1500m"
    both = await refusal(client, pod(limits={"cpu": "2"}, requests={"memory": "1Mi"}))
    assert both.startswith("[maximum cpu usage per Container is 1, but limit is 2, minimum memory usage per Container")
    made = await client.post(PODS, pod())
    assert made["spec"]["containers"][0]["resources"] == {
        "limits": {"cpu": "1", "memory": "2Gi"},
        "requests": {"cpu": "1", "memory": "2Gi"},
    }


async def enforce(client: Any, level: str) -> None:
    labels = {"pod-security.kubernetes.io/enforce": level}
    await client.patch("/api/v1/namespaces/default", {"metadata": {"labels": labels}})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"runAsNonRoot": False},
            'runAsNonRoot != true (pod or container "c" must set securityContext.runAsNonRoot=true)',
        ),
        ({"runAsUser": 0}, 'runAsUser=0 (container "c" must not set runAsUser=0)'),
        (
            {"allowPrivilegeEscalation": None},
            'allowPrivilegeEscalation != false (container "c" must set securityContext.allowPrivilegeEscalation=false)',
        ),
        (
            {"capabilities": {"add": ["SYS_ADMIN"], "drop": ["ALL"]}},
            'non-default capabilities (container "c" must not include "SYS_ADMIN" in securityContext.capabilities.add)',
        ),
        (
            {"seccompProfile": None},
            f'seccompProfile (pod or container "c" must set securityContext.seccompProfile.type to {PROFILES})',
        ),
    ],
)
async def test_a_namespace_that_enforces_restricted_refuses_what_is_not(
    client: Any, change: dict[str, Any], told: str
) -> None:
    await enforce(client, "restricted")
    assert await refusal(client, pod(security=SAFE | change)) == f'violates PodSecurity "restricted:latest": {told}'
    await client.post(PODS, pod(security=SAFE))


async def test_an_injected_init_container_is_judged_with_the_others(client: Any) -> None:
    await enforce(client, "restricted")
    body = pod(security=SAFE, securityContext={"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}})
    body["spec"]["initContainers"] = [{"name": "init-pytorch", "image": "alpine:3.10"}]
    told = await refusal(client, body)
    assert 'allowPrivilegeEscalation != false (container "init-pytorch" must set' in told


async def test_a_namespace_that_enforces_baseline_takes_root_and_no_host(client: Any) -> None:
    await enforce(client, "baseline")
    await client.post(PODS, pod())
    told = await refusal(client, pod("q", hostNetwork=True, security={"privileged": True}))
    assert told.startswith('violates PodSecurity "baseline:latest": host namespaces (hostNetwork=true), privileged (')
