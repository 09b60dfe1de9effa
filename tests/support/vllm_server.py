"""`vllm serve` as a user starts it, for the tests.

with Server("user/delta", env={"VLLM_PLUGINS": "impart_hf"}) as server:
    server.tokens([5, 6])
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from support.vllm_engines import ENVIRONMENT, NEW_TOKENS

_START_SECONDS = 300
_ANSWER_SECONDS = 120


class Server:
    """A server process and a client of it.

    Attributes:
        url: where it listens, on 127.0.0.1.
        process: the API server's.
    """

    def __init__(self, model: Path | str, *arguments: str, env: dict[str, str] | None = None):
        """Start `vllm serve MODEL`, in float32 and eager; `arguments` and `env` are added."""
        self._folder = tempfile.TemporaryDirectory()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.model, self.url = str(model), f"http://127.0.0.1:{port}"
        self.log = Path(self._folder.name, "log")
        settings = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
        where = ["--host", "127.0.0.1", "--port", str(port)]
        command = [str(Path(sys.executable).with_name("vllm")), "serve", self.model, *settings, *where, *arguments]
        environment = {**os.environ, **ENVIRONMENT, "VLLM_LOGGING_LEVEL": "INFO", **(env or {})}
        del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def __enter__(self) -> Server:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(self.url + "/health", timeout=5)
                return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        log = self.log.read_text()
        self.__exit__()
        raise RuntimeError(f"vllm serve did not start:\n{log[-4000:]}")

    def __exit__(self, *error: object) -> None:
        for process in [*psutil.Process(self.process.pid).children(recursive=True)] if self.alive() else []:
            process.kill()
        if self.alive():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)
        self._folder.cleanup()

    def alive(self) -> bool:
        return self.process.poll() is None

    def children(self) -> list[psutil.Process]:
        """The engine core, and the workers if they are processes of their own."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in found if "resource_tracker" not in " ".join(child.cmdline())]

    def request(self, path: str, body: Any = None, key: str | None = None) -> tuple[int, Any]:
        """Status and JSON of a GET, or of a POST if there is a body (bytes are sent as they are).

        Raises:
            OSError: if the server is not there, or stops before it has answered.
        """
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER_SECONDS) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            text = error.read()
            return error.code, json.loads(text) if text else None
        except http.client.HTTPException as error:  # an answer that breaks off is no OSError in Python
            raise ConnectionError(f"the server broke off: {error!r}") from error

    def tokens(self, prompt: list[int], count: int = NEW_TOKENS) -> list[int]:
        """What it generates greedily."""
        return self.all_tokens([prompt], count)[0]

    def all_tokens(self, prompts: list[list[int]], count: int, **options: Any) -> list[list[int]]:
        """The same for several prompts in one request; `options` are more of the request's fields."""
        body = {"model": self.model, "prompt": prompts, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        status, answer = self.request("/v1/completions", {**body, "return_token_ids": True, **options})
        assert status == 200, answer
        return [choice["token_ids"] for choice in answer["choices"]]

    def load(self, delta: str, key: str | None = None) -> tuple[int, Any]:
        """Status and JSON of a swap."""
        return self.request("/v1/deltas/load", {"delta": delta}, key)


def ask(server: Server, model: str, prompt: list[int], **options: Any) -> tuple[int, Any]:
    """Status and answer of a completion by one model, with its greedy tokens."""
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return server.request("/v1/completions", body | {"return_token_ids": True} | options)
