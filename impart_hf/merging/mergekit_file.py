"""The forms in which mergekit's files say the same thing, brought into one: models, and settings of the whole merge.

The files on model cards give one slice over all layers in the place of `models`, a model as a mapping in the place of
its name, `tokenizer` in the place of `tokenizer_source`. What a merge cannot do is named before anything is read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

KEYS = (
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "name",
)  # fmt: skip
_SLICE_KEYS = ("sources", "base_model", "parameters")


def plain_form(content: Any) -> dict[str, Any]:
    """Return the content of a mergekit file in one form.

    Args:
        content: what YAML reads from the file.

    Returns:
        the keys `merge_method`, `base_model`, `models`, `parameters`, `dtype`, `tokenizer_source`, `chat_template`,
        where given, and `layers`, the number of layers that slices cover. Models are strings.

    Raises:
        ValueError: if the file asks for something that a merge cannot do, or has an unknown key. One error names all of
            `modules`, several slices and fields of `tokenizer`; anything else is an error by itself.
    """
    if not isinstance(content, Mapping):
        raise ValueError("the configuration must map keys to values, such as `merge_method: ties`")
    given = {key: value for key, value in content.items() if value is not None}
    if beyond := _beyond_a_merge(given):
        raise ValueError(f"impart-hf does not support {'; nor '.join(beyond)}: change the file, or use mergekit")
    if unknown := [key for key in content if key not in KEYS]:
        raise ValueError(f"unknown key {unknown[0]!r}; choose one of {', '.join(KEYS)}")
    plain = {key: given[key] for key in ("merge_method", "parameters", "chat_template") if given.get(key)}
    if dtype := given.get("out_dtype") or given.get("dtype"):
        plain["dtype"] = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    if base := given.get("base_model"):
        plain["base_model"] = model_name(base)
    if given.get("slices") and given.get("models"):
        raise ValueError("slices and models say the same: leave one out")
    if given.get("slices"):
        plain |= _whole_slice(given["slices"][0], plain)
    elif given.get("models"):
        plain |= _models(given["models"])
    if source := _tokenizer_source(given):
        plain["tokenizer_source"] = source
    return plain


def model_name(reference: Any) -> Any:
    """Return one name of a model, `PATH`, `PATH@REVISION` or `PATH+ADAPTER`, for any of mergekit's ways to write it.

    Args:
        reference: a string, `{path: …, revision: …}` or `{model: …, lora: …}`; anything else is returned as it is.
    """
    if not isinstance(reference, Mapping):
        return reference
    fields = {key: value for key, value in reference.items() if value is not None}
    if fields.keys() <= {"path", "revision"} and isinstance(fields.get("path"), str):
        return f"{fields['path']}@{fields['revision']}" if "revision" in fields else fields["path"]
    if fields.keys() <= {"model", "lora"} and "model" in fields:
        names = [model_name(fields[key]) for key in ("model", "lora") if key in fields]
        if all(isinstance(name, str) for name in names):
            return "+".join(names)
    return reference


def _beyond_a_merge(given: Mapping[str, Any]) -> list[str]:
    """Return what the file asks for that a merge cannot do."""
    beyond = []
    if "modules" in given:
        beyond.append("`modules` (parts of a model that are merged in different ways)")
    tokenizer = given.get("tokenizer")
    if isinstance(tokenizer, Mapping):
        beyond += [f"`{key}` of `tokenizer`" for key, value in tokenizer.items() if key != "source" and value]
    slices = given.get("slices")
    if isinstance(slices, list | tuple) and len(slices) > 1:
        beyond.append(f"`slices` of parts of the layers (there are {len(slices)}; only one, over all layers)")
    elif isinstance(slices, list | tuple) and slices and isinstance(slices[0], Mapping) and "sources" in slices[0]:
        beyond += [f"`{key}` of a slice" for key in slices[0] if key not in _SLICE_KEYS]
    return beyond


def _whole_slice(slice_: Any, plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that replace one slice over all layers.

    Args:
        plain: the file's other entries.
    """
    sources = slice_.get("sources") if isinstance(slice_, Mapping) else None
    if not isinstance(sources, list | tuple) or not all(isinstance(source, Mapping) for source in sources):
        raise ValueError(f"slices must be a list with one entry `sources: [model: …, …]`, got {slice_!r:.200}")
    if not all(source.get("layer_range") for source in sources):
        raise ValueError("slices: each source needs `layer_range: [0, N]`, where N is the number of layers")
    entries = _models(sources)
    base = model_name(slice_.get("base_model")) or plain.get("base_model")
    if plain.get("base_model") not in (None, base):
        raise ValueError(f"slices: base_model is '{base}' in the slice and '{plain['base_model']}' outside: choose one")
    own, shared = slice_.get("parameters") or {}, plain.get("parameters") or {}
    if isinstance(own, Mapping) and isinstance(shared, Mapping):
        own = {**shared, **{name: _first(setting, shared.get(name)) for name, setting in own.items()}}
    return {**entries, **({"base_model": base} if base else {}), **({"parameters": own} if own else {})}


def _first(setting: Any, fallback: Any) -> Any:
    """Return one setting that has the value of another for tensors that the first has no value for."""
    conditions, others = ([s] if isinstance(s, Mapping) else s for s in (setting, fallback))
    if fallback is None or not isinstance(conditions, list) or not any(isinstance(c, Mapping) for c in conditions):
        return setting
    filters = isinstance(others, list) and any(isinstance(other, Mapping) for other in others)
    return [*conditions, *(others if filters else [{"value": fallback}])]


def _models(entries: Any) -> dict[str, Any]:
    """Return the entry `models` with plain names, and `layers` if the models have ranges of layers."""
    if not isinstance(entries, list | tuple):
        raise ValueError(f"models must be a list of `model: …`, got {entries!r}")
    ranges = [e["layer_range"] for e in entries if isinstance(e, Mapping) and e.get("layer_range") is not None]
    if not ranges:
        return {"models": [_plain_entry(entry) for entry in entries]}
    for layers in ranges:
        whole = isinstance(layers, Sequence) and len(layers) == 2 and all(type(end) is int for end in layers)
        if not whole or layers[0] != 0 or layers != ranges[0]:
            raise ValueError(
                f"layer_range {layers!r:.80} is not all layers of each model, and impart-hf does not merge parts: give "
                "each `[0, N]`, where N is the number of layers"
            )
    return {"models": [_plain_entry(entry) for entry in entries], "layers": ranges[0][1]}


def _plain_entry(entry: Any) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    fields = {key: value for key, value in entry.items() if key != "layer_range"}
    return {**fields, "model": model_name(fields["model"])} if "model" in fields else fields


def _tokenizer_source(given: Mapping[str, Any]) -> Any:
    if "tokenizer" not in given:
        return model_name(given.get("tokenizer_source"))
    if "tokenizer_source" in given:
        raise ValueError("tokenizer and tokenizer_source say the same: leave one out")
    if not isinstance(given["tokenizer"], Mapping):
        raise ValueError(f"tokenizer must be `source: …`, got {given['tokenizer']!r:.80}")
    return model_name(given["tokenizer"].get("source")) or "union"
