"""Algorithm 2 of ImPart (sparse GPTQ) in plain loops, from the paper alone: what the fast version is held against.

An explicit inverse of the damped Hessian, its Cholesky factor, one column after another, no blocks, float64.
"""

from __future__ import annotations

import numpy as np


def round_to_grid(value: float, scale: float, width: int) -> tuple[int, float]:
    """The code and the value of the level nearest to a value."""
    levels = [(2 * code / (2**width - 1) - 1) * scale for code in range(2**width)]
    code = min(range(len(levels)), key=lambda c: abs(levels[c] - value))
    return code, levels[code]


def sparse_gptq(
    weight: np.ndarray, mask: np.ndarray, hessian: np.ndarray, scales: np.ndarray, widths: np.ndarray, damping: float
) -> tuple[np.ndarray, np.ndarray]:
    """Codes, 0 where dropped, and values of a weight (rows, columns); scales and widths are of the same shape."""
    rows, columns = weight.shape
    order = sorted(range(columns), key=lambda j: -hessian[j, j])  # stable, as act-order is taken here
    damped = hessian[np.ix_(order, order)] + damping * np.mean(np.diag(hessian)) * np.eye(columns)
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    left = weight[:, order].astype(np.float64)
    codes, values = np.zeros((rows, columns), np.uint8), np.zeros((rows, columns))
    for k, j in enumerate(order):
        for i in range(rows):
            kept = float(mask[i, j])
            value = left[i, k] * kept
            code, level = round_to_grid(value, scales[i, j], widths[i, j])
            codes[i, j], values[i, j] = code * kept, level * kept
            error = (value - level * kept) / factor[k, k]
            for later in range(k, columns):
                left[i, later] -= error * factor[k, later]
    return codes, values
