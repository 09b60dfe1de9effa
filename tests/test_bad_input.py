"""Bad input to `compress`: one clear error before any work, and nothing left behind."""

from __future__ import annotations

import errno
import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    Pair,
    edit_json,
    edit_tensors,
    fine_tune,
    load_tensors,
    make_model,
    save_model,
    save_pair,
    tiny_config,
    to_bin,
)
from transformers import AutoModelForCausalLM

from impart_hf import DareConfig, ImPartConfig, ImPartRdConfig, LowRankConfig, compress
from impart_hf.methods import MethodConfig
from impart_hf.modeling.checkpoints import Checkpoint, CheckpointError, HubOptions
from impart_hf.plan import IncompatibleModelsError
from impart_hf.workspace import OutputError

METHOD = LowRankConfig(compression_ratio=3)
UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture
def pair(tiny_pair: Pair, tmp_path: Path) -> Pair:
    """A copy of the tiny pair that a test may spoil."""
    for folder in (tiny_pair.base, tiny_pair.finetuned):
        shutil.copytree(folder, tmp_path / folder.name)
    return Pair(tmp_path / tiny_pair.base.name, tmp_path / tiny_pair.finetuned.name)


def run(pair: Pair, output: Path | None = None, method: MethodConfig = METHOD, **kwargs: Any) -> Any:
    return compress(str(pair.base), str(pair.finetuned), output or pair.base.parent / "out" / "delta", method, **kwargs)


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def refuses(pair: Pair, error: type[Exception], match: str, output: Path | None = None, **kwargs: Any) -> str:
    """The message of the error, after a look that the run left everything as it was."""
    root = pair.base.parent
    before = tree(root)
    with pytest.raises(error, match=match) as caught:
        run(pair, output, **kwargs)
    assert tree(root) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the two models


def test_another_architecture(pair: Pair) -> None:
    edit_json(pair.base / "config.json", model_type="mistral")
    refuses(pair, IncompatibleModelsError, "the base is a 'mistral' model, the fine-tune a 'llama' model")


def test_an_architecture_that_transformers_does_not_know(pair: Pair) -> None:
    for folder in (pair.base, pair.finetuned):
        edit_json(folder / "config.json", model_type="bert-of-tomorrow")
    refuses(pair, IncompatibleModelsError, "bert-of-tomorrow.*")


def test_other_shapes(pair: Pair) -> None:
    edit_tensors(pair.finetuned, lambda t: t.update({UP: torch.zeros(64, 64, dtype=torch.bfloat16)}))
    refuses(pair, IncompatibleModelsError, rf"{UP} has shape \[64, 64\] in .*finetuned' and \[128, 64\] in")


def test_a_smaller_vocabulary(pair: Pair) -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:-8].clone()

    edit_tensors(pair.finetuned, shrink)
    edit_json(pair.finetuned / "config.json", vocab_size=312)
    refuses(pair, IncompatibleModelsError, r"lm_head.weight has shape \[312, 64\].*rows added to the vocabulary")


@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_a_tensor_too_few_or_too_many(pair: Pair, side: str) -> None:
    edit_tensors(getattr(pair, side), lambda t: t.pop(NORM))
    what = "has model.norm.weight, which the base lacks" if side == "base" else "lacks model.norm.weight"
    refuses(pair, IncompatibleModelsError, what)


@pytest.mark.parametrize("side", ["base", "finetuned"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [UP, NORM])
def test_numbers_that_are_not_finite(pair: Pair, side: str, value: float, name: str) -> None:
    edit_tensors(getattr(pair, side), lambda t: t[name].view(-1)[5:6].fill_(value))
    message = refuses(pair, IncompatibleModelsError, "NaN or infinity")
    assert name in message and str(getattr(pair, side)) in message


def test_numbers_whose_squares_overflow(pair: Pair) -> None:
    edit_tensors(pair.finetuned, lambda t: t[UP].view(-1)[0:1].fill_(1e30))
    refuses(pair, IncompatibleModelsError, f"{UP} of .* holds numbers beyond 1e\\+15")


@pytest.mark.parametrize("method", [ImPartConfig(4), DareConfig(4), METHOD], ids=lambda m: m.name)
def test_a_delta_too_small_for_a_norm_is_none(pair: Pair, method: MethodConfig) -> None:
    for folder, value in ((pair.base, 0.0), (pair.finetuned, 1e-30)):
        edit_tensors(folder, lambda t, value=value: t[UP].fill_(value))
    report = run(pair, method=method)
    assert next(t for t in report.tensors if t.name == UP).rank == 0


def test_integers_against_floats(pair: Pair) -> None:
    edit_tensors(pair.finetuned, lambda t: t.update({NORM: torch.ones(64, dtype=torch.int32)}))
    refuses(pair, IncompatibleModelsError, "model.norm.weight has dtype torch.int32 in .* and torch.bfloat16 in")


def test_a_dtype_that_has_no_delta(pair: Pair) -> None:
    for folder in (pair.base, pair.finetuned):
        edit_tensors(folder, lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}))
    refuses(pair, CheckpointError, f"{UP} has the unsupported dtype F8_E4M3")


@pytest.mark.parametrize("name", ["crc32", "base_checksums", f"{UP}.delta", f"{UP}.added_rows"])
def test_names_that_the_format_uses_itself(pair: Pair, name: str) -> None:
    for folder in (pair.base, pair.finetuned):
        edit_tensors(folder, lambda t: t.update({name: torch.zeros(4)}))
    refuses(pair, IncompatibleModelsError, f"has a tensor named {name}, which the delta format uses itself")


def test_a_checkpoint_without_float_tensors(pair: Pair) -> None:
    for folder in (pair.base, pair.finetuned):
        save_file({"position_ids": torch.arange(8)}, folder / "model.safetensors")
    refuses(pair, IncompatibleModelsError, "holds no weights")


def test_an_output_projection_that_is_tied_only_in_name(pair: Pair) -> None:
    # transformers loads such a checkpoint untied, so to pass over the stored matrix would lose it.
    for folder in (pair.base, pair.finetuned):
        edit_json(folder / "config.json", tie_word_embeddings=True)
    refuses(pair, IncompatibleModelsError, "lm_head.weight is another matrix: set tie_word_embeddings to false")


@pytest.mark.parametrize("stored", [False, True])
def test_an_untied_base_of_a_tied_fine_tune(pair: Pair, tmp_path: Path, stored: bool) -> None:
    def tie(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop("lm_head.weight")
        if stored:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(pair.finetuned, tie)
    edit_json(pair.finetuned / "config.json", tie_word_embeddings=True)
    run(pair, tmp_path / "delta")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = load_tensors(pair.finetuned)["model.embed_tokens.weight"].float()
    assert (model.lm_head.weight.float() - expected).norm() < 0.05 * expected.norm()


def test_a_tied_base_of_an_untied_fine_tune(pair: Pair) -> None:
    edit_tensors(pair.base, lambda t: t.pop("lm_head.weight"))
    edit_json(pair.base / "config.json", tie_word_embeddings=True)
    refuses(pair, IncompatibleModelsError, "it has lm_head.weight, which the base lacks")


def test_tied_by_the_architecture_without_a_word_in_the_config(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, tiny_config("gemma2"))
    for folder in (pair.base, pair.finetuned):
        edit_json(folder / "config.json", tie_word_embeddings=None)
        edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    run(pair, tmp_path / "delta")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- input that looks odd and is right


def test_a_fine_tune_that_is_its_base(pair: Pair, tmp_path: Path) -> None:
    report = compress(str(pair.base), str(pair.base), tmp_path / "delta", METHOD)
    assert report.tensors == [] and report.equal_tensors == len(load_tensors(pair.base))
    assert (tmp_path / "delta" / "delta_model.safetensors").stat().st_size < 2000
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
    for name, tensor in load_tensors(pair.base).items():
        assert torch.equal(model.state_dict()[name], tensor)


def changed_extra(pair: Pair, tmp_path: Path, extra: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    """Extra tensors (base's, fine-tune's) through compression and back."""
    for side, folder in enumerate((pair.base, pair.finetuned)):
        edit_tensors(folder, lambda t, side=side: t.update({name: two[side] for name, two in extra.items()}))
    run(pair, tmp_path / "delta")
    from impart_hf.reconstruct import open_repository

    repository = open_repository(str(tmp_path / "delta"), HubOptions())
    return {name: repository.tensor(name) for name in extra}


def test_integer_and_empty_tensors(pair: Pair, tmp_path: Path) -> None:
    extra = {
        "changed": (torch.arange(8), torch.arange(8) + 1),
        "unchanged": (torch.arange(8), torch.arange(8)),
        "widened": (torch.arange(8, dtype=torch.int32), torch.arange(8)),
        "flags": (torch.tensor([True, False]), torch.tensor([True, True])),
        "many": (torch.zeros(80, 80, dtype=torch.int8), torch.ones(80, 80, dtype=torch.int8)),
        "empty": (torch.zeros(0), torch.zeros(0)),
        "empty_matrix": (torch.zeros(0, 7, dtype=torch.bfloat16), torch.zeros(0, 7, dtype=torch.bfloat16)),
        "empty_columns": (torch.zeros(7, 0), torch.zeros(7, 0)),
        "number": (torch.tensor(3), torch.tensor(3)),
    }
    for name, tensor in changed_extra(pair, tmp_path, extra).items():
        assert tensor.dtype == extra[name][1].dtype and torch.equal(tensor, extra[name][1]), name


def test_tensors_without_dimensions(pair: Pair, tmp_path: Path) -> None:
    extra = {"scale": (torch.tensor(2.5), torch.tensor(3.5)), "count": (torch.tensor(2), torch.tensor(3))}
    assert changed_extra(pair, tmp_path, extra) == {"scale": torch.tensor(3.5), "count": torch.tensor(3)}


def test_odd_and_long_tensor_names(pair: Pair, tmp_path: Path) -> None:
    names = ["../up", "/root", "a b\tc\n", 'quote"\\', "größe.日本.🙂", "x" * 300, "CON", ".", "weight.delta", ""]
    extra = {n: (torch.zeros(64, 64), torch.full((64, 64), float(i + 1))) for i, n in enumerate(names)}
    for name, tensor in changed_extra(pair, tmp_path, extra).items():
        assert torch.allclose(tensor, extra[name][1], rtol=1e-2), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "delta", "finetuned"]


# --- settings


@pytest.mark.parametrize("ratio", [1, 1.0, 0, -3, float("nan"), float("inf"), True, "32", None, [2]])
@pytest.mark.parametrize("config", [ImPartConfig, DareConfig, LowRankConfig])
def test_ratios_that_are_none(config: type[MethodConfig], ratio: Any) -> None:
    with pytest.raises(ValueError, match=r"^compression_ratio must be .*got "):
        config(compression_ratio=ratio)


@pytest.mark.parametrize(
    "field, value",
    [("beta", v) for v in (1, 1.5, -0.1, float("nan"))]
    + [("c", v) for v in (0, -1, float("nan"), float("inf"))]
    + [("seed", v) for v in (-1, 1 << 32, 1.5, "0", True, None)]
    + [("value_dtype", v) for v in ("float32", "int8", "", None, torch.float16)]
    + [("embeddings", v) for v in ("none", None, True)],
)
def test_settings_that_are_none(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field} must .*got "):
        ImPartConfig(**{field: value})


def test_a_method_that_is_only_its_name(pair: Pair) -> None:
    refuses(pair, TypeError, "method must be a method's configuration .* got 'impart'", method="impart")


@pytest.mark.parametrize("size", ["5XB", "", "GB", 0, -1, "0MB", None, True])
def test_shard_sizes_that_are_none(pair: Pair, size: Any) -> None:
    refuses(pair, ValueError, "max_shard_size must be a number of bytes or a string", max_shard_size=size)


@pytest.mark.parametrize("device", ["quantum", "", "cuda:99", "meta"])
def test_devices_that_are_none(pair: Pair, device: str) -> None:
    refuses(pair, ValueError, f"device '{device}' cannot be used here", device=device)


@pytest.mark.parametrize("method", [ImPartConfig(400), DareConfig(400), LowRankConfig(400)], ids=lambda m: m.name)
def test_a_ratio_out_of_reach_names_one_within(pair: Pair, tmp_path: Path, method: MethodConfig) -> None:
    match = r"^compression_ratio=400 cannot be reached: \S+\.weight \(\d+x\d+\) would get"
    message = refuses(pair, ValueError, match, method=method)
    found = re.search(r"a ratio of ([\d.]+), which is (\d+) bytes, is certain to be met$", message)
    assert found is not None
    reachable = float(found[1])
    assert 1 < reachable < 400
    run(pair, tmp_path / "delta", type(method)(compression_ratio=reachable))
    run(pair, tmp_path / "delta", max_bytes=int(found[2]))
    # It is no idle modesty: at twice that, too much is fixed
    assert run(pair, tmp_path / "delta", type(method)(compression_ratio=2 * reachable)).shortfall


# --- the output folder


@pytest.mark.parametrize("which", ["base", "finetuned"])
def test_output_on_top_of_a_model(pair: Pair, which: str) -> None:
    folder = getattr(pair, which)
    before = load_tensors(folder)
    refuses(pair, OutputError, "holds something that is not a delta repository", folder)
    assert load_tensors(folder).keys() == before.keys()


def test_output_is_a_file(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "delta").write_text("mine")
    refuses(pair, OutputError, "exists and is not a folder", tmp_path / "delta")
    assert (tmp_path / "delta").read_text() == "mine"


def test_output_is_a_link(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "delta").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    refuses(pair, OutputError, "exists and is not a folder", tmp_path / "delta")
    refuses(pair, OutputError, "exists and is not a folder", tmp_path / "dangling")


@pytest.mark.parametrize("config", [None, "not json", "[]", '{"model_type": "llama"}'])
def test_output_is_a_foreign_folder(pair: Pair, tmp_path: Path, config: str | None) -> None:
    (tmp_path / "delta").mkdir()
    (tmp_path / "delta" / "thesis.tex").write_text("years of work")
    if config is not None:
        (tmp_path / "delta" / "config.json").write_text(config)
    refuses(pair, OutputError, "holds something that is not a delta repository", tmp_path / "delta")
    assert (tmp_path / "delta" / "thesis.tex").read_text() == "years of work"


def test_output_of_ours_is_replaced(pair: Pair, tmp_path: Path) -> None:
    output = tmp_path / "delta"
    output.mkdir()  # an empty folder is free
    run(pair, output)
    first = (output / "delta_model.safetensors").read_bytes()
    (output / "delta_model-00001-of-00002.safetensors").write_bytes(b"left by an older run")
    run(pair, output, LowRankConfig(compression_ratio=4))
    assert (output / "delta_model.safetensors").read_bytes() != first
    assert not (output / "delta_model-00001-of-00002.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "delta", "finetuned"]


@pytest.mark.parametrize("folder", [".git", "results"])
def test_a_folder_within_an_older_output_is_not_thrown_away(pair: Pair, tmp_path: Path, folder: str) -> None:
    run(pair, tmp_path / "delta")
    (tmp_path / "delta" / folder).mkdir()
    refuses(pair, OutputError, f"would be replaced, but holds the folder {folder}", tmp_path / "delta")


def test_files_that_come_to_the_output_during_the_run_are_not_thrown_away(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from impart_hf.repository import RepositoryWriter

    write = RepositoryWriter.write

    def meddle(self: RepositoryWriter, *args: Any) -> Any:
        (tmp_path / "delta").mkdir()
        (tmp_path / "delta" / "notes.txt").write_text("mine")
        return write(self, *args)

    monkeypatch.setattr(RepositoryWriter, "write", meddle)
    with pytest.raises(OutputError, match="holds something that is not a delta repository"):
        run(pair, tmp_path / "delta")
    assert (tmp_path / "delta" / "notes.txt").read_text() == "mine"


def test_output_inside_missing_folders(pair: Pair, tmp_path: Path) -> None:
    run(pair, tmp_path / "a" / "b" / "delta")
    assert (tmp_path / "a" / "b" / "delta" / "config.json").exists()


def test_output_below_a_file(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refuses(pair, OutputError, "file is not a folder that you may write to", tmp_path / "file" / "sub" / "delta")


def test_output_name_too_long(pair: Pair, tmp_path: Path) -> None:
    refuses(pair, OutputError, "cannot be written: File name too long", tmp_path / ("x" * 300))
    # The name itself fits, that of the hidden folder does not.
    refuses(pair, OutputError, "cannot be written: File name too long", tmp_path / ("x" * 250))


def test_hidden_folder_that_is_not_ours(pair: Pair, tmp_path: Path) -> None:
    hidden = tmp_path / ".delta.partial"
    hidden.mkdir()
    (hidden / "diary").write_text("mine")
    refuses(pair, OutputError, "is in the way", tmp_path / "delta")
    shutil.rmtree(hidden)
    hidden.symlink_to(pair.base)
    refuses(pair, OutputError, "is in the way", tmp_path / "delta")
    assert load_tensors(pair.base)


def test_parent_that_may_not_be_written_to(pair: Pair, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.geteuid() == 0:
        # Root may write anywhere; what it may not write to is a folder that the kernel holds still.
        locked = Path("/proc/self")
    refuses(pair, OutputError, "cannot be written: .* is not a folder that you may write to", locked / "delta")


def test_a_limit_that_cannot_be_kept(pair: Pair, tmp_path: Path) -> None:
    message = refuses(pair, ValueError, "^a repository of 7000 bytes cannot be made: [0-9]+ are fixed", max_bytes=7000,
                      method=ImPartRdConfig())  # fmt: skip
    found = re.search(r"which is (\d+) bytes, is certain to be met$", message)
    assert found is not None and 7000 < int(found[1]) < 60_000
    report = run(pair, tmp_path / "delta", ImPartRdConfig(), max_bytes=int(found[1]))
    assert report.repository_bytes <= int(found[1]) and not report.shortfall


def test_disk_too_small_for_the_result(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    refuses(pair, OutputError, "has 1048576 bytes free, [0-9]+ are needed", tmp_path / "a" / "delta")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk(pair: Pair, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(10 << 20))
    refuses(pair, OutputError, "bytes free, [0-9]+ are needed", small_disk / "delta")


def test_mount_point(pair: Pair, small_disk: Path) -> None:
    refuses(pair, OutputError, "is a mount point", small_disk)


def test_disk_that_fills_up_with_components(pair: Pair, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors has an error of its own for that."""
    store = importlib.import_module("impart_hf.svd_store")
    decompose = store.leading_svd

    def fill(*arguments: Any) -> Any:
        with pytest.raises(OSError), (small_disk / "ballast").open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        return decompose(*arguments)

    monkeypatch.setattr(store, "leading_svd", fill)
    with pytest.raises(OutputError, match="disk of .* is full; what is finished is kept .*same command"):
        run(pair, small_disk / "delta", ImPartRdConfig(4))
    (small_disk / "ballast").unlink()
    monkeypatch.setattr(store, "leading_svd", decompose)
    run(pair, small_disk / "delta", ImPartRdConfig(4))


def test_disk_that_fills_up_during_the_work(
    pair: Pair, small_disk: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another program takes the space meanwhile; when it is given back, the run goes on."""
    pipeline = importlib.import_module("impart_hf.encoding")
    encode, encoded = pipeline.encode_tensor, []
    ballast = small_disk / "ballast"

    def fill(tensor: Any, *args: Any) -> Any:
        encoded.append(tensor.name)
        if len(encoded) == 4:
            with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        return encode(tensor, *args)

    monkeypatch.setattr(pipeline, "encode_tensor", fill)
    with pytest.raises(OutputError, match="disk of .* is full; what is finished is kept .*same command") as caught:
        run(pair, small_disk / "delta")
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOSPC
    assert not (small_disk / "delta").exists()
    ballast.unlink()
    finished, encoded[:] = encoded[:3], [""] * 4
    run(pair, small_disk / "delta")
    assert len(encoded) > 8 and not set(finished) & set(encoded)
    run(pair, tmp_path / "unbroken")
    for path in (tmp_path / "unbroken").iterdir():
        assert (small_disk / "delta" / path.name).read_bytes() == path.read_bytes()


# --- checkpoints that cannot be read


def test_missing_models(pair: Pair, tmp_path: Path) -> None:
    refuses(Pair(tmp_path / "gone", pair.finetuned), CheckpointError, "gone' is neither a local folder nor")
    refuses(Pair(pair.base, tmp_path / "gone"), CheckpointError, "gone' is neither a local folder nor")


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def spoil_config_type(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def spoil_config_depth(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def lose_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncate_header(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:100])


def truncate_data(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def empty_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def spoil_header(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[20:24] = b"\xff\x00{{"
    (folder / "model.safetensors").write_bytes(data)


def shard(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """A checkpoint of two files, its index edited."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in (0, 1):
        filename = f"model-{number + 1}.safetensors"
        part = {n: tensors[n] for n in names[number::2]}
        save_file(part, folder / filename)
        weight_map.update(dict.fromkeys(part, filename))
    index = {"weight_map": weight_map}
    edit(index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_of_missing_file(folder: Path) -> None:
    shard(folder, lambda index: (folder / "model-2.safetensors").unlink())


def index_of_missing_tensor(folder: Path) -> None:
    shard(folder, lambda index: index["weight_map"].update(ghost="model-1.safetensors"))


def index_without_map(folder: Path) -> None:
    shard(folder, lambda index: index.pop("weight_map"))


def index_empty(folder: Path) -> None:
    shard(folder, lambda index: index.update(weight_map={}))


def index_of_lists(folder: Path) -> None:
    shard(folder, lambda index: index.update(weight_map={"a": ["model-1.safetensors"]}))


def index_outside(folder: Path) -> None:
    shard(folder, lambda index: index["weight_map"].update(ghost="../base/model-1.safetensors"))


def same_tensor_in_two_files(folder: Path) -> None:
    shard(folder, lambda index: shutil.copy(folder / "model-1.safetensors", folder / "model-2.safetensors"))


def index_of_json_file(folder: Path) -> None:
    shard(folder, lambda index: index["weight_map"].update(ghost="config.json"))


def quantised(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def truncated_bin(folder: Path) -> None:
    to_bin(folder)
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[: len(data) // 2])


def old_truncated_bin(folder: Path) -> None:
    to_bin(folder, zipped=False)
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[: len(data) // 2])


def bin_of_something_else(folder: Path) -> None:
    lose_weights(folder)
    torch.save({"model": {"a": torch.zeros(3)}}, folder / "pytorch_model.bin")


def bin_of_numbers(folder: Path) -> None:
    lose_weights(folder)
    torch.save({1: torch.zeros(3)}, folder / "pytorch_model.bin")


def bin_of_sparse_tensors(folder: Path) -> None:
    lose_weights(folder)
    torch.save({"a": torch.eye(3).to_sparse()}, folder / "pytorch_model.bin")


def bin_of_text(folder: Path) -> None:
    lose_weights(folder)
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize(
    "spoil, match",
    [
        (spoil_config, "config.json is not readable JSON"),
        (spoil_config_type, "config.json does not hold a JSON object"),
        (spoil_config_depth, "config.json is not readable JSON"),
        (lose_config, "has no config.json: it is not a transformers checkpoint"),
        (lose_weights, "has none of the weight files"),
        (truncate_header, "cannot be read as a weight file"),
        (truncate_data, "cannot be read as a weight file"),
        (empty_file, "cannot be read as a weight file"),
        (spoil_header, "cannot be read as a weight file"),
        (index_of_missing_file, "names the weight file model-2.safetensors, but does not have it"),
        (index_of_missing_tensor, "the index names ghost, which no weight file holds"),
        (index_without_map, "holds no valid weight_map"),
        (index_empty, "holds no valid weight_map"),
        (index_of_lists, "holds no valid weight_map"),
        (index_outside, "holds no valid weight_map"),
        (same_tensor_in_two_files, "stands in two weight files"),
        (index_of_json_file, "config.json cannot be read as a weight file"),
        (quantised, "is a quantised checkpoint; only float weights have a delta"),
        (truncated_bin, "pytorch_model.bin cannot be read as a weight file"),
        (old_truncated_bin, "pytorch_model.bin cannot be read as a weight file"),
        (bin_of_something_else, "does not hold a dictionary of dense tensors"),
        (bin_of_numbers, "does not hold a dictionary of dense tensors"),
        (bin_of_sparse_tensors, "does not hold a dictionary of dense tensors"),
        (bin_of_text, "pytorch_model.bin cannot be read as a weight file"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_checkpoints_that_cannot_be_read(pair: Pair, spoil: Callable[[Path], None], match: str, side: str) -> None:
    spoil(getattr(pair, side))
    assert str(getattr(pair, side)) in refuses(pair, CheckpointError, match)


class Malice:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("how", ["torch", "old torch", "pickle"])
@pytest.mark.parametrize("side", ["base", "finetuned"])
def test_a_malicious_pickle_is_not_executed(pair: Pair, tmp_path: Path, how: str, side: str) -> None:
    folder = getattr(pair, side)
    lose_weights(folder)
    evil = {"a": torch.zeros(3), "b": Malice(tmp_path / "executed")}
    if how == "pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malice(tmp_path / "executed")))
    else:
        torch.save(evil, folder / "pytorch_model.bin", _use_new_zipfile_serialization=how == "torch")
    refuses(pair, CheckpointError, "pytorch_model.bin cannot be read as a weight file")
    assert not (tmp_path / "executed").exists()


def test_parameters_in_a_bin_file(pair: Pair, tmp_path: Path) -> None:
    """Parameters ask for gradients; a delta has none."""
    for folder in (pair.base, pair.finetuned):
        tensors = load_file(folder / "model.safetensors")
        lose_weights(folder)
        torch.save({n: torch.nn.Parameter(t) for n, t in tensors.items()}, folder / "pytorch_model.bin")
    run(pair, tmp_path / "delta", ImPartConfig(4))
    assert (tmp_path / "delta" / "config.json").exists()


def test_a_delta_repository_is_no_fine_tune(pair: Pair, tiny_repository: Path) -> None:
    match = "is a delta repository; make it dense with `impart-hf reconstruct` first"
    refuses(Pair(pair.base, tiny_repository), CheckpointError, match)
    with pytest.raises(CheckpointError, match=match):
        compress(str(tiny_repository), str(pair.finetuned), pair.base.parent / "delta", METHOD)


def test_offline_and_not_in_the_cache(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'config.json' of 'someone/else' is not in the local cache"):
        Checkpoint("someone/else", HubOptions(cache_dir=str(tmp_path), local_files_only=True))


def test_a_fine_tune_in_other_precision_than_its_base(tmp_path: Path) -> None:
    """Not bad input at all: bfloat16 base, float32 fine-tune, and the other way round."""
    base = make_model(tiny_config("llama"))
    tuned = fine_tune(base)
    save_model(base, tmp_path / "base")
    save_model(tuned.float(), tmp_path / "finetuned")
    for one, other in (("base", "finetuned"), ("finetuned", "base")):
        compress(str(tmp_path / one), str(tmp_path / other), tmp_path / "delta", METHOD)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "delta")
        for name, tensor in load_tensors(tmp_path / other).items():
            ours = model.state_dict()[name]
            assert ours.dtype == tensor.dtype and (ours - tensor).norm() <= 0.1 * tensor.norm(), name
