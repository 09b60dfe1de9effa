"""The kernels compile for a GPU: Triton brings its compiler and NVIDIA's assembler, which need no device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from impart_hf.modeling import triton_apply, triton_decode, triton_planes

POINTERS = dict(
    base="bf16", out="bf16", x="bf16", y="bf16", bad="i32", codes="u8", table="i32", prefix="i32", levels="fp32",
    left="fp32", right="fp32", plane="fp32", hidden="fp32", order="i64", bounds="i32", deltas="i64", masks="i32",
    kept="i32",
)


def check(module, names, **constants):
    for name in names.split():
        kernel = getattr(module, name)
        of_kernel = {i: constants[arg] for i, arg in enumerate(kernel.arg_names) if arg in constants}
        signature = {
            arg: "constexpr" if arg in constants else "*" + POINTERS[arg] if arg in POINTERS else "i32"
            for arg in kernel.arg_names
        }
        source = ASTSource(kernel, signature, {(i,): value for i, value in of_kernel.items()})
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert compiled.asm["cubin"] and compiled.metadata.shared <= 100 << 10, name
        print("compiled", name)


tile = dict(SIDE=128, COMPONENTS=32, ROWS=16, PRECISION="tf32x3", LEFT=True)
check(triton_decode, "fused_kernel unpack_kernel product_kernel direct_kernel", MASKED=True, **tile)
check(triton_decode, "unpack_kernel", MASKED=False, **tile)
group = dict(MASKED=True, PRECISION="tf32x3", ROWS=16, COLUMNS=32, BLOCK=64)
check(triton_apply, "shrink_kernel expand_kernel direct_kernel", **group)
check(triton_planes, "finite_kernel", **group)
check(triton_planes, "count_kernel", COLUMNS=4, BLOCKS=16)
# Triton makes constants of arguments that are 1
check(triton_decode, "product_kernel direct_kernel", MASKED=False, n=1, **tile)
check(triton_apply, "shrink_kernel expand_kernel direct_kernel", **(group | dict(MASKED=False, ROWS=64, m=1, n=1)))
check(triton_planes, "count_kernel", COLUMNS=4, BLOCKS=16, columns=1, most_steps=1)
"""


@pytest.mark.slow
@pytest.mark.process
def test_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiled") == 16
