"""A trained model as files that transformers and vLLM read, and a trial of that before anything is trained.

transformers 5.19 loads what it refuses to save: a generation_config.json with a temperature and without `do_sample`
loads with a warning, and save_pretrained raises. So `write` mends what can be mended, and `try_export` writes all of
the student but its weights while a refusal costs nothing.
"""

import json
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from cgd_stages.chat.template import ChatTemplate
from cgd_stages.chat.tokenizer import agree, load_tokenizer, store_tokenizer
from cgd_stages.errors import UserError
from cgd_stages.models import resolve
from cgd_stages.models.fit import MXFP4, quantization

log = logging.getLogger(__name__)

FILE_SIZE = "5GB"
"""The largest file of a trained model (transformers: 50GB). The other pods give up the first one when it has stored no
file for 10 minutes, see `train.SILENT_SECONDS`."""
_REFUSED = re.compile(r"^- `(\w+)`:", re.MULTILINE)
"""The fields that a strict check of a generation config names."""
_SAMPLING = {"temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff"}
_ODD = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError),
    *(ValueError, StrictDataclassError),
)
"""Errors of transformers, torch and huggingface_hub for a config with unexpected values: torch asserts that a token for
padding is in the vocabulary; transformers imports the attention that a config.json names."""


def write(
    model: Any,
    target: Path,
    *,
    source: Path,
    name: str,
    dtype: str,
    template: str | None,
    state: dict[str, Any] | None = None,
) -> None:
    """Write a model of transformers into a folder of its own. `source`: the folder of the student that it was trained
    from, whose tokenizer it has; `name`: the student's; `dtype`: that of the stored tensors; `template`: the chat
    template that the run has set in place of the student's; `state`: the tensors, by default the model's."""
    shutil.rmtree(target, ignore_errors=True)
    if model.can_generate():
        mend_generation(model.generation_config)
    model.save_pretrained(target, state_dict=state, max_shard_size=FILE_SIZE)
    config = target / "config.json"
    fields = json.loads(config.read_text()) | {"dtype": dtype}  # transformers writes that of the training
    fields.pop("auto_map", None)  # no code is stored
    config.write_text(json.dumps(fields, indent=2))
    store_tokenizer(source, target, name=name, template=template)


def tensors_of(model: Any) -> dict[str, Any]:
    """The parameters and buffers that are stored of a model, by name: tied ones once, under the name that transformers
    keeps."""
    stored = model.state_dict().keys()
    return dict(model.named_parameters()) | {name: buffer for name, buffer in model.named_buffers() if name in stored}


def whole(model: Any, state: dict[str, Any]) -> int:
    """The elements of all tensors but those that the architecture never stores."""
    left_out = set(model._keys_to_ignore_on_save or ())
    return sum(tensor.numel() for name, tensor in state.items() if name not in left_out)


def stored_elements(folder: Path) -> int:
    """The elements of all tensors in a folder's safetensors."""
    from safetensors import safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def mend_generation(config: Any) -> None:
    """Make a generation config such that transformers saves it. Sampling is switched on where values of it are given
    and nothing says whether to sample; other values that have no effect are taken out. Raises ValueError for the rest.
    """
    refused = _refused(config)
    if refused & _SAMPLING and config.do_sample is None and config.temperature != 0:
        log.warning("generation_config.json gives %s: do_sample is stored with it", ", ".join(sorted(refused)))
        config.do_sample = True
        refused = _refused(config)
    for field in sorted(refused):
        log.warning("%s %r of generation_config.json has no effect, and is left out", field, getattr(config, field))
        setattr(config, field, None)
    config.validate(strict=True)


def _refused(config: Any) -> set[str]:
    """The fields without an effect, for which transformers does not save the config."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        if refused := set(_REFUSED.findall(str(error))):
            return refused
        raise
    return set()


def try_export(
    folder: Path, config: Any, template: ChatTemplate, stored: Sequence[resolve.Tensor] | None = None
) -> None:
    """Write all of a student but its weights, as a training writes it at its end, and load that again.

    `folder` has the student's small files; `stored`: the tensors in its large ones, None where nobody knows. Raises
    UserError for what could not be stored after the training, or would be read otherwise, and for weights that are not
    those of the config.
    """
    with tempfile.TemporaryDirectory(prefix="export-") as scratch:
        target = Path(scratch, "model")
        try:
            model = _without_weights(folder, config)
            if stored and quantization(config) is None and (unlike := _unlike(model, stored)):
                raise UserError(
                    f"the weights of the student {template.name} are not those that its config.json describes: "
                    f"{unlike}",
                    hint="Take a spec.student.model whose config.json and safetensors belong together.",
                )
            write(
                model,
                target,
                source=folder,
                name=template.name,
                dtype=str(model.dtype).removeprefix("torch."),
                template=template.chat.template,
                state={},
            )
            lost = _lost_elements(model)
            _load_again(target, template)
        except _ODD as error:
            raise _unstorable(template.name, f"{type(error).__name__}: {error}") from error
        if lost:
            raise _unstorable(template.name, f"transformers would leave out {lost} of its elements")


def _unlike(model: Any, stored: Sequence[resolve.Tensor]) -> str:
    """How the tensors of a student's files differ from its config's, in words; empty where all of these are there.

    transformers 5.19 starts a parameter that is missing from random numbers, with a line in the log, and raises
    RuntimeError for one of another size. Parts that it joins or splits have other names there, so elements are counted.
    """
    held = {tensor.name: tensor for tensor in stored}
    own = dict(model.named_parameters())
    for name, parameter in own.items():
        if name in held and held[name].parameters != parameter.numel():
            return f"{name} has the shape {list(held[name].shape)}, and should have {list(parameter.shape)}"
    needed, found = whole(model, own), sum(tensor.parameters for tensor in stored)
    if found >= needed:
        return ""
    lacking = next((name for name in own if name not in held), "")
    return f"they have {found:,} of {needed:,} elements{f', and none are called {lacking}' if lacking else ''}"


def _unstorable(name: str, why: str) -> UserError:
    return UserError(
        f"the student {name} could not be stored after its training: {why}",
        hint="Mend the file of the model that the message names (config.json, generation_config.json or the "
        "tokenizer's), or take another spec.student.model.",
    )


def _without_weights(folder: Path, config: Any) -> Any:
    """The model of a config, with tensors that have shapes and no content."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = deepcopy(config)
    if quantization(config) == MXFP4:
        del config.quantization_config  # the training undoes it
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if model.can_generate():
        try:  # as from_pretrained finds it
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except OSError:
            model.generation_config = GenerationConfig.from_pretrained(
                folder, config_file_name="config.json", _from_model_config=True
            )
    return model


def _lost_elements(model: Any) -> int:
    """How many elements of the model's tensors transformers does not write: by its own functions, on shapes alone."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    left_out = set(model._keys_to_ignore_on_save or ())
    state = {name: tensor.detach() for name, tensor in tensors_of(model).items() if name not in left_out}
    written = revert_weight_conversion(model, remove_tied_weights_from_state_dict(dict(state), model))
    return whole(model, state) - whole(model, written)


def _load_again(target: Path, template: ChatTemplate) -> None:
    """Load what is written. Raises UserError where the tokenizer is not the student's."""
    from transformers import AutoConfig, GenerationConfig

    AutoConfig.from_pretrained(target, trust_remote_code=False)
    if (target / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(target)
    stored, own = load_tokenizer(target, template.name), template.tokenizer
    by_class = stored.mended and (stored.folder / "config.json").is_file()  # without: no class would be right
    if by_class or not agree(stored.tokenizer, own):
        raise _unstorable(template.name, "its tokenizer would give other ids")
    if set(stored.tokenizer.all_special_tokens) != set(own.all_special_tokens):
        raise _unstorable(template.name, "its tokenizer would have other special tokens")
