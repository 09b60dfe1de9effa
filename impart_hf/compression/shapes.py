"""A forecast from a model's shapes alone, for models that are not on this machine.

Single matrices of these shapes are timed. They are random, with a spectrum like that of a fine-tune.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from ..methods import MethodConfig
from ..modeling.checkpoints import same_values
from ..modeling.checksums import tensor_checksum
from .budgets import spectra_bytes
from .forecast import matrix_costs
from .matrix_timing import MatrixKind, kind_of, resident_bytes
from .pipeline import CompressionRequest
from .plan import make_plan
from .resources import Forecast, RunTimes, forecast_of
from .run_timing import allocation_seconds, training_speed
from .scan import TensorPlan
from .writer import CARD_BYTES

_SPIKES = 512  # components of a synthetic delta that rise above its noise
_OPENING = 2.0  # seconds to open two models and to check their headers
_CONFIG_BYTES = 2000  # of config.json
_SHARD_BYTES = 5 * 10**9
# Of a decoder layer's forward pass, in how many calibration runs it: to each of four inputs, and to the end.
_CALIBRATION_PASSES = 3.5


@dataclass(frozen=True)
class Shapes:
    """The shapes of a model.

    Attributes:
        experts: number of experts in each layer; 0 for one MLP.
        used: experts that a token is sent to.
        tied: whether the output projection is the embedding.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head: int
    vocabulary: int
    experts: int = 0
    used: int = 0
    tied: bool = False

    def tensors(self) -> list[TensorPlan]:
        """Return all tensors, as if a fine-tune had changed them all."""
        queries, keys = self.heads * self.head, self.key_heads * self.head
        attention = {
            "q": (queries, self.hidden), "k": (keys, self.hidden), "v": (keys, self.hidden),
            "o": (self.hidden, queries),
        }  # fmt: skip
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        mlp = {"gate": (self.inner, self.hidden), "up": (self.inner, self.hidden), "down": (self.hidden, self.inner)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            shapes |= {f"{prefix}.self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
            for place in [f"experts.{n}." for n in range(self.experts)] or [""]:
                shapes |= {f"{prefix}.mlp.{place}{name}_proj.weight": shape for name, shape in mlp.items()}
            if self.experts:
                shapes[f"{prefix}.mlp.gate.weight"] = self.experts, self.hidden
            shapes |= {f"{prefix}.{norm}.weight": (self.hidden,) for norm in ("input_norm", "post_attention_norm")}
        return [
            TensorPlan(
                name, "encoded" if len(shape) == 2 else "kept", shape, torch.bfloat16,
                vocabulary=shape[0] == self.vocabulary,
            )
            for name, shape in sorted(shapes.items())
        ]  # fmt: skip

    def config(self) -> dict[str, Any]:
        """Return the fields of config.json that a forecast reads."""
        fields: dict[str, Any] = {"hidden_size": self.hidden, "num_hidden_layers": self.layers}
        return fields | ({"num_experts": self.experts, "num_experts_per_tok": self.used} if self.experts else {})


def synthetic_delta(rows: int, columns: int, seed: int, device: str | torch.device = "cpu") -> torch.Tensor:
    """Return a delta with a spectrum like that of a fine-tune, float32, of spectral norm about 1.

    Its singular values fall as k^-0.5 into a floor of noise at a tenth of the largest.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = min(_SPIKES, rows, columns)
    u = torch.randn(rows, rank, generator=generator).to(device) / rows**0.5
    v = torch.randn(columns, rank, generator=generator).to(device) / columns**0.5
    delta = torch.randn(rows, columns, generator=generator).to(device).mul_(0.1 / (rows**0.5 + columns**0.5))
    return delta.addmm_(u * torch.arange(1, rank + 1, device=device) ** -0.5, v.t())


def _part(kind: MatrixKind, rows: int, columns: int, number: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return a random matrix, and one with a delta of one percent; see `matrix_timing.Source`."""
    delta = synthetic_delta(rows, columns, seed=number)
    before = torch.randn(rows, columns, generator=torch.Generator().manual_seed(number))
    delta *= 0.01 * before.norm() / delta.norm()
    return before.bfloat16(), (before + delta).bfloat16(), number


def machine_times(device: str | torch.device, trains: bool) -> RunTimes:
    """Return how fast this machine opens, scans and, if `trains`, trains models."""
    return RunTimes(_OPENING, _scan_rate(), training_speed=training_speed(torch.device(device)) if trains else 0.0)


def _scan_rate() -> float:
    """Return how many bytes of two models are scanned in a second, if they are in memory."""
    before = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    after = before + 0.01
    started = time.perf_counter()
    same_values(before, after)
    for tensor in (before, after):
        tensor.aminmax()
        tensor_checksum(tensor)
    return 2 * before.numel() * before.element_size() / (time.perf_counter() - started)


def _calibration_seconds(shapes: Shapes, tensors: list[TensorPlan], tokens: torch.Tensor, speed: float) -> float:
    """Return about how long calibration runs all layers, and adds up the second moments of their inputs."""
    inside = [t for t in tensors if len(t.shape) == 2 and not t.vocabulary]
    share = {t.name: shapes.used / shapes.experts if ".experts." in t.name else 1.0 for t in inside}
    forward = 2 * tokens.numel() * sum(math.prod(t.shape) * share[t.name] for t in inside)
    inputs = [shapes.hidden, shapes.heads * shapes.head, shapes.hidden, shapes.inner]
    moments = 2 * tokens.numel() * shapes.layers * sum(size**2 for size in inputs)
    return (_CALIBRATION_PASSES * forward + moments) / speed


def forecast_shapes(
    shapes: Shapes,
    method: MethodConfig,
    times: RunTimes,
    *,
    seconds: float,
    device: str | torch.device = "cpu",
    process_count: int = 1,
    calibration: torch.Tensor | None = None,
    distillation: torch.Tensor | None = None,
) -> Forecast:
    """Forecast a compression of a model of these shapes, all of whose tensors a fine-tune has changed.

    Args:
        times: from `machine_times`.
        seconds: about how long matrices are timed.
        device: where matrices are decomposed.
        process_count: number of processes of the job, each on a machine like this.
        calibration, distillation: texts, int64 (sequences, length), of which only the shape counts. Calibration has no
            effect on methods that do not quantise. Distillation's memory is not in the forecast.
    """
    tensors = shapes.tensors()
    if not method.quantises:
        calibration = None
    size = sum(t.dense_bytes for t in tensors)
    plan = make_plan(tensors, method, size, _CONFIG_BYTES, CARD_BYTES, _SHARD_BYTES)
    kinds = {t.name: kind_of(t, calibration is not None and not t.vocabulary) for t in plan.encoded}
    costs = matrix_costs(plan, kinds, method, _part, torch.device(device), seconds)
    calibrating = 0.0
    if calibration is not None:
        calibrating = _calibration_seconds(shapes, tensors, calibration, times.training_speed)
    return forecast_of(
        plan, CompressionRequest(method, calibration=calibration, distillation=distillation),
        {"method": method.to_dict()}, kinds, costs,
        RunTimes(
            times.opening, times.scan_rate, allocation_seconds(plan.encoded, kinds, method), calibrating,
            times.training_speed,
        ),
        kept_bytes=spectra_bytes(plan.encoded, method), model_config=shapes.config(),
        process_count=process_count, resident=resident_bytes(),
    )  # fmt: skip
