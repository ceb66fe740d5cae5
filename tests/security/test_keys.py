"""Keys of listings, markers and indexes on their way to local paths: none leads out of its folder.

AWS takes any key; SeaweedFS, the store of the other tests, refuses those with `..`. So such keys are served by a few
lines that answer a listing and a get, to the same client.
"""

import ast
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest
from hypothesis import given
from hypothesis import strategies as some
from support import builders
from support.stage_builders import RUN, context, generate_work

from cgd_cli import models
from cgd_stages.contract import Model, Source, StageFacts, Storage
from cgd_stages.errors import UserError
from cgd_stages.models import resolve
from cgd_stages.prepare import sources
from cgd_stages.store.bucket import LONGEST_NAME, Bucket, place
from cgd_stages.store.folder import Done, Folder, Part
from cgd_stages.store.rows import now
from cgd_stages.store.run import Pointer, RunStore
from cgd_stages.tasks.documents import mirrored
from cgd_stages.training.checkpoints import Checkpoint, Checkpoints, Layout

ROOT = Path(__file__).parents[2]
BODY = b"{}"
LEADING_OUT = (
    "../evil.json",
    "a/../../evil.json",
    "/etc/evil.json",
    "a//evil.json",
    "./evil.json",
    "..",
    ".",
    "",
    "a/",
)
NO_NAMES = ("..\\evil.json", "a\0b", "a\nb", "a\x7fb", "x" * (LONGEST_NAME + 1))


@contextmanager
def store(objects: Mapping[str, bytes]) -> Iterator[Storage]:
    """An S3 store with these objects in the bucket `data`, whatever their keys are."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            key = unquote(url.path).removeprefix("/data").removeprefix("/")
            if key:
                self.answer(objects.get(key))
                return
            prefix = parse_qs(url.query, keep_blank_values=True)["prefix"][0]
            found = [
                f"<Contents><Key>{escape(quote(key))}</Key><Size>{len(body)}</Size><ETag>e</ETag></Contents>"
                for key, body in sorted(objects.items())
                if key.startswith(prefix)
            ]
            head = "<IsTruncated>false</IsTruncated><EncodingType>url</EncodingType>"
            self.answer(f"<ListBucketResult>{head}{''.join(found)}</ListBucketResult>".encode())

        def do_HEAD(self) -> None:
            self.do_GET()

        def answer(self, body: bytes | None) -> None:
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.send_header("ETag", '"e"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body or b"")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Storage(uri="s3://data/p", endpoint=f"http://127.0.0.1:{server.server_port}", path_style=True)
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("key", [*LEADING_OUT, *NO_NAMES])
def test_a_key_that_is_no_path_in_a_folder_has_no_place(tmp_path, key):
    with pytest.raises(UserError, match="has no place below a folder") as caught:
        place(tmp_path, key)
    assert "Delete the object or give it another name" in caught.value.hint


@given(some.text(some.characters(exclude_categories=["Cs"])))
def test_whatever_a_key_is_its_place_is_below_the_folder_or_there_is_none(key):
    folder = Path("/scratch/models")
    try:
        found = place(folder, key)
    except UserError:
        return
    assert found.parts == (*folder.parts, *key.split("/"))


@pytest.mark.parametrize("key", ["../../../evil.json", "a/../../../evil.json", "/evil.json", "a\\..\\evil.json"])
def test_a_stored_model_writes_no_file_outside_its_folder(tmp_path, key):
    scratch = tmp_path / "1" / "2" / "3"
    with (
        store({"m/config.json": BODY, f"m/{key}": BODY}) as storage,
        pytest.raises(UserError, match="has no place below a folder"),
    ):
        resolve.fetch(Model(name="s3://data/m"), RunStore(Bucket(storage), RUN), scratch, weights=False)
    assert [name for name in files_in(tmp_path) if "evil" in name] == []


def test_an_index_of_weights_names_no_file_outside_its_folder(tmp_path):
    index = json.dumps({"weight_map": {"w": "../../evil.safetensors"}}).encode()
    objects = {"m/config.json": BODY, "m/model.safetensors.index.json": index, "m/../../evil.safetensors": BODY}
    with store(objects) as storage, pytest.raises(UserError, match="has no place below a folder"):
        resolve.tensors(Model(name="s3://data/m"), Bucket(storage), tmp_path)


def test_a_header_of_weights_that_says_to_be_huge_is_not_read(tmp_path, caplog):
    objects = {"m/config.json": BODY, "m/model.safetensors": (2**62).to_bytes(8, "little") + b"x" * 100}
    with store(objects) as storage:
        assert resolve.tensors(Model(name="s3://data/m"), Bucket(storage), tmp_path) is None
    assert "says that its header has" in caplog.text
    assert files_in(tmp_path) == []


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
INDEX = "model.safetensors.index.json"


def weights(header: object) -> bytes:
    told = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(told).to_bytes(8, "little") + told


@pytest.mark.parametrize(
    "header",
    [
        [],
        None,
        b"[" * 100_000,
        b"\xff{",
        {"w": 1},
        {"w": [1]},
        *({"w": TENSOR | {"shape": shape}} for shape in (["a"], [-5], [10**30], [1.5])),
        *({"w": TENSOR | {"data_offsets": offsets}} for offsets in (["a", "b"], [1], [8, 0], None, [0, 1, 2])),
        {"w": TENSOR | {"dtype": ["F32"]}},
        b'{"w": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}',
    ],
    ids=[str(number) for number in range(18)],
)
def test_headers_of_weights_that_are_none_are_told_of_and_not_read(tmp_path, caplog, header):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(weights(header))
    with store({}) as storage:
        assert resolve.tensors(Model(name=str(tmp_path)), Bucket(storage), tmp_path) in (None, [])
        (tmp_path / "model.safetensors").write_bytes(weights({"w": TENSOR}))
        assert resolve.tensors(Model(name=str(tmp_path)), Bucket(storage), tmp_path) == [
            resolve.Tensor("w", "F32", 2, 8, (2,))
        ]


@pytest.mark.parametrize("index", [[], {"weight_map": ["a"]}, {"weight_map": {"w": 5}}, {"weight_map": None}])
def test_an_index_of_weights_that_is_none_is_told_of(tmp_path, caplog, index):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps(index))
    with store({}) as storage:
        assert resolve.tensors(Model(name=str(tmp_path)), Bucket(storage), tmp_path) is None
    assert "cannot be read" in caplog.text


LAYOUT = Layout(processes=1, zero_stage=2, dtype="float32")


def marked(step: int) -> bytes:
    part = Part(key="weights", sha256=hashlib.sha256(BODY).hexdigest())
    return Checkpoint(step=step, layout=LAYOUT, files=(part,)).to_json().encode()


STRAY = (
    "notes.txt",
    "step-x/DONE.json",
    "step-4/DONE.json",
    "step-/DONE.json",
    "step-000009",
    "step--00009/DONE.json",
    "step-\u0660\u0660\u0660\u0660\u0660\u0669/DONE.json",
    f"step-{'9' * 100}/DONE.json",
    "backup/step-000009/DONE.json",
    "/DONE.json",
)


@pytest.mark.parametrize("stray", STRAY)
def test_what_is_no_checkpoint_among_checkpoints_is_left_alone(tmp_path, stray):
    home = "p/team/train-cgd/d1/checkpoints/"
    objects = {f"{home}step-000004/DONE.json": marked(4), f"{home}step-000004/weights": BODY, f"{home}{stray}": BODY}
    with store(objects) as storage:
        checkpoints = Checkpoints(Folder(Bucket(storage), RUN.namespace, "train-cgd", "d1"), LAYOUT, keep=1)
        assert checkpoints.fetch(tmp_path, range(1)) == 4
        assert {step for step, _ in checkpoints._files()} == {4}
    assert files_in(tmp_path) == ["step-000004/weights"]


def test_a_marker_of_another_step_is_damaged(bucket):
    folder = Folder(bucket, RUN.namespace, "train-cgd", "d1")
    checkpoints = Checkpoints(folder, LAYOUT, keep=2)
    for step, told in ((4, 4), (8, 6)):
        bucket.put(folder.key(f"checkpoints/step-{step:06d}/DONE.json"), marked(told))
    newest = checkpoints.newest()
    assert newest
    assert newest.step == 4
    assert bucket.get(folder.key("checkpoints/step-000008/DONE.json")) is None


@pytest.mark.parametrize(
    "time", ["", "yesterday", "2026-13-01T00:00:00Z", "2026-01-01T00:00:00", "9999-12-31T23:59:59Z"]
)
def test_a_marker_s_times_are_times(time):
    objects = stage_with()
    home = "p/team/train-cgd/d1/DONE.json"
    objects[home] = json.dumps(json.loads(objects[home]) | {"completed": time}).encode()
    with store(objects) as storage, pytest.raises(UserError, match="is not a marker of this format"):
        RunStore(Bucket(storage), RUN).input("train-cgd").done()


def test_cgd_plan_writes_no_file_outside_its_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "1"))
    (tmp_path / "1").mkdir()
    with store({"models/student/config.json": BODY, "models/student/../../../../evil.json": BODY}) as storage:
        run = builders.run({"storage": {"uri": "s3://data/runs", "endpoint": storage.endpoint, "pathStyle": True}})
        with pytest.raises(UserError, match="has no place below a folder"):
            models.read(run, 80e9)
    assert files_in(tmp_path) == []


def stage_with(*keys: str, digest: str = "d1") -> dict[str, bytes]:
    """The objects of a stage train-cgd whose marker lists these keys."""
    home = "p/team/train-cgd/d1"
    parts = tuple(Part(key=key, sha256="0" * 64) for key in keys)
    facts = StageFacts(digest="d1", output_uri=f"s3://data/{home}")
    done = Done(stage="train-cgd", digest="d1", parts=parts, started=now(), completed=now(), facts=facts)
    pointer = Pointer(run_uid=RUN.uid, stage="train-cgd", digest="d1", uri=f"s3://data/{home}", facts=facts)
    told = json.loads(pointer.to_json()) | {"digest": digest}
    return {
        f"{home}/DONE.json": done.to_json().encode(),
        "p/team/runs/run/train-cgd.json": json.dumps(told).encode(),
        **{f"{home}/{key}": BODY for key in keys},
    }


def test_the_marker_of_a_stage_names_no_file_outside_the_model_s_folder(tmp_path):
    with (
        store(stage_with("model/../../../evil.json")) as storage,
        pytest.raises(UserError, match="has no place below a folder"),
    ):
        resolve.fetch(Model(name="stage://train-cgd"), RunStore(Bucket(storage), RUN), tmp_path / "1" / "2")
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("digest", ["../../../evil", "", "d1/..", "D1"])
def test_a_pointer_s_digest_is_a_digest(digest):
    with store(stage_with(digest=digest)) as storage, pytest.raises(UserError, match="is no pointer of this format"):
        RunStore(Bucket(storage), RUN).input("train-cgd")


def test_a_checkpoint_s_marker_names_no_file_outside_its_folder(tmp_path):
    layout = Layout(processes=1, zero_stage=2, dtype="float32")
    marker = Checkpoint(step=4, layout=layout, files=(Part(key="../../evil.json", sha256="0" * 64),))
    home = "p/team/train-cgd/d1/checkpoints/step-000004"
    objects = {f"{home}/DONE.json": marker.to_json().encode(), f"{home}/../../evil.json": BODY}
    with store(objects) as storage:
        checkpoints = Checkpoints(Folder(Bucket(storage), RUN.namespace, "train-cgd", "d1"), layout, keep=1)
        with pytest.raises(UserError, match="has no place below a folder"):
            checkpoints.fetch(tmp_path / "1" / "2", range(1))
    assert files_in(tmp_path) == []


def test_a_mirror_of_the_hub_writes_no_file_outside_its_folder(tmp_path):
    with store({"hub/datasets/x": BODY, "hub/../../evil.json": BODY}) as storage:
        made = context(storage, generate_work("m", "answer"), tmp_path / "1" / "2")
        with pytest.raises(UserError, match="has no place below a folder"), mirrored(made, "s3://data/hub"):
            pass
    assert [name for name in files_in(tmp_path) if "evil" in name] == []


def test_a_source_in_a_config_map_is_a_file_of_a_config_map(tmp_path):
    (tmp_path / "other.jsonl").write_text("{}")
    with store({}) as storage:
        made = context(storage, generate_work("m", "answer"), tmp_path, inputs=tmp_path / "inputs")
    with pytest.raises(UserError, match="has no place below a folder"):
        sources.open_source(made, Source(source="configmap://../other.jsonl"), "spec.prompts")


def test_a_source_on_the_hub_is_a_file_of_the_data_set(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    cached = tmp_path / "cache" / "datasets--team--sums"
    for path, text in {"refs/main": "0" * 40, f"snapshots/{'0' * 40}/p.jsonl": "{}", "../../other.jsonl": "{}"}.items():
        (cached / path).parent.mkdir(parents=True, exist_ok=True)
        (cached / path).write_text(text)
    with store({}) as storage:
        made = context(storage, generate_work("m", "answer"), tmp_path)
    home = "hf://datasets/team/sums@main"
    (found,) = sources.open_source(made, Source(source=f"{home}/p.jsonl"), "spec.prompts")
    assert found.revision == "0" * 40
    with pytest.raises(UserError, match="has no place below a folder"):
        sources.open_source(made, Source(source=f"{home}/../../../../other.jsonl"), "spec.prompts")


def calls(tree: ast.AST, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == name:
            yield node


def is_placed(value: ast.expr, function: ast.AST) -> bool:
    """Whether a path is made by `place` or `places`, here or where the name is assigned or runs over their items."""
    match value:
        case ast.Name():
            sources = [
                source
                for node in ast.walk(function)
                for targets, source in _bound(node)
                if any(getattr(one, "id", "") == value.id for target in targets for one in ast.walk(target))
            ]
            return bool(sources) and all(is_placed(source, function) for source in sources)
        case ast.Subscript():
            return is_placed(value.value, function)
        case ast.Call(func=ast.Attribute(attr="items")):
            return is_placed(value.func.value, function)
    return isinstance(value, ast.Call) and getattr(value.func, "id", "") in {"place", "places"}


def _bound(node: ast.AST) -> list[tuple[list[ast.expr], ast.expr]]:
    """What a statement gives a value, and from what."""
    match node:
        case ast.Assign():
            return [(node.targets, node.value)]
        case ast.For():
            return [([node.target], node.iter)]
    return []


def test_every_download_goes_to_a_place_and_no_key_is_joined_to_a_path_elsewhere():
    found: list[Any] = []
    for path in (*ROOT.glob("images/**/*.py"), *ROOT.glob("operator/cgd_[co]*/**/*.py")):
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        for function in functions:
            found += [(path.name, is_placed(call.args[1], function)) for call in calls(function, "download")]
            for node in ast.walk(function):
                joined = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
                if joined and any(getattr(part, "attr", "") == "key" for part in ast.walk(node.right)):
                    found.append((path.name, False))
    assert {name for name, _ in found} >= {"resolve.py", "checkpoints.py", "documents.py", "sources.py"}
    assert [name for name, placed in found if not placed] == []
