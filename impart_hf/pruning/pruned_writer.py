"""Writing a pruned checkpoint: weights tensor by tensor, a config.json with the history of pruning, and a card."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.files import write_json
from ..common.progress import Progress
from ..modeling.checkpoints import Checkpoint
from ..modeling.configuration_pruned import is_pruned_type, pruned_config_class
from ..modeling.model_files import fetch_file
from ..modeling.pruned_card import pruned_model_card
from ..repository.cards import inherited_card_data
from ..repository.reader_files import with_pruned_reader
from ..repository.sidecar_files import copy_sidecar_files
from ..repository.tokenizer_class import keep_tokenizer_class
from ..storage.checkpoint_writer import DenseTensor, new_folder, write_weights
from .decoder_shape import DecoderShape
from .history import with_step

# Lists in config.json that may have as many entries as there are layers, by chance.
_NOT_BY_LAYER = frozenset({"architectures", "eos_token_id", "layer_types"})


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
    before: DecoderShape,
    after: DecoderShape,
    kept: Sequence[int],
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
        kept: the numbers of the layers that stay, as they were before the step.
        step: the step, for the history in config.json.
        tensors: all tensors of the new checkpoint.
        base_name: Hub id to record for a model that was given as a folder.
        max_shard_size: a weight file larger than this is split.
        notes: for the report.

    Raises:
        OutputError: if the folder is not free or the disk is too small.
        ValueError: if `max_shard_size` is not a size, or layers are dropped from a model whose config.json has a list
            by layer that is not known.
    """
    config = _pruned_config(checkpoint, before, after, kept, with_step(checkpoint, before, step, base_name))
    with new_folder(output) as folder:
        write_weights(folder, tensors, max_shard_size, progress, "Writing")
        copy_sidecar_files(checkpoint.source, checkpoint.options, folder)
        write_json(folder / "config.json", with_pruned_reader(config, folder))
        keep_tokenizer_class(checkpoint.source, checkpoint.options, folder)
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
    checkpoint: Checkpoint, before: DecoderShape, after: DecoderShape, kept: Sequence[int], history: dict[str, Any]
) -> dict[str, Any]:
    """Return the new config.json; a plain model stays one if no width changed."""
    config = (
        checkpoint.config if len(kept) == len(before.layers) else _with_layers(checkpoint, len(before.layers), kept)
    )
    if is_pruned_type(config["model_type"]) or set(after.layers) != set(before.layers):
        family = pruned_config_class(after.family)
        assert family is not None
        widths = [dataclasses.asdict(layer) for layer in after.layers]
        # The configuration with every layer as it was before any width was pruned: per_layer_config differs from it.
        usual = {k: v for k, v in config.items() if k not in ("model_type", "per_layer_config")}
        pruned = family.with_widths(
            family.from_dict(usual), **{name: [width[name] for width in widths] for name in widths[0]}
        )
        config = json.loads(pruned.to_json_string())
    config = {**config, "pruning": history}
    assert DecoderShape.of(config) == after
    return config


def _with_layers(checkpoint: Checkpoint, count: int, kept: Sequence[int]) -> dict[str, Any]:
    """Return config.json with these of a model's layers, in this order; its `per_layer_config` is left as it is.

    Raises:
        ValueError: if it has a list with an entry for each layer that is not known.
    """
    config = dict(checkpoint.config)
    family = pruned_config_class(config["model_type"])
    assert family is not None
    # Also where config.json leaves it out: then transformers derives it from the layers' numbers, which change.
    parsed = family.from_dict({k: v for k, v in config.items() if k != "model_type"})
    layer_types = getattr(parsed, "layer_types", None)
    if layer_types is not None:
        config["layer_types"] = [layer_types[number] for number in kept]
    if isinstance(first := config.get("max_window_layers"), int):  # the first layer with a sliding window
        config["max_window_layers"] = sum(number < first for number in kept)
    for name in ("sliding_window_pattern", "_sliding_window_pattern"):  # layer_types takes precedence
        config.pop(name, None)
    for name, value in config.items():
        if isinstance(value, list) and len(value) == count and name not in _NOT_BY_LAYER:
            raise ValueError(
                f"'{checkpoint.source}': {name} in config.json, of {count} entries, may have one for each layer, and "
                "impart-hf does not know it: layers cannot be dropped"
            )
    return {**config, "num_hidden_layers": len(kept)}
