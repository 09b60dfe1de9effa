"""Model cards, rendered from the templates in model_cards/ with huggingface_hub's ModelCard."""

import os
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..common.model_names import split_adapter
from ..common.names import is_on_hub, public_name
from .kl_forecast import FORECAST
from .report import settings_text

# Entries of the fine-tune's card that apply to its delta as well.
_INHERITED = ("license", "license_name", "license_link", "language", "datasets")


def inherited_card_data(readme: Path | None) -> dict[str, Any]:
    """Return licence, language and datasets from a fine-tune's README.md; empty if it is missing or unreadable."""
    if readme is None:
        return {}
    try:
        data = ModelCard.load(readme, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError):
        return {}
    return {key: data[key] for key in _INHERITED if data.get(key)}


def merge_card(name: str, config: dict[str, Any]) -> str:
    """Return the README.md of a merged model.

    Args:
        name: name of its folder.
        config: the merge's configuration, with folders and Hub ids as the user gave them.
    """
    names = [config["base_model"], *(part for entry in config["models"] for part in split_adapter(entry["model"]))]
    models = dict.fromkeys(name for name in names if name)
    on_hub = [public_name(model) for model in models if not os.path.isdir(model)]
    data = ModelCardData(
        base_model=on_hub or None,
        base_model_relation="merge" if on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["merge", "impart-hf", config["merge_method"]],
    )
    template = resources.files("impart_hf.model_cards").joinpath("merged_model.md").read_text("utf-8")
    card = ModelCard.from_template(data, template_str=template, name=name, origin=merge_origin(config))
    return str(card) + "\n"


def merge_origin(config: dict[str, Any]) -> str:
    """Return Markdown that describes the merge; the argument is as for `merge_card`."""
    shown = {**config, "base_model": public_name(config["base_model"])}
    shown["models"] = [{**entry, "model": _shown(entry["model"])} for entry in config["models"]]
    if config.get("tokenizer_source", "base") != "base":
        shown["tokenizer_source"] = _shown(config["tokenizer_source"])
    text = yaml.safe_dump(shown, sort_keys=False)
    return (
        f"Fine-tunes of `{shown['base_model']}`, merged by impart-hf ({config['merge_method']}):\n\n"
        f"```yaml\n{text}```\n\nLocal folders appear in this configuration by name, without their paths."
    )


def _shown(model: str) -> str:
    """Return the public name of a merged model, which may be one with an adapter on it."""
    return "+".join(public_name(part) for part in split_adapter(model) if part)


# The Hub's name for what a model of an Auto class is for.
_TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSequenceClassification": "text-classification",
}


def delta_card(
    *,
    base: str,
    base_revision: str | None,
    finetuned: str,
    method: dict[str, Any],
    metadata: dict[str, Any],
    sizes: dict[str, str],
    shortfall: str,
    origin: str = "",
    auto_class: str = "AutoModelForCausalLM",
    deltas: int = 1,
) -> str:
    """Return the README.md of a delta repository.

    Args:
        base, base_revision: as recorded in config.json; of a folder, the card has the name alone.
        finetuned: the fine-tuned model as the user gave it.
        method: the method's name and settings.
        metadata: additional entries of the card's metadata, such as from `inherited_card_data`.
        sizes: the measured numbers as text: ratio, repository, checkpoint, error, tensors, distilled, forecast.
        shortfall: why the requested ratio was missed, or "".
        origin: Markdown that says how the fine-tuned model was made, if it is a merge; otherwise "".
        auto_class: the name of transformers' Auto class that loads it.
        deltas: how many deltas there are from the first base to the model, this one included.
    """
    on_hub = is_on_hub(base)
    data = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="finetune" if on_hub else None,
        library_name="transformers",
        pipeline_tag=_TASKS[auto_class],
        tags=["delta-compressed", "impart-hf", method["name"]],
        **metadata,
    )
    template = resources.files("impart_hf.model_cards").joinpath("delta_repository.md").read_text("utf-8")
    card = ModelCard.from_template(
        data,
        template_str=template,
        base=base if on_hub else Path(base).name,
        base_revision=base_revision or "",
        finetuned=public_name(finetuned),
        method=method["name"],
        requested=f"{method['compression_ratio']:g}" if "compression_ratio" in method else "",
        settings=settings_text({k: v for k, v in method.items() if k not in ("name", "compression_ratio", FORECAST)}),
        shortfall=shortfall,
        origin=origin,
        auto_class=auto_class,
        deltas=deltas,
        **sizes,
    )
    return str(card) + "\n"
