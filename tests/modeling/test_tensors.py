"""A checkpoint, a delta repository and a merge are read in the same way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_models import Pair, load_tensors

from impart_hf import MergeConfig, MergeModel
from impart_hf.merging.inputs import MergeInputs
from impart_hf.merging.merge import Merge
from impart_hf.modeling.checkpoints import Checkpoint
from impart_hf.modeling.model_files import HubOptions
from impart_hf.modeling.tensors import LazyTensor, Tensors
from impart_hf.repository.open import open_repository
from impart_hf.storage.checkpoint_writer import dense_tensors


def checkpoint(pair: Pair, repository: Path) -> Tensors:
    return Checkpoint(str(pair.finetuned), HubOptions())


def delta_repository(pair: Pair, repository: Path) -> Tensors:
    return open_repository(str(repository), HubOptions())


def merge(pair: Pair, repository: Path) -> Tensors:
    config = MergeConfig("task_arithmetic", str(pair.base), (MergeModel(str(pair.finetuned)),))
    return Merge(config, MergeInputs(config), torch.device("cpu"))


@pytest.mark.parametrize("kind", [checkpoint, delta_repository, merge])
def test_tensors(tiny_pair: Pair, tiny_repository: Path, kind: Callable[[Pair, Path], Tensors]) -> None:
    tensors = kind(tiny_pair, tiny_repository)
    assert tensors.source
    assert tensors.names() == sorted(load_tensors(tiny_pair.finetuned))
    for name, dense in zip(tensors.names(), dense_tensors(tensors), strict=True):
        tensor, lazy = tensors.tensor(name), LazyTensor(tensors, name)
        assert tensors.shape(name) == tuple(lazy.get_shape()) == dense.shape == tuple(tensor.shape)
        assert tensors.dtype(name) == lazy.dtype == dense.dtype == tensor.dtype
        assert torch.equal(lazy[:1], tensor[:1]) and torch.equal(dense.make(), tensor)
