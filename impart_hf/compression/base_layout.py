"""A fine-tune in the layout of its base's files: under the base's names, and experts as the base has them.

transformers reads both models, and says what their tensors are (`common/checkpoint_layout.py`). A delta refers to the
base as it is stored, so the fine-tune's tensors are presented in that form, one at a time.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING
from transformers.utils import logging

from ..common.checkpoint_layout import CheckpointLayout, TensorGroup, known_layout
from ..common.configs import model_config, untied
from ..common.meta_model import takes_images
from ..modeling.base_tensors import BaseTensors
from ..modeling.checkpoints import Checkpoint, same_values
from ..modeling.configuration_pruned import is_pruned_type
from ..modeling.delta_chain import BaseModel, DeltaBase
from ..modeling.model_files import CheckpointError, HubOptions
from ..modeling.modeling_delta_compressed import is_classifier
from ..modeling.tensors import Model, StoredModel
from .compatibility import IncompatibleModelsError, check_names, check_tensors, check_tied_output

logger = logging.get_logger(__name__)


class ReadModel:
    """A checkpoint as transformers reads it.

    Attributes:
        checkpoint: the checkpoint.
        layout: what its tensors become; None if transformers does not know its architecture.
    """

    def __init__(self, checkpoint: StoredModel):
        """Find out what the tensors are; no weights are read.

        Raises:
            IncompatibleModelsError: if its configuration describes no model.
        """
        self.checkpoint = checkpoint
        self.layout, self._content = _layout(checkpoint)

    @cached_property
    def has_own_output(self) -> bool:
        """Whether a tensor that is tied to another is stored with other values; transformers then loads it untied.

        Both matrices are read, if both are stored.
        """
        groups, tied = ({}, {}) if self.layout is None else (self.layout.groups, self.layout.tied)
        for target, source in tied.items():
            if target in groups and source in groups:
                one, other = (self.checkpoint.tensor(groups[n].members[0].name) for n in (target, source))
                if not same_values(one, other.to(one.dtype)):
                    return True
        return False

    @property
    def tied(self) -> Mapping[str, str]:
        """The parameters that share another one's values, with that other one."""
        return {} if self.layout is None or self.has_own_output else self.layout.tied

    @property
    def ties_output(self) -> bool:
        """Whether its output projection shares its embeddings."""
        return self.checkpoint.tied and not self.has_own_output

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json, corrected if it names a class for images, or ties a matrix that is another."""
        return untied(self._content) if self.has_own_output else self._content

    def spare_names(self) -> set[str]:
        """Return the names of the tensors that a model can do without: no model reads them, or they are tied."""
        if self.layout is None:
            return set()
        parameters = {name: self.layout.parameters(name) for name in self.checkpoint.names()}
        return {name for name, made in parameters.items() if all(parameter in self.tied for parameter in made)}


class InBaseLayout:
    """A fine-tune's tensors under the names and in the form of its base's files; a `Model`.

    Attributes:
        source, options, folder, weight_bytes: those of its checkpoint.
        config: the content of its config.json, corrected if necessary.
        tied: whether its output projection shares its embeddings.
    """

    def __init__(self, finetuned: ReadModel, origins: Mapping[str, "Origin"]):
        """Present a fine-tune's tensors.

        Args:
            origins: where every tensor comes from.
        """
        self.source: str = finetuned.checkpoint.source
        self.options: HubOptions = finetuned.checkpoint.options
        self.folder: Path = finetuned.checkpoint.folder
        self.weight_bytes: int = finetuned.checkpoint.weight_bytes
        self.config: Mapping[str, Any] = finetuned.config
        self.tied: bool = finetuned.ties_output
        self._checkpoint, self._origins = finetuned.checkpoint, dict(origins)
        self._converted: tuple[Conversion | None, Mapping[str, torch.Tensor]] = None, {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        return sorted(self._origins)

    def shape(self, name: str) -> tuple[int, ...]:
        origin = self._origins[name]
        return self._checkpoint.shape(origin) if isinstance(origin, str) else tuple(origin.empty[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        origin = self._origins[name]
        return self._checkpoint.dtype(origin) if isinstance(origin, str) else origin.empty[name].dtype

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        origin = self._origins[name]
        if isinstance(origin, str):
            return self._checkpoint.tensor(origin, device)
        with self._lock:  # of the tensors that are converted together, the last such are kept
            if self._converted[0] is not origin:
                self._converted = None, {}
                self._converted = origin, origin.run(self._checkpoint.tensor)
            return self._converted[1][name].to(device)


class Conversion:
    """Tensors of a fine-tune that together become tensors of its base's files, by way of the model's parameters.

    Attributes:
        empty: the shapes and dtypes of the results, by their names in the base, as tensors on the meta device.
    """

    def __init__(self, sources: list[TensorGroup], target: TensorGroup):
        """Set up the conversion; nothing is read.

        Raises:
            ValueError: if transformers cannot undo how it reads the base's tensors.
        """
        self._sources, self._target = sources, target
        shapes = {name: tensor for source in sources for name, tensor in source.parameters.items()}
        self.empty = target.to_tensors({name: shapes[name] for name in target.parameters})

    def run(self, read: Callable[[str], torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Return the base's tensors made of the fine-tune's, which `read` returns by name."""
        parameters: dict[str, torch.Tensor] = {}
        for source in self._sources:
            parameters |= source.to_parameters({member.name: read(member.name) for member in source.members})
        return self._target.to_tensors({name: parameters[name] for name in self._target.parameters})


# Where a tensor in the base's layout comes from: the fine-tune's tensor of this name, or a conversion.
Origin = str | Conversion


@dataclass(frozen=True)
class MatchedPair:
    """A fine-tune in its base's layout, and the part of the base that it rests on."""

    base: BaseTensors
    finetuned: Model


def match(base: ReadModel, finetuned: ReadModel) -> MatchedPair:
    """Find the base's tensor for every tensor of a fine-tune.

    Raises:
        IncompatibleModelsError: if the fine-tune lacks a tensor, has one too many, or has other shapes.
    """
    types = tuple(model.checkpoint.config.get("model_type") for model in (base, finetuned))
    if types[0] != types[1]:
        advice = ": give the pruned model that it was trained from as the base" if is_pruned_type(types[1]) else ""
        raise IncompatibleModelsError(f"the base is a '{types[0]}' model, the fine-tune a '{types[1]}' model{advice}")
    stored = base.checkpoint
    assert isinstance(stored, Checkpoint | DeltaBase)  # a fine-tune may be an adapter, a base is not
    matcher = _Matcher(stored, finetuned)
    if base.layout is None or finetuned.layout is None:  # names are compared as they stand
        check_tied_output(finetuned.checkpoint)
        matcher.match_names()
    else:
        matcher.match_layouts(base.layout, finetuned.layout)
    matcher.check()
    model = matcher.model()
    check_names(model)
    absent = set(stored.names()) - set(model.names())
    whole = BaseTensors(stored, absent, None, matcher.others)
    cut = check_tensors(whole, model, matcher.heads)
    return MatchedPair(BaseTensors(stored, absent, cut, matcher.others), model)


class _Matcher:
    """Collects the origin of every tensor."""

    def __init__(self, base: BaseModel, finetuned: ReadModel):
        self._base, self._finetuned, self._checkpoint = base, finetuned, finetuned.checkpoint
        self._stored = set(finetuned.checkpoint.stored_names())
        self.origins: dict[str, Origin] = {}
        self.others: dict[str, str] = {}
        self.heads: set[str] = set()  # that the base does not have
        self._missing: list[str] = []
        self._extra: list[str] = []
        self._used: set[str] = set()  # names of the fine-tune's groups

    def match_names(self) -> None:
        names, base_names = set(self._checkpoint.names()), set(self._base.names())
        self.origins = {name: name for name in names & base_names}
        self._missing, self._extra = sorted(base_names - names), sorted(names - base_names)

    def match_layouts(self, base: CheckpointLayout, finetuned: CheckpointLayout) -> None:
        names = self._base.names()
        made = {parameter: group for group in finetuned.groups.values() for parameter in group.parameters}
        for name in names:
            group = base.group(name)
            if group is None:
                self._match_unread(name, finetuned)
            elif name not in self.origins:
                self._match_group(group, base, finetuned, made)
        for key, group in finetuned.groups.items():
            if key in self._used or (key in self._finetuned.tied and self._finetuned.tied[key] in made):
                continue
            # A language model's head would be too large to store.
            if is_classifier(type(finetuned.model)) and group.converter is None and _is_head(key, finetuned, base):
                self._match_head(group, base)
            else:
                self._match_other(group, base)

    def _match_unread(self, name: str, finetuned: CheckpointLayout) -> None:
        """A tensor that no model reads is a part of the pair if both have it alike."""
        if name in self._stored and finetuned.group(name) is None and self._alike(name):
            self.origins[name] = name

    def _alike(self, name: str) -> bool:
        models = self._base, self._checkpoint
        shapes, kinds = {m.shape(name) for m in models}, {m.dtype(name).is_floating_point for m in models}
        return len(shapes) == len(kinds) == 1

    def _match_group(
        self,
        group: TensorGroup,
        base: CheckpointLayout,
        finetuned: CheckpointLayout,
        made: Mapping[str, TensorGroup],
    ) -> None:
        places = group.places()
        same = finetuned.groups.get(group.key)
        if same is not None and set(same.places().values()) == set(places.values()):
            by_place = {place: name for name, place in same.places().items()}
            self.origins |= {name: by_place[place] for name, place in places.items()}
            self._used.add(same.key)
            return
        sources = [self._source(parameter, made) for parameter in group.parameters]
        found = [source for source in sources if source is not None]
        if len(found) < len(sources):
            if not all(p in self._finetuned.tied or _is_head(p, base, finetuned) for p in group.parameters):
                self._missing += places
            return
        self._used |= {source.key for source in found}
        if group.converter is None and found[0].converter is None:
            self.origins[group.members[0].name] = found[0].members[0].name
            return
        try:
            conversion = Conversion(list({source.key: source for source in found}.values()), group)
        except (ValueError, KeyError) as error:
            raise IncompatibleModelsError(
                f"'{self._base.source}' stores {group.members[0].name} in another form than "
                f"'{self._checkpoint.source}', and {error}: save both by the same version of transformers"
            ) from error
        self.origins |= dict.fromkeys(conversion.empty, conversion)

    def _source(self, parameter: str, made: Mapping[str, TensorGroup]) -> TensorGroup | None:
        """Return the fine-tune's tensors for a parameter; of two that are tied, a file may hold either."""
        if parameter in made:
            return made[parameter]
        tied = [target for target, source in self._finetuned.tied.items() if source == parameter and target in made]
        return made[tied[0]] if tied else None

    def _match_other(self, group: TensorGroup, base: CheckpointLayout) -> None:
        """A tensor without a base's tensor of its name: an output projection whose base is the embeddings."""
        partners = [group.key, base.tied.get(group.key), *(t for t, source in base.tied.items() if source == group.key)]
        stored = [base.groups[p] for p in partners if p is not None and p in base.groups]
        if group.converter is not None or not stored or stored[0].converter is not None:
            self._extra += group.places()
            return
        name = group.members[0].name
        self.origins[name], self.others[name] = name, stored[0].members[0].name

    def _match_head(self, group: TensorGroup, base: CheckpointLayout) -> None:
        """A classifier's head on a base without one: rows added to none of the base's embeddings."""
        name, (shape,) = group.members[0].name, (tuple(t.shape) for t in group.parameters.values())
        embeddings: Any = base.model.get_input_embeddings()
        key = next((n for n, p in base.model.named_parameters() if p is embeddings.weight), "")
        stored = [base.groups[n] for n in (key, *(t for t, s in base.tied.items() if s == key)) if n in base.groups]
        if len(shape) != 2 or not stored or shape[1] != embeddings.weight.shape[1]:
            self._extra.append(name)
            return
        self.origins[name], self.others[name] = name, stored[0].members[0].name
        self.heads.add(name)

    def check(self) -> None:
        """Check that no tensor is missing or too many.

        Raises:
            IncompatibleModelsError: naming the first.
        """
        if not self._missing and not self._extra:
            return
        lost, extra = sorted(self._missing), sorted(self._extra)
        what = f"lacks {lost[0]}" if lost else f"has {extra[0]}, which the base lacks"
        prefixes = {name.partition(".")[0] for name in self._checkpoint.names()}
        advice = "check both models"
        if any(f".{part}." in name for name in self._checkpoint.names() for part in ("base_layer", "modules_to_save")):
            advice = "it holds an adapter beside the model: merge the two first (PEFT's merge_and_unload)"
        elif lost and len(prefixes) == 1 and not prefixes & {name.partition(".")[0] for name in self._base.names()}:
            advice = f"the names of all its tensors begin with '{min(prefixes)}.': save the model without its wrapper"
        raise IncompatibleModelsError(
            f"'{self._checkpoint.source}' is not a fine-tune of '{self._base.source}': it {what} "
            f"({len(lost)} tensors missing, {len(extra)} extra); {advice}"
        )

    def model(self) -> Model:
        """Return the fine-tune in the base's layout: the checkpoint itself if it is stored like that."""
        names = self._checkpoint.names()
        if all(name == origin for name, origin in self.origins.items()) and sorted(self.origins) == names:
            if self._finetuned.config is self._checkpoint.config:
                return self._checkpoint
        layout, kept = self._finetuned.layout, set(self.origins.values())
        ignored = [n for n in names if n not in kept and layout is not None and layout.group(n) is None]
        if ignored:
            logger.warning(
                f"'{self._checkpoint.source}' has {len(ignored)} tensors that no model reads, such as {ignored[0]}: "
                "they are left out"
            )
        return InBaseLayout(self._finetuned, self.origins)


def _is_head(parameter: str, model: CheckpointLayout, other: CheckpointLayout) -> bool:
    """Return whether a parameter is the head of a model, and the other's class has none of this name."""
    inside = parameter.startswith(f"{model.model.base_model_prefix}.")
    return type(model.model) is not type(other.model) and not inside and parameter not in other.model.state_dict()


def _layout(checkpoint: StoredModel) -> tuple[CheckpointLayout | None, Mapping[str, Any]]:
    """Return what a checkpoint's tensors become, tied and ignored ones included, and its config.json.

    The layout is None if transformers cannot tell. If config.json names a class for images, but the files hold the
    language model alone, the config.json that is returned names the class of that.

    Raises:
        IncompatibleModelsError: if its configuration describes no model.
    """
    model_type = str(checkpoint.config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        return None, checkpoint.config
    try:
        names = checkpoint.stored_names()
        layout = known_layout(checkpoint, model_config(checkpoint.config), names)
        if layout is None or layout.is_complete or not takes_images(type(layout.model)):
            return layout, checkpoint.config
        alone = known_layout(checkpoint, model_config({**checkpoint.config, "architectures": []}), names)
        if alone is None or type(alone.model) is type(layout.model) or not alone.is_complete:
            return layout, checkpoint.config
        return alone, {**checkpoint.config, "architectures": [type(alone.model).__name__]}
    except CheckpointError:
        raise
    except Exception as error:  # bad fields can raise any type
        raise IncompatibleModelsError(
            f"config.json of '{checkpoint.source}' describes no model that transformers can make: {str(error)[:400]}"
        ) from error
