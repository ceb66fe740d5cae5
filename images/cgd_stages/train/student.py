"""The student in training: loading, DeepSpeed, the loss, and the export that transformers and vLLM read."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from cgd_stages.contract import Train
from cgd_stages.errors import UserError
from cgd_stages.models import export, flops
from cgd_stages.models.attention import FLASH, takes_flash
from cgd_stages.models.fit import MXFP4, quantization
from cgd_stages.models.mixture import UnknownMixture, is_routed, mixture_of
from cgd_stages.models.training_memory import CHUNK, Shape, decide, head_width, shape_of
from cgd_stages.train import router
from cgd_stages.training.job import Job

log = logging.getLogger(__name__)

Measure = Callable[..., torch.Tensor]
"""A loss of logits and of what is aligned with them: see `TargetLoss.with_router`."""
MAX_GRAD_NORM = 1.0
ADAM = {"torch_adam": True, "fused": True, "betas": [0.9, 0.999], "eps": 1e-8}
MARKS = (-64.0, 64.0)
"""The output layer returns these once, to see whether the model passes them on unchanged; exact in every dtype."""


class TargetLoss:
    """Summed loss of a micro-batch. Logits exist for the learned positions alone, a chunk at a time.

    The output layer's forward computes the loss, so that every architecture's own forward and DeepSpeed's hooks run
    unchanged: ZeRO-3 gathers the layer's weights once for all chunks. If a model changes the logits after the layer
    (soft-capping, scaling), the logits of all learned positions exist at once.
    """

    def __init__(self, model: Any) -> None:
        """`model`: a causal language model or DeepSpeed's engine around one. Runs it once: all ranks call together."""
        head = model.get_output_embeddings()
        if head is None:
            raise UserError("the student has no output layer", hint="spec.student must be a causal language model.")
        self._model = model
        self._logits, head.forward = head.forward, self._forward
        self._instead: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._balance = router.balance_of(model)
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        with torch.no_grad():
            marks = self._run({"input_ids": token}, lambda states: states.new_tensor(MARKS))
        self._bare = marks.logits.tolist() == list(MARKS)
        """Whether the model returns the output layer's result unchanged."""

    @property
    def has_router(self) -> bool:
        """Whether the model is a mixture of experts whose routers have a loss."""
        return self._balance is not None

    def __call__(self, inputs: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        return self.with_router(inputs, target, ())[0]

    def with_router(
        self,
        inputs: dict[str, torch.Tensor],
        target: torch.Tensor,
        spans: Sequence[slice],
        measure: Measure | None = None,
        aligned: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the router's losses of all examples, summed; `spans`: see `router.spans_of`.

        `measure` makes another loss than the likelihood of the logits (positions, vocabulary) and tokens (positions,)
        of the learned positions, and of what `aligned` has for them (positions, ...). It gives one value for each
        position, or their sum, and so does this.
        """
        if not (self._balance and spans):
            return self._losses(inputs, target, measure, aligned)[0], torch.zeros((), device=target.device)
        loss, output = self._losses(inputs, target, measure, aligned, output_router_logits=True)
        return loss, router.summed(self._balance, output.router_logits, spans)

    def _losses(
        self,
        inputs: dict[str, torch.Tensor],
        target: torch.Tensor,
        measure: Measure | None,
        aligned: Sequence[torch.Tensor],
        **asked: bool,
    ) -> tuple[torch.Tensor, Any]:
        """The loss, and all that the model returns."""
        learned, measure = inputs["input_ids"][:, 1:][target[:, :-1]], measure or _float32_loss
        if self._bare:

            def loss(states: torch.Tensor, *learned: torch.Tensor) -> torch.Tensor:
                return measure(self._logits(states), *learned)

            output = self._run(inputs, lambda states: _in_chunks(loss, states[target], learned, *aligned), **asked)
            return output.logits, output
        output = self._run(inputs, lambda states: self._logits(states[target]), **asked)
        return _in_chunks(measure, output.logits, learned, *aligned), output

    def _forward(self, states: torch.Tensor) -> torch.Tensor:
        """The output layer's forward, of hidden states (examples, positions, hidden)."""
        result: torch.Tensor = self._logits(states) if self._instead is None else self._instead(states)
        return result

    def _run(
        self, inputs: dict[str, torch.Tensor], instead: Callable[[torch.Tensor], torch.Tensor], **asked: bool
    ) -> Any:
        """What the model returns when its output layer computes `instead`."""
        self._instead = instead
        try:
            return self._model(**inputs, use_cache=False, **asked)
        finally:
            self._instead = None


def _in_chunks(measure: Measure, rows: torch.Tensor, *aligned: torch.Tensor) -> torch.Tensor:
    """What `measure` gives for `rows` (positions, width) and what is aligned with them, a chunk at a time: the sum of
    its sums, or its values one after another.

    Intermediate results exist for one chunk at a time; if there are several, backward computes them again.
    """
    if len(rows) <= CHUNK:
        return measure(rows, *aligned)
    chunks = zip(*(torch.split(tensor, CHUNK) for tensor in (rows, *aligned)), strict=True)
    found = [checkpoint(measure, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat(found) if found[0].dim() else torch.stack(found).sum()


def _float32_loss(logits: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood, summed: `logits` (positions, vocabulary), `learned` (positions,)."""
    return cross_entropy(logits.float(), learned, reduction="sum")


def deepspeed_config(work: Train, world: int, *, gpu: bool) -> dict[str, Any]:
    """DeepSpeed's configuration. Its batch is one example per rank, because batches and rates are ours: batching.py."""
    host = {"device": "cpu", "pin_memory": gpu}
    offloaded = {"none": (), "optimizer": ("optimizer",), "parameters": ("optimizer", "param")}[work.offload]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world,
        "gradient_clipping": MAX_GRAD_NORM,
        "zero_optimization": {"stage": work.zero_stage} | {f"offload_{what}": host for what in offloaded},
        # torch's fused AdamW, for GPUs and CPUs: DeepSpeed's own are compiled at every start.
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": work.learning_rate, "weight_decay": work.weight_decay, **ADAM},
        },
        "checkpoint": {"use_node_local_storage": True},
    }
    if work.dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
        if work.zero_stage:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def flash(work: Train, *, gpu: bool, installed: bool, head: int) -> bool:
    """Whether FlashAttention 2 can run: its package, a GPU, 16 bits, and heads of at most 256."""
    return installed and gpu and work.dtype == "bfloat16" and head <= 256


def load(job: Job, config: dict[str, Any]) -> Any:
    """The student before training, in the dtype of its training, with its attention chosen. Raises UserError."""
    from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.utils import is_flash_attn_2_available

    # While this object lives, from_pretrained partitions as it loads; zero.Init around it fails on padding tokens.
    sharded = HfDeepSpeedConfig(config) if job.work.zero_stage == 3 else None
    try:
        given: dict[str, Any] = {"dtype": getattr(torch, job.work.dtype)}
        if quantization(AutoConfig.from_pretrained(job.student, trust_remote_code=False)) == MXFP4:
            given["quantization_config"] = Mxfp4Config(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(job.student, trust_remote_code=False, **given)
        if "quantization_config" in given:
            # transformers leaves in bfloat16 what was quantized, and saves it under a name that nothing reads.
            model.to(given["dtype"])._weight_conversions = None
    except (ValueError, OSError) as error:
        raise UserError(f"the student does not load: {error}", hint="Correct spec.student.model.") from error
    del sharded
    model.train()
    # transformers itself chooses sdpa, or eager for a model that has no other.
    head, installed = head_width(model.config.get_text_config()), is_flash_attn_2_available()
    usable = flash(job.work, gpu=torch.cuda.is_available(), installed=installed, head=head)
    if usable and takes_flash(model):
        model.set_attn_implementation(FLASH)
    if dist.get_rank() == 0:
        log.info("attention: %s", model.config._attn_implementation)
    return model


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on every rank's GPU, at least; None on a CPU."""
    if device.type != "cuda":
        return None
    free = torch.tensor(torch.cuda.mem_get_info(device)[0], device=device)
    # With ZeRO-3 a recomputation is a collective operation, so all ranks must take the same decision.
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    return int(free)


def spare_memory(model: Any, work: Train, *, tokens: int, free: int | None) -> None:
    """Let backward compute activations again if they do not fit into memory; it costs one more forward pass.
    `tokens`: of the largest micro-batch; `free`: see `free_memory`."""
    decision = decide(work, shape(model), world=dist.get_world_size(), tokens=tokens, free=free)
    if decision.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if dist.get_rank() == 0:
        log.info("activation checkpointing %s: %s", "on" if decision.checkpointing else "off", decision.why)


def initialize(model: Any, config: dict[str, Any]) -> Any:
    """DeepSpeed's engine around the student."""
    import deepspeed

    if dist.get_rank() == 0:
        log.info("DeepSpeed's configuration: %s", json.dumps(config))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=learned, config=config)
    return engine


def grad_norm(model: torch.nn.Module) -> float:
    """Norm of the gradients that DeepSpeed has averaged over ranks. Without ZeRO, DeepSpeed does not report it."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def cost(model: Any) -> flops.Work | None:
    """The cost of the student's tokens, which meet some of the experts of a mixture; None if its config does not say
    how many."""
    config = model.config.get_text_config()
    try:
        mixture = mixture_of(model.config)
    except UnknownMixture:
        return None
    embeddings, head, adapter = model.get_input_embeddings(), model.get_output_embeddings(), _adapter(model)
    body = _size(model) - (adapter or 0) - _size(embeddings) - (0 if head.weight is embeddings.weight else _size(head))
    if mixture:
        routed = sum(_numel(parameter) for name, parameter in model.named_parameters() if is_routed(name))
        body -= routed - routed * mixture.active // mixture.experts
    heads = config.num_attention_heads * head_width(config)
    return flops.Work(body=body, head=_size(head), attention=config.num_hidden_layers * heads, adapter=adapter)


def shape(model: Any) -> Shape | None:
    """The student's shape, from which its need of memory is estimated; None where there is no estimate."""
    norms = [_size(module) for module in model.modules() if type(module).__name__.endswith("Norm")]
    found, adapter = shape_of(model.config, _size(model), norms), _adapter(model)
    if found is None or adapter is None:
        return found
    return replace(found, parameters=found.parameters - adapter, trained=adapter)


def _adapter(model: torch.nn.Module) -> int | None:
    """Number of parameters of the adapter that is learned; None where all of the student's are."""
    if all(parameter.requires_grad for parameter in model.parameters()):
        return None
    return sum(_numel(parameter) for parameter in model.parameters() if parameter.requires_grad)


def _size(module: torch.nn.Module) -> int:
    """Number of a module's parameters."""
    return sum(_numel(parameter) for parameter in module.parameters())


def _numel(parameter: torch.Tensor) -> int:
    """Its number of elements. ZeRO-3 replaces it by an empty one with the number in `ds_numel`."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def store(job: Job, engine: Any, target: Path) -> None:
    """Write the trained model for transformers and vLLM, in the student's stored dtype, to a folder of its own."""
    import deepspeed

    state: dict[str, torch.Tensor] = {}
    dtype = getattr(torch, job.student_dtype)
    # named_parameters gives tied weights once, under the name that transformers keeps.
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=job.work.zero_stage == 3):
            if dist.get_rank() == 0:
                state[name] = parameter.detach().to("cpu", dtype, copy=True)
    if dist.get_rank() == 0:
        kept = export.tensors_of(engine.module)
        state |= {name: tensor.cpu() for name, tensor in kept.items() if name not in state}
        expected = export.whole(engine.module, state)
        write(job, engine.module, target, state)
        if (stored := export.stored_elements(target)) != expected:
            raise RuntimeError(f"transformers has stored {stored} of the model's {expected} elements")
    dist.barrier()


def write(job: Job, model: Any, target: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write a model that was made of the job's student; `state`: its tensors, where they are not its own."""
    student = job.work.student
    export.write(
        model,
        target,
        source=Path(job.student),
        name=student.name,
        dtype=job.student_dtype,
        template=job.work.chat.template,
        state=state,
    )
