"""Models as they are evaluated: by transformers, as deltas beside one base in memory, or by vLLM."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.text import load_tokenizer
from ..common import processes
from ..common.devices import usable_device
from ..delta_adapters.model import DeltaModel
from ..modeling.model_files import HubOptions, repository_kind
from ..modeling.repository_kind import RepositoryKind
from ..repository.open import open_repository, refuse_chain
from .cost import empty_model
from .metrics import load
from .task_scores import TaskSettings

BACKENDS = ("hf", "runtime", "vllm")
# What functions and commands have arguments and options of their own for.
_NO_MODEL_ARGS = ("base_model", "batch_size", "device", "dtype", "pretrained", "revision", "seed")


class ModelLoader:
    """Loads models one after the other.

    Attributes:
        backend: "hf" for transformers; "runtime" for transformers with the base in memory once and deltas beside it,
            one of which acts; "vllm" for vLLM.
        revision: branch, tag or commit of the models on the Hub.
        model_args: further arguments of `from_pretrained`, or for "vllm" of lm-eval's class `VLLM`.
    """

    def __init__(
        self,
        backend: str = "hf",
        device: str | torch.device = "cpu",
        revision: str | None = None,
        base_model: str | None = None,
        model_args: Mapping[str, Any] | None = None,
    ):
        """Choose how models are loaded.

        Args:
            backend: as above.
            device: where they run; for "vllm" it is the engine's choice.
            revision: as above.
            base_model: folder or Hub id of the base of delta repositories, instead of the recorded ones.
            model_args: as above.

        Raises:
            ValueError: if there is no such backend, it cannot run in several processes, the device is not available, or
                an argument is none of `model_args`.
            ModuleNotFoundError: if vLLM is asked for and not installed.
        """
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not '{backend}'")
        if backend == "vllm" and processes.is_distributed():
            raise ValueError(
                "the backend vllm runs in one process: start it without accelerate launch or torchrun, and let the "
                "engine use several devices by tensor_parallel_size among the model's arguments"
            )
        if backend == "vllm" and find_spec("vllm") is None:
            raise ModuleNotFoundError("the backend vllm needs vLLM: pip install 'impart-hf[vllm]'")
        for name in _NO_MODEL_ARGS:
            if name in (model_args or {}):
                raise ValueError(f"model_args: '{name}' is an argument of its own, and none of the model's")
        self.backend, self.revision, self.model_args = backend, revision, dict(model_args or {})
        self._device, self._base_model = usable_device(device), base_model
        self._deltas: DeltaModel | None = None
        self._deltas_dtype: torch.dtype | None = None

    def check(self, models: Sequence[str]) -> None:
        """Check that models can be loaded as the backend does, by reading headers.

        Raises:
            ValueError: if they are to be deltas beside one base, and are not.
            CheckpointError, DeltaFormatError, WrongBaseError: if one of these is missing or damaged.
        """
        if self.backend != "runtime":
            return
        bases: dict[str, str] = {}
        for source in models:
            if not self._is_delta(source):
                raise ValueError(f"'{source}' is no delta repository, and the backend runtime is for these alone")
            repository = open_repository(source, HubOptions(self.revision), self._base_model)
            refuse_chain(repository)
            bases[repository.base.source] = source
        if len(bases) > 1:
            (one, first), (other, second) = list(bases.items())[:2]
            raise ValueError(
                f"the backend runtime has one base in memory, but '{first}' is a delta of '{one}', and '{second}' of "
                f"'{other}': evaluate them one after the other"
            )

    def opened(self, source: str, dtype: torch.dtype | None = None) -> "EvaluatedModel":
        """Return a model with its tokenizer, whose weights are loaded when they are first needed.

        Args:
            source: folder or Hub id.
            dtype: dtype of the weights; None for the model's own.

        Raises:
            ValueError: if it is no causal language model, or as for `check`.
            CheckpointError, DeltaFormatError, WrongBaseError: as for `check`.
        """
        own = empty_model(source, dtype, self.revision).dtype
        tokenizer = load_tokenizer(source, HubOptions(self.revision))
        self.check([source])
        return EvaluatedModel(source, own, self, tokenizer)

    def how(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return what a score depends on beside the model and the task, as JSON."""
        return {"backend": self.backend, "dtype": str(dtype).removeprefix("torch."), "model_args": self.model_args}

    def model(self, source: str, dtype: torch.dtype) -> Any:
        """Return a model of transformers; for "runtime" a `DeltaModel`, the same for all, with this delta active."""
        if self.backend == "runtime":
            return self._beside_base(source, dtype)
        options = dict(self.model_args)
        if self._base_model is not None and self._is_delta(source):
            options["base_model"] = self._base_model
        return load(source, dtype, self._device, revision=self.revision, **options)

    def engine(self, source: str, dtype: torch.dtype, settings: TaskSettings) -> Any:
        """Return a model of lm-eval that vLLM runs; both must be installed."""
        from .vllm_lm import EngineLM

        return EngineLM(source, dtype, self.revision, self._base_model, self.model_args, settings)

    def _beside_base(self, source: str, dtype: torch.dtype) -> DeltaModel:
        if self._deltas is not None and self._deltas_dtype != dtype:
            self._deltas = None
        if self._deltas is None:
            checkpoint = open_repository(source, HubOptions(self.revision), self._base_model).base.checkpoint
            base = load(checkpoint.source, dtype, self._device, revision=checkpoint.options.revision, **self.model_args)
            self._deltas, self._deltas_dtype = DeltaModel(base), dtype
        if self._deltas.active_adapter:
            self._deltas.delete_adapter(self._deltas.active_adapter)
        self._deltas.load_adapter(source, "default", revision=self.revision, base_files=self._base_model)
        self._deltas.set_adapter("default")
        return self._deltas

    def _is_delta(self, source: str) -> bool:
        return repository_kind(source, HubOptions(self.revision)) is RepositoryKind.DELTA


class EvaluatedModel:
    """A model by folder or Hub id, which is loaded once, when it is first needed.

    Attributes:
        source: its folder or Hub id.
        revision: its branch, tag or commit on the Hub.
        how: what a score depends on beside the model itself and the task, as JSON.
    """

    def __init__(
        self, source: str, dtype: torch.dtype, loader: ModelLoader, tokenizer: PreTrainedTokenizerBase | None = None
    ):
        """Load nothing yet.

        Args:
            source: folder or Hub id.
            dtype: dtype of the weights.
            loader: loads it.
            tokenizer: its tokenizer; tasks need it.
        """
        self.source, self.revision, self.how = source, loader.revision, loader.how(dtype)
        self._dtype, self._loader, self._tokenizer = dtype, loader, tokenizer
        self._model: PreTrainedModel | None = None
        self._lm: Any = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, which it must have been given."""
        assert self._tokenizer is not None
        return self._tokenizer

    @property
    def model(self) -> PreTrainedModel:
        """The model of transformers."""
        if self._model is None:
            with self._taking_arguments():
                self._model = self._loader.model(self.source, self._dtype)
        return self._model

    def lm(self, settings: TaskSettings) -> Any:
        """Return the model as lm-eval runs it; lm-eval must be installed.

        Args:
            settings: the tasks', the same in each call.
        """
        if self._lm is None and self._loader.backend == "vllm":
            with self._taking_arguments():
                self._lm = self._loader.engine(self.source, self._dtype, settings)
        elif self._lm is None:
            from .hf_lm import TransformersLM

            self._lm = TransformersLM(self.model, self.tokenizer, settings.batch_size)
        return self._lm

    @contextmanager
    def _taking_arguments(self) -> Iterator[None]:
        """Within this context, convert errors of arguments that a model does not take."""
        try:
            yield
        except TypeError as error:
            if not self._loader.model_args:
                raise
            raise ValueError(f"model_args: '{self.source}' does not take one of them: {error}") from error

    def close(self) -> None:
        """Free the memory, for the next model."""
        if self._loader.backend == "vllm" and self._lm is not None:
            self._lm.stop()
        self._model = self._lm = None
        gc.collect()
