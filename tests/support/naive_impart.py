"""ImPart written out naively from the paper (section 3, algorithm 1) in float32: the oracle for the real encoder."""

import torch


def drop_ratios(sigma: list[float], full_rank: int, alpha_uv: float, beta: float, c: float | None) -> list[float]:
    """p_k of every component by algorithm 1's loops: pre-prune, allocate, shift the boundary. Without c: uniform."""
    beta = min(beta, alpha_uv)
    unpruned = int(full_rank * (1 - beta) + 1e-9)
    gamma = (alpha_uv - beta) / (1 - beta)
    p = [(1 - (0 if c is None else (sigma[k] / sigma[0]) ** c)) * gamma for k in range(unpruned)]
    k = unpruned - 1
    while k >= 0 and sum(p) < gamma * unpruned - 1e-9:
        p[k] = 1.0
        k -= 1
    return p + [1.0] * (full_rank - unpruned)


def impart(delta: torch.Tensor, ratio: float, beta: float, c: float, generator: torch.Generator) -> torch.Tensor:
    """The sparsified delta at a ratio that counts parameters, as the paper does."""
    m, n = delta.shape
    u, sigma, vt = torch.linalg.svd(delta, full_matrices=False)
    full_rank = min(m, n)
    alpha_uv = 1 - m * n / (ratio * (m + n) * full_rank)
    q = 1 - torch.tensor(drop_ratios(sigma.tolist(), full_rank, alpha_uv, beta, c))
    kept = q > 0
    u, sigma, v, q = u[:, kept], sigma[kept], vt[kept].T, q[kept]
    u_hat = u * (torch.rand(u.shape, generator=generator) < q) / q
    v_hat = v * (torch.rand(v.shape, generator=generator) < q) / q
    return (u_hat * sigma) @ v_hat.T
