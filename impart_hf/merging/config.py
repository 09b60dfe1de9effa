"""The configuration of a merge: `MergeConfig`, and mergekit's YAML format."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..common.model_names import split_adapter
from .chat_template import check_chat_template
from .mergekit_file import plain_form
from .parameters import Parameter

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MergeMethod:
    """A way to merge.

    Attributes:
        sparsifier: the method that drops entries of each delta first: "dare", "impart" or None.
        consensus: whether signs are elected (TIES), or deltas are just summed (task arithmetic).
        normalize: default of the parameter `normalize`: whether the sum is divided by the sum of the weights.
    """

    sparsifier: str | None
    consensus: bool
    normalize: bool = False


# Names and defaults are mergekit's. The two ImPart methods have the defaults of the corresponding DARE methods.
MERGE_METHODS = {
    "task_arithmetic": MergeMethod(None, False),
    "ties": MergeMethod(None, True, normalize=True),
    "dare_linear": MergeMethod("dare", False),
    "dare_ties": MergeMethod("dare", True),
    "impart_linear": MergeMethod("impart", False),
    "impart_ties": MergeMethod("impart", True),
}


def _is_seed(number: float) -> bool:
    return 0 <= number < 1 << 32 and number == int(number)


_MODEL_PARAMETERS = {
    p.name: p
    for p in (
        Parameter("weight", float, 1.0),
        Parameter("density", float, 1.0, lambda share: 0 < share <= 1, "lie in (0, 1]"),
        Parameter("trim_density", float, 1.0, lambda share: 0 < share <= 1, "lie in (0, 1]"),
        Parameter("beta", float, 0.6, lambda share: 0 <= share < 1, "lie in [0, 1)"),
        Parameter("c", float, 1.0, lambda exponent: 0 < exponent < math.inf, "be above 0"),
    )
}
_SHARED_PARAMETERS = {
    p.name: p
    for p in (
        Parameter("lambda", float, 1.0),
        Parameter("normalize", bool, None),
        Parameter("rescale", bool, None),
        Parameter("int8_mask", bool, False),
        Parameter("seed", int, 0, _is_seed, "be a whole number from 0 to 2**32 - 1", varies=False),
    )
}
_ALL_PARAMETERS = {**_SHARED_PARAMETERS, **_MODEL_PARAMETERS}
# mergekit ignores shared parameters given for one model, and its files must work unchanged. It has no seed.
_PARAMETERS_OF_MODELS = {name: parameter for name, parameter in _ALL_PARAMETERS.items() if name != "seed"}
_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class MergeModel:
    """One model of a merge.

    Attributes:
        model: folder or Hub id, `ID@REVISION` for a revision; a dense fine-tune, an adapter in PEFT's format on the
            base, or a delta repository. `MODEL+ADAPTER` is an adapter on a dense fine-tune.
        parameters: the model's own parameters, which take precedence over the shared ones.
    """

    model: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", _plain(self.parameters))


@dataclass(frozen=True)
class MergeConfig:
    """The models of a merge and how to merge them.

    Attributes:
        merge_method: a name in `MERGE_METHODS`.
        base_model: folder or Hub id, `ID@REVISION` for a revision.
        models: the fine-tunes, each a `MergeModel`, or just its name. The base may be listed too; it has no effect.
        parameters: parameters for all models and tensors; see docs/merging.md. Each may be a number, a list of numbers
            over the layers, or a list of filters with values (`parameters.py`).
        dtype: of the result's weights, "float16", "bfloat16" or "float32"; the base's own if None.
        tokenizer_source: the model whose tokenizer and vocabulary the result has: "base", "union" for the model with
            the most tokens, or one of the models.
        chat_template: of the result: a Jinja template; "auto" for the one that most of the models have; or the name of
            one of mergekit's. None for that of the tokenizer.
        layers: number of decoder layers that the file is written for, which the base must have; None if it says none.
    """

    merge_method: str
    base_model: str
    models: tuple[MergeModel, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    tokenizer_source: str = "union"
    chat_template: str | None = None
    layers: int | None = None

    def __post_init__(self) -> None:
        """Check everything that can be checked without reading the models.

        Raises:
            ValueError: if a field is wrong; the message names it.
        """
        object.__setattr__(self, "parameters", _plain(self.parameters))
        object.__setattr__(self, "models", tuple(_model(entry) for entry in self.models))
        if not isinstance(self.merge_method, str) or self.merge_method not in MERGE_METHODS:
            raise ValueError(f"unknown merge_method {self.merge_method!r}; choose one of {', '.join(MERGE_METHODS)}")
        for name in ("base_model", "tokenizer_source"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name} must be a folder or a Hub id, got {getattr(self, name)!r}")
        if split_adapter(self.base_model)[1]:
            raise ValueError(
                f"base_model '{self.base_model}' is a model with an adapter, which only a fine-tune may be: merge it "
                "into the model with PEFT's merge_and_unload, save that, and give it instead"
            )
        names = [model.model for model in self.models]
        places = [_place(name) for name in names]
        if not self.finetunes:
            raise ValueError("models: only the base itself is listed; add a fine-tune")
        if twice := [name for name, place in zip(names, places, strict=True) if places.count(place) > 1]:
            raise ValueError(f"models: '{twice[-1]}' is listed twice")
        if self.tokenizer_source not in ("base", "union", *names):
            same = {_place(self.base_model): "base", **dict(zip(places, names, strict=True))}
            object.__setattr__(self, "tokenizer_source", same.get(_place(self.tokenizer_source), self.tokenizer_source))
        if self.tokenizer_source not in ("base", "union", *names):
            raise ValueError(
                f"tokenizer_source must be base, union or one of the models, got '{self.tokenizer_source}'"
            )
        if self.dtype is not None and str(self.dtype) not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if self.chat_template is not None:
            check_chat_template(self.chat_template)
        self._check_parameters(self.parameters, _ALL_PARAMETERS, "parameters")
        for model in self.finetunes:
            self._check_parameters(model.parameters, _PARAMETERS_OF_MODELS, f"parameters of '{model.model}'")

    def _check_parameters(self, given: Any, known: dict[str, Parameter], where: str) -> None:
        if not isinstance(given, Mapping):
            raise ValueError(f"{where} must map names to values, got {given!r}")
        for name, setting in given.items():
            if name not in known:
                raise ValueError(f"{where}: unknown parameter {name!r}; choose one of {', '.join(known)}")
            known[name].check(setting, where)
            self._check_use(name, setting, where)

    def _check_use(self, name: str, setting: Any, where: str) -> None:
        """Check that a parameter that is given has an effect in this method."""
        method = self.method
        if name in ("beta", "c") and method.sparsifier != "impart":
            raise ValueError(
                f"{where}: {name} is a parameter of ImPart; {self.merge_method} has no use for it: leave it out"
            )
        if name == "trim_density" and not (method.consensus and method.sparsifier):
            raise ValueError(
                f"{where}: trim_density is for dare_ties and impart_ties, which trim after sparsifying; "
                f"{self.merge_method} has no use for it: leave it out"
            )
        if name == "rescale" and setting is not (method.sparsifier is not None) and method.sparsifier != "dare":
            raise ValueError(f"{where}: rescale cannot be {setting!r} for {self.merge_method}: leave it out")
        if name == "seed" and method.sparsifier is None:
            raise ValueError(
                f"{where}: seed is for random dropping of entries; {self.merge_method} has no use for it: leave it out"
            )

    @property
    def method(self) -> MergeMethod:
        return MERGE_METHODS[self.merge_method]

    @property
    def finetunes(self) -> tuple[MergeModel, ...]:
        """The models without the base."""
        return tuple(model for model in self.models if _place(model.model) != _place(self.base_model))

    @property
    def torch_dtype(self) -> torch.dtype | None:
        import torch

        return None if self.dtype is None else getattr(torch, self.dtype)

    def notes(self) -> list[str]:
        """Return notes for the user about the configuration."""
        scopes = [self.parameters, *(model.parameters for model in self.finetunes)]
        notes = []
        if self.merge_method == "task_arithmetic" and any("density" in scope for scope in scopes):
            notes.append(
                "density has no effect in task_arithmetic; to drop entries, choose dare_linear or impart_linear"
            )
        for model in self.finetunes:
            if shared := [name for name in model.parameters if name in _SHARED_PARAMETERS]:
                one = len(shared) == 1
                notes.append(
                    f"{', '.join(shared)} under '{model.model}' {'has' if one else 'have'} no effect: "
                    f"{'it applies' if one else 'they apply'} to all models; write {'it' if one else 'them'} under "
                    "the top-level `parameters`"
                )
        return notes

    def values(self, tensor: str, depth: float) -> dict[str, Any]:
        """Return the shared parameters for one tensor, by name.

        Args:
            tensor: name of the tensor.
            depth: position of its layer, from 0 for the first to 1 for the last.
        """
        values = {name: p.evaluate([self.parameters], tensor, depth) for name, p in _SHARED_PARAMETERS.items()}
        defaults = {"normalize": self.method.normalize, "rescale": self.method.sparsifier is not None}
        return {name: defaults[name] if value is None else value for name, value in values.items()}

    def model_values(self, model: MergeModel, tensor: str, depth: float) -> dict[str, float]:
        """Return one model's parameters for one tensor, by name."""
        scopes = [model.parameters, self.parameters]
        return {name: p.evaluate(scopes, tensor, depth) for name, p in _MODEL_PARAMETERS.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as its YAML file has it."""
        models = [
            {"model": m.model, **({"parameters": dict(m.parameters)} if m.parameters else {})} for m in self.models
        ]
        content: dict[str, Any] = {"merge_method": self.merge_method, "base_model": self.base_model, "models": models}
        if self.parameters:
            content["parameters"] = dict(self.parameters)
        if self.dtype is not None:
            content["dtype"] = self.dtype
        if self.tokenizer_source != "union":
            content["tokenizer_source"] = self.tokenizer_source
        if self.chat_template is not None:
            content["chat_template"] = self.chat_template
        return content

    @classmethod
    def from_dict(cls, content: Any) -> MergeConfig:
        """Create a configuration from the content of a YAML file.

        Raises:
            ValueError: if a key is unknown or missing, a value is wrong, or the file asks for what a merge cannot do.
        """
        plain = plain_form(content)
        if missing := [key for key in ("merge_method", "base_model", "models") if not plain.get(key)]:
            raise ValueError(f"the key {missing[0]} is missing or empty")
        return cls(**{**plain, "models": tuple(plain["models"])})

    @classmethod
    def of(cls, config: MergeConfig | dict[str, Any] | str | Path) -> MergeConfig:
        """Return the configuration that `merge` is given: a `MergeConfig`, a dictionary or the path of a YAML file."""
        if isinstance(config, MergeConfig):
            return config
        return cls.from_yaml(config) if isinstance(config, str | Path) else cls.from_dict(config)

    @classmethod
    def from_yaml(cls, path: str | Path) -> MergeConfig:
        """Read a YAML file.

        Raises:
            FileNotFoundError: if it does not exist.
            ValueError: if it is not valid YAML, and for the errors of `from_dict`; the message names the file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"'{path}' does not exist or is not a file")
        try:
            documents = list(yaml.safe_load_all(Path(path).read_text("utf-8")))
            if len(documents) > 1:
                raise ValueError(f"it holds {len(documents)} merges (mergekit-multi): give each a file of its own")
            return cls.from_dict(documents[0] if documents else None)
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _place(model: str) -> str:
    """Return one spelling of a model's name, because a folder may have several paths."""
    return os.path.realpath(model) if os.path.isdir(model) else model


def _plain(value: Any) -> Any:
    """Return settings as plain Python values; numbers may come from other libraries, such as numpy."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value.item() if hasattr(value, "item") else value


def _model(entry: Any) -> MergeModel:
    if isinstance(entry, MergeModel):
        return entry
    if isinstance(entry, str):
        entry = {"model": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("model"), str) or not entry["model"]:
        raise ValueError(f"models: each must be `model: …` (a folder or Hub id) with its parameters, got {entry!r}")
    if unknown := [key for key in entry if key not in ("model", "parameters")]:
        raise ValueError(f"models: unknown key {unknown[0]!r} of '{entry['model']}'; choose one of model, parameters")
    return MergeModel(entry["model"], entry.get("parameters") or {})
