"""What a run will cost before it starts: tokens, GPU-hours and money, stage by stage. Pure; uses no network.

Tokens are rows times assumed lengths; the estimate foresees no row that is rejected or not kept, and counts thoughts
where a model thinks. A model of P parameters needs 2P FLOPs to compute a token (Kaplan et al. 2020), 6P to learn from
it, and 8P when activations are recomputed (Chowdhery et al. 2022); 2P less where an adapter is trained and the
parameters are frozen. Of a mixture of experts, P is what a token meets; memory holds all of it. FLOP/s limit the
reading of prompts. They limit writing, too, unless few rows are in flight: then each step reads the weights once for
all rows, and bandwidth is the limit (the roofline of Williams et al. 2009). The estimate leaves out reads of the KV
cache, so long contexts take longer than it says.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cgd_cli.sizes import TASK_SIZES, Gpu
from cgd_operator.api.generation import ServedModel
from cgd_operator.planning import scoring
from cgd_operator.planning.dag import Child, Run, plan
from cgd_stages import contract
from cgd_stages.models.targets import roughly
from cgd_stages.models.training_memory import Shape, states
from cgd_stages.training.early import looks as early_steps

SERVED_WIDTH = 2
"""Bytes for each weight that vLLM serves, in bfloat16."""
READING, WRITING = 0.5, 0.6
"""Shares of peak FLOP/s and of peak bandwidth that engines reach."""
INSTRUCTION = 170
"""Tokens of the teacher's instruction."""
CHARACTERS = 4
"""Characters for each token, in English."""
RESERVED = 4e9
"""Bytes of a served GPU that hold neither weights nor cache: CUDA, graphs, activations."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Everything that the manifest leaves open. Parameters of models; tokens of a text; prices in one currency."""

    rows: int
    student: float
    teacher: float
    student_active: float | None = None
    teacher_active: float | None = None
    """Parameters that a token meets; None: all of them."""
    gpu: Gpu
    gpu_hour: float = 2.5
    currency: str = "USD"
    prompt: int = 200
    answer: int = 700
    critique: int = 500
    refinement: int = 800
    thought: int = 4000
    """Of a model that thinks, before each text; at most its thinkingBudget."""
    teacher_thinks: bool | None = None
    """Whether a teacher thinks whose mode is left to its template; None: where its thoughts are learned."""
    questions: int = 500
    """Questions of a benchmark that sets no limit."""
    in_flight: int = 256
    """Rows that an engine works on at a time."""
    mfu: float = 0.4
    """Share of peak FLOP/s that training reaches."""
    start_minutes: float = 5
    """Minutes that each GPU pod needs before its first token."""
    input_million: float = 0.0
    output_million: float = 0.0
    """Price of a million tokens at the teacher's endpoint."""

    @property
    def of_student(self) -> "Size":
        return Size(self.student, self.student_active or self.student)

    @property
    def of_teacher(self) -> "Size":
        return Size(self.teacher, self.teacher_active or self.teacher)


@dataclass(frozen=True)
class Size:
    """The parameters of a model, and those that a token meets."""

    parameters: float
    active: float


@dataclass(frozen=True)
class Cost:
    """The cost of one stage: tokens that all rows read and write (training only reads), GPUs of all its pods."""

    stage: str
    rows: int
    read: int
    written: int
    gpus: int = 0
    seconds: float = 0.0
    money: float = 0.0
    waits: float = 0.0
    """Seconds in which its GPUs are held and wait for the stages beside it, which are paid for as well."""

    @property
    def gpu_hours(self) -> float:
        return self.gpus * (self.seconds + self.waits) / 3600


def costs(run: Run, assumptions: Assumptions) -> list[Cost]:
    """The cost of every stage that generates or trains. The roles of a fused teacher use its GPUs one after another.
    What samples, scores and trains in turn holds the GPUs of all three all the time."""
    thoughts, children = Thoughts.of(run, assumptions), plan(run)
    found = [cost for child in children for cost in _child_costs(run, child, assumptions, thoughts)]
    works = (child.task.work for child in children if child.pool == "training")
    for work in works:
        if isinstance(work, contract.Train) and work.on_policy:
            beside = {work.rollouts, work.scored_rollouts, work.stage}
            found = [_held(cost, found, beside, assumptions) if cost.stage in beside else cost for cost in found]
    return found


def _held(cost: Cost, found: list[Cost], beside: set[contract.StageName | None], assumptions: Assumptions) -> Cost:
    """The cost with the time of those beside it. All start at the same time."""
    start = 60 * assumptions.start_minutes
    waits = sum(max(0.0, other.seconds - start) for other in found if other.stage in beside - {cost.stage})
    return replace(cost, waits=waits, money=cost.money + cost.gpus * waits / 3600 * assumptions.gpu_hour)


@dataclass(frozen=True)
class Thoughts:
    """Tokens of the thought before a text of each model, and of the thought that a training learns with a target."""

    student: int
    teacher: int
    learned: int

    @classmethod
    def of(cls, run: Run, assumptions: Assumptions) -> "Thoughts":
        spec = run.resolved
        learns = spec.training.thinking == "learn"
        mode = spec.teacher.chat.thinking
        by_itself = learns if assumptions.teacher_thinks is None else assumptions.teacher_thinks
        teacher = _thought(spec.teacher.chat, assumptions) if mode == "on" or (mode == "auto" and by_itself) else 0
        student = _thought(spec.student.chat, assumptions) if spec.student.chat.thinking == "on" else 0
        return cls(student, teacher, teacher if learns else 0)


def _thought(chat: contract.Chat, assumptions: Assumptions) -> int:
    return min(assumptions.thought, chat.thinking_budget or assumptions.thought)


def _child_costs(run: Run, child: Child, assumptions: Assumptions, thoughts: Thoughts) -> Iterator[Cost]:
    student, stage = assumptions.of_student, child.stage
    match child.task.work:
        case contract.Generate() as work:
            for role, sampling in zip(work.roles, work.sampling, strict=True):
                is_fused = role == "refine" and "critique" in work.roles
                read, written = _row_tokens(role, assumptions, is_fused=is_fused)
                written += thoughts.student if role == "answer" else thoughts.teacher
                written = min(written, sampling.max_tokens)
                answers = 1 if role in {"answer", "distill"} else run.spec.generation.answer.samples
                rows = assumptions.rows * answers
                drawn = rows * work.draws(role)
                # An engine of ours finds the prompt of a row's further draws in the cache; an endpoint bills it again.
                read *= rows if child.gpus else drawn
                model = student if role == "answer" else assumptions.of_teacher
                is_warm = role != work.roles[0]
                yield _generated(child, role, drawn, read, drawn * written, model, assumptions, warm=is_warm)
        case contract.Rollout() as work:
            rows, read, written = _sampled(run, work.training, assumptions, thoughts)
            in_round = (
                work.training.on_policy.refresh * work.training.global_batch_size if work.training.on_policy else 1
            )
            fewer = replace(assumptions, in_flight=max(1, min(assumptions.in_flight, in_round // child.pods)))
            yield _generated(child, stage, rows, read, written, student, fewer)
        case contract.Score(training=contract.Train() as training):
            rows, read, written = _sampled(run, training, assumptions, thoughts)
            yield _generated(child, stage, rows, read + written, 0, assumptions.of_teacher, assumptions)
        case contract.Score() as work:
            # An engine reads the example, and writes a token that nobody reads.
            generation = run.spec.generation
            refinements = generation.answer.samples * generation.refine.samples
            rows = assumptions.rows * (generation.distill.samples if work.objective == "DistilledSFT" else refinements)
            read = rows * _tokens(work.objective, assumptions, thoughts)
            model = student if child.pool == "student" else assumptions.of_teacher
            yield _generated(child, stage, rows, read, 0, model, assumptions)
        case contract.Train() as work:
            yield (trained := _trained(run, child, work, assumptions, thoughts))
            if work.early:
                yield _asked_early(child, work, work.early, trained.rows, assumptions, thoughts)
        case contract.Evaluate() as work:
            outputs = sum((b.limit or b.questions or assumptions.questions) * b.samples for b in work.benchmarks)
            read, written = _output_tokens(work, assumptions, thoughts)
            yield _generated(child, stage, outputs, outputs * read, outputs * written, student, assumptions)
        case contract.Harness() as work:
            tasks = priced_tasks(work, assumptions, thoughts.student)
            read = sum(task.requests * task.read for task in tasks)
            written = sum(task.requests * task.written for task in tasks)
            documents = sum(task.documents for task in tasks)
            yield _generated(child, stage, documents, read, written, student, assumptions)
        case _:
            return


def _output_tokens(work: contract.Evaluate, assumptions: Assumptions, thoughts: Thoughts) -> tuple[int, int]:
    """Tokens that the engine reads and writes for one output, those of all passes of a rival included."""
    limit, rival = work.sampling.max_tokens, work.rival
    answer, critique = min(assumptions.answer, limit), min(assumptions.critique, limit)
    thinking = min(thoughts.student, limit)
    written_answer, written_critique = min(thinking + answer, limit), min(thinking + critique, limit)
    context = INSTRUCTION + assumptions.prompt + answer
    if rival is None:
        return assumptions.prompt, written_answer
    if rival.kind in contract.DRAWS:  # the prompt of the answers is computed once
        judged = rival.draws if rival.kind == "BestOfN" else 0
        return assumptions.prompt + judged * context, rival.draws * written_answer + judged * written_critique
    # A rival that needs all its rounds writes a critique and an answer in each, and reads the context of both.
    read = assumptions.prompt + rival.rounds * (2 * context + critique)
    return read, written_answer + rival.rounds * (written_critique + written_answer)


def _row_tokens(role: contract.Role, assumptions: Assumptions, *, is_fused: bool) -> tuple[int, int]:
    """Tokens that the engine computes of a row's prompt, and tokens that it writes. A fused refinement finds the prompt
    of its critique in the cache."""
    answer, critique, refinement = assumptions.answer, assumptions.critique, assumptions.refinement
    context = INSTRUCTION + assumptions.prompt + answer
    match role:
        case "answer":
            return assumptions.prompt, answer
        case "distill":
            return assumptions.prompt, refinement
        case "critique":
            return context, critique
        case "refine" | "misrefine":
            return critique if is_fused else context + critique, refinement
        case "miscritique":
            return context + critique, critique


def _generated(
    child: Child,
    stage: str,
    rows: int,
    read: int,
    written: int,
    model: Size,
    assumptions: Assumptions,
    *,
    warm: bool = False,
) -> Cost:
    """The cost of a stage that generates. Warm: its engine runs already. The rows in flight meet all experts of a
    mixture together."""
    if not child.gpus:  # an endpoint bills tokens
        money = read / 1e6 * assumptions.input_million + written / 1e6 * assumptions.output_million
        return Cost(stage, rows, read, written, money=money)
    flops, bandwidth = child.gpus * assumptions.gpu.flops, child.gpus * assumptions.gpu.bandwidth
    for_flops = 2 * model.active / (READING * flops)
    for_weights = SERVED_WIDTH * model.parameters / (WRITING * bandwidth * assumptions.in_flight)
    work = read * for_flops + written * max(for_flops, for_weights)
    seconds = work / child.pods + (0 if warm else 60 * assumptions.start_minutes)
    gpus = child.pods * child.gpus
    return Cost(stage, rows, read, written, gpus, seconds, gpus * seconds / 3600 * assumptions.gpu_hour)


def _tokens(objective: contract.Objective, assumptions: Assumptions, thoughts: Thoughts) -> int:
    """Tokens of an objective's example; of DPO's, of both its texts below the prompt. A reference answer has no
    thought."""
    prompt, refinement = assumptions.prompt, assumptions.refinement
    critiqued = INSTRUCTION + prompt + assumptions.answer + assumptions.critique
    tokens = {
        "CGD": critiqued + refinement,
        "CFT": critiqued,
        "SFT": prompt + refinement,
        "DistilledSFT": prompt + refinement,
        "RefinedSFT": prompt + refinement,
        "DPO": 2 * prompt + refinement + assumptions.answer,
        "ContextDistillation": prompt + refinement,
        "SupervisedKD": prompt + refinement,
        "GKD": prompt + refinement,
        "OPD": prompt + refinement,
    }
    return tokens[objective] + (0 if objective == "SFT" else thoughts.learned)


def _examples(run: Run, work: contract.Train, assumptions: Assumptions) -> int:
    """The most examples that a training can make of its prompts, over all epochs."""
    generation = run.spec.generation
    refinements = generation.refine.samples if generation.refine.select == "all-right" else 1
    examples = 1 if run.spec.training.keep == "one-right" else generation.answer.samples * refinements
    return assumptions.rows * examples * work.epochs


def _sampled(run: Run, work: contract.Train, assumptions: Assumptions, thoughts: Thoughts) -> tuple[int, int, int]:
    """The texts that a training's student samples; the tokens of their prompts, and of the texts."""
    assert work.on_policy
    rows = round(work.on_policy.share * _examples(run, work, assumptions))
    return rows, rows * assumptions.prompt, rows * _sample(work.on_policy, assumptions, thoughts)


def _sample(on_policy: contract.OnPolicy, assumptions: Assumptions, thoughts: Thoughts) -> int:
    return min(on_policy.max_tokens, assumptions.answer + thoughts.student)


def _trained(run: Run, child: Child, work: contract.Train, assumptions: Assumptions, thoughts: Thoughts) -> Cost:
    """The cost of a training, at the most examples that it can make of each prompt."""
    rows, gpus = _examples(run, work, assumptions), child.pods * child.gpus
    whole, bare = (_tokens(objective, assumptions, thoughts) for objective in (work.objective, "RefinedSFT"))
    if work.on_policy:
        own = assumptions.prompt + _sample(work.on_policy, assumptions, thoughts)
        whole = round((1 - work.on_policy.share) * whole + work.on_policy.share * own)
    read = rows * round((1 - work.bare_share) * whole + work.bare_share * bare)
    needed: float = (6 if work.activation_checkpointing == "never" else 8) - (2 if work.adapter else 0)
    # DPO reads every pair once before its first step, for the log-probabilities of its reference.
    needed += 2 / work.epochs if work.objective == "DPO" else 0
    per_token = needed * assumptions.of_student.active
    speed = assumptions.mfu * assumptions.gpu.flops * max(1, gpus)
    seconds = read * per_token / speed + 60 * assumptions.start_minutes
    return Cost(child.stage, rows, read, 0, gpus, seconds, gpus * seconds / 3600 * assumptions.gpu_hour)


def _asked_early(
    child: Child, work: contract.Train, early: contract.Early, rows: int, assumptions: Assumptions, thoughts: Thoughts
) -> Cost:
    """The cost of a training's early questions, which its own GPUs answer meanwhile. `rows`: of all epochs. Each
    process writes for a batch at a time, of at most maxSequenceLength tokens."""
    prompt, processes = assumptions.prompt, max(1, child.pods * child.gpus)
    steps = work.epochs * math.ceil(rows / work.epochs / work.global_batch_size)
    looks = 1 + len(early_steps(early, steps))  # the first one before the first step
    written = min(early.max_tokens, assumptions.answer + thoughts.student)
    share = math.ceil(early.questions / processes)
    batch = max(1, min(share, work.max_sequence_length // (prompt + written)))
    in_turn = math.ceil(share / batch)
    model = assumptions.of_student
    for_weights = SERVED_WIDTH * model.parameters / (WRITING * assumptions.gpu.bandwidth)
    for_flops = 2 * model.active / (READING * assumptions.gpu.flops)
    each = written * max(for_weights, batch * for_flops) + batch * prompt * for_flops
    seconds, outputs, gpus = looks * in_turn * each, looks * early.questions, child.pods * child.gpus
    return Cost(
        f"{child.stage} early",
        outputs,
        outputs * prompt,
        outputs * written,
        gpus,
        seconds,
        gpus * seconds / 3600 * assumptions.gpu_hour,
    )


# --- tasks of lm-eval


@dataclass(frozen=True)
class PricedTask:
    """The requests that a task of lm-eval sends to a model. Each reads and writes so many tokens."""

    task: str
    documents: int
    requests: int
    read: int
    written: int

    @property
    def text(self) -> str:
        documents = f" ({self.documents} documents)" if self.requests != self.documents else ""
        return (
            f"{self.task}: {self.requests} requests{documents}, each {self.read} tokens read and {self.written} written"
        )


def lm_eval_tasks(run: Run, assumptions: Assumptions) -> tuple[list[PricedTask], tuple[str, ...]]:
    """The tasks that each model of the run gets, and the names of tasks that cannot be priced."""
    works = [child.task.work for child in plan(run)]
    for work in works:
        if isinstance(work, contract.Harness):
            thought = Thoughts.of(run, assumptions).student
            unpriced = tuple(task.name for task in work.tasks if _priced_task(task, assumptions, thought) is None)
            return priced_tasks(work, assumptions, thought), unpriced
    return [], ()


def priced_tasks(work: contract.Harness, assumptions: Assumptions, thought: int) -> list[PricedTask]:
    """The tasks of a stage that can be priced. Several metrics of one task share its requests."""
    distinct = {(task.task, task.few_shot, task.limit): task for task in reversed(work.tasks)}
    return [priced for task in reversed(distinct.values()) if (priced := _priced_task(task, assumptions, thought))]


def _priced_task(task: contract.HarnessTask, assumptions: Assumptions, thought: int) -> PricedTask | None:
    """The requests of a task of known size. Of any other task, `limit` is taken for the number of its documents, and
    their lengths for those of the run's rows; None if it has no limit. A thought of `thought` tokens comes before every
    text, and before no choice: those are only compared."""
    size, shots = TASK_SIZES.get(task.task), task.few_shot or 0
    if size is None:
        if task.limit is None:
            return None
        read = assumptions.prompt + shots * (assumptions.prompt + assumptions.answer)
        return PricedTask(task.name, task.limit, task.limit, read, thought + assumptions.answer)
    documents = size.documents(task.limit)
    read = math.ceil((size.characters + shots * (size.shot or size.characters)) / CHARACTERS)
    written = min(assumptions.answer, size.max_tokens) + (0 if size.choices else thought)
    return PricedTask(task.name, documents, documents * (size.choices or 1), read, written)


# --- lengths


@dataclass(frozen=True)
class Length:
    """Whether what is expected fits into a limit of the manifest. Both in tokens."""

    what: str
    need: int
    limit: int

    @property
    def fits(self) -> bool:
        return self.need <= self.limit

    @property
    def text(self) -> str:
        return f"{self.what}: {self.need} of {self.limit} tokens: {'fits' if self.fits else 'is TOO LONG'}"


def lengths(run: Run, assumptions: Assumptions) -> list[Length]:
    """The longest expected text of each kind, its thought and what it follows, against the limits that the manifest
    sets: longer texts are cut and rejected."""
    spec, thoughts, found = run.spec, Thoughts.of(run, assumptions), list[Length]()

    def tokens(role: contract.Role) -> tuple[int, int]:
        """Tokens that a role reads, and that it writes with its thought."""
        read, written = _row_tokens(role, assumptions, is_fused=False)
        return read, written + (thoughts.student if role == "answer" else thoughts.teacher)

    for child in plan(run):
        if isinstance(work := child.task.work, contract.Generate):
            for role, sampling in zip(work.roles, work.sampling, strict=True):
                if contract.settings_of(role) == role:
                    found.append(Length(f"generation.{role}.maxTokens", tokens(role)[1], sampling.max_tokens))
    if spec.student.max_model_len:
        found.append(Length("student.maxModelLen", sum(tokens("answer")), spec.student.max_model_len))
    if spec.teacher.model and spec.teacher.max_model_len:
        roles: list[contract.Role] = ["critique", "refine"]
        if spec.training.misleads:
            roles.append("miscritique")
        longest = max(sum(tokens(role)) for role in roles)
        found.append(Length("teacher.maxModelLen", longest, spec.teacher.max_model_len))
    in_context: set[contract.Objective] = {"CGD"} if scoring.by_start(spec) else set()
    whole = spec.training.kinds - {"DPO"} | in_context
    example = max((_tokens(kind, assumptions, thoughts) for kind in whole), default=0)
    if "DPO" in spec.training.kinds:  # each of its texts is an example
        example = max(example, assumptions.prompt + max(assumptions.answer, assumptions.refinement) + thoughts.learned)
    return [*found, Length("training.maxSequenceLength", example, spec.training.max_sequence_length)]


# --- memory


@dataclass(frozen=True)
class Fit:
    """Whether a model fits into the memory of a GPU. Both in bytes of one GPU."""

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


def fits(run: Run, assumptions: Assumptions) -> list[Fit]:
    """The weights of the served models; model and optimizer of the trainings. Caches and activations come on top."""
    spec, memory, verdicts = run.spec, assumptions.gpu.memory, list[Fit]()
    served: list[tuple[str, ServedModel, float]] = [("student", spec.student, assumptions.student)]
    if spec.teacher.model:
        served.append(("teacher", spec.teacher, assumptions.teacher))
    for name, engine, parameters in served:
        what = f"{name}, weights (tensorParallel {engine.tensor_parallel})"
        weights = SERVED_WIDTH * parameters / engine.tensor_parallel
        verdicts.append(Fit(what, weights, (engine.gpu_memory_utilization or 0.92) * memory - RESERVED))
    for child in plan(run):
        if isinstance(work := child.task.work, contract.Train):
            what = f"{child.stage}, model and optimizer (ZeRO {work.zero_stage})"
            trained = roughly(assumptions.student, work.adapter) if work.adapter else None
            shape = Shape(int(assumptions.student), 0, 0, 0, 0, 0, 0, 0, trained=trained)
            need = states(work, shape, world=child.pods * child.gpus)
            verdicts.append(Fit(what, need, 0.9 * memory))
    return verdicts
