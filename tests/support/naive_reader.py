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
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8}
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


def exponent_and_ordered(bits: int, dtype: str) -> tuple[int, int]:
    """An entry's exponent, and the integer in whose order the numbers are."""
    size, mantissa = {"F32": (32, 23), "F16": (16, 10), "BF16": (16, 7)}.get(dtype, (8 * ITEM_BYTES[dtype], 0))
    integer = bits - (1 << size) if bits >> (size - 1) else bits
    if not mantissa:
        return 0, integer
    exponent = (bits >> mantissa) & ((1 << (size - 1 - mantissa)) - 1)
    return exponent, integer ^ ((1 << (size - 1)) - 1) if integer < 0 else integer


def coded_numbers(data: bytes, at: int, classes: list[int]) -> tuple[list[int], int]:
    """The numbers of a sequence whose entries have these classes, and where it ends."""
    count, steps, block, words, low_bytes = struct.unpack_from("<HHIQQ", data, at)
    at += struct.calcsize("<HHIQQ")
    first, used = data[at : at + count], data[at + count : at + 2 * count]
    at += 2 * count
    total = sum(t for t in used if t > 1)
    packed, position = int.from_bytes(data[at : at + (12 * total + 7) // 8], "little"), 0
    at += (12 * total + 7) // 8
    tables: list[list[tuple[int, int]]] = []
    for start, t in zip(first, used, strict=True):
        frequencies = [packed >> 12 * (position + j) & 0xFFF for j in range(t)] if t > 1 else [4096]
        position += t if t > 1 else 0
        assert sum(frequencies) == 4096
        tables.append([(start + j, f) for j, f in enumerate(frequencies)])
    lanes = len(classes) // (steps * block) * block + min(block, len(classes) % (steps * block))
    lengths = struct.unpack_from(f"<{lanes}H", data, at)
    states = list(struct.unpack_from(f"<{lanes}I", data, at + 2 * lanes))
    at += 6 * lanes
    assert sum(lengths) == words and all(state >= 65536 for state in states)
    stream = struct.unpack_from(f"<{words}H", data, at)
    at += 2 * words
    read = [sum(lengths[:lane]) for lane in range(lanes)]
    low, taken = int.from_bytes(data[at : at + low_bytes], "little"), 0
    numbers = []
    for i, own in enumerate(classes):
        lane = i // (steps * block) * block + i % (steps * block) % block
        slot, before, which = states[lane] % 4096, 0, 0
        while slot >= before + tables[own][which][1]:
            before += tables[own][which][1]
            which += 1
        token, frequency = tables[own][which]
        states[lane] = frequency * (states[lane] // 4096) + slot - before
        if states[lane] < 65536:
            states[lane] = 65536 * states[lane] + stream[read[lane]]
            read[lane] += 1
        if token >= 16:
            width = (token - 16) // 8 + 1
            token = (8 + token % 8 << width) + (low >> taken & (1 << width) - 1)
            taken += width
        numbers.append(token)
    assert states == [65536] * lanes and read == [sum(lengths[: lane + 1]) for lane in range(lanes)]
    assert low_bytes == (taken + 7) // 8
    return numbers, at + low_bytes


def decode_exact(data: bytes, dtype: str, shape: list[int], base: bytes) -> bytes:
    """The bytes of the tensor of an exact record; base and tensor have the same dtype."""
    layout, coding, size, flags, m, n, length, stated = struct.unpack_from("<BBBBIIQQ", data)
    at, item = struct.calcsize("<BBBBIIQQ"), ITEM_BYTES[dtype]
    assert (layout, size, length) == (3, item, len(data)) and coding in (0, 1, 2) and flags < 4
    assert n == (shape[-1] if shape else 1) and m * n * item == len(base)
    if coding == 0:
        assert checksum(data[at:]) == stated
        return data[at:]
    chosen = [list(range(m)), list(range(n))]
    for axis in (0, 1):
        if flags >> axis & 1:
            (k,) = struct.unpack_from("<I", data, at)
            gaps, at = coded_numbers(data, at + 4, [0] * k)
            chosen[axis] = [sum(gaps[: i + 1]) + i for i in range(k)]
    first, last = data[at], data[at + 1]
    of_exponents, at = data[at + 2 : at + 3 + last - first], at + 3 + last - first
    entries = [row * n + column for row in chosen[0] for column in chosen[1]]
    bits = [int.from_bytes(base[i * item : (i + 1) * item], "little") for i in range(m * n)]
    classes = [of_exponents[min(max(exponent_and_ordered(bits[i], dtype)[0], first), last) - first] for i in entries]
    if coding == 1:
        steps, at = coded_numbers(data, at, classes)
    else:
        c = max(of_exponents) + 1
        changed = struct.unpack_from(f"<{c}I", data, at)
        own = [number for number, times in enumerate(changed) for _ in range(times)]
        gaps, at = coded_numbers(data, at + 4 * c, own)
        values, at = coded_numbers(data, at, own)
        steps = [0] * len(entries)
        members = [[i for i, other in enumerate(classes) if other == number] for number in range(c)]
        place, previous = -1, -1
        for number, gap, value in zip(own, gaps, values, strict=True):
            place, previous = (place if number == previous else -1) + gap + 1, number
            steps[members[number][place]] = value + 1
    assert at == len(data)
    for i, step in zip(entries, steps, strict=True):
        change = step // 2 if step % 2 == 0 else -(step + 1) // 2
        moved = (exponent_and_ordered(bits[i], dtype)[1] + change) % (1 << 8 * item)
        bits[i] = exponent_and_ordered(moved, dtype)[1] % (1 << 8 * item)
    result = b"".join(number.to_bytes(item, "little") for number in bits)
    assert checksum(result) == stated
    return result


def opened(folder: Path, base: Path, below: tuple[Path, ...]) -> tuple[dict, dict, dict[str, tuple], list[str]]:
    """The configuration and the entries of an unsharded repository, its base's tensors by its names, and these."""
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "delta_compressed" and config["format_version"] == 1
    delta = safetensors(folder / "delta_model.safetensors")
    originals = exact_bits(base, *below) if below else safetensors(base / "model.safetensors")
    plain = {re.sub(r"(^|(?<=\.))_(orig_mod|(fsdp|checkpoint)_wrapped_module)\.", "", n): n for n in originals}
    while prefix := next((p for p in WRAPPERS if all(n.startswith(p) for n in plain)), None):
        plain = {n[len(prefix) :]: stored for n, stored in plain.items()}
    originals = {n: originals[stored] for n, stored in plain.items()}
    tied = config["text_config"].get("tie_word_embeddings", False)
    others = config.get("base_tensors", {})
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
    return config, delta, originals, names


def exact_bits(folder: Path, base: Path, *below: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Every tensor of a repository that another rests on, as `safetensors` gives those of a file."""
    config, delta, originals, names = opened(folder, base, below)
    result = {}
    for name in names:
        dtype, shape, data = originals[name]
        if (rows := config.get("row_counts", {}).get(name)) is not None:
            data = data[: len(data) // shape[0] * rows]
            shape = [rows, *shape[1:]]
        assert name + ".delta" not in delta
        if name in delta:
            dtype, shape, data = delta[name]
        elif name + ".exact" in delta:
            data = decode_exact(delta[name + ".exact"][2], dtype, shape, data)
        if name + ".added_rows" in delta:
            _, added, more = delta[name + ".added_rows"]
            shape, data = [shape[0] + added[0], *shape[1:]], data + more
        result[name] = dtype, shape, data
    return result


def read_repository(folder: Path, base: Path, *below: Path) -> dict[str, np.ndarray]:
    """Every fine-tuned tensor of an unsharded repository on an unsharded base, in float64, not yet rounded.

    Args:
        base, below: the base; if it is a delta repository, then its base, and so on, down to a dense one.
    """
    config, delta, originals, names = opened(folder, base, below)
    rows, result = config.get("row_counts", {}), {}
    for name in names:
        tensor = to_float64(*originals[name])
        if name in rows:
            tensor = tensor[: rows[name]]
        if name in delta:
            tensor = to_float64(*delta[name])
        elif name + ".exact" in delta:
            dtype, shape, data = originals[name]
            tensor = to_float64(dtype, shape, decode_exact(delta[name + ".exact"][2], dtype, shape, data))
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
