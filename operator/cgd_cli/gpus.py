"""The GPUs that an estimate knows, by the data sheets of their maker."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU by its maker's data sheet: FLOP/s in bfloat16 (dense), bytes/s, bytes."""

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
