"""Ways to serve many tenants with vLLM: which engines each starts, and where each tenant's questions go.

A further way is one more function in `WAYS`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
from tenant_load import Target
from tenant_models import Models, make_adapters

LARGEST_RANK = 512
_RANKS = (8, 16, 32, 64, 128, 256, 320, LARGEST_RANK)  # what vLLM accepts as --max-lora-rank
_START_SECONDS = 900
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # several engines share the cores
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Settings:
    """What all ways take into account.

    Attributes:
        work: folder for adapters, dense copies and logs.
        options: further options of `vllm serve`.
        engines: the most engines that run at once.
        scratch_limit: `IMPART_HF_SCRATCH_LIMIT`.
    """

    work: Path
    options: Sequence[str] = ()
    engines: int = 1
    scratch_limit: str = "100GB"


@dataclass(frozen=True)
class Engine:
    """A `vllm serve` to start: a model, further options, and variables of its environment."""

    model: Path
    options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Engines, and for each tenant the number of its engine and its model's name there.

    Tenants beyond the list are not served.
    """

    engines: Sequence[Engine]
    places: Sequence[tuple[int, str]]


def separate(models: Models, settings: Settings) -> Plan:
    """One engine per tenant, as many as `settings.engines` allows."""
    served = models.tenants[: settings.engines]
    engines = [Engine(tenant.delta, ("--served-model-name", tenant.name)) for tenant in served]
    return Plan(engines, [(number, tenant.name) for number, tenant in enumerate(served)])


def swaps(models: Models, settings: Settings, environment: Mapping[str, str] | None = None) -> Plan:
    """One engine that has one delta at a time."""
    named = ",".join(f"{tenant.name}={tenant.delta.resolve()}" for tenant in models.tenants)
    variables = {"VLLM_PLUGINS": "impart_hf", "IMPART_HF_DELTAS": named, **(environment or {})}
    engine = Engine(models.base, ("--served-model-name", "the-base"), variables)
    return Plan([engine], [(0, tenant.name) for tenant in models.tenants])


def swaps_scratch(models: Models, settings: Settings) -> Plan:
    """The same, with dense copies of the deltas on disk."""
    scratch = settings.work / "scratch"
    scratch.mkdir(exist_ok=True)
    limit = settings.scratch_limit
    return swaps(models, settings, {"IMPART_HF_SCRATCH": str(scratch), "IMPART_HF_SCRATCH_LIMIT": limit})


def adapters(models: Models, settings: Settings) -> Plan:
    """One engine with a LoRA adapter per tenant, which are approximations of the deltas."""
    folders = make_adapters(settings.work, models.tenants, LARGEST_RANK)
    largest = max(json.loads((folder / "adapter_config.json").read_text("utf-8"))["r"] for folder in folders)
    rank = min(rank for rank in _RANKS if rank >= largest)
    named = [f"{tenant.name}={folder}" for tenant, folder in zip(models.tenants, folders, strict=True)]
    options = ("--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(len(folders)), "--lora-modules")
    return Plan([Engine(models.base, (*options, *named))], [(0, tenant.name) for tenant in models.tenants])


def packed(models: Models, settings: Settings) -> Plan:
    """One engine with all deltas packed beside the base, mixed in a batch; exact."""
    (engine,), places = (plan := swaps(models, settings, {"IMPART_HF_PACKED": "1"})).engines, plan.places
    options = ("--enable-lora", "--max-lora-rank", "1", "--max-loras", str(len(places)), "--enforce-eager")
    return Plan([replace(engine, options=(*engine.options, *options))], places)


WAYS: dict[str, Callable[[Models, Settings], Plan]] = {
    "separate": separate,
    "swaps": swaps,
    "swaps-scratch": swaps_scratch,
    "adapters": adapters,
    "packed": packed,
}
EXACT = ("separate", "swaps", "swaps-scratch", "packed")  # what they answer is what the deltas stand for


class Servers:
    """A plan's engines while they run; a context manager.

    Attributes:
        targets: where the tenants' questions go.
    """

    def __init__(self, plan: Plan, settings: Settings, logs: Path):
        """Set up the servers; `logs` is the folder for what they print."""
        self._plan, self._settings, self._logs = plan, settings, logs
        self._stack, self._processes = ExitStack(), list[subprocess.Popen[bytes]]()
        self._urls: list[str] = []

    def __enter__(self) -> Servers:
        """Start the engines, one after the other.

        Raises:
            RuntimeError: if one does not start; the message has the end of what it printed.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        try:
            for number, engine in enumerate(self._plan.engines):
                self._start(engine, self._logs / f"{number}.log")
        except BaseException:
            self.__exit__()
            raise
        self.targets = [Target(self._urls[number], name) for number, name in self._plan.places]
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            _stop(process)
        self._stack.close()

    def _start(self, engine: Engine, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        where = ["--host", "127.0.0.1", "--port", str(port)]
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(engine.model), *where]
        file = self._stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            [*command, *self._settings.options, *engine.options],
            env={**_ENVIRONMENT, **os.environ, **engine.environment},
            stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
        self._processes.append(process)
        self._urls.append(f"http://127.0.0.1:{port}")
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self._urls[-1]}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise RuntimeError(f"vllm serve did not start, {log}:\n{log.read_text('utf-8', 'replace')[-3000:]}")

    def memory(self) -> int:
        """Return the bytes of resident memory of all processes; pages that several share count once."""
        found = 0
        for process in self._processes:
            try:
                own = psutil.Process(process.pid)
                found += sum(_resident(each.pid) for each in (own, *own.children(recursive=True)))
            except psutil.NoSuchProcess:
                pass  # it has ended
        return found

    def swaps(self) -> int | None:
        """Return the number of swaps since the start; None if these servers do not swap."""
        lines = [line for url in self._urls for line in _get(f"{url}/metrics").splitlines()]
        counts = [line for line in lines if line.startswith("impart_hf:swaps_total")]
        swapping = any(
            "IMPART_HF_DELTAS" in engine.environment and "--enable-lora" not in engine.options
            for engine in self._plan.engines
        )
        return int(sum(float(line.rpartition(" ")[2]) for line in counts)) if swapping else None


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read().decode()


def _resident(pid: int) -> int:
    """Return a process's share of resident memory (PSS), or nothing if it has ended or the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8").splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and its engine."""
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)
        for child in children:
            if child.is_running():
                child.kill()
    process.wait(60)


class PeakResident:
    """Context manager that looks at servers' memory twice a second.

    Attributes:
        bytes: the largest that was seen.
        now: the last that was seen.
    """

    def __init__(self, servers: Servers):
        self.bytes, self.now, self._servers, self._done = 0, 0, servers, threading.Event()

    def __enter__(self) -> PeakResident:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while True:
            self.now = self._servers.memory()
            self.bytes = max(self.bytes, self.now)
            if self._done.wait(0.5):
                return

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


def engines_that_fit(model_bytes: int) -> int:
    """Return how many engines with a KV cache of `VLLM_CPU_KVCACHE_SPACE` fit into the memory that is free now."""
    cache = float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", _ENVIRONMENT["VLLM_CPU_KVCACHE_SPACE"])) * 2**30
    each = _PROGRAM_BYTES + cache + 2 * model_bytes
    return max(1, int(0.9 * psutil.virtual_memory().available / each))


_PROGRAM_BYTES = 2 << 30  # of the two processes of an engine, without weights and cache
