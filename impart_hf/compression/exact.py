"""Compression with method `exact`: every changed tensor as an exact record."""

import time

from ..common import processes
from ..common.version import __version__
from ..methods import ExactConfig
from ..repository.report import CompressionReport
from ..storage.workspace import Workspace
from .exact_tensors import store_exactly
from .pair import ModelPair
from .pipeline import stored_scan, write_and_publish
from .plan import exact_plan
from .stages import EXACT_STAGES
from .writer import card_bytes, json_bytes, repository_config


def compress_exactly(pair: ModelPair, workspace: Workspace, max_shard_size: int, origin: str = "") -> CompressionReport:
    """Store the changes of a pair, all of whose tensors are exact, in a workspace, and publish it.

    The processes of a job share the tensors out.

    Args:
        max_shard_size: a larger delta file, in bytes, is split.
        origin: where the fine-tune comes from, as for `delta_card`.
    """
    started = time.perf_counter()
    state = processes.in_first(pair.state)
    tensors = stored_scan(pair, workspace, state, EXACT_STAGES)
    config = repository_config(pair, ExactConfig().to_dict())
    card = card_bytes(pair, config, {}, origin)
    plan = exact_plan(tensors, pair.finetuned.weight_bytes, json_bytes(config), card, max_shard_size)
    kept = sum(path.stat().st_size for path in pair.companions.files.values())
    workspace.begin(plan.fingerprint(ExactConfig(), __version__), plan.allowed_bytes + plan.fixed_bytes, kept)
    processes.in_first(lambda: workspace.put_scan(state, [tensor.to_dict() for tensor in tensors]))
    store_exactly(plan.exact, pair, workspace)
    return write_and_publish(pair, workspace, plan, config, started, origin=origin)
