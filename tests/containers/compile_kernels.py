"""What Triton does at a start, as far as it goes without a GPU: kernels for the GPUs, a launcher in C."""

from triton import compile as build
from triton import jit
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.build import compile_module_from_src

MODULE = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "launcher", 0, -1, 0};
PyMODINIT_FUNC PyInit_launcher(void) { return PyModule_Create(&module); }
"""


@jit
def double(x, n, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(x + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)


for capability in (80, 90, 100):
    source = ASTSource(double, {"x": "*fp32", "n": "i32", "block": "constexpr"}, {"block": 128})
    made = build(source, target=GPUTarget("cuda", capability, 32))
    print(f"a kernel for sm_{capability}: {len(made.asm['cubin'])} bytes")
print("a module in C:", compile_module_from_src(MODULE, "launcher").__name__)
