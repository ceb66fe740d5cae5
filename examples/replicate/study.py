"""The runs of the study: CGDRuns, planned by the operator's own planner, their stage programs started one by one.

On a cluster the operator makes the same tasks into Jobs; here they are processes, because a study of 24 trainings on
two cores has no time for anything else.
"""

import json
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cgd_local.demo import image_environment
from cgd_local.pods import launch
from cgd_local.s3 import SeaweedFS
from cgd_operator.planning import dag
from cgd_stages import contract
from cgd_stages.method import prompts
from cgd_stages.store.bucket import Bucket
from cgd_stages.store.folder import read_rows
from cgd_stages.store.run import open_input
from replicate.arithmetic import ENDINGS, Problem, make_problem, read_question, stated

ASKED = ("answer", "hashes")
"""Endings that the questions to learn from ask for. The exam asks for the others, too."""
BASE = "base"
OBJECTIVES: tuple[contract.Objective, ...] = ("SFT", "DistilledSFT", "RefinedSFT", "CFT", "CGD")
ABLATIONS: tuple[contract.CritiqueKind, ...] = ("shuffled", "generic", "none")
KEYS = {"AWS_ACCESS_KEY_ID": "study", "AWS_SECRET_ACCESS_KEY": "study-secret"}


class StudyError(Exception):
    """A program of the study failed; says which, and where its log is."""


@dataclass(frozen=True)
class Model:
    """A model that takes the exam."""

    objective: contract.Objective
    critique: contract.CritiqueKind
    seed: int

    @property
    def label(self) -> str:
        return self.objective if self.critique == "matched" else f"{self.objective} {self.critique}"


def models(seed: int) -> tuple[Model, ...]:
    """What is trained from the rows of a seed."""
    by_objective = (Model(objective, "matched", seed) for objective in OBJECTIVES)
    return (*by_objective, *(Model("CGD", kind, seed) for kind in ABLATIONS))


def questions(name: str, count: int, endings: tuple[str, ...], *, but: frozenset[str] = frozenset()) -> list[Problem]:
    """So many different problems, the same for a name; none whose sums are in `but`."""
    dice, found = random.Random(f"questions {name}"), dict[str, Problem]()
    while len(found) < count:
        problem = make_problem(dice, endings)
        if sums_of(problem) not in but:
            found.setdefault(sums_of(problem), problem)
    return list(found.values())


def sums_of(problem: Problem) -> str:
    """A problem without its ending: what must not be both learned and asked."""
    return problem.question.partition(". ")[0]


@dataclass
class Study:
    """All runs, against one S3 server, one student and one tutor."""

    folder: Path
    student: Path
    tutor: str
    s3: SeaweedFS
    rows: int
    max_rejected: str

    @staticmethod
    def manifest() -> dict[str, Any]:
        """The CGDRun that all runs of the study are made from."""
        manifest: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("run.yaml").read_text())
        return manifest

    def generate(self, seed: int) -> dict[str, float]:
        """Bring the questions of a seed, and make its rows; what they are like."""
        run = self._run(Model("CGD", "matched", seed))
        self._bring(seed)
        for child in dag.plan(run):
            if child.stage in {"prepare", "answer", "teacher", "distill"}:
                self._execute(child)
        return self._quality(run)

    def train(self, model: Model) -> Path:
        """Train it, and its folder on this machine."""
        run, stage = self._run(model), contract.train_stage(model.objective)
        children = {child.stage: child for child in dag.plan(run)}
        if model.critique != "matched":  # a run of its own: the rows are there, so these find nothing to do
            for stage_before in (dag.PREPARE, dag.ANSWER, dag.TEACHER):
                self._execute(children[stage_before])
        words = self._execute(children[stage])
        return self._download(run, words.stages[stage].output_uri)

    def _run(self, model: Model) -> dag.Run:
        name = f"seed{model.seed}-{model.critique}"
        manifest = self.manifest()
        spec = manifest["spec"]
        spec["student"]["model"] = str(self.student)
        spec["teacher"]["endpoint"]["url"] = self.tutor
        spec["prompts"]["source"] = f"s3://{self.s3.bucket}/{self._questions_key(model.seed)}"
        spec["generation"]["maxRejected"] = self.max_rejected
        spec["storage"]["endpoint"] = self.s3.endpoint
        spec["training"] |= {"seed": model.seed, "critique": {"kind": model.critique}}
        if model.critique != "matched":
            spec["training"]["objectives"] = ["CGD"]
        manifest["metadata"] |= {"name": name, "uid": name}
        return dag.Run.of(manifest)

    def _questions_key(self, seed: int) -> str:
        return f"questions/seed{seed}-{self.rows}.jsonl"

    def _bring(self, seed: int) -> None:
        problems = questions(f"seed {seed}", self.rows, ASKED, but=frozenset(map(sums_of, exam_problems())))
        lines = (json.dumps({"question": one.question, "reference": one.reference}) for one in problems)
        body = "".join(f"{line}\n" for line in lines).encode()
        self.s3.client().put_object(Bucket=self.s3.bucket, Key=self._questions_key(seed), Body=body)

    def _execute(self, child: dag.Child) -> contract.LastWords:
        """Run a child's program to its end. Raises StudyError when it does not succeed."""
        folder = self.folder / "pods" / child.name
        folder.mkdir(parents=True, exist_ok=True)
        words = folder / "last-words.json"
        environment = {
            **image_environment(),
            **KEYS,
            contract.TASK: child.task.to_json(),
            contract.SCRATCH: str(folder / "scratch"),
            contract.TERMINATION_LOG: str(words),
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", f"cgd_stages.{child.task.work.kind}"]
        code = launch(command, environment, folder, folder / "log").wait()
        if code:
            said = contract.LastWords.model_validate_json(words.read_text()).message if words.exists() else ""
            raise StudyError(f"{child.name} ended with exit code {code}: {said} See {folder / 'log'}")
        shutil.rmtree(folder / "scratch", ignore_errors=True)
        return contract.LastWords.model_validate_json(words.read_text())

    def _bucket(self, run: dag.Run) -> Bucket:
        return Bucket(dag.storage_of(run.spec.storage))

    def _download(self, run: dag.Run, uri: str) -> Path:
        bucket, target = self._bucket(run).at(f"{uri}/model"), self.folder / "models" / uri.rsplit("/", 1)[1]
        target.mkdir(parents=True, exist_ok=True)
        for stored in bucket.list():
            bucket.download(stored.key, target / stored.key)
        return target

    def _quality(self, run: dag.Run) -> dict[str, float]:
        """Shares of the rows: right drafts, right verdicts, right refinements; and their number."""
        reference = contract.RunRef(namespace=run.namespace, name=run.name, uid=run.uid)
        rows = list(read_rows(open_input(self._bucket(run), reference, "refine")))
        right = {column: [is_right(row["prompt"], row[column]) for row in rows] for column in ("answer", "refinement")}
        found_right = [prompts.verdict(row["critique"]) == "right" for row in rows]
        judged = [said is good for said, good in zip(found_right, right["answer"], strict=True)]
        return {
            "rows": len(rows),
            "right_drafts": sum(right["answer"]) / len(rows),
            "right_verdicts": sum(judged) / len(rows),
            "right_refinements": sum(right["refinement"]) / len(rows),
        }


def is_right(question: str, text: str) -> bool:
    """Whether the last line states the result, in whichever of the endings."""
    return stated(text)[1] == read_question(question).result


def exam_problems(count: int = 400) -> list[Problem]:
    """Half of them ask for an ending that no question to learn from asks for."""
    others = tuple(name for name in ENDINGS if name not in ASKED)
    half = count // 2
    seen = questions("exam", half, ASKED)
    return [*seen, *questions("exam others", count - half, others, but=frozenset(map(sums_of, seen)))]
