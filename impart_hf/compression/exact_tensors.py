"""Storing tensors exactly: their records in a workspace."""

import torch

from ..coding.exact_encoder import encode_exact
from ..common import processes
from ..storage.workspace import Workspace
from .pair import ModelPair
from .scan import TensorPlan, order_to_take
from .stages import STORING


def store_exactly(tensors: list[TensorPlan], pair: ModelPair, workspace: Workspace) -> None:
    """Put the exact records of tensors into a workspace; the processes of a job share them out.

    A tensor whose record is stored is skipped.
    """
    if not tensors:
        return
    done = sum(tensor.dense_bytes for tensor in tensors if workspace.has_record(tensor.name))

    def store() -> None:
        for tensor in order_to_take(tensors):
            if workspace.has_record(tensor.name):
                continue
            bar.show(tensor.name)
            if workspace.take("records", tensor.name):
                workspace.put_record(tensor.name, encode_exact(*shared_parts(tensor, pair)), {})
            bar.update(tensor.dense_bytes)

    with pair.progress.bar(sum(tensor.dense_bytes for tensor in tensors), STORING, done) as bar:
        processes.each(store)


def shared_parts(tensor: TensorPlan, pair: ModelPair) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a tensor of the base, and the part of the fine-tuned one that it shares."""
    before, after = pair.base.tensor(tensor.name), pair.finetuned.tensor(tensor.name)
    return before, after[: len(before)] if tensor.added_rows else after
