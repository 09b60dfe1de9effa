"""The course of training: block by block, broken off and taken up, ended early, with fields of the Trainer's."""

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.distilled import SETTINGS, TOKENS, checkpoints, distill, encode, held_out_divergence, spoiled
from support.messages import naming
from support.tiny_models import Pair, save_pair, tiny_config
from transformers import (
    BloomConfig,
    CodeGenConfig,
    FalconConfig,
    GPTJConfig,
    GPTNeoConfig,
    MptConfig,
    PreTrainedConfig,
    RwkvConfig,
)
from transformers.models.llama import modeling_llama

from impart_hf import BitDeltaConfig, DareConfig, ImPartRdConfig, LowRankConfig
from impart_hf.distillation import DistillSettings
from impart_hf.distillation.distillation import check_distillation
from impart_hf.distillation.distillation import distill as distill_records
from impart_hf.training.trainer import StepWatch

_SMALL: dict[str, Any] = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15}
_GPT: dict[str, Any] = {**_SMALL, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 8}
_WIDE: dict[str, Any] = {**_SMALL, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TUPLES: dict[str, Callable[[], PreTrainedConfig]] = {
    "bloom": lambda: BloomConfig(**_SMALL, hidden_size=64, n_layer=3, n_head=4),
    "falcon": lambda: FalconConfig(**_WIDE, alibi=False, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-alibi": lambda: FalconConfig(**_WIDE, alibi=True, multi_query=False, parallel_attn=False),
    "gptj": lambda: GPTJConfig(**_GPT),
    "codegen": lambda: CodeGenConfig(**_GPT),
    "mpt": lambda: MptConfig(vocab_size=320, d_model=64, n_layers=3, n_heads=4, initializer_range=0.15),
    "gpt-neo": lambda: GPTNeoConfig(
        **_SMALL, hidden_size=64, num_layers=3, num_heads=4, max_position_embeddings=64, window_size=16,
        attention_types=[[["global", "local", "global"], 1]],
    ),
}  # fmt: skip


def interrupted(pair: Pair, settings: DistillSettings, folder: Path, seen: list[int], steps: list[int]) -> Any:
    """Distil once as a whole, and once until these steps have been taken, with checkpoints in a folder.

    Returns:
        What the whole run gave, and what goes on with the other one and returns its result; `seen` has its steps then.
    """
    records = encode(pair, ImPartRdConfig(), 24)
    models = checkpoints(pair)
    watched = StepWatch.on_log

    def watch(self: StepWatch, args: Any, state: Any, *others: Any, logs: Any = None, **named: Any) -> None:
        if "loss" in logs:
            seen.append(state.global_step)
        if seen == steps:
            raise KeyboardInterrupt
        watched(self, args, state, *others, logs=logs, **named)

    def run() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StepWatch, "on_log", watch)
            return distill_records(*models, records, TOKENS, settings, checkpoints=folder)

    unbroken = distill_records(*models, records, TOKENS, settings)
    with pytest.raises(KeyboardInterrupt):
        run()
    seen.clear()
    return unbroken, run


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["llama", "llama-tied", "qwen2", "gemma2", "gpt-oss", "gpt-neox", "gpt2", "gemma3-vision"]
)
def test_block_by_block(kind: str, tmp_path: Path) -> None:
    """What a group of layers learns, the next is fed by; the report is true for the whole model."""
    pair = save_pair(tmp_path / "pair", tiny_config(kind))
    records = spoiled(encode(pair, ImPartRdConfig(), 12))
    settings = DistillSettings(steps=16, batch_size=4, blocks=1, patience=8)
    result, report = distill(pair, records, settings)
    assert report.after < 0.7 * report.before
    assert report.before == pytest.approx(held_out_divergence(pair, records, tmp_path / "dense"), rel=1e-3)
    assert report.after == pytest.approx(held_out_divergence(pair, result, tmp_path / "dense"), rel=1e-3)
    assert {name: len(data) for name, data in result.items()} == {name: len(data) for name, data in records.items()}
    outside = {
        name
        for name in records
        if not re.search(r"(layers|h)\.\d", name) and name not in ("lm_head.weight", "embed_out.weight")
    } | {name for name in records if "vision" in name}
    assert set(report.untrained) == outside
    assert all(result[name] == records[name] for name in outside)


@pytest.mark.slow
def test_blocks_may_be_as_large_as_the_model(tiny_pair: Pair) -> None:
    """Then there is one group, trained towards the logits: what end to end is, but for the embeddings."""
    records = {n: d for n, d in encode(tiny_pair, ImPartRdConfig(), 24).items() if "embed" not in n}
    settings = DistillSettings(steps=8, batch_size=4)
    whole = distill(tiny_pair, records, settings)[1]
    blocks = distill(tiny_pair, records, dataclasses.replace(settings, blocks=99))[1]
    assert blocks.before == pytest.approx(whole.before, rel=1e-4)
    assert blocks.after == pytest.approx(whole.after, rel=0.01)


@pytest.mark.slow
def test_interrupted_blocks_go_on(tiny_pair: Pair, tmp_path: Path) -> None:
    settings = DistillSettings(steps=8, batch_size=4, checks=2, patience=8, blocks=1)
    seen: list[int] = []
    unbroken, go_on = interrupted(tiny_pair, settings, tmp_path, seen, [*range(1, 9), *range(1, 7)])
    assert go_on() == unbroken
    assert seen[0] == 5
    assert {path.name for path in tmp_path.iterdir()} == {"layers-0.safetensors", "layers-1.safetensors"}


@pytest.mark.parametrize("check", [True, False], ids=["check", "distil"])
def test_blocks_of_models_that_cannot_be_cut(check: bool, tmp_path: Path) -> None:
    pair = save_pair(tmp_path, RwkvConfig(vocab_size=320, hidden_size=64, num_hidden_layers=2))
    settings = DistillSettings(blocks=1)
    with pytest.raises(ValueError, match=naming("distillation", "blocks", "'rwkv'")):
        if check:
            check_distillation(*checkpoints(pair), TOKENS, settings, "cpu")
        else:
            distill(pair, encode(pair, DareConfig(), 8), settings)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TUPLES)
def test_blocks_of_layers_that_return_tuples(kind: str, tmp_path: Path) -> None:
    """The whole model's error, before and after, as it is for the dense models."""
    pair = save_pair(tmp_path / "pair", TUPLES[kind]())
    records, settings = spoiled(encode(pair, DareConfig(), 8)), DistillSettings(steps=4, batch_size=4, blocks=2)
    trained = check_distillation(*checkpoints(pair), TOKENS, settings, "cpu")
    result, report = distill(pair, records, settings)
    assert set(report.untrained) == records.keys() - trained
    assert {name for name in records if re.search(r"(h|blocks)\.\d", name)} <= trained
    assert report.after < report.before
    assert report.before == pytest.approx(held_out_divergence(pair, records, tmp_path / "dense"), rel=1e-3)
    assert report.after == pytest.approx(held_out_divergence(pair, result, tmp_path / "dense"), rel=1e-3)


def test_a_layer_that_cannot_be_run_alone_is_found_before_any_work(
    tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = modeling_llama.LlamaDecoderLayer.forward

    def nested(self: Any, *args: Any, **kwargs: Any) -> Any:
        return {"hidden": forward(self, *args, **kwargs)}

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", nested)
    with pytest.raises(ValueError, match=naming("distillation", "blocks", "'llama'")):
        check_distillation(*checkpoints(tiny_pair), TOKENS, DistillSettings(blocks=1), "cpu")


@pytest.mark.slow
def test_training_stops_early_and_keeps_the_best(tiny_pair: Pair, tmp_path: Path) -> None:
    records = encode(tiny_pair, BitDeltaConfig(), 16)
    models = checkpoints(tiny_pair)
    settings = DistillSettings(steps=400, scale_rate=1, code_rate=1, batch_size=4, checks=50, patience=2)
    first = distill_records(*models, records, TOKENS, settings, checkpoints=tmp_path)
    report = first[1]
    assert 0.2 * 400 < report.steps < 400 and report.steps % 8 == 0
    assert report.after <= report.before
    # Killed after that, it stops there again
    assert distill_records(*models, records, TOKENS, settings, checkpoints=tmp_path) == first


@pytest.mark.slow
def test_training_goes_on_until_rates_have_fallen(tiny_pair: Pair) -> None:
    """High rates do harm at first, and little is lost that could be gained: no reason to stop."""
    records = encode(tiny_pair, ImPartRdConfig(), 3)
    report = distill(tiny_pair, records, DistillSettings(steps=48, batch_size=4))[1]
    assert report.steps == 48 and report.best_step > 24 and report.after < report.before


def test_a_single_step_trains(tiny_pair: Pair) -> None:
    records = spoiled(encode(tiny_pair, LowRankConfig(), 4))
    report = distill(tiny_pair, records, DistillSettings(steps=1, trains="scales"))[1]
    assert report.best_step == 1 and report.after < report.before


def test_training_killed_after_its_last_step_takes_no_other(tiny_pair: Pair, tmp_path: Path) -> None:
    """Ten steps of which three make an epoch; the Trainer alone would begin the next step before it looks."""
    records = encode(tiny_pair, ImPartRdConfig(), 24)
    # At a low rate the last step is the best; the checkpoint of another would be the one that is kept.
    settings = DistillSettings(steps=10, batch_size=4, patience=8, code_rate=0.001)
    first = distill_records(*checkpoints(tiny_pair), records, TOKENS, settings, checkpoints=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    assert distill_records(*checkpoints(tiny_pair), records, TOKENS, settings, checkpoints=tmp_path) == first


@pytest.mark.slow
def test_interrupted_training_goes_on(tiny_pair: Pair, tmp_path: Path) -> None:
    settings = DistillSettings(steps=24, batch_size=4, checks=4, patience=8)
    seen: list[int] = []
    unbroken, go_on = interrupted(tiny_pair, settings, tmp_path, seen, list(range(1, 16)))
    # A checkpoint that was cut short while it was written
    shutil.copytree(tmp_path / "checkpoint-12", tmp_path / "checkpoint-18")
    state = tmp_path / "checkpoint-18" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:100])
    assert go_on() == unbroken
    assert seen[0] == 13


@pytest.mark.slow
def test_accumulated_gradients_are_those_of_the_batch(tiny_pair: Pair) -> None:
    records = encode(tiny_pair, ImPartRdConfig(), 24)
    fields = [{"gradient_accumulation_steps": parts, "max_grad_norm": 10} for parts in (1, 4)]
    settings = [DistillSettings(steps=8, batch_size=4, training=training) for training in fields]
    reports = [distill(tiny_pair, records, each)[1] for each in settings]
    assert reports[0].after == pytest.approx(reports[1].after, rel=0.05) and reports[1].after < reports[1].before


def test_mixed_precision(tiny_pair: Pair) -> None:
    records = encode(tiny_pair, ImPartRdConfig(), 24)
    report = distill(tiny_pair, records, DistillSettings(steps=16, batch_size=4, training={"bf16": True}))[1]
    assert report.after < report.before


@pytest.mark.parametrize(
    "name", ["seed", "max_steps", "output_dir", "eval_steps", "save_only_model", "greater_is_better",
             "gradient_checkpointing", "weight_decay", "optim", "adam_beta1", "lr_scheduler_type", "warmup_steps"]
)  # fmt: skip
def test_training_fields_that_are_not_the_users(tiny_pair: Pair, name: str) -> None:
    with pytest.raises(ValueError, match=naming(f"'{name}'")):
        distill(tiny_pair, encode(tiny_pair, DareConfig(), 8), DistillSettings(training={name: 1}))


@pytest.mark.parametrize(
    "training",
    [{"max_grad_norm": "x"}, {"data_seed": "x"}, {"bf16": 1}, {"ddp_backend": "nothing"}],
)
def test_training_fields_that_the_trainer_cannot_do_with(tiny_pair: Pair, training: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="^training: "):
        distill(tiny_pair, encode(tiny_pair, LowRankConfig(), 8), dataclasses.replace(SETTINGS, training=training))


@pytest.mark.parametrize(
    "field, value",
    [("steps", 0), ("steps", 1.5), ("batch_size", 0), ("batch_size", True), ("seed", -1), ("scale_rate", 0)]
    + [("scale_rate", float("nan")), ("code_rate", 1.1), ("code_rate", "fast"), ("trains", "masks")]
    + [("validation_share", 0), ("validation_share", 1), ("validation_share", None)],
)
def test_settings_out_of_range(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=naming(field)):
        DistillSettings(**{field: value})
