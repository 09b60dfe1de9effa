"""vLLM serves delta repositories and pruned models without a flag; its greedy tokens are those of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.messages import naming
from support.pruned_models import KEPT, pruned_config
from support.tiny_models import (
    VOCABULARY,
    Pair,
    edit_json,
    edit_tensors,
    fine_tune,
    make_model,
    save_model,
    save_pair,
    tiny_config,
)
from support.vllm_engines import (
    HEADS,
    LONG,
    PROMPTS,
    EngineError,
    EngineProcess,
    delta_of,
    greedy_tokens,
    swap_to,
    tokens_of,
)
from transformers import AutoModelForCausalLM

from impart_hf import BitDeltaConfig, ImPartConfig, LowRankConfig, PrunedLlamaConfig, PrunedLlamaForCausalLM, compress

pytestmark = pytest.mark.vllm
TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": HEADS,
    "llama-tied": HEADS,
    "mistral": HEADS,
    "qwen2": TWO_HEADS,
    "qwen3": HEADS,
    "gemma": HEADS,
    "gemma2": HEADS,
    "gemma3": HEADS,
    "mixtral": HEADS,
    # What vLLM runs by transformers' own code: known to it by name, and not known at all.
    "gpt-neox": {"num_attention_heads": 2},
    "helium": {**HEADS, **TWO_HEADS},
}
WIDTHS = {
    "num_attention_heads": [4, 1, 6],
    "num_key_value_heads": [4, 1, 3],
    "intermediate_size": [72, 33, 128],
}
# All but LLaMA, with fields beside those of `support.pruned_models`.
PRUNED_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": HEADS,
    "qwen3": {**HEADS, "attention_bias": False},  # vLLM's Qwen3 leaves out the bias of o_proj
    "mistral": HEADS,
    "gemma2": HEADS,
    "gemma3_text": HEADS,
    "phi3": {
        **HEADS,
        "hidden_size": 256,  # the heads of a Phi-3 before pruning have this divided by their number
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "short_factor": [2.0] * 8,
            "long_factor": [4.0] * 8,
        },
        "original_max_position_embeddings": 128,  # or vLLM has the long factors for short texts as well
    },
}


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    with EngineProcess() as process:
        yield process


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return save_pair(tmp_path_factory.mktemp("pair"), tiny_config("llama", **HEADS), dtype=torch.float32)


@pytest.fixture(scope="module")
def delta(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return delta_of(pair, tmp_path_factory.mktemp("delta") / "delta")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned LLaMA in which no two layers have the same width."""
    llama = tiny_config("llama", num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=3, **HEADS)
    config = PrunedLlamaConfig.with_widths(llama, **WIDTHS)
    return save_model(make_model(config, dtype=torch.float32), tmp_path_factory.mktemp("pruned") / "model")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture(engine: EngineProcess, kind: str, tmp_path: Path) -> None:
    pair = save_pair(tmp_path, tiny_config(kind, **ARCHITECTURES[kind]), dtype=torch.float32)
    repository = delta_of(pair, tmp_path / "delta")
    expected = tokens_of(repository)
    assert expected != tokens_of(pair.base)  # or serving the base alone would pass

    engine.start(repository)

    assert engine.tokens() == expected


@pytest.mark.parametrize(
    "method",
    [ImPartConfig(compression_ratio=4), BitDeltaConfig(compression_ratio=8)],
    ids=["factored and masked", "direct"],
)
def test_methods(engine: EngineProcess, pair: Pair, method: Any, tmp_path: Path) -> None:
    repository = delta_of(pair, tmp_path / "delta", method)
    engine.start(repository)
    assert engine.tokens() == tokens_of(repository)


def test_bfloat16_repository_in_float32(engine: EngineProcess, tmp_path: Path) -> None:
    repository = delta_of(save_pair(tmp_path, tiny_config("llama", **HEADS)), tmp_path / "delta")
    model = AutoModelForCausalLM.from_pretrained(repository, dtype=torch.float32)
    engine.start(repository)
    assert engine.tokens() == greedy_tokens(model)


def test_dtype_of_the_fine_tune_is_the_default(engine: EngineProcess, tmp_path: Path) -> None:
    pair = save_pair(tmp_path, tiny_config("llama", **HEADS))
    engine.start(delta_of(pair, tmp_path / "delta"), dtype="auto")
    assert engine.run(dtype_of_weights) == "torch.bfloat16"


def dtype_of_weights(holder: Any) -> str:
    return str(holder.llm.llm_engine.vllm_config.model_config.dtype)


def test_shards_and_added_tokens(engine: EngineProcess, tmp_path: Path) -> None:
    base = make_model(tiny_config("llama", **HEADS), dtype=torch.float32)
    tuned = fine_tune(base)
    tuned.resize_token_embeddings(VOCABULARY + 5)
    folders = Pair(save_model(base, tmp_path / "base"), save_model(tuned, tmp_path / "finetuned"))
    repository = tmp_path / "delta"
    config = LowRankConfig(compression_ratio=3)
    compress(str(folders.base), str(folders.finetuned), repository, config, max_shard_size="60KB")
    assert len(list(repository.glob("delta_model-*.safetensors"))) > 1

    engine.start(repository)

    prompts = [[*range(VOCABULARY - 5, VOCABULARY + 5)], [VOCABULARY + 4]]
    assert engine.tokens(prompts) == tokens_of(repository, prompts)


def test_overrides_reach_the_model(engine: EngineProcess, delta: Path) -> None:
    engine.start(delta, hf_overrides={"rms_norm_eps": 0.5})
    model = AutoModelForCausalLM.from_pretrained(delta, rms_norm_eps=0.5)
    assert greedy_tokens(model) != tokens_of(delta)
    assert engine.tokens() == greedy_tokens(model)


@pytest.mark.parametrize("kind", ["delta", "pruned"])
def test_compiled(engine: EngineProcess, request: pytest.FixtureRequest, kind: str) -> None:
    repository = request.getfixturevalue(kind)
    engine.start(repository, enforce_eager=False)
    assert engine.tokens() == tokens_of(repository)


@pytest.mark.parametrize("kind", ["delta", "pruned"])
def test_chunked_prefill_and_prefix_cache(engine: EngineProcess, request: pytest.FixtureRequest, kind: str) -> None:
    repository = request.getfixturevalue(kind)
    shared = [(7 * i) % VOCABULARY for i in range(80)]
    prompts = [[*shared, 10 + i] for i in range(3)]
    expected = tokens_of(repository, prompts)

    engine.start(repository, max_num_batched_tokens=24, max_num_seqs=2, block_size=32, enable_prefix_caching=True)

    assert engine.tokens(prompts) == expected
    assert engine.tokens(prompts) == expected
    assert engine.run(cached_tokens, prompts[1]) >= 64


def cached_tokens(holder: Any, prompt: list[int]) -> int:
    outputs = holder.llm.generate([{"prompt_token_ids": prompt}], use_tqdm=False)
    return outputs[0].num_cached_tokens


def test_pruned(engine: EngineProcess, pruned: Path) -> None:
    engine.start(pruned)
    assert engine.tokens() == tokens_of(pruned)


@pytest.mark.parametrize("family", PRUNED_FAMILIES)
def test_every_pruned_family(engine: EngineProcess, family: str, tmp_path: Path) -> None:
    """The model itself, and then a delta of it."""
    base = save_pruned(family, tmp_path / "base")
    tuned = save_model(fine_tune(AutoModelForCausalLM.from_pretrained(base)), tmp_path / "finetuned")
    repository = delta_of(Pair(base, tuned), tmp_path / "delta")
    prompts = [*PROMPTS, LONG]
    expected = {folder: tokens_of(folder, prompts) for folder in (base, repository)}
    other = AutoModelForCausalLM.from_pretrained(base, sliding_window=3)
    assert expected[base] not in (expected[repository], [] if family == "qwen3" else greedy_tokens(other, prompts))

    engine.start(base)

    assert engine.tokens(prompts) == expected[base]
    engine.run(swap_to, repository)
    assert engine.tokens(prompts) == expected[repository]


def save_pruned(family: str, folder: Path) -> Path:
    """Save a pruned model in which no two layers have the same width; its biases and norms are not as they start."""
    config = pruned_config(family=family, **PRUNED_FAMILIES[family])
    return save_model(fine_tune(make_model(config, dtype=torch.float32)), folder)


def test_pruned_layers_have_the_cache_of_their_own_heads(engine: EngineProcess, pruned: Path) -> None:
    engine.start(pruned, block_size=32)
    assert_own_heads(engine, WIDTHS["num_key_value_heads"])


def test_so_have_layers_with_and_without_windows(engine: EngineProcess, tmp_path: Path) -> None:
    """If the option is given; else vLLM has pages of one size for all layers."""
    folder = save_pruned("gemma2", tmp_path / "model")
    engine.start(folder, block_size=32, disable_hybrid_kv_cache_manager=True)
    assert_own_heads(engine, [len(layer.groups) for layer in KEPT])
    assert engine.tokens([LONG]) == tokens_of(folder, [LONG])


def assert_own_heads(engine: EngineProcess, kv_heads: list[int]) -> None:
    """Check the KV cache's blocks of 32 tokens."""
    block = engine.run(bytes_of_a_cache_block)
    two = 2 * 32 * HEADS["head_dim"] * 4  # keys and values of 32 tokens of one head, in float32
    assert [block[layer] for layer in sorted(block)] == [two * heads for heads in kv_heads]
    assert engine.run(bytes_of_allocated_blocks) == sum(block.values())


def bytes_of_a_cache_block(holder: Any) -> dict[str, int]:
    specs = holder.llm.collective_rpc("get_kv_cache_spec")[0]
    return {layer: spec.page_size_bytes for layer, spec in specs.items()}


def bytes_of_allocated_blocks(holder: Any) -> int:
    """What all layers' caches take, for one block."""
    worker = holder.llm.llm_engine.model_executor.driver_worker.worker
    config = worker.vllm_config.cache_config
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in worker.model_runner.kv_caches}
    return sum(storages.values()) // config.num_gpu_blocks


@pytest.mark.parametrize("kind", ["delta", "pruned"])
def test_remote_code_may_be_trusted(engine: EngineProcess, request: pytest.FixtureRequest, kind: str) -> None:
    repository = request.getfixturevalue(kind)
    engine.start(repository, trust_remote_code=True)
    assert engine.tokens() == tokens_of(repository)


def test_delta_of_a_pruned_model(engine: EngineProcess, pruned: Path, tmp_path: Path) -> None:
    tuned = save_model(fine_tune(PrunedLlamaForCausalLM.from_pretrained(pruned)), tmp_path / "finetuned")
    repository = delta_of(Pair(pruned, tuned), tmp_path / "delta")
    expected = tokens_of(repository)
    assert expected != tokens_of(pruned)
    engine.start(repository)
    assert engine.tokens() == expected


def test_base_from_elsewhere(pair: Pair, tmp_path: Path) -> None:
    moved = Pair(tmp_path / "moved", pair.finetuned)
    shutil.copytree(pair.base, moved.base)
    repository = delta_of(moved, tmp_path / "delta")
    moved.base.rename(tmp_path / "new place")
    with EngineProcess(IMPART_HF_BASE_MODEL=str(tmp_path / "new place")) as process:
        process.start(repository)
        model = AutoModelForCausalLM.from_pretrained(repository, base_model=str(tmp_path / "new place"))
        assert process.tokens() == greedy_tokens(model)


class TestRefused:
    """Each stops the start with a message that says what is wrong."""

    def start(self, engine: EngineProcess, repository: Path, *names: object, **options: Any) -> None:
        with pytest.raises(EngineError, match=naming(names)):
            engine.start(repository, **options)

    def test_other_base(self, engine: EngineProcess, pair: Pair, tmp_path: Path) -> None:
        mine = Pair(tmp_path / "base", pair.finetuned)
        shutil.copytree(pair.base, mine.base)
        repository = delta_of(mine, tmp_path / "delta")
        edit_tensors(mine.base, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].mul_(2))
        self.start(engine, repository, "WrongBaseError", "model.layers.1.mlp.up_proj.weight")

    def test_base_is_gone(self, engine: EngineProcess, delta: Path, tmp_path: Path) -> None:
        repository = shutil.copytree(delta, tmp_path / "delta")
        edit_json(repository / "config.json", base_model_name_or_path="/nowhere/base")
        self.start(engine, repository, "MissingBaseError", repository, "/nowhere/base")

    def test_truncated(self, engine: EngineProcess, delta: Path, tmp_path: Path) -> None:
        repository = shutil.copytree(delta, tmp_path / "delta")
        file = repository / "delta_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        self.start(engine, repository, "DeltaFormatError", "delta_model.safetensors")

    def test_flipped_byte(self, engine: EngineProcess, delta: Path, tmp_path: Path) -> None:
        repository = shutil.copytree(delta, tmp_path / "delta")
        file = repository / "delta_model.safetensors"
        data = bytearray(file.read_bytes())
        data[-50] ^= 1
        file.write_bytes(bytes(data))
        self.start(engine, repository, "DeltaFormatError", "CRC-32")

    def test_tensors_of_a_layer_are_missing(self, engine: EngineProcess, delta: Path, tmp_path: Path) -> None:
        repository = shutil.copytree(delta, tmp_path / "delta")
        text_config = json.loads((repository / "config.json").read_text())["text_config"]
        edit_json(repository / "config.json", text_config={**text_config, "num_hidden_layers": 3})
        self.start(engine, repository, "DeltaFormatError", "9 tensors", "model.layers.2.input_layernorm.weight")

    def test_tensor_of_another_shape(self, engine: EngineProcess, delta: Path, tmp_path: Path) -> None:
        repository = shutil.copytree(delta, tmp_path / "delta")
        text_config = AutoModelForCausalLM.from_pretrained(delta).config.to_dict()
        edit_json(repository / "config.json", text_config={**text_config, "intermediate_size": 96})
        self.start(engine, repository, "DeltaFormatError", repository, "configuration")

    def test_another_load_format(self, engine: EngineProcess, delta: Path) -> None:
        self.start(engine, delta, "--load-format npcache", load_format="npcache")

    def test_float16_where_it_is_for_the_family(self, engine: EngineProcess, tmp_path: Path) -> None:
        self.start(engine, save_pruned("gemma2", tmp_path / "model"), "pruned_gemma2", "float16", dtype="float16")

    def test_unknown_format_version(self, engine: EngineProcess, delta: Path, tmp_path: Path) -> None:
        repository = shutil.copytree(delta, tmp_path / "delta")
        edit_json(repository / "config.json", format_version=99)
        self.start(engine, repository, "format version 99")

    def test_after_all_that_a_sound_one_is_served(self, engine: EngineProcess, delta: Path) -> None:
        engine.start(delta)
        assert engine.tokens() == tokens_of(delta)
