"""Settings that must stand before torch and huggingface_hub are imported, and the models that many tests share."""

from __future__ import annotations

import os

# OpenMP reads this when torch is loaded. On cores shared with other programs, threads that spin while they wait make
# models this small many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Two test processes share two cores, and models this small gain nothing by a second thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing here may depend on the network. Clients of the loopback Hub run in processes with an environment of their own.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Without a GPU, Triton kernels run in Triton's interpreter. Triton reads this when transformers imports it.
os.environ.setdefault("TRITON_INTERPRET", str(int(not os.path.exists("/dev/nvidiactl"))))

import functools
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from support.lm_eval_task import write_task
from support.loaded_models import decode_all, load
from support.merge_family import make_family
from support.tiny_models import Pair, fine_tune, make_model, save_model, save_pair, tiny_config
from support.vllm_engines import HEADS, LONG, PROMPTS, delta_of, tokens_of
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedModel

from impart_hf import LowRankConfig, compress

# Beside what the process has already. A repository of the tiny model takes a few megabytes to open and decode.
ROOM = 300 << 20


@pytest.fixture
def seeded() -> None:
    """Adapters, sampling and Trainer draw from torch's own generator."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A tiny LLaMA and its fine-tune; not to be written to."""
    return save_pair(tmp_path_factory.mktemp("pair"), tiny_config("llama"))


@pytest.fixture
def pair(tiny_pair: Pair, tmp_path: Path) -> Pair:
    """A copy of the tiny pair that a test may spoil."""
    for folder in (tiny_pair.base, tiny_pair.finetuned):
        shutil.copytree(folder, tmp_path / folder.name)
    return Pair(tmp_path / tiny_pair.base.name, tmp_path / tiny_pair.finetuned.name)


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """A pair of each kind of model, made when it is first asked for; not to be written to."""

    @functools.cache
    def pair(kind: str) -> Pair:
        return save_pair(tmp_path_factory.mktemp(kind), tiny_config(kind))

    return pair


@pytest.fixture(scope="session")
def tiny_repository(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The delta repository of `tiny_pair`, nearly lossless; not to be written to."""
    folder = tmp_path_factory.mktemp("repository") / "delta"
    compress(str(tiny_pair.base), str(tiny_pair.finetuned), folder, LowRankConfig(compression_ratio=3))
    return folder


@pytest.fixture
def repository(tiny_repository: Path, tmp_path: Path) -> Path:
    """A copy of the tiny repository that a test may spoil."""
    return Path(shutil.copytree(tiny_repository, tmp_path / "delta"))


@pytest.fixture(scope="session")
def tiny_tensors(tiny_repository: Path) -> dict[str, torch.Tensor]:
    """What `tiny_repository` stands for."""
    return decode_all(tiny_repository)


@pytest.fixture(scope="session")
def dense_folder(
    tiny_repository: Path, tiny_tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same model as a plain checkpoint, written without any of the code that is tested here."""
    folder = tmp_path_factory.mktemp("dense")
    text_config = json.loads((tiny_repository / "config.json").read_text())["text_config"]
    model = LlamaForCausalLM(transformers.LlamaConfig(**text_config)).to(torch.bfloat16)
    model.load_state_dict(tiny_tensors)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig.from_pretrained(tiny_repository)
    return save_model(model, folder)


@pytest.fixture
def model(tiny_repository: Path) -> PreTrainedModel:
    """Of `tiny_repository`."""
    return load(tiny_repository)


@pytest.fixture
def little_memory(tiny_tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """The test may not allocate more than `ROOM`: the kernel then refuses, and torch raises a RuntimeError.

    `tiny_tensors` comes first, for thread pools and libraries to take their share.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="session")
def tunes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`make_family`'s models; not to be written to."""
    return make_family(tmp_path_factory.mktemp("merging"))


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LLaMA for vLLM, `base`, and three deltas of it, `one`, `two`, `three`; not to be written to."""
    folder = tmp_path_factory.mktemp("family")
    base = make_model(tiny_config("llama", **HEADS), dtype=torch.float32)
    save_model(base, folder / "base")
    for seed, name in enumerate(("one", "two", "three"), 1):
        tuned = save_model(fine_tune(base, seed), folder / f"{name}-dense")
        delta_of(Pair(folder / "base", tuned), folder / name)
    return folder


@pytest.fixture(scope="session")
def family_tokens(family: Path) -> dict[str, list[list[int]]]:
    """What each of the family says to `PROMPTS` and `LONG`, no two the same."""
    found = {name: tokens_of(family / name, [*PROMPTS, LONG]) for name in ("base", "one", "two", "three")}
    assert len({str(tokens) for tokens in found.values()}) == len(found)
    return found


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of lm-eval; not to be written to."""
    return write_task(tmp_path_factory.mktemp("task"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """For the tests of the documents, in tests/docs."""
    parser.addoption("--ground", metavar="FOLDER", help="where `make demo` runs for them; used again if it is there")
    parser.addoption("--update-documents", action="store_true", help="write into them what commands print now")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes a night, unless it is asked for by its marker.

    Run what needs the vLLM engine in one test process, or skip it if vLLM is not installed.
    """
    if "night" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("night")])
        items[:] = [item for item in items if not item.get_closest_marker("night")]
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.xdist_group("vllm"))
            if find_spec("vllm") is None:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make .venv/ready-to-test"))
