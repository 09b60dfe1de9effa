"""Recovery: the loss falls, the result is a checkpoint of the same kind, and whatever goes wrong leaves nothing."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.messages import naming
from support.tiny_models import (
    edit_json,
    edit_tensors,
    fine_tune,
    load_tensors,
    make_model,
    save_model,
    tiny_config,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from impart_hf.calibration.text import calibration_tokens
from impart_hf.common.files import OutputError
from impart_hf.evaluation.metrics import evaluate
from impart_hf.modeling.configuration_pruned import PRUNED_CONFIGS, is_pruned_type
from impart_hf.modeling.model_files import CheckpointError
from impart_hf.modeling.modeling_pruned import PrunedLanguageModel
from impart_hf.pruning.recovery import recover

pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.xdist_group("recovery")

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
TEXTS = [f"{n} is the number, {n * n} is its square, and {n} texts come before this one. " * 2 for n in range(60)]
HELD_OUT = [
    f"{n} is the number, {n * n} is its square, and {n} texts come before this one. " * 2 for n in range(70, 80)
]
SETTINGS: dict[str, Any] = {"steps": 12, "learning_rate": 3e-3, "length": 32, "device": "cpu", "progress": False}
HISTORY = {"base_model": "owner/base", "base_parameters": 200_000, "steps": [{"kind": "layers", "removed": [1]}]}


def save(folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """A model, its biases and norms random too, with a history of pruning where it has one."""
    config: Any = tiny_config(kind.removeprefix("pruned-"), **changes)
    if kind.startswith("pruned"):
        config = PRUNED_CONFIGS[f"pruned_{config.model_type}"].with_widths(
            config, num_attention_heads=[2, 4], num_key_value_heads=[1, 2], intermediate_size=[48, 128]
        )
    if not changes:
        config.pruning = HISTORY
    return save_model(fine_tune(make_model(config, dtype=dtype)), folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA with a layer less; not to be written to."""
    return save(tmp_path_factory.mktemp("model") / "tiny", "llama")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def perplexity(folder: Path) -> float:
    tokens = calibration_tokens(HELD_OUT, tiny_tokenizer(), samples=64, length=32, seed=0)
    # eager: sdpa leaves out what Gemma 2 does to the scores of attention
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return evaluate(model, model, tokens, 4)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        *itertools.product(["llama", "llama-tied", "pruned-llama", "pruned-llama-tied", "pruned-phi3"], [True, False]),
        *((kind, True) for kind in ("pruned-qwen2", "qwen3", "pruned-mistral", "pruned-gemma2", "pruned-gemma3")),
    ],
)
def test_recovery_lowers_the_loss(kind: str, lora: bool, tmp_path: Path) -> None:
    source, output = save(tmp_path / "model", kind), tmp_path / "recovered"
    before = contents(source)
    report = recover(str(source), output, TEXTS, lora=lora, eval_data=HELD_OUT, **SETTINGS)
    assert contents(source) == before
    assert report.method == ("lora" if lora else "full") and report.steps == 12 and report.seconds > 0
    assert report.last_loss < report.first_loss
    assert report.perplexity_before is not None and report.perplexity_after is not None
    assert report.perplexity_after < 0.9 * report.perplexity_before
    assert report.perplexity_before == pytest.approx(perplexity(source), rel=1e-5)
    assert report.perplexity_after == pytest.approx(perplexity(output), rel=1e-5)
    json.dumps(report.to_dict())
    check_checkpoint(source, output, {"method": report.method, "steps": 12, "learning_rate": 3e-3, "data": "60 texts"})


def check_checkpoint(source: Path, output: Path, step: dict[str, Any]) -> None:
    """The same tensors in the same dtypes, the same configuration with one step more, a card and a tokenizer."""
    old, new = load_tensors(source), load_tensors(output)
    assert {n: (t.shape, t.dtype) for n, t in old.items()} == {n: (t.shape, t.dtype) for n, t in new.items()}
    assert not any(torch.equal(old[n], new[n]) for n in old if "_proj.weight" in n)
    frozen = [torch.equal(old[n], new[n]) for n in old if "_proj.weight" not in n]
    assert all(frozen) if step["method"] == "lora" else not any(frozen)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, output)]
    steps = [*HISTORY["steps"], {"kind": "recovery", **step}]  # type: ignore[misc]
    assert configs[1].pop("pruning") == {**HISTORY, "steps": steps}
    configs[0].pop("pruning")
    assert configs[1] == configs[0]
    model = AutoModelForCausalLM.from_pretrained(output)
    assert isinstance(model, PrunedLanguageModel) == is_pruned_type(configs[0]["model_type"])
    assert model.config.use_cache
    if configs[0]["tie_word_embeddings"]:
        assert model.lm_head.weight is model.model.embed_tokens.weight and "lm_head.weight" not in new
    assert AutoTokenizer.from_pretrained(output)("a text") == tiny_tokenizer()("a text")
    card = (output / "README.md").read_text()
    assert "owner/base" in card and "ecovery" in card
    readers = {p.name for p in output.glob("*.py")}
    assert (readers >= {"modeling_pruned.py", "configuration_pruned.py"}) == bool(configs[0].get("auto_map"))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_lora_merged_is_what_was_trained(lora: bool, tmp_path: Path) -> None:
    """In float32, where nothing is rounded: training goes on from where it ended."""
    source = save(tmp_path / "model", "llama", torch.float32)
    first = recover(str(source), tmp_path / "one", TEXTS, lora=lora, eval_data=TEXTS[:20], **SETTINGS)
    second = recover(str(tmp_path / "one"), tmp_path / "two", TEXTS, lora=lora, eval_data=TEXTS[:20], **SETTINGS)
    assert second.perplexity_before == pytest.approx(first.perplexity_after, rel=1e-5)
    steps = json.loads((tmp_path / "two" / "config.json").read_text())["pruning"]["steps"]
    assert [step["kind"] for step in steps] == ["layers", "recovery", "recovery"]


def test_each_tensor_keeps_its_dtype(model: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "model", "llama")

    def wider_norms(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if "norm" in n]:
            tensors[name] = tensors[name].float()

    edit_tensors(source, wider_norms)
    recover(str(source), tmp_path / "out", TEXTS, **{**SETTINGS, "steps": 2})
    dtypes = {name: tensor.dtype for name, tensor in load_tensors(source).items()}
    assert {name: tensor.dtype for name, tensor in load_tensors(tmp_path / "out").items()} == dtypes
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}


def test_a_model_that_was_not_pruned_gets_no_history(tmp_path: Path) -> None:
    source = save(tmp_path / "model", "llama", attention_bias=True, mlp_bias=True)
    recover(str(source), tmp_path / "out", TEXTS, lora=False, **{**SETTINGS, "steps": 2})
    assert "pruning" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "README.md").exists()


def test_epochs_go_through_all_of_the_text(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text("\n".join(TEXTS[:12]))
    sequences = len(calibration_tokens(path, tiny_tokenizer(), samples=10_000, length=32))
    settings = {**SETTINGS, "steps": None, "epochs": 2.0, "learning_rate": None}
    report = recover(str(model), tmp_path / "out", path, batch_size=3, **settings)
    assert report.steps == 2 * (sequences // 3)
    (step,) = json.loads((tmp_path / "out" / "config.json").read_text())["pruning"]["steps"][1:]
    assert step == {
        "kind": "recovery", "method": "lora", "steps": report.steps, "learning_rate": 1e-4, "data": "train.txt"
    }  # fmt: skip
    full = recover(str(model), tmp_path / "full", path, lora=False, **{**settings, "epochs": 0.1})
    assert full.learning_rate == 2e-5


@pytest.mark.slow
def test_same_seed_same_weights(model: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        recover(str(model), tmp_path / name, TEXTS, seed=seed, **{**SETTINGS, "steps": 3})
    one, again, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "again", "other"))
    assert one == again != other


def test_more_of_the_trainers_settings(model: Path, tmp_path: Path) -> None:
    training = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "lr_scheduler_type": "linear"}
    report = recover(str(model), tmp_path / "out", TEXTS, training=training, **{**SETTINGS, "batch_size": 4})
    assert report.steps == SETTINGS["steps"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.use_cache


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"steps": 0}, ("steps", 0)),
        ({"steps": None, "epochs": 0}, "epochs"),
        ({"steps": None, "epochs": math.inf}, "epochs"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"length": 1}, "length"),
        ({"rank": 0}, "rank"),
        ({"device": "cuda:99"}, "device"),
        ({"training": {"epochs": 1}}, "'epochs'"),
        ({"training": {"save_strategy": "steps"}}, "'save_strategy'"),
        ({"training": {"num_train_epochs": 2}}, "'num_train_epochs'"),
        ({"training": {"learning_rate": 1.0}}, "'learning_rate'"),
        ({"training": {"gradient_accumulation_steps": 3}}, ("batch_size", 4, 3)),
        ({"training": {"gradient_accumulation_steps": 0}}, "gradient_accumulation_steps"),
        ({"training": {"lr_scheduler_type": "steep"}}, "steep"),
        ({"eval_data": [""]}, ("list", "no text")),
        ({"eval_data": ["short"]}, ("text", "tokens", SETTINGS["length"])),
        ({"eval_data": []}, ("list", "no text")),
    ],
)
def test_bad_settings(model: Path, tmp_path: Path, changes: dict[str, Any], names: Any) -> None:
    with pytest.raises(ValueError, match=naming(names)):
        recover(str(model), tmp_path / "out", TEXTS, **{**SETTINGS, **changes})
    assert not any(tmp_path.iterdir())


def test_bad_data_and_models(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=naming("list", "no text")):
        recover(str(model), tmp_path / "out", [" "], **SETTINGS)
    with pytest.raises(FileNotFoundError, match=naming(tmp_path / "nothing.txt")):
        recover(str(model), tmp_path / "out", tmp_path / "nothing.txt", **SETTINGS)
    assert not any(tmp_path.iterdir())
    other = save_model(make_model(tiny_config("gemma")), tmp_path / "gemma")
    with pytest.raises(ValueError, match=naming(other, "'gemma'", "qwen2")):
        recover(str(other), tmp_path / "out", TEXTS, **SETTINGS)
    with pytest.raises(OutputError, match=naming(other)):
        recover(str(model), other, TEXTS, **SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["gemma"]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_nan_writes_nothing(lora: bool, tmp_path: Path) -> None:
    source = save(tmp_path / "model", "llama")
    edit_tensors(source, lambda tensors: tensors["model.layers.0.self_attn.q_proj.weight"].fill_(math.nan))
    with pytest.raises(ValueError, match=naming("loss", "step 1", "nan")):
        recover(str(source), tmp_path / "out", TEXTS, lora=lora, **SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_weights_that_their_dtype_cannot_hold(tmp_path: Path) -> None:
    source = save(tmp_path / "model", "llama", torch.float16)

    def large(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"].fill_(65504)

    edit_tensors(source, large)
    with pytest.raises(ValueError, match="finite"):
        recover(str(source), tmp_path / "out", TEXTS, lora=False, **{**SETTINGS, "learning_rate": 1e3, "steps": 4},
                training={"lr_scheduler_type": "constant"})  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_interrupted_runs_leave_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules[recover.__module__], "copy_sidecar_files", full_disk)
    with pytest.raises(OSError, match=naming("disk", "full")):
        recover(str(model), tmp_path / "out", TEXTS, **{**SETTINGS, "steps": 1})
    assert not any(tmp_path.iterdir())


def test_settings_of_generation_are_copied_as_they_are(tmp_path: Path) -> None:
    """Those of Llama 2, for one, do not pass the checks of `save_pretrained`."""
    source = save(tmp_path / "model", "llama")
    edit_json(source / "generation_config.json", temperature=0.6, top_p=0.9, do_sample=False)
    recover(str(source), tmp_path / "out", TEXTS, **{**SETTINGS, "steps": 1})
    name = "generation_config.json"
    assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kind", ["llama", "pruned-llama"])
@pytest.mark.parametrize(
    "fields",
    [
        {"pad_token_id": -1},
        {"output_attentions": True},
        {"return_dict": False},
        {"rope_theta": 12345.0, "rope_parameters": None, "torch_dtype": "bfloat16", "a_field_of_yours": [1]},
    ],
    ids=["pad_token_id", "output_attentions", "return_dict", "fields of old versions"],
)
def test_a_configuration_that_loads_is_written_as_it_was(
    fields: dict[str, Any], kind: str, lora: bool, tmp_path: Path
) -> None:
    """`save_pretrained` would refuse the first two, and change the third."""
    source = save(tmp_path / "model", kind)
    edit_json(source / "config.json", **fields)
    recover(str(source), tmp_path / "out", TEXTS, lora=lora, **{**SETTINGS, "steps": 2})
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert after.pop("pruning")["steps"][-1]["kind"] == "recovery"
    before.pop("pruning")
    assert after == before
    old, new = load_tensors(source), load_tensors(tmp_path / "out")
    assert not torch.equal(old[Q_PROJ], new[Q_PROJ])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_parameter(Q_PROJ), new[Q_PROJ])


@pytest.mark.parametrize("lost", ["room", "readme"])
def test_what_cannot_be_written_is_found_before_training(
    lost: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovery = sys.modules[recover.__module__]
    monkeypatch.setattr(recovery, "train", lambda *_, **__: pytest.fail("trained"))
    if lost == "room":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
        expected: Any = pytest.raises(OutputError, match=naming("disk", 1))
    else:

        def gone(*_: Any, **__: Any) -> None:
            raise CheckpointError("README.md cannot be downloaded")

        monkeypatch.setattr(recovery, "fetch_file", gone)
        expected = pytest.raises(CheckpointError, match="README.md")
    with expected:
        recover(str(model), tmp_path / "out", TEXTS, **SETTINGS)
    assert not any(tmp_path.iterdir())


def test_without_peft(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=naming("PEFT", "impart-hf[pruning]")):
        recover(str(model), tmp_path / "out", TEXTS, **SETTINGS)
