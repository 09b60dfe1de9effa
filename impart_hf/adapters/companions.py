"""Where a model's sidecar files come from: its own folder, or for an adapter in part its base's."""

from dataclasses import dataclass
from pathlib import Path

from ..modeling.delta_chain import BaseModel
from ..modeling.model_files import HubOptions, fetch_file
from ..modeling.repository_files import is_tokenizer_file
from ..repository.sidecar_files import copy_files, sidecar_files
from ..repository.tokenizer_class import keep_tokenizer_class
from .adapted_model import AdaptedModel

_OF_AN_ADAPTER = ("adapter_",)


@dataclass(frozen=True)
class Companions:
    """The sidecar files of a model.

    Attributes:
        source, options: the folder or Hub id that the tokenizer is from, and how to read it.
        files: the sidecar files, by their names in the model's repository.
    """

    source: str
    options: HubOptions
    files: dict[str, Path]

    def copy_to(self, folder: Path) -> None:
        """Copy the files to a folder that has its own config.json, with the tokenizer's class kept."""
        copy_files(self.files, folder)
        keep_tokenizer_class(self.source, self.options, folder)


def companions_of(model: BaseModel | AdaptedModel) -> Companions:
    """Return a model's sidecar files; an adapter's own, and its base's for what the adapter lacks."""
    files = sidecar_files(model.source, model.options)
    if not isinstance(model, AdaptedModel):
        return Companions(model.source, model.options, files)
    base = companions_of(model.base)
    own = {name: path for name, path in files.items() if not name.startswith(_OF_AN_ADAPTER)}
    if fetch_file(model.source, "tokenizer_config.json", model.options) is None:
        return Companions(base.source, base.options, base.files | own)
    # An adapter with a tokenizer of its own takes none of the base's files for it.
    inherited = {name: path for name, path in base.files.items() if not is_tokenizer_file(name)}
    return Companions(model.source, model.options, inherited | own)
