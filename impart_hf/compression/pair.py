"""A base and a fine-tune of it."""

import math
import os
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..adapters.adapter_files import refuse_adapter
from ..adapters.companions import companions_of
from ..adapters.open import open_finetune
from ..calibration.streamed_model import StreamedModel, streamed_model
from ..calibration.text import BUILT_IN, CalibrationSource, calibration_tokens, load_tokenizer, within_positions
from ..common.attention import with_capped_attention
from ..common.configs import model_config
from ..common.files import OutputError
from ..common.names import recorded_base
from ..common.progress import Progress
from ..evaluation.metrics import load
from ..modeling.base_tensors import BaseTensors
from ..modeling.checkpoints import config_for
from ..modeling.delta_chain import DeltaBase
from ..modeling.delta_repository import open_base
from ..modeling.model_files import HubOptions, pinned
from ..modeling.modeling_delta_compressed import is_classifier
from ..modeling.tensors import LazyTensor, Model
from ..repository.reader_files import refuse_reader_names
from .base_layout import ReadModel, match
from .exact_names import NONE, ExactNames
from .loading_class import check_class, check_loads, loading_class
from .scan import TensorPlan, scan

logger = logging.get_logger(__name__)


class ModelPair:
    """A base and a fine-tune of it, scanned once for any number of compressions.

    Attributes:
        base: the base's tensors that the fine-tune's rest on.
        finetuned: the fine-tune in the layout of the base's files.
        companions: the fine-tune's sidecar files.
        recorded_base: the base's name and revision in config.json, from `common.names.recorded_base`.
        device: where matrices are decomposed.
        progress: shows bars.
        exact: the tensors to store exactly.
    """

    def __init__(
        self,
        base: str,
        finetuned: str | DeltaBase,
        base_options: HubOptions,
        finetuned_options: HubOptions,
        *,
        base_name: str | None = None,
        device: torch.device,
        progress: Progress,
        exact: ExactNames = NONE,
    ):
        """Open both checkpoints; only headers are read, and an adapter.

        Args:
            finetuned: folder or Hub id, or a delta repository that has been opened.
            exact: the tensors to store exactly.

        Raises:
            CheckpointError: if one of them cannot be read, the fine-tune is an adapter that cannot be merged, or it
                has code under the name of a reader file.
            DeltaFormatError, WrongBaseError: if the base is a delta repository that is damaged, or whose base is
                another, or on which no delta can rest.
            IncompatibleModelsError: if they are not a pair.
            ModuleNotFoundError: if the fine-tune is an adapter and PEFT is not installed.
            ValueError: if no tensor has a name that `exact` asks for.
        """
        base = os.fspath(base)
        base_options = pinned(base, base_options)
        self.device, self.progress, self.exact = device, progress, exact
        bare = open_base(base, base_options)
        refuse_adapter(base, base_options)
        opened = (
            finetuned
            if isinstance(finetuned, DeltaBase)
            else open_finetune(os.fspath(finetuned), finetuned_options, bare)
        )
        self.companions = companions_of(opened)
        refuse_reader_names(opened.source, self.companions.files)
        read = ReadModel(opened)
        check_class(read)
        matched = match(ReadModel(open_base(base, base_options, tied=read.ties_output)), read)
        self.base: BaseTensors = matched.base
        self.finetuned: Model = matched.finetuned
        check_loads(self.finetuned)
        exact.check(self.finetuned.names())
        self.recorded_base = recorded_base(base, base_options.revision, base_name)
        self._folders = bare.folders | (opened.folders if isinstance(opened, DeltaBase) else {opened.folder})
        self._streamed: tuple[torch.Tensor, StreamedModel] | None = None

    def state(self) -> list[list[Any]]:
        """Return what a scan depends on: path, size and time of every file in the models' folders, and exact names."""
        files = sorted(path for folder in self._folders for path in folder.iterdir() if path.is_file())
        found: list[list[Any]] = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        return [*found, [*self.exact.patterns, self.exact.are_all]]

    @property
    def chain_length(self) -> int:
        """How many deltas rest on each other, that of the pair included: 1 if the base is dense."""
        base = self.base.checkpoint
        return 1 + (len(base.repository.chain) if isinstance(base, DeltaBase) else 0)

    def check_output(self, output: Path) -> None:
        """Check that an output folder is none that the result would rest on.

        Raises:
            OutputError: if it is.
        """
        if is_among(output, self.base.checkpoint.folders):
            raise OutputError(f"{output} holds a delta that the result would rest on; choose another folder")

    @property
    def is_scanned(self) -> bool:
        """Whether `tensors` is known."""
        return "tensors" in vars(self)

    @cached_property
    def tensors(self) -> list[TensorPlan]:
        """The kind of every tensor, before a method sets budgets; both checkpoints are read on first access.

        It may be set to what an earlier scan of the same files found.
        """
        return scan(self.base, self.finetuned, self.progress, self.exact)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the fine-tune's tokenizer.

        Raises:
            ValueError: if it cannot be read.
        """
        return load_tokenizer(self.companions.source, self.companions.options)

    def load(self, repository: Path | None = None) -> PreTrainedModel:
        """Load a delta repository of this pair, or the fine-tune itself, in the fine-tune's dtype on the device."""
        if repository is None:
            # Not by its name: transformers does not find the tensors that a wrapper has renamed.
            tensors = {name: LazyTensor(self.finetuned, name) for name in self.finetuned.names()}
            model_class = loading_class(self.finetuned)
            config = config_for(model_class, model_config(self.finetuned.config))
            model = model_class.from_pretrained(
                None, config=config, state_dict=tensors, dtype=self._dtype, device_map={"": self.device}
            )
            return with_capped_attention(model).eval()
        source, options = self.base.source, self.base.options
        return load(
            str(repository), self._dtype, self.device,
            # The Hub id that is recorded for a local base need not exist yet.
            base_model=source if os.path.isdir(source) else None, token=options.token, cache_dir=options.cache_dir,
        )  # fmt: skip

    @cached_property
    def _dtype(self) -> torch.dtype:
        """The dtype of most of the fine-tune's numbers."""
        counts = Counter[torch.dtype]()
        for name in self.finetuned.names():
            counts[self.finetuned.dtype(name)] += math.prod(self.finetuned.shape(name))
        return max((dtype for dtype in counts if dtype.is_floating_point), key=counts.__getitem__)

    def tokens(self, source: CalibrationSource, samples: int, length: int) -> torch.Tensor:
        """Draw sequences from a text: int64 (at most `samples`, `length` or the model's positions if fewer).

        Raises:
            ValueError: if the text is too short, or the model is no language model, which texts are for.
        """
        if is_classifier(loading_class(self.finetuned)):
            raise ValueError(
                f"'{self.finetuned.source}' is a sequence classifier: calibration, distillation, tuning and targets "
                "are for language models; compress it without a text"
            )
        length = within_positions(length, self.finetuned.config)
        return calibration_tokens(source, self.tokenizer(), samples=samples, length=length)

    def streamed(self, tokens: torch.Tensor) -> StreamedModel:
        """Return the fine-tune as a model that runs over these tokens layer by layer; errors as for `streamed_model`.

        It is made once for all runs over the same tokens.
        """
        if self._streamed is None or self._streamed[0] is not tokens:
            self._streamed = tokens, streamed_model(self.finetuned, tokens, self.device)
        return self._streamed[1]

    def automatic_tokens(self, samples: int, length: int) -> torch.Tensor | None:
        """Return `tokens` of the built-in text; None, which is logged, if this model cannot be run over it."""
        try:
            tokens = self.tokens(BUILT_IN, samples, length)
            self.streamed(tokens)
        except Exception as error:  # tokenizers and models raise all kinds, and nobody has asked for a text
            logger.warning(f"compressing without a calibration text: {error}")
            return None
        return tokens


def is_among(output: Path, folders: Iterable[Path]) -> bool:
    """Return whether an output folder is one of some folders, under whatever name."""
    return output.exists() and any(folder.samefile(output) for folder in folders)
