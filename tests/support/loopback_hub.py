"""A HuggingFace Hub on 127.0.0.1 for tests: real clients push to it and load from it by repository id.

    with LoopbackHub(tmp_path / "hub") as hub:
        subprocess.run([sys.executable, "client.py"], env=hub_env(hub, tmp_path), check=True)
        assert ("HEAD", "/tester/tiny/resolve/main/config.json") in hub.requests

Only model repositories are served. Pull requests, Xet transfers and pagination are not. Large files are pushed
through LFS, so clients that push need `HF_HUB_DISABLE_XET=1` before they import huggingface_hub.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from support.loopback_hub_api import Reply, Request, answer_request
from support.loopback_hub_store import HubError, Repo, Store

CHUNK = 1 << 20
_CLIENT_VARIABLES = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_")
_PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy")


class LoopbackHub:
    """The server, usable as a context manager. Its state is all below `root`, which may be opened again later.

    `token` may write everywhere and read everything; `reader_token` is another user's, who may only read what is
    public. `requests` lists the (method, raw path without query) of every request in the order of arrival.
    """

    token = "hf_loopback_writer"
    reader_token = "hf_loopback_reader"

    def __init__(self, root: Path, user: str = "tester", lfs_threshold: int = 10 << 20):
        self.store = Store(root)
        self.users = {self.token: user, self.reader_token: "reader"}
        self.lfs_threshold = lfs_threshold
        self.requests: list[tuple[str, str]] = []
        self.url = ""
        self._key = secrets.token_bytes(32)
        self._server: _Server | None = None

    def __enter__(self) -> LoopbackHub:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def repo(self, repo_id: str) -> Repo:
        """Return the stored repository, to look at its commits and files directly."""
        repo = self.store.find(repo_id)
        if repo is None:
            raise KeyError(repo_id)
        return repo

    def set_gated(self, repo_id: str, gated: bool = True, accepted: Iterable[str] = ()) -> None:
        """Give the files of a repository to `token` and the `accepted` tokens alone; its listing stays public."""
        self.repo(repo_id).update(gated=gated, accepted=list(accepted))

    def set_private(self, repo_id: str, private: bool = True) -> None:
        """Hide a repository from everyone but the holder of `token`, or show it again."""
        self.repo(repo_id).update(private=private)

    def sign(self, repo_id: str, sha256: str, size: int) -> str:
        """Return the signature that lets an upload URL be used without a token."""
        return hmac.new(self._key, f"{repo_id}/{sha256}/{size}".encode(), hashlib.sha256).hexdigest()


def hub_env(hub: LoopbackHub, tmp_path: Path, token: str | None = LoopbackHub.token) -> dict[str, str]:
    """Return the environment of a client process that uses `hub` and keeps its cache in `tmp_path / "hf_home"`.

    Settings of this machine that would reach the client (offline mode, tokens, caches, proxies) are left out.
    `token=None` makes an anonymous client; another `tmp_path` makes one with an empty cache.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(_CLIENT_VARIABLES)}
    env = {name: value for name, value in env.items() if name.lower() not in _PROXY_VARIABLES}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return env if token is None else {**env, "HF_TOKEN": token}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: LoopbackHub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay quiet when a client goes away; tests kill clients on purpose."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _handle(self) -> None:
        """Answer one request; the body is read to its end before any reply, or the connection would break."""
        path, _, query = self.path.partition("?")
        self.server.hub.requests.append((self.command, path))
        body = self._body()
        reply = self._reply(path, query, Request(self.server.hub, {}, {}, self.headers, body))
        for _ in body:
            pass
        self._send(reply)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _reply(self, path: str, query: str, request: Request) -> Reply:
        """Turn refusals into error replies, and faults of this server into a 500 with a printed traceback."""
        try:
            return answer_request(self.command, path, query, request)
        except HubError as error:
            return Reply.error(error)
        except ConnectionError:
            raise
        except Exception as error:
            traceback.print_exc()
            return Reply.error(HubError(500, None, f"{type(error).__name__} in the loopback Hub"))

    def _body(self) -> Iterator[bytes]:
        """Yield the request body, sent with a length or in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            yield from self._read(int(self.headers.get("Content-Length") or 0))
            return
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield from self._read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass

    def _read(self, size: int) -> Iterator[bytes]:
        """Yield exactly `size` bytes of the request."""
        while size > 0:
            chunk = self.rfile.read(min(size, CHUNK))
            if not chunk:
                raise ConnectionResetError("the client went away")
            size -= len(chunk)
            yield chunk

    def _send(self, reply: Reply) -> None:
        """Send a reply, without its body for HEAD."""
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(reply.length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if reply.file is None:
            self.wfile.write(reply.body)
            return
        with open(reply.file, "rb") as file:
            file.seek(reply.span[0])
            remaining = reply.span[1]
            while remaining > 0 and (chunk := file.read(min(remaining, CHUNK))):
                self.wfile.write(chunk)
                remaining -= len(chunk)

    def log_message(self, format: str, *args: Any) -> None:
        """Write no access log; see `LoopbackHub.requests`."""
