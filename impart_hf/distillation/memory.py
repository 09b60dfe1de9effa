"""What distillation needs: bytes of memory and disk by part, for a model, sizes of records and settings.

Weights and numbers that are trained are added up from shapes. What a step needs besides (activations, deltas in use,
logits) is measured: a step of the real code runs on fake tensors, which have shapes and no values, while the bytes of
those alive are counted. So the model of memory knows every architecture that this can run, and whatever the code does.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from ..coding.records import columns_of
from ..common.attention import with_capped_attention
from ..common.live_bytes import LiveBytes
from ..common.meta_model import text_decoder
from ..modeling.checkpoints import config_for
from ..modeling.codebook import CODEBOOKS, Levels
from ..modeling.delta_record import FACTORED, Record
from ..modeling.modeling_delta_compressed import inner_class
from .recomputation import layers_of, recompute_layers
from .settings import OPTIMIZERS, DistillSettings
from .student import Place, add_to, owners_of
from .text import whole_model_loss
from .trained_delta import TrainedDelta, TrainedPlane

_FLOAT = 4  # bytes of a float32
# Checkpoints on disk while one is written: the best, the one before, and the new one.
_CHECKPOINTS = 3
# Kept values for each byte of a record, with the methods' defaults: the largest that was measured.
VALUES_PER_BYTE = {"impart-rd": 6.1, "impart-qt": 4, "delta-come": 4, "dare-qt": 4, "impart": 0.5, "dare": 0.5,
                   "lowrank": 0.5}  # fmt: skip
_MOST_VALUES_PER_BYTE, _SCALES_PER_BYTE = 8, 0.1
# Numbers of layers with which a step is measured, if there are more and all have the same shapes.
_MEASURED = 3, 5


@dataclass(frozen=True)
class PlaneSize:
    """Size of a plane of a record.

    Attributes:
        columns, rows: the plane's shape.
        runs: width code and number of kept values of each run of columns.
    """

    columns: int
    rows: int
    runs: tuple[tuple[int, int], ...]

    @property
    def kept(self) -> int:
        return sum(kept for _, kept in self.runs)

    @property
    def has_positions(self) -> bool:
        """Whether positions are stored, because not all values are kept."""
        return self.kept < self.columns * self.rows


@dataclass(frozen=True)
class DeltaSize:
    """Size of a matrix's delta.

    Attributes:
        scales: number of column scales.
        planes: U and V, or the plane of a direct record.
    """

    scales: int
    planes: tuple[PlaneSize, ...]

    @classmethod
    def of(cls, record: Record) -> "DeltaSize":
        """Return the size of a record's delta; a mask's kept entries are counted by their probability."""
        columns, planes = columns_of(record.segments), []
        for side in range(record.sides):
            rows = record.plane_rows(side)
            counts = [round(rows * float(record.keep_ratios()[part].sum())) for part in columns]
            widths = [segment.widths()[side] for segment in record.segments]
            planes.append(PlaneSize(record.plane_columns, rows, tuple(zip(widths, counts, strict=True))))
        if record.layout == FACTORED:
            return cls(record.rank, tuple(planes))
        scaled = any(scales is not None for scales in record.column_scales)
        return cls(record.rows if scaled else 1, tuple(planes))

    @classmethod
    def factored(cls, shape: tuple[int, int], values: float, width: int, keep_ratio: float = 1.0) -> "DeltaSize":
        """Return the size of a factored delta with about as many kept values, of one width code."""
        rank = max(1, round(values / (sum(shape) * keep_ratio)))
        return cls(rank, tuple(PlaneSize(rank, n, ((width, round(rank * n * keep_ratio)),)) for n in shape))


@dataclass(frozen=True)
class Forecast:
    """Bytes that distillation needs.

    Attributes:
        weights: on the device: the weights of both models, or with blocks of those of their layers that are loaded.
        state: there: trained numbers, gradients, the optimizer's moments and the positions of kept values.
        step: there: the most that a step has alive besides: activations, deltas in use, logits and their gradients.
        host: hidden states of all tokens in the host's memory, with blocks only.
        disk: checkpoints.
        values: how many numbers are trained at a time.
    """

    weights: int
    state: int
    step: int
    host: int
    disk: int
    values: int

    @property
    def device(self) -> int:
        """Memory on the device."""
        return self.weights + self.state + self.step


def checkpoint_bytes(values: int, settings: DistillSettings) -> int:
    """Return the most that checkpoints of so many trained numbers take on disk."""
    return _CHECKPOINTS * values * (_FLOAT + OPTIMIZERS[settings.optim])


def checkpoint_bytes_for(record_bytes: int, method: str, layers: int, settings: DistillSettings) -> int:
    """Return about how much checkpoints take on disk, before there are records.

    Args:
        record_bytes: size of all records.
        method: name of the method.
        layers: number of the model's decoder layers.
    """
    density = VALUES_PER_BYTE.get(method, _MOST_VALUES_PER_BYTE) if settings.trains == "codes" else _SCALES_PER_BYTE
    share = 1.0 if settings.blocks is None else min(1.0, settings.blocks / layers)
    return checkpoint_bytes(round(record_bytes * density * share), settings)


class DistillationMemory:
    """The memory that the distillation of a model takes, for any batch."""

    def __init__(
        self,
        config: PreTrainedConfig,
        deltas: Mapping[str, Sequence[DeltaSize]],
        settings: DistillSettings,
        *,
        bf16: bool,
        tokens: tuple[int, int],
    ):
        """Describe a distillation.

        Args:
            config: configuration of the model.
            deltas: by the name of a parameter of the model: the sizes of the deltas of its matrices.
            settings: settings of distillation.
            bf16: whether it runs in bfloat16.
            tokens: number of sequences of the text, and tokens of each.
        """
        self._config, self._deltas, self._settings = config, deltas, settings
        self._bf16, self._tokens = bf16, tokens

    def forecast(self, sequences: int, gradient_checkpointing: bool) -> Forecast:
        """Return what is needed if so many sequences are run at a time.

        Raises:
            RuntimeError, TypeError, ValueError: if the model's code does not run on tensors without values.
        """
        blocks, settings = self._settings.blocks, self._settings
        layers = self._layers if blocks is None else min(blocks, self._layers)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = self._model(layers)
            weights = 2 * (_bytes_of(model.parameters()) + _bytes_of(model.buffers()))
            deltas = self._attach(model)
        values = sum(parameter.numel() for delta in deltas for parameter in delta.parameters())
        fixed = sum(_bytes_of(delta.fixed_tensors()) for delta in deltas)
        state = values * (2 * _FLOAT + OPTIMIZERS[settings.optim]) + fixed
        if layers > _MEASURED[1] and _are_alike(model):
            # A step takes the same more for every further layer.
            fewer, more = (self._step_bytes(sequences, gradient_checkpointing, count) for count in _MEASURED)
            step = fewer + (more - fewer) * (layers - _MEASURED[0]) // (_MEASURED[1] - _MEASURED[0])
        else:
            step = self._step_bytes(sequences, gradient_checkpointing, layers)
        hidden = 0 if blocks is None else self._config.get_text_config().hidden_size
        host = 4 * _FLOAT * self._tokens[0] * self._tokens[1] * hidden
        return Forecast(weights, state, step, host, checkpoint_bytes(values, settings), values)

    @property
    def _layers(self) -> int:
        return int(self._config.get_text_config().num_hidden_layers)

    def _step_bytes(self, sequences: int, gradient_checkpointing: bool, layers: int) -> int:
        """Run a step of a model with so many layers on tensors without values, and return the most it has alive."""
        with FakeTensorMode(allow_non_fake_inputs=True):
            teacher, student = self._model(layers), self._model(layers)
            for delta in self._attach(student):
                for parameter in delta.parameters():
                    parameter.grad = torch.empty_like(parameter)
            if gradient_checkpointing:
                recompute_layers(student)
            loss = whole_model_loss(teacher, student, gradient_checkpointing)
            batch = torch.zeros(sequences, self._tokens[1], dtype=torch.int64)
            with LiveBytes() as live:
                with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
                    value = loss(batch)
                if value.requires_grad:
                    value.backward()
        return live.peak

    def _model(self, layers: int) -> Any:
        """Make a frozen model without values, with its first layers only."""
        whole = self._settings.blocks is None
        with no_init_weights():
            model_class = inner_class(self._config)
            model: Any = model_class._from_config(
                config_for(model_class, self._config), dtype=torch.bfloat16 if self._bf16 and whole else torch.float32
            )
        decoder = text_decoder(model)
        for name, module in decoder.named_children():
            if isinstance(module, nn.ModuleList) and len(module) == self._layers:
                setattr(decoder, name, module[:layers])
        return with_capped_attention(model).eval().requires_grad_(False)

    def _attach(self, student: Any) -> list[TrainedDelta]:
        """Add deltas without values to a student."""
        owners, added = owners_of(student), set[str]()
        deltas: list[TrainedDelta] = []
        inputs = student.get_input_embeddings().weight
        for name, sizes in self._deltas.items():
            if name not in owners or name in added:  # a layer of another group, or the other name of a shared parameter
                continue
            if self._settings.blocks is not None and student.get_parameter(name) is inputs:
                continue  # embeddings are not trained then
            added.update(owners[name])
            delta = _Unfilled(sizes, self._settings.trains == "codes")
            add_to(student, Place(owners[name]), name, delta)
            deltas.append(delta)
        return deltas


def _bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _are_alike(model: Any) -> bool:
    """Return whether all layers of a model's decoder have parameters of the same shapes."""
    shapes = [sorted(tuple(p.shape) for p in layer.parameters()) for layer in layers_of(text_decoder(model))]
    return all(each == shapes[0] for each in shapes)


class _UnfilledPlane(TrainedPlane):
    """A trained plane without values: its tensors have the sizes of a real one."""

    def __init__(self, size: PlaneSize, trains: bool):
        nn.Module.__init__(self)
        self._shape = size.columns, size.rows
        self._positions = torch.empty(size.kept, dtype=torch.int32) if size.has_positions else None
        self._runs, start = [], 0
        for width, kept in size.runs:
            # A codebook keeps small tables, which must not come from here.
            book: Any = copy.copy(CODEBOOKS[width])
            book._tables = {}
            self._runs.append((book, slice(start, start := start + kept)))
        self._units = [1.0 if isinstance(book, Levels) else 0.5 for book, _ in self._runs]
        values = torch.empty(size.kept)
        self.latents = nn.Parameter(values) if trains else None
        if not trains:
            self._fixed = values


class _Unfilled(TrainedDelta):
    """A tensor's delta without values."""

    def __init__(self, sizes: Sequence[DeltaSize], trains: bool):
        nn.Module.__init__(self)
        self.records, self._used = [], None
        self._scales = [torch.empty(size.scales) for size in sizes]
        self.log_factors = nn.ParameterList([torch.empty_like(scales) for scales in self._scales])
        self._planes = [[_UnfilledPlane(plane, trains) for plane in size.planes] for size in sizes]
        self.planes = nn.ModuleList([plane for planes in self._planes for plane in planes])
