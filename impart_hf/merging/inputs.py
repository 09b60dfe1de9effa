"""The models of a merge: a base and fine-tunes of it, dense or delta repositories, opened and compared."""

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from ..compression.compatibility import IncompatibleModelsError, check_pair, check_tied_output, is_matrix_shape
from ..modeling.checkpoints import Checkpoint, HubOptions, all_finite, pinned, repository_kind
from ..modeling.repository_kind import RepositoryKind
from ..modeling.tensors import Tensors
from ..repository.open import open_repository
from .config import MergeConfig
from .vocabulary import Tokens, united

_LAYER = re.compile(r"(.*?)\.(\d+)\.")
_SAMPLED = 8  # matrices by which a fine-tune is told from another model
_LEAST_COSINE = 0.3  # between its weights and the base's: fine-tunes have more than 0.9, other models 0


class FineTune:
    """One fine-tune of the base.

    Attributes:
        name: as the configuration has it.
        tensors: its tensors, dense or decoded from base and delta.
        config: its config.json.
        tokens: its tokens.
    """

    def __init__(self, name: str, base: Checkpoint, token: str | bool | None, cache_dir: str | None):
        self.name = name
        source, options = resolve(name, token, cache_dir)
        self.tensors: Tensors
        if repository_kind(source, options) is RepositoryKind.DELTA:
            repository = open_repository(source, options, str(base.folder))
            self.config: Mapping[str, Any] = repository.text_config.to_dict()
            self.tensors = repository
        else:
            checkpoint = Checkpoint(source, options)
            check_pair(base, checkpoint)
            check_tied_output(checkpoint)
            self.config, self.tensors = checkpoint.config, checkpoint
        if set(self.tensors.names()) != set(base.names()):
            raise IncompatibleModelsError(f"'{name}' has other tensors than the base '{base.source}'")
        self.tokens = Tokens(source, options)

    def rows_beyond(self, shape: tuple[int, ...], name: str) -> int:
        """How many rows more its tensor has than the base's, which has this shape: added to the vocabulary."""
        return self.tensors.shape(name)[0] - shape[0] if shape else 0


class MergeInputs:
    """All models of a merge.

    Attributes:
        base: the base.
        models: the fine-tunes, in the configuration's order.
    """

    def __init__(self, config: MergeConfig, *, token: str | bool | None = None, cache_dir: str | None = None):
        """Open all models; headers are read, and a few matrices of each.

        Raises:
            CheckpointError, DeltaFormatError, WrongBaseError: if a model cannot be read.
            IncompatibleModelsError: if one is not a fine-tune of the base, or two disagree about added tokens.
        """
        self.base = Checkpoint(*resolve(config.base_model, token, cache_dir))
        check_tied_output(self.base)
        self._base_tokens = Tokens(self.base.source, self.base.options)
        self.models = [FineTune(model.model, self.base, token, cache_dir) for model in config.finetunes]
        for model in self.models:
            self._check_origin(model)
        layers = {layer_of(name) for name in self.base.names()}
        self._layers = Counter(found[0] for found in layers if found is not None)
        self._set_vocabulary(config.tokenizer_source)

    def _set_vocabulary(self, source: str) -> None:
        """Whose tokenizer the result has, and whose rows; None for the base's."""
        chosen = next((model for model in self.models if model.name == source), None)
        self._tokens_from = self._rows_from = chosen
        self._row_owners = [chosen] if chosen is not None else []
        if source == "union":
            name = united(self._base_tokens, {model.name: model.tokens for model in self.models})
            self._tokens_from = next((model for model in self.models if model.name == name), None)
            longest = max(self.models, key=self._rows_added)
            self._rows_from = longest if self._rows_added(longest) else None
            self._row_owners = self.models

    def _rows_added(self, model: FineTune) -> int:
        return max(model.rows_beyond(self.base.shape(name), name) for name in self.base.names())

    def depth(self, name: str) -> float:
        """Where in its stack of layers a tensor is: 0 in the first layer, 1 in the last; 0 for what is in none."""
        found = layer_of(name)
        if found is None:
            return 0.0
        stack, number = found
        last = self._layers[stack] - 1
        return min(1.0, number / last) if last else 1.0

    @property
    def added_tokens(self) -> int:
        """How many rows the result's vocabulary has beyond the base's."""
        return 0 if self._rows_from is None else self._rows_added(self._rows_from)

    @property
    def result_config(self) -> Mapping[str, Any]:
        """config.json of what is merged: the base's, with the vocabulary that the result has."""
        config = dict(self.base.config)
        if self._tokens_from is not None:
            theirs = self._tokens_from.config
            config |= {k: v for k, v in theirs.items() if k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if self._rows_from is not None and self.added_tokens:
            config["vocab_size"] = self._rows_from.config["vocab_size"]
        return config

    @property
    def tokens(self) -> Tokens:
        """The tokens of what is merged; all files of a tokenizer and what goes with it come from there."""
        return self._base_tokens if self._tokens_from is None else self._tokens_from.tokens

    def vocabulary_rows(self, name: str) -> int:
        """Rows that the result has of a tensor beyond the base's."""
        return 0 if self._rows_from is None else self._rows_from.rows_beyond(self.base.shape(name), name)

    def is_layer_matrix(self, name: str) -> bool:
        """Whether a tensor is a matrix of one of the layers, or a stack of them: no embedding or output projection."""
        # What predicts several tokens at once has an embedding and an output projection in a layer of its own.
        outside = layer_of(name) is None or "embed" in name or ".shared_head." in name
        return not outside and is_matrix_shape(self.base.shape(name))

    def _check_origin(self, model: FineTune) -> None:
        """See that a fine-tune's weights are near the base's, which another model of the same shape has not."""
        matrices = [n for n in self.base.names() if layer_of(n) is not None and len(self.base.shape(n)) == 2]
        product = before = after = 0.0
        for name in matrices[:: max(1, math.ceil(len(matrices) / _SAMPLED))]:
            a, b = (tensors.tensor(name).float().flatten() for tensors in (self.base, model.tensors))
            product, before, after = product + float(a @ b), before + float(a @ a), after + float(b @ b)
        cosine = product / math.sqrt(before * after) if before and after else 1.0
        if cosine < _LEAST_COSINE:  # NaN is found, and named, where it stands
            raise IncompatibleModelsError(
                f"'{model.name}' is no fine-tune of '{self.base.source}': it has the same shapes, but the "
                f"cosine between their weights is {cosine:.2f}"
            )

    def added_rows(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """What a tensor of the result has beyond the base's rows.

        A token's row is the mean over the models that have the token. Rows that stand for no token of any model, for
        a vocabulary may be padded to a round size, are the mean over those that have them.

        Returns:
            (rows, columns), in `dtype`.

        Raises:
            IncompatibleModelsError: if they hold NaN or infinity.
        """
        first, columns = self.base.shape(name)
        count = self.vocabulary_rows(name)
        tokens = _Mean(count, columns)
        padding = _Mean(count, columns)
        for model in self._row_owners:
            rows = model.tensors.tensor(name)[first : first + count].float()
            if not all_finite(rows):
                raise IncompatibleModelsError(f"{name} of '{model.name}' holds NaN or infinity")
            owned = torch.tensor([model.tokens.may_have(first + place) for place in range(len(rows))]).view(-1, 1)
            tokens.add(rows, owned)
            padding.add(rows, torch.ones_like(owned))
        return torch.where(tokens.counts > 0, tokens.mean(), padding.mean()).to(dtype)


class _Mean:
    """The mean of rows, of which each summand has some."""

    def __init__(self, rows: int, columns: int):
        self._total, self.counts = torch.zeros(rows, columns), torch.zeros(rows, 1)

    def add(self, rows: torch.Tensor, owned: torch.Tensor) -> None:
        self._total[: len(rows)] += rows * owned
        self.counts[: len(rows)] += owned

    def mean(self) -> torch.Tensor:
        return self._total / self.counts.clamp_min(1)


def layer_of(name: str) -> tuple[str, int] | None:
    """The stack of layers that a tensor is in and the layer's number; None for what is in no layer."""
    found = _LAYER.match(name)
    return None if found is None else (found[1], int(found[2]))


def resolve(model: str, token: str | bool | None, cache_dir: str | None) -> tuple[str, HubOptions]:
    """A model's folder or Hub id, and how its files are found, at one commit.

    Args:
        model: as the configuration has it: `ID@REVISION` names a revision on the Hub.
    """
    source, at, revision = (model, "", "") if os.path.isdir(model) else model.rpartition("@")
    if not at:
        source = model
    options = HubOptions(revision or None, token, cache_dir)
    return source, pinned(source, options)
