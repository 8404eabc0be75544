"""Compiles every kernel for an H200 (sm_90) on a machine without one: the wrappers run, their launches are compiled instead of started.

    TRITON_INTERPRET=0 python -m tests.kernels.compile_for_h200

Prints one line per kernel variant: shared memory and binary in bytes, uses of local memory (spilled registers). Ends with an error where one does not compile or assemble.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8", torch.bool: "i1", torch.float64: "fp64",
}  # fmt: skip


def type_of(value) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    raise TypeError(f"no Triton type for {value!r}")


def compiled(kernel: JITFunction, args: tuple, options: dict):
    """The launch, assembled. Without a GPU ptxas is all that can judge it."""
    names = list(kernel.arg_names)
    values = dict(zip(names, args)) | {name: value for name, value in options.items() if name in names}
    fixed = {p.name for p in kernel.params if p.is_constexpr} | {name for name, value in values.items() if value is None}
    signature = {name: "constexpr" if name in fixed else type_of(values[name]) for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={name: values[name] for name in fixed})
    return triton.compile(source, target=TARGET, options={name: value for name, value in options.items() if name not in names})


def record(found: dict):
    """Compile launches instead of starting them; one per kernel and set of optional arguments."""

    def run(self, *args, grid, warmup, **options):
        given = tuple(name for name, value in zip(self.arg_names, args) if value is None)
        types = tuple(str(value.dtype) for value in args if isinstance(value, torch.Tensor))
        key = (self.__name__, given, types)
        if key not in found:
            found[key] = compiled(self, args, options)

    return run


def main() -> int:
    found: dict = {}
    JITFunction.run = record(found)
    from tests.kernels.launches import launch_all

    for dtype, terms in ((torch.float32, False), (torch.bfloat16, True)):
        launch_all("cpu", dtype, terms)
    for (name, without, types), made in found.items():
        spilled = made.asm["ptx"].count(".local")
        print(f"{name:10} {'bf16' if 'torch.bfloat16' in types else '':5} shared {made.metadata.shared:6} cubin {len(made.asm['cubin']):7} "
              f"local {spilled} without {', '.join(without) or '-'}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
