"""Choice of the device to compute on."""

import torch


def usable_device(device: str | torch.device) -> torch.device:
    """Return the device after checking that this machine can use it.

    Raises:
        ValueError: if it cannot.
    """
    try:
        usable = torch.device(device)
        torch.zeros(1, device=usable).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device '{device}' cannot be used here: {str(error).splitlines()[0]}") from error
    return usable
