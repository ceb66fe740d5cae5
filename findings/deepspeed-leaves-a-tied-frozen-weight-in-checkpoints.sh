#!/usr/bin/env bash
# save_checkpoint(exclude_frozen_parameters=True) of DeepSpeed 0.19.8 is there for trainings of adapters, whose checkpoints
# need not hold the frozen model. Where two modules share a weight (output layer and embeddings of most small language
# models) the frozen weight is in the checkpoint all the same: DeepSpeed takes the names to leave out from
# named_parameters(), which has each shared weight once, and state_dict() has it under both names.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip --disable-pip-version-check --quiet)
"${pip[@]}" install torch==2.13.0 numpy==2.4.0 setuptools==80.9.0 wheel==0.45.1 ninja==1.13.0
DS_BUILD_OPS=0 "${pip[@]}" install --no-build-isolation deepspeed==0.19.8
export PATH="$folder/venv/bin:$PATH" DS_ACCELERATOR=cpu MASTER_ADDR=127.0.0.1 MASTER_PORT=29518 RANK=0 LOCAL_RANK=0 WORLD_SIZE=1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON' 2>&1 | grep -v -e '\[INFO\]' -e '\[WARNING\]' -e '^$'
import deepspeed
import torch
from torch import nn

deepspeed.init_distributed("gloo")
settings = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True}},
}
print("deepspeed", deepspeed.__version__, "torch", torch.__version__)
for tied in (False, True):
    model = nn.ModuleDict({"embeddings": nn.Embedding(1000, 64), "adapter": nn.Linear(64, 64), "head": nn.Linear(64, 1000, bias=False)})
    if tied:
        model["head"].weight = model["embeddings"].weight
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith("adapter")
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=learned, config=settings)
    engine.save_checkpoint("checkpoint", tag=str(tied), exclude_frozen_parameters=True)
    stored = torch.load(f"checkpoint/{tied}/mp_rank_00_model_states.pt", weights_only=False)["module"]
    print("tied:" if tied else "apart:", {name: tuple(tensor.shape) for name, tensor in stored.items()})
    assert ("head.weight" in stored) is tied
PYTHON
