"""A base and a fine-tune of it."""

import os
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.text import CalibrationSource, load_tokenizer, model_tokens
from ..common.names import recorded_base
from ..common.progress import Progress
from ..evaluation.metrics import load
from ..modeling.checkpoints import Checkpoint, HubOptions, pinned
from .compatibility import check_pair
from .scan import TensorPlan, scan


class ModelPair:
    """A base and a fine-tune of it, read through once however often they are compressed.

    Attributes:
        base, finetuned: the two checkpoints.
        recorded_base: what config.json records of the base, from `names.recorded_base`.
        device: where matrices are decomposed.
        progress: shows bars.
    """

    def __init__(
        self,
        base: str,
        finetuned: str,
        base_options: HubOptions,
        finetuned_options: HubOptions,
        *,
        base_name: str | None = None,
        device: torch.device,
        progress: Progress,
    ):
        """Open both checkpoints; only headers are read.

        Raises:
            CheckpointError: if one of them cannot be read.
            IncompatibleModelsError: if they are not a pair.
        """
        base, finetuned = os.fspath(base), os.fspath(finetuned)
        finetuned_options, base_options = pinned(finetuned, finetuned_options), pinned(base, base_options)
        self.device, self.progress = device, progress
        self.finetuned = Checkpoint(finetuned, finetuned_options)
        self.base = Checkpoint(base, base_options, tied=self.finetuned.tied)
        check_pair(self.base, self.finetuned)
        self.recorded_base = recorded_base(base, base_options.revision, base_name)

    @cached_property
    def tensors(self) -> list[TensorPlan]:
        """What is to become of every tensor, before any method has a say."""
        return scan(self.base, self.finetuned, self.progress)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The fine-tune's.

        Raises:
            ValueError: if it has none that can be read.
        """
        return load_tokenizer(self.finetuned.source, self.finetuned.options)

    def load(self, repository: Path | None = None) -> PreTrainedModel:
        """A delta repository of this pair, or the fine-tune itself, in float32 on the device, to be judged."""
        if repository is None:
            source, options = self.finetuned.source, self.finetuned.options
            return load(
                source, torch.float32, self.device,
                revision=options.revision, token=options.token, cache_dir=options.cache_dir,
            )  # fmt: skip
        source, options = self.base.source, self.base.options
        return load(
            str(repository), torch.float32, self.device,
            # The name recorded for a folder is for others, and need not exist yet
            base_model=source if os.path.isdir(source) else None, token=options.token, cache_dir=options.cache_dir,
        )  # fmt: skip

    def tokens(self, source: CalibrationSource, samples: int, length: int) -> torch.Tensor:
        """int64 (at most `samples`, `length` or as many positions as the model has): sequences of a text."""
        return model_tokens(self.finetuned, source, samples, length)
