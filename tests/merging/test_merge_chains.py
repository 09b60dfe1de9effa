"""A delta whose base is a delta, merged: the merge's base is the first base."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.chains import chain_of, checkpoints
from support.messages import naming
from support.tiny_models import load_tensors

from impart_hf import MergeConfig, MergeModel, merge
from impart_hf.modeling.model_files import CheckpointError


def test_merge_of_a_chain(tmp_path: Path) -> None:
    models = checkpoints(tmp_path, 2)
    deltas = chain_of(tmp_path, models)
    merged = []
    for name, finetune in (("dense", models[2]), ("delta", deltas[1])):
        inputs = [MergeModel(str(finetune)), MergeModel(str(deltas[0]))]
        merge(MergeConfig("task_arithmetic", str(models[0]), inputs), tmp_path / name)
        merged.append(load_tensors(tmp_path / name))
    assert merged[0].keys() == merged[1].keys()
    assert all(merged[0][key].equal(merged[1][key]) for key in merged[0])
    config = MergeConfig("task_arithmetic", str(deltas[0]), [MergeModel(str(deltas[1]))])
    with pytest.raises(CheckpointError, match=naming(str(deltas[0]), "impart-hf reconstruct")):
        merge(config, tmp_path / "on a delta")
