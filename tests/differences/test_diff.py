"""Two models, or a delta repository and its base: what differs by tensor, layer and kind, and which method fits."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from support.adapters import lora, merged, save_adapter
from support.disguises import DISGUISES
from support.loaded_models import decode_all
from support.messages import naming
from support.refusals import tree
from support.tiny_models import (
    VOCABULARY,
    Pair,
    edit_json,
    edit_tensors,
    fine_tune,
    load_tensors,
    make_model,
    save_model,
    save_pair,
    tiny_config,
)

import impart_hf
from impart_hf import BitDeltaConfig, ExactConfig, LowRankConfig, compress
from impart_hf.compression.compatibility import IncompatibleModelsError
from impart_hf.differences.report import DiffReport
from impart_hf.modeling.delta_repository import WrongBaseError
from impart_hf.modeling.model_files import CheckpointError
from impart_hf.modeling.ordered_bits import integers

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def diff(one: Path, other: Path | None = None, **options: object) -> DiffReport:
    return impart_hf.diff(str(one), None if other is None else str(other), progress=False, **options)


def sparse(folder: Path, every: int) -> None:
    """Move every so manieth entry of every matrix by one step."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.dim() == 2:
                bits = integers(tensor).clone()
                bits[::every] += 1
                tensors[name] = bits.view(tensor.dtype).view(tensor.shape)

    edit_tensors(folder, edit)


def test_numbers_are_those_of_the_files(tiny_pair: Pair) -> None:
    report = diff(tiny_pair.base, tiny_pair.finetuned)
    before, after = load_tensors(tiny_pair.base), load_tensors(tiny_pair.finetuned)
    assert [t.name for t in report.tensors] == sorted(after)
    for t in report.tensors:
        one, other = before[t.name].double(), after[t.name].double()
        assert t.changed == int((one != other).sum())
        assert t.norm == pytest.approx(float((one - other).norm()), rel=1e-5)
        assert t.relative_norm == pytest.approx(float((one - other).norm() / one.norm()), rel=1e-5)
        assert (t.stable_rank is None) == (other.dim() == 1 or other.numel() < 4096)
        assert t.dense_bytes == after[t.name].nbytes and 0 < t.exact_bytes < t.dense_bytes
    total = report.total
    assert total.changed == sum(int((before[n] != after[n]).sum()) for n in after)
    assert total.dense_bytes == sum(t.nbytes for t in after.values())
    assert total.entries == sum(t.numel() for t in after.values())
    assert not report.config and not report.files and not report.dtypes and not report.absent


def test_sums_by_layer_and_kind(tiny_pair: Pair) -> None:
    report = diff(tiny_pair.base, tiny_pair.finetuned, spectra=False)
    kinds = {group.label: group for group in report.kinds}
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert kinds.keys() == linear | {"embeddings", "norms", "output projection"}
    assert kinds["norms"].tensors == 5 and all(kinds[name].tensors == 2 for name in linear)
    assert [group.label for group in report.layers] == ["0", "1", "no layer"]
    assert report.layers[0].tensors == 9 and report.layers[2].tensors == 3
    for groups in (report.kinds, report.layers):
        for field in ("tensors", "changed_tensors", "entries", "changed", "exact_bytes", "dense_bytes"):
            assert sum(getattr(group, field) for group in groups) == getattr(report.total, field)
    down = [t for t in report.tensors if "down_proj" in t.name]
    assert kinds["down_proj"].relative_norm == pytest.approx(sum(t.relative_norm or 0 for t in down) / 2)
    assert kinds["down_proj"].share == sum(t.changed for t in down) / sum(t.entries for t in down)
    assert all(t.stable_rank is None for t in report.tensors) and not report.estimates
    assert report.verdict.method == "impart-rd" and report.verdict.ratio is None


# The verdict --------------------------------------------------------------------------------------------------------


def test_equal_models(tiny_pair: Pair) -> None:
    report = diff(tiny_pair.base, tiny_pair.base)
    assert report.verdict.method == "equal" and not report.verdict.commands
    assert report.total.changed == report.total.exact_bytes == 0 and not report.estimates
    assert all(t.is_equal and t.bits == 0 for t in report.tensors)


def test_other_files_only(pair: Pair) -> None:
    shutil.copytree(pair.base, pair.base.parent / "copy")
    copy = pair.base.parent / "copy"
    edit_json(copy / "config.json", eos_token_id=3)
    edit_json(copy / "tokenizer_config.json", padding_side="left")
    (copy / "LICENSE").write_text("MIT")
    report = diff(pair.base, copy)
    assert report.verdict.method == "metadata" and not report.verdict.commands
    assert report.config == ("eos_token_id",) and report.files == ("LICENSE", "tokenizer_config.json")


def test_a_sparse_change_is_for_an_exact_store(pair: Pair) -> None:
    shutil.copytree(pair.base, pair.base.parent / "sparse")
    sparse(pair.base.parent / "sparse", 50)
    report = diff(pair.base, pair.base.parent / "sparse")
    assert report.total.share == pytest.approx(0.02, rel=0.01)
    # Up or down: which, the sign of the base's number decides, so that it is one bit for each that moved.
    entropy = 0.02 - 0.02 * math.log2(0.02) - 0.98 * math.log2(0.98)
    assert report.total.bits == pytest.approx(entropy, rel=0.1)
    assert report.verdict.method == "exact" and report.verdict.ratio is None
    assert report.verdict.commands == (
        f"impart-hf compress {pair.base} {pair.base.parent / 'sparse'} OUT --method exact",
    )


@pytest.mark.parametrize(("every", "method"), [(8, "exact"), (4, "impart-rd")])
def test_few_bits_are_for_an_exact_store(pair: Pair, every: int, method: str) -> None:
    """0.67 bits for an entry, or 1.06."""
    shutil.copytree(pair.base, pair.base.parent / "sparse")
    sparse(pair.base.parent / "sparse", every)
    assert diff(pair.base, pair.base.parent / "sparse", spectra=False).verdict.method == method


def test_a_change_of_all_weights_is_for_impart_rd(tmp_path: Path) -> None:
    config = tiny_config("llama", hidden_size=256, intermediate_size=512)
    pair = save_pair(tmp_path, config)
    report = diff(pair.base, pair.finetuned)
    shares = [estimate.share[1] for estimate in report.estimates]
    assert [e.ratio for e in report.estimates][:3] == [8, 16, 32] and shares[-1] > 10 * shares[0]
    assert all(e.share[0] < e.share[1] < e.share[2] for e in report.estimates)
    fitting = [e.ratio for e in report.estimates if e.share[1] < 0.01]
    assert report.verdict.method == "impart-rd"
    assert report.verdict.ratio == (fitting[-1] if fitting else 8)
    assert report.verdict.commands[0].endswith(f"OUT --method impart-rd --ratio {report.verdict.ratio:g}")
    assert "estimate" in report.verdict.text


def test_the_estimate_is_near_the_forecast_of_the_repository(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, tiny_config("llama", hidden_size=256, intermediate_size=512))
    expected = {e.ratio: e.share[1] for e in diff(pair.base, pair.finetuned).estimates}
    method = impart_hf.ImPartRdConfig(compression_ratio=16)
    found = compress(
        str(pair.base), str(pair.finetuned), tmp_path / "out", method, calibration=None, progress=False
    ).method["kl_forecast"][1]
    assert 0.3 < expected[16] / found < 3


def test_nan_needs_an_exact_store(pair: Pair) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][0, :3] = math.nan

    edit_tensors(pair.finetuned, spoil)
    report = diff(pair.base, pair.finetuned)
    assert report.total.nonfinite == 3 and report.verdict.method == "exact" and "NaN" in report.verdict.text
    assert math.isfinite(report.total.relative_norm)
    json.dumps(report.to_dict(), allow_nan=False)


# Pairs that are stored differently ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_another_dtype(tmp_path: Path, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    base = make_model(tiny_config("llama"), dtype=torch.bfloat16)
    folders = [save_model(base.to(dtype), tmp_path / str(dtype)) for dtype in dtypes]
    report = diff(folders[0], folders[1])
    assert list(report.dtypes.values()) == [21]
    if dtypes[1] == torch.bfloat16:
        assert report.verdict.method == "metadata" and report.total.changed == 0


def test_added_tokens(tmp_path: Path) -> None:
    base = make_model(tiny_config("llama"))
    tuned = fine_tune(base)
    tuned.resize_token_embeddings(VOCABULARY + 5, mean_resizing=False)
    report = diff(save_model(base, tmp_path / "base"), save_model(tuned, tmp_path / "tuned"))
    rows = {t.name: t.added_rows for t in report.tensors if t.added_rows}
    assert rows == {EMBEDDINGS: 5, HEAD: 5} and report.total.added_rows == 10
    assert "vocab_size" in report.config
    back = diff(tmp_path / "tuned", tmp_path / "base")  # and cut off
    assert back.total.added_rows == 0 and back.total.changed == report.total.changed


@pytest.mark.parametrize("fused", ["base", "tuned"])
def test_experts_one_by_one_and_in_a_stack(tmp_path: Path, fused: str) -> None:
    base = make_model(tiny_config("mixtral"))
    tuned = fine_tune(base)
    for name, model in (("base", base), ("tuned", tuned)):
        folder = tmp_path / name
        save_model(model, folder, **({"save_original_format": False} if name == fused else {}))
    report = diff(tmp_path / "base", tmp_path / "tuned")
    experts = {group.label: group for group in report.kinds}["experts"]
    names = [t.name for t in report.tensors if t.kind == "experts"]
    one, other = base.state_dict(), tuned.state_dict()
    changed = sum(int((one[n] != other[n]).sum()) for n in one if "experts" in n or "mlp.gate." in n)
    assert experts.changed == changed
    assert (len(names) == 6) == (fused == "base")
    assert sum(len(t.spectra) for t in report.tensors if ".experts." in t.name) == (16 if fused == "base" else 24)


def test_names_of_wrappers_and_tied_embeddings(tmp_path: Path) -> None:
    base = make_model(tiny_config("llama-tied"))
    tuned = fine_tune(base)
    save_model(base, tmp_path / "base")
    save_model(tuned, tmp_path / "tuned")
    wanted = diff(tmp_path / "base", tmp_path / "tuned").to_dict()
    DISGUISES["without prefix"](tmp_path / "tuned")
    found = diff(tmp_path / "base", tmp_path / "tuned").to_dict()
    assert found["tensors"] == wanted["tensors"] and HEAD not in {t["name"] for t in found["tensors"]}


def test_an_adapter_is_its_merge(tmp_path: Path) -> None:
    base = save_model(make_model(tiny_config("llama"), dtype=torch.float32), tmp_path / "base")
    adapter = save_adapter(base, lora(), tmp_path / "adapter")
    merged(base, adapter, tmp_path / "merged")
    found, wanted = diff(base, adapter), diff(base, tmp_path / "merged")
    assert [t.to_dict() for t in found.tensors] == [t.to_dict() for t in wanted.tensors]
    assert found.total.changed and max(t.leading[16] for t in found.tensors if t.leading) > 0.999
    assert {group.label for group in found.kinds if not group.changed} == {"embeddings", "norms", "output projection"}


# Delta repositories -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LowRankConfig(compression_ratio=4), BitDeltaConfig(compression_ratio=8)])
def test_a_delta_repository_and_its_base(
    tiny_pair: Pair, tmp_path: Path, method: impart_hf.LowRankConfig | impart_hf.BitDeltaConfig
) -> None:
    delta = tmp_path / "delta"
    compress(str(tiny_pair.base), str(tiny_pair.finetuned), delta, method, progress=False)
    alone, beside = diff(delta), diff(tiny_pair.base, delta)
    decoded, before = decode_all(delta), load_tensors(tiny_pair.base)
    for report in (alone, beside):
        assert {t.name: t.changed for t in report.tensors} == {
            name: int((before[name] != tensor).sum()) for name, tensor in decoded.items()
        }
        assert report.base == str(tiny_pair.base) and report.finetuned == str(delta)
    assert [t.to_dict() for t in alone.tensors] == [t.to_dict() for t in beside.tensors]
    assert alone.verdict.method == "stored" and not alone.verdict.commands
    assert beside.verdict.commands[0] == f"impart-hf reconstruct {delta} DENSE"
    assert f"{tiny_pair.base} DENSE OUT" in beside.verdict.commands[1]
    # what the compression lost: the fine-tune against the delta
    lost = diff(tiny_pair.finetuned, delta)
    after = load_tensors(tiny_pair.finetuned)
    error = math.sqrt(sum(float((after[n].double() - t.double()).norm()) ** 2 for n, t in decoded.items()))
    assert math.sqrt(sum(t.norm**2 for t in lost.tensors)) == pytest.approx(error, rel=1e-4)


def test_an_exact_delta_is_the_fine_tune(tiny_pair: Pair, tmp_path: Path) -> None:
    report = compress(str(tiny_pair.base), str(tiny_pair.finetuned), tmp_path / "delta", ExactConfig(), progress=False)
    found, wanted = diff(tmp_path / "delta"), diff(tiny_pair.base, tiny_pair.finetuned)
    assert [t.to_dict() for t in found.tensors] == [t.to_dict() for t in wanted.tensors]
    assert diff(tiny_pair.finetuned, tmp_path / "delta").verdict.method == "equal"
    records = {t.name: t.bytes for t in report.tensors}
    assert all(t.exact_bytes <= records[t.name] for t in wanted.tensors if not t.is_equal)


def test_two_delta_repositories(tiny_pair: Pair, tiny_repository: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    compress(str(tiny_pair.base), str(tiny_pair.finetuned), other, LowRankConfig(compression_ratio=8), progress=False)
    report = diff(tiny_repository, other)
    one, two = decode_all(tiny_repository), decode_all(other)
    assert {t.name: t.changed for t in report.tensors} == {n: int((one[n] != two[n]).sum()) for n in one}
    assert [command.split()[1] for command in report.verdict.commands] == ["reconstruct", "reconstruct", "compress"]
    assert diff(tiny_repository, tiny_repository).verdict.method == "equal"


def test_the_base_of_a_delta_repository_can_be_given(pair: Pair, repository: Path) -> None:
    wanted = diff(repository).total
    moved = pair.base.rename(pair.base.parent / "moved")
    edit_json(repository / "config.json", base_model_name_or_path=str(pair.base))
    with pytest.raises(CheckpointError, match=naming(repository, "--base-model")):
        diff(repository)
    assert diff(repository, base_model=str(moved)).total == wanted
    with pytest.raises(WrongBaseError, match=naming(repository)):
        diff(repository, base_model=str(pair.finetuned))


# Bad input ----------------------------------------------------------------------------------------------------------


def test_bad_input(pair: Pair, tiny_repository: Path, tmp_path: Path) -> None:
    other = save_model(make_model(tiny_config("llama", hidden_size=32)), tmp_path / "other")
    gemma = save_model(make_model(tiny_config("gemma")), tmp_path / "gemma")
    adapter = save_adapter(pair.base, lora(), tmp_path / "adapter")
    before = tree(tmp_path)
    with pytest.raises(IncompatibleModelsError, match=naming(other, pair.base)):
        diff(pair.base, other)
    with pytest.raises(IncompatibleModelsError, match=naming("'llama'", "'gemma'")):
        diff(pair.base, gemma)
    with pytest.raises(CheckpointError, match=naming(pair.base, "delta repository")):
        diff(pair.base)
    with pytest.raises(CheckpointError, match=naming(tmp_path / "nowhere")):
        diff(pair.base, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=naming(tmp_path, "config.json")):
        diff(tmp_path, pair.base)
    with pytest.raises(CheckpointError, match=naming(adapter, tiny_repository)):
        diff(tiny_repository, adapter)
    with pytest.raises(CheckpointError, match=naming(adapter)):
        diff(adapter, pair.base)
    with pytest.raises(ValueError, match=naming("base_model", pair.base)):
        diff(pair.base, pair.finetuned, base_model=str(pair.base))
    with pytest.raises(ValueError, match=naming("base_revision")):
        diff(tiny_repository, base_revision="main")
    with pytest.raises(ValueError, match=naming("cuda:99")):
        diff(pair.base, pair.finetuned, device="cuda:99")
    assert tree(tmp_path) == before
