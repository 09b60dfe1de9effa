"""Models as they are evaluated: loaded when they are first needed, by transformers, beside their base, or by vLLM."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..modeling.model_files import HubOptions, repository_kind
from ..modeling.repository_kind import RepositoryKind
from .metrics import load

BACKENDS = ("hf", "vllm")


@dataclass(frozen=True)
class Loading:
    """How models are loaded.

    Attributes:
        backend: "hf" for transformers, or "vllm".
        device: where they run; for "hf".
        revision: branch, tag or commit on the Hub.
        base_model: folder or Hub id of the base of delta repositories, instead of the recorded ones.
        model_args: further arguments of the backend's model.

    Raises:
        ValueError: if there is no such backend.
    """

    backend: str = "hf"
    device: str | torch.device = "cpu"
    revision: str | None = None
    base_model: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not '{self.backend}'")


class EvaluatedModel:
    """A model by folder or Hub id, which is loaded once, when it is first needed.

    Attributes:
        source: its folder or Hub id.
        revision: its branch, tag or commit on the Hub.
    """

    def __init__(self, source: str, tokenizer: PreTrainedTokenizerBase | None, dtype: torch.dtype, loading: Loading):
        """Load nothing yet.

        Args:
            source: folder or Hub id.
            tokenizer: its tokenizer; None if it is only run by `model`.
            dtype: dtype of the weights.
            loading: how it is loaded.
        """
        self.source, self.revision = source, loading.revision
        self._tokenizer, self._dtype, self._loading = tokenizer, dtype, loading
        self._model: PreTrainedModel | None = None

    @property
    def how(self) -> dict[str, Any]:
        """What a score depends on beside the model itself and the task, as JSON."""
        loading = self._loading
        return {
            "backend": loading.backend,
            "dtype": str(self._dtype).removeprefix("torch."),
            "model_args": dict(loading.model_args),
        }

    @property
    def model(self) -> PreTrainedModel:
        """The model, loaded by transformers."""
        if self._model is None:
            options = dict(self._loading.model_args)
            if self._loading.base_model is not None and self._is_delta():
                options["base_model"] = self._loading.base_model
            self._model = load(self.source, self._dtype, self._loading.device, revision=self.revision, **options)
        return self._model

    def lm(self, batch_size: int | str) -> Any:
        """Return the model as lm-eval runs it; lm-eval must be installed."""
        from .hf_lm import TransformersLM

        assert self._tokenizer is not None
        return TransformersLM(self.model, self._tokenizer, batch_size)

    def _is_delta(self) -> bool:
        return repository_kind(self.source, HubOptions(self.revision)) is RepositoryKind.DELTA
