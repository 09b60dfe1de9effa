"""The model card of a pruned model: what was removed, what remains, how to load it."""

from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .configuration_pruned import LAYER_WIDTHS, is_pruned_type, pruned_config_class

_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A pruned {{ family }}{% if base %}, made of `{{ base }}`{% endif %}: {{ after }} parameters
{%- if before %}, of {{ before }} before pruning ({{ removed }} removed){% endif %}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{{ repository }}"{{ trust }})
tokenizer = AutoTokenizer.from_pretrained("{{ repository }}"{{ trust }})
```
{% if trust %}
With impart-hf installed and imported (`import impart_hf`), `trust_remote_code` is not needed, and vLLM serves the
model: `vllm serve {{ repository }}`.
{% endif %}
{%- if steps %}
## How it was made

{% for step in steps -%}
{{ loop.index }}. {{ step }}
{% endfor %}
{%- endif %}
{%- if layers %}
## Layers

Layers whose widths differ from those before width pruning:

| layer | attention heads | KV heads | intermediate size |
|---|---|---|---|
| before | {{ usual[0] }} | {{ usual[1] }} | {{ usual[2] }} |
{% for number, heads, kv_heads, size in layers -%}
| {{ number }} | {{ heads }} | {{ kv_heads }} | {{ size }} |
{% endfor -%}
{%- endif %}
"""


def pruned_model_card(
    config: Mapping[str, Any], name: str, parameters: int, metadata: Mapping[str, Any] | None = None
) -> str:
    """Return the README.md of a pruned model.

    Args:
        config: the model's config.json, of a family's pruned or own model type: from the latter, only layers were
            removed. `pruning` may be missing or damaged: steps that cannot be read are omitted.
        name: the model's Hub id, or the name of its folder.
        parameters: its number of parameters.
        metadata: more entries of the card's data, such as license and language; its tags are added to the card's.

    Raises:
        ValueError: if the configuration is not that of a family that can be pruned.
    """
    family = pruned_config_class(config.get("model_type"))
    if family is None:
        raise ValueError(f"model_type '{config.get('model_type')!s:.40}' is not one of models that can be pruned")
    parsed = family.from_dict({k: v for k, v in config.items() if k not in ("model_type", "pruning")})
    history = _mapping(config.get("pruning"))
    base = _line(history.get("base_model"))
    before = history.get("base_parameters")
    before = before if isinstance(before, int) and before > parameters else 0
    usual = tuple(parsed.to_dict()[key] for key in LAYER_WIDTHS)
    own = dict(metadata or {})
    tags = own.pop("tags", None)
    data = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if _is_hub_id(base):
        data |= {"base_model": base, "base_model_relation": "finetune"}
    card = ModelCard.from_template(
        ModelCardData(
            **{**own, **data}, tags=["pruned", "impart-hf", *(tags if isinstance(tags, (list, tuple)) else [])]
        ),
        template_str=_TEMPLATE,
        name=_line(name),
        family=family.family_name,
        base=base,
        after=f"{parameters:,}",
        before=f"{before:,}" if before else "",
        removed=f"{1 - parameters / before:.1%}" if before else "",
        repository=name if _is_hub_id(name) else "REPO_ID",
        trust=", trust_remote_code=True" if is_pruned_type(config.get("model_type")) else "",
        steps=list(_steps(history)),
        layers=[(number, *widths) for number, widths in enumerate(parsed.widths) if widths != usual],
        usual=usual,
    )
    return str(card).rstrip("\n") + "\n"


def _steps(history: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for every step of a known kind."""
    steps = history.get("steps")
    for step in steps if isinstance(steps, list) else []:
        step = _mapping(step)
        score = f" by the score {_line(step['score'])}" if step.get("score") else ""
        if step.get("kind") == "layers":
            merged = [f"{_line(a)} into {_line(b)}" for a, b in _mapping(step.get("merged_into")).items()]
            fate = f"merged {', '.join(merged)}" if merged else "nothing was merged"
            yield f"Removed layers {_numbers(step.get('removed'))} (numbered as before this step){score}; {fate}."
        elif step.get("kind") == "width":
            corrected = "; the remaining weights were corrected for the loss" if step.get("corrected") is True else ""
            yield (
                f"Pruned heads and channels{score}: {_count(step.get('removed_parameters'))} parameters, ratio "
                f"{_line(step.get('ratio')) or 'unknown'}{corrected}."
            )
        elif step.get("kind") == "recovery":
            how = {"lora": "LoRA", "full": "all weights"}.get(_line(step.get("method")), "unknown method")
            yield (
                f"Recovery training ({how}): {_count(step.get('steps'))} steps at learning rate "
                f"{_line(step.get('learning_rate')) or 'unknown'} on {_line(step.get('data')) or 'unknown data'}."
            )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _line(value: Any) -> str:
    """Return a string or number as text for one line of Markdown; anything else as an empty string."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return ""
    return " ".join(str(value).split()).replace("`", "'").replace("<", "&lt;")[:200]


def _numbers(value: Any) -> str:
    return ", ".join(map(_line, value)) if isinstance(value, list) and value else "unknown"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else "unknown"


def _is_hub_id(name: str) -> bool:
    """Return whether a name is a valid Hub id of the form owner/name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name
