"""The commands and Python of the documents run as they are written, and print what the documents show.

What runs in seconds does so here on a stand-in for the demo, and shown outputs are compared but for their numbers. On
the demo itself, with numbers, and with all slow commands, documents run by `make test-docs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.document_blocks import DOCUMENTS, ROOT, Block, blocks_of
from support.document_ground import Ground, small_ground, whole_ground
from support.document_runs import DocumentRun, Worker
from support.loopback_hub import LoopbackHub, hub_env
from support.loopback_hub_store import Store


def _name(document: Path) -> str:
    return str(document.relative_to(ROOT))


def _documents(*when: str) -> pytest.MarkDecorator:
    """Those with a command that runs at one of these times."""
    found = [
        document
        for document in DOCUMENTS
        if any(command.when in when for block in blocks_of(document) for command in block.commands())
    ]
    return pytest.mark.parametrize("document", found, ids=_name)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return small_ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture(scope="module")
def small_hub(small: Ground) -> Iterator[LoopbackHub]:
    """A Hub whose repositories each test replaces by a copy of the ground's."""
    with LoopbackHub(small.store, user="ME") as hub:
        yield hub


@pytest.fixture(scope="module")
def worker(small: Ground, small_hub: LoopbackHub) -> Iterator[Worker]:
    worker = Worker(hub_env(small_hub, small.store.with_name("worker")) | {"PYTHONPATH": str(ROOT)})
    yield worker
    worker.close()


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.xdist_group("documents")
@_documents("fast")
def test_quick_blocks_run(
    document: Path, small: Ground, small_hub: LoopbackHub, worker: Worker, tmp_path: Path
) -> None:
    ground = small.copy(tmp_path)
    small_hub.store = Store(ground.store)
    with DocumentRun(ground, small_hub, worker) as run:
        run.run(blocks_of(document))
    assert not run.failures, "\n\n".join(run.failures)


@pytest.fixture(scope="session")
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    kept = request.config.getoption("--ground")
    return whole_ground(Path(kept).resolve() if kept else tmp_path_factory.mktemp("ground") / "whole")


@pytest.mark.night
@_documents("fast", "slow")
def test_whole_documents_run(document: Path, whole: Ground, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    ground = whole.copy(tmp_path)
    blocks = blocks_of(document)
    with LoopbackHub(ground.store, user="ME") as hub, DocumentRun(ground, hub) as run:
        run.run(blocks, update=request.config.getoption("--update-documents"))
    assert not run.failures, "\n\n".join(run.failures)


def test_every_block_is_classified() -> None:
    blocks = [block for document in DOCUMENTS for block in blocks_of(document)]
    unmarked = [f"{block.place}: {block.text.splitlines()[0].strip()}" for block in blocks if block.kind == "unmarked"]
    assert not unmarked, "these need a mark, see tests/support/document_blocks.py:\n" + "\n".join(unmarked)
    for place, reason in _left_out(blocks):  # pytest shows them with -rP
        print(f"{place}: {reason}")


def _left_out(blocks: list[Block]) -> Iterator[tuple[str, str]]:
    """What no run of the documents reaches, with the reason."""
    for block in blocks:
        if block.kind == "skip":
            yield block.place, block.note
        for command in block.commands():
            if command.when == "never":
                yield block.place, f"{command.text}: {command.reason}"
