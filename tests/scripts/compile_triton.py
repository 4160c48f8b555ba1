"""Compile the Triton kernels for a GPU that need not be there, and print what the code is like."""

from __future__ import annotations

import inspect
import itertools
import json
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from alto_ds.kernels import triton as kernels

TYPES = {
    **dict.fromkeys(("addresses", "fragments", "blocks", "first_blocks"), "*i64"),
    **dict.fromkeys(("partial_sums", "sums", "step_sizes"), "*fp64"),
    "rounding_key": "i32",
}


def compiled(kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """Facts about the PTX of ``kernel`` for compute capability 9.0."""
    names = inspect.signature(kernel.fn).parameters
    signature = {n: "constexpr" if n in constants else TYPES.get(n, "fp32") for n in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    return {
        "kernel": kernel.fn.__name__,
        "fused multiply-adds": ptx.count("fma.rn"),
        "local memory": ".local" in ptx,
    }


def main() -> None:
    found = [compiled(kernels._add_blocks, {"BLOCKS": 128})]
    for param, state in itertools.product(
        (tl.float32, tl.bfloat16, tl.float16), (tl.float32, tl.bfloat16)
    ):
        common = {"PARAM": param, "STATE": state, "BLOCK": kernels._BLOCK}
        found.append(compiled(kernels._apply_update, common))
        kinds = ((param, True, True), (param, False, True), (tl.float32, True, False))
        for grad, correct, guard in kinds:
            constants = common | {"GRAD": grad, "CORRECT": correct, "GUARD": guard}
            found.append(compiled(kernels._update_states, constants))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
