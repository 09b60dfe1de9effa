"""Repositories that must be refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from impart_hf.modeling.delta_record import DeltaFormatError
from impart_hf.modeling.delta_repository import WrongBaseError
from impart_hf.modeling.model_files import CheckpointError
from support.loaded_models import decode_all

FUZZ = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ERRORS = (DeltaFormatError, CheckpointError, WrongBaseError)


def refuses(folder: Path, match: str, error: type[Exception] | tuple[type[Exception], ...] = DeltaFormatError) -> None:
    started = time.monotonic()
    with pytest.raises(error, match=match):
        decode_all(folder)
    assert time.monotonic() - started < 10


def refuses_or_is_the_same(folder: Path, expected: dict[str, torch.Tensor]) -> bool:
    """Whether it was refused; fails if the model that comes back is another one."""
    try:
        tensors = decode_all(folder)
    except ERRORS as error:
        assert str(error)
        return True
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    return False
