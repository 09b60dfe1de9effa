"""Where a delta repository's bytes are: by kind of tensor."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import TensorReport

ATTENTION, MLP, EXPERTS, EMBEDDINGS, IMAGES, OTHERS, WHOLE, REST = (
    "attention", "mlp", "experts", "embeddings and output", "images", "others", "stored whole",
    "headers, config.json, card",
)  # fmt: skip
NORMS = "norms"  # of `module_kind`
_NORM, _OUTPUT = r"norm|(^|\.)ln_", r"(^|\.)(lm_head|output_projection|embed_out)\."
# By the names of modules, the first pattern that is found. A router is counted with its experts.
_PATTERNS = (
    (IMAGES, r"(^|\.)(vision|visual|multi_modal)"),
    (EXPERTS, r"expert|router|moe|mlp\.gate(\.|$)"),
    (EMBEDDINGS, r"embed|(^|\.)(wte|wpe|shared|lm_head|output_projection)\."),
    (ATTENTION, r"att(n|ention)"),
    (MLP, r"mlp|feed_forward|ffn|(^|\.)fc\d\."),
)


def kind_of(name: str) -> str:
    """Return the kind of module that a weight belongs to by its name: one of `_PATTERNS`, or `OTHERS`.

    What is neither attention nor MLP, as the mixers of state space models, is among the others.
    """
    return next((kind for kind, pattern in _PATTERNS if re.search(pattern, name)), OTHERS)


def module_kind(name: str, axes: int) -> str:
    """Return a finer kind than `kind_of`: of attention and MLP, the module's own name, such as `q_proj`.

    Args:
        name: a tensor's name.
        axes: its number of axes.

    Returns:
        `NORMS`, `EXPERTS`, `IMAGES`, "embeddings", "output projection", or the last part of the module's name.
    """
    kind = kind_of(name)
    if kind == IMAGES:
        return kind
    if axes < 2 and re.search(_NORM, name):
        return NORMS
    if kind == EMBEDDINGS:
        return "output projection" if re.search(_OUTPUT, name) else "embeddings"
    if kind == EXPERTS:
        return kind
    modules = [part for part in name.split(".") if not part.isdigit()]
    return modules[-2] if len(modules) > 1 else name


def layer_of(name: str) -> int | None:
    """Return the number of a tensor's layer, the first number in its name; None if it has none."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else None


@dataclass(frozen=True)
class Part:
    """What one kind of tensor takes of a repository.

    Attributes:
        kind: of encoded and exact tensors `ATTENTION`, `MLP`, `EXPERTS`, `EMBEDDINGS` (with the output projection),
            `IMAGES` (an image encoder and its projector) or `OTHERS`; `WHOLE`, of norms, biases, small matrices and
            rows of added tokens; `REST`, of everything else that counts.
        tensors: number of tensors; of those with added rows, both parts count.
        bytes: their size in the files.
        share: of the repository's size.
        bits: mean bits for each parameter that changed; None for `REST`.
    """

    kind: str
    tensors: int
    bytes: int
    share: float
    bits: float | None


def parts_of(tensors: "Sequence[TensorReport]", repository_bytes: int) -> list[Part]:
    """Return the parts of a repository that are not empty, in a fixed order."""
    kinds = (ATTENTION, MLP, EXPERTS, EMBEDDINGS, IMAGES, OTHERS, WHOLE)
    members: dict[str, list[TensorReport]] = {kind: [] for kind in kinds}
    for tensor in tensors:
        members[kind_of(tensor.name) if tensor.kind in ("encoded", "exact") else WHOLE].append(tensor)
    parts = []
    for kind, own in members.items():
        if own:
            size, parameters = sum(t.bytes for t in own), sum(math.prod(t.shape) for t in own)
            bits = 8 * size / parameters if parameters else 0.0
            parts.append(Part(kind, len(own), size, size / repository_bytes, bits))
    rest = repository_bytes - sum(part.bytes for part in parts)
    return [*parts, Part(REST, 0, rest, rest / repository_bytes, None)]
