"""How the student is trained, and the ablations of it."""

from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic.alias_generators import to_camel

from cgd_operator.api.fields import VARIANT, rules
from cgd_stages.contract import (
    DPO_BETA,
    GKD_BETA,
    MOST_TOP_K,
    ON_POLICY,
    REFRESH,
    ROLLOUT_TOKENS,
    SETTINGS,
    TOP_K,
    Contract,
    Course,
    CritiqueKind,
    Exported,
    Form,
    Fraction,
    HeldOut,
    InstructionTurn,
    Keep,
    Learned,
    Number,
    Objective,
    Rate,
    RivalKind,
    StopUnless,
    Supervised,
    Target,
    Texts,
    Upkeep,
    method_of,
)

BATCH_RULE = (
    "self.globalBatchSize >= self.workers * self.gpusPerWorker",
    "every GPU needs an example: raise globalBatchSize to at least workers * gpusPerWorker",
)
OFFLOAD_RULE = (
    "self.offload == 'none' || self.zeroStage >= (self.offload == 'parameters' ? 3 : 1)",
    "only what ZeRO partitions is offloaded: set zeroStage to 3 for parameters, to 1 or more for the optimizer",
)
RATE_RULE = (
    "(self.kind in ['corrupted', 'miscritique']) == has(self.rate)",
    'a corrupted critique or a miscritique needs a rate, such as "0.3", and no other kind has one',
)
TARGET_RULE = (
    "(self.kind == 'miscritique') == has(self.target)",
    "a miscritique needs a target, kept or refined, and no other kind has one",
)
LEARNS_RULE = (
    "size(self.objectives) > 0 || size(self.variants) > 0",
    "there is nothing to learn: name an objective or a variant",
)
_CGD = "('CGD' in self.objectives || self.variants.exists(one, one.kind == 'CGD'))"
ABLATION_RULE = (
    f"self.critique.kind == 'matched' || {_CGD}",
    "only CGD is conditioned on the critique: add CGD to objectives, or leave critique out",
)
BARE_RULE = (
    f"double(self.bareShare) == 0.0 || {_CGD}",
    "only CGD learns with and without its critique: add CGD to objectives, or leave bareShare out",
)
_MODELS = ("base", *(name.lower() for name in (*get_args(Supervised), *get_args(RivalKind))))
_TAKEN = (*_MODELS, *get_args(Texts))
NAME_RULE = (
    f"!(self.name in {list(_TAKEN)})",
    f"the names {', '.join(_TAKEN)} belong to models that a run has anyway: take another one",
)
CRITIQUE_OF_CGD_RULE = (
    "self.kind == 'CGD' || !(has(self.critique) || has(self.bareShare))",
    "critique and bareShare are for the kind CGD: remove them",
)
CONTEXT_RULE = (
    f"self.kind in {list(SETTINGS['context'])} || !has(self.context)",
    "context is for the kinds CGD and CFT, and for ContextDistillation, which have an instruction: remove it",
)
OWN_RULES = {
    name: (
        f"self.kind in {list(SETTINGS[name])} || !has(self.{to_camel(name)})",
        f"{to_camel(name)} is for the kind {' or '.join(SETTINGS[name])}: remove it",
    )
    for name in ("beta", "texts", "top_k", "on_policy", "form", "refresh", "max_tokens")
}
BETA_RULE = (
    (
        "!has(self.beta) || (self.kind == 'GKD' ? (double(self.beta) in [0.0, 1.0] || "
        "(double(self.beta) >= 0.05 && double(self.beta) <= 0.95)) : double(self.beta) > 0.0)"
    ),
    (
        'beta: DPO takes a number above 0; GKD takes "0" (forward KL), "1" (reverse KL) or a number from 0.05 to 0.95: '
        "nearer to 0 and 1 its divergence vanishes, and nothing is learned"
    ),
)
OFF_POLICY_RULE = (
    "!has(self.onPolicy) || double(self.onPolicy) > 0.0 || !(has(self.refresh) || has(self.maxTokens))",
    'refresh and maxTokens are for samples, of which onPolicy "0" has none: remove them',
)
STEPS = 2
"""A variant may start from a variant, and that from another, which starts from an objective or from the student."""


def _begins(one: str, steps: int) -> str:
    """In CEL: whether a variant's training begins somewhere, so many variants away at most. A circle never does."""
    begins = f"!has({one}.from) || {one}.from in self.objectives"
    if steps:
        before = f"before{steps}"
        rest = _begins(before, steps - 1)
        begins += f" || self.variants.exists({before}, {before}.name == {one}.from && ({rest}))"
    return begins


FROM_RULE = (
    f"self.variants.all(one, {_begins('one', STEPS)})",
    (
        "variants: from names one of objectives, or another variant which begins at the student or at an objective, "
        f"at most {STEPS} variants on and in no circle"
    ),
)
SELECT_RULE = (
    "!has(self.select) || self.select == 'last' || !has(self.fraction) || double(self.fraction) > 0.0",
    "bare and context choose by the loss on held-out prompts: hold out a fraction above 0, or leave select out",
)


class Critique(Contract):
    """What CGD is given as the critique, for ablations. The targets stay the same, unless target is refined."""

    model_config = ConfigDict(json_schema_extra=rules(RATE_RULE, TARGET_RULE))

    kind: CritiqueKind = Field(
        "matched",
        description="matched gives every row its own critique, shuffled that of another prompt, generic one "
        "placeholder text, none no critique. corrupted gives a share of the rows (rate) another prompt's critique "
        "under the opposite verdict, and the others their own. miscritique gives the same rows a critique of their "
        "own draft in which the teacher defends the opposite verdict (one more pass of the teacher).",
    )
    rate: Rate | None = Field(None, description="The share of the rows that get a wrong critique.")
    target: Target | None = Field(
        None,
        description="What is learned behind a miscritique: the refinement as it is (kept), or the one that the teacher "
        "makes from the miscritique (refined).",
    )

    @model_validator(mode="after")
    def _of_its_kind(self) -> "Critique":
        if (self.kind in ("corrupted", "miscritique")) != (self.rate is not None):
            raise ValueError(RATE_RULE[1])
        if (self.kind == "miscritique") != (self.target is not None):
            raise ValueError(TARGET_RULE[1])
        return self


class Validation(HeldOut):
    """Prompts that no training learns from. The losses on them, and no benchmark, decide which model is exported.

    training.seed chooses them, the same for every objective of the run, with all samples of a prompt together.
    """

    model_config = ConfigDict(json_schema_extra=rules(SELECT_RULE))

    select: Exported | None = Field(
        None,
        description="Which model is exported: the one with the least loss given the prompt alone, as at inference "
        "(bare), the one with the least loss in the objective's own context (context), or the one after the last step "
        "(last). Default: bare where prompts are held out, else last.",
    )

    @field_validator("select", mode="before")
    @classmethod
    def _no_best(cls, value: Any) -> Any:
        if value == "best":
            raise ValueError("best is called context now; without select the loss given the prompt alone decides")
        return value

    @model_validator(mode="after")
    def _something_to_select_by(self) -> "Validation":
        if self.select in ("bare", "context") and self.fraction == 0:
            raise ValueError(SELECT_RULE[1])
        return self


BARE_SHARE = (
    "The share of CGD's rows, by seed, whose context is the prompt alone, as at inference; their target stays the "
    'refinement. A higher share has the same rows and more. "0" is the paper\'s.'
)
CONTEXT = (
    "The turn in which the instruction of CGD's and CFT's contexts stands: user, above the texts of the row, as the "
    "methods' authors have it, or system."
)
VariantName = Annotated[str, Field(max_length=24, pattern=VARIANT)]


class Variant(Contract):
    """A further training, of an objective with settings of its own. What it leaves out is as training says."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            NAME_RULE, CRITIQUE_OF_CGD_RULE, CONTEXT_RULE, *OWN_RULES.values(), BETA_RULE, OFF_POLICY_RULE
        )
    )

    name: VariantName = Field(
        description="What its stages, its model and its lines in the report are called; the stage that trains "
        "cgd-shuffled is train-cgd-shuffled."
    )
    kind: Objective = Field(
        description="The objective: one of objectives, or one that learns from the same rows by another loss, given "
        "the prompt alone. DPO learns to prefer the refinement to the student's own answer. SupervisedKD learns the "
        "teacher's probabilities on stored texts, and needs a teacher with the student's tokens. ContextDistillation "
        "learns the probabilities that the model it starts from has with answer and critique in view. GKD learns the "
        "teacher's probabilities on what the student itself samples while it is trained, and on the refinements; OPD "
        "learns from the teacher's judgement of each token that the student samples. Both need a teacher with the "
        "student's tokens, and hold the GPUs of student, teacher and training at once."
    )
    from_: Annotated[str, Field(min_length=1, max_length=24)] | None = Field(
        None,
        alias="from",
        description="The training whose model this one starts from: an objective, such as CGD, or another variant. "
        "Default: the student.",
    )
    critique: Critique | None = None
    bare_share: Fraction | None = Field(None, description=BARE_SHARE)
    context: InstructionTurn | None = Field(None, description=CONTEXT)
    learning_rate: Rate | None = Field(None, description="Its highest learning rate.")
    epochs: int | None = Field(None, ge=1, le=100, description="How often it goes through the rows.")
    beta: Fraction | None = Field(
        None,
        description=f'DPO: how much the distance from its start weighs; default: "{DPO_BETA:g}". GKD: which divergence '
        'it learns, from "0" (forward KL: all that the teacher does) to "1" (reverse KL: nothing that the teacher '
        f'does not do); default: "{GKD_BETA:g}".',
    )
    texts: Texts | None = Field(
        None,
        description="SupervisedKD: on which texts it learns, the refinements or the teacher's own answers (one more "
        "pass of the teacher); default: refined.",
    )
    top_k: int | None = Field(
        None,
        ge=1,
        le=MOST_TOP_K,
        description="SupervisedKD, ContextDistillation and GKD: how many of a position's likeliest tokens are told "
        f"apart; the others count together. Default: {TOP_K}.",
    )
    on_policy: Fraction | None = Field(
        None,
        description="GKD: the share of each step's examples that the student samples; the others learn the refinement "
        f'of the same prompt. "1" samples all, "0" none. Default: "{ON_POLICY:g}".',
    )
    form: Form | None = Field(
        None,
        description="OPD: reward weighs each sampled token by the teacher's less the student's log-probability, as "
        "policy gradients do; loss takes half the square of that difference. Both follow the reverse KL. Default: "
        "reward.",
    )
    refresh: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="GKD and OPD: after how many steps the student samples anew. With 1 each step learns what the "
        f"student of that step samples, and the GPUs wait most for each other. Default: {REFRESH}.",
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        le=1_048_576,
        description="GKD and OPD: the most tokens of a sample; a longer one is cut there and learned as far as it "
        f"goes. Default: {ROLLOUT_TOKENS}.",
    )

    @property
    def distills(self) -> bool:
        """Whether it learns the teacher's own answers."""
        return self.kind == "DistilledSFT" or self.texts == "distilled"

    @property
    def samples(self) -> float:
        """The share of the examples that the student samples while it is trained."""
        if self.kind == "GKD":
            return ON_POLICY if self.on_policy is None else self.on_policy
        return 1.0 if method_of(self.kind).samples else 0.0

    @model_validator(mode="after")
    def _of_its_kind(self) -> "Variant":
        if self.name in _TAKEN:
            raise ValueError(NAME_RULE[1])
        if self.kind != "CGD" and not (self.critique is None and self.bare_share is None):
            raise ValueError(CRITIQUE_OF_CGD_RULE[1])
        if self.kind not in SETTINGS["context"] and self.context is not None:
            raise ValueError(CONTEXT_RULE[1])
        for name, (_, mend) in OWN_RULES.items():
            if self.kind not in SETTINGS[name] and getattr(self, name) is not None:
                raise ValueError(mend)
        if self.beta is not None and not self._takes(self.beta):
            raise ValueError(BETA_RULE[1])
        if self.on_policy == 0 and not (self.refresh is None and self.max_tokens is None):
            raise ValueError(OFF_POLICY_RULE[1])
        return self

    def _takes(self, beta: float) -> bool:
        return beta > 0 if self.kind == "DPO" else beta in (0, 1) or 0.05 <= beta <= 0.95


class Objectives(Contract):
    """What is learned."""

    objectives: tuple[Supervised, ...] = Field(
        ("CGD",),
        max_length=5,
        json_schema_extra={"x-kubernetes-list-type": "set"},
        description="What the student learns. Every objective trains a model of its own, one after another. CGD learns "
        "the refinement, given prompt, answer and critique. CFT learns the critique, given prompt and answer. Given "
        "the prompt alone, DistilledSFT learns the teacher's own answer (one more pass of the teacher), SFT the "
        "reference answer (set prompts.fields.reference), and RefinedSFT the refinement.",
    )
    variants: tuple[Variant, ...] = Field(
        (),
        max_length=20,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        description="Further trainings behind those of objectives, so that one run compares critiques, rates, shares "
        "and losses on the same rows. With variants objectives may be [].",
    )
    critique: Critique = Critique()
    bare_share: Fraction = Field(Number("0"), description=BARE_SHARE)
    context: InstructionTurn = Field("user", description=CONTEXT)
    thinking: Learned | None = Field(
        None,
        description="What becomes of thoughts. drop: the student is trained and evaluated with its thinking off. "
        "learn: with its thinking on, and the teacher's thought before a target is learned too, in the student's own "
        "markup. Default: learn where student.chat.thinking is on, else drop.",
    )
    keep: Keep = Field(
        "all",
        description="Which rows every objective learns, by the grade of their refinement: all, those with a right one "
        "(right), or one right one of each prompt (one-right). right and one-right need references.",
    )


class Workers(Contract):
    """What runs a training, and in how many processes."""

    workers: int = Field(1, ge=1, le=512, description="How many pods train together.")
    backend: Literal["auto", "PyTorchJob", "TrainJob"] = Field(
        "auto",
        description="The kind that runs a training: PyTorchJob (Kubeflow Training Operator) or TrainJob (Kubeflow "
        "Trainer v2). auto takes the one that the cluster has, PyTorchJob first.",
    )
    parallel: int = Field(
        1,
        ge=1,
        le=25,
        description="How many trainings run side by side, each with all its workers. One that starts from another's "
        "model waits for it.",
    )
    gpus_per_worker: int = Field(
        8, ge=1, le=64, description="How many GPUs a pod has. It runs as many processes, on a CPU too."
    )
    termination_grace_period_seconds: int | None = Field(
        None,
        ge=1,
        le=86400,
        description="How many seconds a pod has to store a checkpoint when it must go. Default: 120, or up to 600 "
        "where prepare finds that a node stores the checkpoint in more time than that (at 200 MB a second). Nodes "
        "that are taken back, such as spot nodes, give 30 to 120 seconds whatever is asked.",
    )


class Training(Upkeep, Workers, Course, Objectives):  # the fields of the last base come first
    """How the student is trained."""

    model_config = ConfigDict(
        json_schema_extra=rules(BATCH_RULE, OFFLOAD_RULE, LEARNS_RULE, ABLATION_RULE, BARE_RULE, FROM_RULE)
    )

    validation: Validation = Validation()
    stop_unless: StopUnless | None = Field(
        None,
        description="Ends the run when a training does not transfer to the prompt alone: it fails with the reason "
        "NoTransfer, after a checkpoint is stored. Judged are the trainings of CGD with matched critiques; where a run "
        "has none, all. Needs evaluation.early.",
    )

    @property
    def kinds(self) -> frozenset[Objective]:
        """The objectives of all trainings."""
        return frozenset((*self.objectives, *(variant.kind for variant in self.variants)))

    @property
    def titles(self) -> tuple[str, ...]:
        """What the trainings are called, in order."""
        return (*self.objectives, *(variant.name for variant in self.ordered))

    @property
    def distills(self) -> bool:
        """Whether a training learns the teacher's own answers."""
        return "DistilledSFT" in self.objectives or any(variant.distills for variant in self.variants)

    @property
    def ordered(self) -> tuple[Variant, ...]:
        """The variants, each behind the one whose model it starts from, and else as the manifest has them."""
        return tuple(sorted(self.variants, key=self._variants_before))

    def _variants_before(self, variant: Variant) -> int:
        """How many variants are trained in turn before this one, at most STEPS + 1 where they have no beginning."""
        named = {other.name: other for other in self.variants}
        before = 0
        while variant.from_ is not None and variant.from_ not in self.objectives and before <= STEPS:
            before += 1
            if variant.from_ not in named:
                return STEPS + 1
            variant = named[variant.from_]
        return before

    @property
    def misleads(self) -> bool:
        """Whether a training reads miscritiques."""
        own = [variant.critique or self.critique for variant in self.variants if variant.kind == "CGD"]
        own += [self.critique] if "CGD" in self.objectives else []
        return any(critique.kind == "miscritique" for critique in own)

    @model_validator(mode="after")
    def _consistent(self) -> "Training":
        if self.global_batch_size < self.workers * self.gpus_per_worker:
            raise ValueError(BATCH_RULE[1])
        if self.offload != "none" and self.zero_stage < (3 if self.offload == "parameters" else 1):
            raise ValueError(OFFLOAD_RULE[1])
        if not self.titles:
            raise ValueError(LEARNS_RULE[1])
        if self.critique.kind != "matched" and "CGD" not in self.kinds:
            raise ValueError(ABLATION_RULE[1])
        if self.bare_share and "CGD" not in self.kinds:
            raise ValueError(BARE_RULE[1])
        if any(self._variants_before(variant) > STEPS for variant in self.variants):
            raise ValueError(FROM_RULE[1])
        return self
