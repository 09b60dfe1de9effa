"""Attention as a model was trained with it."""

from typing import TypeVar

from transformers import PreTrainedModel

_Model = TypeVar("_Model", bound=PreTrainedModel)


def with_capped_attention(model: _Model) -> _Model:
    """Let a model cap its attention scores if its family does (Gemma 2, `attn_logit_softcapping`); return it.

    transformers' default attention, sdpa, leaves the capping out without a word, so that scores, calibration and
    training would be those of another model.
    """
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    return model
