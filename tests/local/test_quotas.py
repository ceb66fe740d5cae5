"""ResourceQuotas: which objects they are for, what they count, and what they say."""

from __future__ import annotations

from typing import Any

import pytest

CORE, BATCH = "/api/v1/namespaces/default", "/apis/batch/v1/namespaces/default"
PODS, JOBS = f"{CORE}/pods", f"{BATCH}/jobs"
SOME = {"requests": {"cpu": "1"}}


def pod(name: str = "p", resources: Any = None, **spec: Any) -> dict[str, Any]:
    container = {"name": "c", "image": "i", "resources": resources or {}}
    return {"metadata": {"name": name}, "spec": {"containers": [container], **spec}}


async def quota(client: Any, hard: dict[str, str], *scopes: str, name: str = "q", **selector: Any) -> None:
    spec: dict[str, Any] = {"hard": hard, "scopes": list(scopes)}
    if selector:
        spec["scopeSelector"] = {"matchExpressions": [{"scopeName": "PriorityClass", **selector}]}
    await client.post(f"{CORE}/resourcequotas", {"metadata": {"name": name}, "spec": spec})


async def refusal(client: Any, path: str, body: dict[str, Any]) -> str:
    """Why it is refused, in earnest and as a dry run."""
    answers = [await client.post(path + query, body, code=403) for query in ("", "?dryRun=All")]
    assert answers[0] == answers[1]
    return str(answers[0]["message"])


@pytest.mark.parametrize(
    ("scope", "others", "its_own"),
    [
        ("BestEffort", pod("other", SOME), pod("own")),
        ("NotBestEffort", pod("other"), pod("own", {"limits": {"memory": "1Gi"}})),
        ("NotBestEffort", pod("other", {"limits": {"nvidia.com/gpu": "1"}}), pod("own", SOME)),
        ("Terminating", pod("other"), pod("own", activeDeadlineSeconds=60)),
        ("NotTerminating", pod("other", activeDeadlineSeconds=60), pod("own")),
    ],
)
async def test_a_quota_with_a_scope_is_for_its_own_pods_alone(
    client: Any, scope: str, others: dict[str, Any], its_own: dict[str, Any]
) -> None:
    await quota(client, {"pods": "0"}, scope)
    await client.post(PODS, others)
    told = await refusal(client, PODS, its_own)
    assert told == 'pods "own" is forbidden: exceeded quota: q, requested: pods=1, used: pods=0, limited: pods=0'


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ({"operator": "In", "values": ["high"]}, {"high"}),
        ({"operator": "NotIn", "values": ["high"]}, {"low", ""}),
        ({"operator": "Exists"}, {"high", "low"}),
        ({"operator": "DoesNotExist"}, {""}),
    ],
    ids=lambda each: each["operator"] if isinstance(each, dict) else "",
)
async def test_a_quota_may_be_for_priority_classes(client: Any, selector: dict[str, Any], names: set[str]) -> None:
    for name in ("high", "low"):
        await client.post("/apis/scheduling.k8s.io/v1/priorityclasses", {"metadata": {"name": name}, "value": 1})
    await quota(client, {"pods": "0"}, **selector)
    for name in ("high", "low", ""):
        body = pod(f"p{name}", **({"priorityClassName": name} if name else {}))
        await client.post(PODS, body, code=403 if name in names else 201)


async def test_all_scopes_of_a_quota_must_match_and_only_matching_pods_are_counted(client: Any) -> None:
    await quota(client, {"pods": "1", "requests.cpu": "2"}, "NotBestEffort", "NotTerminating")
    await client.post(PODS, pod("a", SOME, activeDeadlineSeconds=60))
    await client.post(PODS, pod("b"))
    await client.post(PODS, pod("c", SOME))
    told = await refusal(client, PODS, pod("d", SOME))
    assert told.endswith("exceeded quota: q, requested: pods=1, used: pods=1, limited: pods=1")


async def test_what_a_quota_demands_it_demands_of_its_own_pods_alone(client: Any) -> None:
    hard = {"limits.cpu": "4", "requests.memory": "4Gi"}
    await quota(client, hard, operator="In", values=["high"])
    await client.post("/apis/scheduling.k8s.io/v1/priorityclasses", {"metadata": {"name": "high"}, "value": 1})
    await client.post(PODS, pod())
    body = pod("q", SOME, priorityClassName="high", initContainers=[{"name": "a", "image": "i"}])
    told = await refusal(client, PODS, body)
    assert told.endswith("failed quota: q: must specify limits.cpu for: a,c; requests.memory for: a,c")


async def test_objects_of_every_kind_are_counted(client: Any, make: Any) -> None:
    await quota(client, {"count/jobs.batch": "1", "secrets": "1", "count/pods": "1", "services": "0"})
    await client.post(JOBS, make.job("a"))
    full = "exceeded quota: q, requested: count/jobs.batch=1, used: count/jobs.batch=1, limited: count/jobs.batch=1"
    assert await refusal(client, JOBS, make.job("b")) == f'jobs.batch "b" is forbidden: {full}'
    assert await refusal(client, JOBS, make.job("a")) == f'jobs.batch "a" is forbidden: {full}', (
        "before it is looked up"
    )
    await client.post(f"{CORE}/secrets", {"metadata": {"name": "s"}})
    assert "requested: secrets=1" in await refusal(client, f"{CORE}/secrets", {"metadata": {"name": "t"}})
    service = {"metadata": {"name": "s"}, "spec": {"clusterIP": "None"}}
    assert "requested: services=1" in await refusal(client, f"{CORE}/services", service)
    await client.delete(f"{JOBS}/a?propagationPolicy=Background")
    await client.post(JOBS, make.job("b"))


async def test_objects_of_a_definition_are_counted_too(widgets: Any, make: Any) -> None:
    await quota(widgets, {"count/widgets.demo.example.com": "1"})
    path = "/apis/demo.example.com/v1/namespaces/default/widgets"
    await widgets.post(path, make.widget("a"))
    assert "used: count/widgets.demo.example.com=1" in await refusal(widgets, path, make.widget("b"))


async def test_a_quota_with_scopes_counts_no_other_kinds(client: Any, make: Any) -> None:
    await quota(client, {"count/jobs.batch": "0"}, "NotTerminating")
    await client.post(JOBS, make.job())


async def test_a_pod_that_is_over_counts_as_an_object_and_nothing_more(client: Any) -> None:
    await quota(client, {"pods": "1", "requests.cpu": "1", "count/pods": "2"})
    await client.post(PODS, pod("a", SOME))
    await client.patch(f"{PODS}/a/status", {"status": {"phase": "Failed"}})
    await client.post(PODS, pod("b", SOME))
    await client.patch(f"{PODS}/b/status", {"status": {"phase": "Succeeded"}})
    told = await refusal(client, PODS, pod("c", SOME))
    assert told.endswith("exceeded quota: q, requested: count/pods=1, used: count/pods=2, limited: count/pods=2")


async def test_a_pod_asks_for_what_its_containers_and_sidecars_need_together(client: Any) -> None:
    init = [
        {"name": "a", "image": "i", "restartPolicy": "Always", "resources": {"requests": {"cpu": "500m"}}},
        {"name": "b", "image": "i", "resources": {"requests": {"cpu": "2"}}},
    ]
    await quota(client, {"requests.cpu": "2"})
    told = await refusal(client, PODS, pod("p", SOME, initContainers=init))
    assert told.endswith(
        "exceeded quota: q, requested: requests.cpu=2500m, used: requests.cpu=0, limited: requests.cpu=2"
    )


async def test_amounts_are_told_in_the_largest_unit_that_leaves_a_whole_number(client: Any) -> None:
    await quota(client, {"requests.memory": "3Gi"})
    await client.post(PODS, pod("a", {"requests": {"memory": "1536Mi"}}))
    told = await refusal(client, PODS, pod("b", {"requests": {"memory": "2048Mi"}}))
    asked = "requested: requests.memory=2Gi, used: requests.memory=1536Mi, limited: requests.memory=3Gi"
    assert told.endswith(f"exceeded quota: q, {asked}")
