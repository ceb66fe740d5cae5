"""What a student loads with is written again: tried before a training, and mended where that is possible."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import families, tiny
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma3Config, GenerationConfig, Mistral3Config

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.contract import Chat, Model
from cgd_stages.errors import UserError
from cgd_stages.models import export, resolve
from cgd_stages.models.export import mend_generation, try_export

GENERATIONS = {
    "a temperature alone": ({"temperature": 0.6}, {"temperature": 0.6, "do_sample": True}),
    "all of sampling": (
        {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1},
        {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "do_sample": True},
    ),
    "greedy, and values": ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"do_sample": False}),
    "temperature 0": ({"temperature": 0.0, "top_p": 0.9}, {}),
    "beams": ({"early_stopping": True, "length_penalty": 2.0}, {}),
    "no padding": ({"pad_token_id": -1}, {}),
    "more output": ({"output_scores": True, "temperature": 0.5}, {"temperature": 0.5, "do_sample": True}),
    "right as it is": ({"do_sample": True, "temperature": 0.6}, {"do_sample": True, "temperature": 0.6}),
}
FIELDS = {field for pair in GENERATIONS.values() for values in pair for field in values}


def student(folder: Path, generation: dict[str, Any] | None = None, **config: Any) -> Path:
    """The tiny model with this generation config, and with these fields in its config."""
    model = tiny.make(folder)
    if generation is not None:
        (model / "generation_config.json").write_text(json.dumps(generation))
    tiny.change(model / "config.json", **config)
    return model


def tried(model: Path, **chat: Any) -> None:
    try_export(model, AutoConfig.from_pretrained(model), ChatTemplate.load(model, Chat(**chat), name="team/model"))


@pytest.mark.parametrize("case", GENERATIONS)
def test_a_generation_config_that_loads_is_saved_with_what_it_means(case: str, tmp_path: Path) -> None:
    given, kept = GENERATIONS[case]
    loaded = GenerationConfig.from_pretrained(student(tmp_path / "model", given))
    if case != "right as it is":
        with pytest.raises(ValueError, match="GenerationConfig is invalid"):
            loaded.save_pretrained(tmp_path / "refused")
    mend_generation(loaded)
    loaded.save_pretrained(tmp_path / "stored")
    again = GenerationConfig.from_pretrained(tmp_path / "stored")
    assert {field: value for field in FIELDS if (value := getattr(again, field)) is not None} == kept


@pytest.mark.parametrize("case", GENERATIONS)
def test_such_a_student_is_not_refused(case: str, tmp_path: Path) -> None:
    tried(student(tmp_path / "model", GENERATIONS[case][0]))


def test_values_of_sampling_in_an_old_config_are_saved_too(tmp_path: Path) -> None:
    """Models of 2023 have them in config.json, and no generation_config.json."""
    model = student(tmp_path / "model", temperature=0.7)
    (model / "generation_config.json").unlink()
    tried(model)


@pytest.mark.parametrize(
    ("generation", "message"),
    [({"max_new_tokens": 0}, "max_new_tokens"), ({"cache_implementation": "none"}, "cache_implementation")],
)
def test_what_transformers_neither_saves_nor_loads_is_refused_by_name(tmp_path, generation, message):
    with pytest.raises(UserError, match=rf"team/model could not be stored after its training: .*{message}") as raised:
        tried(student(tmp_path / "model", generation))
    assert "generation_config.json" in raised.value.hint


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_can_be_stored(family: str, tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    families.config_of(family).save_pretrained(model)
    tried(model)


PICTURES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURES |= {"image_size": 28, "patch_size": 14}


def sees(config: type, folder: Path, **changes: Any) -> Path:
    """The tiny model's files beside the config of a model of pictures and texts."""
    model = tiny.make(folder)
    text = families.SHARED | {"vocab_size": 512} | changes
    config(text_config=text, vision_config=PICTURES, pad_token_id=0, eos_token_id=2).save_pretrained(model)
    (model / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    return model


def test_a_model_of_pictures_and_texts_keeps_the_file_of_its_pictures(tmp_path: Path) -> None:
    """vLLM and transformers load no such model without it."""
    source = sees(Gemma3Config, tmp_path / "gemma", sliding_window=32)
    tried(source)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    export.write(model, tmp_path / "stored", source=source, name="team/model", dtype="float32", template=None)
    kept = tmp_path / "stored" / "preprocessor_config.json"
    assert kept.read_bytes() == (source / "preprocessor_config.json").read_bytes()


def test_of_a_model_that_is_stored_without_its_pictures_no_such_file_is_kept(tmp_path: Path) -> None:
    source = student(tmp_path / "model")
    (source / "preprocessor_config.json").write_text("{}")
    model = AutoModelForCausalLM.from_pretrained(source)
    export.write(model, tmp_path / "stored", source=source, name="team/model", dtype="float32", template=None)
    assert not (tmp_path / "stored" / "preprocessor_config.json").exists()


def test_a_type_of_which_transformers_has_no_language_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="team/model is of the type mistral3, which transformers does not load"
    ) as raised:
        tried(sees(Mistral3Config, tmp_path / "model", model_type="mistral"))
    assert "spec.student.model" in raised.value.hint


def test_gpt_oss_as_its_maker_stores_it_can_be_stored(tmp_path: Path) -> None:
    model, _ = families.make_mxfp4(tmp_path / "model")
    tried(model)


def test_tied_embeddings_are_whole_when_they_are_stored_once(tmp_path: Path) -> None:
    tried(student(tmp_path / "model", tie_word_embeddings=True))


def test_a_student_that_would_be_stored_in_part_is_refused(tiny_model, monkeypatch):
    """A version of transformers whose way back to a stored name loses tensors."""
    from transformers import core_model_loading

    monkeypatch.setattr(
        core_model_loading, "revert_weight_conversion", lambda model, state: dict(list(state.items())[1:])
    )
    with pytest.raises(UserError, match=r"team/model could not be stored .* leave out \d+ of its elements"):
        tried(tiny_model)


def tried_with_weights(model: Path) -> None:
    stored = resolve.tensors(Model(name=str(model)), None, model.parent)  # type: ignore[arg-type]
    assert stored
    try_export(model, AutoConfig.from_pretrained(model), ChatTemplate.load(model, Chat(), name="team/model"), stored)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"num_hidden_layers": 3},
            r"they have 147,776 of 188,864 elements, and none are called model\.layers\.2\.self",
        ),
        ({"vocab_size": 600}, r"model\.embed_tokens\.weight has the shape \[512, 64\], and should have \[600, 64\]"),
        ({"attention_bias": True}, r"none are called model\.layers\.0\.self_attn\.q_proj\.bias"),
    ],
)
def test_a_student_whose_weights_are_not_those_of_its_config_is_refused(tmp_path, config, message):
    """transformers would begin the missing ones with random numbers, or raise RuntimeError on a GPU."""
    with pytest.raises(UserError, match=f"weights of the student team/model are not those .*: .*{message}") as raised:
        tried_with_weights(student(tmp_path / "model", **config))
    assert "belong together" in raised.value.hint


def test_weights_with_more_than_the_config_needs_are_taken(tmp_path: Path) -> None:
    """Layers for drafts, buffers of earlier versions, and an output layer that the config ties."""
    tried_with_weights(student(tmp_path / "fewer", num_hidden_layers=1))
    tried_with_weights(student(tmp_path / "tied", tie_word_embeddings=True))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_has_the_weights_of_its_config(family: str, tmp_path: Path) -> None:
    """Mixtures are stored under other names than those of the model in memory."""
    tried_with_weights(families.make(tmp_path / "model", family))


def test_a_written_model_loads_with_its_tensors_and_names_no_code(tmp_path: Path) -> None:
    source = student(tmp_path / "source", {"temperature": 0.6}, auto_map={"AutoConfig": "code.Own"})
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False)
    target = tmp_path / "stored"
    export.write(model, target, source=source, name="team/model", dtype="float32", template=None)
    assert "auto_map" not in json.loads((target / "config.json").read_text())
    assert export.stored_elements(target) == export.whole(model, export.tensors_of(model))
    again = dict(AutoModelForCausalLM.from_pretrained(target).named_parameters())
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.named_parameters())
    assert AutoTokenizer.from_pretrained(target).chat_template == tiny.TEMPLATE


def test_more_special_tokens_stay_special(tmp_path: Path) -> None:
    """Where there is no tokenizer.json to keep, transformers writes the tokenizer."""
    model = student(tmp_path / "model")
    Tokenizer.from_file(str(model / "tokenizer.json")).model.save(str(model))
    (model / "tokenizer.json").unlink()
    tiny.change(model / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", extra_special_tokens=["<|call|>"])
    assert "<|call|>" in AutoTokenizer.from_pretrained(model).all_special_tokens
    tried(model)


@pytest.mark.parametrize(
    ("field", "token", "message"),
    [("eos_token", None, "other special tokens"), ("tokenizer_class", "LlamaTokenizer", "other ids")],
)
def test_a_tokenizer_that_would_be_read_otherwise_is_refused(tiny_model, monkeypatch, field, token, message):
    """A version of transformers, or of our own code, that writes the settings otherwise."""
    store = export.store_tokenizer

    def stored_otherwise(folder: Path, target: Path, **given: Any) -> None:
        store(folder, target, **given)
        tiny.change(target / "tokenizer_config.json", **{field: token})

    monkeypatch.setattr(export, "store_tokenizer", stored_otherwise)
    with pytest.raises(UserError, match=f"team/model could not be stored .* {message}"):
        tried(tiny_model)


def test_a_model_whose_type_decides_the_tokenizers_class_is_stored(tmp_path: Path) -> None:
    """It has other ids where transformers loads it by its type, as the student itself has."""
    model = tiny.misnamed(tmp_path / "model")
    tiny.change(model / "config.json", model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    tried(model)


def test_the_template_of_the_run_is_stored_with_the_model(tiny_model: Path) -> None:
    tried(tiny_model, template=tiny.TEMPLATE.replace("<|im_end|>\n", "<|im_end|>\n\n"))


def test_the_trial_needs_no_weights_and_leaves_the_config_alone(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "model.safetensors").unlink()
    config = AutoConfig.from_pretrained(model)
    before = config.to_dict()
    try_export(model, config, ChatTemplate.load(model, name="team/model"))
    assert config.to_dict() == before
    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(model)


@pytest.mark.parametrize("field", ["pad_token_id", "_attn_implementation"])
def test_what_fails_with_another_kind_of_error_is_refused_too(tmp_path: Path, field: str) -> None:
    """torch asserts that a token is in the vocabulary; transformers imports the attention that is named."""
    value = {"pad_token_id": 99999, "_attn_implementation": "flash_attention_3"}[field]
    with pytest.raises(UserError, match=r"team/model could not be stored after its training: (Assertion|Import)Error"):
        tried(student(tmp_path / "model", **{field: value}))
