"""What the Hub's documentation says of a model card's metadata, for the loopback Hub.

The Hub's own rules are on its server (POST /api/validate-yaml) and are not public as code. These are the ones that
huggingface.co/docs/hub/model-cards and its specification (modelcard.md) describe, as far as impart-hf's cards can break
them; a card that passes here may still be refused there.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

RELATIONS = {"finetune", "adapter", "merge", "quantized"}
TASKS = set(
    "text-generation text-classification image-text-to-text token-classification question-answering summarization "
    "translation feature-extraction fill-mask automatic-speech-recognition text-to-image any-to-any".split()
)
LICENSES = set(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl "
    "gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr "
    "mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr "
    "deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 "
    "grok2-community gemma unknown other".split()
)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[\w.-]{1,96})?")
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[A-Za-z]+)?|code|multilingual")


def card_errors(content: str) -> list[str]:
    """What is wrong with the metadata of a README.md, one line each."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---(?:\r?\n|$)", content, re.DOTALL)
    if not match:
        return []  # a card without metadata
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"the metadata is not YAML: {error}"]
    if data is None:
        return []
    return _errors(data) if isinstance(data, dict) else ["the metadata is not a mapping"]


def _errors(data: dict[str, Any]) -> list[str]:
    found = []
    for key in ("tags", "datasets", "metrics", "language", "base_model", "license"):
        values = data.get(key, [])
        if not isinstance(values, (str, list)) or not all(isinstance(value, str) for value in values):
            found.append(f'"{key}" must be a string or a list of strings')
            data = {**data, key: []}
    for key in ("library_name", "pipeline_tag", "base_model_relation", "license_name", "license_link"):
        if not isinstance(data.get(key, ""), str):
            found.append(f'"{key}" must be a string')
            data = {**data, key: ""}
    rules: dict[str, Any] = {
        "license": LICENSES.__contains__,
        "pipeline_tag": TASKS.__contains__,
        "base_model_relation": RELATIONS.__contains__,
        "base_model": _REPO_ID.fullmatch,
        "datasets": _REPO_ID.fullmatch,
        "language": _LANGUAGE.fullmatch,
    }
    for key, rule in rules.items():
        found += [f'"{key}" cannot be {value!r}' for value in _listed(data.get(key)) if not rule(value)]
    if data.get("license") == "other" and not (data.get("license_name") and data.get("license_link")):
        found.append('"license: other" needs "license_name" and "license_link"')
    if data.get("base_model_relation") and not data.get("base_model"):
        found.append('"base_model_relation" needs "base_model"')
    return found + _index_errors(data.get("model-index", []))


def _listed(value: Any) -> list[Any]:
    return [] if not value else [value] if isinstance(value, str) else value


def _index_errors(index: Any) -> list[str]:
    """Whether every result of a model-index has its task, data set and metrics."""
    if not isinstance(index, list):
        return ['"model-index" must be a list']
    found = []
    for number, entry in enumerate(index):
        place = f"model-index[{number}]"
        if not (isinstance(entry, dict) and isinstance(entry.get("name"), str)):
            found.append(f'"{place}.name" is required')
            continue
        for result in entry.get("results", [{}]):
            if not result.get("task", {}).get("type"):
                found.append(f'"{place}.results.task.type" is required')
            for key in ("type", "name"):
                if not result.get("dataset", {}).get(key):
                    found.append(f'"{place}.results.dataset.{key}" is required')
            for metric in result.get("metrics", [{}]):
                found += [f'"{place}.results.metrics.{k}" is required' for k in ("type", "value") if k not in metric]
    return found
