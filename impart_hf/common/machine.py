"""What a measurement depends on: the machine it was made on."""

import os
import platform
from pathlib import Path
from typing import Any

import torch


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return the properties of this machine that timings depend on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    properties = {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load average": round(os.getloadavg()[0], 2),
    }
    if torch.device(device).type == "cuda":
        properties["gpu"] = torch.cuda.get_device_name(torch.device(device))
    return properties
