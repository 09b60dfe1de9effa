"""What gpu_check.py measures with: records and pairs of real shapes that are made in seconds, clocks, and notes."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from impart_hf import LowRankConfig, compress
from impart_hf.coding.records import MeasuredRecord
from impart_hf.compression.encoding import mask_seed
from impart_hf.methods import Encoded
from impart_hf.methods.base import EncodingTask
from impart_hf.modeling import triton_decode
from impart_hf.modeling.delta_decode import add_delta
from impart_hf.modeling.delta_record import (
    DIRECT,
    FACTORED,
    KEEP_ALL,
    KEEP_PER_COLUMN,
    MAX_THRESHOLD,
    Record,
    Segment,
    pack_record,
)
from impart_hf.modeling.seeded_mask import keep_mask
from impart_hf.modeling.triton_planes import available
from impart_hf.modeling.width_codes import BFLOAT16, BITS, FLOAT16, packed_bytes

RATIO = 32
FLOAT32_ERROR = 1e-5  # docs/FORMAT.md, "Rounding"
_WEIGHT = 0.02  # size of a base's entries
_MASKED_AT_ONCE = 1 << 27  # entries
Part = tuple[int, int, int, float]  # columns, width codes of U and of V, share of the entries that is kept


class Notes:
    """What a section of the check found, saved after every row.

    Attributes:
        device: where the section runs.
        small: whether to use tiny sizes.
        content: its tables, the goals that it looked at, what failed and what was left out.
    """

    def __init__(self, name: str, seconds: float, small: bool, save: Callable[[dict[str, Any]], None]):
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.on_gpu = self.device.type == "cuda"
        # Triton's interpreter stores bfloat16 wrongly.
        self.small, self.dtype = small, torch.bfloat16 if self.on_gpu else torch.float32
        self.content: dict[str, Any] = {"tables": {}, "goals": [], "failures": [], "left_out": []}
        self._name, self._end, self._save = name, time.monotonic() + seconds, save

    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def row(self, table: str, **fields: Any) -> None:
        """Add a row to a table and print it; what was not measured (None) is left out."""
        row = {key.replace("_", " "): value for key, value in fields.items() if value is not None}
        self.content["tables"].setdefault(table, []).append(row)
        self._save(self.content)
        print(f"[{self._name}] {table}: " + ", ".join(f"{k} {measure.cell(v)}" for k, v in row.items()), flush=True)

    def goal(self, what: str, found: float | None, *, most: float | None = None, least: float | None = None) -> None:
        """Note whether a goal is met; goals are for real sizes."""
        if found is not None and not self.small:
            met = (most is None or found <= most) and (least is None or found >= least)
            limit = f"at most {most:g}" if most is not None else f"at least {least:g}"
            self.content["goals"].append({"goal": what, "limit": limit, "found": found, "met": met})
            self._save(self.content)

    def leave_out(self, what: str, why: str) -> None:
        self.content["left_out"].append({"what": what, "why": why})
        self._save(self.content)
        print(f"[{self._name}] left out: {what}: {why}", flush=True)

    def attempt(self, what: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """Do a part of the section, if there is time; if it fails, note the end of its traceback and return None."""
        if self.seconds_left() < 0:
            self.leave_out(what, "no time left")
            return None
        try:
            return work(self, *arguments)
        except Exception as error:  # a cut or broken run should still say as much as it can
            lines = [f"{type(error).__name__}: {error}"[:1000], *traceback.format_exc().splitlines()[-9:-1]]
            self.content["failures"].append({"what": what, "traceback": lines})
            self._save(self.content)
            print(f"[{self._name}] FAILED: {what}: {lines[0]}", flush=True)
            return None

    def milliseconds(self, work: Callable[[], Any], repeats: int = 10) -> float | None:
        """Return the median time on the device's clock, after a first run; on a CPU run once and return None."""
        work()
        if not self.on_gpu:
            return None
        times = []
        for _ in range(repeats):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            work()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
        return sorted(times)[len(times) // 2]

    def peak_bytes(self, work: Callable[[], Any]) -> int | None:
        """Return how much memory of the device work takes beyond what was there; None on a CPU."""
        if not self.on_gpu:
            work()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def over(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ||found - expected|| / ||expected||."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def random_record(
    m: int, n: int, layout: int, parts: list[Part], device: torch.device | str = "cpu", seed: int = 1
) -> Record:
    """Return a record of random codes, whose singular values fall as k^-0.5; its delta is a small part of a weight."""
    columns = sum(part[0] for part in parts)
    heights = (m, n) if layout == FACTORED else (n,)
    limits = np.concatenate([np.full(part[0], round(part[3] * (MAX_THRESHOLD + 1)) - 1) for part in parts])
    limits = limits.astype(np.uint16)
    kept = [np.full(columns, height) for height in heights]
    masked = np.flatnonzero(limits < MAX_THRESHOLD)
    for side, height in enumerate(heights):
        for some in np.array_split(masked, max(1, len(masked) * height // _MASKED_AT_ONCE)):
            kept[side][some] = keep_mask(seed, side, limits[some], height, device, some).sum(1).cpu().numpy()
    generator, segments, codes, start = np.random.default_rng(seed), [], [], 0
    for count, width_u, width_v, share in parts:
        widths = (width_u, width_v) if layout == FACTORED else (width_u,)
        segments.append(Segment(count, *widths, keep=KEEP_PER_COLUMN if share < 1 else KEEP_ALL))
        for width, of_side in zip(widths, kept, strict=True):
            size = packed_bytes(width, int(of_side[start : start + count].sum()))
            # Of floats no exponent is all ones
            limit = np.uint8(0x3B if width in (FLOAT16, BFLOAT16) else 0xFF)
            codes.append(generator.integers(0, 256, size, np.uint8) & limit)
        start += count
    rank = columns if layout == FACTORED else 0
    sigma = (np.arange(1, rank + 1) ** -0.5).astype(np.float16)
    return Record(
        layout, m, n, rank, seed, _WEIGHT / 100, 0.0, segments, sigma, limits, [None] * len(segments),
        np.concatenate(codes),
    )  # fmt: skip


def levels_record(
    m: int, n: int, ratio: float = RATIO, widths: tuple[int, int] = (34, 1), seed: int = 1
) -> Record:  # fmt: skip
    """Return a factored record as impart-rd's: a quarter of its components in one width, the others in another.

    The default widths, 2 bits and 1 bit, have as many kept values a byte as impart-rd's records at ratio 32.
    """
    bits = BITS[widths[0]] / 4 + BITS[widths[1]] * 3 / 4
    rank = int((0.98 * 2 * m * n / ratio - 64) / (bits * (m + n) / 8 + 2))
    rank = max(2, min(rank, m, n))
    return random_record(
        m, n, FACTORED, [(-(-rank // 4), widths[0], widths[0], 1), (rank - -(-rank // 4), widths[1], widths[1], 1)],
        seed=seed,
    )  # fmt: skip


def as_array(record: Record) -> np.ndarray:
    return np.frombuffer(pack_record(record), np.uint8)


class _Prepared(LowRankConfig):  # without a name of its own it is not among the methods
    """Encodes nothing, and gives the records that were made for the tensors' mask seeds."""

    def __init__(self, ratio: float, records: dict[int, bytes]):
        super().__init__(compression_ratio=ratio, embeddings="method")
        self.records = records

    def _encode(self, task: EncodingTask) -> Encoded:
        return Encoded(MeasuredRecord(self.records[task.mask_seed], 0.0))


def write_delta(folder: Path, config: LlamaConfig, device: torch.device, ratio: float) -> dict[str, Path]:
    """Write a LLaMA in bfloat16, a fine-tune of it, and the delta between them, which is exact.

    Returns:
        The folders `base`, `dense` (the fine-tune) and `delta`.
    """
    folders = {name: folder / name for name in ("base", "dense", "delta")}
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    for name in ("base", "dense"):
        config.save_pretrained(folders[name])
    records, weight_map, shards = {}, {}, measure.llama_shards(config)
    generator = torch.Generator(device).manual_seed(0)
    for number, shard in enumerate(shards):
        filename = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        pair: dict[str, dict[str, torch.Tensor]] = {"base": {}, "dense": {}}
        for name, shape in shard.items():
            weight_map[name] = filename
            weight = torch.randn(shape, generator=generator, device=device).mul_(_WEIGHT)
            weight = weight.add_(1 if len(shape) == 1 else 0).bfloat16()
            if len(shape) == 1:
                tuned = weight + 0.01 * torch.randn(shape, generator=generator, device=device).bfloat16()
            else:
                seed = mask_seed(0, name, 0)
                record = levels_record(*shape, ratio, seed=seed)
                records[seed] = pack_record(record)
                tuned = add_delta(weight, as_array(record), name, torch.bfloat16, kernels=False)
            pair["base"][name], pair["dense"][name] = weight.cpu(), tuned.cpu()
        for name, tensors in pair.items():
            save_file(tensors, folders[name] / filename, metadata={"format": "pt"})
    for name in ("base", "dense"):
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folders[name] / "model.safetensors.index.json").write_text(index)
    compress(
        str(folders["base"]), str(folders["dense"]), folders["delta"], _Prepared(ratio, records), device=str(device)
    )
    return folders


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(what)


def kernels_run(notes: Notes) -> bool:
    """Return whether the kernels work on the device; if they do not, it is noted once."""
    if available and triton_decode.works_on(notes.device):
        return True
    if not any(left["what"] == "kernels" for left in notes.content["left_out"]):
        notes.leave_out("kernels", "they do not work here" if available else "Triton is not installed")
    return False


def every_kind(m: int, n: int, device: torch.device) -> dict[str, Record]:
    """Records of every kind: levels, floats, masks, no factors."""
    rank, half, few = min(m, n) // 5, (FLOAT16, FLOAT16), min(m, n) // 10
    return {
        "levels": levels_record(m, n, 8),
        "masked float16": random_record(m, n, FACTORED, [(few, *half, 1), (rank - few, *half, 0.17)], device),
        "direct, 1 bit": random_record(m, n, DIRECT, [(m, 1, 0, 1)]),
        "direct, float16, 1/32 kept": random_record(m, n, DIRECT, [(m, FLOAT16, 0, 1 / 32)], device),
    }


def ways(notes: Notes, record: Record) -> list[tuple[str, bool]]:
    """Return the precisions and ways (fused or not) by which kernels decode a record."""
    if not kernels_run(notes):
        return []
    if record.layout != FACTORED:  # no product, so no precision
        return [("ieee", False)]
    precisions = ("tf32x3", "ieee", "bf16x3") if notes.on_gpu else ("ieee",)
    return [(precision, fused) for precision in precisions for fused in (False, True)]
