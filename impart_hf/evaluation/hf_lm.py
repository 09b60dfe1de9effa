"""Models of transformers as lm-eval runs them. lm-eval must be installed to import this module."""

from typing import Any

from accelerate import PartialState
from accelerate.utils import gather
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..common import processes
from .task_loading import lm_eval_says_less


class TransformersLM(HFLM):
    """A loaded model; in a job of several processes, each has the whole model and a share of the questions."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | str):
        """Wrap a model.

        Args:
            model: a causal language model, or a `DeltaModel`.
            tokenizer: its tokenizer.
            batch_size: requests at a time, or "auto".
        """
        with lm_eval_says_less():  # it warns that a model is given and not a name
            super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
        self._rank, self._world_size = processes.number(), processes.count()

    def all_gather(self, tensor: Any) -> Any:
        return gather(tensor)

    def barrier(self) -> None:
        if self.world_size > 1:
            PartialState().wait_for_everyone()
