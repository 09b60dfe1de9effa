"""Where a model's tokenizer and other small files come from: its own folder, or for an adapter in part its base's."""

from dataclasses import dataclass
from pathlib import Path

from ..modeling.checkpoints import Checkpoint, HubOptions, fetch_file
from ..repository.sidecar_files import sidecar_files
from .adapted_model import AdaptedModel

# What an adapter with a tokenizer of its own still takes from its base; any other file may belong to the tokenizer.
_OF_THE_BASE = ("generation_config.json", "LICENSE", "LICENSE.txt", "NOTICE")
_OF_AN_ADAPTER = ("adapter_",)


@dataclass(frozen=True)
class Companions:
    """The small files of a model.

    Attributes:
        source, options: the folder or Hub id that the tokenizer is from, and how to read it.
        files: paths of tokenizer, chat templates, generation config and the like.
    """

    source: str
    options: HubOptions
    files: tuple[Path, ...]


def companions_of(model: Checkpoint | AdaptedModel) -> Companions:
    """Return a model's companions; an adapter's own, and its base's for what the adapter lacks."""
    files = tuple(sidecar_files(model.source, model.options))
    if isinstance(model, Checkpoint):
        return Companions(model.source, model.options, files)
    base = companions_of(model.base)
    own = {path.name: path for path in files if not path.name.startswith(_OF_AN_ADAPTER)}
    if fetch_file(model.source, "tokenizer_config.json", model.options) is None:
        return Companions(base.source, base.options, tuple(({path.name: path for path in base.files} | own).values()))
    inherited = {path.name: path for path in base.files if path.name in _OF_THE_BASE}
    return Companions(model.source, model.options, tuple((inherited | own).values()))
