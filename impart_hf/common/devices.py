"""Devices that work is done on."""

import torch


def usable_device(device: str | torch.device) -> torch.device:
    """The device, if this machine has it.

    Raises:
        ValueError: if it has not.
    """
    try:
        usable = torch.device(device)
        torch.zeros(1, device=usable).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device '{device}' cannot be used here: {str(error).splitlines()[0]}") from error
    return usable
