"""A base and an adapter on it as one model, whose tensors are merged one at a time."""

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from ..common.checkpoint_layout import CheckpointLayout, TensorGroup
from ..common.configs import model_config, untied
from ..common.meta_model import meta_model
from ..modeling.checkpoints import TIED_OUTPUT
from ..modeling.delta_chain import BaseModel
from ..modeling.model_files import CheckpointError
from .adapted_layers import AdaptedLayers
from .adapter_files import AdapterFiles, adapter_weights
from .vocabulary import added_vocabulary, with_vocabulary


class AdaptedModel:
    """The tensors of a base with an adapter merged into it, by the base's names; has `Checkpoint`'s interface.

    Each tensor is what PEFT's `merge_and_unload` of the whole model gives, in the base's dtype, with one exception: an
    output projection that is tied to the embeddings gets a tensor of its own if the adapter changes only one of the two
    or both in different ways. PEFT's merge would change both, as the adapter before merging does not.

    Attributes:
        source, options: where the adapter is from, and how to read it.
        base: the base.
        config: the base's config.json, with the adapter's vocabulary.
        folder: the folder that holds the adapter's files.
        tied: whether the output projection shares the input embeddings.
        weight_bytes: size of all tensors, in bytes.
    """

    def __init__(self, base: BaseModel, adapter: AdapterFiles):
        """Put an adapter on a base; the adapter is read, and of the base headers.

        Args:
            base: the base, as it is opened without `tied`.
            adapter: the adapter's files.

        Raises:
            CheckpointError: if the adapter cannot be merged into this base; the message says why.
            ModuleNotFoundError: if PEFT is not installed.
        """
        self.base, self.source, self.options, self.folder = base, adapter.source, adapter.options, adapter.folder
        self._lock = threading.Lock()
        self._last: tuple[str, Mapping[str, torch.Tensor]] | None = None
        weights = adapter_weights(adapter)
        self.config = with_vocabulary(base.config, added_vocabulary(weights, self._model(base.config), self.source))
        self._layout = CheckpointLayout(base, self._model(self.config))
        model = self._model(self.config)
        self._groups = {name: group for group in self._layout.groups.values() for name in group.parameters}
        dtypes = {name: group.parameters[name].dtype for name, group in self._groups.items()}
        usual = Counter(dtypes.values()).most_common(1)[0][0]
        self._dtypes = {name: dtypes.get(name, usual) for name, _ in model.named_parameters(remove_duplicate=False)}
        for name, other in self._layout.tied.items():
            self._dtypes[name] = dtypes.get(name, dtypes.get(other, usual))
        self._layers = AdaptedLayers(adapter, weights, model, self._dtypes, self._layout.tied)
        self._check_places()
        self.tied, self._head = base.tied, ""
        if base.tied:
            self._untie_if_changed()
        self._names = sorted({*base.names(), *([TIED_OUTPUT] if self._head else [])})
        sizes = ((torch.Size(self.shape(name)).numel(), self.dtype(name)) for name in self._names)
        self.weight_bytes = sum(count * dtype.itemsize for count, dtype in sizes)

    def _model(self, config: Mapping[str, Any]) -> PreTrainedModel:
        """Return the model of a config.json on the meta device."""
        model_type = str(config.get("model_type"))
        if model_type not in CONFIG_MAPPING:
            raise CheckpointError(f"transformers does not know the model type '{model_type}' of '{self.base.source}'")
        try:
            return meta_model(model_config(config))
        except ValueError as error:
            raise CheckpointError(f"'{self.base.source}' is no causal language model: {error}") from error

    def _check_places(self) -> None:
        """Check that the base has a value for every parameter that the adapter changes, of the right shape."""
        for name, wanted in self._layers.shapes.items():
            if name in self._layers.given or self._layout.tied.get(name) in self._groups:
                continue
            group = self._groups.get(name)
            if group is None and name in self._layers.changed:
                raise CheckpointError(f"the adapter '{self.source}' changes {name}, which '{self.base.source}' lacks")
            if group is not None and tuple(group.parameters[name].shape) != wanted:
                raise CheckpointError(
                    f"the adapter '{self.source}' is for a {name} of shape {list(wanted)}, and '{self.base.source}' "
                    f"has {list(group.parameters[name].shape)}: it is for another base, or lacks rows of added tokens"
                )

    def _untie_if_changed(self) -> None:
        """Give the output projection a tensor of its own if the adapter, or the base, makes it differ."""
        for head, embedding in self._layout.tied.items():
            if not {head, embedding} & self._layers.changed and not self._stores_head:
                continue
            if not torch.equal(self._parameter(head), self._parameter(embedding)):
                self.tied, self.config = False, untied(self.config)
                self._head = "" if head in self._groups else head

    @property
    def _stores_head(self) -> bool:
        """Whether a base that ties its output projection stores one nevertheless."""
        return TIED_OUTPUT in self.base.stored_names()

    def names(self) -> list[str]:
        """Return the tensors' names, sorted."""
        return list(self._names)

    def stored_names(self) -> list[str]:
        """Return the names of all tensors, as of a checkpoint that stores nothing beside them."""
        return self.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading weights."""
        parameter = self._only_parameter(name)
        return self.base.shape(name) if parameter is None else self._layers.shapes[parameter]

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype without reading weights."""
        return self._dtypes[self._head] if self._is_new(name) else self.base.dtype(name)

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the merged tensor on a device.

        Raises:
            CheckpointError: if a file cannot be read, or PEFT cannot merge the layer.
        """
        if self._is_new(name):
            return self._parameter(self._head).to(device)
        group = self._layout.group(name)
        if group is None or not group.parameters.keys() & self._layers.changed:
            return self.base.tensor(name, device)
        return self._merged(group)[name].to(self.dtype(name)).to(device)

    def _merged(self, group: TensorGroup) -> Mapping[str, torch.Tensor]:
        """Return all tensors of a group, of which the last one is kept: experts are asked for one by one."""
        if len(group.members) == 1:
            return group.to_tensors({name: self._parameter(name) for name in group.parameters})
        with self._lock:
            if self._last is None or self._last[0] != group.key:
                self._last = None  # freed before the next is made
                merged = {name: self._parameter(name) for name in group.parameters}
                self._last = group.key, group.to_tensors(merged)
            return self._last[1]

    def _parameter(self, name: str) -> torch.Tensor:
        """Return one of the model's parameters, merged, in the base's dtype."""
        return self._layers.parameter(name, self._base_parameter).to(self._dtypes[name])

    def _base_parameter(self, name: str) -> torch.Tensor:
        if name not in self._groups and self.base.tied and self._stores_head:
            return self.base.tensor(TIED_OUTPUT)
        group = self._groups.get(name) or self._groups[self._layout.tied[name]]
        tensors = {member.name: self.base.tensor(member.name) for member in group.members}
        made = group.to_parameters(tensors)
        return made[name] if name in made else made[self._layout.tied[name]]

    def _is_new(self, name: str) -> bool:
        return bool(self._head) and name == TIED_OUTPUT

    def _only_parameter(self, name: str) -> str | None:
        """Return the parameter that a tensor is, if the adapter changes it and it is stored as it is."""
        if self._is_new(name):
            return self._head
        group = self._layout.group(name)
        return group.key if group and group.converter is None and group.key in self._layers.changed else None
