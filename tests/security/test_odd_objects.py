"""What others write on pods, children, Events and statuses, and into the bucket: none of it makes a look at a run, a
watch, a sweep or a cleaning fail."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some
from support.builders import Object, ended, job, manifest, pod
from support.stage_builders import RUN, context
from support.status_builders import NOW, render_of

from cgd_operator.api.status import CGDRunStatus
from cgd_operator.controller.children import Departed
from cgd_operator.facts import retries
from cgd_operator.facts.children import observe
from cgd_operator.facts.due import Due, due, expired
from cgd_operator.facts.pods import RESTARTS
from cgd_operator.kube.outside import last_words, moment, number
from cgd_operator.planning.manifests import MANAGED_BY, MANAGER, REPLICA_INDEX, RUN_LABEL
from cgd_operator.status.render import seconds_between
from cgd_stages.clean import __main__ as clean
from cgd_stages.contract import MOST, Clean
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import DONE, PARTS, Folder
from cgd_stages.store.rows import now, row_schema
from cgd_stages.store.run import RunStore

INDEX = "batch.kubernetes.io/job-completion-index"
ODD_NUMBERS = ("", "x", "-1", "1.5", "1e3", " 1", "1_0", "\u0661", "\u00b2", "9" * 5000, "0x10", "\ud800")
ODD_TIMES = (
    "", "soon", "2026-01-01T00:00:60Z", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59Z", "0001-01-01T00:00:00Z",
    "2026-13-01T00:00:00Z", "\ud800",
)  # fmt: skip
TEXTS = some.one_of(some.text(max_size=40), some.sampled_from(ODD_NUMBERS + ODD_TIMES))


def attempted(pods: list[Object], previous: CGDRunStatus | None = None) -> CGDRunStatus:
    """All that is derived of a child with these pods."""
    child = job("train-cgd", kind="PyTorchJob")
    facts = observe([child], pods, now=NOW)
    retries.enough(facts.values(), previous or CGDRunStatus(), 3)
    return render_of(child, pods=tuple(pods), previous=previous)


@pytest.mark.parametrize("text", ODD_NUMBERS)
@pytest.mark.parametrize("where", [("annotations", INDEX), ("labels", RESTARTS), ("labels", REPLICA_INDEX)])
def test_an_odd_number_on_a_pod_counts_as_none(where, text):
    odd = pod("train-cgd")
    odd["metadata"].setdefault(where[0], {})[where[1]] = text
    facts = observe([job("train-cgd", kind="PyTorchJob")], [odd])["train-cgd"].pods[0]
    assert (facts.shard, facts.restarts) == (0, 0)


@given(TEXTS)
def test_a_number_is_read_as_kubernetes_writes_it(text):
    found = number(text)
    assert 0 <= found < 10**9
    assert found == 0 or str(found) == text.lstrip("0")


@given(TEXTS)
def test_a_time_can_be_reckoned_with_or_is_none(text):
    found = moment(text)
    assert found is None or abs(found - NOW).days < 3_000_000


@pytest.mark.parametrize("text", ["2026-01-01T00:10:00Z", "2026-01-01T00:10:00.5Z", "2026-01-01T01:10:00+01:00"])
def test_a_time_as_kubernetes_writes_it_is_read(text):
    found = moment(text)
    assert found
    assert abs((found - NOW).total_seconds()) < 1


def odd_words(**facts: Any) -> str:
    return json.dumps({"outcome": "done", "stages": {"train-cgd": facts}})


@pytest.mark.parametrize(
    "message",
    [
        odd_words(seconds=float("inf"), generatedTokens=1),
        odd_words(seconds=float("nan"), generatedTokens=1),
        odd_words(generatedTokens=10**30, seconds=1),
        odd_words(promptTokens=-1),
        odd_words(rows={"total": MOST + 1}),
        odd_words(rows={"total": 1, "done": -5}),
        "{" * 5000,
        '{"outcome": "done", "stages": ' + "[" * 3000,
        '{"outcome": "done", "message": "\\ud800"}',
        "{}",
        "\0",
    ],
)
def test_last_words_that_cannot_be_are_shown_and_not_counted(message):
    assert last_words(message) is None
    status = attempted([pod("train-cgd", "Succeeded", terminated=ended(0, message))])
    assert status.usage.tokens == 0
    json.dumps(status.model_dump(mode="json"), allow_nan=False)


def test_a_pod_that_took_no_time_has_a_speed_that_a_status_can_hold():
    message = odd_words(generatedTokens=MOST, seconds=1e-300)
    status = attempted([pod("train-cgd", "Succeeded", terminated=ended(0, message))])
    (stage,) = (one for one in status.stages if one.name == "train-cgd")
    assert 0 < (stage.tokens_per_second or 0) < 2**63


TIMES = ("startTime", "lastTransitionTime", "startedAt", "finishedAt", "completionTime", "creationTimestamp", "time")


def with_times(thing: Any, text: str) -> Any:
    """The object with this text for every time in it."""
    if isinstance(thing, dict):
        return {key: text if key in TIMES else with_times(value, text) for key, value in thing.items()}
    return [with_times(one, text) for one in thing] if isinstance(thing, list) else thing


@pytest.mark.parametrize("text", ODD_TIMES)
def test_times_that_are_none_are_not_there(text):
    odd = pod("train-cgd", "Failed", terminated=ended(1, "gone"))
    odd["status"] |= {"startTime": "", "conditions": [{"type": "Ready", "status": "False", "lastTransitionTime": ""}]}
    child = job("train-cgd", "Failed", kind="PyTorchJob")
    child["status"] |= {"startTime": "", "completionTime": ""}
    child["metadata"]["managedFields"] = [{"time": ""}]
    event = {
        "metadata": {"creationTimestamp": text}, "firstTimestamp": text, "lastTimestamp": text, "type": "Warning",
        "reason": "FailedCreate", "message": "no", "series": {"lastObservedTime": text},
        "involvedObject": {"kind": "PyTorchJob", "name": "demo-train-cgd"},
    }  # fmt: skip
    fresh = with_times(job("train-cgd", kind="PyTorchJob"), text)
    assert observe([with_times(child, text)], [with_times(odd, text)], events=[event], now=NOW)
    assert observe([fresh], [], events=[event], now=NOW)["train-cgd"].fate.value == "waiting"
    assert render_of(with_times(child, text), pods=(with_times(odd, text),)).state == "Failed"


@pytest.mark.parametrize("text", ODD_TIMES)
def test_a_status_that_somebody_has_written_stops_no_sweep(text):
    settled = {"type": "Succeeded", "status": "True", "reason": "x", "lastTransitionTime": text}
    odd = manifest({"ttlSecondsAfterFinished": 2**31 - 1})
    odd["status"] = {"conditions": [settled]}
    assert due(odd, datetime.now(UTC)) is Due.NOTHING
    assert seconds_between(text, "2026-01-01T00:00:00Z") == 0
    assert seconds_between("2026-01-01T00:00:00Z", text) == 0


def test_a_time_without_a_zone_is_reckoned_with():
    naive = CGDRunStatus.model_validate(
        {"conditions": [{"type": "Succeeded", "status": "True", "reason": "x", "lastTransitionTime": "2026-01-01"}]}
    )
    assert expired(60, naive, datetime(2026, 1, 3, tzinfo=UTC))
    assert seconds_between("2026-01-01T00:00:00", "2026-01-03T00:00:00Z") > 0


def test_a_deleted_pod_that_only_looks_like_ours_does_not_break_the_watch():
    departed = Departed()
    stranger = pod("answer")
    stranger["metadata"]["labels"] = {MANAGED_BY: MANAGER, RUN_LABEL: "demo"}
    departed.add(stranger, NOW)
    odd = pod("answer")
    odd["metadata"]["annotations"] = {INDEX: "x"}
    departed.add(odd, NOW)
    assert [gone.pod.shard for run_ in departed.runs for gone in departed.of(run_)] == [0]


NOTES = some.dictionaries(some.sampled_from([INDEX, RESTARTS, REPLICA_INDEX, "x"]), TEXTS)


@given(NOTES, NOTES)
def test_whatever_text_is_in_a_pod_s_annotations_and_labels_the_run_is_looked_at(annotations, labels):
    odd = pod("train-cgd")
    odd["metadata"]["annotations"] = annotations
    odd["metadata"]["labels"] |= labels
    assert attempted([odd]).stages


# --- strangers in the bucket ------------------------------------------------------------------------------------

ROW = {"id": "ab", "sample": 0, "prompt": "2 + 2?", "reference": None, "prompt_tokens": 4}


def made(bucket: Bucket, storage: Any, scratch: Any) -> Folder:
    folder = context(storage, Clean(), scratch).store.folder("prepare", {"name": "own"})
    parts = [folder.put_rows(PARTS, [ROW], row_schema("prepare"))]
    RunStore(bucket, RUN).point_at(folder.finish(facts=clean.StageFacts(), parts=parts, started=now(), inputs={}))
    return folder


@pytest.mark.parametrize("place", [f"{RUN.namespace}/claims", f"{RUN.namespace}/runs", f"{RUN.namespace}/runs/run"])
def test_a_run_that_keeps_its_data_below_claims_or_pointers_breaks_no_cleaning_and_loses_nothing(
    bucket, storage, tmp_path, place
):
    made(bucket, storage, tmp_path)
    inner = storage.model_copy(update={"uri": f"{storage.uri}/{place}"})
    other = made(bucket.at(inner.uri), inner, tmp_path)
    given_ = context(storage, Clean(), tmp_path)
    assert clean.main(given_)[given_.task.stage].metrics["folders"] == 1
    left = [stored.key for stored in bucket.list()]
    assert left
    assert all(key.startswith(f"{place}/") for key in left)
    assert other.bucket.get(other.key(DONE)) is not None


@pytest.mark.parametrize("key", ["claims/x", "claims/uid-1/prepare", "claims/uid-1/prepare/x/y", "runs/run/x.json"])
def test_an_object_of_somebody_else_s_is_no_claim_and_no_pointer(bucket, storage, tmp_path, key):
    made(bucket, storage, tmp_path)
    bucket.put(f"{RUN.namespace}/{key}", b"[" * 1000)
    given_ = context(storage, Clean(), tmp_path)
    clean.main(given_)
    assert RunStore(bucket, RUN).claims() == {}
    assert [stored.key for stored in bucket.list()] == [f"{RUN.namespace}/{key}"]
