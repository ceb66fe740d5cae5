#!/usr/bin/env bash
# torch loads files as data alone by default since 2.6, and TORCH_FORCE_WEIGHTS_ONLY_LOAD=1 asks for it everywhere. DeepSpeed
# 0.19.8 asks for the opposite at each of its loads, and needs it: the optimizer's file of a checkpoint of ZeRO 2 holds
# objects of DeepSpeed's own classes. So with that variable a training cannot go on from its own checkpoint, until these
# classes are allowed by name: LossScaler (also in float32, where no loss is scaled), ZeroStageEnum and fragment_address.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip --disable-pip-version-check --quiet)
"${pip[@]}" install torch==2.13.0 numpy==2.4.0 setuptools==80.9.0 wheel==0.45.1 ninja==1.13.0
DS_BUILD_OPS=0 "${pip[@]}" install --no-build-isolation deepspeed==0.19.8
export PATH="$folder/venv/bin:$PATH" DS_ACCELERATOR=cpu MASTER_ADDR=127.0.0.1 MASTER_PORT=29517 RANK=0 LOCAL_RANK=0 WORLD_SIZE=1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON' 2>&1 | grep -v -e '\[INFO\]' -e '\[WARNING\]' -e '^$'
import os
import pickle

import deepspeed
import torch

deepspeed.init_distributed("gloo")
settings = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True}},
}
model = torch.nn.Linear(4, 1)
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
engine.backward(engine(torch.ones(2, 4)).sum())
engine.step()
engine.save_checkpoint("checkpoint", tag="step")
print("deepspeed", deepspeed.__version__, "torch", torch.__version__)

os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
needed = []
while True:
    try:
        with torch.serialization.safe_globals(needed):
            path, _ = engine.load_checkpoint("checkpoint", tag="step")
        break
    except pickle.UnpicklingError as error:
        name = str(error).split("GLOBAL ")[1].split()[0]
        print("refused:", name)
        module, _, attribute = name.rpartition(".")
        needed.append(getattr(__import__(module, fromlist=[attribute]), attribute))
print("loaded with", len(needed), "classes allowed")
assert sorted(one.__name__ for one in needed) == ["LossScaler", "ZeroStageEnum", "fragment_address"]
PYTHON
