"""Export of a delta as a LoRA adapter: the leading singular components of every linear layer.

It serves engines that support only LoRA. The components beyond the rank are lost, and so is every change of embeddings,
output projection, norms, biases and experts; the report states how much that is.
"""

import copy
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..coding.svd import leading_svd
from ..common.checkpoint_layout import CheckpointLayout
from ..common.devices import usable_device
from ..common.meta_model import meta_model
from ..common.names import is_on_hub, public_name
from ..common.progress import Bar, Progress
from ..modeling.checkpoints import DTYPE_NAMES
from ..modeling.checksums import tensor_bytes
from ..modeling.delta_repository import DeltaRepository
from ..modeling.modeling_delta_compressed import inner_class, is_classifier
from ..modeling.transfer import to_device
from ..storage.checkpoint_writer import new_folder
from ..storage.safetensors_writer import Entry, write_safetensors
from .open import refuse_adapter_beside

ADAPTER_FILE = "adapter_model.safetensors"
_LARGEST_RANK = 1 << 16
_PREFIX = "base_model.model."  # PEFT puts it before the names of the model's modules


@dataclass(frozen=True)
class LoraMatrix:
    """One matrix of the adapter.

    Attributes:
        name: name of the fine-tuned tensor.
        norm: Frobenius norm of its delta.
        relative_error: norm of delta minus adapter, over `norm`; includes the rounding of the factors.
    """

    name: str
    norm: float
    relative_error: float


@dataclass
class LoraReport:
    """What an adapter contains of a delta, and what it lacks.

    Attributes:
        rank: rank of every matrix.
        adapter_bytes: bytes of the adapter's tensors.
        matrices: the matrices in the adapter.
        left_out: by tensor name, norms of the deltas that an adapter cannot hold, added rows included.
    """

    rank: int
    adapter_bytes: int = 0
    matrices: list[LoraMatrix] = field(default_factory=list)
    left_out: dict[str, float] = field(default_factory=dict)

    @property
    def relative_error(self) -> float:
        """Relative error over all the adapter's matrices: root of the summed squared errors, over that of the norms."""
        lost = sum((m.norm * m.relative_error) ** 2 for m in self.matrices)
        return (lost / sum(m.norm**2 for m in self.matrices)) ** 0.5 if self.matrices else 0.0

    @property
    def left_out_share(self) -> float:
        """Share of the whole delta's squared norm that is in tensors outside the adapter."""
        left = sum(norm**2 for norm in self.left_out.values())
        return left / (left + sum(m.norm**2 for m in self.matrices))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "relative_error": self.relative_error, "left_out_share": self.left_out_share}


def export_lora(
    repository: DeltaRepository,
    output_dir: str | Path,
    rank: int,
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> LoraReport:
    """Write the leading singular components of a delta as a LoRA adapter in PEFT's format.

    For every linear layer W (m, n) that changed, B = U sqrt(sigma), shape (m, rank), and A = sqrt(sigma) V^T, shape
    (rank, n), of W_finetuned - W_base, in the fine-tuned dtype, with alpha = rank, so that W_base + B A is the best
    approximation of W_finetuned at that rank. W of GPT-2's Conv1D is the transpose of what is stored. A layer with
    fewer components is padded with zeros, because not every engine accepts a different rank for each layer.

    Args:
        repository: from `open_repository`.
        output_dir: folder to create; must not exist, or be empty.
        rank: components of every matrix, 1 to 65536; reduced to the largest rank that a matrix can have.
        device: where matrices are decomposed.
        progress: shows a bar over the matrices.

    Raises:
        CheckpointError: if the repository holds an adapter already.
        ValueError: if the rank is out of range, no linear layer has changed, or PEFT does not support the model's
            layers.
        OutputError: if the folder is not empty.
        ModuleNotFoundError: if PEFT is not installed.
        DeltaFormatError, WrongBaseError: if the delta is damaged or the base is another; no output remains.
    """
    refuse_adapter_beside(repository.source, repository.options)
    if is_classifier(inner_class(repository.text_config)):
        raise ValueError(
            f"'{repository.source}' is a sequence classifier: adapters are made of language models' deltas"
        )
    if not 1 <= rank <= _LARGEST_RANK:
        raise ValueError(f"rank: a LoRA rank must be from 1 to {_LARGEST_RANK}, got {rank}")
    device, progress = usable_device(str(device)), progress or Progress(False)
    changed = [name for name in repository.names() if repository.is_changed(name)]
    skeleton = meta_model(repository.text_config)
    modules = _linear_layers(skeleton)
    linear = _linear_weights(repository, skeleton, modules)
    exported = [name for name in changed if name in linear]
    if not exported:
        raise ValueError(
            f"no linear layer of '{repository.source}' differs from the base's, only {len(changed)} other tensors: "
            "there is nothing to export"
        )
    rank = min(rank, max(min(repository.shape(name)) for name in exported))  # more would be zeros
    config = _adapter_config(repository, [linear[name] for name in exported], modules, rank)
    _check_adapter(skeleton, config)
    report = LoraReport(rank)
    with new_folder(output_dir) as folder:
        targets = [_Target(name, linear[name], modules[linear[name]]) for name in exported]
        entries = [entry for target in targets for entry in _entries(repository, target, rank, device, report)]
        report.adapter_bytes = sum(entry.size for entry in entries)
        config.save_pretrained(folder)
        with progress.bar(len(entries), "Decomposing") as bar:
            write_safetensors(folder / ADAPTER_FILE, [_tracked(entry, bar) for entry in entries], {"format": "pt"})
        for name in changed:
            if name not in linear:
                report.left_out[name] = _norm_of_delta(repository, name, device)
        (folder / "README.md").write_text(_card(repository, report), "utf-8")
    return report


def _check_adapter(skeleton: PreTrainedModel, config: Any) -> None:
    """Check that PEFT accepts the adapter: it does not support some layers of some models.

    Raises:
        ValueError: if it does not.
    """
    from peft import get_peft_model

    trial = copy.copy(config)  # a copy, because PEFT writes the model's name into it
    trial.base_model_name_or_path = None
    try:
        get_peft_model(skeleton, trial, low_cpu_mem_usage=True)  # keeps the adapter on the meta device
    except ValueError as error:
        raise ValueError(f"PEFT does not support such an adapter for this model: {error}") from error


@dataclass(frozen=True)
class _Target:
    """A weight that gets an adapter.

    Attributes:
        name: name of its tensor.
        module: name of its layer in the model.
        transposed: whether it is stored as (inputs, outputs).
    """

    name: str
    module: str
    transposed: bool


def _linear_layers(model: PreTrainedModel) -> dict[str, bool]:
    """Return the linear layers except the output projection, and whether their weights are stored transposed."""
    output = model.get_output_embeddings()
    return {
        name: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output
    }


def _linear_weights(repository: DeltaRepository, model: PreTrainedModel, modules: Container[str]) -> dict[str, str]:
    """Return the tensors that are weights of linear layers, with the layer of each."""
    groups = CheckpointLayout(repository, model).groups
    single = {group.members[0].name: key for key, group in groups.items() if group.converter is None}
    return {
        name: module
        for name, parameter in single.items()
        if (module := parameter.removesuffix(".weight")) != parameter and module in modules
    }


def _adapter_config(repository: DeltaRepository, exported: list[str], modules: Mapping[str, bool], rank: int) -> Any:
    """Return PEFT's configuration of the adapter.

    Args:
        exported: names of the layers that get an adapter.
        modules: from `_linear_layers`.
    """
    try:
        from peft import LoraConfig
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("exporting an adapter needs PEFT: pip install 'impart-hf[lora]'") from error
    kinds = {name.rpartition(".")[2] for name in exported}
    same_kind = [name for name in modules if name.rpartition(".")[2] in kinds]
    # If every layer of these kinds changed, the kinds are listed, which is short and what engines expect.
    targets = sorted(kinds) if len(same_kind) == len(exported) else exported
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,
        target_modules=targets,
        fan_in_fan_out=any(modules[name] for name in exported),
        base_model_name_or_path=repository.config.base_model_name_or_path,
        revision=repository.config.base_model_revision,
        inference_mode=True,
    )


def _entries(
    repository: DeltaRepository, target: _Target, rank: int, device: torch.device, report: LoraReport
) -> Iterator[Entry]:
    """Yield the entries of one matrix's two factors, which are computed when the first is written."""
    name = target.name
    (m, n), dtype = repository.shape(name), repository.dtype(name)
    if target.transposed:
        m, n = n, m
    factors: dict[str, torch.Tensor] = {}

    def factor(which: str) -> bytes:
        if not factors:
            delta = _delta(repository, name, device)
            delta = delta.t() if target.transposed else delta
            factors["lora_A"], factors["lora_B"] = _factors(delta, rank, dtype)
            norm = float(delta.norm())
            lost = float((delta - factors["lora_B"].float() @ factors["lora_A"].float()).norm())
            report.matrices.append(LoraMatrix(name, norm, lost / norm if norm else 0.0))
        return tensor_bytes(factors.pop(which)).tobytes()

    for which, shape in (("lora_A", (rank, n)), ("lora_B", (m, rank))):
        size = shape[0] * shape[1] * dtype.itemsize
        entry = f"{_PREFIX}{target.module}.{which}.weight"
        yield Entry(entry, DTYPE_NAMES[dtype], shape, size, partial(factor, which))


def _tracked(entry: Entry, bar: Bar) -> Entry:
    """Return the entry; the bar advances when its data is written."""

    def data() -> bytes:
        bar.show(entry.name)
        written = entry.data()
        bar.update()
        return written

    return Entry(entry.name, entry.dtype, entry.shape, entry.size, data)


def _delta(repository: DeltaRepository, name: str, device: torch.device) -> torch.Tensor:
    """Return a tensor's delta without added rows: float32, of the base's shape."""
    base = to_device(repository.base_tensor(name), device).float()
    return repository.tensor(name, device)[: len(base)].float() - base


def _factors(delta: torch.Tensor, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A, shape (rank, n), and B, shape (m, rank), padded with zeros beyond the matrix's own rank."""
    u, sigma, v = leading_svd(delta, min(rank, *delta.shape))
    root = sigma.sqrt()
    a = delta.new_zeros(rank, delta.shape[1])
    b = delta.new_zeros(delta.shape[0], rank)
    a[: len(sigma)], b[:, : len(sigma)] = root[:, None] * v.t(), u * root
    return a.to(dtype), b.to(dtype)


def _norm_of_delta(repository: DeltaRepository, name: str, device: torch.device) -> float:
    base = to_device(repository.base_tensor(name), device).float()
    tuned = repository.tensor(name, device).float()
    return float(((tuned[: len(base)] - base).norm() ** 2 + tuned[len(base) :].norm() ** 2).sqrt())


def _card(repository: DeltaRepository, report: LoraReport) -> str:
    """Return the adapter's README.md."""
    base = repository.config.base_model_name_or_path
    on_hub = is_on_hub(base)
    data = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "impart-hf"],
    )
    template = resources.files("impart_hf.model_cards").joinpath("lora_adapter.md").read_text("utf-8")
    return (
        str(
            ModelCard.from_template(
                data,
                template_str=template,
                base=base if on_hub else Path(base).name,
                base_revision=repository.config.base_model_revision or "",
                source=public_name(repository.source),
                rank=report.rank,
                error=f"{report.relative_error:.3f}",
                share=f"{report.left_out_share:.1%}",
                left_out=len(report.left_out),
            )
        )
        + "\n"
    )
