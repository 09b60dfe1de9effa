"""Triton is optional, and where it is, the kernels compile for a GPU: its compiler and assembler need no device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

from impart_hf.repository.reader_files import reader_files

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from impart_hf.coding import triton_gptq
from impart_hf.modeling import triton_apply, triton_decode, triton_exact, triton_planes

POINTERS = dict(
    base="bf16", out="bf16", x="bf16", y="bf16", bad="i32", codes="u8", table="i32", prefix="i32", levels="fp32",
    left="fp32", right="fp32", plane="fp32", hidden="fp32", order="i64", bounds="i32", deltas="i64", masks="i32",
    kept="i32",
)
EXACT_POINTERS = dict(
    table="i64", words="i64", starts="i64", ends="i64", states="i64", classes="u8", tokens="u8", bad="i32",
)
GPTQ_POINTERS = dict(
    left="fp32", codes="u8", errors="fp32", order="i64", ahead="fp32", share="fp32", kept="u8", widths="i32",
    tops="fp32", edges="fp32", levels="fp32",
)


def check(module, names, pointers=POINTERS, **constants):
    for name in names.split():
        kernel = getattr(module, name)
        of_kernel = {i: constants[arg] for i, arg in enumerate(kernel.arg_names) if arg in constants}
        signature = {
            arg: "constexpr" if arg in constants else "*" + pointers[arg] if arg in pointers else "i32"
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
check(triton_exact, "tokens_kernel", EXACT_POINTERS, LANES=64)
rounding = dict(MASKED=True, NORMAL=True, COLUMNS=128, ROWS=8)
check(triton_gptq, "round_kernel", GPTQ_POINTERS, BY_ROW=True, **rounding)
check(triton_gptq, "round_kernel", GPTQ_POINTERS, BY_ROW=False, **rounding)
check(triton_gptq, "round_kernel", GPTQ_POINTERS, BY_ROW=False, MASKED=False, NORMAL=False, COLUMNS=128, ROWS=8)
# Triton makes constants of arguments that are 1
check(triton_decode, "product_kernel direct_kernel", MASKED=False, n=1, **tile)
check(triton_apply, "shrink_kernel expand_kernel direct_kernel", **(group | dict(MASKED=False, ROWS=64, m=1, n=1)))
check(triton_planes, "count_kernel", COLUMNS=4, BLOCKS=16, columns=1, most_steps=1)
"""


WITHOUT_TRITON = """
import sys

sys.modules["triton"] = None  # importing it fails
import numpy as np
import torch

from impart_hf.modeling import triton_apply, triton_decode
from impart_hf.modeling.delta_decode import add_delta
from impart_hf.modeling.delta_record import FACTORED, Record, pack_record

nothing = np.empty(0, np.uint8)
record = Record(FACTORED, 2, 3, 0, 0, 1.0, 0.0, [], nothing.astype("<f2"), nothing.astype("<u2"), [], nothing)
base = torch.ones(2, 3)
assert triton_decode.decoder_for(base, base.dtype) is triton_apply.applied_deltas([record], "t", base.device) is None
data = np.frombuffer(pack_record(record), np.uint8)
assert torch.equal(add_delta(base, data, "t", torch.float32, kernels=True), base)
"""


def test_remote_code_does_not_require_triton() -> None:
    for path in reader_files():
        assert "triton" not in get_imports(path), path.name


@pytest.mark.process
def test_triton_may_be_missing() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.process
def test_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiled") == 20
