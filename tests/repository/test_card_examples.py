"""The examples of model cards: what the Hub reads from them, and what a reader of them needs."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt
from support.card_rules import card_errors
from support.hub_client import run_client
from support.loopback_hub import LoopbackHub, hub_env

EXAMPLES = Path(__file__).parents[2] / "impart_hf" / "model_cards" / "examples"
NAMES = ("delta", "exact", "lora", "merged", "pruned")
RELATION = {"delta": "finetune", "exact": "finetune", "lora": "adapter", "pruned": "finetune"}
every_example = pytest.mark.parametrize("name", NAMES)

_VALIDATE = """
import json, sys
from huggingface_hub import ModelCard
answers = {}
for path in sys.argv[1:]:
    try:
        ModelCard.load(path).validate()
        answers[path] = ""
    except ValueError as error:
        answers[path] = str(error)
print(json.dumps(answers))
"""


def test_there_is_an_example_of_every_kind() -> None:
    assert sorted(path.name for path in EXAMPLES.iterdir()) == sorted(NAMES)


@every_example
def test_the_hubs_client_reads_the_metadata(name: str) -> None:
    card = ModelCard.load(EXAMPLES / name / "README.md")
    data: dict[str, Any] = card.data.to_dict()
    assert data["library_name"] == ("peft" if name == "lora" else "transformers")
    assert data["pipeline_tag"] == "text-generation" and "impart-hf" in data["tags"]
    assert data.get("base_model_relation") == RELATION.get(name)
    assert ("base_model" in data) == (name in RELATION)  # all models of the merge are folders
    if "model-index" in data:
        _, results = model_index_to_eval_results(data["model-index"])
        assert results
    written = yaml.safe_load(str(card).split("---")[1])
    assert ModelCard(str(card)).data.to_dict() == data and written.keys() == data.keys()


@every_example
def test_a_card_shows_no_folder_and_links_to_what_is_there(name: str) -> None:
    text = (EXAMPLES / name / "README.md").read_text()
    assert not re.search(r"(?<![\w.:/])/\w+/", text), "a path from the root"
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (EXAMPLES / name / target).is_file(), target
    assert "{{" not in text and "None" not in re.sub(r"max_rank None", "", text)


@every_example
def test_the_markdown_of_a_card_is_whole(name: str) -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard.load(EXAMPLES / name / "README.md").content)
    blocks = {token.info: token.content for token in tokens if token.type == "fence"}
    ast.parse(blocks["python"])
    assert "from_pretrained(" in blocks["python"]
    assert tokens[[token.type for token in tokens].index("heading_open")].tag in ("h1", "h2")
    for token in tokens:
        assert token.type != "inline" or "|---" not in token.content, "a table that is none, for want of an empty line"


@pytest.mark.process
def test_the_hubs_validator_takes_every_example(tmp_path: Path) -> None:
    bad = tmp_path / "bad.md"
    bad.write_text("---\nbase_model: /home/me/base\nlicense: mine\n---\n# A card\n")
    paths = [*(EXAMPLES / name / "README.md" for name in NAMES), bad]
    with LoopbackHub(tmp_path / "hub") as hub:
        answers = run_client(_VALIDATE, hub_env(hub, tmp_path), *map(str, paths))
        assert [path for _, path in hub.requests].count("/api/validate-yaml") == len(paths)
    refused = json.loads(answers.pop(str(bad)))
    assert [error["message"].split('"')[1] for error in refused["errors"]] == ["license", "base_model"]
    assert not any(answers.values()), answers


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ("tags: 5", "tags"),
        ("- a list", "mapping"),
        ("a: [", "YAML"),
        ("pipeline_tag: talking", "pipeline_tag"),
        ("base_model: a/b\nbase_model_relation: child", "base_model_relation"),
        ("base_model_relation: merge", "base_model"),
        ("license: other", "license_name"),
        ("language: English", "language"),
        (
            "model-index:\n- name: x\n  results:\n  - task: {type: text-generation}\n    metrics: [{type: acc}]",
            "dataset",
        ),
    ],
)
def test_the_rules_of_the_loopback_hub_refuse(metadata: str, named: str) -> None:
    assert named in "\n".join(card_errors(f"---\n{metadata}\n---\n# A card\n"))
