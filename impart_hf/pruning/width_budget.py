"""How many heads and channels every layer loses, so that a budget of parameters is met."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .choices import PARTS
from .llama_shape import LayerWidth, LlamaShape


@dataclass(frozen=True)
class HeadUnit:
    """What is removed of a layer's attention at a time: a KV group, or one query head of every group.

    Attributes:
        parameters: of one unit.
        count: how many there are; one at least stays.
    """

    parameters: int
    count: int


def head_unit(shape: LlamaShape, width: LayerWidth, query_heads: bool) -> HeadUnit:
    """The unit of a layer's heads.

    Args:
        query_heads: remove one query head of every KV group at a time, instead of whole groups.
    """
    groups = width.num_key_value_heads
    per_group = width.num_attention_heads // groups
    head = shape.head_dim * (2 * shape.hidden_size + shape.attention_bias)  # rows of q, columns of o
    key_value = 2 * shape.head_dim * (shape.hidden_size + shape.attention_bias)
    if query_heads:
        return HeadUnit(groups * head, per_group)
    return HeadUnit(per_group * head + key_value, groups)


def channel_parameters(shape: LlamaShape) -> int:
    """Parameters of one channel of an MLP."""
    return 3 * shape.hidden_size + 2 * shape.mlp_bias


@dataclass(frozen=True)
class WidthBudget:
    """What every layer is to lose.

    Attributes:
        heads: units of heads, by layer.
        channels: channels, by layer.
        parameters: in all.
    """

    heads: list[int]
    channels: list[int]
    parameters: int


def width_budget(
    shape: LlamaShape,
    scores: torch.Tensor,
    ratio: float,
    *,
    exponent: float,
    parts: Sequence[str] = PARTS,
    multiple_of: int = 1,
    query_heads: bool = False,
) -> WidthBudget:
    """Share a budget among the layers: the less important one is, the larger the share of it that goes.

    A layer of score s loses the share λ·s^-exponent of what can be pruned in it, as far as it can, with one λ for all
    by which the budget is met. Its heads lose that share as nearly as whole units come, its channels the rest. What
    rounding leaves over is then settled channel by channel, so that the budget is missed by half a unit at most.

    Args:
        shape: of the model.
        scores: (layers,), not negative.
        ratio: share of the decoder layers' parameters to be removed, in (0, 1).
        exponent: 0 lets all layers lose the same share.
        parts: of the layers that are pruned, "attention", "mlp" or both.
        multiple_of: the channels that stay are a multiple of this, in layers that lose any.
        query_heads: as for `head_unit`.

    Raises:
        ValueError: if the ratio is out of range or would leave a layer without heads or channels.
    """
    target = ratio * shape.decoder_parameters
    units = [head_unit(shape, width, query_heads) for width in shape.layers]
    per_channel = channel_parameters(shape)
    head_steps = [[unit.parameters] * (unit.count - 1) if "attention" in parts else [] for unit in units]
    channel_steps = [
        [per_channel * n for n in _removals(width.intermediate_size, multiple_of)] if "mlp" in parts else []
        for width in shape.layers
    ]
    head_limits, channel_limits = [sum(s) for s in head_steps], [sum(s) for s in channel_steps]
    limits = [heads + channels for heads, channels in zip(head_limits, channel_limits, strict=True)]
    if not 0 < ratio < 1 or target > sum(limits):
        most = sum(limits) / shape.decoder_parameters
        raise ValueError(
            f"ratio is {ratio:g}; it must be above 0 and at most {most:.4f} if {' and '.join(parts)} is pruned and "
            f"every layer keeps some of its heads and a multiple of {multiple_of} channels"
        )
    shares = _shares(scores, limits, target, exponent)
    wanted = [share * limit for share, limit in zip(shares, limits, strict=True)]
    of_heads = [
        w * heads / limit if limit else 0.0 for w, heads, limit in zip(wanted, head_limits, limits, strict=True)
    ]
    heads = _settle(of_heads, head_steps, sum(of_heads))
    removed = [sum(steps[:n]) for steps, n in zip(head_steps, heads, strict=True)]
    of_channels = [w - r for w, r in zip(wanted, removed, strict=True)]
    channels = _settle(of_channels, channel_steps, target - sum(removed))
    total = sum(removed) + sum(sum(steps[:n]) for steps, n in zip(channel_steps, channels, strict=True))
    if abs(total - target) > max(max(steps, default=0) for steps in (*head_steps, *channel_steps)):
        raise ValueError(f"ratio {ratio:g} cannot be met with whole heads and multiples of {multiple_of} channels")
    counts = [sum(_removals(w.intermediate_size, multiple_of)[:n]) for w, n in zip(shape.layers, channels, strict=True)]
    return WidthBudget(heads, counts, total)


def _removals(size: int, multiple_of: int) -> list[int]:
    """How many channels each step takes, from `size` down to the smallest multiple."""
    if size <= multiple_of:
        return []
    first = size % multiple_of or multiple_of
    return [first] + [multiple_of] * ((size - first) // multiple_of - 1)


def _shares(scores: torch.Tensor, limits: Sequence[int], target: float, exponent: float) -> list[float]:
    """For every layer, what share of its limit goes: min(1, λ·s^-exponent), λ such that the target is met."""
    usual = scores.double() / scores.double().mean().clamp(min=torch.finfo(torch.float64).tiny)
    # A layer without any gradient would take all for itself.
    weights = usual.clamp(min=1e-6) ** -exponent
    sizes = torch.tensor(limits, dtype=torch.float64)
    at_most = (1 / weights.min()).item()  # there every layer gives all it can
    found = _bisect(lambda x: ((weights * x).clamp(max=1) * sizes).sum().item(), target, 0.0, at_most)
    return (weights * found).clamp(max=1).tolist()


def _bisect(rising: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Where a rising function reaches the target, between two numbers of which the upper one is far enough."""
    for _ in range(100):
        middle = (low + high) / 2
        if rising(middle) < target:
            low = middle
        else:
            high = middle
    return high


def _settle(wanted: Sequence[float], steps: Sequence[Sequence[int]], budget: float) -> list[int]:
    """How many steps each layer takes, so that together they come nearest to the budget.

    All are moved by one amount to meet it, those excepted that have nothing more to give or to keep; then each takes
    whole steps up to there, and what is left of the budget is taken step by step where most is lacking.
    """
    wants = torch.tensor(wanted, dtype=torch.float64)
    limits = torch.tensor([sum(sizes) for sizes in steps], dtype=torch.float64)

    def moved(by: float) -> torch.Tensor:
        return torch.minimum(wants + by, limits).clamp(min=0)

    farthest = (wants.abs() + limits).max().item()
    goals = moved(_bisect(lambda by: moved(by).sum().item(), budget, -farthest, farthest)).tolist()
    taken, total = [], 0
    lacking: list[tuple[float, int]] = []
    for number, (goal, sizes) in enumerate(zip(goals, steps, strict=True)):
        count, removed = 0, 0
        # Half a parameter of slack: the goal is a number that bisection has found.
        while count < len(sizes) and removed + sizes[count] <= goal + 0.5:
            removed, count = removed + sizes[count], count + 1
        taken.append(count)
        total += removed
        if count < len(sizes):
            heapq.heappush(lacking, (removed - goal, number))
    while lacking:
        behind, number = heapq.heappop(lacking)
        size = steps[number][taken[number]]
        if abs(total + size - budget) >= abs(total - budget):
            break
        taken[number], total = taken[number] + 1, total + size
        if taken[number] < len(steps[number]):
            heapq.heappush(lacking, (behind + size, number))
    return taken
