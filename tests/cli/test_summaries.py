"""What the commands say of a repository that they have made."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from support.calibrated import TEXT
from support.tiny_models import Pair

from impart_hf.cli.main import main
from impart_hf.cli.next_commands import next_commands
from impart_hf.cli.summaries import compression_summary
from impart_hf.distillation import DistillReport
from impart_hf.repository.parts import kind_of, parts_of
from impart_hf.repository.report import CompressionReport, TensorReport

UP = "model.layers.0.mlp.up_proj.weight"


def tensor(name: str = UP, size: int = 1000, inputs: str | None = None, notes: tuple[str, ...] = ()) -> TensorReport:
    return TensorReport(name, "encoded", (100, 160), size, inputs=inputs, notes=list(notes))


def report(tensors: list[TensorReport], calibration: str = "", **fields: object) -> CompressionReport:
    method = {"name": "impart-rd", "compression_ratio": 32.0} | ({"calibration": calibration} if calibration else {})
    known = {
        "checkpoint_bytes": 320_000, "repository_bytes": 10_000, "sidecar_files": ["tokenizer.json"],
        "sidecar_bytes": 5_000, "reader_bytes": 200_000, "shortfall": "", "equal_tensors": 3, "seconds": 75.0,
    }  # fmt: skip
    return CompressionReport(method=method, tensors=tensors, **(known | fields))  # type: ignore[arg-type]


def lines(*arguments: object, **named: object) -> list[str]:
    return compression_summary(report(*arguments, **named), "out").splitlines()  # type: ignore[arg-type]


def test_sizes_are_of_the_whole_repository() -> None:
    norm = TensorReport("model.norm.weight", "kept", (64,), 128)
    rows = TensorReport("model.embed_tokens.weight", "added rows", (2, 64), 256)
    found = parts_of([tensor(), tensor("model.layers.0.self_attn.q_proj.weight", 3000), norm, rows], 10_000)
    assert [(part.kind, part.tensors, part.bytes, part.bits) for part in found] == [
        ("attention", 1, 3000, 1.5), ("mlp", 1, 1000, 0.5), ("stored whole", 2, 384, 16.0),
        ("headers, config.json, card", 0, 5616, None),
    ]  # fmt: skip
    assert [part.share for part in found] == pytest.approx([0.3, 0.1, 0.0384, 0.5616])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("transformer.h.0.self_attention.query_key_value.weight", "attention"),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "attention"),
        ("gpt_neox.layers.0.mlp.dense_h_to_4h.weight", "mlp"),
        ("model.decoder.layers.0.fc1.weight", "mlp"),
        ("language_model.model.layers.0.feed_forward.down_proj.weight", "mlp"),
        ("language_model.model.layers.0.feed_forward.experts.down_proj", "experts"),
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", "experts"),
        ("model.layers.0.mlp.gate.weight", "experts"),
        ("model.layers.0.mlp.gate_proj.weight", "mlp"),
        ("model.layers.0.mlp.shared_expert_gate.weight", "experts"),
        ("transformer.wte.weight", "embeddings and output"),
        ("lm_head.weight", "embeddings and output"),
        ("gpt_neox.embed_out.weight", "embeddings and output"),
        ("visual.blocks.0.attn.qkv.weight", "images"),
        ("multi_modal_projector.linear_1.weight", "images"),
        ("backbone.layers.0.mixer.out_proj.weight", "others"),
    ],
)
def test_kinds_by_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_the_summary_fits_on_a_screen_and_says_what_was_reached() -> None:
    found = compression_summary(report([tensor()]), "out", commands=["one", "two", "three"]).splitlines()
    assert found[0] == "out: 10.00 kB instead of 320.00 kB, ratio 32.00 (requested 32), in 1 min 15 s"
    assert len(found) <= 12 and [line.strip() for line in found[-3:]] == ["next: one", "two", "three"]
    assert any(re.match(r"  mlp +1\.00 kB +10\.0% +0\.50$", line) for line in found)


def test_quality_is_said_where_it_was_measured() -> None:
    assert not any("KL" in line for line in lines([tensor()]))
    better = lines([tensor()], distilled=DistillReport(300, 263, 0.0051, 0.0038, ()))[1]
    assert "0.0038" in better and "0.0051" in better and "263 of 300" in better
    same = lines([tensor(), tensor("b")], distilled=DistillReport(300, 0, 0.0051, 0.0051, ("b",)))
    assert "0.0051" in same[1] and "none of 300" in same[1] and same[2].endswith("1 of 2 tensors, not b")


def test_inputs_of_layers() -> None:
    guessed = lines([tensor(inputs="guessed"), tensor("b", inputs="guessed"), tensor("c")], "none: inputs guessed")
    assert any(line.startswith("inputs of 2 tensors were guessed") and "--calibration" in line for line in guessed)
    rounded = lines([tensor()], "none: rounded")
    assert any("nearest level" in line and "--calibration" in line for line in rounded)
    calibrated = lines([tensor(inputs="calibrated"), tensor("b")], "16 x 64 tokens, 1 of 2 matrices")
    assert any("2 encoded (1 of them calibrated on the text)" in line for line in calibrated)
    assert not any("--calibration" in line for line in [*calibrated, *lines([tensor()])])


def test_notes_shortfall_and_nothing_changed() -> None:
    found = lines([tensor(notes=("first", "second")), tensor("b", notes=("third",))], shortfall="by 10 bytes")
    assert found[1] == "ratio missed: by 10 bytes"
    assert f"notes on 2 tensors (--json has all), the first: {UP}: first" in found
    assert any("check BASE and FINETUNED" in line for line in lines([]))


def test_a_tokenizer_larger_than_the_delta_is_said() -> None:
    assert "more than the delta" not in "\n".join(lines([tensor()]))
    assert "tokenizer.json: 33.37 MB, more than the delta; " in "\n".join(lines([tensor()], sidecar_bytes=33_370_000))


@pytest.fixture(scope="module")
def repository(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made by summaries") / "delta"
    arguments = ["compress", str(tiny_pair.base), str(tiny_pair.finetuned), str(folder), "--ratio", "6", "--quiet"]
    assert main(arguments) == 0
    return folder


def test_commands_can_be_run_as_they_are(
    tiny_pair: Pair, repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect, evaluate, load = next_commands(str(repository), str(tiny_pair.base), str(tiny_pair.finetuned))
    assert main(shlex.split(inspect)[1:]) == 0
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = [str(text) if word == "TEXT" else word for word in shlex.split(evaluate)[1:]]
    assert command[1:4] == [str(tiny_pair.base), str(tiny_pair.finetuned), str(repository)]
    assert main([*command, "--samples", "2", "--length", "32", "--quiet"]) == 0
    assert (
        load == f'in Python: transformers.AutoModelForCausalLM.from_pretrained("{repository}", trust_remote_code=True)'
    )


def test_push_is_named_if_the_base_is_on_the_hub_and_nothing_was_pushed(repository: Path, tmp_path: Path) -> None:
    published = shutil.copytree(repository, tmp_path / "delta")
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(config | {"base_model_name_or_path": "user/base"}))
    assert next_commands(str(published), "user/base")[-1] == f"impart-hf push {published} USER/NAME"
    pushed = next_commands(str(published), "user/base", pushed="me/delta")
    assert not any("impart-hf push" in line for line in pushed) and '"me/delta"' in pushed[-1]


def test_models_that_evaluate_cannot_take_are_left_out(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    evaluate = next_commands(str(repository), "base", str(tmp_path))[1]
    assert shlex.split(evaluate)[2:4] == ["base", str(repository)]
    evaluate = next_commands(str(repository), "base", "tuned", base_revision="a", finetuned_revision="b")[1]
    assert shlex.split(evaluate)[2:4] == [str(repository), "--text"]


def test_quiet_is_silent_beside_the_summary(
    tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [str(tiny_pair.base), str(tiny_pair.finetuned)]
    none = ["--calibration", "none"]
    assert main(["compress", *pair, str(tmp_path / "delta"), "--ratio", "6", *none, "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out.startswith(f"{tmp_path / 'delta'}: ")
    # Deltas of the tiny pair are not light.
    assert re.search(r"inputs of \d+ tensors were guessed", printed.out)
