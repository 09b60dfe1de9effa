"""Quality of a causal language model on text: perplexity, and KL divergence from another model."""

import math
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import is_accelerate_available

from ..common.attention import with_capped_attention
from ..common.meta_model import takes_images
from ..common.partial_logits import Logits, LogitsOf
from ..common.token_losses import cross_entropy, kl_divergence
from ..modeling.modeling_delta_compressed import inner_class

_HUB_OPTIONS = ("revision", "token", "cache_dir", "trust_remote_code")


def load(source: str, dtype: torch.dtype, device: str | torch.device, **options: Any) -> PreTrainedModel:
    """Load a model for evaluation: a language model, or one for images and text, of which only text is used.

    Args:
        source: local folder or Hub id of a dense model or a delta repository.
        dtype, device: dtype and device of its weights.
        options: additional arguments of `from_pretrained`.
    """
    if torch.device(device).type != "cpu" and is_accelerate_available():
        options["device_map"] = {"": device}  # a delta is then decoded there
    config = AutoConfig.from_pretrained(source, **{k: v for k, v in options.items() if k in _HUB_OPTIONS})
    model: PreTrainedModel = _auto_class(config).from_pretrained(source, dtype=dtype, **options)
    if "attn_implementation" not in options:
        model = with_capped_attention(model)
    return model.to(device).eval()  # type: ignore[arg-type]  # transformers' decorator hides the first parameter


def _auto_class(config: PreTrainedConfig) -> Any:
    """Return the Auto class that loads a model as a whole."""
    try:
        return AutoModelForImageTextToText if takes_images(inner_class(config)) else AutoModelForCausalLM
    except ValueError:  # a delta, code of its own, or nothing that can be evaluated: the Auto class decides
        return AutoModelForCausalLM


def perplexity(model: PreTrainedModel, blocks: torch.Tensor, batch_size: int) -> float:
    """Return the perplexity of all tokens except each sequence's first; arguments as for `evaluate`."""
    return evaluate(model, None, blocks, batch_size)[0]


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel, reference: PreTrainedModel | None, blocks: torch.Tensor, batch_size: int
) -> tuple[float, float]:
    """Return perplexity and mean KL(reference || model), in nats per token, over all tokens except each first one.

    Args:
        model: the model to evaluate.
        reference: the model to compare it with, which may be the same. The KL is NaN without one, or if the
            vocabularies differ in size.
        blocks: int64 (sequences, length).
        batch_size: sequences at a time.
    """
    loss, divergence, tokens = 0.0, 0.0, 0
    of_model = LogitsOf(model)
    of_reference = None if reference is None else of_model if reference is model else LogitsOf(reference)
    for rows in blocks.split(batch_size):
        rows = rows.to(model.device)
        targets = rows[:, 1:].reshape(-1)
        candidate = of_model(rows).without_last()
        expected = None
        if of_reference is not None:
            expected = candidate if of_reference is of_model else of_reference(rows).without_last()
        sums = batch_sums(candidate, expected, targets)
        loss, divergence, tokens = loss + sums[0], divergence + sums[1], tokens + len(targets)
    return perplexity_of(loss / tokens), divergence / tokens


def perplexity_of(loss: float) -> float:
    """Return the perplexity for a cross-entropy in nats per token; infinity where it exceeds the range of a float."""
    return torch.tensor(loss, dtype=torch.float64).exp().item()  # where math.exp would raise


def batch_sums(candidate: Logits, expected: Logits | None, targets: torch.Tensor) -> tuple[float, float]:
    """Return the sums over a batch's tokens of the cross-entropy and of KL(expected || candidate), in nats.

    Args:
        candidate, expected: logits of the same tokens. The KL is NaN without the latter, or if the vocabularies differ
            in size.
        targets: the tokens that follow them, int64 (tokens,).
    """
    loss, divergence = 0.0, math.nan if expected is None else 0.0
    # Whole logits are taken in parts too, so that those of two vocabularies are compared part by part.
    size = candidate.chunk if expected is None else min(candidate.chunk, expected.chunk)
    for start in range(0, len(targets), size):
        logits = candidate.part(start, size)
        loss += cross_entropy(logits, targets[start : start + size]).item()
        if expected is not None:
            wanted = logits if expected is candidate else expected.part(start, size)
            divergence += kl_divergence(wanted, logits).item() if wanted.shape == logits.shape else math.nan
    return loss, divergence
