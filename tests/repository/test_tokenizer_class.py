"""What is made from a model splits text as the model does, also where transformers knows better than its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.pruned_models import dense_config
from support.pruning_reports import made_up_importance
from support.tiny_models import edit_json, fine_tune, make_model, save_model
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from impart_hf import LowRankConfig, compress
from impart_hf.modeling.model_files import HubOptions
from impart_hf.pruning import prune_width
from impart_hf.repository.open import open_repository
from impart_hf.repository.reconstruct import reconstruct

TEXT = "A model  is 12345 bases,\n\nand it's its Difference."
# As in released models: files that name a class which is not that of their tokenizer.json
WRONG_CLASSES = {"qwen2": "LlamaTokenizerFast", "phi3": "GPT2Tokenizer"}


def ids(folder: Path) -> list[int]:
    return AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False)["input_ids"]


def save(folder: Path, model: torch.nn.Module, family: str) -> Path:
    save_model(model, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = pre_tokenizers.Split(Regex(r"\p{N}|[^\s\p{N}]+|\s+"), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    tokenizer.save(str(folder / "tokenizer.json"))
    edit_json(folder / "tokenizer_config.json", tokenizer_class=WRONG_CLASSES[family])
    return folder


@pytest.mark.parametrize("family", WRONG_CLASSES)
def test_a_class_that_transformers_corrects(family: str, tmp_path: Path) -> None:
    base = make_model(dense_config(family=family))
    model, tuned = save(tmp_path / "model", base, family), save(tmp_path / "tuned", fine_tune(base), family)
    expected = ids(model)
    prune_width(str(model), tmp_path / "narrow", made_up_importance(model), ratio=0.3, progress=False)
    compress(str(model), str(tuned), tmp_path / "delta", LowRankConfig(compression_ratio=3))
    reconstruct(open_repository(str(tmp_path / "delta"), HubOptions()), tmp_path / "dense")
    for name in ("narrow", "delta", "dense"):
        assert ids(tmp_path / name) == expected, name
    settings = json.loads((tmp_path / "narrow" / "tokenizer_config.json").read_text("utf-8"))
    edit_json(tmp_path / "narrow" / "tokenizer_config.json", tokenizer_class=WRONG_CLASSES[family])
    assert ids(tmp_path / "narrow") != expected, "by what the model's file says, it would be another"
    assert settings["tokenizer_class"] != WRONG_CLASSES[family]


def test_a_model_without_a_tokenizer_gets_none(tmp_path: Path) -> None:
    """transformers makes an empty one of a Qwen 2 without files."""
    model = make_model(dense_config(family="qwen2"))
    model.save_pretrained(tmp_path / "model")
    prune_width(
        str(tmp_path / "model"), tmp_path / "narrow", made_up_importance(tmp_path / "model"), ratio=0.3, progress=False
    )
    assert not list((tmp_path / "narrow").glob("tokenizer*"))
