"""A pruned model trained as any model: gradients, compilation, LoRA, Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.pruned_models import HEAD_DIM, IDS, KEPT, assert_same, load_pruned, logits
from support.tiny_models import same_files, tiny_tokenizer
from transformers import PreTrainedModel, Trainer, TrainingArguments

from impart_hf import PrunedLlamaForCausalLM

pytestmark = pytest.mark.usefixtures("seeded")
WIDTHS = [(6, 3, 32), (1, 1, 7), (4, 4, 53), (8, 4, 64)]


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


def test_gradients_of_every_family(family_models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    pruned, dense = family_models
    plain, oracle = gradients(pruned), gradients(dense)
    compared = [name for name, gradient in plain.items() if gradient.shape == oracle[name].shape]
    assert sum("norm" in name for name in compared) >= 9
    for name in compared:
        assert_same(plain[name], oracle[name], 1e-3)
    pruned.gradient_checkpointing_enable()
    for name, gradient in gradients(pruned).items():
        assert torch.equal(gradient, plain[name]), name
    adapted = get_peft_model(pruned, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    targets = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert len(targets) == sum(name.endswith("proj.weight") for name in plain)
    assert_same(logits(adapted.eval()), logits(dense.eval()))


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
    loaded = load_pruned(tmp_path)
    assert loaded.config.vocab_size == 328 and loaded.config.widths == WIDTHS
    assert_same(logits(loaded)[..., :320], before)


def test_lora_on_all_linear_layers(saved: Path, models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    pruned, dense = load_pruned(saved), models[1]
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
    model = load_pruned(saved)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, learning_rate=1e-3, report_to=[], use_cpu=True, save_steps=1
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model=model, args=arguments, train_dataset=data, processing_class=tiny_tokenizer()).train()
    checkpoint = load_pruned(tmp_path / "out" / "checkpoint-1")
    assert checkpoint.config.widths == WIDTHS
    changed = [name for name, tensor in checkpoint.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) == len(before), "every parameter is trained, and saved"
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.state_dict()[name], tensor)


def test_saved_folders_are_alike(models: tuple[PreTrainedModel, PreTrainedModel], tmp_path: Path) -> None:
    for name in ("one", "other"):
        models[0].save_pretrained(tmp_path / name)
    assert same_files(tmp_path / "one", tmp_path / "other")
