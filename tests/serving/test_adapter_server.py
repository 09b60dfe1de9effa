"""The server whose requests have their own adapters, without an engine: what it refuses."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")


def server(monkeypatch: pytest.MonkeyPatch, deltas: str, **arguments: Any) -> tuple[Any, Any]:
    from impart_hf.serving.adapter_server import AdapterServer

    monkeypatch.setenv("IMPART_HF_DELTAS", deltas)
    given = {"api_server_count": 1, "lora_modules": None, **arguments}
    models = SimpleNamespace(
        base_model_paths=[SimpleNamespace(name="own")], lora_requests={"static": object()}, lora_resolvers=[]
    )
    return AdapterServer(SimpleNamespace(), SimpleNamespace(**given), models), models  # type: ignore[arg-type]


def ask(server: Any, model: str | None) -> None:
    async def request() -> None:
        async with server.admitted(model):
            pass

    asyncio.run(request())


def test_several_api_servers(monkeypatch: pytest.MonkeyPatch, tiny_repository: Path) -> None:
    """Each would number adapters for itself, and the engine would take one for another."""
    from impart_hf.serving.refusals import RefusedRequestError

    refusing, _ = server(monkeypatch, f"one={tiny_repository}", api_server_count=2)
    assert "--api-server-count" in refusing.refusal and refusing.listing()["data"] == []
    for model in (None, "own", "static"):
        ask(refusing, model)
    for model, status in (("one", 501), ("two", 404)):
        with pytest.raises(RefusedRequestError) as refused:
            ask(refusing, model)
        assert refused.value.status == status
    del refused
    gc.collect()
    assert not refusing._loading, "names that clients make up leave nothing behind"


def test_name_of_an_adapter(monkeypatch: pytest.MonkeyPatch, tiny_repository: Path) -> None:
    static = [SimpleNamespace(name="static", path="somewhere")]
    with pytest.raises(ValueError, match="'static'"):
        server(monkeypatch, f"static={tiny_repository}", lora_modules=static)
