"""A model as the reference of several others on one text: its logits are computed once."""

from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from ..common import processes
from ..common.partial_logits import Logits, LogitsOf
from .metrics import batch_sums

# Bytes of hidden states, or of logits if they are small. Of 64 x 512 tokens, states of 8192 numbers of 2 bytes are half
# of it.
MOST_KEPT = 1 << 30


class Reference:
    """Compares models with a reference on one text; the processes of a job share the batches.

    The reference stays in memory: its output projection gives logits of the states that are kept.

    Attributes:
        loss: the reference's cross-entropy, nats per token.
        tokens: number of tokens that are predicted: all except each sequence's first.
    """

    def __init__(self, model: PreTrainedModel, blocks: torch.Tensor, batch_size: int, most_kept: int = MOST_KEPT):
        """Run the reference over the text.

        Args:
            model: the reference.
            blocks: int64 (sequences, length).
            batch_size: sequences at a time.
            most_kept: bytes that are kept of its logits, or of what they are computed from; the rest is computed again
                for each model.
        """
        self._of, self._batches = LogitsOf(model), blocks.split(batch_size)
        self._kept: dict[int, Logits] = {}  # by number of the batch, on the CPU
        self._room = most_kept
        self.tokens = blocks[:, 1:].numel()
        self.loss = self._mean(lambda n: batch_sums(self._logits(n, model), None, self._targets(n, model)))[0]

    def compare(self, model: PreTrainedModel) -> tuple[float, float]:
        """Return a model's cross-entropy and KL(reference || model), nats per token.

        The KL is NaN if the vocabularies differ in size.
        """
        of_model = LogitsOf(model)

        def sums_of(number: int) -> tuple[float, float]:
            candidate = of_model(self._batches[number].to(model.device)).without_last()
            return batch_sums(candidate, self._logits(number, model), self._targets(number, model))

        return self._mean(sums_of)

    def _targets(self, number: int, model: PreTrainedModel) -> torch.Tensor:
        return self._batches[number][:, 1:].reshape(-1).to(model.device)

    def _logits(self, number: int, model: PreTrainedModel) -> Logits:
        """Return the reference's logits of a batch, on a model's device, and keep what they come from if it fits."""
        if number in self._kept:
            kept = self._kept[number]
            return replace(kept, states=kept.states.to(model.device))
        logits = self._of(self._batches[number].to(model.device)).without_last()
        if (size := logits.states.nbytes) <= self._room:
            self._room -= size
            self._kept[number] = replace(logits, states=logits.states.cpu())
        return logits

    @torch.inference_mode()
    def _mean(self, sums_of: Callable[[int], tuple[float, float]]) -> tuple[float, float]:
        """Return means over all tokens, of sums over each batch; they are added in one order in every job."""
        own = range(processes.number(), len(self._batches), processes.count())
        shares = processes.together(lambda: {number: sums_of(number) for number in own})
        sums = {number: found for share in shares for number, found in share.items()}
        ordered = [sums[number] for number in range(len(self._batches))]
        loss, divergence = (sum(values) / self.tokens for values in zip(*ordered, strict=True))
        return loss, divergence
