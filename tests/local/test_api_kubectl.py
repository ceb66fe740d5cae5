"""The real kubectl against the server: what people type."""

import asyncio
import json

import pytest
import yaml

WIDGETS = "/apis/demo.example.com/v1/namespaces/default/widgets"
W = WIDGETS + "/w"


async def test_apply_creates_leaves_alone_and_configures(widgets, make, kubectl):
    assert "w created" in await kubectl("apply", "-f", "-", stdin=make.widget())
    assert "w unchanged" in await kubectl("apply", "-f", "-", stdin=make.widget())
    assert "w configured" in await kubectl("apply", "-f", "-", stdin=make.widget(size=9))
    assert (await widgets.get(W))["spec"]["size"] == 9


async def test_apply_removes_what_left_the_file(widgets, make, kubectl):
    await kubectl("apply", "-f", "-", stdin=make.widget(note="x"))
    await kubectl("apply", "-f", "-", stdin=make.widget())
    assert "note" not in (await widgets.get(W))["spec"]


async def test_a_definition_and_its_first_object_can_be_applied_after_each_other(kubectl, make):
    await kubectl("apply", "-f", "-", stdin=make.crd())
    await kubectl("wait", "--for=condition=Established", "crd/widgets.demo.example.com", "--timeout=150s")
    await kubectl("apply", "-f", "-", stdin=make.widget())


async def test_a_typo_is_refused_by_name(widgets, make, kubectl):
    said = await kubectl("apply", "-f", "-", stdin=make.widget(foo=1), fails=True)
    assert 'strict decoding error: unknown field "spec.foo"' in said


async def test_every_invalid_field_is_listed(widgets, make, kubectl):
    said = await kubectl("apply", "-f", "-", stdin=make.widget(size=0, color="blue"), fails=True)
    assert 'The Widget "w" is invalid:' in said
    assert '* spec.color: Unsupported value: "blue": supported values: "red", "green"' in said
    assert "* spec.size: Invalid value: 0:" in said


async def test_server_side_apply_reports_conflicts_and_can_force(widgets, make, kubectl):
    await widgets.apply(W, make.widget(), "someone")
    said = await kubectl("apply", "--server-side", "-f", "-", stdin=make.widget(size=9), fails=True)
    assert 'Apply failed with 1 conflict: conflict with "someone": .spec.size' in said
    await kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=make.widget(size=9))
    assert (await widgets.get(W))["spec"]["size"] == 9


async def test_moving_from_client_side_to_server_side_apply_leaves_one_owner(widgets, make, kubectl):
    await kubectl("apply", "-f", "-", stdin=make.widget(note="x"))
    await kubectl("apply", "--server-side", "-f", "-", stdin=make.widget())
    live = await widgets.get(W)
    assert "note" not in live["spec"]
    owners = [(e["manager"], "f:size" in e["fieldsV1"].get("f:spec", {})) for e in live["metadata"]["managedFields"]]
    assert ("kubectl", True) in owners
    assert "kubectl-client-side-apply" not in dict(owners)


async def test_get_prints_the_definitions_columns(widgets, make, kubectl):
    await widgets.post(WIDGETS, make.widget(model="abc"))
    ready = {"status": {"conditions": [{"type": "Other", "status": "False"}, {"type": "Ready", "status": "True"}]}}
    await widgets.patch(W + "/status", ready)
    head, row = (await kubectl("get", "wd")).splitlines()
    assert head.split() == ["NAME", "SIZE", "READY", "AGE"]
    assert row.split()[:3] == ["w", "3", "True"]
    assert "abc" in await kubectl("get", "wd", "w", "-o", "wide")


async def test_get_prints_yaml_json_paths_and_names(widgets, make, kubectl):
    await widgets.post(WIDGETS, make.widget())
    assert yaml.safe_load(await kubectl("get", "wd", "w", "-o", "yaml"))["spec"]["size"] == 3
    assert json.loads(await kubectl("get", "wd", "-o", "json"))["items"][0]["kind"] == "Widget"
    assert await kubectl("get", "wd", "-o", "jsonpath={.items[*].spec.color}") == "red"
    assert await kubectl("get", "widgets.demo.example.com", "-o", "name") == "widget.demo.example.com/w\n"


async def test_get_watch_prints_a_row_per_change_and_one_head(widgets, make, kubectl, watched):
    await widgets.post(WIDGETS, make.widget())
    watching = asyncio.create_task(kubectl("get", "wd", "-w", lines=3))
    await watched()
    await widgets.patch(W, {"spec": {"size": 77}})
    rows = [line.split()[:2] for line in (await watching).splitlines()]
    assert rows == [["NAME", "SIZE"], ["w", "3"], ["w", "77"]]


async def test_get_all_includes_widgets_of_the_category(widgets, make, kubectl):
    await widgets.post(WIDGETS, make.widget())
    await widgets.post("/apis/batch/v1/namespaces/default/jobs", make.job())
    said = await kubectl("get", "all")
    assert "widget.demo.example.com/w" in said
    assert "job.batch/j" in said


async def test_get_by_selector_and_in_all_namespaces(widgets, make, kubectl):
    await widgets.post(WIDGETS, make.widget())
    await kubectl("label", "wd", "w", "on=yes")
    assert "w " in await kubectl("get", "wd", "-A", "-l", "on in (yes)")
    assert "No resources found" in await kubectl("get", "wd", "-l", "on!=yes")


async def test_explain_tells_types_and_descriptions(widgets, kubectl):
    assert "How big." in await kubectl("explain", "widget.spec.size")
    said = await kubectl("explain", "wd", "--recursive")
    assert "max-steps\t<integer>" in said
    assert "conditions\t<[]Object>" in said
    assert "restartPolicy" in await kubectl("explain", "job.spec.template.spec")


async def test_api_resources_lists_short_names(widgets, kubectl):
    rows = [line.split() for line in (await kubectl("api-resources")).splitlines()]
    assert ["widgets", "wd", "demo.example.com/v1", "true", "Widget"] in rows
    assert ["pods", "po", "v1", "true", "Pod"] in rows


async def test_describe_shows_the_object_and_its_events(widgets, make, kubectl):
    made = await widgets.post(WIDGETS, make.widget())
    about = {"kind": "Widget", "name": "w", "namespace": "default", "uid": made["metadata"]["uid"]}
    event = {
        "metadata": {"name": "e"},
        "involvedObject": about,
        "reason": "Painted",
        "message": "red",
        "type": "Normal",
    }
    await widgets.post("/api/v1/namespaces/default/events", event)
    said = await kubectl("describe", "wd", "w")
    assert "Size:   3" in said
    assert "Painted" in said
    assert "Painted" in await kubectl("get", "events")


async def test_describe_knows_jobs_and_pods(client, make, kubectl):
    await client.post("/apis/batch/v1/namespaces/default/jobs", make.job())
    await client.post("/api/v1/namespaces/default/pods", make.pod())
    assert "Completions:      1" in await kubectl("describe", "job", "j")
    assert "Status:       Pending" in await kubectl("describe", "pod", "p")


async def test_jobs_are_applied_merged_and_printed(client, make, kubectl):
    await kubectl("apply", "-f", "-", stdin=make.job())
    assert "unchanged" in await kubectl("apply", "-f", "-", stdin=make.job())
    assert "configured" in await kubectl("apply", "-f", "-", stdin=make.job(suspend=True))
    await kubectl("patch", "job", "j", "-p", '{"spec":{"parallelism":2}}')
    assert (await client.get("/apis/batch/v1/namespaces/default/jobs/j"))["spec"]["parallelism"] == 2
    change = {"status": {"active": 3, "conditions": [{"type": "Suspended", "status": "True"}]}}
    await client.patch("/apis/batch/v1/namespaces/default/jobs/j/status", change)
    assert (await kubectl("get", "jobs")).splitlines()[1].split()[:3] == ["j", "Suspended", "3"]


async def test_create_replace_patch_label_and_annotate(widgets, make, kubectl):
    await kubectl("create", "-f", "-", stdin=make.widget())
    assert "AlreadyExists" in await kubectl("create", "-f", "-", stdin=make.widget(), fails=True)
    await kubectl("replace", "-f", "-", stdin=make.widget(size=8))
    await kubectl("patch", "wd", "w", "--type=merge", "-p", '{"spec":{"color":"green"}}')
    await kubectl("annotate", "wd", "w", "x=y")
    live = await widgets.get(W)
    assert (live["spec"]["size"], live["spec"]["color"], live["metadata"]["annotations"]) == (8, "green", {"x": "y"})


async def test_the_status_can_be_patched_by_its_subresource(widgets, make, kubectl):
    await widgets.post(WIDGETS, make.widget())
    await kubectl("patch", "wd", "w", "--subresource=status", "--type=merge", "-p", '{"status":{"state":"x"}}')
    assert await kubectl("get", "wd", "w", "--subresource=status", "-o", "jsonpath={.status.state}") == "x"


async def test_wait_sees_a_condition_come(widgets, make, kubectl):
    await widgets.post(WIDGETS, make.widget())
    waiting = asyncio.create_task(kubectl("wait", "--for=condition=Ready", "wd/w", "--timeout=150s"))
    await asyncio.sleep(0.3)
    await widgets.patch(W + "/status", {"status": {"conditions": [{"type": "Ready", "status": "True"}]}})
    assert "condition met" in await waiting


async def test_wait_sees_an_object_come_and_go(widgets, make, kubectl):
    coming = asyncio.create_task(kubectl("wait", "--for=create", "wd/w", "--timeout=150s"))
    await asyncio.sleep(0.3)
    await widgets.post(WIDGETS, make.widget())
    await coming
    going = asyncio.create_task(kubectl("wait", "--for=delete", "wd/w", "--timeout=150s"))
    await asyncio.sleep(0.3)
    await widgets.delete(W)
    await going


async def test_delete_waits_for_the_end_and_takes_selectors(widgets, make, kubectl):
    for name in "ab":
        body = make.widget(name)
        body["metadata"]["labels"] = {"name": name}
        await widgets.post(WIDGETS, body)
    assert 'widget.demo.example.com "a" deleted' in await kubectl("delete", "wd", "-l", "name=a")
    await kubectl("delete", "wd", "--all")
    assert "No resources found" in await kubectl("get", "wd")


async def test_delete_cascades_as_it_is_told(client, make, kubectl):
    jobs = "/apis/batch/v1/namespaces/default/jobs"
    await client.post(jobs, make.job("bg"))
    await client.post(jobs, make.job("keep"))
    await kubectl("delete", "job", "bg")
    await client.get(jobs + "/bg", code=404)
    await kubectl("delete", "job", "keep", "--cascade=orphan", "--wait=false")
    assert (await client.get(jobs + "/keep"))["metadata"]["finalizers"] == ["orphan"]


async def test_delete_now_ends_a_running_pod(client, make, kubectl):
    await client.post("/api/v1/namespaces/default/pods", make.pod(nodeName="n"))
    await kubectl("delete", "pod", "p", "--grace-period=0", "--force")
    await client.get("/api/v1/namespaces/default/pods/p", code=404)


async def test_diff_shows_what_apply_would_change(widgets, make, kubectl):
    await kubectl("apply", "-f", "-", stdin=make.widget())
    assert "+  size: 9" in await kubectl("diff", "-f", "-", stdin=make.widget(size=9), fails=True)
    assert (await widgets.get(W))["spec"]["size"] == 3


CHART = """
{apiVersion: v1, kind: ServiceAccount, metadata: {name: a}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: "team:a"}
rules: [{apiGroups: [""], resources: [pods], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: a}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "team:a"}
subjects: [{kind: ServiceAccount, name: a, namespace: default}]
---
{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{port: 80}], selector: {app: a}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: a}
spec:
  selector: {matchLabels: {app: a}}
  template: {metadata: {labels: {app: a}}, spec: {containers: [{name: c, image: old, ports: [{containerPort: 80}]}]}}
"""


@pytest.mark.parametrize("how", ["--server-side=false", "--server-side"])
async def test_a_chart_is_tried_on_the_server_applied_and_changed(client, kubectl, how):
    assert (await kubectl("apply", how, "--dry-run=server", "-f", "-", stdin=CHART)).count("server dry run") == 5
    await client.get("/apis/apps/v1/namespaces/default/deployments/a", code=404)
    await kubectl("apply", how, "-f", "-", stdin=CHART)
    await kubectl("apply", how, "-f", "-", stdin=CHART.replace("image: old", "image: new"))
    live = await client.get("/apis/apps/v1/namespaces/default/deployments/a")
    assert [c["image"] for c in live["spec"]["template"]["spec"]["containers"]] == ["new"]
    assert live["metadata"]["generation"] == 2
    typo = await kubectl("apply", how, "-f", "-", stdin=CHART.replace("containers:", "container:"), fails=True)
    assert 'unknown field "spec.template.spec.container"' in typo


async def test_a_namespace_from_a_file_can_be_worked_in(widgets, make, kubectl):
    await kubectl("apply", "-f", "-", stdin={"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team"}})
    await kubectl("apply", "-n", "team", "-f", "-", stdin=make.widget())
    assert "w " in await kubectl("get", "wd", "-n", "team")
    await kubectl("delete", "ns", "team", "--timeout=150s")
    assert "NotFound" in await kubectl("get", "ns", "team", fails=True)


async def test_logs_of_a_job_find_its_pod_by_the_labels_of_its_template(client, make, kubectl):
    job = await client.post("/apis/batch/v1/namespaces/default/jobs", make.job())
    body = make.pod()
    body["metadata"]["labels"] = job["spec"]["template"]["metadata"]["labels"]
    await client.post("/api/v1/namespaces/default/pods", body)
    assert await kubectl("logs", "job/j") == ""
    assert "not found" in await kubectl("logs", "job/other", fails=True)
