"""Measure exact deltas: bytes against the entropy and general compressors, and how fast they are coded and decoded.

    pip install zstandard zipnn reminis   # the peers; any of them may be missing
    python scripts/benchmark_exact.py --pair NAME=BASE,FINETUNED [--pair …] [--sparse 0.02] [--json FILE]

Of each pair, the changed tensors are coded by:

* exact: `impart-hf compress --method exact`, the size of the whole delta file, and the time of the run;
* the entropy of the steps given the base's exponent, which is the least for a code that knows nothing else;
* zlib -9, zstd -19 and lzma -6 of the XOR of base and fine-tune and of their difference as integers, each as it is and
  with the bytes of all numbers that are first, second, … put together; the smallest of each compressor counts;
* ZipNN of the fine-tune and of the XOR, and reminis' delta pack of the two models.

Slow compressors get the same share of each tensor, its first rows, about --most MB in all, and their sizes are scaled;
a star says so. All run on one core. `--sparse SHARE` adds a pair that is made of each base: so many of its numbers, at
random, are one step higher or lower.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import lzma
import math
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from safetensors.torch import save_file

from impart_hf import ExactConfig, compress
from impart_hf.modeling.checkpoints import Checkpoint
from impart_hf.modeling.checksums import tensor_bytes
from impart_hf.modeling.delta_repository import DeltaRepository
from impart_hf.modeling.model_files import HubOptions
from impart_hf.modeling.ordered_bits import exponents, has_steps, integers, ordered, rounded, steps
from impart_hf.repository.open import open_repository

Compress = Callable[[bytes], int]  # returns the compressed size


def sparse_pair(base: Path, share: float, folder: Path) -> Path:
    """Write a model of which a share of the base's numbers is one step up or down."""
    opened, generator = Checkpoint(str(base), HubOptions()), torch.Generator().manual_seed(0)
    tensors = {}
    for name in opened.names():
        tensor = opened.tensor(name).clone(memory_format=torch.contiguous_format)
        bits = integers(tensor)
        chosen = torch.rand(bits.shape, generator=generator) < share
        up = torch.rand(int(chosen.sum()), generator=generator) < 0.5
        bits[chosen] += torch.where(up, 1, -1).to(bits.dtype)
        tensors[name] = tensor
    folder.mkdir(parents=True)
    for path in base.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def changed_tensors(repository: DeltaRepository) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield base and fine-tuned tensor of all that changed, in the fine-tune's dtype."""
    for name in repository.names():
        if repository.parts[name].exact:
            finetuned = repository.tensor(name)
            base = repository.base_tensor(name)
            yield rounded(base, finetuned.dtype), finetuned[: len(base)]


def entropy_bytes(base: torch.Tensor, finetuned: torch.Tensor) -> float:
    """Return the bytes that the steps take at least, given the base's exponent."""
    if not has_steps(finetuned.dtype, base.dtype):
        return float(finetuned.nbytes)
    numbers = steps(base, finetuned).numpy()
    values = exponents(base).numpy().astype(np.int64) << 32 | numbers.view(f"u{numbers.itemsize}")
    bits = 0.0
    for symbols, sign in ((values, -1), (values >> 32, 1)):
        counts = np.unique(symbols, return_counts=True)[1].astype(np.float64)
        bits += sign * float((counts * np.log2(counts)).sum())
    return bits / 8


def byte_streams(base: torch.Tensor, finetuned: torch.Tensor) -> dict[str, bytes]:
    """Return the ways in which a general compressor may be given the change of a tensor."""
    one, other = integers(base), integers(finetuned)
    change = ordered(other, finetuned.dtype) - ordered(one, base.dtype)
    streams = {}
    for name, numbers in (("xor", one ^ other), ("difference", change)):
        data = tensor_bytes(numbers)
        streams[name] = data.tobytes()
        streams[f"{name}, bytes grouped"] = data.reshape(-1, numbers.itemsize).T.tobytes()
    return streams


def general_compressors() -> dict[str, Compress]:
    found: dict[str, Compress] = {
        "zlib -9": lambda data: len(zlib.compress(data, 9)),
        "lzma -6": lambda data: len(lzma.compress(data, preset=6)),
    }
    if importlib.util.find_spec("zstandard"):
        import zstandard

        found["zstd -19"] = lambda data: len(zstandard.ZstdCompressor(level=19).compress(data))
    return found


def zipnn_bytes(tensors: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, int]:
    """Return ZipNN's sizes of the fine-tune and of the XOR; empty if it is not installed."""
    if not importlib.util.find_spec("zipnn"):
        return {}
    from zipnn import ZipNN

    names = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
    sizes = {"ZipNN, fine-tune": 0, "ZipNN, xor": 0}
    for base, finetuned in tensors:
        coder = ZipNN(bytearray_dtype=names[finetuned.dtype], threads=1)
        sizes["ZipNN, fine-tune"] += len(coder.compress(tensor_bytes(finetuned).tobytes()))
        sizes["ZipNN, xor"] += len(coder.compress(byte_streams(base, finetuned)["xor"]))
    return sizes


def reminis_bytes(base: Path, finetuned: Path, folder: Path) -> int | None:
    """Return the size of reminis' delta pack; None if it is not installed or refuses the models."""
    if not importlib.util.find_spec("reminis"):
        return None

    def run(*arguments: Any) -> bool:
        command = [sys.executable, "-c", "from reminis.cli import main; main()", *map(str, arguments)]
        return subprocess.run(command, capture_output=True).returncode == 0

    databases = []
    for number, model in enumerate((base, finetuned)):
        databases.append(folder / f"{number}.db")
        if not run("convert", model, "-o", databases[-1]):
            return None
    pack = folder / "pack.db"
    return pack.stat().st_size if run("diff", *databases, "-o", pack) else None


def measure_pair(name: str, base: Path, finetuned: Path, folder: Path, most: int) -> list[dict[str, Any]]:
    """Return a row for each way to store the change."""
    started = time.perf_counter()
    report = compress(str(base), str(finetuned), folder / "delta", ExactConfig())
    encoding = time.perf_counter() - started
    repository = open_repository(str(folder / "delta"), HubOptions(), str(base))
    exact = [n for n in repository.names() if repository.parts[n].exact]
    bases = {n: repository.base_tensor(n) for n in exact}  # read before decoding is timed
    started = time.perf_counter()
    for n in exact:
        repository.tensor(n)
    decoding = time.perf_counter() - started
    del bases
    tensors = list(changed_tensors(repository))
    numbers = sum(finetuned.numel() for _, finetuned in tensors)
    dense = sum(finetuned.nbytes for _, finetuned in tensors)
    least = sum(entropy_bytes(*pair) for pair in tensors)
    stored = sum(tensor.bytes for tensor in report.exact_tensors)
    rows: list[dict[str, Any]] = []

    def add(way: str, size: float, seconds: float | None = None, scaled: bool = False) -> None:
        rows.append(
            {
                "pair": name,
                "way": way + ("*" if scaled else ""),
                "MB": size / 1e6,
                "bits per number": 8 * size / numbers,
                "of the tensors": size / dense,
                "over exact": size / stored,
                "MB/s": "" if seconds is None else dense / 1e6 / seconds,
            }
        )
        print(measure.table(rows[-1:]).splitlines()[-1], flush=True)

    add("exact, encoding", stored, encoding)
    add("exact, decoding", stored, decoding)
    add("entropy given the exponent", least)
    sample = [tuple(part[: math.ceil(len(part) * min(1, most / dense))] for part in pair) for pair in tensors]
    share = sum(finetuned.nbytes for _, finetuned in sample) / dense
    for compressor, size_of in general_compressors().items():
        sizes: dict[str, int] = {}
        started = time.perf_counter()
        for pair in sample:
            for stream, data in byte_streams(*pair).items():
                sizes[stream] = sizes.get(stream, 0) + size_of(data)
        best = min(sizes, key=sizes.__getitem__)
        seconds = (time.perf_counter() - started) / len(sizes) / share
        add(f"{compressor}, {best}", sizes[best] / share, seconds, share < 1)
    for way, size in zipnn_bytes(sample).items():
        add(way, size / share, scaled=share < 1)
    if (pack := reminis_bytes(base, finetuned, folder)) is not None:
        add("reminis, delta pack", pack)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", action="append", required=True, metavar="NAME=BASE,FINETUNED", help="local folders")
    parser.add_argument("--sparse", type=float, metavar="SHARE", help="a pair with so many random changes of the base")
    parser.add_argument("--most", type=float, default=60.0, metavar="MB", help="for slow compressors (default: 60)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    print(measure.machine_line())
    with tempfile.TemporaryDirectory() as temporary:
        bases: set[Path] = set()
        pairs = []
        for text in arguments.pair:
            name, _, folders = text.partition("=")
            base, _, finetuned = folders.partition(",")
            pairs.append((name, Path(base), Path(finetuned)))
            if arguments.sparse and pairs[-1][1] not in bases:
                folder = sparse_pair(Path(base), arguments.sparse, Path(temporary, f"sparse{len(bases)}"))
                pairs.append((f"{name}'s base, {arguments.sparse:.0%} changed", Path(base), folder))
            bases.add(Path(base))
        for number, (name, base, finetuned) in enumerate(pairs):
            folder = Path(temporary, str(number))
            folder.mkdir()
            rows += measure_pair(name, base, finetuned, folder, int(arguments.most * 1e6))
    print("\n" + measure.table(rows))
    if arguments.json:
        text = json.dumps({"machine": measure.machine(), "rows": rows}, indent=2)
        Path(arguments.json).write_text(text + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
