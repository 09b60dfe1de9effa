"""What `impart-hf evaluate` says of models: counted against formulas, measured against hooks and plain computations."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.messages import naming
from support.pruned_models import FAMILIES, KEPT, pruned_and_dense
from support.pruned_models import HEAD_DIM as PRUNED_HEAD_DIM
from support.tiny_models import (
    Pair,
    edit_json,
    load_tensors,
    make_model,
    rewrite,
    save_model,
    tiny_config,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForSequenceClassification, T5Config

from impart_hf.calibration.text import calibration_tokens
from impart_hf.cli.main import main
from impart_hf.evaluation import models as evaluated_models
from impart_hf.evaluation.compare import compare_models
from impart_hf.evaluation.cost import empty_model, model_cost
from impart_hf.evaluation.latency import measure_latency
from impart_hf.evaluation.memory import PeakMemory, anonymous_bytes, return_freed_memory
from impart_hf.evaluation.metrics import load

TEXT = "A fine-tuned model is its base model and a small difference. " * 30
HIDDEN, INNER, LAYERS, HEADS, KEY_HEADS, HEAD_DIM, VOCABULARY = 64, 128, 2, 4, 2, 16, 320
linux_only = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured through /proc")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    """What the command prints as JSON."""
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments), "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)


# --- counted


def linear_weights(config: Any) -> int:
    """Entries of one decoder layer's seven matrices."""
    attention = config.hidden_size * config.head_dim * 2 * (config.num_attention_heads + config.num_key_value_heads)
    return attention + 3 * config.hidden_size * config.intermediate_size


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
@pytest.mark.parametrize("prompt", [1, 48])
def test_cost_of_a_llama(kind: str, prompt: int, tmp_path: Path) -> None:
    config = tiny_config(kind)
    folder = save_model(make_model(config), tmp_path / "model")
    found = model_cost(empty_model(str(folder)), prompt)
    layers = LAYERS * linear_weights(config)
    norms = (2 * LAYERS + 1) * HIDDEN
    assert found.parameters_without_embeddings == layers + norms
    assert found.parameters == layers + norms + (1 if kind == "llama-tied" else 2) * VOCABULARY * HIDDEN
    assert found.dtype == "bfloat16" and found.weight_bytes == 2 * found.parameters
    # A product of matrices is two FLOPs an entry; queries meet keys, and weights meet values, over all pairs.
    pair, output = LAYERS * 4 * HEADS * HEAD_DIM, 2 * VOCABULARY * HIDDEN
    assert found.prefill_flops_per_token * prompt == pytest.approx(prompt * (2 * layers + pair * prompt) + output)
    assert found.decode_flops_per_token == 2 * layers + pair * (prompt + 1) + output
    assert found.kv_cache_bytes_per_token == (2 * KEY_HEADS * HEAD_DIM * 2,) * LAYERS
    assert found.prompt_tokens == prompt
    wider = model_cost(empty_model(str(folder), torch.float32), prompt)
    assert wider.weight_bytes == 2 * found.weight_bytes and wider.dtype == "float32"
    assert wider.kv_cache_bytes_per_token == tuple(2 * count for count in found.kv_cache_bytes_per_token)
    assert wider.decode_flops_per_token == found.decode_flops_per_token


def test_a_loaded_model_costs_what_an_empty_one_does(tmp_path: Path) -> None:
    folder = str(save_model(make_model(tiny_config()), tmp_path / "model"))
    loaded = load(folder, torch.bfloat16, "cpu", attn_implementation="eager")
    assert model_cost(loaded, 32) == model_cost(empty_model(folder), 32)


def test_only_the_experts_at_work_are_counted(tmp_path: Path) -> None:
    """Four experts' weights, two of them at work on a token."""
    config = tiny_config("mixtral")
    found = model_cost(empty_model(str(save_model(make_model(config), tmp_path / "model"))), 16)
    attention = 2 * HIDDEN * HEAD_DIM * (HEADS + KEY_HEADS)
    router, expert = HIDDEN * 4, 3 * HIDDEN * INNER
    layer = 2 * (attention + router + 2 * expert) + 4 * HEADS * HEAD_DIM * 17
    assert found.decode_flops_per_token == LAYERS * layer + 2 * VOCABULARY * HIDDEN
    assert found.parameters_without_embeddings == LAYERS * (attention + router + 4 * expert) + 5 * HIDDEN


@pytest.mark.parametrize(
    "kind, expected", [("mistral", (128, 128)), ("gemma2", (256, 256)), ("gpt-neox", (256, 256)), ("mamba", (0, 0))]
)
def test_cache_of_other_architectures(kind: str, expected: tuple[int, ...], tmp_path: Path) -> None:
    """A sliding window holds few tokens, each as large as any; Mamba's state does not grow."""
    folder = save_model(make_model(tiny_config(kind)), tmp_path / "model")
    assert model_cost(empty_model(str(folder)), 40).kv_cache_bytes_per_token == expected


def test_a_delta_repository_costs_what_its_fine_tune_does(tiny_pair: Pair, tiny_repository: Path) -> None:
    found, expected = (model_cost(empty_model(str(path)), 64) for path in (tiny_repository, tiny_pair.finetuned))
    assert found == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_cost_of_a_pruned_model(family: str, tmp_path: Path) -> None:
    """Heads and channels differ from layer to layer: the sums go over the matrices that are there."""
    pruned, _ = pruned_and_dense(dtype=torch.bfloat16, family=family)
    folder = save_model(pruned, tmp_path / "pruned")
    found, tensors = model_cost(empty_model(str(folder)), 16), load_tensors(folder)
    assert found.parameters == sum(tensor.numel() for tensor in tensors.values())
    output = "embed" if pruned.config.tie_word_embeddings else "lm_head"
    matrices = sum(t.numel() for name, t in tensors.items() if t.dim() == 2 and ("layers" in name or output in name))
    windows = [getattr(layer, "sliding_window", 17) for layer in DynamicCache(config=pruned.config).layers]
    pairs = sum(len(kept.groups) * len(kept.queries) * min(17, w) for kept, w in zip(KEPT, windows, strict=True))
    assert found.decode_flops_per_token == 2 * matrices + 4 * PRUNED_HEAD_DIM * pairs
    assert found.kv_cache_bytes_per_token == tuple(2 * len(kept.groups) * PRUNED_HEAD_DIM * 2 for kept in KEPT)


# --- measured


@torch.no_grad()
def plain_perplexity(folder: Path, sequences: torch.Tensor) -> float:
    logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(sequences).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten()).exp().item()


def test_perplexity_of_several_models(
    tiny_pair: Pair, tiny_repository: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [tiny_pair.base, tiny_pair.finetuned, tiny_repository]
    settings = ["--dtype", "float32", "--samples", "5", "--length", "32", "--batch-size", "2"]
    found = evaluated(capsys, *models, "--text", text, *settings)
    sequences = calibration_tokens(str(text), tiny_tokenizer(), samples=5, length=32)
    assert found["other_vocabularies"] == []
    assert [row["model"] for row in found["models"]] == [str(model) for model in models]
    for row in found["models"]:
        assert row["perplexity"] == pytest.approx(plain_perplexity(Path(row["model"]), sequences), rel=1e-5)
        assert row["text_tokens"] == 5 * 31 and row["cost"]["dtype"] == "float32"
        assert row["latency"] is None and row["scores"] == []
    assert len({row["perplexity"] for row in found["models"]}) == 3


def test_sequences_are_no_longer_than_any_model_has_positions(tmp_path: Path, text: Path) -> None:
    models = [
        str(save_model(make_model(tiny_config(max_position_embeddings=positions)), tmp_path / str(positions)))
        for positions in (128, 48)
    ]
    found = compare_models(models, text=text, samples=3)
    assert [evaluation.text_tokens for evaluation in found.evaluations] == [3 * 47] * 2
    assert [evaluation.cost.prompt_tokens for evaluation in found.evaluations] == [47] * 2


def test_another_vocabulary_is_told(
    tiny_pair: Pair, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_pair.base, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text("utf-8"))
    tokenizer["model"]["merges"], removed = [], len(tokenizer["model"]["merges"])
    tokenizer["model"]["vocab"] = dict(list(tokenizer["model"]["vocab"].items())[:-removed])
    rewrite(other / "tokenizer.json", json.dumps(tokenizer).encode())
    settings = ["--text", str(text), "--samples", "100", "--length", "32", "--quiet"]
    assert main(["evaluate", str(tiny_pair.base), str(other), *settings, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["other_vocabularies"] == [str(other)]
    assert re.search(naming("vocabulary", other, tiny_pair.base), printed.err)
    ours, theirs = (row["text_tokens"] for row in found["models"])
    assert theirs > 1.5 * ours, "without merges there are more tokens in the text"


def test_latency_runs_prefill_and_decode_alone(tmp_path: Path) -> None:
    model = load(str(save_model(make_model(tiny_config()), tmp_path / "model")), torch.float32, "cpu")
    read: list[tuple[int, int, int]] = []

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        logits, cache = output.logits, output.past_key_values
        read.append((kwargs["input_ids"].shape[1], cache.get_seq_length(), logits.shape[1]))

    model.register_forward_hook(look, with_kwargs=True)
    found = measure_latency(model, prompt_tokens=12, new_tokens=3, repeats=2)
    run = [(12, 12, 1), (1, 13, 1), (1, 14, 1), (1, 15, 1)]
    memory_runs = 2 if found.prefill_peak_bytes is not None else 0
    assert read == run * (1 + 2 + memory_runs)
    assert (found.prompt_tokens, found.new_tokens, found.repeats, found.device) == (12, 3, 2, "cpu")
    assert 0 < found.prefill_seconds < 5 and found.decode_tokens_per_second > 0.5


def test_latency_is_the_median_of_real_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that advances by a second whenever the model is asked for something, and by a minute the third time
    it reads a prompt."""
    model = load(str(save_model(make_model(tiny_config()), tmp_path / "model")), torch.float32, "cpu")
    clock, prompts = [0.0], [0]

    def advance(module: Any, args: Any, kwargs: Any) -> None:
        prompts[0] += kwargs["input_ids"].shape[1] > 1
        clock[0] += 60 if prompts[0] == 3 else 1

    model.register_forward_pre_hook(advance, with_kwargs=True)
    monkeypatch.setattr("impart_hf.evaluation.latency.time.perf_counter", lambda: clock[0])
    found = measure_latency(model, prompt_tokens=8, new_tokens=4, repeats=3)
    assert found.prefill_seconds == 1 and found.decode_tokens_per_second == 1


@linux_only
def test_peak_memory_of_prefill_and_decode(tmp_path: Path) -> None:
    """The scores of eager attention, 16 MiB in float32, are held at once; decoding holds the cache."""
    config = tiny_config(max_position_embeddings=2048)
    folder = save_model(make_model(config), tmp_path / "model")
    model = load(str(folder), torch.float32, "cpu", attn_implementation="eager")
    found = measure_latency(model, prompt_tokens=1024, new_tokens=4, repeats=3)
    assert found.prefill_peak_bytes is not None and found.decode_peak_bytes is not None
    assert HEADS * 1024**2 * 4 <= found.prefill_peak_bytes < 40 * HEADS * 1024**2
    cache = 1024 * 2 * LAYERS * KEY_HEADS * HEAD_DIM * 4
    assert cache <= found.decode_peak_bytes < found.prefill_peak_bytes


@linux_only
def test_freed_memory_goes_back() -> None:
    blocks = [torch.ones(1 << 13) for _ in range(1 << 11)]  # 64 MiB in pieces too small to be mapped each for itself
    held = anonymous_bytes()
    last = torch.ones(1 << 13)  # above them all: what lies below it is not given back by itself
    del blocks
    return_freed_memory()
    assert held - anonymous_bytes() > 40 << 20 and last.numel()
    with PeakMemory() as memory:
        again = [torch.ones(1 << 13) for _ in range(1 << 11)]
    assert memory.bytes > 40 << 20 and again


# --- the command


def test_table(tiny_pair: Pair, tiny_repository: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [str(tiny_pair.base), str(tiny_repository)]
    assert main(["evaluate", *models, "--prompt-tokens", "48"]) == 0
    printed = capsys.readouterr()
    heading, rule, *rows = [line.split("|")[1:-1] for line in printed.out.splitlines()]
    columns = [cell.strip() for cell in heading]
    assert columns == [
        "model", "parameters", "without embeddings", "weights", "prefill MFLOP/token", "decode MFLOP/token",
        "KV cache B/token",
    ]  # fmt: skip
    assert [row[0].strip() for row in rows] == models and len(rule) == len(columns)
    assert [cell.strip() for cell in rows[0][1:]] == [
        "115,008", "74,048", "230.02 kB (bfloat16)", "0.17", "0.21", "256"
    ]  # fmt: skip
    assert printed.err == "", "only shapes are read, there is nothing to wait for"
    settings = ["--text", str(text), "--samples", "2", "--length", "32", "--latency", "--repeats", "1"]
    assert main(["evaluate", *models, *settings, "--new-tokens", "2"]) == 0
    printed = capsys.readouterr()
    heading = printed.out.splitlines()[0]
    for column in ("perplexity", "prefill ms", "decode tokens/s", "prefill peak", "decode peak"):
        assert f" {column} |" in heading
    assert "Evaluating" in printed.err


def test_the_default_prompt_leaves_positions_for_new_tokens(
    tiny_pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(capsys, tiny_pair.base, "--latency", "--repeats", "1", "--new-tokens", "8")
    assert found["models"][0]["cost"]["prompt_tokens"] == found["models"][0]["latency"]["prompt_tokens"] == 120
    assert evaluated(capsys, tiny_pair.base)["models"][0]["cost"]["prompt_tokens"] == 127


# --- bad input


def other_model(folder: Path, kind: str) -> Path:
    """A checkpoint that cannot be evaluated."""
    if kind == "t5":
        T5Config(d_model=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=16).save_pretrained(folder)
    elif kind == "classifier":
        LlamaForSequenceClassification(tiny_config()).save_pretrained(folder)
    elif kind == "few tokens":
        save_model(make_model(tiny_config(vocab_size=64)), folder)
    else:
        save_model(make_model(tiny_config()), folder)
    if kind == "quantised":
        edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    if kind == "no weights":
        (folder / "model.safetensors").unlink()
    if kind == "no tokenizer":
        for path in folder.glob("*token*"):
            path.unlink()
    return folder


@pytest.mark.parametrize(
    "kind, names",
    [
        ("t5", "t5"),
        ("classifier", "LlamaForSequenceClassification"),
        ("quantised", "quantised"),
        ("no weights", "model.safetensors"),
        ("no tokenizer", "tokenizer"),
        ("few tokens", ("vocabulary", 64, "tokenizer")),
    ],
)
def test_models_that_cannot_be_evaluated(
    kind: str, names: Any, tiny_pair: Pair, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two models: no weights of the first have been read when the error comes."""
    other = other_model(tmp_path / "other", kind)
    monkeypatch.setattr(evaluated_models, "load", lambda *args, **kwargs: pytest.fail("weights were read"))
    with pytest.raises((ValueError, OSError), match=naming(other, names)):
        compare_models([str(tiny_pair.base), str(other)], text=text, samples=2, length=32)


@pytest.mark.parametrize(
    "options, names",
    [
        ({"text": ["", " "]}, ("list", "no text")),
        ({"text": "/gone/text.txt"}, "'/gone/text.txt'"),
        ({"text": ["short"]}, ("text", "tokens", "sequence")),
        ({"text": [TEXT], "samples": 0}, ("sequence", 0)),
        ({"text": [TEXT], "batch_size": 0}, ("batch_size", 0)),
        ({"tasks": ["/gone/task.yaml"]}, ("task", "'/gone/task.yaml'")),
        ({"device": "cuda:99"}, ("device", "'cuda:99'")),
        ({"device": "abacus"}, ("device", "'abacus'")),
        ({"prompt_tokens": 128}, ("prompt", "128 tokens", 1, "128 positions")),
        ({"prompt_tokens": 100, "latency": True}, ("prompt", "100 tokens", "64 tokens")),
        ({"prompt_tokens": 0}, ("prompt", 0)),
        ({"new_tokens": 0, "latency": True}, ("continuation", 0)),
        ({"latency": True, "new_tokens": 128}, ("128 positions", "prompt")),
        ({"latency": True, "repeats": 0}, ("repeats", 0)),
        ({"text": [TEXT], "base_model": "user/base"}, ("base_model", "delta repository")),
        ({"models": []}, "model"),
        ({"models": ["/gone"]}, "'/gone'"),
    ],
)
def test_bad_input(options: dict[str, Any], names: Any, tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluated_models, "load", lambda *args, **kwargs: pytest.fail("weights were read"))
    models = options.pop("models", [str(tiny_pair.base)])
    with pytest.raises((ValueError, OSError), match=naming(names)):
        compare_models(models, **options)


def test_errors_are_one_line(tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    assert main(["evaluate", str(tiny_pair.base), "--text", str(tmp_path / "empty.txt")]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.splitlines()) == 1
    assert re.search(naming(tmp_path / "empty.txt", "no text"), printed.err)
