"""Both halves together: a recovered pruned model, kept as a delta against the pruned model that it was trained from."""

from __future__ import annotations

import copy
import json
import pickle
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hub_client import run_client
from support.loopback_hub import LoopbackHub, hub_env
from support.messages import naming
from support.pruned_models import FAMILIES, KEPT, pruned_and_dense, run_without_impart_hf
from support.tiny_models import Pair, fine_tune, make_model, save_model, tiny_config
from support.without_impart_hf import WITHOUT_IMPART_HF
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, dynamic_module_utils

from impart_hf import (
    DareConfig,
    DeltaCompressedConfig,
    DeltaCompressedForCausalLM,
    ImPartQtConfig,
    LowRankConfig,
    PrunedLlamaConfig,
    PrunedLlamaForCausalLM,
    compress,
)
from impart_hf.compression.compatibility import IncompatibleModelsError
from impart_hf.distillation import DistillSettings
from impart_hf.hub import push
from impart_hf.modeling.model_files import HubOptions
from impart_hf.repository.open import open_repository
from impart_hf.repository.reader_files import pruned_reader_files, reader_files
from impart_hf.repository.reconstruct import reconstruct
from impart_hf.repository.verify import verify

IDS = torch.arange(5, 45).view(2, 20)
WIDTHS = [(len(k.groups) * len(k.queries), len(k.groups), len(k.channels)) for k in KEPT]
TEXT = Path(str(textwrap.__file__)).read_text("utf-8")
HISTORY = {
    "base_model": "tester/llama",
    "base_parameters": 200_000,
    "steps": [{"kind": "layers", "removed": [1], "merged_into": {"1": 0}, "score": "igia", "top_percent": 20.0}],
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A width-pruned model and a fine-tune of it; not to be written to."""
    root = tmp_path_factory.mktemp("pair")
    pruned, _ = pruned_and_dense(dtype=torch.bfloat16)
    pruned.config.pruning = HISTORY
    return Pair(save_model(pruned, root / "base"), save_model(fine_tune(pruned), root / "finetuned"))


@pytest.fixture(scope="module")
def layer_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A LLaMA that lost layers, and a fine-tune of it."""
    root = tmp_path_factory.mktemp("layers")
    model = make_model(tiny_config(pruning=HISTORY))
    return Pair(save_model(model, root / "base"), save_model(fine_tune(model), root / "finetuned"))


@pytest.fixture(scope="module")
def repository(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository") / "delta"
    compress(str(pair.base), str(pair.finetuned), folder, LowRankConfig(compression_ratio=3))
    return folder


def load(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def opened(folder: Path) -> Any:
    return open_repository(str(folder), HubOptions())


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_the_pruned_model_comes_back(repository: Path, pair: Pair) -> None:
    verify(opened(repository))
    model = load(repository)
    assert isinstance(model, DeltaCompressedForCausalLM) and isinstance(model, PrunedLlamaForCausalLM)
    assert type(model.config) is PrunedLlamaConfig and model.config.widths == WIDTHS
    assert model.config.pruning == HISTORY and type(model).__name__ == "PrunedLlamaForCausalLM"
    stored = opened(repository)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored.tensor(name)), name
    base, finetuned = logits(load(pair.base)), logits(load(pair.finetuned))
    assert distance(logits(model), finetuned) < 0.7 * distance(base, finetuned)
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    answers = [model.generate(IDS, cache_implementation=kind, **settings).tolist() for kind in ("dynamic", "static")]
    assert answers[0] == answers[1]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and torch.equal(logits(twin), logits(model))


@pytest.mark.parametrize("family", list(FAMILIES)[1:])
def test_every_family(family: str, tmp_path: Path) -> None:
    """Made, loaded, reconstructed; the delta is far from the base, and near the fine-tune."""
    pruned, _ = pruned_and_dense(dtype=torch.bfloat16, family=family)
    pruned.config.pruning = HISTORY
    base, finetuned = save_model(pruned, tmp_path / "base"), save_model(fine_tune(pruned), tmp_path / "finetuned")
    compress(str(base), str(finetuned), tmp_path / "delta", LowRankConfig(compression_ratio=3))
    verify(opened(tmp_path / "delta"))
    model = load(tmp_path / "delta")
    assert isinstance(model, DeltaCompressedForCausalLM) and isinstance(model, type(pruned))
    assert type(model.config) is type(pruned.config) and model.config.widths == WIDTHS
    expected = logits(load(finetuned))
    assert distance(logits(model), expected) < 0.8 * distance(logits(load(base)), expected)
    reconstruct(opened(tmp_path / "delta"), tmp_path / "dense")
    config = json.loads((tmp_path / "dense/config.json").read_text())
    assert config["auto_map"] == type(pruned.config).auto_classes() and config["pruning"] == HISTORY
    dense = load(tmp_path / "dense")
    assert type(dense) is type(pruned) and torch.equal(logits(dense), logits(model))


def test_reader_files_of_both_kinds(repository: Path) -> None:
    names = {path.name for path in reader_files()}
    assert {path.name for path in pruned_reader_files()} < names
    assert names <= {path.name for path in repository.iterdir()}


def test_config_round_trip(repository: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(repository)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.text_config.widths == config.text_config.widths == WIDTHS
    assert again.text_config.to_dict() == config.text_config.to_dict()


def test_hostile_text_config(repository: Path, tmp_path: Path) -> None:
    config = json.loads((repository / "config.json").read_text())
    for change, words in (
        ({"per_layer_config": {"7": {"intermediate_size": 3}}}, "layers 0 to 3"),
        ({"num_attention_heads": "8"}, "num_attention_heads"),
    ):
        text_config = {**config["text_config"], **change}
        (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": text_config}))
        with pytest.raises(ValueError, match=naming(words)):
            AutoConfig.from_pretrained(tmp_path)


def test_merge_and_unload(repository: Path, tmp_path: Path) -> None:
    model = load(repository)
    expected = logits(model)
    model.save_pretrained(tmp_path / "delta")
    assert (tmp_path / "delta" / "delta_model.safetensors").read_bytes() == (
        repository / "delta_model.safetensors"
    ).read_bytes()
    dense = model.merge_and_unload()
    assert type(dense) is PrunedLlamaForCausalLM
    dense.save_pretrained(tmp_path / "dense")
    assert {path.name for path in pruned_reader_files()} <= {p.name for p in (tmp_path / "dense").iterdir()}
    loaded = load(tmp_path / "dense")
    assert type(loaded) is PrunedLlamaForCausalLM and torch.equal(logits(loaded), expected)
    trained = load(repository)
    with torch.no_grad():
        trained.model.layers[1].mlp.up_proj.weight.mul_(2)
    trained.save_pretrained(tmp_path / "trained")  # no longer what the delta says
    assert type(load(tmp_path / "trained")) is PrunedLlamaForCausalLM
    assert torch.equal(logits(load(tmp_path / "trained")), logits(trained))


def test_reconstruct(repository: Path, tmp_path: Path) -> None:
    reconstruct(opened(repository), tmp_path / "dense")
    assert {path.name for path in (tmp_path / "dense").glob("*.py")} == {path.name for path in pruned_reader_files()}
    dense = load(tmp_path / "dense")
    assert type(dense) is PrunedLlamaForCausalLM and torch.equal(logits(dense), logits(load(repository)))


def test_calibration(pair: Pair, tmp_path: Path) -> None:
    """Records made with the text differ from those without, and come closer to the fine-tune."""
    size = {"calibration_samples": 16, "calibration_length": 64}
    finetuned, distances = logits(load(pair.finetuned)), {}
    for name, calibration in (("plain", None), ("calibrated", [TEXT])):
        method = ImPartQtConfig(compression_ratio=4)
        compress(str(pair.base), str(pair.finetuned), tmp_path / name, method, calibration=calibration, **size)
        verify(opened(tmp_path / name))
        distances[name] = distance(logits(load(tmp_path / name)), finetuned)
    assert distances["calibrated"] < distances["plain"] < distance(logits(load(pair.base)), finetuned)


@pytest.mark.slow
def test_distillation(pair: Pair, tmp_path: Path) -> None:
    report = compress(
        str(pair.base),
        str(pair.finetuned),
        tmp_path / "delta",
        DareConfig(compression_ratio=4),
        distill=[TEXT],
        calibration_samples=16,
        calibration_length=32,
        distill_settings=DistillSettings(steps=10),
    )
    assert report.distilled is not None and report.distilled.after < report.distilled.before
    verify(opened(tmp_path / "delta"))
    assert load(tmp_path / "delta").config.widths == WIDTHS


def test_a_llama_that_lost_layers(layer_pair: Pair, tmp_path: Path) -> None:
    compress(str(layer_pair.base), str(layer_pair.finetuned), tmp_path / "delta", LowRankConfig(compression_ratio=3))
    verify(opened(tmp_path / "delta"))
    model = load(tmp_path / "delta")
    assert isinstance(model, LlamaForCausalLM) and model.config.model_type == "llama"
    assert model.config.pruning == HISTORY
    dense = model.merge_and_unload()
    dense.save_pretrained(tmp_path / "dense")
    assert load(tmp_path / "dense").config.pruning == HISTORY


def test_pruned_differently(pair: Pair, tmp_path: Path) -> None:
    kept = (*KEPT[:2], KEPT[3], KEPT[2])
    other = save_model(pruned_and_dense(kept, torch.bfloat16)[0], tmp_path / "other")
    with pytest.raises(IncompatibleModelsError):
        compress(str(pair.base), str(other), tmp_path / "delta", LowRankConfig(compression_ratio=3))


REMOTE_CODE = """
import copy, json, pickle
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, pipeline

repo, out, ids, widths = sys.argv[1:]
ids, widths = torch.tensor(json.loads(ids)), [tuple(w) for w in json.loads(widths)]
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
assert isinstance(model, LlamaForCausalLM) and type(model).__name__ == "PrunedLlamaForCausalLM"
assert model.config.widths == widths and hasattr(model, "delta_config")
assert AutoConfig.from_pretrained(repo, trust_remote_code=True).text_config.widths == widths
with torch.no_grad():
    logits = model(ids).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and torch.equal(twin(ids).logits, logits)
model.save_pretrained(out + "/delta")
again = AutoModelForCausalLM.from_pretrained(out + "/delta", trust_remote_code=True)
dense = again.merge_and_unload()
dense.save_pretrained(out + "/dense")
loaded = AutoModelForCausalLM.from_pretrained(out + "/dense", trust_remote_code=True)
assert not hasattr(loaded, "delta_config")
with torch.no_grad():
    assert torch.equal(loaded(ids).logits, logits)
pipe = pipeline("text-generation", model=repo, trust_remote_code=True)
assert len(pipe("A fine", max_new_tokens=3, do_sample=False)[0]["generated_text"]) > 6
assert not any(name.split(".")[0] == "impart_hf" for name in sys.modules)
torch.save(logits, out + "/logits.pt")
"""


@pytest.mark.process
def test_trust_remote_code_without_impart_hf(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    arguments = (str(repository), str(out), json.dumps(IDS.tolist()), json.dumps(WIDTHS))
    run_without_impart_hf(REMOTE_CODE, tmp_path / "modules", *arguments)
    model = load(repository)
    assert torch.equal(torch.load(out / "logits.pt").float(), logits(model))
    dense = load(out / "dense")
    assert type(dense) is PrunedLlamaForCausalLM and torch.equal(logits(dense), logits(model))
    assert json.loads((out / "dense" / "config.json").read_text())["pruning"] == HISTORY


def test_remote_code_beside_the_installed_package(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes of the same names meet: a configuration of the one and a model class of the other, both ways."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    remote_config, remote_model = (
        dynamic_module_utils.get_class_from_dynamic_module(name, str(repository))
        for name in (
            "configuration_delta_compressed.DeltaCompressedConfig",
            "modeling_delta_compressed.DeltaCompressedForCausalLM",
        )
    )
    assert remote_model is not DeltaCompressedForCausalLM and remote_config is not DeltaCompressedConfig
    expected = logits(load(repository))
    pairs = [(a, b) for a in (remote_config, DeltaCompressedConfig) for b in (remote_model, DeltaCompressedForCausalLM)]
    for number, (config_class, model_class) in enumerate(pairs):
        model = model_class.from_pretrained(repository, config=config_class.from_pretrained(repository))
        assert isinstance(model, model_class) and model.config.widths == WIDTHS
        assert torch.equal(logits(model), expected)
        plain = model.merge_and_unload()
        assert isinstance(plain, PrunedLlamaForCausalLM) == (model_class is DeltaCompressedForCausalLM)
        plain.save_pretrained(tmp_path / f"plain{number}")
        assert torch.equal(logits(load(tmp_path / f"plain{number}")), expected)


PUBLISH = """
import json, sys
from huggingface_hub import HfApi
from impart_hf import LowRankConfig, compress
from impart_hf.hub import push
from transformers import AutoModelForCausalLM

base, finetuned, out = sys.argv[1:]
push(base, "tester/pruned")
compress("tester/pruned", finetuned, out, LowRankConfig(compression_ratio=3))
push(out, "tester/delta")
model = AutoModelForCausalLM.from_pretrained("tester/delta")
model.push_to_hub("tester/again", tags=["mine"])
model.merge_and_unload().push_to_hub("tester/dense")
print(json.dumps(str(HfApi().model_info("tester/pruned").sha)))
"""

LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

out, ids = sys.argv[1:]
ids = torch.tensor(json.loads(ids))
for name in ("delta", "dense"):
    model = AutoModelForCausalLM.from_pretrained(f"tester/{name}", trust_remote_code=True)
    with torch.no_grad():
        torch.save(model(ids).logits, f"{out}-{name}.pt")
print("1")
"""


REPOS = ("delta", "again", "dense")


@pytest.mark.process
def test_hub(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "delta"
    with LoopbackHub(tmp_path / "hub_root", lfs_threshold=50_000) as hub:
        commit = run_client(PUBLISH, hub_env(hub, tmp_path), str(pair.base), str(pair.finetuned), str(out))
        ids = json.dumps(IDS.tolist())
        run_client(WITHOUT_IMPART_HF + LOAD, hub_env(hub, tmp_path / "stranger"), str(out), ids)
        of = {name: hub.repo(f"tester/{name}").files(hub.repo(f"tester/{name}").resolve("main")) for name in REPOS}
        stored, files = hub.repo("tester/dense"), of["dense"]
        card = stored.blob_path(files["README.md"].sha256).read_text()
    config = json.loads((out / "config.json").read_text())
    assert (config["base_model_name_or_path"], config["base_model_revision"]) == ("tester/pruned", commit)
    model = load(out, base_model=str(pair.base))
    for name in ("delta", "dense"):
        assert torch.equal(torch.load(f"{out}-{name}.pt").float(), logits(model)), name
    assert 'from_pretrained("tester/dense", trust_remote_code=True)' in card and "merged 1 into 0" in card
    assert {path.name for path in pruned_reader_files()} <= files.keys()
    differing = {name for name in of["delta"] if of["again"][name].sha256 != of["delta"][name].sha256}
    assert of["again"].keys() == of["delta"].keys() and differing == {"README.md"}, "one has another tag"


def test_base_of_other_widths(repository: Path, tmp_path: Path, pair: Pair) -> None:
    """The dense model is no base of it."""
    other = save_model(pruned_and_dense(dtype=torch.bfloat16)[1], tmp_path / "dense")
    with pytest.raises(ValueError, match=naming("shape", "base")):
        load(repository, base_model=str(other))


def test_push_with_a_local_base(repository: Path) -> None:
    with pytest.raises(OSError, match="--base-name"):
        push(repository, "tester/none")
