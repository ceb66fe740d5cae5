"""The runs of the study: CGDRuns, planned by the operator's own planner, their stage programs started one by one.

Three runs for each seed, of the same rows:

    rates      every arm with every learning rate; the loss on held-out prompts, given the prompt alone, chooses a rate
    exam       every arm with its chosen rate, and the base, answer the exam's questions once, greedily
    several    some of them answer a part of the questions several times

A run finds the folders of what an earlier one has made. On a cluster the operator makes the same tasks into Jobs; here
they are processes, because so many programs on two cores have no time for anything else.
"""

import json
import math
import os
import random
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from cgd_local.background import image_environment
from cgd_local.pods import launch
from cgd_local.s3 import SeaweedFS
from cgd_operator.planning import dag, tasks
from cgd_stages import contract
from cgd_stages.contract import StageName
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import Folder, read_rows
from cgd_stages.store.rows import digest_of, sha256
from cgd_stages.store.run import RunStore
from cgd_stages.training.checkpoints import METRICS
from replicate.arithmetic import ENDINGS, Kind, Problem, make_problem, read_question, stated
from replicate.outcome import ASKED, KEPT, Curve, Machine, Made, Mark, Outcome, Rows, Trainings
from replicate.tutor import MODEL

BASE = "base"
HELD_OUT = 1 / 3
"""The share of the prompts that chooses the learning rates: half as many as are learned."""
KEYS = {"AWS_ACCESS_KEY_ID": "study", "AWS_SECRET_ACCESS_KEY": "study-secret"}
THREADS = "2"
EXAM = ("seen", "new")
"""The exam's benchmarks: `seen` asks for endings that the rows ask for, `new` for others alone."""
ROWS = "rows"
"""The questions to learn from."""
MOST_TOKENS = 64
"""Of an output in the exam."""
TEMPERATURE = "0.7"
"""Where a question is answered several times."""


class StudyError(Exception):
    """A program of the study failed; says which, and where its log is."""


@dataclass(frozen=True)
class Arm:
    """Something that is trained, with each of the learning rates."""

    name: str
    label: str
    kind: contract.Objective
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    """What a variant of the CGDRun says beside its name, kind and learning rate."""

    def variant(self, rate: str) -> dict[str, Any]:
        return {"name": self.training(rate), "kind": self.kind, "learningRate": rate, **self.settings}

    def training(self, rate: str) -> str:
        """The name of its training with a rate: a variant's name has no dots."""
        return f"{self.name}-{rate.replace('.', '')}"


ARMS = (
    Arm("sft", "SFT", "SFT"),
    Arm("distilledsft", "DistilledSFT", "DistilledSFT"),
    Arm("refinedsft", "RefinedSFT", "RefinedSFT"),
    Arm("cft", "CFT", "CFT"),
    Arm("cgd", "CGD", "CGD"),
    Arm("shuffled", "CGD, shuffled critiques", "CGD", {"critique": {"kind": "shuffled"}}),
)
MORE_ARMS = (
    Arm("bare10", "CGD, a tenth bare", "CGD", {"bareShare": "0.1"}),
    Arm("bare25", "CGD, a quarter bare", "CGD", {"bareShare": "0.25"}),
    Arm("bare50", "CGD, half bare", "CGD", {"bareShare": "0.5"}),
    Arm("system", "CGD, system turn", "CGD", {"context": "system"}),
    Arm("generic", "CGD, generic critique", "CGD", {"critique": {"kind": "generic"}}),
    Arm("none", "CGD, no critique", "CGD", {"critique": {"kind": "none"}}),
    Arm("corrupted", "CGD, half of the critiques wrong", "CGD", {"critique": {"kind": "corrupted", "rate": "0.5"}}),
)
SEVERAL = ("refinedsft", "cgd")
"""The arms that answer several times, beside the base."""


def questions(
    name: str, count: int, kind: Kind, endings: tuple[str, ...], *, but: Iterable[Problem] = ()
) -> list[Problem]:
    """So many different problems, the same for a name; none whose sums are in `but`."""
    dice, taken, found = random.Random(f"questions {kind.name} {name}"), set(map(sums_of, but)), dict[str, Problem]()
    while len(found) < count:
        problem = make_problem(dice, kind, endings)
        if sums_of(problem) not in taken:
            found.setdefault(sums_of(problem), problem)
    return list(found.values())


def sums_of(problem: Problem) -> str:
    """A problem without its ending: what must not be both learned and asked."""
    return problem.question.partition("? ")[0]


def exam_problems(kind: Kind, count: int) -> dict[str, list[Problem]]:
    """The questions of the exam's benchmarks: half of them in each."""
    others = tuple(name for name in ENDINGS if name not in ASKED)
    seen = questions("seen", count // 2, kind, ASKED)
    return {"seen": seen, "new": questions("new", count - count // 2, kind, others, but=seen)}


@dataclass(frozen=True)
class Size:
    """What is asked and trained, and how much."""

    name: str
    kind: Kind
    arms: tuple[Arm, ...]
    rates: tuple[str, ...]
    rows: int
    """Questions that are learned; half as many more are held out."""
    exam: int
    """Questions of the exam."""
    several: int
    """Questions that are answered several times."""
    samples: int
    """Outputs of each of these."""
    max_rejected: str


class Misfit(Exception):
    """The targets of the rows do not fit their questions: nothing that is learned from them would say anything."""


@dataclass
class Study:
    """The runs of one seed, against one S3 server, one student and one tutor."""

    folder: Path
    student: Path
    tutor: str
    teacher: str
    """The tutor's name as a model."""
    s3: SeaweedFS
    size: Size
    seed: int
    tell: Callable[[str], None]

    @staticmethod
    def manifest() -> dict[str, Any]:
        """The CGDRun that all runs of the study are made from."""
        manifest: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("run.yaml").read_text())
        return manifest

    def carry_out(self, fits: Callable[[Rows], bool]) -> Outcome:
        """All runs, or what an interrupted study has left of them. Raises Misfit, before anything is trained, when the
        rows do not fit; StudyError."""
        tried = self._run("rates", [arm.variant(rate) for arm in self.size.arms for rate in self.size.rates])
        rows, trainings = self._tried(tried, fits)
        chosen = {arm.name: arm.training(trainings.chosen[arm.name]) for arm in self.size.arms}
        variants = {arm.name: arm.variant(trainings.chosen[arm.name]) for arm in self.size.arms}
        self.tell(f"chosen: {', '.join(chosen.values())}")
        exam = self._run("exam", list(variants.values()), evaluation=self._exam())
        several = self._run("several", [variants[name] for name in SEVERAL], evaluation=self._several())
        self._execute(exam)
        self._execute(several)
        self._execute_child(dag.cleaning(tried))  # deletes the models that no other run has chosen
        for run in (exam, several):
            self._fetch_report(run)
        return Outcome(
            self._made(),
            self._machine((tried, exam, several)),
            rows,
            trainings,
            exam={name: self._marks(exam, model) for name, model in {BASE: BASE, **chosen}.items()},
            several={name: self._marks(several, {BASE: BASE, **chosen}[name]) for name in (BASE, *SEVERAL)},
        )

    def _tried(self, run: dag.Run, fits: Callable[[Rows], bool]) -> tuple[Rows, Trainings]:
        """Make the rows, and train every arm with every rate. What came out is written down, because the models that
        are not chosen are deleted with the run."""
        digest = digest_of(spec=run.spec.model_dump(mode="json", exclude={"storage"}))
        path = self.folder / f"{run.name}-{digest[:8]}.json"
        if not path.exists():
            self._execute(run, {"prepare", "generate", "check"})
            rows = self._rows(run)
            self.tell(f"rows: {rows}")
            if not fits(rows):
                raise Misfit
            self._execute(run)
            path.write_text(json.dumps({"rows": asdict(rows), "trainings": asdict(self._trainings(run))}, indent=1))
        found = json.loads(path.read_text())
        return Rows(**found["rows"]), Trainings(**found["trainings"])

    def _made(self) -> Made:
        manifest, size = self.manifest(), self.size
        training = manifest["spec"]["training"]
        return Made(
            size=size.name,
            seed=self.seed,
            student=self.student.name,
            arms=tuple(arm.name for arm in size.arms),
            rates=size.rates,
            rows=size.rows,
            exam=size.exam,
            several=size.several,
            samples=size.samples,
            epochs=training["epochs"],
            batch=training["globalBatchSize"],
            manifest=digest_of(manifest=manifest)[:12],
        )

    def _machine(self, runs: Iterable[dag.Run]) -> Machine:
        """What the programs of all runs took, each counted once."""
        names = {child.name for run in runs for child in dag.plan(run)}
        times = [json.loads(self._times(name).read_text()) for name in names]
        seconds, processor = (math.fsum(time[what] for time in times) for what in ("seconds", "processor_seconds"))
        return Machine(os.cpu_count(), round(seconds), round(processor))

    # --- the runs -----------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        """Of another teacher another one: what a run of the same name has stored may be deleted already."""
        return f"{self.size.name}-seed{self.seed}{'' if self.teacher == MODEL else '-moved'}"

    def _run(self, name: str, variants: list[dict[str, Any]], *, evaluation: dict[str, Any] | None = None) -> dag.Run:
        manifest = self.manifest()
        spec = manifest["spec"]
        spec["student"]["model"] = str(self.student)
        spec["teacher"]["endpoint"] |= {"url": self.tutor, "model": self.teacher}
        spec["prompts"]["source"] = self._sources[ROWS]
        spec["generation"]["maxRejected"] = self.size.max_rejected
        spec["storage"]["endpoint"] = self.s3.endpoint
        spec["training"] |= {"seed": self.seed, "variants": variants}
        if evaluation:
            spec["evaluation"] = evaluation
        manifest["metadata"] |= {"name": f"{self._name}-{name}", "uid": f"{self._name}-{name}"}
        return dag.Run.of(manifest)

    def _exam(self) -> dict[str, Any]:
        return {"benchmarks": [self._benchmark(name) for name in EXAM], "sampling": {"maxTokens": MOST_TOKENS}}

    def _several(self) -> dict[str, Any]:
        benchmark = self._benchmark("seen") | {"limit": self.size.several, "samples": self.size.samples}
        sampling = {"maxTokens": MOST_TOKENS, "temperature": TEMPERATURE, "seed": self.seed}
        return {"benchmarks": [benchmark], "sampling": sampling}

    def _benchmark(self, name: str) -> dict[str, Any]:
        return {"name": name, "source": self._sources[name], "fields": {"prompt": "question", "reference": "reference"}}

    @cached_property
    def _sources(self) -> dict[str, str]:
        """Where the questions to learn from are, and those of the exam's benchmarks. A name has a hash of what it
        holds, so that another content is another task."""
        kind, exam = self.size.kind, exam_problems(self.size.kind, self.size.exam)
        asked = [problem for problems in exam.values() for problem in problems]
        learned = questions(f"seed {self.seed}", round(self.size.rows / (1 - HELD_OUT)), kind, ASKED, but=asked)
        solved = {ROWS: [(one, one.reference) for one in learned]}
        solved |= {name: [(one, str(one.result)) for one in problems] for name, problems in exam.items()}
        sources = {}
        for name, pairs in solved.items():
            lines = (json.dumps({"question": one.question, "reference": reference}) for one, reference in pairs)
            body = "".join(f"{line}\n" for line in lines).encode()
            key = f"questions/{kind.name}-{name}-{sha256(body)[:8]}.jsonl"
            self.s3.client().put_object(Bucket=self.s3.bucket, Key=key, Body=body)
            sources[name] = f"s3://{self.s3.bucket}/{key}"
        return sources

    # --- their programs -----------------------------------------------------------------------------------------

    def _execute(self, run: dag.Run, kinds: Collection[str] = ()) -> None:
        """Carry out the children of a run as the operator plans them, one after the other; of some kinds of work, or
        all."""
        for child in dag.plan(run):
            if not kinds or child.task.work.kind in kinds:
                self._execute_child(child)

    def _execute_child(self, child: dag.Child) -> None:
        """Run a child's program to its end, unless it has ended well before. Raises StudyError when it does not."""
        folder = self.folder / "pods" / child.name
        words, done, task = folder / "last-words.json", folder / "done.json", child.task.to_json()
        if done.exists() and done.read_text() == task:
            return
        folder.mkdir(parents=True, exist_ok=True)
        environment = {
            **image_environment(),
            **KEYS,
            contract.TASK: task,
            contract.SCRATCH: str(folder / "scratch"),
            contract.TERMINATION_LOG: str(words),
            "HOME": str(folder),
            "OMP_NUM_THREADS": THREADS,
        }
        began, used = time.monotonic(), processor_seconds()
        command = [sys.executable, "-m", f"cgd_stages.{child.task.work.kind}"]
        code = launch(command, environment, folder, folder / "log").wait()
        if code:
            said = contract.LastWords.model_validate_json(words.read_text()).message if words.exists() else ""
            raise StudyError(f"{child.name} ended with exit code {code}: {said} See {folder / 'log'}")
        shutil.rmtree(folder / "scratch", ignore_errors=True)
        took = {"seconds": time.monotonic() - began, "processor_seconds": processor_seconds() - used}
        self._times(child.name).write_text(json.dumps(took))
        done.write_text(task)
        self.tell(f"{child.stage}   {took['seconds']:.0f} s, {took['processor_seconds']:.0f} of a processor")

    def _times(self, child: str) -> Path:
        return self.folder / "pods" / child / "times.json"

    # --- what they have stored ----------------------------------------------------------------------------------

    def _folder(self, run: dag.Run, stage: str) -> Folder:
        reference = contract.RunRef(namespace=run.namespace, name=run.name, uid=run.uid)
        return RunStore(Bucket(tasks.storage_of(run.spec.storage)), reference).input(stage)

    def _rows(self, run: dag.Run) -> Rows:
        """The product's own grades of the rows, as check has stored them."""
        check, distilled = self._folder(run, "check").require().facts, read_rows(self._folder(run, "distill"))
        solved = [stated(row["distilled"])[1] == read_question(row["prompt"]).result for row in distilled]
        return Rows(
            count=int(check.metrics["graded"]),
            drafts=check.metrics["right_drafts"],
            verdicts=check.metrics["right_verdicts"],
            refinements=check.metrics["right_refinements"],
            distilled=statistics.fmean(solved),
        )

    def _trainings(self, run: dag.Run) -> Trainings:
        return Trainings(
            {
                arm.name: {rate: self._curve(run, arm.training(rate)) for rate in self.size.rates}
                for arm in self.size.arms
            }
        )

    def _curve(self, run: dag.Run, training: str) -> Curve:
        folder = self._folder(run, contract.train_stage(training))
        (part,) = folder.require().under(METRICS)
        records = [json.loads(line) for line in folder.read(part).decode().splitlines()]
        return [{name: record[name] for name in KEPT if name in record} for record in records]

    def _marks(self, run: dag.Run, model: str) -> list[Mark]:
        rows = read_rows(self._folder(run, StageName.of("evaluate", model)))
        ordered = sorted(rows, key=lambda row: (row["benchmark"], row["id"], row["sample"]))
        return [
            Mark(row["prompt"], row["output"], row["correct"] is True, row["tokens"], row["finish_reason"] == "stop")
            for row in ordered
        ]

    def _fetch_report(self, run: dag.Run) -> None:
        """Put the product's page of a run beside the study's."""
        folder = self._folder(run, "report")
        (part,) = folder.require().under("report.html")
        (self.folder / f"{run.name}.html").write_bytes(folder.read(part))


def report_file(made: Made, run: str) -> str:
    """The product's page of a run, beside the study's."""
    return f"{made.size}-seed{made.seed}-{run}.html"


def processor_seconds() -> float:
    """What all programs took that have ended so far, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
