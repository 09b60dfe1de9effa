"""The inputs of a merge: a base and fine-tunes of it, dense or delta repositories, opened and compared."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from ..adapters.adapted_model import AdaptedModel
from ..adapters.adapter_files import find_adapter, named_adapter, refuse_adapter
from ..adapters.companions import Companions, companions_of
from ..adapters.named_base import check_named_base
from ..adapters.open import open_finetune
from ..adapters.vocabulary import with_vocabulary
from ..common.model_names import split_adapter, split_revision
from ..compression.base_layout import ReadModel, match
from ..compression.compatibility import IncompatibleModelsError, check_tied_output, is_matrix_shape
from ..modeling.checkpoints import Checkpoint, all_finite, text_config
from ..modeling.model_files import CheckpointError, HubOptions, pinned, repository_kind
from ..modeling.repository_kind import RepositoryKind
from ..modeling.tensors import Tensors
from ..modeling.transfer import to_device
from ..repository.open import open_repository
from ..repository.sidecar_files import sidecar_files
from .chat_template import chat_template
from .config import MergeConfig
from .vocabulary import Tokens, model_with_all_tokens

_LAYER = re.compile(r"(.*?)\.(\d+)\.")
_SAMPLED = 8  # matrices that are compared to detect a model that is not a fine-tune of the base
_LEAST_COSINE = 0.3  # between its weights and the base's: above 0.9 for fine-tunes, about 0 for other models


class FineTune:
    """A fine-tune of the base.

    Attributes:
        name: its name in the configuration.
        tensors: its tensors, dense or decoded from base and delta, in the layout of the base's files.
        config: its config.json.
        tokens: its tokens.
        companions: its sidecar files.
    """

    def __init__(self, name: str, base: ReadModel, token: str | bool | None, cache_dir: str | None):
        self.name, self._base = name, base.checkpoint
        model, adapter = split_adapter(name)
        source, options = resolve(model, token, cache_dir)
        self.tensors: Tensors
        on_base = find_adapter(source, options) is not None
        if not on_base:
            options = pinned(source, options)
        if not adapter and not on_base and repository_kind(source, options) is RepositoryKind.DELTA:
            repository = open_repository(source, options, str(self._base.folder))
            self.config: Mapping[str, Any] = repository.text_config.to_dict()
            self.tensors = repository
            self.companions = Companions(source, options, sidecar_files(source, options))
        else:
            assert isinstance(self._base, Checkpoint)  # a fine-tune may be an adapter, a base is not
            opened = open_finetune(source, options, self._base)
            if adapter:
                if isinstance(opened, AdaptedModel):
                    raise CheckpointError(f"'{model}' of '{name}' is an adapter itself: write its base before the plus")
                files = named_adapter(*resolve(adapter, token, cache_dir))
                check_named_base(files, opened)
                opened = AdaptedModel(opened, files)
            self.companions = companions_of(opened)
            self.tensors = finetuned = match(base, ReadModel(opened)).finetuned
            self.config = finetuned.config
        self._names, base_names = set(self.tensors.names()), set(self._base.names())
        if own := self._names - base_names:
            kinds = [(config.get("architectures") or ["model"])[0] for config in (self.config, self._base.config)]
            if kinds[0] != kinds[1]:
                raise IncompatibleModelsError(
                    f"'{name}' is a {kinds[0]}, the base '{self._base.source}' a {kinds[1]}: the two cannot be merged"
                )
            raise IncompatibleModelsError(
                f"'{name}' has {min(own)}, and the base '{self._base.source}' does not, or config.json ties its output "
                "projection to the embeddings: the two cannot be merged"
            )
        if lost := base_names - self._names - base.spare_names():
            raise IncompatibleModelsError(f"'{name}' lacks {min(lost)}, which the base '{self._base.source}' has")
        self.tokens = Tokens(self.companions.source, self.companions.options)

    def rows_beyond(self, shape: tuple[int, ...], name: str) -> int:
        """Return how many rows its tensor has beyond the base's tensor, whose shape is given."""
        return max(0, self.tensors.shape(name)[0] - shape[0]) if shape and name in self._names else 0

    def shared(self, name: str, before: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return the part of its tensor that the base has, too, with the base's rows in place of those that it lacks.

        Args:
            before: the base's tensor.
            device: where a delta is decoded; the result is there.
        """
        if name not in self._names:
            return to_device(before, device)
        after = torch.atleast_1d(self.tensors.tensor(name, device))[: len(before)]
        if len(after) == len(before):
            return after
        # In float32, so that the base's own rows make no delta.
        return torch.cat([after.float(), before[len(after) :].to(device).float()])


class MergeInputs:
    """The opened models of a merge.

    Attributes:
        base: the base.
        models: the fine-tunes, in the configuration's order.
        chat_template: the result's chat template; None for that of its tokenizer.
    """

    def __init__(
        self,
        config: MergeConfig,
        *,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        device: torch.device | str = "cpu",
    ):
        """Open all models. Headers are read, and a few matrices of each.

        Args:
            device: where the fine-tunes that are deltas are decoded.

        Raises:
            CheckpointError, DeltaFormatError, WrongBaseError: if a model cannot be read.
            IncompatibleModelsError: if one is not a fine-tune of the base, or two disagree about added tokens.
        """
        source, options = resolve(config.base_model, token, cache_dir)
        options = pinned(source, options)
        self.base, self._device = Checkpoint(source, options), device
        refuse_adapter(source, options)
        check_tied_output(self.base)
        _check_layers(self.base, config.layers)
        read = ReadModel(self.base)
        self._base_tokens = Tokens(self.base.source, self.base.options)
        self.models = [FineTune(model.model, read, token, cache_dir) for model in config.finetunes]
        for model in self.models:
            self._check_origin(model)
        shared = set[str](self.base.names()).intersection(*(model.tensors.names() for model in self.models))
        copies = {name for name in read.spare_names() if read.layout is not None and read.layout.parameters(name)}
        self._names = sorted(set(self.base.names()) - (copies - shared))
        layers = {layer_of(name) for name in self.base.names()}
        self._layers = Counter(layer[0] for layer in layers if layer is not None)
        self._set_vocabulary(config.tokenizer_source)
        self.chat_template = self._chat_template(config.chat_template)

    def _chat_template(self, wanted: str | None) -> str | None:
        if wanted is None:
            return None
        if not self.tokens.by_number:
            raise ValueError(f"chat_template needs a tokenizer, which '{self.tokens.source}' does not have")
        return chat_template(wanted, [*(model.tokens for model in self.models), self._base_tokens])

    def _set_vocabulary(self, source: str) -> None:
        """Choose the models whose tokenizer and added rows the result has; None for the base's."""
        chosen = next((model for model in self.models if model.name == source), None)
        self._tokens_from = self._rows_from = chosen
        self._row_owners = [chosen] if chosen is not None else []
        if source == "union":
            name = model_with_all_tokens(self._base_tokens, {model.name: model.tokens for model in self.models})
            self._tokens_from = next((model for model in self.models if model.name == name), None)
            longest = max(self.models, key=self._rows_added)
            self._rows_from = longest if self._rows_added(longest) else None
            self._row_owners = self.models

    def names(self) -> list[str]:
        """Return the names of the result's tensors: the base's, without copies of tied ones that a model lacks."""
        return self._names

    def _rows_added(self, model: FineTune) -> int:
        return max(model.rows_beyond(self.base.shape(name), name) for name in self.base.names())

    @cached_property
    def usual_dtype(self) -> torch.dtype:
        """The dtype of most of the base's tensors."""
        return Counter(self.base.dtype(name) for name in self.base.names()).most_common(1)[0][0]

    def depth(self, name: str) -> float:
        """Return a tensor's depth in its stack of layers: 0 in the first layer, 1 in the last; 0 outside of layers."""
        layer = layer_of(name)
        if layer is None:
            return 0.0
        stack, number = layer
        last = self._layers[stack] - 1
        return min(1.0, number / last) if last else 1.0

    @property
    def added_tokens(self) -> int:
        """Rows that the result's vocabulary has beyond the base's."""
        return 0 if self._rows_from is None else self._rows_added(self._rows_from)

    @property
    def result_config(self) -> Mapping[str, Any]:
        """The merged model's config.json: the base's, with the vocabulary of the result."""
        config = dict(self.base.config)
        if self._tokens_from is not None:
            chosen = self._tokens_from.config
            config |= {k: v for k, v in chosen.items() if k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if self._rows_from is not None and self.added_tokens:
            config = with_vocabulary(config, text_config(self._rows_from.config).vocab_size)
        return config

    @property
    def tokens(self) -> Tokens:
        """The merged model's tokens."""
        return self._base_tokens if self._tokens_from is None else self._tokens_from.tokens

    @property
    def companions(self) -> Companions:
        """The merged model's tokenizer and other small files."""
        return companions_of(self.base) if self._tokens_from is None else self._tokens_from.companions

    def vocabulary_rows(self, name: str) -> int:
        """Return how many rows the result's tensor has beyond the base's."""
        return 0 if self._rows_from is None else self._rows_from.rows_beyond(self.base.shape(name), name)

    def is_layer_matrix(self, name: str) -> bool:
        """Return whether a tensor is a matrix of a layer, or a stack of them, and no embedding or output projection."""
        # A layer that predicts several tokens at once has an embedding and an output projection of its own.
        outside = layer_of(name) is None or "embed" in name or ".shared_head." in name
        return not outside and is_matrix_shape(self.base.shape(name))

    def _check_origin(self, model: FineTune) -> None:
        """Check that a fine-tune's weights are similar to the base's."""
        names = set(model.tensors.names()) & set(self.base.names())
        matrices = [n for n in sorted(names) if layer_of(n) is not None and len(self.base.shape(n)) == 2]
        product = before = after = 0.0
        for name in matrices[:: max(1, math.ceil(len(matrices) / _SAMPLED))]:
            a, b = (tensors.tensor(name, self._device).float().flatten() for tensors in (self.base, model.tensors))
            product, before, after = product + float(a @ b), before + float(a @ a), after + float(b @ b)
        cosine = product / math.sqrt(before * after) if before and after else 1.0
        if cosine < _LEAST_COSINE:  # NaN passes here and is reported, with its tensor's name, when it is merged
            raise IncompatibleModelsError(
                f"'{model.name}' is not a fine-tune of '{self.base.source}': it has the same shapes, but the cosine "
                f"between their weights is {cosine:.2f}"
            )

    def added_rows(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Return the rows that a tensor of the result has beyond the base's.

        A token's row is the mean over the models that have the token. Rows without a token in any model (a vocabulary
        may be padded to a round size) are the mean over the models that have the row.

        Returns:
            (rows, columns), or (rows) of a bias, in `dtype`.

        Raises:
            IncompatibleModelsError: if the rows hold NaN or infinity.
        """
        first, *columns = self.base.shape(name)
        count = self.vocabulary_rows(name)
        width = math.prod(columns)
        tokens, padding = _Mean(count, width), _Mean(count, width)
        for model in self._row_owners:
            rows = model.tensors.tensor(name, self._device)[first : first + count].cpu().float().reshape(-1, width)
            if not all_finite(rows):
                raise IncompatibleModelsError(f"{name} of '{model.name}' holds NaN or infinity")
            owned = torch.tensor([model.tokens.may_have(first + place) for place in range(len(rows))]).view(-1, 1)
            tokens.add(rows, owned)
            padding.add(rows, torch.ones_like(owned))
        return torch.where(tokens.counts > 0, tokens.mean(), padding.mean()).to(dtype).view(count, *columns)


def _check_layers(base: Checkpoint, layers: int | None) -> None:
    """Check that a configuration is written for the base's number of layers.

    Raises:
        ValueError: if not: a part of the layers, or more than there are, cannot be merged.
    """
    number = getattr(text_config(base.config), "num_hidden_layers", None)
    if layers is not None and number is not None and layers != number:
        raise ValueError(
            f"layer_range [0, {layers}] is not all {number} layers of '{base.source}', and impart-hf does not merge "
            f"parts: write [0, {number}]"
        )


class _Mean:
    """The mean of several blocks of rows, each of which contributes only some rows."""

    def __init__(self, rows: int, columns: int):
        self._total, self.counts = torch.zeros(rows, columns), torch.zeros(rows, 1)

    def add(self, rows: torch.Tensor, owned: torch.Tensor) -> None:
        self._total[: len(rows)] += rows * owned
        self.counts[: len(rows)] += owned

    def mean(self) -> torch.Tensor:
        return self._total / self.counts.clamp_min(1)


def layer_of(name: str) -> tuple[str, int] | None:
    """Return the stack of layers and the layer number of a tensor; None if it is in no layer."""
    match = _LAYER.match(name)
    return None if match is None else (match[1], int(match[2]))


def resolve(model: str, token: str | bool | None, cache_dir: str | None) -> tuple[str, HubOptions]:
    """Return a model's folder or Hub id and the options for reading it.

    Args:
        model: its name in the configuration; `ID@REVISION` names a revision on the Hub.
    """
    source, revision = split_revision(model)
    return source, HubOptions(revision, token, cache_dir)
