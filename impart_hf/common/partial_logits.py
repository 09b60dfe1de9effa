"""Logits a few tokens at a time: with a vocabulary of 262,144, those of 8 x 2,048 tokens take 17 GB in float32.

A model's own code computes them: its forward method is run with its body (`base_model`) replaced by one that returns
some of the hidden states. So scaling and soft-capping of logits are what they are in the whole model.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import logging

from . import token_losses
from .token_losses import kl_divergence

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Logits:
    """The logits of a batch, or what they are computed from.

    Attributes:
        states: (sequences, length, size), or (tokens, size): hidden states, or whole logits.
        of: gives the logits (tokens, vocabulary) of some of them, (tokens, size).
        chunk: number of tokens whose logits are to be computed at a time.
    """

    states: Tensor
    of: Callable[[Tensor], Tensor]
    chunk: int

    @property
    def tokens(self) -> int:
        return self.states.shape[:-1].numel()

    @property
    def are_whole(self) -> bool:
        """Whether `states` are the logits."""
        return self.of is _same

    def part(self, start: int, size: int) -> Tensor:
        """Return the logits of at most `size` tokens from `start` on, counted over all sequences."""
        return self.of(self.states.flatten(0, -2)[start : start + size])

    def without_last(self) -> "Logits":
        """Return the logits of all tokens but each sequence's last."""
        return Logits(self.states[:, :-1].flatten(0, 1), self.of, self.chunk)


def _same(states: Tensor) -> Tensor:
    return states


def kl_of_parts(
    reference: Logits, candidate: Logits, holding: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Tensor:
    """Return the sum over tokens of KL(reference || candidate), in nats: float32, a differentiable scalar.

    The logits of a part are computed again for its gradient, so that no two parts are in memory.

    Args:
        holding: gives a context in which the candidate's logits are computed.
    """
    if reference.are_whole and candidate.are_whole:
        return kl_divergence(reference.states, candidate.states)

    def part(reference_states: Tensor, candidate_states: Tensor) -> Tensor:
        with torch.no_grad():
            expected = reference.of(reference_states)
        with holding():
            found = candidate.of(candidate_states)
        return kl_divergence(expected, found)

    size, sums = min(reference.chunk, candidate.chunk), []
    pairs = (logits.states.flatten(0, -2).split(size) for logits in (reference, candidate))
    for states in zip(*pairs, strict=True):
        if torch.is_grad_enabled():
            sums.append(checkpoint(part, *states, use_reentrant=False, preserve_rng_state=False))
        else:
            sums.append(part(*states))
    return torch.stack(sums).sum()


class LogitsOf:
    """Gives a causal language model's logits: whole if they are small, otherwise in parts."""

    def __init__(
        self,
        model: PreTrainedModel,
        run: Callable[[Tensor], Tensor] | None = None,
        like: "LogitsOf | None" = None,
    ):
        """Choose how logits are computed.

        Args:
            model: the model.
            run: gives the logits (sequences, length, vocabulary) for tokens, int64 (sequences, length), by a call of
                the model's forward method; None for such a call without a cache.
            like: the logits of a model of the same class, which need no second check.
        """
        self._model: Any = model
        self._body: Any = model.base_model
        self._run = run or self._call
        self._vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0) or 0)
        self._like = like
        self._why_whole = "it has no body apart from its output projection" if self._body is model else None
        self._is_checked = self._is_said = False

    @property
    def why_whole(self) -> str | None:
        """Why this model's logits cannot be computed in parts; None if they can, or nothing has needed parts yet."""
        return self._why_whole if self._like is None else self._like.why_whole

    def _call(self, tokens: Tensor) -> Tensor:
        return self._model(input_ids=tokens, use_cache=False).logits

    def __call__(self, tokens: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> Logits:
        """Run the model.

        Args:
            tokens: int64 (sequences, length), on its device.
            run: replaces the function that gives the logits of these tokens.
        """
        run = run or self._run
        if tokens.numel() * self._vocabulary > token_losses.CHUNK_ENTRIES and self._can_be_parted(tokens):
            return self._partial(tokens, run)
        logits = run(tokens)
        return Logits(logits, _same, max(1, token_losses.CHUNK_ENTRIES // logits.shape[-1]))

    def _partial(self, tokens: Tensor, run: Callable[[Tensor], Tensor]) -> Logits:
        output = self._body_output(tokens, run)

        def logits_of(states: Tensor) -> Tensor:
            found = type(output)(last_hidden_state=states[None])
            with self._body_that(lambda *_, **__: found):
                return self._run(tokens.new_zeros(1, len(states)))[0]

        return Logits(output.last_hidden_state, logits_of, max(1, token_losses.CHUNK_ENTRIES // self._vocabulary))

    def _body_output(self, tokens: Tensor, run: Callable[[Tensor], Tensor]) -> Any:
        """Run the model up to the end of its body."""
        forward = self._body.forward

        def stop(*positional: Any, **named: Any) -> None:
            raise _BodyEnded(forward(*positional, **named))

        try:
            with self._body_that(stop):
                run(tokens)
        except _BodyEnded as ended:
            return ended.output
        raise TypeError("its body is not run")

    @contextmanager
    def _body_that(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Within this context, replace the body's forward method."""
        own = vars(self._body).get("forward")
        self._body.forward = forward
        try:
            yield
        finally:
            if own is None:
                del self._body.forward
            else:
                self._body.forward = own

    def _can_be_parted(self, tokens: Tensor) -> bool:
        """Return whether parts of the logits are those of the whole, which is tried once, on a few tokens."""
        if self._like is not None:
            return self._like._can_be_parted(tokens)
        # Fake tensors, by which memory is forecast, have no values to compare.
        if self._why_whole is None and not self._is_checked and not isinstance(tokens, FakeTensor):
            self._is_checked = True
            self._why_whole = self._difference(tokens[:1, :4])
        if self._why_whole and not self._is_said:
            self._is_said = True
            logger.warning(
                f"{type(self._model).__name__}: logits are computed for all tokens at once, which takes more memory: "
                f"{self._why_whole}. If memory runs out, give shorter sequences"
            )
        return self._why_whole is None

    @torch.no_grad()
    def _difference(self, tokens: Tensor) -> str | None:
        whole = self._run(tokens)[0].float()
        try:
            logits = self._partial(tokens, self._run)
            parts = torch.cat([logits.of(part) for part in logits.states[0].split(2)]).float()
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
            return f"its output projection cannot be run alone ({' '.join(str(error).split())})"
        tolerance = 1e-4 if logits.states.dtype == torch.float32 else 0.02
        if parts.shape != whole.shape or (parts - whole).norm() > tolerance * whole.norm():
            return "its output projection gives other logits when it is run alone"
        return None


class _BodyEnded(Exception):
    """Raised to end a run after the model's body."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output
