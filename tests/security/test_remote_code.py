"""Code that comes with a model is never run, and nobody is asked whether it may."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import tiny
from support.stage_builders import context, prepare_work

from cgd_stages.contract import Chat, Engine, Model
from cgd_stages.engines.vllm_settings import vllm_arguments
from cgd_stages.errors import UserError
from cgd_stages.models import fit
from cgd_stages.prepare import __main__ as prepare

ROOT = Path(__file__).parents[2]
LOADERS = {"from_pretrained", "from_config", "load_dataset", "get_config", "pipeline", "for_model"}
ENGINES = {"LLM", "EngineArgs", "AsyncEngineArgs", "VLLM", "HFLM"}
"""They take what `vllm_arguments` has made."""
WITHOUT_CODE = {
    "PeftModel.from_pretrained",  # reads an adapter that this program has written
    "GenerationConfig.from_pretrained",  # reads values, and would take the option for another of them
}
OPTION = "trust_remote_code"


def programs() -> Iterator[Path]:
    for folder in ("images", "operator", "examples"):
        yield from (ROOT / folder).rglob("*.py")


def name_of(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def refuses(call: ast.Call) -> bool:
    said = {keyword.arg: keyword.value for keyword in call.keywords}
    if None in said and name_of(call) in ENGINES:
        return ast.unparse(said[None]) == "arguments"
    if ast.unparse(call.func) in WITHOUT_CODE:
        return True
    option = said.get(OPTION)
    return isinstance(option, ast.Constant) and option.value is False


def test_every_loader_of_configs_tokenizers_models_and_data_says_that_no_code_is_run():
    calls = [
        (f"{path.name}:{node.lineno}", node)
        for path in programs()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and name_of(node) in LOADERS | ENGINES
    ]
    assert len(calls) >= 10
    assert [where for where, call in calls if not refuses(call)] == []


def test_nothing_says_that_code_may_be_run():
    options = [
        (path.name, ast.unparse(value))
        for path in programs()
        for node in ast.walk(ast.parse(path.read_text()))
        for value in values_of(node)
    ]
    assert options
    assert {value for _, value in options} == {"False"}


def values_of(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.keyword) and node.arg == OPTION:
        yield node.value
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        yield from (value for key, value in pairs if isinstance(key, ast.Constant) and key.value == OPTION)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")  # vLLM warns about itself while it is imported
def test_vllm_and_lm_eval_are_told_so_too():
    assert vllm_arguments(Path("m"), Engine())[OPTION] is False


@pytest.fixture
def willing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody at the terminal who says yes to whatever transformers asks."""
    monkeypatch.setattr("builtins.input", lambda _="": "y")


def with_code(folder: Path, file: str, **changes: object) -> Path:
    """The tiny model, with code of its own that one of its files asks for; it would leave a file when it ran."""
    tiny.make(folder)
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nclass Own: pass\n")
    known = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(known | changes))
    return folder


CONFIG = {"model_type": "own", "architectures": ["Own"], "auto_map": {"AutoConfig": "code.Own"}}
TOKENIZER = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}}


@pytest.mark.usefixtures("willing")
@pytest.mark.parametrize("where", ["spec.student", "spec.teacher"])
@pytest.mark.parametrize(
    ("what", "file", "changes"),
    [("config", "config.json", CONFIG), ("tokenizer", "tokenizer_config.json", TOKENIZER)],
)
def test_a_model_that_needs_its_own_code_is_refused_by_name(storage, tmp_path, what, file, changes, where):
    folder = with_code(tmp_path / "model", file, **changes)
    made = context(storage, prepare_work(folder, "s3://data/p.jsonl"), tmp_path)
    with pytest.raises(UserError) as caught:
        prepare.check_model(made, Model(name=str(folder)), Engine(), where, Chat())
    told = f"the {what} of the model {folder} needs code from the model's own repository, which is never run"
    assert caught.value.message == told
    assert caught.value.hint.startswith(f"Set {where}.model to a model whose architecture")
    assert not (folder / "ran").exists()


@pytest.mark.usefixtures("willing")
def test_code_is_not_run_where_a_model_can_do_without_it(tmp_path):
    folder = with_code(tmp_path / "model", "config.json", auto_map={"AutoConfig": "code.Own"})
    assert fit.read_config(folder, Model(name=str(folder)), "spec.student").model_type == "llama"
    assert not (folder / "ran").exists()


def test_another_fault_of_a_config_is_told_in_its_own_words(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        fit.read_config(tmp_path, Model(name="m"), "spec.student")
    assert caught.value.hint == "Correct spec.student.model: its config must load in transformers."
