"""How long the quantisation of one layer's singular vectors takes, where that time goes, and what it gains.

A synthetic factored delta under ImPart's masks: V^T, a component a row, against the Hessian of correlated inputs, then
U, a component a column, against the Hessian of what V passes on. The named peer is the matrix algebra that the
algorithm cannot do without (products, Cholesky factors, triangular inverses of the same shapes), run bare.
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

from impart_hf.coding.gptq import Grid, best_scale, inverse_factor, quantise, sparse_gptq

_BLOCK = 128
_MEAN_KEPT = 0.25  # of the entries of the components that are kept at all


def correlated_hessian(columns: int, device: str) -> torch.Tensor:
    """Of inputs with variance falling as 1/k along random directions, and channels of unequal size (log-normal)."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(columns, columns, generator=generator).to(device)
    mixing *= torch.arange(1, columns + 1, device=device) ** -0.5 / columns**0.5
    mixing *= torch.exp(0.5 * torch.randn(columns, 1, generator=generator)).to(device)
    return mixing @ mixing.t()


def masked_component_rows(side: int, components: int, ratios: torch.Tensor, seed: int, device: str):
    """Components of unit length, a row each, (components, side), and masks that keep such shares of them."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(components, side, generator=generator).to(device) / side**0.5
    mask = torch.rand(components, side, generator=generator).to(device) < ratios[:, None].to(device)
    return plane, mask


def scales(plane: torch.Tensor, mask: torch.Tensor, widths: np.ndarray) -> torch.Tensor:
    found = torch.empty(len(plane), device=plane.device)
    for width in sorted(set(widths.tolist())):
        rows = torch.from_numpy(widths == width).to(plane.device)
        found[rows] = best_scale(plane[rows], mask[rows], width)
    return found


def bare_algebra(rows: int, columns: int, hessian: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What the algorithm cannot do without, in the shapes in which it does it, on memory that is there already."""
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
    """1 - the time within torch's operations (cpu) or kernels (cuda) / the time that passes."""
    work()
    cuda = torch.device(device).type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        measure.synchronize(device)
        started = time.perf_counter()
        work()
        measure.synchronize(device)
        passed = time.perf_counter() - started
    if cuda:
        inside = sum(e.self_device_time_total for e in profiler.key_averages() if e.device_type == DeviceType.CUDA)
    else:
        inside = sum(e.self_cpu_time_total for e in profiler.key_averages() if e.key.startswith("aten::"))
    return 1 - inside / 1e6 / passed


def output_error(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    return ((error @ hessian) * error).sum(1)


def one_side(
    name: str, weight: torch.Tensor, mask: torch.Tensor, grid: Grid, hessian: torch.Tensor, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Seconds of every step for one plane, and of its bare algebra; what is left of rounding's output error."""
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
    parser.add_argument("--side", type=int, default=4096, help="of the square layer (default: 4096)")
    parser.add_argument("--ratio", type=float, default=32, help="compression ratio (default: 32)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the shortest counts (default: 3)")
    options = parser.parse_args(argv)
    side, device = options.side, options.device
    # About 2 bits a value of both planes: side * side * 16 / ratio = 2 * side * components * kept * 2
    components = max(8, min(int(0.4 * side), round(side * 4 / options.ratio / _MEAN_KEPT)))
    kept = _MEAN_KEPT * 2 * (1 - (torch.arange(components) + 0.5) / components)
    widths = np.array([8] * 2 + [3] * 32 + [2] * components)[:components]
    hessian = correlated_hessian(side, device)
    v, mask_v = masked_component_rows(side, components, kept, 2, device)
    grid_v = Grid(scales(v, mask_v, widths)[:, None], widths)
    passed = (
        quantise(v, mask_v, None, grid_v).values * (torch.arange(1, components + 1, device=device) ** -0.5)[:, None]
    )
    passed = passed @ hessian @ passed.t()
    u, mask_u = masked_component_rows(side, components, kept, 3, device)
    grid_u = Grid(scales(u, mask_u, widths)[None], widths)
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
