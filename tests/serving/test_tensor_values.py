"""What tells the values of tensors: equal for the same values on the same base, other wherever a tensor differs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.tiny_models import fine_tune, load_tensors, make_model, save_model, tiny_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from impart_hf import ExactConfig, LowRankConfig, compress
from impart_hf.modeling.checkpoints import Checkpoint
from impart_hf.modeling.delta_repository import WrongBaseError
from impart_hf.modeling.model_files import HubOptions
from impart_hf.repository.open import open_repository
from impart_hf.serving.engine_base import checksums_of_base
from impart_hf.serving.tensor_values import Values, base_values, delta_values

LAYER = "model.layers.1.self_attn.k_proj.weight"
NORM = "model.norm.weight"


class Family:
    """A base in a folder, and fine-tunes of it as deltas."""

    def __init__(self, folder: Path, kind: str = "llama"):
        self.folder = folder
        self.model = make_model(tiny_config(kind), dtype=torch.bfloat16)
        save_model(self.model, folder / "base")

    def delta(self, name: str, tuned: PreTrainedModel, method: object = None) -> Values:
        save_model(tuned, self.folder / f"{name}-dense")
        compress(
            str(self.folder / "base"), str(self.folder / f"{name}-dense"), self.folder / name, method or ExactConfig()
        )
        return self.values(name)

    def values(self, name: str) -> Values:
        return delta_values(open_repository(str(self.folder / name), HubOptions()))

    def base(self, known: str) -> Values:
        """Those of the base itself, as far as a delta tells them."""
        repository = open_repository(str(self.folder / known), HubOptions())
        return base_values(Checkpoint(str(self.folder / "base"), HubOptions()), checksums_of_base(repository))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    family = Family(tmp_path_factory.mktemp("values"))
    one = fine_tune(family.model, 1, only=lambda name: name in (LAYER, "lm_head.weight"))
    family.delta("one", one)
    family.delta("two", fine_tune(one, 2, only=lambda name: name in (LAYER, NORM)))
    family.delta("lossy", one, LowRankConfig(compression_ratio=3))
    return family


def differing(before: Values, after: Values) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in after if before[name] != after[name]}


def really_differing(family: Family, before: str, after: str) -> set[str]:
    old, new = (load_tensors(family.folder / name) for name in (before, after))
    return {name for name in new if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize("after", ["one", "two"])
@pytest.mark.parametrize("before", ["base", "one", "two"])
def test_exact_deltas_and_the_base(family: Family, before: str, after: str) -> None:
    """What differs is exactly what differs."""
    old = family.base("lossy") if before == "base" else family.values(before)
    dense = "base" if before == "base" else f"{before}-dense"
    assert differing(old, family.values(after)) == really_differing(family, dense, f"{after}-dense")


def test_a_record_is_not_what_it_approximates(family: Family) -> None:
    assert differing(family.values("one"), family.values("lossy")) == {LAYER, "lm_head.weight"}
    assert not differing(family.values("lossy"), family.values("lossy"))


def test_nothing_is_known_without_checksums(family: Family) -> None:
    assert not base_values(Checkpoint(str(family.folder / "base"), HubOptions()), {})


def test_changes_that_cancel_in_the_checksum(family: Family) -> None:
    """Sums of rows and columns do not see that two words grow and two shrink crosswise; the record's CRC does."""
    tuned = fine_tune(family.model, 3, only=lambda name: name == "lm_head.weight")
    before = family.delta("before", tuned)["lm_head.weight"]
    words = tuned.lm_head.weight.data.view(torch.int64).view(-1)
    words[[0, 1, 1024, 1025]] += torch.tensor([1, -1, -1, 1])
    after = family.delta("after", tuned)["lm_head.weight"]
    assert before.exact == after.exact is not None
    assert before != after


def test_added_rows(tmp_path: Path) -> None:
    family = Family(tmp_path)
    rows = family.model.config.vocab_size + 3
    tuned = fine_tune(family.model, 1, only=lambda name: "embed" in name)
    tuned.resize_token_embeddings(rows)
    one = family.delta("one", tuned)
    with torch.no_grad():
        tuned.get_input_embeddings().weight[-1, 0] += 1
    two = family.delta("two", tuned)
    assert one["model.embed_tokens.weight"].exact == two["model.embed_tokens.weight"].exact is not None
    assert differing(one, two) == {"model.embed_tokens.weight"}


def test_tied_embeddings(tmp_path: Path) -> None:
    family = Family(tmp_path, "llama-tied")
    one = family.delta("one", fine_tune(family.model, 1, only=lambda name: "embed" in name))
    assert differing(family.base("one"), one) == {"model.embed_tokens.weight"}


def test_only_dtypes_differ(tmp_path: Path) -> None:
    """Values that are published in a wider dtype are loaded again."""
    family = Family(tmp_path)
    tuned = fine_tune(family.model, 1, only=lambda name: name == LAYER)
    narrow = family.delta("narrow", tuned)
    assert differing(narrow, family.delta("wide", tuned.float())) == set(narrow)


def test_deltas_on_deltas(family: Family) -> None:
    """What a link leaves unchanged is what it rests on, and the same values in other records are not known to be."""
    compress(str(family.folder / "one"), str(family.folder / "two-dense"), family.folder / "link", ExactConfig())
    link = family.values("link")
    assert differing(family.values("one"), link) == {LAYER, NORM}
    assert differing(family.values("two"), link) == {LAYER}  # the base's norm is the first link's
    assert differing(family.base("lossy"), link) == {LAYER, NORM, "lm_head.weight"}
    assert not differing(link, family.values("link"))


def test_a_link_whose_base_was_written_again(family: Family, tmp_path: Path) -> None:
    """It is not told as what is there now: loading it is an error."""
    shutil.copytree(family.folder / "one", tmp_path / "below")
    one = AutoModelForCausalLM.from_pretrained(family.folder / "one-dense")
    save_model(fine_tune(one, 9, only=lambda name: name == NORM), tmp_path / "dense")
    compress(str(tmp_path / "below"), str(tmp_path / "dense"), tmp_path / "link", ExactConfig())
    shutil.rmtree(tmp_path / "below")
    shutil.copytree(family.folder / "two", tmp_path / "below")
    link = open_repository(str(tmp_path / "link"), HubOptions())
    assert {LAYER, NORM} == differing(family.values("two"), delta_values(link))
    assert {LAYER, NORM} == differing(family.values("one"), delta_values(link))
    with pytest.raises(WrongBaseError):
        link.tensor(LAYER)
