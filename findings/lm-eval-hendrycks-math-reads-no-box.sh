#!/usr/bin/env bash
# lm-eval 0.4.13: the task hendrycks_math takes an output's answer from between its first and last dollar sign, or all of
# the output where there are not two; a box in it is not looked for. The reference is the last box of the solution. So
# an output that is the reference solution, or one sentence with the right value in a box, is graded wrong. The task
# aime, whose comparison of two texts is the same, takes the last box and grades both right.
# Exits 0 while the two tasks disagree on these outputs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 2>/dev/null
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps lm_eval==0.4.13 2>/dev/null
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON' 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
import importlib.metadata
import importlib.util
import pathlib
import sysconfig

print("lm_eval", importlib.metadata.version("lm_eval"))
tasks = pathlib.Path(sysconfig.get_path("purelib"), "lm_eval", "tasks")
solution = r"Twice $3$ and $1$ more is $2 \cdot 3 + 1 = \boxed{7}$."
outputs = {"the solution itself": solution, "a sentence": r"So the answer is \boxed{7}.", "the bare value": "$7$"}
grades = {}
for task, document in (("hendrycks_math", {"solution": solution}), ("aime", {"Answer": "7"})):
    spec = importlib.util.spec_from_file_location(task, tasks / task / "utils.py")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    for name, output in outputs.items():
        grades[task, name] = utils.process_results(document, [output])["exact_match"]
        print(f"{task:15} {name:20} {grades[task, name]}")
assert [grades["hendrycks_math", name] for name in outputs] == [0, 0, 1]
assert [grades["aime", name] for name in outputs] == [1, 1, 1]
PYTHON
