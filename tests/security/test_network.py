"""Whom pods of runs and the operator can reach, by the chart's NetworkPolicies, and how much disk such a pod fills.

No network enforces the policies here: they are rendered by Helm's engine and read by the rules of their API.
"""

import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml
from support.builders import run

from cgd_local.selection import chooses
from cgd_operator import process
from cgd_operator.planning.dag import BACKENDS, plan
from cgd_operator.planning.manifests import KINDS, Release, cleaning_job, manifest, training_runtime

CHART = Path(__file__).parents[2] / "charts/cgd-operator"
Json = dict[str, Any]
STAGES = {"enabled": True}
METADATA = {
    "AWS, Google, Azure, Oracle": "169.254.169.254",
    "tasks of ECS": "169.254.170.2",
    "EKS Pod Identity": "169.254.170.23",
    "Workload Identity of GKE": "169.254.169.252",
    "Alibaba": "100.100.100.200",
    "Azure's wire server": "168.63.129.16",
    "AWS over IPv6": "fd00:ec2::254",
    "EKS Pod Identity over IPv6": "fd00:ec2::23",
    "Google over IPv6": "fd20:ce::254",
    "link-local IPv6": "fe80::a9fe:a9fe",
}


def rendered(
    namespaces: tuple[str, ...] = (), *, stages: Json | None = None, operators: bool = True, **values: Any
) -> list[Json]:
    image = {"repository": "registry.example.com/image"}
    given = {"image": image, "stageImages": {"generate": image, "train": image}, "watchNamespaces": list(namespaces)}
    given |= values | {"networkPolicy": {"enabled": operators, "stages": stages or {}}}
    texts = helm_python.Chart.load(CHART).render(given, name="cgd", namespace="cgd-system")
    return [one for path, text in texts.items() if path.endswith(".yaml") for one in yaml.safe_load_all(text) if one]


def policy(name: str, *arguments: Any, namespace: str = "team-a", **values: Any) -> Json:
    """The operator's NetworkPolicy, or that of the stage pods of a namespace."""
    where = "cgd-system" if name == "cgd-operator" else namespace
    (found,) = (
        one
        for one in rendered(*arguments, **values)
        if one["kind"] == "NetworkPolicy" and (one["metadata"]["name"], one["metadata"]["namespace"]) == (name, where)
    )
    kubernetes_validate.validate(found, "1.34", strict=True)
    return dict(found["spec"])


def stages(**values: Any) -> Json:
    return policy("cgd-operator-stages", ("team-a", "team-b"), stages=STAGES | values)


def reaches(spec: Json, address: str, port: int) -> bool:
    """Whether a pod under this policy can open a TCP connection to an address outside the cluster."""
    return any(
        _port(rule, port) and ("to" not in rule or any(_block(peer, address) for peer in rule["to"]))
        for rule in spec["egress"]
    )


def _port(rule: Json, port: int | str) -> bool:
    return not rule.get("ports") or any(
        one["port"] == port and one.get("protocol", "TCP") == "TCP" for one in rule["ports"]
    )


def _block(peer: Json, address: str) -> bool:
    block, where = peer.get("ipBlock"), ipaddress.ip_address(address)
    return bool(block) and (
        where in ipaddress.ip_network(block["cidr"])
        and not any(where in ipaddress.ip_network(one) for one in block.get("except", []))
    )


def selects(peers: list[Json], namespace: str, labels: Json, *, own: str) -> bool:
    """Whether one of the peers is a pod with such labels in this namespace; `own` is the policy's."""
    space = {"kubernetes.io/metadata.name": namespace}
    return any(
        chooses(peer["podSelector"], labels)
        and (chooses(peer["namespaceSelector"], space) if "namespaceSelector" in peer else namespace == own)
        for peer in peers
        if "podSelector" in peer
    )


@pytest.fixture(scope="module", params=[[], [80, 443, 988]], ids=["all ports", "some ports"])
def held(request: pytest.FixtureRequest) -> Json:
    """The policy of stage pods."""
    return stages(ports=request.param)


@pytest.mark.parametrize("address", METADATA.values(), ids=METADATA.keys())
@pytest.mark.parametrize("port", [80, 443, 988])
def test_a_stage_pod_does_not_reach_where_clouds_hand_out_a_nodes_credentials(
    held: Json, address: str, port: int
) -> None:
    assert not reaches(held, address, port)


@pytest.mark.parametrize("address", ["8.8.8.8", "10.0.0.7", "2001:db8::1"])
def test_a_stage_pod_reaches_names_the_store_and_the_hub(held: Json, address: str) -> None:
    assert reaches(held, address, 443)
    assert reaches(held, address, 53)


def test_egress_is_what_the_values_say() -> None:
    own = stages(egress=[{"ipBlock": {"cidr": "10.0.0.0/24"}}], ports=[9000])
    assert reaches(own, "10.0.0.7", 9000)
    assert not reaches(own, "10.0.0.7", 443)
    assert not reaches(own, "10.0.1.7", 9000)
    assert not reaches(stages(egress=[]), "10.0.0.7", 443)


def test_excepted_addresses_lie_in_their_block() -> None:
    """The API server refuses a policy where they do not."""
    for rule in stages()["egress"]:
        for block in (peer["ipBlock"] for peer in rule.get("to", []) if "ipBlock" in peer):
            for one in block["except"]:
                assert ipaddress.ip_network(one).subnet_of(ipaddress.ip_network(block["cidr"]))  # type: ignore[arg-type]


def templates(release: Release) -> Iterator[Json]:
    """Of every pod that a run can have."""
    one = run({"deletionPolicy": "Delete"})
    for backend in BACKENDS:
        for child in plan(one, backend):
            yield from _templates(
                training_runtime(one, child, release) if child.kind == "TrainJob" else manifest(one, child, release)
            )
            if child.kind == "Job":
                yield from _templates(cleaning_job(one, child, release))


def _templates(node: Any) -> Iterator[Json]:
    if isinstance(node, dict) and "containers" in node.get("spec", {}):
        yield node
    elif isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _templates(value)


def labels_of_pods() -> list[Json]:
    return [one["metadata"]["labels"] for one in templates(Release("generate", "train"))]


def test_every_pod_of_a_run_is_held_and_meets_its_own_kind_in_its_namespace_alone() -> None:
    spec, found = stages(), labels_of_pods()
    assert len(found) > 2 * len(KINDS)
    for labels in found:
        assert chooses(spec["podSelector"], labels)
        peers = [peer for rule in spec["ingress"] for peer in rule["from"]]
        assert selects(peers, "team-a", labels, own="team-a")
        assert not selects(peers, "team-b", labels, own="team-a")
    assert not selects(peers, "team-a", {"app": "other"}, own="team-a")


def test_progress_passes_both_policies() -> None:
    objects = rendered(("team-a", "team-b"), stages=STAGES, progress={"port": 9000})
    (deployment,) = (one["spec"]["template"] for one in objects if one["kind"] == "Deployment")
    (named,) = (one for one in deployment["spec"]["containers"][0]["ports"] if one["name"] == "progress")
    spec = policy("cgd-operator-stages", ("team-a", "team-b"), stages=STAGES, progress={"port": 9000})
    operator, labels = deployment["metadata"]["labels"], labels_of_pods()[0]
    (out,) = (rule for rule in spec["egress"] if selects(rule.get("to", []), "cgd-system", operator, own="team-a"))
    assert _port(out, named["containerPort"])
    assert not selects(out["to"], "team-b", operator, own="team-a")
    (into,) = (rule for rule in policy("cgd-operator", ("team-a", "team-b"))["ingress"] if "from" in rule)
    assert _port(into, "progress")
    assert selects(into["from"], "team-b", labels, own="cgd-system")


def test_a_label_opens_the_operators_port_only_where_runs_are_looked_after() -> None:
    label = {"app.kubernetes.io/managed-by": "cgd-operator"}

    def opens(namespaces: tuple[str, ...], namespace: str) -> bool:
        rules = policy("cgd-operator", namespaces)["ingress"]
        return any(selects(rule.get("from", []), namespace, label, own="cgd-system") for rule in rules)

    assert opens(("team-a",), "team-a")
    assert not opens(("team-a",), "shop")
    assert opens((), "shop")  # all namespaces are looked after


def test_each_namespace_gets_its_policy_and_none_unless_it_is_asked_for() -> None:
    def named(objects: list[Json]) -> list[str]:
        return [one["metadata"]["namespace"] for one in objects if one["metadata"]["name"] == "cgd-operator-stages"]

    assert named(rendered(("team-a", "team-b"), stages=STAGES)) == ["team-a", "team-b"]
    assert named(rendered(("team-a", "team-b"))) == []


def test_the_policy_of_a_namespace_can_be_made_alone() -> None:
    """As docs/runbook.md says, where all namespaces are looked after."""
    objects = rendered(("team-a",), stages=STAGES, operators=False)
    (found,) = (one["metadata"] for one in objects if one["kind"] == "NetworkPolicy")
    assert (found["namespace"], found["name"]) == ("team-a", "cgd-operator-stages")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"stages": STAGES}, "networkPolicy.stages.enabled needs watchNamespaces"),
        ({"stages": {"ports": [0]}}, "ports"),
        ({"stages": {"egress": [{}]}}, "egress"),
        ({"stages": {"egress": [{"cidr": "10.0.0.0/8"}]}}, r"egress\[0\]: .* is no peer: write {ipBlock: "),
        (
            {"stages": {"egress": [{"to": [], "ports": []}]}},
            r"egress\[0\]: .*; ports go into networkPolicy.stages.ports",
        ),
        ({"stages": {"egress": [{"ipBlock": {"cidr": "::/0"}, "podSelector": {}}]}}, r"egress\[0\]: .* is no peer"),
        ({"stages": {"egress": [{"podSelector": {"app": "s3"}}]}}, "egress/0/podSelector': .*'app' not allowed"),
        ({"stages": {"egress": [{"ipBlock": {"except": []}}]}}, "egress/0/ipBlock': missing property 'cidr'"),
        *(
            ({"stages": {"egress": [{"ipBlock": block}]}}, r"egress\[0\]: '.*' is no range of addresses: .*10.0.0.0/8")
            for block in (
                *({"cidr": one} for one in ("10.0.0.0", "10.0.0/8", "10.0.0.0/33", "::", "::/129", "s3.example.com")),
                {"cidr": "10.0.0.0/8", "except": ["10.0.0.1"]},
            )
        ),
        ({"scratch": {"sizeLimit": "2TB"}}, "scratch.sizeLimit: '2TB' is no size: .* such as 2Ti"),
        ({"scratch": {"sizeLimit": "0"}}, "sizeLimit"),
    ],
)
def test_wrong_values_are_refused_by_name(values: Json, told: str) -> None:
    with pytest.raises(helm_python.HelmError, match=told):
        rendered(**values)


# --- disk


@pytest.mark.parametrize("limit", ["2Ti", "500G", ""])
def test_each_stage_pod_has_the_size_limit_of_the_values(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (deployment,) = (one for one in rendered(scratch={"sizeLimit": limit}) if one["kind"] == "Deployment")
    for one in deployment["spec"]["template"]["spec"]["containers"][0]["env"]:
        if one["name"].startswith("CGD_SCRATCH"):
            monkeypatch.setenv(one["name"], one["value"])
    for template in templates(process._release("")):
        volumes = {one["name"]: one["emptyDir"] for one in template["spec"]["volumes"] if "emptyDir" in one}
        assert [volumes[name].get("sizeLimit", "") for name in ("scratch", "tmp")] == [limit, limit]
