"""Writing a pruned checkpoint: weights tensor by tensor, a config.json with the history of pruning, and a card."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.files import write_json
from ..common.progress import Progress
from ..modeling.checkpoints import Checkpoint
from ..modeling.configuration_pruned import PrunedLlamaConfig
from ..modeling.model_files import fetch_file
from ..modeling.pruned_card import pruned_model_card
from ..repository.cards import inherited_card_data
from ..repository.reader_files import with_pruned_reader
from ..repository.sidecar_files import copy_sidecar_files
from ..storage.checkpoint_writer import DenseTensor, new_folder, write_weights
from .history import with_step
from .llama_shape import LlamaShape


@dataclass
class PruningReport:
    """The result of one pruning step.

    Attributes:
        step: the step as config.json records it (see docs/pruning.md).
        parameters_before, parameters_after: parameters of the whole model.
        decoder_before, decoder_after: parameters of its decoder layers; a ratio is a share of these.
        notes: further remarks for the user.
    """

    step: dict[str, Any]
    parameters_before: int
    parameters_after: int
    decoder_before: int
    decoder_after: int
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return dataclasses.asdict(self)


def write_pruned(
    output: str | Path,
    checkpoint: Checkpoint,
    before: LlamaShape,
    after: LlamaShape,
    step: Mapping[str, Any],
    tensors: Iterable[DenseTensor],
    *,
    base_name: str | None,
    max_shard_size: int | str,
    progress: Progress,
    notes: list[str],
) -> PruningReport:
    """Write the checkpoint that results from one pruning step, completely or not at all.

    Args:
        output: folder to make; must not exist, or be empty.
        checkpoint: the model before the step.
        before, after: its shape before and after the step.
        step: the step, for the history in config.json.
        tensors: all tensors of the new checkpoint.
        base_name: Hub id to record for a model that was given as a folder.
        max_shard_size: a weight file larger than this is split.
        notes: for the report.

    Raises:
        OutputError: if the folder is not free or the disk is too small.
        ValueError: if `max_shard_size` is not a size.
    """
    config = _pruned_config(checkpoint, before, after, with_step(checkpoint, before, step, base_name))
    with new_folder(output) as folder:
        write_weights(folder, tensors, max_shard_size, progress, "Writing")
        copy_sidecar_files(checkpoint.source, checkpoint.options, folder)
        write_json(folder / "config.json", with_pruned_reader(config, folder))
        metadata = inherited_card_data(fetch_file(checkpoint.source, "README.md", checkpoint.options))
        card = pruned_model_card(config, Path(os.path.abspath(output)).name, after.parameters, metadata)
        (folder / "README.md").write_text(card, "utf-8")
    return PruningReport(
        step=dict(step),
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        decoder_before=before.decoder_parameters,
        decoder_after=after.decoder_parameters,
        notes=notes,
    )


def _pruned_config(
    checkpoint: Checkpoint, before: LlamaShape, after: LlamaShape, history: dict[str, Any]
) -> dict[str, Any]:
    """Return the new config.json; a plain LLaMA stays one if no width changed."""
    config = {**checkpoint.config, "num_hidden_layers": len(after.layers)}
    if config["model_type"] == "pruned_llama" or set(after.layers) != set(before.layers):
        widths = [dataclasses.asdict(layer) for layer in after.layers]
        # The configuration with every layer as it was before any width was pruned: per_layer_config differs from it.
        usual = {k: v for k, v in config.items() if k not in ("model_type", "per_layer_config")}
        pruned = PrunedLlamaConfig.with_widths(
            PrunedLlamaConfig.from_dict(usual), **{name: [width[name] for width in widths] for name in widths[0]}
        )
        config = json.loads(pruned.to_json_string())
    config["pruning"] = history
    assert LlamaShape.of(config) == after
    return config
