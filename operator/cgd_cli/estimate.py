"""What a run will cost before it starts: tokens, GPU-hours and money, stage by stage. Pure; asks no network.

Tokens are rows times assumed lengths; a rejected row is not foreseen. A model of P parameters needs 2P FLOPs for a
token forward (Kaplan et al. 2020), 6P to learn from it, and 8P when activations are made again (Chowdhery et al. 2022).
Reading a prompt is bound by FLOP/s; writing by FLOP/s or, as long as few rows are in flight, by reading the weights
once a step for all of them (the roofline of Williams et al. 2009). What the KV cache costs to read is left out, so long
contexts take longer than this says.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from cgd_cli.extents import EXTENTS
from cgd_operator.api.generation import ServedModel
from cgd_operator.planning.dag import Child, Run, plan
from cgd_stages import contract
from cgd_stages.models.training_memory import Shape, states

SERVED_WIDTH = 2
"""Bytes of a weight that vLLM serves: bfloat16."""
READING, WRITING = 0.5, 0.6
"""Shares of peak FLOP/s and of peak bandwidth that engines reach."""
INSTRUCTION = 170
"""Tokens of the teacher's instruction."""
CHARACTERS = 4
"""Of a token, in English."""
RESERVED = 4e9
"""Bytes of a served GPU that hold neither weights nor cache: CUDA, graphs, activations."""


@dataclass(frozen=True)
class Gpu:
    """By its maker's data sheet: FLOP/s in bfloat16 (dense), bytes/s, bytes."""

    flops: float
    bandwidth: float
    memory: float


GPUS = {
    "a100-40gb": Gpu(312e12, 1555e9, 40e9),
    "a100-80gb": Gpu(312e12, 2039e9, 80e9),
    "h100-80gb": Gpu(989e12, 3350e9, 80e9),
    "h200": Gpu(989e12, 4800e9, 141e9),
    "l40s": Gpu(362e12, 864e9, 48e9),
}


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """All that a manifest does not say. Parameters of models; tokens of a text; prices in one currency."""

    rows: int
    student: float
    teacher: float
    gpu: Gpu
    gpu_hour: float = 2.5
    prompt: int = 200
    answer: int = 700
    critique: int = 500
    refinement: int = 800
    questions: int = 500
    """Of a benchmark that sets no limit."""
    in_flight: int = 256
    """Rows of an engine at a time."""
    mfu: float = 0.4
    """Share of peak FLOP/s that training reaches."""
    start_minutes: float = 5
    """Of every GPU pod, before its first token."""
    input_million: float = 0.0
    output_million: float = 0.0
    """Price of a million tokens at the teacher's endpoint."""


@dataclass(frozen=True)
class Cost:
    """Of one stage. Tokens are read and written; a training reads only. `gpus`: of all its pods."""

    stage: str
    rows: int
    read: int
    written: int
    gpus: int = 0
    seconds: float = 0.0
    money: float = 0.0

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.seconds / 3600


def costs(run: Run, given: Assumptions) -> list[Cost]:
    """Of every stage that generates or trains; a fused teacher's stages share its GPUs one after the other."""
    return [cost for child in plan(run) for cost in _child(child, given)]


@dataclass(frozen=True)
class Asked:
    """What a task of lm-eval asks a model: `requests` of so many tokens each; most are read, few are written."""

    task: str
    documents: int
    requests: int
    read: int
    written: int

    @property
    def tokens(self) -> tuple[int, int]:
        """Of all requests: read, written."""
        return self.requests * self.read, self.requests * self.written

    @property
    def text(self) -> str:
        of = f" ({self.documents} documents)" if self.requests != self.documents else ""
        return f"{self.task}: {self.requests} requests{of}, each {self.read} tokens read and {self.written} written"


def asked(task: contract.HarnessTask, given: Assumptions) -> Asked | None:
    """By the published extent of a known task. Of another one only its limit is known: it is taken for one part whose
    questions, answers and examples are as long as those of the run. None: nothing tells how many documents it has."""
    extent = EXTENTS.get(task.task)
    shots = task.few_shot or 0
    if extent is None:
        if task.limit is None:
            return None
        read = given.prompt + shots * (given.prompt + given.answer)
        return Asked(task.name, task.limit, task.limit, read, given.answer)
    documents = extent.documents(task.limit)
    read = math.ceil((extent.characters + shots * (extent.shot or extent.characters)) / CHARACTERS)
    return Asked(task.name, documents, documents * (extent.choices or 1), read, min(given.answer, extent.most))


def all_asked(work: contract.Harness, given: Assumptions) -> list[Asked]:
    """What is known of the tasks of a stage. Several metrics of one task are one question to the model."""
    once = {(task.task, task.few_shot, task.limit): task for task in reversed(work.tasks)}
    return [found for task in reversed(once.values()) if (found := asked(task, given))]


def harness_of(run: Run) -> contract.Harness | None:
    """What a run's models are asked by lm-eval, the same for each."""
    works = (child.task.work for child in plan(run))
    return next((work for work in works if isinstance(work, contract.Harness)), None)


def unpriced(run: Run, given: Assumptions) -> tuple[str, ...]:
    """Tasks of lm-eval that cannot be estimated."""
    work = harness_of(run)
    return tuple(task.name for task in work.tasks if asked(task, given) is None) if work else ()


def _child(child: Child, given: Assumptions) -> Iterator[Cost]:
    match child.task.work:
        case contract.Generate() as work:
            for role, sampling in zip(work.roles, work.sampling, strict=True):
                warm = role == "refine" and "critique" in work.roles
                read, written = _asked(role, given, sampling.max_tokens, warm=warm)
                parameters = given.student if role == "answer" else given.teacher
                yield _generated(child, role, given.rows, read, written, parameters, given, warm=warm)
        case contract.Train() as work:
            yield _trained(child, work, given)
        case contract.Evaluate() as work:
            outputs = sum((one.limit or one.questions or given.questions) * one.samples for one in work.benchmarks)
            answer, critique = (min(most, work.sampling.max_tokens) for most in (given.answer, given.critique))
            # A rival, if all its rounds are needed: a critique and an answer more, both of them with their context.
            rounds = work.rival.rounds if work.rival else 0
            written = answer + rounds * (critique + answer)
            read = given.prompt + rounds * (2 * (INSTRUCTION + given.prompt + answer) + critique)
            yield _generated(child, child.stage, outputs, read, written, given.student, given, warm=False)
        case contract.Harness() as work:
            known = all_asked(work, given)
            read, written = sum(one.tokens[0] for one in known), sum(one.tokens[1] for one in known)
            whole = Cost(child.stage, sum(one.documents for one in known), read, written)
            yield _served(whole, child, given.student, given)
        case _:
            return


def _asked(role: contract.Role, given: Assumptions, limit: int, *, warm: bool) -> tuple[int, int]:
    """Tokens of a row that are computed of the prompt, and written. Warm: the critique's prompt is in the cache."""
    answer, critique = given.answer, given.critique
    context = INSTRUCTION + given.prompt + answer
    read = {
        "answer": given.prompt,
        "distill": given.prompt,
        "critique": context,
        "refine": critique if warm else context + critique,
    }
    written = {"answer": answer, "distill": given.refinement, "critique": critique, "refine": given.refinement}
    return read[role], min(written[role], limit)


def _generated(
    child: Child, stage: str, rows: int, read: int, written: int, parameters: float, given: Assumptions, *, warm: bool
) -> Cost:
    whole = Cost(stage, rows, rows * read, rows * written)
    if not child.gpus:  # an endpoint's tokens
        money = whole.read / 1e6 * given.input_million + whole.written / 1e6 * given.output_million
        return Cost(stage, rows, whole.read, whole.written, money=money)
    return _served(whole, child, parameters, given, warm=warm)


def _served(whole: Cost, child: Child, parameters: float, given: Assumptions, *, warm: bool = False) -> Cost:
    """The tokens of a stage on its own GPUs. Warm: its engine is running already."""
    flops, bandwidth = child.gpus * given.gpu.flops, child.gpus * given.gpu.bandwidth
    for_flops = 2 * parameters / (READING * flops)
    for_weights = SERVED_WIDTH * parameters / (WRITING * bandwidth * given.in_flight)
    work = whole.read * for_flops + whole.written * max(for_flops, for_weights)
    seconds = work / child.pods + (0 if warm else 60 * given.start_minutes)
    return _paid(whole, child, seconds, given)


def _trained(child: Child, work: contract.Train, given: Assumptions) -> Cost:
    texts = {
        "CGD": INSTRUCTION + given.prompt + given.answer + given.critique + given.refinement,
        "CFT": INSTRUCTION + given.prompt + given.answer + given.critique,
        "SFT": given.prompt + given.refinement,
        "DistilledSFT": given.prompt + given.refinement,
        "RefinedSFT": given.prompt + given.refinement,
    }
    whole = Cost(child.stage, given.rows * work.epochs, given.rows * work.epochs * texts[work.objective], 0)
    per_token = (6 if work.activation_checkpointing == "never" else 8) * given.student
    speed = given.mfu * given.gpu.flops * max(1, child.pods * child.gpus)
    return _paid(whole, child, whole.read * per_token / speed + 60 * given.start_minutes, given)


def _paid(whole: Cost, child: Child, seconds: float, given: Assumptions) -> Cost:
    gpus = child.pods * child.gpus
    money = gpus * seconds / 3600 * given.gpu_hour
    return Cost(whole.stage, whole.rows, whole.read, whole.written, gpus, seconds, money)


@dataclass(frozen=True)
class Fit:
    """Whether what a pool must hold fits into a GPU. Bytes of one GPU."""

    what: str
    need: float
    room: float

    @property
    def fits(self) -> bool:
        return self.need <= self.room

    @property
    def text(self) -> str:
        verdict = "fits" if self.fits else "does NOT fit"
        return f"{self.what}: {self.need / 1e9:.1f} GB of {self.room / 1e9:.1f} GB of a GPU: {verdict}"


def fits(run: Run, given: Assumptions) -> list[Fit]:
    """Weights of the served models, and model with optimizer of the trainings; caches and activations come on top."""
    spec, found = run.spec, list[Fit]()
    served: list[tuple[str, ServedModel, float]] = [("student", spec.student, given.student)]
    if spec.teacher.model:
        served.append(("teacher", spec.teacher, given.teacher))
    for name, engine, parameters in served:
        share = engine.gpu_memory_utilization or 0.92
        weights = SERVED_WIDTH * parameters / engine.tensor_parallel
        found.append(
            Fit(
                f"{name}, weights (tensorParallel {engine.tensor_parallel})",
                weights,
                share * given.gpu.memory - RESERVED,
            )
        )
    for child in plan(run):
        if isinstance(work := child.task.work, contract.Train):
            shape = Shape(int(given.student), 0, 0, 0, 0, 0, 0, 0)
            need = states(work, shape, world=child.pods * child.gpus)
            found.append(
                Fit(f"{child.stage}, model and optimizer (ZeRO {work.zero_stage})", need, 0.9 * given.gpu.memory)
            )
    return found


_SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s?([BM])(?![A-Za-z])", re.IGNORECASE)


def size_in(text: str) -> float | None:
    """Parameters that a name or an option tells: 8B, Llama-3.1-8B-Instruct, SmolLM2-135M; None when it tells none."""
    found = _SIZE.search(text.rsplit("/", 1)[-1])
    return float(found[1]) * {"B": 1e9, "M": 1e6}[found[2].upper()] if found else None
