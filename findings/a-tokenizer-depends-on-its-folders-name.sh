#!/usr/bin/env bash
# transformers 5.19 makes most tokenizers anew, from the vocabulary of tokenizer.json and the rules of the class that
# tokenizer_config.json names, also where tokenizer.json has other rules. A byte-level BPE whose settings name
# LlamaTokenizer, as several published checkpoints do, then loses every blank. transformers knows some of these
# checkpoints by the name they are loaded under, and runs their tokenizer.json as it is: the same files in a folder
# deepseek-ai/DeepSeek-R1-Distill-Llama-8B give the right ids, in a folder of another name wrong ones. Nothing is said.
# Exits 0 while the same files have different ids under two names.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.19.0 tokenizers==0.23.3 2>/dev/null
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON' 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
import importlib.metadata
import json
import pathlib
import shutil

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

TEXT = "How many apples are left? Ann has 12."
whole = Tokenizer(models.BPE())
whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
whole.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
whole.train_from_iterator([TEXT] * 3, trainer)
known = pathlib.Path("deepseek-ai/DeepSeek-R1-Distill-Llama-8B")
known.mkdir(parents=True)
whole.save(str(known / "tokenizer.json"))
(known / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
(known / "config.json").write_text(json.dumps({"model_type": "llama"}))
shutil.copytree(known, "snapshot")
for name in ("transformers", "tokenizers"):
    print(name, importlib.metadata.version(name))
right = whole.encode(TEXT).ids
said = {}
for name in (str(known), "snapshot"):
    tokenizer = AutoTokenizer.from_pretrained(name)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    said[name] = (ids == right, tokenizer.decode(ids))
    print(f"{name}: {type(tokenizer).__name__}, ids of tokenizer.json: {ids == right}, decoded: {said[name][1]!r}")
assert said[str(known)] == (True, TEXT), "the known name no longer helps"
assert said["snapshot"][0] is False, "the other name is right now"
PYTHON
