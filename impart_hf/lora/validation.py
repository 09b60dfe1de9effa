"""How far an adapter on its base is from the delta that it was made of, on a text."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration.text import CalibrationSource, calibration_tokens, load_tokenizer
from ..common.meta_model import meta_model
from ..evaluation.cost import max_positions
from ..evaluation.metrics import load
from ..evaluation.reference import Reference
from ..modeling.delta_repository import DeltaRepository
from .report import LoraValidation


class Validation:
    """A text on which an adapter is compared with its delta."""

    def __init__(
        self,
        repository: DeltaRepository,
        text: CalibrationSource,
        samples: int,
        length: int,
        batch_size: int,
        device: torch.device,
    ):
        """Read the text; arguments as for `export_lora`.

        Raises:
            CheckpointError: if the repository has no tokenizer.
            ValueError: if the text is empty or too short.
        """
        self._repository, self._batch_size, self._device = repository, batch_size, device
        positions = max_positions(meta_model(repository.text_config))
        tokenizer = load_tokenizer(repository.source, repository.options)
        self._tokens = calibration_tokens(text, tokenizer, samples=samples, length=min(length, positions or length))

    def measure(self, adapter: Path) -> LoraValidation:
        """Measure the adapter in a folder."""
        from peft import PeftModel

        repository, base = self._repository, self._repository.base.folder
        reference = Reference(
            self._load(repository.source, base_model=str(base), revision=repository.options.revision),
            self._tokens,
            self._batch_size,
        )
        model = self._load(str(base))
        base_kl = reference.compare(model)[1]
        adapted: Any = PeftModel.from_pretrained(model, str(adapter)).eval().get_base_model()
        return LoraValidation(reference.compare(adapted)[1], base_kl, reference.tokens)

    def _load(self, source: str, **options: str | None) -> PreTrainedModel:
        dtype = self._repository.dtype(self._repository.names()[0])
        given = {name: value for name, value in options.items() if value is not None}
        return load(source, dtype, self._device, **given)
