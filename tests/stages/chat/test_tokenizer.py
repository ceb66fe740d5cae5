"""The tokenizer gives the ids of tokenizer.json, whatever class is named and whatever the folder is called, and is
stored such that it does so everywhere."""

import json
import shutil
from base64 import b64encode
from pathlib import Path

import pytest
from support import tiny
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, TokenizersBackend

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.chat.tokenizer import load_tokenizer, store_tokenizer
from cgd_stages.contract import Chat
from cgd_stages.errors import UserError

TEXT = "How many apples\n are  left?\tAnn has 12."
NAMES = ("snapshots/0f3a", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "deepseek-ai/deepseek-coder-6.7b")
"""transformers knows the mistake of the last two by their names, where they are the whole path."""


@pytest.fixture(scope="module")
def misnamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.misnamed(tmp_path_factory.mktemp("misnamed") / "model")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that relative paths begin at."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ids(tokenizer: object, text: str = TEXT) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    return found


def expected(folder: Path, text: str = TEXT) -> list[int]:
    return list(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_of_another_class_gives_the_ids_of_its_file_under_every_name(misnamed, places, name):
    shutil.copytree(misnamed, name)
    for path in (Path(name), places / name):
        tokenizer = ChatTemplate.load(path).tokenizer
        assert ids(tokenizer) == expected(misnamed)
        assert tokenizer.decode(ids(tokenizer)) == TEXT


def test_by_the_class_it_loses_every_blank(misnamed):
    """What transformers 5.19 does, and why there is a loader of our own."""
    named = AutoTokenizer.from_pretrained(misnamed)
    assert type(named) is LlamaTokenizer
    assert named.decode(ids(named)) == "Howmanyapplesareleft?Annhas12."


@pytest.mark.parametrize("name", NAMES)
def test_it_is_stored_with_its_file_and_a_class_that_is_right_under_every_name(misnamed, places, name):
    target = Path(name)
    target.mkdir(parents=True)
    shutil.copyfile(misnamed / "config.json", target / "config.json")
    store_tokenizer(misnamed, target, name="team/model")
    assert (target / "tokenizer.json").read_bytes() == (misnamed / "tokenizer.json").read_bytes()
    for path in (target, places / name):
        stored = AutoTokenizer.from_pretrained(path)
        assert ids(stored) == expected(misnamed)
        assert (stored.eos_token, stored.pad_token) == (tiny.END, tiny.PAD)
        assert stored.chat_template == tiny.TEMPLATE
    assert not load_tokenizer(target, "team/model").mended


def test_a_name_that_transformers_knows_does_not_hide_the_mistake(misnamed, places):
    """What is stored has another name."""
    source = shutil.copytree(misnamed, NAMES[1])
    assert type(AutoTokenizer.from_pretrained(source)) is TokenizersBackend
    shutil.copytree(misnamed, "stored", ignore=shutil.ignore_patterns("tokenizer*"))
    store_tokenizer(Path(source), Path("stored"), name="team/model")
    assert ids(AutoTokenizer.from_pretrained("stored")) == expected(misnamed)


def test_only_such_a_tokenizer_enters_the_digests(misnamed, tiny_model, tmp_path):
    """Rows that were made with the ids of the class are not found again; all others are."""
    assert ChatTemplate.load(misnamed).identity() == {"tokenizer": {"rules": "tokenizer.json"}}
    assert ChatTemplate.load(tiny_model).identity() == {}
    alike = shutil.copytree(tiny_model, tmp_path / "alike")
    tiny.change(alike / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")  # states the rules of the file
    assert type(AutoTokenizer.from_pretrained(alike)) is not TokenizersBackend
    assert ChatTemplate.load(alike).identity() == {}


def test_a_step_that_the_class_leaves_out_is_kept(tiny_model, tmp_path):
    """SmolLM2's file takes digits apart before the bytes; GPT2Tokenizer, which its settings name, does not."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    whole = Tokenizer.from_file(str(model / "tokenizer.json"))
    whole.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole.pre_tokenizer])
    whole.save(str(model / "tokenizer.json"))
    tiny.change(model / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    assert ids(AutoTokenizer.from_pretrained(model), "Ann has 12") != expected(model, "Ann has 12")
    assert ids(ChatTemplate.load(model).tokenizer, "Ann has 12") == expected(model, "Ann has 12")


def test_a_chat_without_thoughts_keeps_the_right_tokenizer(tmp_path):
    model = tiny.thinking(tmp_path / "model")
    tiny.change(model / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    thinking = ChatTemplate.load(model, Chat(thinking="on"))
    assert thinking.files is not None
    assert thinking.without_thoughts().files == thinking.files


def test_the_files_of_a_mended_tokenizer_last_as_long_as_it(misnamed):
    template = ChatTemplate.load(misnamed)
    files = template.files
    assert files is not None
    assert (files / "tokenizer.json").is_file()
    del template
    assert not files.exists()


def test_a_model_whose_type_decides_the_class_has_the_ids_of_its_file_too(misnamed, tmp_path):
    """For these types transformers takes the type's own class, whatever the settings say, where it sees the type."""
    model = shutil.copytree(misnamed, tmp_path / "model")
    tiny.change(model / "config.json", model_type="qwen2")
    template = ChatTemplate.load(model, name="team/model")
    assert template.files is not None
    for_vllm = AutoTokenizer.from_pretrained(template.files)
    assert ids(template.tokenizer) == ids(for_vllm) == expected(misnamed)
    assert ids(AutoTokenizer.from_pretrained(model)) != expected(misnamed)


def test_control_tokens_that_the_class_brings_along_stay(tmp_path):
    """LlamaTokenizer has </s> where nothing is said. A token that the vocabulary lacks, its <unk>, is not added."""
    model = tiny.misnamed(tmp_path / "model", eos_token=None)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(model / "tokenizer.json"))
    loaded = load_tokenizer(model, "team/model")
    assert loaded.mended
    assert loaded.tokenizer.eos_token == "</s>"
    assert len(loaded.tokenizer) == tokenizer.get_vocab_size(with_added_tokens=True)


def test_settings_that_change_the_rules_of_the_file_are_heard(tmp_path):
    """A tokenizer's settings may add tokens to those of its file."""
    added = {"600": {"content": "<|call|>", "special": True, "lstrip": False, "rstrip": True, "normalized": False}}
    model = tiny.misnamed(tmp_path / "model", added_tokens_decoder=added)
    tokenizer = load_tokenizer(model, "team/model").tokenizer
    assert tokenizer.convert_ids_to_tokens(ids(tokenizer, "a<|call|>b"))[1] == "<|call|>"


def test_a_template_of_the_run_is_stored_in_place_of_the_models_own(tiny_model, tmp_path):
    own = "{{ 'Q: ' + messages[0]['content'] }}"
    shutil.copyfile(tiny_model / "config.json", tmp_path / "config.json")
    store_tokenizer(tiny_model, tmp_path, name="team/model", template=own)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == own
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_a_template_in_a_processors_file_is_the_models_and_enters_its_digest(tmp_path):
    """Older models of pictures have it there. No tokenizer reads it, and they were asked in a plain frame."""
    model = tiny.make(tmp_path / "model", template=None)
    before = ChatTemplate.load(model)
    (model / "chat_template.json").write_text(json.dumps({"chat_template": tiny.TEMPLATE}))
    assert AutoTokenizer.from_pretrained(model).chat_template is None
    template = ChatTemplate.load(model)
    asked = [{"role": "user", "content": "2 + 2?"}]
    assert not before.templated
    assert template.render(asked).text == f"{tiny.START}user\n2 + 2?{tiny.END}\n{tiny.START}assistant\n"
    assert template.identity() != before.identity() == {}
    tiny.change(model / "tokenizer_config.json", chat_template="Note. " + tiny.TEMPLATE)
    assert ChatTemplate.load(model).render(asked).text.startswith("Note. ")


def tekken() -> dict[str, object]:
    """A tokenizer of bytes as mistral-common has it."""
    tokens = [
        {"rank": rank, "token_bytes": b64encode(bytes([rank])).decode(), "token_str": None} for rank in range(256)
    ]
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>"]
    config = {"pattern": r"\S+|\s+", "num_vocab_tokens": 256, "default_vocab_size": 262, "version": "v11"}
    controls = [{"rank": rank, "token_str": token, "is_control": True} for rank, token in enumerate(special)]
    return {"config": config | {"default_num_special_tokens": 6}, "vocab": tokens, "special_tokens": controls}


def test_a_model_whose_prompts_only_mistral_common_writes_is_refused_unless_a_template_is_given(tmp_path):
    model = tiny.make(tmp_path / "model", template=None)
    (model / "tekken.json").write_text(json.dumps(tekken()))
    assert not ChatTemplate.load(model).templated  # a base model
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"team/model has no chat template: its tekken\.json") as refused:
        ChatTemplate.load(model, name="team/model")
    assert "chat.template" in refused.value.hint
    assert ChatTemplate.load(model, Chat(template=tiny.TEMPLATE), name="team/model").templated


@pytest.mark.parametrize("listed", [True, False])
def test_several_templates_are_stored_without_a_folder(tiny_model, tmp_path, listed):
    """As Cohere's models have them. Programs that store a model store its files, and no folders."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    named = {"default": tiny.TEMPLATE, "rag": "{{ 'rag' }}"}
    if listed:
        given = [{"name": name, "template": text} for name, text in named.items()]
        tiny.change(model / "tokenizer_config.json", chat_template=given)
    else:
        (model / "additional_chat_templates").mkdir()
        (model / "additional_chat_templates/rag.jinja").write_text(named["rag"])
        (model / "chat_template.jinja").write_text(named["default"])
    assert AutoTokenizer.from_pretrained(model).chat_template == named
    (tmp_path / "stored").mkdir()
    shutil.copyfile(model / "config.json", tmp_path / "stored/config.json")
    store_tokenizer(model, tmp_path / "stored", name="team/model")
    assert all(path.is_file() for path in (tmp_path / "stored").iterdir())
    assert AutoTokenizer.from_pretrained(tmp_path / "stored").chat_template == named


def test_no_code_is_named_in_what_is_stored(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    tiny.change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Own", None]})
    store_tokenizer(model, tmp_path / "stored", name="team/model")
    assert "auto_map" not in (tmp_path / "stored/tokenizer_config.json").read_text()


def test_a_tokenizer_without_a_file_for_all_is_stored_with_one(tiny_model, tmp_path):
    """GPT-2's is a vocabulary and merges."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    Tokenizer.from_file(str(model / "tokenizer.json")).model.save(str(model))
    (model / "tokenizer.json").unlink()
    tiny.change(model / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    before = load_tokenizer(model, "team/model").tokenizer
    shutil.copytree(model, tmp_path / "stored", ignore=shutil.ignore_patterns("tokenizer*", "vocab*", "merges*"))
    store_tokenizer(model, tmp_path / "stored", name="team/model")
    assert ids(AutoTokenizer.from_pretrained(tmp_path / "stored")) == ids(before) == expected(tiny_model)


LOOSE = {"lstrip": True, "rstrip": True, "normalized": False, "single_word": False, "special": True}


@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
@pytest.mark.parametrize("override", ["split_special_tokens", "added_tokens_decoder"])
def test_settings_do_not_override_the_rules_of_the_files_own_tokens(tiny_model, tmp_path, named, override):
    """transformers 5.19 follows them under every class: no control token survives, or each takes the blanks around."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    end = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(tiny.END)
    value = True if override == "split_special_tokens" else {str(end): {"content": tiny.END, **LOOSE}}
    tiny.change(model / "tokenizer_config.json", tokenizer_class=named, **{override: value})
    text = f"Ann {tiny.END} has"
    assert ids(AutoTokenizer.from_pretrained(model), text) != expected(model, text)
    template = ChatTemplate.load(model, name="team/model")
    assert ids(template.tokenizer, text) == expected(model, text)
    assert template.identity() == {"tokenizer": {"rules": "tokenizer.json"}}
    store_tokenizer(model, tmp_path / "stored", name="team/model")
    shutil.copyfile(model / "config.json", tmp_path / "stored" / "config.json")
    assert ids(AutoTokenizer.from_pretrained(tmp_path / "stored"), text) == expected(model, text)


def test_settings_that_say_what_the_file_says_leave_the_tokenizer_alone(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    own = json.loads((model / "tokenizer.json").read_text())["added_tokens"]
    alike = {str(token.pop("id")): token for token in own}
    tiny.change(model / "tokenizer_config.json", added_tokens_decoder=alike, split_special_tokens=False)
    loaded = load_tokenizer(model, "team/model")
    assert (loaded.mended, loaded.folder) == (False, model)
