"""A backend of vLLM's weight transfer: a trainer names the delta of its last step, and the engine loads it.

The trainer writes a delta against the engine's base where the engine can read it, and says where that is:

    llm = LLM(BASE, weight_transfer_config={"backend": "impart_hf"})
    llm.start_weight_update()
    llm.update_weights({"update_info": {"delta": "/steps/17"}})
    llm.finish_weight_update()
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from .deltas import CheckedDelta, DeltaChecker
from .worker import served_weights


class WeightUpdateError(RuntimeError):
    """A delta that was not loaded; the message says whether the engine has the old weights."""


@dataclass
class DeltaInitInfo(WeightTransferInitInfo):
    """What trainer and engine agree on at the start: nothing, as they share only files."""


@dataclass
class DeltaUpdateInfo(WeightTransferUpdateInfo):
    """The delta to load.

    Attributes:
        delta: folder or Hub id of a delta repository on the engine's base; None for the base's own weights.
        revision: branch, tag or commit on the Hub.
    """

    delta: str | None
    revision: str | None = None


class DeltaTransferEngine(WeightTransferEngine[DeltaInitInfo, DeltaUpdateInfo]):
    """Loads deltas as a swap does: what differs from the present weights, all of it or nothing."""

    init_info_cls = DeltaInitInfo
    update_info_cls = DeltaUpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module
    ):
        """Set up updates for one worker's model.

        Raises:
            ValueError: if the engine has several workers.
        """
        super().__init__(config, vllm_config, device, model)
        if self.parallel_config.world_size > 1:
            # vLLM's executor stops reading answers at the first error. The others' answers would be taken for those to
            # its next call.
            raise ValueError(
                "weight transfer of deltas needs an engine of one worker, because vLLM cannot report an error of "
                "several: swap deltas (impart_hf.serving.DeltaSwitch)"
            )

    @cached_property
    def _checker(self) -> DeltaChecker:
        return DeltaChecker(self.vllm_config, decodes_ahead=False)

    def init_transfer_engine(self, init_info: DeltaInitInfo) -> None:
        """Read the engine's files, so that an engine that cannot load deltas says so now; errors of `DeltaChecker`."""
        _ = self._checker

    def start_weight_update(self) -> None:
        """Do nothing: an update is complete in itself."""

    def finish_weight_update(self) -> None:
        """Do nothing: an update is complete in itself."""

    def receive_weights(self, update_info: DeltaUpdateInfo) -> None:
        """Check a delta, and load it.

        Raises:
            CheckpointError, DeltaFormatError, WrongBaseError, DeltaRefusedError: as `DeltaChecker.check`, before the
                engine is touched.
            WeightUpdateError: if loading failed.
        """
        checked: CheckedDelta = self._checker.check(update_info.delta, update_info.revision)
        answer = served_weights(self.vllm_config, self.model, self.device).load(checked.repo, checked.revision, None)
        if answer["error"]:
            state = "the old weights are back" if answer["sound"] else f"the old weights are lost: {answer['undoing']}"
            raise WeightUpdateError(f"'{checked.repo or 'the base'}' could not be loaded: {answer['error']}; {state}")

    def shutdown(self) -> None:
        """Do nothing: there is no connection."""
