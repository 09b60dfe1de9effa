"""Deltas whose base is a delta: decoded tensor by tensor, checked at every link, and refused where they may not be."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chains import DOWN, UP, chain_of, checkpoints, long_chain, there_and_back
from support.forged_files import DELTA, forge, replace
from support.loaded_models import decode_all, load, logits
from support.messages import naming
from support.naive_reader import read_repository
from support.tiny_models import (
    VOCABULARY,
    Pair,
    edit_json,
    edit_tensors,
    load_tensors,
    make_model,
    same_files,
    save_model,
    tiny_config,
)
from support.without_impart_hf import WITHOUT_IMPART_HF
from transformers import LlamaForCausalLM

from impart_hf import DeltaCompressedForCausalLM, ExactConfig, compress, load_delta
from impart_hf.modeling import checkpoints as checkpoint_module
from impart_hf.modeling import delta_repository, exact_record
from impart_hf.modeling.checksums import tensor_checksum
from impart_hf.modeling.delta_chain import MOST_DELTAS
from impart_hf.modeling.delta_record import DeltaFormatError
from impart_hf.modeling.delta_repository import WrongBaseError
from impart_hf.modeling.model_files import CheckpointError, HubOptions
from impart_hf.repository.open import open_repository

EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Path]]:
    """A model with three checkpoints of its training, and their deltas; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    models = checkpoints(folder, 3)
    return models, chain_of(folder, models)


@pytest.fixture
def deltas(trained: tuple[list[Path], list[Path]], tmp_path: Path) -> list[Path]:
    """A copy of the chain that a test may spoil, on the same dense model."""
    copies = [Path(shutil.copytree(delta, tmp_path / delta.name)) for delta in trained[1]]
    for below, delta in zip(copies, copies[1:], strict=False):
        edit_json(delta / "config.json", base_model_name_or_path=str(below))
    return copies


@pytest.fixture(scope="module")
def two(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return there_and_back(tmp_path_factory.mktemp("two"), tiny_pair)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same names, dtypes and bits."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def states_the_checksums_of(delta: Path, base: Path) -> bool:
    """Whether a delta's table has the checksums of what its base stands for, whichever way the writer found them."""
    repository, dense = opened(delta), load_tensors(base)
    return repository.base_checksums == {
        name: tensor_checksum(dense[repository.base.stored_name(name)]) for name in repository.names()
    }


def opened(folder: Path, **arguments: Any) -> delta_repository.DeltaRepository:
    return open_repository(str(folder), HubOptions(), **arguments)


# Decoding -----------------------------------------------------------------------------------------------------------


def test_every_link_is_its_checkpoint(trained: tuple[list[Path], list[Path]]) -> None:
    models, deltas = trained
    for number, delta in enumerate(deltas, 1):
        assert same(decode_all(delta), load_tensors(models[number]))
        assert [link.source for link in opened(delta).chain] == list(map(str, reversed(deltas[:number])))
    assert not same(load_tensors(models[2]), load_tensors(models[3]))


@pytest.mark.parametrize("length", [1, MOST_DELTAS])
def test_longest_chain(length: int, two: tuple[Path, Path], tiny_pair: Pair, tmp_path: Path) -> None:
    last = long_chain(tmp_path, two, length)[-1]
    assert same(decode_all(last), load_tensors(tiny_pair.finetuned if length % 2 else tiny_pair.base))


def test_one_more_is_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    links = long_chain(tmp_path, two, MOST_DELTAS + 1)
    with pytest.raises(DeltaFormatError, match=naming(str(links[-1]), str(links[0]), MOST_DELTAS, "flatten")):
        opened(links[-1])


def test_parts_of_tensors(trained: tuple[list[Path], list[Path]]) -> None:
    repository, dense = opened(trained[1][2]), load_tensors(trained[0][3])
    for name in (UP, DOWN, EMBEDDINGS):
        for index in ((slice(3, 9),), (slice(None), slice(8, 24)), ...):
            assert torch.equal(repository.part(name, index), dense[name][index])


def test_second_reader(tmp_path: Path) -> None:
    """With tokens that are added by the middle link and removed by the last one."""
    models = [save_model(make_model(tiny_config("llama")), tmp_path / "base")]
    for number, rows in enumerate((VOCABULARY + 8, VOCABULARY - 8)):
        models.append(widened(tmp_path, models[-1], rows, f"step-{number}"))
        edit_tensors(models[-1], lambda tensors: tensors["model.norm.weight"].mul_(1.5))
    first, last = chain_of(tmp_path, models)
    read, ours = read_repository(last, first, models[0]), decode_all(last)
    assert read.keys() == ours.keys()
    assert all(torch.equal(torch.from_numpy(read[name]).to(ours[name].dtype), ours[name]) for name in ours)


def count_work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count reads of dense tensors, records that are decoded, and checksums that are computed."""
    counts = Counter[str]()

    def count(place: Any, name: str, kind: str) -> None:
        function = getattr(place, name)

        @functools.wraps(function)
        def counting(*args: Any, **kwargs: Any) -> Any:
            counts[kind] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(place, name, counting)

    count(checkpoint_module.Checkpoint, "tensor", "reads")
    count(delta_repository, "restore", "decoded")
    for module in (checkpoint_module, delta_repository, exact_record):
        count(module, "tensor_checksum", "checksums")
    return counts


@pytest.mark.parametrize(("name", "decoded"), [(EMBEDDINGS, 0), (UP, 1), (DOWN, 2), ("model.norm.weight", 3)], ids=str)
def test_nothing_is_done_twice(
    name: str, decoded: int, trained: tuple[list[Path], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One read and one checksum of the first base, and one of each of both for each link that changes the tensor."""
    repository, counts = opened(trained[1][2]), count_work(monkeypatch)
    tensor = repository.tensor(name)
    assert counts == Counter(reads=1, decoded=decoded, checksums=1 + decoded)
    assert torch.equal(tensor, load_tensors(trained[0][3])[name])


def test_memory_does_not_grow_with_the_chain(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a link is decoded, of the tensors before it only its base is alive."""
    links, made, most = long_chain(tmp_path, two, 8), list[weakref.ref[torch.Tensor]](), 0
    restore = delta_repository.restore

    def watched(*args: Any) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in made))
        made.append(weakref.ref(tensor := restore(*args)))
        return tensor

    monkeypatch.setattr(delta_repository, "restore", watched)
    repository = opened(links[-1])
    for name in repository.names():
        repository.tensor(name)
    assert len(made) == 8 * len(repository.names()) and most == 1


# What a chain may change ----------------------------------------------------------------------------------------------


def widened(folder: Path, dense: Path, rows: int, name: str, **changes: Any) -> Path:
    """A model with this many tokens, the first of which are another's, and fields of its configuration changed."""
    kind = tiny_config("llama", **{"vocab_size": rows, **changes})
    model, state = make_model(kind, seed=rows), load_tensors(dense)
    own = model.state_dict()
    for key, tensor in state.items():
        if key in own:
            own[key][: len(tensor)] = tensor[: len(own[key])]
    model.load_state_dict(own)
    return save_model(model, folder / name)


def test_tokens_added_and_removed_on_the_way(tmp_path: Path) -> None:
    base = save_model(make_model(tiny_config("llama")), tmp_path / "base")
    models = [base]
    for number, rows in enumerate((VOCABULARY + 8, VOCABULARY + 24, VOCABULARY + 16, VOCABULARY - 8, VOCABULARY)):
        models.append(widened(tmp_path, models[-1], rows, f"step-{number}"))
    deltas = chain_of(tmp_path, models)
    assert "lm_head.weight.added_rows" in opened(deltas[1]).file
    for delta, base, model in zip(deltas, models, models[1:], strict=False):
        assert same(decode_all(delta), load_tensors(model)) and states_the_checksums_of(delta, base)
    assert len(opened(deltas[2]).tensor(EMBEDDINGS)) == VOCABULARY + 16


def test_outputs_untied_and_tied_on_the_way(tmp_path: Path) -> None:
    models = [save_model(make_model(tiny_config("llama-tied")), tmp_path / "base")]
    for number, tied in enumerate((False, False, True)):
        models.append(widened(tmp_path, models[-1], VOCABULARY, f"step-{number}", tie_word_embeddings=tied))
    deltas = chain_of(tmp_path, models)
    for delta, base, model in zip(deltas, models, models[1:], strict=False):
        assert same(decode_all(delta), load_tensors(model)) and states_the_checksums_of(delta, base)
    assert "lm_head.weight" in opened(deltas[1]).names() and "lm_head.weight" not in opened(deltas[2]).names()


def test_dtypes_that_change_on_the_way(trained: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    """To float32, to values that bfloat16 has not, and back."""
    models = trained[0][:2]
    for number, dtype in enumerate((torch.float32, torch.float32, torch.bfloat16, torch.float16)):
        model = LlamaForCausalLM.from_pretrained(models[-1]).to(dtype)
        with torch.no_grad():
            model.lm_head.weight[number] *= 1.001
        models.append(save_model(model, tmp_path / f"step-{number}"))
    deltas = chain_of(tmp_path, models)
    for delta, base, model in zip(deltas, models, models[1:], strict=False):
        assert same(decode_all(delta), load_tensors(model)) and states_the_checksums_of(delta, base)
    assert not opened(deltas[3]).is_changed(EMBEDDINGS), "rounded to the dtype of the base's base"


# The base that is given -----------------------------------------------------------------------------------------------


def test_a_dense_base_is_the_first_one(
    trained: tuple[list[Path], list[Path]], deltas: list[Path], tmp_path: Path
) -> None:
    base = shutil.copytree(trained[0][0], tmp_path / "moved")
    edit_json(deltas[0] / "config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match=naming(str(deltas[0]), str(tmp_path / "gone"), "base_model")):
        opened(deltas[2])
    assert same(decode_all(deltas[2], str(base)), load_tensors(trained[0][3]))
    assert torch.equal(
        logits(load(deltas[2], base_model=str(base))), logits(LlamaForCausalLM.from_pretrained(trained[0][3]))
    )
    with pytest.raises(WrongBaseError, match=naming(str(trained[0][2]), str(deltas[0]))):
        decode_all(deltas[2], str(trained[0][2]))


def test_a_delta_is_the_direct_base(trained: tuple[list[Path], list[Path]], deltas: list[Path], tmp_path: Path) -> None:
    middle = shutil.move(deltas[1], tmp_path / "moved")
    with pytest.raises(CheckpointError, match=naming(str(deltas[1]), str(deltas[2]), "base_model")):
        opened(deltas[2])
    assert same(decode_all(deltas[2], str(middle)), load_tensors(trained[0][3]))
    with pytest.raises(WrongBaseError, match=naming(str(deltas[0]), str(deltas[2]))):
        decode_all(deltas[2], str(deltas[0]))


def test_a_base_that_was_made_dense(trained: tuple[list[Path], list[Path]], deltas: list[Path]) -> None:
    """What is found decides, not what config.json expects."""
    shutil.rmtree(deltas[1])
    shutil.copytree(trained[0][2], deltas[1])
    assert len(opened(deltas[2]).chain) == 1
    assert same(decode_all(deltas[2]), load_tensors(trained[0][3]))
    assert same(decode_all(deltas[2], str(trained[0][2])), load_tensors(trained[0][3]))


# Broken chains --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("back_to", [0, 1, 2])
def test_cycles(back_to: int, deltas: list[Path], tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(deltas[back_to])
    edit_json(deltas[0] / "config.json", base_model_name_or_path=str(link), base_is_delta=True)
    with pytest.raises(DeltaFormatError, match=naming(str(deltas[0]), str(link))):
        opened(deltas[2])


def test_missing_link(deltas: list[Path]) -> None:
    shutil.rmtree(deltas[0])
    with pytest.raises(CheckpointError) as caught:
        opened(deltas[2])
    message = str(caught.value)
    assert all(str(delta) in message for delta in deltas)
    assert message.count("cannot be opened") == 1, "said once, not by each link"


def test_link_that_was_replaced(trained: tuple[list[Path], list[Path]], deltas: list[Path], tmp_path: Path) -> None:
    """Another delta of the same base, in which another tensor changed: every link is sound, the chain is not."""
    models = trained[0]
    shutil.rmtree(deltas[1])
    compress(str(deltas[0]), str(models[3]), deltas[1], ExactConfig())
    repository = opened(deltas[2])
    assert torch.equal(repository.tensor(EMBEDDINGS), load_tensors(models[3])[EMBEDDINGS])
    for name in (UP, DOWN, "model.norm.weight"):
        if torch.equal(load_tensors(models[2])[name], load_tensors(models[3])[name]):
            continue
        with pytest.raises(WrongBaseError, match=naming(str(deltas[1]), str(deltas[2]), name)):
            repository.tensor(name)
    with pytest.raises(WrongBaseError, match=naming(str(deltas[1]), str(deltas[2]))):
        load(deltas[2])


def test_first_base_that_was_replaced(
    trained: tuple[list[Path], list[Path]], deltas: list[Path], tmp_path: Path
) -> None:
    other = save_model(make_model(tiny_config("llama"), seed=9), tmp_path / "other")
    edit_json(deltas[0] / "config.json", base_model_name_or_path=str(other))
    for name in (UP, EMBEDDINGS):
        with pytest.raises(WrongBaseError, match=naming(str(other), str(deltas[0]), name)):
            opened(deltas[2]).tensor(name)


def test_damaged_link(deltas: list[Path]) -> None:
    data = bytearray((deltas[0] / DELTA).read_bytes())
    data[-5] ^= 1
    replace(deltas[0] / DELTA, data)
    with pytest.raises(DeltaFormatError, match=naming(str(deltas[0]))):
        decode_all(deltas[2])


def test_checksums_that_contradict_each_other(deltas: list[Path]) -> None:
    """A link says of an unchanged tensor what the next one does not: found without reading more than the first base."""

    def other(entries: dict) -> None:
        dtype, shape, data = entries["base_checksums"]
        entries["base_checksums"] = (dtype, shape, bytes([data[8] ^ 1]).join([data[:8], data[9:]]))

    forge(deltas[2], other)
    name = opened(deltas[2]).names()[1]
    with pytest.raises(WrongBaseError, match=naming(str(deltas[1]), str(deltas[2]), name)):
        opened(deltas[2]).tensor(name)


def test_lossy_link(tiny_repository: Path, deltas: list[Path]) -> None:
    """Readers may round its last bits differently."""
    edit_json(deltas[0] / "config.json", base_model_name_or_path=str(tiny_repository), base_is_delta=True)
    with pytest.raises(DeltaFormatError, match=naming(str(tiny_repository), "exact", "reconstruct")):
        opened(deltas[2])


# In transformers ------------------------------------------------------------------------------------------------------


def test_loading_and_saving(trained: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    models, deltas = trained
    model = load(deltas[2])
    assert isinstance(model, DeltaCompressedForCausalLM) and same(dict(model.state_dict()), load_tensors(models[3]))
    model.save_pretrained(tmp_path / "again")
    assert same_files(tmp_path / "again", deltas[2])
    assert same(decode_all(tmp_path / "again"), load_tensors(models[3]))
    plain = model.merge_and_unload()
    assert type(plain) is LlamaForCausalLM
    plain.save_pretrained(tmp_path / "plain")
    assert same(load_tensors(tmp_path / "plain"), load_tensors(models[3]))


def test_beside_its_base_in_memory(trained: tuple[list[Path], list[Path]]) -> None:
    models, deltas = trained
    model = load_delta(load(deltas[1]).merge_and_unload(), deltas[2])
    assert torch.equal(logits(model), logits(LlamaForCausalLM.from_pretrained(models[3])))
    with pytest.raises(WrongBaseError, match=naming(str(deltas[2]), str(deltas[1]), "merge_and_unload", "flatten")):
        load_delta(LlamaForCausalLM.from_pretrained(models[0]), deltas[2])


REMOTE_CODE = (
    WITHOUT_IMPART_HF
    + """
import torch
from transformers import AutoModelForCausalLM

repo, base, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
torch.save(model.state_dict(), out)
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, base_model=base)
assert not any(name.split(".")[0] == "impart_hf" for name in sys.modules)
"""
)


@pytest.mark.process
def test_without_impart_hf(trained: tuple[list[Path], list[Path]], tmp_path: Path) -> None:
    models, deltas = trained
    command = [sys.executable, "-c", REMOTE_CODE, str(deltas[2]), str(models[0]), str(tmp_path / "state.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert same(torch.load(tmp_path / "state.pt"), load_tensors(models[3]))
