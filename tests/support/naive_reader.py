"""A second reader, written from docs/FORMAT.md alone: plain Python loops, one entry at a time, float64.

It shares no code with the package, so that whatever the two agree on is what the document says.
"""

import hashlib
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np

_M = 0xFFFFFFFF
NORMAL = {
    2: [0.4528, 1.5104],
    3: [0.2451, 0.7560, 1.3439, 2.1520],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326],
}
WRAPPERS = ("module.", "base_model.model.", "_forward_module.")
_SAFETENSORS = {"F32": "<f4", "F16": "<f2", "U8": "u1", "U32": "<u4", "U64": "<u8", "I64": "<i8", "BF16": "<u2"}


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & _M
    x ^= x >> 15
    x = x * 0x846CA68B & _M
    return x ^ (x >> 16)


def key(seed: int, side: int, column: int) -> int:
    return mix((seed + 0x9E3779B9 * (2 * column + side + 1)) & _M)


def kept(seed: int, side: int, column: int, entry: int, threshold: int) -> bool:
    word = mix((key(seed, side, column) + 0x9E3779B9 * (entry // 2)) & _M)
    return (word >> 16 if entry % 2 else word & 0xFFFF) <= threshold


def checksum(data: bytes) -> int:
    padded = data + bytes(-len(data) % 8192)
    words = struct.unpack(f"<{len(padded) // 8}Q", padded)
    table = [words[i : i + 1024] for i in range(0, len(words), 1024)]
    rows = [sum(row) % 2**64 for row in table]
    columns = [sum(row[j] for row in table) % 2**64 for j in range(1024)]
    digest = hashlib.sha256(struct.pack(f"<Q{len(rows)}Q1024Q", len(data), *rows, *columns)).digest()
    return int.from_bytes(digest[:8], "little")


def bfloat16(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


def safetensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name to (dtype, shape, data)."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    body = raw[8 + length :]
    return {
        name: (entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def to_float64(dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    numbers = np.frombuffer(data, _SAFETENSORS[dtype])
    if dtype == "BF16":
        numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.astype(np.float64).reshape(shape)


def decode_record(data: bytes) -> tuple[np.ndarray, int]:
    """The delta of one matrix, and the record's length."""
    layout, zero, count, m, n, r, seed, scale, _, length = struct.unpack_from("<BBHIIIIffI", data)
    assert layout in (1, 2) and zero == 0
    at = 32
    segments = [struct.unpack_from("<IBBBB", data, at + 8 * i) for i in range(count)]
    at += 8 * count
    sigma = struct.unpack_from(f"<{r}e", data, at)
    at += 2 * r
    sides = 2 if layout == 1 else 1
    columns = r if layout == 1 else m
    heights = [m, n] if layout == 1 else [n]
    thresholds: list[int] = []
    for width, _, _, mode, _ in segments:
        if mode == 0:
            thresholds += [65535] * width
        elif mode == 1:
            thresholds += list(struct.unpack_from("<H", data, at)) * width
            at += 2
        else:
            thresholds += struct.unpack_from(f"<{width}H", data, at)
            at += 2 * width
    scales: list[list[list[float]]] = []
    for width, _, _, _, scaled in segments:
        of_segment = []
        for _ in range(sides):
            of_segment.append([1.0] * width)
            if scaled:
                of_segment[-1] = list(struct.unpack_from(f"<{width}e", data, at))
                at += 2 * width
        scales.append(of_segment)
    planes = [np.zeros((columns, height)) for height in heights]
    first = 0
    for (width, *widths, _, _), of_segment in zip(segments, scales, strict=True):
        for side in range(sides):
            bits = widths[side]
            size = bits if bits <= 8 else bits - 32 if bits > 32 else 16
            stream, position = int.from_bytes(data[at:length], "little"), 0
            for column in range(first, first + width):
                for entry in range(heights[side]):
                    if thresholds[column] == 65535 or kept(seed, side, column, entry, thresholds[column]):
                        code = stream >> position & ((1 << size) - 1)
                        position += size
                        if bits == 16:
                            value = struct.unpack("<e", code.to_bytes(2, "little"))[0]
                        elif bits == 17:
                            value = bfloat16(code)
                        elif bits > 32:
                            above, half = NORMAL[size], 1 << (size - 1)
                            value = above[code - half] if code >= half else -above[half - 1 - code]
                        else:
                            value = 2 * code / (2**bits - 1) - 1
                        planes[side][column, entry] = value * of_segment[side][column - first]
            at += (position + 7) // 8
        first += width
    assert at == length
    if layout == 2:
        return scale * planes[0], length
    return scale * (planes[0].T * np.array(sigma)) @ planes[1], length


def read_repository(folder: Path, base: Path) -> dict[str, np.ndarray]:
    """Every fine-tuned tensor of an unsharded repository on an unsharded base, in float64, not yet rounded."""
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "delta_compressed" and config["format_version"] == 1
    delta, originals = safetensors(folder / "delta_model.safetensors"), safetensors(base / "model.safetensors")
    plain = {re.sub(r"(^|(?<=\.))_(orig_mod|(fsdp|checkpoint)_wrapped_module)\.", "", n): n for n in originals}
    while prefix := next((p for p in WRAPPERS if all(n.startswith(p) for n in plain)), None):
        plain = {n[len(prefix) :]: stored for n, stored in plain.items()}
    originals = {n: originals[stored] for n, stored in plain.items()}
    tied = config["text_config"].get("tie_word_embeddings", False)
    others, rows = config.get("base_tensors", {}), config.get("row_counts", {})
    names = {n for n in originals if not n.endswith("rotary_emb.inv_freq") and not (tied and n == "lm_head.weight")}
    names = sorted((names - set(config.get("absent_tensors", []))) | set(others))
    originals |= {n: originals[other] for n, other in others.items()}
    entries = sorted(n for n in delta if n != "crc32")
    crcs = np.frombuffer(delta["crc32"][2], "<u4").tolist()
    described = [f"{n} {delta[n][0]} {'x'.join(map(str, delta[n][1]))}\n".encode() + delta[n][2] for n in entries]
    assert crcs == [zlib.crc32(entry) for entry in described]
    table = np.frombuffer(delta["base_checksums"][2], "<u8").tolist()
    assert table[:-1] == [checksum(originals[n][2]) for n in names]
    assert table[-1] == int.from_bytes(hashlib.sha256("\n".join(names).encode()).digest()[:8], "little")
    result = {}
    for name in names:
        tensor = to_float64(*originals[name])
        if name in rows:
            tensor = tensor[: rows[name]]
        if name in delta:
            tensor = to_float64(*delta[name])
        elif name + ".delta" in delta:
            data = delta[name + ".delta"][2]
            matrices = tensor.reshape(-1, *tensor.shape[-2:]).copy()
            for matrix in matrices:
                change, length = decode_record(data)
                matrix += change
                data = data[length:]
            assert not data
            tensor = matrices.reshape(tensor.shape)
        if name + ".added_rows" in delta:
            tensor = np.concatenate([tensor, to_float64(*delta[name + ".added_rows"])])
        result[name] = tensor
    return result
