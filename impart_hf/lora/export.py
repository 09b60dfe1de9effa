"""Export of a delta as a LoRA adapter in PEFT's format: the leading singular components of its matrices.

It serves engines that support only LoRA. Components beyond the rank are lost, and so is every change of norms, biases,
routers and added tokens; the report states how much that is.
"""

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.text import CalibrationSource
from ..common.configs import VOCABULARY_FIELDS, differing_fields, model_config
from ..common.devices import usable_device
from ..common.meta_model import meta_model
from ..common.progress import Bar, Progress
from ..common.validation import byte_budget
from ..modeling.checkpoints import DTYPE_NAMES, SAFETENSORS_DTYPES
from ..modeling.checksums import tensor_bytes
from ..modeling.delta_repository import DeltaRepository
from ..modeling.modeling_delta_compressed import inner_class, is_classifier
from ..repository.open import refuse_adapter_beside, refuse_chain
from ..storage.checkpoint_writer import new_folder
from ..storage.safetensors_writer import Entry, write_safetensors
from .factors import Decomposed, Factors, SpooledFactors
from .places import PARTS, Part, Place, as_nested, places_of, tensor_delta
from .report import LoraMatrix, LoraReport, adapter_card
from .validation import Validation

ADAPTER_FILE = "adapter_model.safetensors"
_LARGEST_RANK = 1 << 16
_WIDTHS = {name: dtype.itemsize for name, dtype in SAFETENSORS_DTYPES.items()}


def export_lora(
    repository: DeltaRepository,
    output_dir: str | Path,
    rank: int,
    *,
    max_bytes: int | str | None = None,
    parts: Collection[Part] = PARTS,
    validation: CalibrationSource | None = None,
    samples: int = 64,
    length: int = 512,
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> LoraReport:
    """Write the leading singular components of a delta as a LoRA adapter in PEFT's format.

    For every matrix W (m, n) that changed, B = U sqrt(sigma), shape (m, rank), and A = sqrt(sigma) V^T, shape (rank,
    n), of its delta, in the fine-tuned dtype, with alpha = rank, so that W_base + B A is the best approximation of
    W_finetuned at that rank. A delta of no more components is in the adapter as a whole.

    Without a budget all matrices have one rank, because not every engine accepts others; those with fewer components
    are padded with zeros. With a budget each has the rank that it is worth (`rank_pattern`).

    Args:
        repository: from `open_repository`.
        output_dir: folder to create; must not exist, or be empty.
        rank: the most components of a matrix, 1 to 65536; reduced to the largest rank that a matrix can have.
        max_bytes: the most bytes of all factors, a number or a string such as "200MB"; None for no budget.
        parts: what may be in the adapter: "linear" layers, "embeddings" and output projection, "experts" that
            transformers holds as stacks. Not every engine takes the last two.
        validation: text on which the adapter is compared with the delta, of the kinds that `compress` takes.
        samples, length: the most sequences of that text, and tokens per sequence.
        batch_size: sequences at a time.
        device: where matrices are decomposed and models compared.
        progress: shows a bar over the matrices.

    Raises:
        CheckpointError: if the repository holds an adapter already, has no tokenizer for the text, or rests on
            another delta.
        ValueError: if an argument is out of range, nothing that an adapter holds has changed, the budget is too small
            for anything, or PEFT does not support the model's layers.
        OutputError: if the folder is not empty.
        ModuleNotFoundError: if PEFT is not installed.
        DeltaFormatError, WrongBaseError: if the delta is damaged or the base is another; no output remains.
    """
    refuse_adapter_beside(repository.source, repository.options)
    refuse_chain(repository)
    if is_classifier(inner_class(repository.text_config)):
        raise ValueError(
            f"'{repository.source}' is a sequence classifier: adapters are made of language models' deltas"
        )
    _check_base(repository)
    if not 1 <= rank <= _LARGEST_RANK:
        raise ValueError(f"rank: a LoRA rank must be from 1 to {_LARGEST_RANK}, got {rank}")
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ValueError(f"parts must be of {', '.join(PARTS)}, got {unknown[0]!r}")
    budget, device, progress = byte_budget(max_bytes), usable_device(str(device)), progress or Progress(False)
    skeleton = meta_model(repository.text_config)
    places = places_of(repository, skeleton, parts)
    if not places:
        changed = sum(map(repository.is_changed, repository.names()))
        raise ValueError(
            f"'{repository.source}' changes nothing in {', '.join(sorted(parts))}, only {changed} other tensors: there "
            "is nothing to export"
        )
    rank = min(rank, max(place.most_components for place in places))  # more would be zeros
    modules = [name for name, _ in skeleton.named_modules()]
    ranks = [rank] * len(places)
    _check_adapter(skeleton, _adapter_config(repository, modules, places, ranks), places)
    text = None
    if validation is not None:
        text = Validation(repository, validation, samples, length, batch_size, device)
    with new_folder(output_dir) as folder:
        factors: Factors = Decomposed(repository)
        if budget is not None:
            factors = SpooledFactors(folder / ".factors")
            ranks = factors.ranks(repository, places, rank, budget, device, progress)
            places = as_nested([place for place, rank in zip(places, ranks, strict=True) if rank])
            ranks = [rank for rank in ranks if rank]
        config = _adapter_config(repository, modules, places, ranks)
        report = LoraReport(max(ranks))
        made = [
            entry
            for place, rank in zip(places, ranks, strict=True)
            for entry in _entries(repository, place, rank, factors, device, report)
        ]
        made.sort(key=lambda entry: -_WIDTHS[entry.dtype])  # wide ones first, so that all are aligned
        report.adapter_bytes = sum(entry.size for entry in made)
        with progress.bar(len(made), "Decomposing" if budget is None else "Writing") as bar:
            write_safetensors(folder / ADAPTER_FILE, [_tracked(entry, bar) for entry in made], {"format": "pt"})
        factors.close()
        config.save_pretrained(folder)
        _note_left_out(repository, places, device, report)
        if text is not None:
            report.validation = text.measure(folder)
        (folder / "README.md").write_text(adapter_card(repository, report), "utf-8")
    return report


def _check_base(repository: DeltaRepository) -> None:
    """Check that the base with other weights would be the fine-tune.

    Raises:
        ValueError: if not.
    """
    base = model_config(repository.base.checkpoint.config)
    if differing := list(differing_fields(base, repository.text_config, VOCABULARY_FIELDS)):
        raise ValueError(
            f"'{repository.source}' differs from its base in more than weights, which an adapter cannot hold: its "
            f"config.json has other {', '.join(differing[:5])}"
        )
    if repository.text_config.tie_word_embeddings and not base.tie_word_embeddings:
        raise ValueError(
            f"'{repository.source}' ties its output projection to the embeddings, and its base does not: an adapter "
            "cannot hold that"
        )


def _check_adapter(skeleton: PreTrainedModel, config: Any, places: Sequence[Place]) -> None:
    """Check that PEFT accepts the adapter, which it does not for some layers of some models, and names it as we do.

    Args:
        skeleton: gets the adapter's layers.

    Raises:
        ValueError: if it does not.
    """
    from peft import get_peft_model, get_peft_model_state_dict

    trial = copy.copy(config)  # a copy, because PEFT writes the model's name into it
    trial.base_model_name_or_path = None
    try:
        # Without weights the adapter stays on the meta device.
        model = get_peft_model(skeleton, trial, low_cpu_mem_usage=True)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"PEFT does not support such an adapter for this model: {error}") from error
    expected = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    if differing := sorted(expected ^ {name for place in places for name in place.entry_shapes(1)}):
        raise ValueError(f"this version of PEFT names an adapter's tensors otherwise: {differing[0]}")


def _adapter_config(
    repository: DeltaRepository, modules: Sequence[str], places: Sequence[Place], ranks: Sequence[int]
) -> Any:
    """Return PEFT's configuration of the adapter.

    Args:
        modules: the names of all modules of the model.
        places, ranks: the matrices in the adapter, and the rank of each.
    """
    try:
        from peft import LoraConfig
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("exporting an adapter needs PEFT: pip install 'impart-hf[lora]'") from error
    stacks = [name for place in places if place.part == "experts" for name in place.targets]
    layers = [name for place in places if place.part != "experts" for name in place.targets]
    kinds = {name.rpartition(".")[2] for name in layers}
    # If every layer of these kinds changed, the kinds are listed, which is short and what engines expect.
    same_kind = [name for name in modules if name.rpartition(".")[2] in kinds]
    by_target = {name: rank for place, rank in zip(places, ranks, strict=True) for name in place.targets}
    pattern = by_target if len(set(ranks)) > 1 else {}
    rank = max(ranks)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=sorted(kinds) if len(same_kind) == len(layers) else layers,
        target_parameters=stacks or None,
        ensure_weight_tying=any(len(place.layers) > 1 for place in places),
        fan_in_fan_out=any(place.transposed for place in places if place.part != "experts"),
        base_model_name_or_path=repository.config.base_model_name_or_path,
        revision=repository.config.base_model_revision,
        inference_mode=True,
    )


def _entries(
    repository: DeltaRepository,
    place: Place,
    rank: int,
    factors: Factors,
    device: torch.device,
    report: LoraReport,
) -> Iterator[Entry]:
    """Yield the entries of one matrix's factors, which are computed when the first is written."""
    dtype = place.dtype(repository)
    made: dict[str, Tensor] = {}

    def data(name: str) -> bytes:
        if not made:
            delta = place.delta(repository, device)
            a, b = (factor.to(dtype) for factor in factors.of(place, delta, rank))
            made.update(place.entries(a, b))
            norm = float(delta.norm())
            lost = float((delta - b.float() @ a.float()).norm())
            report.matrices.append(LoraMatrix(place.name, rank, norm, lost / norm if norm else 0.0))
        return tensor_bytes(made.pop(name).contiguous()).tobytes()

    for name, shape in place.entry_shapes(rank).items():
        yield Entry(name, DTYPE_NAMES[dtype], shape, math.prod(shape) * dtype.itemsize, partial(data, name))


def _tracked(entry: Entry, bar: Bar) -> Entry:
    """Return the entry; the bar advances when its data is written."""

    def data() -> bytes:
        bar.show(entry.name)
        written = entry.data()
        bar.update()
        return written

    return replace(entry, data=data)


def _note_left_out(
    repository: DeltaRepository, places: Sequence[Place], device: torch.device, report: LoraReport
) -> None:
    inside = {member.name for place in places for member in place.group.members}
    for name in filter(repository.is_changed, repository.names()):
        rows = repository.parts[name].added_rows
        squares = float(repository.file.read_finite(rows).float().square().sum()) if rows else 0.0
        if name not in inside:
            squares += float(tensor_delta(repository, name, device).square().sum())
        if name not in inside or rows:
            report.left_out[name] = squares**0.5
