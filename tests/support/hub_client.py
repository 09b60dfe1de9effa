"""Clients of the loopback Hub, each in a process of its own."""

import json
import subprocess
import sys
from typing import Any


def run_client(script: str, env: dict[str, str], *args: str) -> Any:
    """Run a client script and return the JSON of its last line."""
    command = [sys.executable, "-c", script, *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
