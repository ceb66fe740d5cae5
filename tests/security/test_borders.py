"""Names and texts at every border that they cross, and that each border has one function, which all code uses."""

import ast
import html.parser
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.builders import RELEASE, run
from support.report_builders import change, quadruple, report_data, samples
from support.strings import LABEL, NAME, NAMES, STRANGE, halves, names, texts, words

from cgd_cli.ui import _page
from cgd_cli.view import command, page_of
from cgd_operator.kube.client import _query, encoded
from cgd_operator.kube.kinds import RUN, InvalidName
from cgd_operator.planning import manifests
from cgd_operator.planning.dag import BACKENDS, plan
from cgd_operator.status import events
from cgd_stages.errors import UserError
from cgd_stages.report.page import embedded, render, render_comparison
from cgd_stages.results.comparison import joined, table_of
from cgd_stages.results.model import Quadruples, ReportData
from cgd_stages.store.bucket import place

ROOT = Path(__file__).parents[2]
SOURCES = {path.relative_to(ROOT): path for part in ("operator", "images") for path in (ROOT / part).rglob("*.py")}
NOW = datetime(2026, 1, 1, tzinfo=UTC)

# --- URL


@given(names, names)
def test_the_path_of_a_page_names_its_run(namespace: str, name: str) -> None:
    path = urlsplit(page_of({"metadata": {"namespace": namespace, "name": name}})).path
    assert unquote(path) == f"/runs/{namespace}/{name}"


@given(texts)
def test_a_query_says_what_it_was_made_of(text: str) -> None:
    parts = urlsplit(f"https://host/path{_query(fieldSelector=text, limit='1')}")
    assert parse_qs(parts.query) == ({"fieldSelector": [text]} if text else {}) | {"limit": ["1"]}
    assert (parts.path, parts.fragment) == ("/path", "")


# --- API path


@given(names | texts, names | texts)
def test_a_path_of_the_api_names_its_object_or_is_refused(namespace: str, name: str) -> None:
    try:
        path = RUN.path(namespace, name, "status")
    except InvalidName:
        assert not (LABEL.fullmatch(namespace) and len(namespace) <= 63 and NAME.fullmatch(name) and len(name) <= 253)
        return
    assert [unquote(part) for part in path.split("/")[4:]] == ["namespaces", namespace, "cgdruns", name, "status"]
    assert urlsplit(f"https://host{path}").path == path


# --- S3 key, local path


@given(st.lists(texts | names, max_size=4).map("/".join))
def test_a_key_of_a_listing_is_a_path_below_its_folder_or_is_refused(key: str) -> None:
    folder = Path("/scratch/model")
    try:
        path = place(folder, key)
    except UserError:
        return
    assert path.relative_to(folder) == Path(os.path.normpath(path)).relative_to(folder)
    assert path.relative_to(folder).as_posix() == key
    assert "\0" not in key


# --- HTML


class Read(html.parser.HTMLParser):
    """A page as a browser reads it: its elements with the names of their attributes, its texts, and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.shape, self.told = [], []  # type: list[Any], list[str]
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.shape.append((tag, [name for name, _ in attrs]))
        self.told += [value or "" for _, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self.shape.append(tag)

    def handle_comment(self, data: str) -> None:
        self.shape.append(data)

    def handle_data(self, data: str) -> None:
        self.told.append(data)


def report_with(text: str) -> ReportData:
    """A report in which models, benchmarks, rows and specs are called `text`."""
    return report_data(
        spec=text,
        evaluations={"base": samples("+---", benchmark=f"b{text}"), f"m{text}": samples("++--", benchmark=f"b{text}")},
        changes=(change(benchmark=f"b{text}", trained=f"m{text}", prompt=text, reference=text),),
        quadruples=Quadruples(total=1, verdicts={f"v{text}": 1}, shown=(quadruple(prompt=text, critique=text),)),
    )


def page_with(text: str) -> Read:
    return Read(render(report_with(text)))


def comparison_with(text: str) -> Read:
    reports = {f"{run}{text}": table_of(report_with(text)) for run in "ab"}
    return Read(render_comparison(joined(reports)))


def live_page_with(text: str) -> Read:
    """A page of `cgd ui`, whose address may hold any name."""
    return Read(str(_page(title=f"m{text}", run=f"m{text}", place=text).text))


@pytest.mark.parametrize("page", [page_with, comparison_with, live_page_with])
def test_a_text_changes_no_element_of_a_page(page: Callable[[str], Read]) -> None:
    plain = page("plain")
    for text in STRANGE:
        read = page(text)
        assert read.shape == plain.shape, text
        assert one_way(f"m{text}").strip() in one_way("".join(read.told)), text


def one_way(text: str) -> str:
    """Line breaks as HTML has them."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


@given(texts)
def test_embedded_data_end_no_element_and_are_what_they_were(text: str) -> None:
    data = embedded({text: [text]})
    assert json.loads(data) == {text: [text]}
    assert not {"<", ">", "&"} & set(data)


# --- terminal and log line: test_terminal.py, for every string there is


# --- event


@given(names, names, halves)
def test_an_event_is_named_after_its_run_and_says_what_happened(namespace: str, name: str, text: str) -> None:
    meta = {"namespace": namespace, "name": name, "uid": "u"}
    event = events.refusal({"metadata": meta}, text, NOW)
    assert NAME.fullmatch(event["metadata"]["name"])
    assert len(event["metadata"]["name"]) <= 253
    assert events.refusal({"metadata": meta}, text, NOW) == event
    sent = json.loads(encoded(event))
    assert sent["involvedObject"]["name"] == name
    assert sent["message"] == re.sub("[\ud800-\udfff]", "\ufffd", text[:1000])


# --- label, and names of children


VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")


@pytest.mark.parametrize("backend", BACKENDS)
@given(name=names)
def test_children_have_names_and_labels_that_are_valid(backend: Any, name: str) -> None:
    this = run(name=name)
    for child in plan(this, backend):
        meta = manifests.manifest(this, child, RELEASE)["metadata"]
        assert LABEL.fullmatch(meta["name"])
        assert len(meta["name"]) <= 63
        for value in meta["labels"].values():
            assert VALUE.fullmatch(value)
            assert len(value) <= 63
    assert NAME.fullmatch(manifests.secret_name(this, RELEASE))


# --- shell


@given(words, words)
def test_a_shell_reads_the_words_of_a_command_that_is_shown(one: str, other: str) -> None:
    assert shlex.split(command("rows", one, "-n", other)) == ["cgd", "rows", one, "-n", other]


def test_a_real_shell_does_so_too() -> None:
    script = f"cgd() {{ printf '%s\\0' \"$@\"; }}\n{command(*STRANGE)}"
    told = subprocess.run(["sh", "-c", script], capture_output=True, check=True).stdout.decode()
    assert told.split("\0")[:-1] == list(STRANGE)


# --- one function for each border


Node = tuple[str, str, ast.AST]
"""File, the innermost function (empty: none), and what stands there."""


def nodes() -> Iterator[Node]:
    for name, path in SOURCES.items():
        yield from _inside(ast.parse(path.read_text()), str(name), "")


def _inside(tree: ast.AST, file: str, function: str) -> Iterator[Node]:
    for node in ast.iter_child_nodes(tree):
        yield file, function, node
        inner = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        yield from _inside(node, file, inner)


EVERY = list(nodes())


def places(wanted: Callable[[ast.AST], bool]) -> set[str]:
    """`file:function` of what is wanted."""
    return {f"{file}:{function}" for file, function, node in EVERY if wanted(node)}


def calls(*called: str) -> Callable[[ast.AST], bool]:
    """Calls of these names, or of methods of these names where they begin with a dot."""

    def wanted(node: ast.AST) -> bool:
        if not isinstance(node, ast.Call):
            return False
        name = ast.unparse(node.func)
        return any(name.endswith(one) if one.startswith(".") else name == one for one in called)

    return wanted


def passes(keyword: str, value: object) -> Callable[[ast.AST], bool]:
    """A keyword with a constant of this value."""
    return lambda node: (
        isinstance(node, ast.keyword)
        and node.arg == keyword
        and isinstance(node.value, ast.Constant)
        and node.value.value is value
    )


def imports(*modules: str) -> Callable[[ast.AST], bool]:
    def wanted(node: ast.AST) -> bool:
        if isinstance(node, ast.Import):
            return any(one.name in modules for one in node.names)
        if not isinstance(node, ast.ImportFrom):
            return False
        return node.module in modules or any(f"{node.module}.{one.name}" in modules for one in node.names)

    return wanted


def text_of(node: ast.AST) -> str:
    """The literal parts of an f-string, and of a string that is put together."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(one.value) if isinstance(one, ast.Constant) else "{}" for one in node.values)
    return ""


TERMINAL = "operator/cgd_cli/terminal.py"


def test_no_shell_reads_a_text() -> None:
    shells = ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", ".create_subprocess_shell")
    assert places(calls(*shells)) | places(passes("shell", True)) == set()


def test_what_is_drawn_on_a_terminal_goes_through_one_module() -> None:
    """Nobody else has a console of Rich, a text, or a title of a panel, from which Rich would read markup."""
    made = places(calls("Text", "Text.from_markup", "Text.assemble", "Text.from_ansi"))
    assert {place for place in made if "/api/" not in place} == {f"{TERMINAL}:plain"}  # there it is a type of field
    assert places(calls("Panel", "Panel.fit")) == {f"{TERMINAL}:panel"}
    assert places(calls("Console")) == set()
    assert places(imports("rich.console.Console")) == {f"{TERMINAL}:"}
    others = ("rich", "rich.print", "rich.markup", "rich.markdown", "rich.prompt", "rich.progress", "rich.spinner",
              "rich.rule", "rich.columns", "rich.syntax", "rich.pretty", "rich.traceback", "rich.logging")  # fmt: skip
    assert places(imports(*others)) == set()


def test_what_is_written_to_a_terminal_is_made_printable() -> None:
    """Beside it are texts of ours alone: files that are generated, and what a process says of itself."""
    written = places(calls("print", "typer.echo", "click.echo", "sys.stdout.write", "sys.stderr.write"))
    assert written == {
        f"{TERMINAL}:write",
        "operator/cgd_operator/api/crd.py:",
        "operator/cgd_operator/api/manual.py:",
        "operator/cgd_cli/__main__.py:main",  # an error, which it makes printable
        "operator/cgd_local/launcher.py:become",
        "operator/cgd_local/smollm2.py:main",
        "images/cgd_stages/runtime/supervisor.py:supervise",
        "images/cgd_stages/harness/sandbox.py:write",  # these two write to the other process's pipe
        "images/cgd_stages/harness/sandbox.py:entry",
    }
    for file, _, node in EVERY:
        if calls("SystemExit", "sys.exit")(node) and isinstance(node, ast.Call):
            told = [one for argument in node.args for one in ast.walk(argument) if isinstance(one, ast.JoinedStr)]
            assert not told or "printable(" in ast.unparse(node), f"{file}:{node.lineno}"


def test_logs_are_set_up_in_one_place_and_tracebacks_go_there() -> None:
    own = "images/cgd_stages/text/printable.py:start_log"
    assert places(calls("logging.basicConfig", "logging.StreamHandler", ".addHandler", ".dictConfig")) == {own}
    assert places(imports("traceback")) == set()
    assert places(calls("start_log")) == {
        "images/cgd_stages/runtime/program.py:log_stage",
        "operator/cgd_operator/process.py:main",
        "operator/cgd_cli/__main__.py:main",
    }
    stages = "images/cgd_stages"
    assert places(calls("log_stage")) == {f"{stages}/runtime/program.py:run", f"{stages}/train/loop.py:"}


def test_queries_are_made_by_the_standard_library() -> None:
    assert places(lambda node: bool(re.search(r"[?&]\w+=\{\}", text_of(node)))) == set()


def test_html_is_made_by_templates_that_escape() -> None:
    page = "images/cgd_stages/report/page.py"
    assert places(calls("Markup", "markupsafe.Markup", ".Markup")) == {
        f"{page}:{one}" for one in ("page", "_text", "embedded")
    }
    assert places(calls("Environment", "jinja2.Environment")) == {f"{page}:_environment"}
    assert places(passes("autoescape", True)) == {f"{page}:_environment"}
    html_answers = places(
        lambda node: isinstance(node, ast.keyword) and node.arg == "content_type" and "html" in ast.unparse(node.value)
    )
    assert html_answers == {f"operator/cgd_cli/ui.py:{one}" for one in ("_page", "_open_report")}
    for path in (*ROOT.glob("images/cgd_stages/report/*.j2"), *ROOT.glob("operator/cgd_cli/*.j2")):
        assert not re.search(r"\|\s*safe|autoescape|\{%-?\s*filter", path.read_text()), path
    for path in (*ROOT.glob("images/cgd_stages/report/*.js"), *ROOT.glob("operator/cgd_cli/*.js")):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|Function\(", path.read_text()
        ), path


def test_commands_that_are_shown_are_made_in_one_place() -> None:
    """Beside it are three whose words are a field of ours, a node and a child that the API server has named."""
    shown = re.compile(r"\b(cgd (logs|rows|report|status|watch|plan|compare)|kubectl [a-z]+) [^;`]*\{\}|\bcgd \{\}")
    found = places(lambda node: bool(shown.search(text_of(node))))
    assert found == {
        "operator/cgd_operator/api/spec.py:_mend",
        "operator/cgd_operator/facts/children.py:_suspension",
        "operator/cgd_operator/facts/pods.py:_lost",
    }
    page = "images/cgd_stages/report/words.py:places"  # of words that are quoted, on a page that escapes them
    assert places(calls("shlex.join")) == {"operator/cgd_cli/view.py:shell", page}


def test_variables_and_commands_of_pods_are_made_in_one_place() -> None:
    """`lifecycle` apart, which the kubelet does not fill in."""
    own = "operator/cgd_operator/planning/manifests.py"

    def holds(*keys: str) -> Callable[[ast.AST], bool]:
        return lambda node: (
            isinstance(node, ast.Dict) and any(isinstance(one, ast.Constant) and one.value in keys for one in node.keys)
        )

    assert {place for place in places(holds("value")) if "cgd_operator" in place} == {f"{own}:_variable"}
    assert {place for place in places(holds("command", "args")) if "cgd_operator" in place} == {f"{own}:_container"}
    assert places(calls("_as_it_is")) == {f"{own}:_variable", f"{own}:_container"}


def test_the_list_has_each_string_once_and_names_among_them() -> None:
    assert len(set(STRANGE)) == len(STRANGE)
    assert all(len(one) <= 63 for one in NAMES)
