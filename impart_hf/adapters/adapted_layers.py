"""The layers of a model that an adapter changes, merged by PEFT one at a time."""

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling.model_files import CheckpointError
from .adapter_files import PREFIX, AdapterFiles

BaseParameter = Callable[[str], torch.Tensor]
_ADAPTER = "default"
# What PEFT's wrappers put into the names of the parameters that they wrap.
_WRAPPED = ("base_layer", "original_module", "modules_to_save", "token_adapter")


class AdaptedLayers:
    """A model's layers with an adapter, by PEFT itself: only the adapter's own weights are in memory.

    PEFT's model is made of parameters that share one zero. A layer gets its base's values when it is merged, and gives
    them back.

    Attributes:
        given: names of the parameters whose values are the adapter's alone: the base's are not needed.
        changed: names of the parameters that the adapter changes or gives.
    """

    def __init__(
        self,
        adapter: AdapterFiles,
        weights: Mapping[str, torch.Tensor],
        model: PreTrainedModel,
        dtypes: Mapping[str, torch.dtype],
        tied: Mapping[str, str],
    ):
        """Put the adapter on a model.

        Args:
            adapter: the adapter's files.
            weights: its weights.
            model: the model on the meta device; it becomes PEFT's.
            dtypes: of the parameters, by name; the model's own for others.
            tied: the parameters that are another one in the base, with that other one.

        Raises:
            CheckpointError: if the adapter does not fit the model; the message says why.
        """
        self._adapter, self._tied, self._lock = adapter, tied, threading.Lock()
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        _share_one_zero(model, dtypes)
        with self._errors(), _quiet():
            self._model = _peft_model(adapter, model)
        state = dict(weights)
        self._wrappers = dict(self._find_wrappers())
        self._owners = {name: path for path, (_, names) in self._wrappers.items() for name in names}
        self._stored = {name: state.pop(key) for key, name in self._stored_whole(state)}
        with self._errors(), _quiet():
            self._load(state)
        saved = {name for name, path in self._owners.items() if self._is_saved_whole(path)}
        self.given = saved | self._stored.keys()
        self.changed = self.given | self._owners.keys()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"the adapter '{self._adapter.source}' cannot be merged: {reason:.400}") from error

    def _find_wrappers(self) -> Iterator[tuple[str, tuple[Any, list[str]]]]:
        """Yield every outermost module of PEFT, with the names of the model's parameters in it."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        last = None
        for path, module in self._model.get_base_model().named_modules():
            if last is not None and path.startswith(f"{last}."):
                continue
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                last = path
                names = [f"{path}.{name}" for name in _parameters_in(module)]
                yield path, (module, names)

    def _stored_whole(self, state: Mapping[str, torch.Tensor]) -> list[tuple[str, str]]:
        """Return the names in the adapter's file of the base's parameters that it stores, with their own names.

        PEFT stores embeddings that were resized, and biases that were trained, under the base's names.
        """
        found = []
        for key in state:
            name = plain_name(key)
            is_its_own = name == key.removeprefix(PREFIX) and self._is_saved_whole(self._owners.get(name))
            if name in self.shapes and not is_its_own:
                found.append((key, name))
        return found

    def _is_saved_whole(self, path: str | None) -> bool:
        return path is not None and hasattr(self._wrappers[path][0], "modules_to_save")

    def _load(self, state: dict[str, torch.Tensor]) -> None:
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
        from peft.utils.save_and_load import set_peft_model_state_dict

        result: Any = set_peft_model_state_dict(self._model, state, _ADAPTER)
        if result.unexpected_keys:
            raise ValueError(f"it has {result.unexpected_keys[0]}, for which the model has no place")
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING[self._model.peft_config[_ADAPTER].peft_type]
        if own := [key for key in result.missing_keys if prefix in key and f".{_ADAPTER}" in key]:
            raise ValueError(f"it lacks {own[0]}, which its adapter_config.json asks for")

    def parameter(self, name: str, base: BaseParameter) -> torch.Tensor:
        """Return one of the model's parameters, merged.

        Args:
            name: its name in the model.
            base: returns the base's parameter of a name.

        Raises:
            CheckpointError: if PEFT cannot merge the layer.
        """

        def value(name: str) -> torch.Tensor:
            stored = name if name in self._stored else self._tied.get(name)
            return self._stored[stored] if stored in self._stored else base(name)

        path = self._owners.get(name)
        if path is None:
            return value(name)
        wrapper, names = self._wrappers[path]
        own = name.removeprefix(f"{path}.")
        if self._is_saved_whole(path):
            return wrapper.modules_to_save[_ADAPTER].get_parameter(own).detach()
        with self._lock, self._errors(), _quiet(), torch.no_grad():
            layers = _tuner_layers(wrapper)
            if hasattr(wrapper, "parameter_name"):  # one wrapper a parameter, each in the other
                layers, names = [layer for layer in layers if layer.parameter_name == own], [name]
            inner = layers[0].get_base_layer()
            placeholders = {n: inner.get_parameter(n.removeprefix(f"{path}.")) for n in names}
            try:
                for n, zero in placeholders.items():
                    _set(inner, n.removeprefix(f"{path}."), value(n).to(zero.dtype, copy=True))
                for layer in layers:
                    layer.merge(adapter_names=[_ADAPTER])
                return inner.get_parameter(own).detach()
            finally:
                for n, zero in placeholders.items():
                    _set(inner, n.removeprefix(f"{path}."), zero)
                for layer in layers:
                    layer.merged_adapters.clear()


def plain_name(key: str) -> str:
    """Return a name in an adapter's file without what PEFT's wrappers put into it."""
    return ".".join(part for part in key.removeprefix(PREFIX).split(".") if part not in _WRAPPED)


def _share_one_zero(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Replace a model's parameters on the meta device by ones on the CPU that take no memory.

    PEFT makes an adapter's weights where the layer's weights are, and in their dtype.
    """
    shared: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in shared:
            zero = torch.zeros((), dtype=dtypes.get(name, parameter.dtype)).expand(parameter.shape)
            shared[id(parameter)] = nn.Parameter(zero, requires_grad=False)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, shared[id(parameter)])


def _peft_model(adapter: AdapterFiles, model: PreTrainedModel) -> Any:
    """Return PEFT's model with a new adapter of this kind."""
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(adapter.folder))
    with torch.random.fork_rng(devices=[]):  # the new adapter's weights are random, and replaced later
        return PeftModel(model, config, _ADAPTER)


def _tuner_layers(wrapper: Any) -> list[Any]:
    """Return the layers of PEFT that lie around one of the model's layers, the outermost first."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [getattr(wrapper, "token_adapter", wrapper)]
    while isinstance(inner := layers[-1].base_layer, BaseTunerLayer):
        layers.append(inner)
    return layers


def _parameters_in(wrapper: Any) -> list[str]:
    """Return the names that a wrapped layer's changed parameters have in the layer."""
    if hasattr(wrapper, "modules_to_save"):
        return [name for name, _ in wrapper.original_module.named_parameters()]
    layers = _tuner_layers(wrapper)
    if hasattr(wrapper, "parameter_name"):
        return [layer.parameter_name for layer in layers]
    return [name for name, _ in layers[0].get_base_layer().named_parameters()]


def _set(module: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out PEFT's warnings about how a model is used, which do not apply: what matters is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
