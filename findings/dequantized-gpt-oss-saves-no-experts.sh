#!/usr/bin/env bash
# A gpt-oss as its maker stores it has its experts in MXFP4. transformers 5.19.0 loads it as plain numbers
# (Mxfp4Config(dequantize=True), or by itself where MXFP4 does not run), and such a model can be trained. When it is
# saved, the experts of all layers get the same two names, "gate_up_proj$" and "down_proj$": the pattern by which they
# were found while loading. Nothing reads these, and each layer overwrites the one before. The saved model loads with a
# report on the terminal and no error, and its experts are random. With `model._weight_conversions = None` before
# save_pretrained it is whole.
# Exits 0 while the saved model lacks its experts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.19.0 safetensors==0.8.0 numpy==2.4.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, Mxfp4Config

config = GptOssConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, num_local_experts=4, num_experts_per_tok=2,
)
AutoModelForCausalLM.from_config(config).save_pretrained("stored")
weights = load_file("stored/model.safetensors")
for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
    experts, inputs, outputs = weights.pop(name).shape
    weights[f"{name}_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
    weights[f"{name}_scales"] = torch.full((experts, outputs, inputs // 32), 120, dtype=torch.uint8)
save_file(weights, "stored/model.safetensors", metadata={"format": "pt"})
path = Path("stored/config.json")
path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}))


def saved(folder: str, **changes: object) -> tuple[set[str], bool]:
    """The names of the saved experts, and whether the saved model is the one in memory."""
    model = AutoModelForCausalLM.from_pretrained("stored", quantization_config=Mxfp4Config(dequantize=True))
    for name, value in changes.items():
        setattr(model, name, value)
    model.save_pretrained(folder)
    again = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    names = {name for name in load_file(f"{folder}/model.safetensors") if "_proj" in name and "attn" not in name}
    return names, all(torch.equal(again[name], one.to(again[name].dtype)) for name, one in model.named_parameters())


names, same = saved("again")
print("saved experts:", sorted(names), "the same model:", same)
assert {"gate_up_proj$", "down_proj$"} <= names and not same, "transformers saves them now"
names, same = saved("whole", _weight_conversions=None)
print("without the conversions:", len(names), "tensors of experts, the same model:", same)
assert same
PYTHON
