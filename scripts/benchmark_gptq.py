"""Measure the quantisation of one layer's singular vectors: how long each step takes, and what it gains.

A synthetic factored delta under ImPart's masks is quantised: first V^T, one component per row, with the Hessian of
correlated inputs; then U, one component per column, with the Hessian of V's outputs. The baseline is the matrix algebra
that the algorithm cannot avoid (products, Cholesky factors and triangular inverses of the same shapes), run alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import measure
import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from impart_hf.coding.gptq import Grid, inverse_factor, quantise, sparse_gptq
from impart_hf.coding.level_scales import fit_levels

_BLOCK = 128
_MEAN_KEPT = 0.25  # share of the entries of the kept components


def correlated_hessian(columns: int, device: str) -> torch.Tensor:
    """Return the Hessian of inputs with variance falling as 1/k in random directions, and log-normal channel sizes."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(columns, columns, generator=generator).to(device)
    mixing *= torch.arange(1, columns + 1, device=device) ** -0.5 / columns**0.5
    mixing *= torch.exp(0.5 * torch.randn(columns, 1, generator=generator)).to(device)
    return mixing @ mixing.t()


def masked_component_rows(side: int, components: int, ratios: torch.Tensor, seed: int, device: str):
    """Return components of unit length as rows, (components, side), and masks that keep the given share of each."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(components, side, generator=generator).to(device) / side**0.5
    mask = torch.rand(components, side, generator=generator).to(device) < ratios[:, None].to(device)
    return plane, mask


def bare_algebra(rows: int, columns: int, hessian: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Return the matrix algebra that each step cannot avoid, in the same shapes and on preallocated memory."""
    weight = torch.randn(columns, rows, device=hessian.device)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, device=hessian.device)
    lower = torch.linalg.cholesky(damped)

    def factor() -> None:
        torch.linalg.cholesky_ex(damped)
        for start in range(0, columns, 512):
            rest = lower[start:, start:]
            torch.linalg.solve_triangular(rest, rest[:, :512], upper=False)

    def gptq() -> None:
        for start in range(0, columns - _BLOCK, _BLOCK):
            stop = start + _BLOCK
            torch.mm(lower[start:stop, stop:].t(), weight[start:stop])

    def choice() -> None:
        torch.mm(weight.t(), hessian)

    return {"factor": factor, "sparse GPTQ": gptq, "choice": choice}


def share_outside_kernels(work: Callable[[], Any], device: str) -> float:
    """Return 1 - the time inside torch's operations (CPU) or kernels (CUDA) / the elapsed time."""
    work()
    cuda = torch.device(device).type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        measure.synchronize(device)
        started = time.perf_counter()
        work()
        measure.synchronize(device)
        elapsed = time.perf_counter() - started
    if cuda:
        inside = sum(e.self_device_time_total for e in profiler.key_averages() if e.device_type == DeviceType.CUDA)
    else:
        inside = sum(e.self_cpu_time_total for e in profiler.key_averages() if e.key.startswith("aten::"))
    return 1 - inside / 1e6 / elapsed


def output_error(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    return ((error @ hessian) * error).sum(1)


def one_side(
    name: str, weight: torch.Tensor, mask: torch.Tensor, grid: Grid, hessian: torch.Tensor, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return, for each step on one plane: its seconds, its bare algebra's, and its output error over rounding's."""
    factor = inverse_factor(hessian)
    codes = sparse_gptq(weight, mask, factor, grid)
    exact, rounded = weight * mask, quantise(weight, mask, None, grid).values
    once = grid.values(codes) * mask
    plain, sparse = (output_error(exact - values, hessian) for values in (rounded, once))

    def choice() -> None:
        ((rounded - once) @ hessian).mul_(rounded + once - 2 * exact).sum(1)

    steps: dict[str, tuple[Callable[[], Any], torch.Tensor | None]] = {
        "factor": (lambda: inverse_factor(hessian), None),
        "sparse GPTQ": (lambda: sparse_gptq(weight, mask, factor, grid), sparse),
        "choice": (choice, torch.minimum(sparse, plain)),
    }
    bare = bare_algebra(len(weight), len(hessian), hessian)
    rows = []
    for step, (work, errors) in steps.items():
        row: dict[str, Any] = {"plane": name, "step": step}
        row["seconds"] = measure.best_seconds(work, options.repeats, options.device)
        row["bare algebra"] = measure.best_seconds(bare[step], options.repeats, options.device)
        row["outside torch"] = share_outside_kernels(work, options.device)
        if errors is not None:
            row["error / rounding's"] = float(errors.double().sum() / plain.double().sum())
            row["better rows"] = float((errors < plain).double().mean())
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmark_gptq.py", description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=4096, help="rows and columns of the square layer (default: 4096)")
    parser.add_argument("--ratio", type=float, default=32, help="compression ratio (default: 32)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--repeats", type=int, default=3, help="number of runs; the shortest is reported (default: 3)")
    options = parser.parse_args(argv)
    side, device = options.side, options.device
    # About 2 bits per value in both planes: side * side * 16 / ratio = 2 * side * components * kept * 2
    components = max(8, min(int(0.4 * side), round(side * 4 / options.ratio / _MEAN_KEPT)))
    kept = _MEAN_KEPT * 2 * (1 - (torch.arange(components) + 0.5) / components)
    widths = np.array([8] * 2 + [3] * 32 + [2] * components)[:components]
    hessian = correlated_hessian(side, device)
    v, mask_v = masked_component_rows(side, components, kept, 2, device)
    grid_v = Grid(fit_levels(v, mask_v, widths).scale[:, None], widths)
    passed = (
        quantise(v, mask_v, None, grid_v).values * (torch.arange(1, components + 1, device=device) ** -0.5)[:, None]
    )
    passed = passed @ hessian @ passed.t()
    u, mask_u = masked_component_rows(side, components, kept, 3, device)
    grid_u = Grid(fit_levels(u, mask_u, widths).scale[None], widths)
    rows = one_side("V^T", v, mask_v, grid_v, hessian, options)
    rows += one_side("U", u.t().contiguous(), mask_u.t().contiguous(), grid_u, passed, options)
    total = {"plane": "both", "step": "seconds per layer"}
    rows.append(total | {key: sum(row[key] for row in rows) for key in ("seconds", "bare algebra")})
    print(measure.machine_line(device))
    print(f"\n{side} x {side}, {components} components, of which {float(mask_v.float().mean()):.0%} is kept\n")
    print(measure.table([dict.fromkeys(rows[1], "") | row for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
