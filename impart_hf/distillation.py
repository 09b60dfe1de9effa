"""Scale distillation: the scales that records store anyway, trained until the model answers as the fine-tune does.

BitDelta (arXiv 2402.10193, sec. 3.1) trains one scale for each matrix; here the singular values of factored records are
trained as well. Masks and codes stay, the file does not grow by a byte. BitDelta's loss is the mean squared error of
the logits; ours is KL(fine-tune || compressed), by which a compressed model is judged in the end.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import AutoConfig, AutoModelForCausalLM

from .methods.base import check_number
from .modeling.checkpoints import Checkpoint, CheckpointError
from .modeling.delta_decode import add_delta, decode_planes, decode_record
from .modeling.delta_record import FACTORED, Record, pack_record, parse_stack
from .progress import Progress

_CHECKS = 8  # how often the held-out sequences are looked at while training
_PATIENCE = 3  # checks in a row without a new best, after which training stops


@dataclass(frozen=True)
class DistillSettings:
    """How scales are trained.

    Attributes:
        steps: of Adam, at least 1.
        learning_rate: of the logarithms of the factors by which scales change, in (0, 1]: at 0.01 a step changes a
            scale by about 1 %. It falls linearly to zero.
        batch_size: sequences a step, at least 1.
        validation_share: share of the sequences, in (0, 1), that is held out; rounded, but at least one sequence.
        seed: of the order of the sequences, not negative.
    """

    steps: int = 80
    learning_rate: float = 0.1
    batch_size: int = 8
    validation_share: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        for name, least in (("steps", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number from {least} on, got {value!r}")
        check_number("learning_rate", self.learning_rate)
        check_number("validation_share", self.validation_share)
        if not 0 < self.learning_rate <= 1:
            raise ValueError(f"learning_rate must be above 0 and at most 1, got {self.learning_rate}")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share must be between 0 and 1, got {self.validation_share}")


@dataclass(frozen=True)
class DistillReport:
    """What training did.

    Attributes:
        steps: taken.
        best_step: the one after which the held-out sequences were matched best; 0 if all records stay as they were.
        before, after: KL(fine-tune || compressed) on the held-out sequences, in nats per token; `after` is measured
            with the numbers as they are stored.
        untrained: the tensors whose records were left alone, see `distill_scales`.
    """

    steps: int
    best_step: int
    before: float
    after: float
    untrained: tuple[str, ...]


def distill_scales(
    base: Checkpoint,
    finetuned: Checkpoint,
    records: Mapping[str, bytes | np.ndarray],
    tokens: torch.Tensor,
    settings: DistillSettings | None = None,
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> tuple[dict[str, bytes], DistillReport]:
    """Train the scale of every direct record and the singular values of every factored one.

    The last sequences are held out. They choose the step whose numbers are kept; if these, rounded as they are stored,
    are no better there than before, the records come back as they were. Same inputs, same bytes (on a CPU).

    Left alone are records of embeddings, of tensors that have rows added or are shared between modules, and of those
    that transformers renames or fuses when it loads them (Mixtral's experts). The others learn to live with them.

    Held in memory, on `device`: the fine-tuned and the compressed model, both whole, in float32; the planes of all
    trained records, dense, in float32 (a direct record's as large as its matrix, a factored one's rank * (rows +
    columns) numbers); a batch's activations and about five times its logits. A matrix that is no nn.Linear's weight
    takes as much again when its sum with the base is formed, and so does its gradient.

    Args:
        base: the base model.
        finetuned: the fine-tuned model.
        records: by tensor name: the tensor's record, or its stack's records one after the other (uint8).
        tokens: int64 (sequences, length), on any device, without padding; at least two sequences.
        settings: `DistillSettings()` if None.
        device: where both models run.
        progress: shows a bar over the steps.

    Returns:
        All records, each as long as it was, in the trained ones scale, sigma and relative error changed; and a report.

    Raises:
        ValueError: if tokens are too few, of another shape or dtype, or outside the vocabulary, or if the loss is not
            finite.
        CheckpointError: if the fine-tune lacks tensors of its architecture.
    """
    settings = settings or DistillSettings()
    unchanged = {name: bytes(record) for name, record in records.items()}
    data = {name: np.frombuffer(record, np.uint8) for name, record in unchanged.items()}
    teacher = _load(finetuned, {name: finetuned.tensor(name) for name in finetuned.names()})
    check_tokens(tokens, teacher.get_input_embeddings().num_embeddings)
    trained = _trainable(teacher, base, finetuned, data)
    student = _student(base, finetuned, data, trained).to(device)
    deltas = {name: _attach(student, name, parse_stack(data[name], name)) for name in trained}
    models = teacher.to(device), student
    held_out = min(len(tokens) - 1, max(1, round(len(tokens) * settings.validation_share)))
    training, validation = tokens.to(device).split([len(tokens) - held_out, held_out])
    before = _mean_divergence(*models, validation, settings.batch_size)
    if not math.isfinite(before):
        raise ValueError("distillation: the logits of the fine-tuned or of the compressed model are not finite")
    steps, best_step = _train(models, deltas, training, validation, before, settings, progress or Progress(False))
    stored = {name: delta.fold() for name, delta in deltas.items()}
    after = _mean_divergence(*models, validation, settings.batch_size)
    untrained = tuple(sorted(records.keys() - deltas.keys()))
    if not after < before:
        return unchanged, DistillReport(steps, 0, before, before, untrained)
    for name, stack in stored.items():
        pair = [model.tensor(name).reshape(-1, *model.shape(name)[-2:]) for model in (base, finetuned)]
        for record, old, new in zip(stack, *pair, strict=True):
            delta = new.to(device, torch.float32) - old.to(device, torch.float32)
            # A matrix of a stack may be equal to the base's: then there is no error to be relative to it
            if (size := delta.norm()) > 0:
                record.relative_error = float((decode_record(record, name, device) - delta).norm() / size)
    changed = {name: b"".join(map(pack_record, stack)) for name, stack in stored.items()}
    return unchanged | changed, DistillReport(steps, best_step, before, after, untrained)


def check_tokens(tokens: torch.Tensor, vocabulary: int | None) -> None:
    """See that token sequences can be trained on.

    Raises:
        ValueError: if there are fewer than two of them, or a token is not in the vocabulary (None: of unknown size).
    """
    shape = tuple(tokens.shape)
    if tokens.dtype != torch.int64 or len(shape) != 2 or shape[0] < 2 or shape[1] < 1:
        raise ValueError(
            "distillation needs two or more sequences, one of them to be held out: tokens must be int64 "
            f"(sequences, length), got {tokens.dtype} {shape}"
        )
    if vocabulary is not None and (tokens.min() < 0 or tokens.max() >= vocabulary):
        raise ValueError(
            f"distillation: tokens must be from 0 to {vocabulary - 1}, got {int(tokens.min())} to {int(tokens.max())}"
        )


def _load(finetuned: Checkpoint, tensors: dict[str, torch.Tensor]) -> Any:
    """A model of the fine-tune's architecture, frozen, in float32, of tensors with the checkpoint's names."""
    config = AutoConfig.for_model(**finetuned.config)
    with torch.device("meta"):
        model_class: Any = type(AutoModelForCausalLM.from_config(config))
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"]:  # transformers would go on with random numbers
        raise CheckpointError(f"'{finetuned.source}' lacks the tensor {min(info['missing_keys'])}")
    return model.eval().requires_grad_(False)


def _trainable(model: Any, base: Checkpoint, finetuned: Checkpoint, names: Iterable[str]) -> list[str]:
    """The tensors that are a parameter of one module of the fine-tuned model, as they stand in the checkpoint."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    uses = Counter(map(id, parameters.values()))

    def fits(name: str) -> bool:
        parameter = parameters.get(name)
        if parameter is None or uses[id(parameter)] > 1 or parameter.shape != base.shape(name):
            return False
        owner = model.get_submodule(name.rpartition(".")[0])
        return not isinstance(owner, nn.Embedding) and torch.equal(parameter, finetuned.tensor(name).float())

    return [name for name in names if fits(name)]


def _student(base: Checkpoint, finetuned: Checkpoint, records: Mapping[str, np.ndarray], trained: list[str]) -> Any:
    """The compressed model, but with the base's weights where a delta is still to be attached."""
    tensors = {name: finetuned.tensor(name) for name in finetuned.names()}
    for name, data in records.items():
        before = base.tensor(name)
        if name in trained:
            tensors[name] = before
        else:
            added_rows = tensors[name][len(before) :].float()
            tensors[name] = torch.cat([add_delta(before, data, name, torch.float32), added_rows])
    return _load(finetuned, tensors)


class _Delta(nn.Module):
    """The trained delta of one tensor, a matrix or a stack of them: a parametrisation of the base's weight.

    Attributes:
        records: one for each matrix.
        planes: the dense planes of each, (columns, rows): [U, V] or [P].
        sizes: what is trained of each, scale * sigma or [scale], float32; in force is sizes * exp(log_factors).
    """

    def __init__(self, records: list[Record], name: str, device: torch.device):
        super().__init__()
        self.records = records
        self.planes = [[plane.dense() for plane in decode_planes(record, name, device)] for record in records]
        self.sizes = [_sizes(record, device) for record in records]
        self.log_factors = nn.ParameterList([torch.zeros_like(sizes) for sizes in self.sizes])

    def _scaled(self) -> list[torch.Tensor]:
        return [sizes * factors.exp() for sizes, factors in zip(self.sizes, self.log_factors, strict=True)]

    def forward(self, base: torch.Tensor) -> torch.Tensor:
        """Base plus delta."""
        deltas = [
            planes[0] * sizes if len(planes) == 1 else (planes[0].t() * sizes) @ planes[1]
            for planes, sizes in zip(self.planes, self._scaled(), strict=True)
        ]
        return base + torch.stack(deltas).view_as(base)

    def linear(self, inputs: torch.Tensor, base: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """nn.Linear with base plus delta as its weight; neither the sum is formed nor a gradient of its size."""
        (planes,), (sizes,) = self.planes, self._scaled()
        inner = functional.linear(inputs, planes[-1]) * sizes
        return functional.linear(inputs, base, bias) + (inner if len(planes) == 1 else inner @ planes[0])

    @torch.no_grad()
    def fold(self) -> list[Record]:
        """The records with the factors in them; from here on, the numbers in force are those that these store."""
        for number, factors in enumerate(self.log_factors):
            record = self.records[number]
            change = factors.double().exp().cpu().numpy()
            if record.layout == FACTORED:
                sigma = record.sigma * change
                # With 1 for the largest, the others stay as far from the ends of float16 as they were
                largest = float(np.abs(sigma).max(initial=0.0)) or 1.0
                scale, sigma = record.scale * largest, (sigma / largest).astype(np.float16)
            else:
                scale, sigma = record.scale * float(change[0]), record.sigma
            self.records[number] = replace(record, scale=float(np.float32(scale)), sigma=sigma)
            self.sizes[number] = _sizes(self.records[number], factors.device)
            factors.zero_()
        return self.records


def _sizes(record: Record, device: torch.device) -> torch.Tensor:
    sigma = record.sigma.astype(np.float32) if record.layout == FACTORED else np.ones(1, np.float32)
    return torch.from_numpy(sigma * np.float32(record.scale)).to(device)


def _attach(student: Any, name: str, records: list[Record]) -> _Delta:
    """Add a tensor's delta to the student's parameter of that name, which is the base's."""
    path, _, leaf = name.rpartition(".")
    owner = student.get_submodule(path)
    base, is_linear = getattr(owner, leaf), type(owner) is nn.Linear
    delta = _Delta(records, name, base.device)
    # Whoever reads the weight itself gets the sum
    parametrize.register_parametrization(owner, leaf, delta, unsafe=True)
    if is_linear:
        owner.forward = partial(delta.linear, base=base, bias=owner.bias)
    return delta


def _divergence(teacher: Any, student: Any, tokens: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student), the mean over all tokens, in nats."""
    with torch.no_grad():
        wanted = teacher(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    with parametrize.cached():  # some layers read a stack once for each of its matrices
        found = student(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    return functional.kl_div(found, wanted, log_target=True, reduction="sum") / tokens.numel()


@torch.no_grad()
def _mean_divergence(teacher: Any, student: Any, tokens: torch.Tensor, batch_size: int) -> float:
    parts = tokens.split(batch_size)
    return sum(_divergence(teacher, student, part).item() * len(part) for part in parts) / len(tokens)


def _batches(sequences: int, settings: DistillSettings) -> Iterator[torch.Tensor]:
    """The indices of each step's sequences; none is used again before all have been."""
    generator = torch.Generator().manual_seed(settings.seed)
    size, waiting = min(settings.batch_size, sequences), torch.empty(0, dtype=torch.int64)
    for _ in range(settings.steps):
        if len(waiting) < size:
            waiting = torch.cat([waiting, torch.randperm(sequences, generator=generator)])
        yield waiting[:size]
        waiting = waiting[size:]


@torch.enable_grad()
def _train(
    models: tuple[Any, Any],
    deltas: dict[str, _Delta],
    training: torch.Tensor,
    validation: torch.Tensor,
    before: float,
    settings: DistillSettings,
    progress: Progress,
) -> tuple[int, int]:
    """Train the factors, leave those of the best check in place, and return the steps taken and the best one."""
    factors = [f for delta in deltas.values() for f in delta.log_factors]
    if not factors:
        return 0, 0
    optimizer = torch.optim.Adam(factors, lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
    interval = max(1, settings.steps // _CHECKS)
    best, best_step, best_factors = before, 0, [f.detach().clone() for f in factors]
    with progress.bar(settings.steps, "Distilling") as bar:
        for step, rows in enumerate(_batches(len(training), settings), 1):
            loss = _divergence(*models, training[rows.to(training.device)])
            if not torch.isfinite(loss):
                raise ValueError(f"distillation: the loss of step {step} is not finite")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
            if step % interval == 0 or step == settings.steps:
                now = _mean_divergence(*models, validation, settings.batch_size)
                bar.set_postfix_str(f"held-out KL {now:.4f}, before {before:.4f}")
                if now < best:
                    best, best_step, best_factors = now, step, [f.detach().clone() for f in factors]
                elif step - best_step >= _PATIENCE * interval:
                    break
    with torch.no_grad():
        for factor, value in zip(factors, best_factors, strict=True):
            factor.copy_(value)
    return step, best_step
