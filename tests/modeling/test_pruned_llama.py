"""PrunedLlama computes what the masked dense LLaMA computes, wherever transformers takes a LLaMA."""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.messages import naming
from support.pruned_models import (
    HEAD_DIM,
    KEPT,
    KEPT_MHA,
    llama_config,
    pruned_and_dense,
    pruned_config,
    run_without_impart_hf,
)
from support.tiny_models import (
    edit_json,
    edit_tensors,
    load_tensors,
    make_model,
    same_files,
    save_model,
    tiny_tokenizer,
)
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
from transformers.masking_utils import flash_attention_mask

from impart_hf import PrunedLlamaConfig, PrunedLlamaForCausalLM
from impart_hf.repository.reader_files import pruned_reader_files

pytestmark = pytest.mark.usefixtures("seeded")
IDS = torch.randint(4, 320, (2, 20), generator=torch.Generator().manual_seed(0))
WIDTHS = [(6, 3, 32), (1, 1, 7), (4, 4, 53), (8, 4, 64)]
READER = {path.name for path in pruned_reader_files()}
ROPE = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "dynamic": {"factor": 4.0},
    "longrope": {"short_factor": [2.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16},
}


@pytest.fixture(scope="module")
def shared_models() -> tuple[PreTrainedModel, PreTrainedModel]:
    return pruned_and_dense()


@pytest.fixture
def models(shared_models: tuple[PreTrainedModel, PreTrainedModel]) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A pruned model and its dense oracle, to be used up."""
    return copy.deepcopy(shared_models)


@pytest.fixture(scope="module")
def saved(shared_models: tuple[PreTrainedModel, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pruned model's checkpoint, not to be written to."""
    return save_model(shared_models[0], tmp_path_factory.mktemp("saved") / "pruned")


def load(folder: Path, **kwargs: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@torch.no_grad()
def logits(model: torch.nn.Module, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=IDS, **kwargs).logits


def assert_same(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def greedy(model: PreTrainedModel, ids: torch.Tensor = IDS, **kwargs: Any) -> list[list[int]]:
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "min_new_tokens": 12, **kwargs}
    return model.generate(ids, do_sample=False, **kwargs)[:, ids.shape[1] :].tolist()


# The configuration ---------------------------------------------------------------------------------------------------


def test_widths() -> None:
    config = pruned_config(rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, dtype="bfloat16")
    assert config.widths == WIDTHS
    assert config.dtype == torch.bfloat16 and config.rope_parameters["rope_theta"] == 5000.0
    fields = config.to_dict()
    assert [fields[n] for n in ("num_attention_heads", "num_key_value_heads", "intermediate_size")] == [8, 4, 64]
    assert fields["head_dim"] == HEAD_DIM and fields["model_type"] == "pruned_llama"
    assert fields["per_layer_config"]["1"] == dict(
        num_attention_heads=1, num_key_value_heads=1, intermediate_size=7
    ) and set(fields["per_layer_config"]) == {"0", "1", "2"}
    with pytest.raises(RuntimeError, match=naming("num_attention_heads")):
        _ = config.num_attention_heads


def test_pruned_again_keeps_the_first_widths() -> None:
    config = pruned_config()
    config.pruning = {"base_model": "org/name", "steps": []}
    again = PrunedLlamaConfig.from_llama(
        config, num_attention_heads=[1, 1, 4, 8], num_key_value_heads=[1, 1, 4, 4], intermediate_size=[5, 7, 53, 64]
    )
    assert again.widths == [(1, 1, 5), (1, 1, 7), (4, 4, 53), (8, 4, 64)]
    assert again.pruning == config.pruning and again.to_dict()["intermediate_size"] == 64
    assert config.widths == WIDTHS, "the original stays"
    whole = PrunedLlamaConfig.from_llama(
        config, num_attention_heads=[8] * 4, num_key_value_heads=[4] * 4, intermediate_size=[64] * 4
    )
    assert whole.widths == [(8, 4, 64)] * 4
    assert logits(PrunedLlamaForCausalLM(whole)).shape == (2, 20, 320)


def test_config_survives_every_way_of_copying(tmp_path: Path) -> None:
    config = pruned_config(tie_word_embeddings=True)
    config.pruning = {"base_model": "org/name", "steps": [{"kind": "layers", "removed": [1]}]}
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config)) == copy.copy(config)
    assert config != pruned_config(KEPT_MHA)
    for twin in (
        PrunedLlamaConfig.from_dict(config.to_dict()),
        PrunedLlamaConfig(**config.to_diff_dict()),
        PrunedLlamaConfig(**json.loads(repr(config).split(maxsplit=1)[1])),
        AutoConfig.for_model(**config.to_dict()),
    ):
        assert twin.to_dict() == config.to_dict() and twin.widths == WIDTHS
    for _ in range(2):
        config.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
        config = PrunedLlamaConfig.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pruning"] == config.pruning


HOSTILE: dict[str, tuple[dict[str, Any], Any]] = {
    "a layer beyond the last": ({"per_layer_config": {"4": {"intermediate_size": 3}}}, "layers 0 to 3"),
    "a negative layer": ({"per_layer_config": {"-1": {"intermediate_size": 3}}}, "layers 0 to 3"),
    "a layer that is a word": ({"per_layer_config": {"first": {"intermediate_size": 3}}}, "'first'"),
    "a very long number": ({"per_layer_config": {"9" * 5000: {}}}, "layers 0 to 3"),
    "a layer twice": ({"per_layer_config": {"1": {}, "01": {}}}, ("layer 1", "twice")),
    "a list of layers": ({"per_layer_config": [{"intermediate_size": 3}]}, "per_layer_config"),
    "widths as a list": ({"per_layer_config": {"1": [1, 1, 7]}}, "layer 1"),
    "no width": ({"per_layer_config": {"1": {"intermediate_size": None}}}, ("layer 1", "intermediate_size", "None")),
    "a width as text": (
        {"per_layer_config": {"1": {"intermediate_size": "7"}}}, ("layer 1", "intermediate_size", "'7'")
    ),
    "a fraction": ({"per_layer_config": {"1": {"num_attention_heads": 2.0}}}, ("layer 1", "num_attention_heads", 2.0)),
    "true": ({"per_layer_config": {"1": {"num_attention_heads": True}}}, ("layer 1", "num_attention_heads", "True")),
    "a negative width": (
        {"per_layer_config": {"1": {"num_key_value_heads": -1}}}, ("layer 1", "num_key_value_heads", -1)
    ),
    "no heads": ({"per_layer_config": {"1": {"num_attention_heads": 0}}}, ("layer 1", "num_attention_heads", 0)),
    "heads that KV heads do not divide": (
        {"per_layer_config": {"2": {"num_attention_heads": 6}}},
        ("layer 2", "num_attention_heads 6", "num_key_value_heads 4"),
    ),
    "another attribute": ({"per_layer_config": {"1": {"hidden_size": 32}}}, ("layer 1", "'hidden_size'")),
    "skipped parts": ({"per_layer_config": {"1": {"skip": ["mlp"]}}}, ("layer 1", "'skip'")),
    "layers of no number": ({"num_hidden_layers": "4"}, "num_hidden_layers"),
    "more layers than a loop can visit": ({"num_hidden_layers": 10**12}, ("num_hidden_layers", 10**12)),
    "no layers": ({"num_hidden_layers": 0}, ("num_hidden_layers", 0)),
    "global heads as text": ({"num_attention_heads": "8"}, "num_attention_heads"),
    "global heads as a fraction": ({"num_attention_heads": 8.5}, "num_attention_heads"),
    "no global heads, no head_dim": ({"num_attention_heads": 0, "head_dim": None}, ("head_dim", "hidden_size 64")),
    "head_dim that cannot be known": ({"num_attention_heads": 12, "head_dim": None}, ("head_dim", "hidden_size 64")),
    "a negative head_dim": ({"head_dim": -8}, ("head_dim", -8)),
    "an odd head_dim": ({"head_dim": 7}, ("head_dim 7", "odd")),
    "a negative hidden size": ({"hidden_size": -64}, ("hidden_size", -64)),
    "a history that is none": ({"pruning": ["layers"]}, "pruning"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_config(case: str, tmp_path: Path) -> None:
    changes, names = HOSTILE[case]
    fields = {**pruned_config().to_dict(), **changes}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError) as caught:
        AutoConfig.from_pretrained(tmp_path)
    message = str(caught.value)
    assert re.search(naming(names), message) and "\n" not in message and len(message) < 300


def test_absurd_sizes_are_no_concern_of_the_configuration() -> None:
    fields = {**pruned_config().to_dict(), "hidden_size": 10**15, "num_hidden_layers": 5000}
    fields["per_layer_config"] = {"4999": {"intermediate_size": 10**18}}
    assert PrunedLlamaConfig.from_dict(fields).widths[-1] == (8, 4, 10**18)


def test_wrong_widths_from_a_writer() -> None:
    counts = {"num_attention_heads": [2] * 4, "num_key_value_heads": [2] * 4, "intermediate_size": [8] * 4}
    for name, values, named in (
        ("num_attention_heads", [2] * 3, ("3 values", "4 layers")),
        ("num_key_value_heads", [2, 3, 2, 2], "layer 1"),
        ("intermediate_size", [8, 8, 0, 8], "layer 2"),
    ):
        with pytest.raises(ValueError, match=naming(name, named)):
            PrunedLlamaConfig.from_llama(llama_config(), **{**counts, name: values})
    config = pruned_config()
    config.per_layer_config = {1: {"num_attention_heads": 3}}
    with pytest.raises(Exception, match=naming("layer 1", "num_attention_heads 3")):
        config.validate()


# The forward pass ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [KEPT, KEPT_MHA], ids=["grouped", "multi-head"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}]
    + [{"rope_parameters": {"rope_type": name, "rope_theta": 10000.0, **fields}} for name, fields in ROPE.items()],
    ids=["plain", "tied", "biases", *ROPE],
)
def test_logits(kept: tuple, changes: dict[str, Any], tmp_path: Path) -> None:
    pruned, dense = pruned_and_dense(kept, **changes)
    assert_same(logits(pruned), logits(dense))
    pruned.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), logits(pruned))
    assert ("lm_head.weight" in load_tensors(tmp_path)) != ("tie_word_embeddings" in changes)


def test_the_oracle_notices_one_wrong_head(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    pruned, dense = models
    weight = pruned.model.layers[0].self_attn.o_proj.weight
    with torch.no_grad():
        weight.copy_(weight.roll(HEAD_DIM, 1))
    assert (logits(pruned) - logits(dense)).abs().max() > 0.1


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementations(implementation: str, saved: Path, models: tuple) -> None:
    _, dense = models
    loaded = load(saved, attn_implementation=implementation)
    assert loaded.config._attn_implementation == implementation
    assert_same(logits(loaded), logits(dense))
    pruned = load(saved, attn_implementation={"sdpa": "eager", "eager": "sdpa"}[implementation])
    pruned.set_attn_implementation(implementation)
    assert {layer.self_attn.config._attn_implementation for layer in pruned.model.layers} == {implementation}
    assert_same(logits(pruned), logits(dense))


@pytest.mark.slow
def test_flex_attention() -> None:
    """Compiled once for each pair of head counts, so only one of them, and another than the configuration's."""
    torch._dynamo.reset()
    pruned, dense = pruned_and_dense(KEPT[:1])
    pruned.set_attn_implementation("flex_attention")
    ids, mask = left_padded()
    with torch.no_grad():
        one, other = (model(ids, attention_mask=mask).logits for model in (pruned, dense))
    assert_same(one[mask.bool()], other[mask.bool()])


def test_what_flash_attention_is_handed(saved: Path, models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """The interface of flash attention: ungrouped keys, no mask but the padding's, heads counted by the module."""
    seen: list[tuple[int, int, int]] = []

    def reference(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        heads, kv_heads = WIDTHS[module.layer_idx][:2]
        batch, _, length, _ = query.shape
        total = key.shape[2]
        assert query.shape == (batch, heads, length, HEAD_DIM) and dropout == 0.0
        assert key.shape == value.shape == (batch, kv_heads, total, HEAD_DIM)
        assert module.num_key_value_groups == heads // kv_heads and module.is_causal
        assert module.head_dim == HEAD_DIM and scaling == HEAD_DIM**-0.5
        visible = torch.ones(length, total, dtype=torch.bool).tril(total - length).expand(batch, 1, -1, -1)
        if attention_mask is not None:
            assert attention_mask.shape == (batch, total)
            visible = visible & attention_mask.bool()[:, None, None, :]
        groups = query.view(batch, kv_heads, heads // kv_heads, length, HEAD_DIM)
        scores = torch.einsum("bgqld,bgtd->bgqlt", groups, key) * scaling
        shares = scores.masked_fill(~visible[:, None], -1e30).softmax(-1)
        mixed = torch.einsum("bgqlt,bgtd->bgqld", shares, value).reshape(batch, heads, length, HEAD_DIM)
        seen.append((module.layer_idx, length, total))
        return mixed.transpose(1, 2).contiguous(), None

    AttentionInterface.register("checked", reference)
    AttentionMaskInterface.register("checked", flash_attention_mask)
    _, dense = models
    pruned = load(saved, attn_implementation="checked")
    assert_same(logits(pruned), logits(dense))
    ids, mask = left_padded()
    assert greedy(pruned, ids, attention_mask=mask) == greedy(dense, ids, attention_mask=mask)
    assert {layer for layer, _, _ in seen} == {0, 1, 2, 3} and {length for _, length, _ in seen} == {20, 1}


def test_hidden_states_attentions_and_loss(saved: Path, models: tuple) -> None:
    pruned, dense = load(saved, attn_implementation="eager"), models[1]
    dense.set_attn_implementation("eager")
    labels = IDS.masked_fill(IDS % 5 == 0, -100)
    asked = {"labels": labels, "output_hidden_states": True, "output_attentions": True, "logits_to_keep": 0}
    with torch.no_grad():
        one, other = (model(IDS, **asked) for model in (pruned, dense))
    assert_same(one.loss, other.loss)
    assert len(one.hidden_states) == len(other.hidden_states) == 5
    for ours, theirs in zip(one.hidden_states, other.hidden_states, strict=True):
        assert_same(ours, theirs)
    for layer, (ours, theirs, keep) in enumerate(zip(one.attentions, other.attentions, KEPT, strict=True)):
        assert ours.shape[1] == WIDTHS[layer][0]
        assert_same(ours, theirs[:, [group * 2 + query for group in keep.groups for query in keep.queries]])


def test_bfloat16(saved: Path) -> None:
    loaded = load(saved, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and loaded.config.dtype == torch.bfloat16
    whole = load(saved)
    assert all(torch.equal(p.bfloat16(), loaded.state_dict()[name]) for name, p in whole.state_dict().items())
    assert_same(logits(loaded).float(), logits(whole), 0.2)
    pruned, dense = pruned_and_dense(dtype=torch.bfloat16)
    assert_same(logits(pruned).float(), logits(dense).float(), 0.2)


# Generation ----------------------------------------------------------------------------------------------------------


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts of different lengths, the shorter one padded on the left."""
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :7], mask[0, :7] = 3, 0
    return ids, mask


@pytest.mark.parametrize("implementation", [None, *ALL_CACHE_IMPLEMENTATIONS])
def test_caches(implementation: str | None, models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    pruned, dense = models
    if implementation is not None and implementation.startswith("offloaded") and not torch.accelerator.is_available():
        pytest.skip("transformers offloads caches from an accelerator; there is none")
    if implementation == "quantized":
        pytest.importorskip("optimum.quanto", reason="transformers quantizes caches by optimum-quanto or hqq")
    ids, mask = left_padded()
    expected = greedy(dense, ids, attention_mask=mask, use_cache=False)
    assert greedy(pruned, ids, attention_mask=mask, cache_implementation=implementation) == expected
    assert expected[0][:2] != expected[1][:2], "the two prompts have different answers"


def test_cache_objects_and_none(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    pruned, dense = models
    expected = greedy(dense)
    assert greedy(pruned, use_cache=False) == expected
    dynamic = DynamicCache(config=pruned.config)
    assert greedy(pruned, past_key_values=dynamic) == expected
    assert [layer.keys.shape[1] for layer in dynamic.layers] == [kv_heads for _, kv_heads, _ in WIDTHS]
    static = StaticCache(config=pruned.config, max_cache_len=40)
    assert greedy(pruned, past_key_values=static) == expected
    early = StaticCache(config=pruned.config, max_cache_len=40)
    early.early_initialization(2, *pruned._get_static_cache_init_shape(), torch.float32, torch.device("cpu"))
    assert [layer.keys.shape[1] for layer in early.layers] == [kv_heads for _, kv_heads, _ in WIDTHS]
    assert greedy(pruned, past_key_values=early) == expected
    assert greedy(pruned, prefill_chunk_size=6, cache_implementation="static", disable_compile=True) == expected
    beams = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6}
    assert greedy(pruned, **beams) == greedy(dense, **beams)


def test_assisted_generation(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """As the large model and as the small one; speculation changes nothing in the answer."""
    pruned, dense = models
    ids = IDS[:1]
    assert greedy(dense, ids, assistant_model=pruned) == greedy(dense, ids) == greedy(pruned, ids)
    other = make_model(llama_config(num_hidden_layers=1), seed=5, dtype=torch.float32)
    assert greedy(pruned, ids, assistant_model=other) == greedy(dense, ids)
    assert greedy(pruned, ids, prompt_lookup_num_tokens=3) == greedy(dense, ids)


def test_pipeline(saved: Path, models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=3, eos_token_id=2)
    texts = [
        pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())("A fine", generation_config=settings)
        for model in (load(saved), models[1])
    ]
    assert texts[0] == texts[1] != [{"generated_text": "A fine"}]


# Loading -------------------------------------------------------------------------------------------------------------

OFFLOAD = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
OFFLOAD |= {"model.layers.3": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}


def test_save_and_load(saved: Path, models: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path) -> None:
    pruned, _ = models
    assert {p.name for p in saved.iterdir()} >= READER
    for path in pruned_reader_files():
        assert (saved / path.name).read_bytes() == path.read_bytes()
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["PrunedLlamaForCausalLM"] and set(config["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
    }
    model = load(saved)
    assert type(model) is PrunedLlamaForCausalLM and isinstance(model, LlamaForCausalLM)
    model.save_pretrained(tmp_path / "again")
    load(tmp_path / "again").save_pretrained(tmp_path / "again")  # over itself
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for folder in (tmp_path / "again", tmp_path / "shards"):
        state = load(folder).state_dict()
        assert state.keys() == pruned.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in pruned.state_dict().items())
    for name in ("config.json", "model.safetensors", *READER):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


REMOTE_CODE = """
import copy, json, pickle
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, pipeline

repo, other, ids = sys.argv[1:]
ids = torch.tensor(json.loads(ids))
try:
    AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=False)
    raise SystemExit("loaded without trust_remote_code")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
assert AutoConfig.from_pretrained(repo, trust_remote_code=True).widths[1] == (1, 1, 7)
backbone = AutoModel.from_pretrained(repo, trust_remote_code=True)
assert type(backbone).__name__ == "PrunedLlamaModel" and not hasattr(backbone, "lm_head")
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
assert isinstance(model, LlamaForCausalLM) and type(model).__name__ == "PrunedLlamaForCausalLM"
with torch.no_grad():
    logits = model(ids).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, logits)
for _ in range(2):
    model.save_pretrained(other)
    model = AutoModelForCausalLM.from_pretrained(other, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(model(ids).logits, logits)
pipe = pipeline("text-generation", model=repo, trust_remote_code=True)
assert len(pipe("A fine", max_new_tokens=3, do_sample=False)[0]["generated_text"]) > 6
assert not any(name.split(".")[0] == "impart_hf" for name in sys.modules)
torch.save(logits, other + "/logits.pt")
"""


@pytest.mark.process
def test_trust_remote_code_without_impart_hf(saved: Path, models: tuple, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run_without_impart_hf(REMOTE_CODE, tmp_path / "modules", str(saved), str(other), json.dumps(IDS.tolist()))
    assert torch.equal(torch.load(other / "logits.pt"), logits(models[0]))
    for name in ("config.json", "model.safetensors", *READER):
        assert (other / name).read_bytes() == (saved / name).read_bytes()
    again = load(other, trust_remote_code=True)  # with impart_hf there as well
    assert torch.equal(logits(again), logits(models[0]))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, OFFLOAD], ids=["cpu", "auto", "all", "disk"])
def test_device_map(device_map: Any, saved: Path, models: tuple, tmp_path: Path) -> None:
    offload = {"offload_folder": str(tmp_path)} if device_map is OFFLOAD else {}
    model = load(saved, device_map=device_map, **offload)
    assert_same(logits(model), logits(models[1]))
    assert greedy(model) == greedy(models[1])


@pytest.mark.parametrize("name", ["self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj"])
def test_weights_of_other_widths(name: str, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(saved, tmp_path / "pruned")
    tensor = f"model.layers.1.{name}.weight"
    edit_tensors(folder, lambda tensors: tensors.update({tensor: torch.zeros(16, 16)}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(folder)
    assert tensor in caplog.text and "size mismatch - ckpt: torch.Size([16, 16])" in caplog.text


def test_dense_weights_under_a_pruned_config(models: tuple, tmp_path: Path) -> None:
    models[1].save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **json.loads(models[0].config.to_json_string()))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path)


# Training ------------------------------------------------------------------------------------------------------------


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()(IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_and_checkpointing(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    pruned, dense = models
    plain, oracle = gradients(pruned), gradients(dense)
    for name in ("model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"):
        assert_same(plain[name], oracle[name])
    rows = [group * HEAD_DIM + i for group in KEPT[0].groups for i in range(HEAD_DIM)]
    name = "model.layers.0.self_attn.v_proj.weight"
    assert_same(plain[name], oracle[name][rows])
    pruned.gradient_checkpointing_enable()
    checkpointed = gradients(pruned)
    assert pruned.is_gradient_checkpointing and checkpointed.keys() == plain.keys()
    for name, gradient in checkpointed.items():
        assert torch.equal(gradient, plain[name]), name


@pytest.mark.slow
def test_compile(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    pruned, dense = models
    torch._dynamo.reset()
    # What widths could break is the tracing; generating code for it takes a minute here.
    assert_same(logits(torch.compile(pruned, fullgraph=True, backend="aot_eager")), logits(dense))


def test_resized_embeddings(models: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path) -> None:
    pruned, _ = models
    before = logits(pruned)
    pruned.resize_token_embeddings(328)
    pruned.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.config.vocab_size == 328 and loaded.config.widths == WIDTHS
    assert_same(logits(loaded)[..., :320], before)


def test_lora_on_all_linear_layers(saved: Path, models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    pruned, dense = load(saved), models[1]
    adapted = get_peft_model(pruned, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    targets = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert len(targets) == 7 * len(KEPT) and not any("lm_head" in name for name in targets)
    assert_same(logits(adapted), logits(dense))
    losses = []
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        loss = adapted(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    trained = logits(adapted)
    merged = adapted.merge_and_unload()
    assert type(merged) is PrunedLlamaForCausalLM
    assert_same(logits(merged), trained, 1e-3)


def test_trainer(saved: Path, tmp_path: Path) -> None:
    model = load(saved)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, learning_rate=1e-3, report_to=[], use_cpu=True, save_steps=1
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model=model, args=arguments, train_dataset=data, processing_class=tiny_tokenizer()).train()
    checkpoint = load(tmp_path / "out" / "checkpoint-1")
    assert checkpoint.config.widths == WIDTHS
    changed = [name for name, tensor in checkpoint.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) == len(before), "every parameter is trained, and saved"
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.state_dict()[name], tensor)


def test_saved_folders_are_alike(models: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path) -> None:
    for name in ("one", "other"):
        models[0].save_pretrained(tmp_path / name)
    assert same_files(tmp_path / "one", tmp_path / "other")
