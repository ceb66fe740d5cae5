"""Gradients of a global batch, as DeepSpeed would apply them, are those of a plain loop over its examples.

In float64 wherever DeepSpeed can hold it, so that nothing but the order of sums differs; transformers' norms and rotary
embeddings compute in float32 in both.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from support import families
from support.gradient_ranks import CASES
from support.stage_builders import RUN
from support.train_builders import places, train_work
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from cgd_stages.contract import Rows, Storage
from cgd_stages.models.mixture import router_weight
from cgd_stages.train.example_files import EXAMPLES_SCHEMA
from cgd_stages.training.job import EXAMPLES, HELD_OUT, JOB, Job

EXAMPLE_LENGTHS = [(90, 60), (9, 4), (33, 30), (12, 1), (64, 10)]
"""Tokens, and where the target starts: contexts and targets of very different lengths, as many as two ranks cannot
share evenly."""
TOLERANCES = {0: 1e-12, 2: 1e-6, 3: 2e-5}
"""ZeRO stage -> the largest difference, as a share of a parameter's largest gradient. ZeRO 2 sums and sends gradients
in float32; ZeRO 3 shards while it loads, so that the whole student is in float32. Measured: 6e-16, 1.3e-7, 2.9e-6."""


@pytest.fixture
def rows() -> list[tuple[list[int], int]]:
    dice = torch.Generator().manual_seed(4)
    return [(torch.randint(3, 250, (length,), generator=dice).tolist(), start) for length, start in EXAMPLE_LENGTHS]


def write_examples(path: Path, rows: list[tuple[list[int], int]]) -> None:
    records = [
        {"id": f"{at:020x}", "sample": 0, "input_ids": ids, "start": start} for at, (ids, start) in enumerate(rows)
    ]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, EXAMPLES_SCHEMA) as file:
        file.write(pa.RecordBatch.from_pylist(records, schema=EXAMPLES_SCHEMA))


def plain_gradients(
    model: Path, rows: list[tuple[list[int], int]], dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """One example at a time: no ranks, padding, packing, chunks or narrowed logits. A mixture's router learns too, as
    transformers says by itself."""
    student = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).train()
    learned, weight = sum(len(ids) - start for ids, start in rows), getattr(student, "router_aux_loss_coef", 0.0)
    for ids, start in rows:
        output = student(input_ids=torch.tensor([ids]), **({"output_router_logits": True} if weight else {}))
        logits = output.logits[0, start - 1 : -1]
        loss = cross_entropy(logits.double(), torch.tensor(ids[start:]), reduction="sum") / learned
        if weight:
            loss = loss + weight * output.aux_loss / len(rows)
        loss.backward()
    return {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("processes", [1, 2])
def test_gradients_are_those_of_a_plain_loop(
    tmp_path: Path, tiny_model: Path, rows: list[tuple[list[int], int]], processes: int
) -> None:
    write_examples(tmp_path / EXAMPLES, rows)
    for name in HELD_OUT.values():
        write_examples(tmp_path / name, [])
    cases = [{"zero_stage": stage, "packing": packing} for stage in TOLERANCES for packing in (False, True)]
    (tmp_path / CASES).write_text(json.dumps(cases))
    (tmp_path / JOB).write_text(job_of(tiny_model, processes, len(rows)).to_json())
    run_ranks(tmp_path, processes)

    expected = plain_gradients(tiny_model, rows)
    for number, case in enumerate(cases):
        found = torch.load(tmp_path / f"gradients-{number}.pt")
        assert found.keys() == expected.keys()
        far = {name: relative_distance(found[name], expected[name]) for name in expected}
        worst = max(far, key=lambda name: far[name])
        assert far[worst] < TOLERANCES[case["zero_stage"]], f"{case}: {worst} is {far[worst]:.1e} off"


FAMILY_TOLERANCE = 1e-5
"""In float32, because torch multiplies by experts in no larger dtype."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_gradients_of_every_family_are_those_of_a_plain_loop(tmp_path: Path, rows: list[tuple[list[int], int]]) -> None:
    """In two processes, at every stage of ZeRO that divides something else, packed where the family can be."""
    write_examples(tmp_path / EXAMPLES, rows)
    for name in HELD_OUT.values():
        write_examples(tmp_path / name, [])
    models = {family: families.make(tmp_path / family, family) for family in families.FAMILIES}
    cases = [(family, stage) for family in families.FAMILIES for stage in TOLERANCES]
    (tmp_path / CASES).write_text(
        json.dumps(
            [
                {
                    "student": str(models[family]),
                    "router_loss_weight": router_weight(families.config_of(family)),
                    "zero_stage": stage,
                    "packing": stage == 2 and family != "gpt-oss",
                }
                for family, stage in cases
            ]
        )
    )
    (tmp_path / JOB).write_text(job_of(models["Mixtral"], 2, len(rows)).to_json())
    run_ranks(tmp_path, 2, dtype="float32")

    far: dict[tuple[str, int], tuple[float, str]] = {}
    expected = {family: plain_gradients(model, rows, torch.float32) for family, model in models.items()}
    for number, (family, stage) in enumerate(cases):
        found = torch.load(tmp_path / f"gradients-{number}.pt")
        assert found.keys() == expected[family].keys()
        for name, gradient in expected[family].items():
            distance = relative_distance(found[name], gradient)
            far[family, stage] = max(far.get((family, stage), (0.0, "")), (distance, name))
    assert all(distance < FAMILY_TOLERANCE for distance, _ in far.values()), far


def job_of(model: Path, processes: int, examples: int) -> Job:
    """One step over all examples, in micro-batches of at most 100 tokens."""
    work = train_work(
        model, processes_per_worker=processes, global_batch_size=examples, epochs=1, max_sequence_length=100
    )
    return Job(
        run=RUN,
        stage="train-cgd",
        digest="none",
        storage=Storage(uri="s3://nowhere/at-all"),
        work=work,
        student=str(model),
        student_dtype="float32",
        first_rank=0,
        resume=0,
        rows=Rows(total=examples, done=examples),
    )


def run_ranks(folder: Path, processes: int, *, dtype: str = "float64") -> None:
    (place,) = places(1)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", place["PET_MASTER_PORT"], "-m", "support.gradient_ranks", str(folder), dtype]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-12000:]


def relative_distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
