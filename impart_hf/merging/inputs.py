"""The models of a merge: a base and fine-tunes of it, dense or delta repositories, opened and compared."""

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..calibration_text import load_tokenizer
from ..modeling.checkpoints import Checkpoint, HubOptions, fetch_file, pinned, read_json
from ..modeling.configuration_delta_compressed import DeltaCompressedConfig
from ..modeling.delta_repository import DeltaRepository
from ..plan import IncompatibleModelsError, check_pair
from ..reconstruct import open_repository
from .config import MergeConfig

_SAMPLED = 8  # matrices by which a fine-tune is told from another model
_LEAST_COSINE = 0.3  # between its weights and the base's: fine-tunes have more than 0.9, other models 0


class FineTune:
    """One fine-tune of the base.

    Attributes:
        name: as the configuration has it.
        tensors: its tensors, dense or decoded from base and delta.
        config: its config.json.
        options: how its files are found.
    """

    def __init__(self, name: str, base: Checkpoint, token: str | bool | None, cache_dir: str | None):
        self.name = name
        source, options = resolve(name, token, cache_dir)
        config = fetch_file(source, "config.json", options)
        self.tensors: Checkpoint | DeltaRepository
        if config is not None and read_json(config).get("model_type") == DeltaCompressedConfig.model_type:
            repository = open_repository(source, options, str(base.folder))
            self.config: Mapping[str, Any] = repository.config.text_config.to_dict()
            self.tensors = repository
        else:
            checkpoint = Checkpoint(source, options)
            check_pair(base, checkpoint)
            self.config, self.tensors = checkpoint.config, checkpoint
        if set(self.tensors.names()) != set(base.names()):
            raise IncompatibleModelsError(f"'{name}' has other tensors than the base '{base.source}'")
        self.options = options

    @property
    def vocabulary(self) -> int:
        """How many tokens it has rows for."""
        return int(self.config.get("vocab_size") or 0)


class MergeInputs:
    """All models of a merge.

    Attributes:
        base: the base.
        models: the fine-tunes, in the configuration's order.
        donor: whose tokenizer and vocabulary the result has; None for the base's.
    """

    def __init__(self, config: MergeConfig, *, token: str | bool | None = None, cache_dir: str | None = None):
        """Open all models; headers are read, and a few matrices of each.

        Raises:
            CheckpointError, DeltaFormatError, WrongBaseError: if a model cannot be read.
            IncompatibleModelsError: if one is not a fine-tune of the base, or two disagree about added tokens.
        """
        self.base = Checkpoint(*resolve(config.base_model, token, cache_dir))
        self.models = [FineTune(model.model, self.base, token, cache_dir) for model in config.finetunes]
        for model in self.models:
            self._check_origin(model)
        self.donor = self._find_donor(config)
        self._unites = config.tokenizer_source == "union"
        if self._unites:
            self._check_added_tokens()

    @property
    def layers(self) -> int:
        """Decoder layers of the base."""
        return int(self.base.config.get("num_hidden_layers") or self.base.config.get("n_layer") or 1)

    @property
    def base_vocabulary(self) -> int:
        """How many tokens the base has rows for."""
        return int(self.base.config.get("vocab_size") or 0)

    @property
    def added_tokens(self) -> int:
        """How many rows the result's vocabulary has beyond the base's."""
        return 0 if self.donor is None else self.donor.vocabulary - self.base_vocabulary

    @property
    def result_config(self) -> Mapping[str, Any]:
        """config.json of what is merged: the base's, with the donor's vocabulary."""
        if self.donor is None:
            return self.base.config
        ids = {k: v for k, v in self.donor.config.items() if k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return {**self.base.config, **ids, "vocab_size": self.donor.vocabulary}

    @property
    def tokenizer_place(self) -> tuple[str, HubOptions]:
        """Where the tokenizer of what is merged comes from, and all that goes with it."""
        if self.donor is not None:
            return self.donor.tensors.source, self.donor.options
        places = [(self.base.source, self.base.options)]
        if self._unites:  # a base may have been published without
            places += [(model.tensors.source, model.options) for model in self.models]
        return next((place for place in places if fetch_file(place[0], "tokenizer_config.json", place[1])), places[0])

    def result_tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises: ValueError, if there is none that can be read."""
        return load_tokenizer(*self.tokenizer_place)

    def vocabulary_rows(self, name: str) -> int:
        """Rows that the result has of a tensor beyond the base's: tokens that the donor has added."""
        shape = self.base.shape(name)
        return self.donor.tensors.shape(name)[0] - shape[0] if self.donor is not None and shape else 0

    def is_vocabulary(self, name: str) -> bool:
        """Whether a tensor has a row for every token: an embedding or output projection."""
        shape = self.base.shape(name)
        grew = any(model.tensors.shape(name) != shape for model in self.models)
        return grew or (len(shape) == 2 and shape[0] == self.base.config.get("vocab_size"))

    def _check_origin(self, model: FineTune) -> None:
        """See that a fine-tune's weights are near the base's, which another model of the same shape has not."""
        matrices = [n for n in self.base.names() if len(self.base.shape(n)) == 2 and not self.is_vocabulary(n)]
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

    def _find_donor(self, config: MergeConfig) -> FineTune | None:
        if config.tokenizer_source == "union":
            largest = max(self.models, key=lambda model: model.vocabulary)
            return largest if largest.vocabulary > self.base_vocabulary else None
        return next((m for m in self.models if m.name == config.tokenizer_source), None)

    def _check_added_tokens(self) -> None:
        """See that models mean the same by the tokens that they have and the base has not."""
        own = _tokens(self.base.source, self.base.options)
        seen: dict[int, tuple[str, str]] = {}
        for model in self.models:
            for number, token in _tokens(model.tensors.source, model.options).items():
                other, name = seen.setdefault(number, (token, model.name))
                if number not in own and other != token:
                    raise IncompatibleModelsError(
                        f"token {number} is {other!r} in '{name}' and {token!r} in '{model.name}': their "
                        "added tokens cannot be united; choose one model's with tokenizer_source, or `base`"
                    )

    def added_rows(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """What a tensor of the result has beyond the base's rows: the mean over the models that have them.

        Returns:
            (rows, columns), in `dtype`.
        """
        first, columns = self.base.shape(name)
        count = self.vocabulary_rows(name)
        total, owners = torch.zeros(count, columns), torch.zeros(count, 1)
        for model in self.models:
            if self._unites or model is self.donor:
                rows = model.tensors.tensor(name)[first : first + count].float()
                total[: len(rows)] += rows
                owners[: len(rows)] += 1
        return (total / owners).to(dtype)


def _tokens(source: str, options: HubOptions) -> dict[int, str]:
    """A model's tokens by number; none where it has no tokenizer, which is no matter for its weights."""
    try:
        vocabulary = load_tokenizer(source, options).get_vocab()
    except ValueError:
        return {}
    return {number: token for token, number in vocabulary.items()}


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
