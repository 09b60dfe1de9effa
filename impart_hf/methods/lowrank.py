"""LowRank: the delta's leading singular components, whole (the truncated SVD that the paper compares with)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ..modeling.delta_record import MAX_THRESHOLD
from .base import Encoded, MethodConfig
from .records import OVERHEAD_BYTES, VALUE_BYTES, check_value_dtype, factored_record
from .svd import leading_svd

_SIGMA_BYTES = 2


@dataclass
class LowRankConfig(MethodConfig):
    """LowRank's settings; the rank of each matrix follows from the ratio.

    Attributes:
        value_dtype: "float16" or "bfloat16", the storage of the singular vectors.
    """

    name: ClassVar[str] = "lowrank"

    value_dtype: str = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_value_dtype(self.value_dtype)

    def least_bytes(self, rows: int, columns: int) -> int:
        return OVERHEAD_BYTES + _SIGMA_BYTES + VALUE_BYTES * (rows + columns)

    def encode(self, delta: torch.Tensor, max_bytes: int, mask_seed: int) -> Encoded:
        rows, columns = delta.shape
        rank = min(rows, columns, (max_bytes - OVERHEAD_BYTES) // (_SIGMA_BYTES + VALUE_BYTES * (rows + columns)))
        u, sigma, v = leading_svd(delta, rank)
        keep_all = np.full(rank, MAX_THRESHOLD, np.uint16)
        return Encoded(factored_record(delta, u, sigma, v, keep_all, mask_seed, self.value_dtype))


def method_for(method: MethodConfig, vocabulary: bool) -> MethodConfig:
    """The method that encodes a matrix: the user's, or LowRank for embeddings and output projection.

    Args:
        vocabulary: whether the matrix has a row for every token.
    """
    if not vocabulary or method.embeddings == "method":
        return method
    return LowRankConfig(compression_ratio=method.compression_ratio, seed=method.seed)
