"""Model cards, rendered from model_cards/ with huggingface_hub's ModelCard."""

import os
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .report import settings_text

# What a fine-tune's own card says of itself holds for its delta as well.
_INHERITED = ("license", "license_name", "license_link", "language", "datasets")


def inherited_card_data(readme: Path | None) -> dict[str, Any]:
    """License, language and datasets from a fine-tune's README.md, if it has one that can be read."""
    if readme is None:
        return {}
    try:
        data = ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError):
        return {}
    return {key: data[key] for key in _INHERITED if data.get(key)}


def delta_card(
    *,
    base: str,
    base_revision: str | None,
    finetuned: str,
    method: dict[str, Any],
    metadata: dict[str, Any],
    sizes: dict[str, str],
    shortfall: str,
) -> str:
    """The README.md of a delta repository.

    Args:
        base, base_revision: as recorded in config.json.
        finetuned: the fine-tuned model as the user named it.
        method: name and settings.
        metadata: more entries of the card's data, such as `inherited_card_data` finds.
        sizes: the measured numbers, already written out: ratio, repository, checkpoint, error, tensors.
        shortfall: why the requested ratio was missed, or "".
    """
    on_hub = not os.path.isabs(base)
    data = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="finetune" if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["delta-compressed", "impart-hf", method["name"]],
        **metadata,
    )
    template = resources.files("impart_hf.model_cards").joinpath("delta_repository.md").read_text("utf-8")
    card = ModelCard.from_template(
        data,
        template_str=template,
        base=base,
        base_revision=base_revision or "",
        finetuned=finetuned if not os.path.isdir(finetuned) else Path(finetuned).name,
        method=method["name"],
        requested=f"{method['compression_ratio']:g}",
        settings=settings_text({k: v for k, v in method.items() if k not in ("name", "compression_ratio")}),
        shortfall=shortfall,
        **sizes,
    )
    return str(card) + "\n"
