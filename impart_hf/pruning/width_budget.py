"""The numbers of heads and channels that every layer loses to meet a budget of parameters."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .choices import PARTS
from .decoder_shape import CHANNELS, GROUPS, HEADS, DecoderShape, LayerWidth


@dataclass(frozen=True)
class HeadUnit:
    """The smallest part of a layer's attention that is removed: a KV group, or one query head of every group.

    Attributes:
        parameters: parameters of one unit.
        count: how many units the layer has; at least one is kept.
    """

    parameters: int
    count: int


def head_unit(shape: DecoderShape, width: LayerWidth, query_heads: bool) -> HeadUnit:
    """Return the head unit of a layer.

    Args:
        query_heads: a unit is one query head of every KV group, instead of a whole group.
    """
    groups = width.num_key_value_heads
    per_group = width.num_attention_heads // groups
    head = shape.unit_parameters(HEADS)
    if query_heads:
        return HeadUnit(groups * head, per_group)
    return HeadUnit(per_group * head + shape.unit_parameters(GROUPS), groups)


@dataclass(frozen=True)
class WidthBudget:
    """What to remove from every layer.

    Attributes:
        heads: head units to remove, by layer.
        channels: channels to remove, by layer.
        parameters: all parameters to remove.
    """

    heads: list[int]
    channels: list[int]
    parameters: int


def width_budget(
    shape: DecoderShape,
    scores: torch.Tensor,
    ratio: float,
    *,
    exponent: float,
    parts: Sequence[str] = PARTS,
    multiple_of: int = 1,
    query_heads: bool = False,
) -> WidthBudget:
    """Divide a budget among the layers; less important layers lose a larger share.

    A layer of score s loses the share min(1, λ·s^-exponent) of what can be pruned in it; λ is the same for all layers
    and chosen to meet the budget. Its heads lose that share to the nearest whole unit, its channels the rest. Channels
    are then added one by one until the budget is missed by at most half a unit.

    Args:
        shape: the model's shape.
        scores: (layers,), not negative.
        ratio: share of the decoder layers' parameters to remove, in (0, 1).
        exponent: at 0 all layers lose the same share.
        parts: the parts of the layers to prune: "attention", "mlp" or both.
        multiple_of: in layers that lose channels, the number of kept channels is a multiple of this.
        query_heads: as for `head_unit`.

    Raises:
        ValueError: if the ratio is out of range or would leave a layer without heads or channels.
    """
    target = ratio * shape.decoder_parameters
    units = [head_unit(shape, width, query_heads) for width in shape.layers]
    per_channel = shape.unit_parameters(CHANNELS)
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
            f"ratio is {ratio:g}; it is the share of the decoder layers' parameters to remove, and must be above 0 and "
            f"at most {most:.4f} to prune {' and '.join(parts)}, because "
            f"every layer keeps at least one head and a multiple of {multiple_of} channels"
        )
    shares = _shares(scores, limits, target, exponent)
    goals = [share * limit for share, limit in zip(shares, limits, strict=True)]
    head_goals = [
        goal * heads / limit if limit else 0.0 for goal, heads, limit in zip(goals, head_limits, limits, strict=True)
    ]
    heads = _settle(head_goals, head_steps, sum(head_goals))
    removed = [sum(steps[:n]) for steps, n in zip(head_steps, heads, strict=True)]
    channel_goals = [goal - r for goal, r in zip(goals, removed, strict=True)]
    channels = _settle(channel_goals, channel_steps, target - sum(removed))
    total = sum(removed) + sum(sum(steps[:n]) for steps, n in zip(channel_steps, channels, strict=True))
    if abs(total - target) > max(max(steps, default=0) for steps in (*head_steps, *channel_steps)):
        raise ValueError(f"ratio {ratio:g} cannot be met with whole heads and multiples of {multiple_of} channels")
    counts = [sum(_removals(w.intermediate_size, multiple_of)[:n]) for w, n in zip(shape.layers, channels, strict=True)]
    return WidthBudget(heads, counts, total)


def _removals(size: int, multiple_of: int) -> list[int]:
    """Return how many channels each step removes, from `size` down to the smallest multiple."""
    if size <= multiple_of:
        return []
    first = size % multiple_of or multiple_of
    return [first] + [multiple_of] * ((size - first) // multiple_of - 1)


def _shares(scores: torch.Tensor, limits: Sequence[int], target: float, exponent: float) -> list[float]:
    """Return the share of its limit that each layer loses: min(1, λ·s^-exponent), with the λ that meets the target."""
    relative = scores.double() / scores.double().mean().clamp(min=torch.finfo(torch.float64).tiny)
    # Without the lower bound, a layer with a score of zero would take the whole budget.
    weights = relative.clamp(min=1e-6) ** -exponent
    sizes = torch.tensor(limits, dtype=torch.float64)
    largest = (1 / weights.min()).item()  # with this λ every layer loses all that it can
    factor = _bisect(lambda x: ((weights * x).clamp(max=1) * sizes).sum().item(), target, 0.0, largest)
    return (weights * factor).clamp(max=1).tolist()


def _bisect(rising: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Return the point between `low` and `high` where a rising function reaches the target; `high` must reach it."""
    for _ in range(100):
        middle = (low + high) / 2
        if rising(middle) < target:
            low = middle
        else:
            high = middle
    return high


def _settle(goals: Sequence[float], steps: Sequence[Sequence[int]], budget: float) -> list[int]:
    """Return how many steps each layer takes, so that their sum comes as near as possible to the budget.

    All goals are shifted by the same amount to meet the budget, within 0 and each layer's limit. Each layer then takes
    the whole steps that fit under its goal. The rest of the budget is taken step by step from the layer that is
    farthest below its goal.
    """
    unshifted = torch.tensor(goals, dtype=torch.float64)
    limits = torch.tensor([sum(sizes) for sizes in steps], dtype=torch.float64)

    def shifted(by: float) -> torch.Tensor:
        return torch.minimum(unshifted + by, limits).clamp(min=0)

    largest = (unshifted.abs() + limits).max().item()
    shifted_goals = shifted(_bisect(lambda by: shifted(by).sum().item(), budget, -largest, largest)).tolist()
    taken, total = [], 0
    deficits: list[tuple[float, int]] = []  # a heap: (removed minus goal, layer)
    for number, (goal, sizes) in enumerate(zip(shifted_goals, steps, strict=True)):
        count, removed = 0, 0
        # Half a parameter of tolerance, because bisection finds the goal with a rounding error.
        while count < len(sizes) and removed + sizes[count] <= goal + 0.5:
            removed, count = removed + sizes[count], count + 1
        taken.append(count)
        total += removed
        if count < len(sizes):
            heapq.heappush(deficits, (removed - goal, number))
    while deficits:
        deficit, number = heapq.heappop(deficits)
        size = steps[number][taken[number]]
        if abs(total + size - budget) >= abs(total - budget):
            break
        taken[number], total = taken[number] + 1, total + size
        if taken[number] < len(steps[number]):
            heapq.heappush(deficits, (deficit + size, number))
    return taken
