"""An engine and chains of deltas, as far as no engine is needed: what its base is, and which deltas rest on it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.chains import chain_of, checkpoints
from support.messages import naming
from support.tiny_models import make_model, save_model, tiny_config

from impart_hf import ExactConfig, compress
from impart_hf.modeling.delta_repository import WrongBaseError
from impart_hf.modeling.model_files import CheckpointError
from impart_hf.repository.open import refuse_chain
from impart_hf.serving.engine_base import EngineBase, base_config, checksums_of_base
from impart_hf.serving.engine_files import EngineFiles


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    """A model with three checkpoints of its training, and their deltas; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    models = checkpoints(folder, 3)
    return models, chain_of(folder, models)


def engine_on(model: Path) -> tuple[EngineFiles, EngineBase]:
    """The files and the base of an engine that was started on a model."""
    options: Any = SimpleNamespace(
        model_config=SimpleNamespace(model=str(model), revision=None, hf_token=None),
        load_config=SimpleNamespace(download_dir=None),
    )
    files = EngineFiles(options)
    checksums = checksums_of_base(files.open_model()) if files.is_delta else {}
    return files, EngineBase(str(files.base), base_config(files.base), checksums)


@pytest.mark.parametrize("started_on", ["the base", "the first delta", "the last delta"])
def test_links_rest_on_the_first_base(started_on: str, trained: tuple[list[Path], list[Path]]) -> None:
    models, deltas = trained
    place = {"the base": models[0], "the first delta": deltas[0], "the last delta": deltas[2]}[started_on]
    files, base = engine_on(place)
    assert files.base == models[0]
    for number in (2, 0, 1):
        repository = base.open_delta(files, str(deltas[number]), None)
        assert len(repository.chain) == number + 1 and repository.chain[-1].base.folder == models[0]


def test_chain_of_another_base(trained: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    other = save_model(make_model(tiny_config("llama"), seed=9), tmp_path / "other")
    compress(str(other), str(trained[0][1]), tmp_path / "first", ExactConfig())
    compress(str(tmp_path / "first"), str(trained[0][2]), tmp_path / "second", ExactConfig())
    for place in (trained[0][0], trained[1][2]):
        files, base = engine_on(place)
        with pytest.raises(WrongBaseError, match=naming(str(trained[0][0]))):
            base.open_delta(files, str(tmp_path / "second"), None)


def test_no_part_of_a_batch(trained: tuple[list[Path], list[Path]]) -> None:
    """Adapters, packed or not, add a delta to the engine's base."""
    files, base = engine_on(trained[0][0])
    refuse_chain(base.open_delta(files, str(trained[1][0]), None))
    with pytest.raises(CheckpointError, match=naming(str(trained[1][1]), str(trained[1][0]), "impart-hf flatten")):
        refuse_chain(base.open_delta(files, str(trained[1][1]), None))
