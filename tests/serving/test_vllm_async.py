"""Swaps of vLLM's asynchronous engine, whose callers come and go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.vllm_engines import PROMPTS, EngineProcess

pytestmark = pytest.mark.vllm


@pytest.fixture
def process(tmp_path: Path) -> Iterator[EngineProcess]:
    with EngineProcess(VLLM_ENABLE_V1_MULTIPROCESSING="1", IMPART_HF_SCRATCH=str(tmp_path)) as process:
        yield process


def test_swaps_whose_callers_go(
    process: EngineProcess, family: Path, family_tokens: dict[str, list[list[int]]]
) -> None:
    """A swap is brought to its end without its caller, and none begins meanwhile."""
    says = {str(tokens[0]): name for name, tokens in family_tokens.items()}
    said = process.run(swap_without_callers, family)
    assert [says.get(str(tokens), tokens) for tokens in said] == ["one", "two", "two", "one"]


def swap_without_callers(holder: Any, family: Path) -> list[list[int]]:
    """What the engine says after each of some swaps."""
    return asyncio.run(_swap_without_callers(family))


async def _swap_without_callers(family: Path) -> list[list[int]]:
    from unittest.mock import patch

    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from impart_hf.serving import AsyncDeltaSwitch
    from impart_hf.serving.deltas import DeltaChecker
    from impart_hf.serving.swap import SwapInProgressError

    arguments = AsyncEngineArgs(str(family / "base"), dtype="float32", enforce_eager=True, max_model_len=128)
    engine = AsyncLLM.from_engine_args(arguments)
    deltas, numbers, found = AsyncDeltaSwitch(engine), iter(range(99)), []

    async def tokens(prompt: list[int], count: int = 8) -> list[int]:
        wanted = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        outputs = [o async for o in engine.generate({"prompt_token_ids": prompt}, wanted, f"{next(numbers)}")]
        return list(outputs[-1].outputs[0].token_ids)

    async def ended(swap: asyncio.Task) -> None:
        with pytest.raises(asyncio.CancelledError):
            await swap
        while deltas.swapping:
            await asyncio.sleep(0.05)

    check, go_on = DeltaChecker.check, threading.Event()

    def slow_check(*options: Any) -> Any:
        assert go_on.wait(60)
        return check(*options)

    with patch.object(DeltaChecker, "check", slow_check):  # as slow as a download
        swap = asyncio.create_task(deltas.load(str(family / "one")))
        await asyncio.sleep(0.1)
        swap.cancel()
        await asyncio.sleep(0.1)
        with pytest.raises(SwapInProgressError):
            await deltas.load(str(family / "two"))
        go_on.set()
        await ended(swap)
    found.append(await tokens(PROMPTS[0]))

    long = asyncio.create_task(tokens(PROMPTS[1], 100))  # the swap waits for it
    await asyncio.sleep(0.05)
    swap = asyncio.create_task(deltas.load(str(family / "two")))
    for _ in range(3):
        await asyncio.sleep(0.05)
        swap.cancel()
    await ended(swap)
    await long
    found.append(await tokens(PROMPTS[0]))

    with patch.object(engine, "pause_generation", side_effect=RuntimeError("no pause")), pytest.raises(RuntimeError):
        await deltas.load(str(family / "one"))
    found.append(await tokens(PROMPTS[0]))
    await deltas.load(str(family / "one"))
    found.append(await tokens(PROMPTS[0]))
    engine.shutdown()
    return found
