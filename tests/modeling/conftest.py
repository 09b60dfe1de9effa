"""Fixtures that several test modules of the reader use."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from support.pruned_models import FAMILIES, pruned_and_dense
from support.tiny_models import save_model
from transformers import PreTrainedModel


@pytest.fixture(scope="module")
def shared_models() -> tuple[PreTrainedModel, PreTrainedModel]:
    return pruned_and_dense()


@pytest.fixture
def models(shared_models: tuple[PreTrainedModel, PreTrainedModel]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A pruned model and its dense oracle, to be used up."""
    return copy.deepcopy(shared_models)


@pytest.fixture(scope="session")
def models_by_family() -> dict[str, tuple[PreTrainedModel, PreTrainedModel]]:
    """For every family a pruned model and its dense oracle, not to be changed."""
    return {family: pruned_and_dense(family=family) for family in FAMILIES}


@pytest.fixture(params=list(FAMILIES)[1:])
def family_models(
    request: pytest.FixtureRequest, models_by_family: dict[str, tuple[PreTrainedModel, PreTrainedModel]]
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """As `models`, of each family but LLaMA."""
    return copy.deepcopy(models_by_family[request.param])


@pytest.fixture(scope="module")
def saved(shared_models: tuple[PreTrainedModel, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pruned model's checkpoint, not to be written to."""
    return save_model(shared_models[0], tmp_path_factory.mktemp("saved") / "pruned")
