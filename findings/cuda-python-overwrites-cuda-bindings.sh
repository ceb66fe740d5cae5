#!/usr/bin/env bash
# A constraint that only asks for a new enough cuda-python (cuda-python>=12.0, as FlashInfer 0.7 does) is met by
# cuda-python 12.6.2.post1 beside cuda-bindings 13: an old wheel that depends on nothing and brings files of its own into
# cuda/bindings. Resolvers fall back to it whenever no cuda-python matches the newest cuda-bindings. Whoever is written
# last wins: `import cuda.bindings` is CUDA 12's, while the metadata say 13.5.0 and every check of dependencies passes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet cuda-bindings==13.5.0 cuda-pathfinder==1.9.0
"${pip[@]}" install --quiet cuda-python==12.6.2.post1
"${pip[@]}" list
"${pip[@]}" check
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import files, requires, version

import cuda.bindings
from cuda.bindings import driver

shared = {str(file) for file in files("cuda-bindings")} & {str(file) for file in files("cuda-python")}
print("cuda-python requires", requires("cuda-python"))
print(len(shared), "files belong to both packages")
print("metadata:", version("cuda-bindings"), " imported:", cuda.bindings.__version__, " CUDA", driver.CUDA_VERSION)
assert shared and version("cuda-bindings") == "13.5.0"
assert cuda.bindings.__version__.startswith("12.6") and driver.CUDA_VERSION == 12060
PYTHON
