"""Scale distillation against the formula, written out densely with the real transformers models."""

import copy
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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
)
from torch.func import functional_call
from transformers import AutoModelForCausalLM, Mamba2Config

from impart_hf import (
    BitDeltaConfig,
    DareConfig,
    DareQtConfig,
    ImPartConfig,
    ImPartQtConfig,
    ImPartRdConfig,
    LowRankConfig,
)
from impart_hf.distilling import DistillReport, DistillSettings, text
from impart_hf.distilling.distillation import distill as distill_records
from impart_hf.distilling.student import attach, load_model, owners_of, student_tensors
from impart_hf.distilling.trained_delta import TrainedDelta
from impart_hf.methods import MethodConfig
from impart_hf.methods.records import empty_record
from impart_hf.modeling.checkpoints import Checkpoint, CheckpointError, HubOptions, text_config
from impart_hf.modeling.delta_decode import decode_planes, decode_record
from impart_hf.modeling.delta_record import FACTORED, pack_record, parse_stack
from impart_hf.training import StepWatch

TOKENS = torch.randint(4, 320, (16, 24), generator=torch.Generator().manual_seed(0))
HELD_OUT = TOKENS[-2:]
SETTINGS = DistillSettings(steps=16, trains="scales", batch_size=4)
METHODS = {"factored": LowRankConfig(), "direct": DareConfig()}
EVERYTHING = 1e-6  # a ratio at which nothing needs to be left out


def encode(pair: Pair, method: MethodConfig, ratio: float) -> dict[str, bytes]:
    """Records of all matrices and stacks that are not too small for it, each of 16-bit size over `ratio`."""
    before, after = load_tensors(pair.base), load_tensors(pair.finetuned)
    records = {}
    for name, old in before.items():
        budget = int(np.prod(old.shape[-2:]) * 2 / ratio)
        if old.dim() >= 2 and budget >= method.least_bytes(*old.shape[-2:]):
            delta = (after[name][: len(old)].float() - old.float()).view(-1, *old.shape[-2:])
            records[name] = b"".join(method.encode(matrix, budget, 7).data for matrix in delta)
    return records


def parsed(records: dict[str, bytes]) -> dict[str, list[Any]]:
    return {name: parse_stack(np.frombuffer(data, np.uint8), name) for name, data in records.items()}


def spoiled(records: dict[str, bytes]) -> dict[str, bytes]:
    """The records with a scale that is half again too large, so that there is something to learn."""
    return {
        name: b"".join(pack_record(dataclasses.replace(record, scale=1.5 * record.scale)) for record in stack)
        for name, stack in parsed(records).items()
    }


def checkpoints(pair: Pair) -> tuple[Checkpoint, Checkpoint]:
    return Checkpoint(str(pair.base), HubOptions()), Checkpoint(str(pair.finetuned), HubOptions())


def distill(
    pair: Pair, records: dict[str, bytes], settings: DistillSettings = SETTINGS, tokens: torch.Tensor = TOKENS
) -> tuple[dict[str, bytes], DistillReport]:
    return distill_records(*checkpoints(pair), records, tokens, settings)


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of logits, in nats a token."""
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


@torch.no_grad()
def held_out_divergence(pair: Pair, records: dict[str, bytes], folder: Path) -> float:
    """The same of the dense checkpoint that the records stand for, on the sequences that are held out."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pair.finetuned, folder)

    def put_records(tensors: dict[str, torch.Tensor]) -> None:
        before = load_tensors(pair.base)
        for name, stack in parsed(records).items():
            delta = torch.stack([decode_record(record, name) for record in stack])
            rows = len(before[name])
            tensors[name] = tensors[name].float()
            tensors[name][:rows] = before[name].float() + delta.view(before[name].shape)

    edit_tensors(folder, put_records)
    return divergence(load(pair.finetuned)(HELD_OUT).logits, load(folder)(HELD_OUT).logits).item()


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


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return save_pair(tmp_path_factory.mktemp("llama"), tiny_config("llama"))


@pytest.mark.parametrize("layout", METHODS)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt-oss"])
def test_gradients_are_those_of_the_dense_formula(kind: str, layout: str, tmp_path: Path) -> None:
    pair = save_pair(tmp_path, tiny_config(kind))
    base, finetuned = checkpoints(pair)
    records = {n: np.frombuffer(d, np.uint8) for n, d in encode(pair, METHODS[layout], 6).items() if "layers" in n}
    teacher, names = load(pair.finetuned), list(records)
    student = load_model(finetuned, student_tensors(base, finetuned, records, names), torch.float32)
    deltas = {name: attach(student, name, records[name], None, owners_of(teacher)[name]) for name in names}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for delta in deltas.values():
            for factors in delta.log_factors:
                factors.copy_(0.3 * torch.randn(factors.shape, generator=generator))
    text.divergence(teacher(TOKENS).logits, student(TOKENS).logits).backward()

    weights, variables = {}, {}
    for name in names:
        variables[name] = [f.detach().double().requires_grad_() for f in deltas[name].log_factors]
        matrices = []
        for record, factors in zip(parse_stack(records[name], name), variables[name], strict=True):
            planes = [plane.dense().double() for plane in decode_planes(record, name)]
            if record.layout == FACTORED:
                sigma = torch.from_numpy(record.sigma.astype(np.float64)) * factors.exp()
                matrices.append(record.scale * planes[0].t() @ torch.diag(sigma) @ planes[1])
            else:
                matrices.append(record.scale * factors.exp() * planes[0])
        before = base.tensor(name).double()
        weights[name] = before + torch.stack(matrices).view(before.shape)
    # The rotary embedding makes float32 of everything: the rest of the model is in float64
    dense = teacher.double()
    if kind == "gpt-oss":
        dense.set_experts_implementation("eager")  # the default one knows no float64
    wanted = dense(TOKENS).logits.detach()
    divergence(wanted, functional_call(dense, weights, (TOKENS,)).logits).backward()
    assert len(names) >= 8
    for name in names:
        for ours, theirs in zip(deltas[name].log_factors, variables[name], strict=True):
            assert ours.grad is not None and theirs.grad is not None and theirs.grad.abs().max() > 0
            assert (ours.grad - theirs.grad).norm() < 1e-3 * theirs.grad.norm(), name
    trained = {p for delta in deltas.values() for p in delta.log_factors}
    assert {p for p in student.parameters() if p.grad is not None} == trained


@pytest.mark.parametrize("layout", METHODS)
def test_spoiled_scales_come_back(pair: Pair, layout: str, tmp_path: Path) -> None:
    right = encode(pair, METHODS[layout], EVERYTHING)
    result, report = distill(pair, spoiled(right), dataclasses.replace(SETTINGS, steps=60, batch_size=8))
    assert report.after < 0.05 * report.before
    for name, (record,) in parsed(result).items():
        (wanted,) = parsed(right)[name]
        # Of the singular values the first: those that stand for noise say too little to be learned
        ours, theirs = (float(r.scale * (r.sigma[0] if r.layout == FACTORED else 1)) for r in (record, wanted))
        assert ours == pytest.approx(theirs, rel=0.1), name
        assert record.relative_error < 0.2, name
    assert report.untrained == ()


@pytest.mark.parametrize("layout", METHODS)
@pytest.mark.parametrize("kind", ["llama-tied", "qwen2", "gemma2", "mixtral", "gpt-oss", "gpt-neox", "mamba"])
def test_report_is_true_for_the_records_as_stored(kind: str, layout: str, tmp_path: Path) -> None:
    pair = save_pair(tmp_path / "pair", tiny_config(kind))
    records = spoiled(encode(pair, METHODS[layout], 8))
    result, report = distill(pair, records)
    assert 0 < report.best_step <= report.steps == SETTINGS.steps
    assert report.after < report.before
    assert report.before == pytest.approx(held_out_divergence(pair, records, tmp_path / "dense"), rel=1e-3)
    assert report.after == pytest.approx(held_out_divergence(pair, result, tmp_path / "dense"), rel=1e-3)
    renamed = {name for name in records if ".experts." in name and kind == "mixtral" or name == "embed_out.weight"}
    assert set(report.untrained) == renamed
    assert all((result[name] == records[name]) == (name in report.untrained) for name in records)


@pytest.mark.parametrize("layout", METHODS)
def test_only_the_numbers_that_are_trained_change(pair: Pair, layout: str) -> None:
    records = spoiled(encode(pair, METHODS[layout], 8))
    result, report = distill(pair, records)
    assert result.keys() == records.keys()
    before, after = load_tensors(pair.base), load_tensors(pair.finetuned)
    for name, data in result.items():
        assert len(data) == len(records[name])
        (old,), (new,) = parsed(records)[name], parsed(result)[name]
        changed = {
            field.name
            for field in dataclasses.fields(old)
            if not np.array_equal(getattr(old, field.name), getattr(new, field.name))
        }
        trained = {"scale", "relative_error"} | ({"sigma"} if layout == "factored" else set())
        assert changed == (set() if name in report.untrained else trained)
        if old.layout == FACTORED:
            assert np.abs(new.sigma).max() == 1
        if name in report.untrained:
            continue
        delta = after[name].float() - before[name].float()
        error = (decode_record(new, name) - delta).norm() / delta.norm()
        assert new.relative_error == pytest.approx(error.item(), rel=1e-5)


def test_the_same_settings_give_the_same_bytes_and_another_seed_others(pair: Pair) -> None:
    records = spoiled(encode(pair, LowRankConfig(), 8))
    with torch.no_grad():
        first = distill(pair, records)
    torch.manual_seed(1)
    assert distill(pair, records) == first
    assert distill(pair, records, dataclasses.replace(SETTINGS, seed=1))[0] != first[0]


@pytest.mark.parametrize("layout", METHODS)
def test_never_worse_than_the_start(pair: Pair, layout: str) -> None:
    records = encode(pair, METHODS[layout], EVERYTHING)
    result, report = distill(pair, records, dataclasses.replace(SETTINGS, steps=24, scale_rate=1))
    assert (report.steps, report.best_step, report.after) == (24, 0, report.before)
    assert result == records


def test_held_out_sequences_are_not_trained_on(pair: Pair) -> None:
    records = encode(pair, DareConfig(), 4)
    settings = DistillSettings(steps=1, trains="scales", batch_size=14)
    one = distill(pair, records, settings)
    other_tokens = torch.cat([TOKENS[:-2], TOKENS[-2:].flip(0, 1)])
    other = distill(pair, records, settings, other_tokens)
    assert one[0] == other[0] and one[1] != other[1]


def test_fewer_sequences_than_a_batch(pair: Pair) -> None:
    records = encode(pair, DareConfig(), 8)
    for count in (2, 3):
        _, report = distill(pair, records, DistillSettings(steps=3, validation_share=0.9), TOKENS[:count, :8])
        assert report.after <= report.before


def test_empty_records_in_a_stack_and_records_that_cannot_be_trained(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, tiny_config("gpt-oss"))
    name = "model.layers.0.mlp.experts.down_proj"
    stack = parsed(spoiled(encode(pair, LowRankConfig(), 8)))[name]
    empty = empty_record(stack[0].rows, stack[0].columns)
    data = empty + b"".join(map(pack_record, stack[1:]))
    result, report = distill(pair, {name: data})
    assert report.after < report.before and len(result[name]) == len(data)
    first, *others = parsed(result)[name]
    assert (first.rank, first.scale) == (0, 0) and all(r.relative_error < 1 for r in others)

    report = distill(pair, {})[1]
    assert (report.steps, report.best_step, report.before, report.after) == (0, 0, 0, 0)


def test_scales_of_some_rows_alone(pair: Pair) -> None:
    """The format has room for them, no method makes them."""
    (record,) = parsed(encode(pair, BitDeltaConfig(), 8))["model.layers.0.self_attn.q_proj.weight"]
    (whole,) = record.segments
    record.segments = [
        dataclasses.replace(whole, columns=1, scaled=1),
        dataclasses.replace(whole, columns=whole.columns - 1),
    ]
    record.column_scales = [np.ones((1, 1), np.float16), None]
    with pytest.raises(ValueError, match="only some rows have scales"):
        TrainedDelta([record], "q_proj", None, torch.device("cpu"))


def test_rows_added_to_the_vocabulary(tmp_path: Path) -> None:
    base = make_model(tiny_config("llama"))
    model = fine_tune(base)
    model.resize_token_embeddings(324, mean_resizing=False)
    pair = Pair(save_model(base, tmp_path / "base"), save_model(model, tmp_path / "finetuned"))
    records = spoiled(encode(pair, LowRankConfig(), 8))
    tokens = TOKENS.clone()
    tokens[:-2, 0] = 323
    result, report = distill(pair, records, tokens=tokens)
    assert report.untrained == ("lm_head.weight", "model.embed_tokens.weight")
    assert report.after == pytest.approx(held_out_divergence(pair, result, tmp_path / "dense"), rel=1e-3)
    assert report.after < report.before


CODED = {
    "impart-rd": ImPartRdConfig(),
    "impart-qt": ImPartQtConfig(groups=(1, 4)),
    "impart": ImPartConfig(),
    "bitdelta": BitDeltaConfig(),
    "dare-qt": DareQtConfig(),
    "dare": DareConfig(),
}


@pytest.mark.parametrize("method", CODED)
def test_values_are_trained_and_cost_no_byte(pair: Pair, method: str, tmp_path: Path) -> None:
    # So small matrices have too many bits at 24 under impart-rd, and too few entries under DARE-Qt, for a few steps on
    # their values to gain more than those on sizes
    records = encode(pair, CODED[method], {"impart-rd": 48, "dare-qt": 12}.get(method, 24))
    settings = DistillSettings(steps=60, batch_size=8, validation_share=0.02)
    tokens = torch.cat([torch.randint(4, 320, (112, 24), generator=torch.Generator().manual_seed(1)), HELD_OUT])
    result, report = distill(pair, records, settings, tokens)
    assert report.after < report.before
    assert report.after == pytest.approx(held_out_divergence(pair, result, tmp_path / "dense"), rel=1e-3)
    scales = distill(pair, records, dataclasses.replace(settings, trains="scales"), tokens)[1]
    assert report.after < scales.after and report.before == scales.before
    before, after = load_tensors(pair.base), load_tensors(pair.finetuned)
    for name, data in result.items():
        assert len(data) == len(records[name])
        (old,), (new,) = parsed(records)[name], parsed(result)[name]
        assert np.array_equal(old.thresholds, new.thresholds) and old.segments == new.segments
        if old.rank != 0 or old.layout != FACTORED:
            assert not np.array_equal(old.codes, new.codes), name
            delta = after[name].float() - before[name].float()
            error = (decode_record(new, name) - delta).norm() / delta.norm()
            assert new.relative_error == pytest.approx(error.item(), rel=1e-5)


@pytest.mark.parametrize("method", CODED)
def test_training_begins_with_what_is_stored(pair: Pair, method: str) -> None:
    """Values lie in the cells of their codes: before the first step nothing has changed."""
    records = encode(pair, CODED[method], 12)
    for name, data in records.items():
        (record,) = parsed({name: data})[name]
        exact = load_tensors(pair.finetuned)[name].float() - load_tensors(pair.base)[name].float()
        delta = TrainedDelta([record], name, exact[None], torch.device("cpu"))
        assert torch.allclose(delta(torch.zeros_like(exact)), decode_record(record, name), atol=1e-7)
        (folded,) = delta.fold()
        assert np.array_equal(folded.codes, record.codes), name


def test_gradients_go_straight_through_the_rounding(pair: Pair) -> None:
    """That of a latent is that of its stored value, in the latent's unit."""
    name = "model.layers.0.mlp.up_proj.weight"
    (record,) = parsed(encode(pair, ImPartRdConfig(), 12))[name]
    exact = load_tensors(pair.finetuned)[name].float() - load_tensors(pair.base)[name].float()
    delta = TrainedDelta([record], name, exact[None], torch.device("cpu"))
    weights = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
    (delta(torch.zeros_like(exact)) * weights).sum().backward()
    u, v = (plane.dense().requires_grad_() for plane in decode_planes(record, name))
    sigma = torch.from_numpy(record.sigma.astype(np.float32)) * record.scale
    ((u.t() * sigma) @ v * weights).sum().backward()
    for plane, exact_values in zip(delta.planes, (u, v), strict=True):
        assert torch.allclose(
            plane.latents.grad, torch.cat(plane.in_units(exact_values.grad.flatten())), rtol=1e-4, atol=1e-7
        )


def test_tied_embeddings_learn_from_both_ends(tmp_path: Path) -> None:
    pair = save_pair(tmp_path, tiny_config("llama-tied"))
    records = spoiled({n: d for n, d in encode(pair, ImPartRdConfig(), 8).items() if "embed" in n})
    assert len(records) == 1
    result, report = distill(pair, records, DistillSettings(steps=40, batch_size=4))
    assert report.after < 0.5 * report.before and report.untrained == ()
    assert report.after == pytest.approx(held_out_divergence(pair, result, tmp_path / "dense"), rel=1e-3)


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2", "gemma2", "gpt-oss"])
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
    outside = {name for name in records if "layers" not in name and name != "lm_head.weight"}
    assert set(report.untrained) == outside
    assert all(result[name] == records[name] for name in outside)


def test_blocks_may_be_as_large_as_the_model(pair: Pair) -> None:
    """Then there is one group, trained towards the logits: what end to end is, but for the embeddings."""
    records = {n: d for n, d in encode(pair, ImPartRdConfig(), 24).items() if "embed" not in n}
    settings = DistillSettings(steps=8, batch_size=4)
    whole = distill(pair, records, settings)[1]
    blocks = distill(pair, records, dataclasses.replace(settings, blocks=99))[1]
    assert blocks.before == pytest.approx(whole.before, rel=1e-4)
    assert blocks.after == pytest.approx(whole.after, rel=0.01)


def test_interrupted_blocks_go_on(pair: Pair, tmp_path: Path) -> None:
    settings = DistillSettings(steps=8, batch_size=4, checks=2, patience=8, blocks=1)
    seen: list[int] = []
    unbroken, go_on = interrupted(pair, settings, tmp_path, seen, [*range(1, 9), *range(1, 7)])
    assert go_on() == unbroken
    assert seen[0] == 5
    assert {path.name for path in tmp_path.iterdir()} == {"layers-0.safetensors", "layers-1.safetensors"}


def test_configurations_are_read_as_transformers_writes_them_and_left_alone(tmp_path: Path) -> None:
    """Infinities in a notation of its own, and nested fields, which transformers rewrites."""
    configs = {
        "mamba2": Mamba2Config(
            vocab_size=320, hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16, n_groups=1
        ),
        "llama": tiny_config("llama"),
    }
    for name, config in configs.items():
        pair = save_pair(tmp_path / name, config)
        if name == "llama":
            edit_json(
                pair.finetuned / "config.json", rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters=None
            )
        written = (pair.finetuned / "config.json").read_text("utf-8")
        assert "__float__" in written or "linear" in written
        finetuned = checkpoints(pair)[1]
        content = copy.deepcopy(finetuned.config)
        text_config(finetuned.config)
        load_model(finetuned, {n: finetuned.tensor(n) for n in finetuned.names()}, torch.float32)
        assert finetuned.config == content


@pytest.mark.parametrize("kind", ["mixtral", "gpt-neox"])
def test_blocks_of_models_that_cannot_be_cut(kind: str, tmp_path: Path) -> None:
    pair = save_pair(tmp_path, tiny_config(kind))
    with pytest.raises(ValueError, match="distillation by blocks is not available for models of type '.*': its"):
        distill(pair, encode(pair, DareConfig(), 8), DistillSettings(blocks=1))


def test_training_stops_early_and_keeps_the_best(pair: Pair, tmp_path: Path) -> None:
    records = encode(pair, BitDeltaConfig(), 16)
    models = checkpoints(pair)
    settings = DistillSettings(steps=400, scale_rate=1, code_rate=1, batch_size=4, checks=50, patience=2)
    first = distill_records(*models, records, TOKENS, settings, checkpoints=tmp_path)
    report = first[1]
    assert 0.2 * 400 < report.steps < 400 and report.steps % 8 == 0
    assert report.after <= report.before
    # Killed after that, it stops there again
    assert distill_records(*models, records, TOKENS, settings, checkpoints=tmp_path) == first


def test_training_goes_on_until_rates_have_fallen(pair: Pair) -> None:
    """High rates do harm at first, and little is lost that could be gained: no reason to stop."""
    records = encode(pair, ImPartRdConfig(), 3)
    report = distill(pair, records, DistillSettings(steps=48, batch_size=4))[1]
    assert report.steps == 48 and report.best_step > 24 and report.after < report.before


@pytest.mark.parametrize("method, ratio", [(BitDeltaConfig(), 48), (DareQtConfig(), 24), (ImPartRdConfig(), 24)])
def test_values_begin_where_they_are_stored(pair: Pair, method: MethodConfig, ratio: float) -> None:
    """Not at an edge between two codes, under a mask either."""
    before, after = load_tensors(pair.base), load_tensors(pair.finetuned)
    for name, stack in parsed(encode(pair, method, ratio)).items():
        exact = (after[name].float() - before[name].float())[None]
        for plane in TrainedDelta(stack, name, exact, torch.device("cpu")).planes:
            found, stored = torch.cat(plane.in_units(plane.latents.detach())), plane.values().detach()
            assert (found * stored).sum().item() == pytest.approx(stored.square().sum().item(), rel=0.2), name


def test_a_single_step_trains(pair: Pair) -> None:
    records = spoiled(encode(pair, LowRankConfig(), 4))
    report = distill(pair, records, DistillSettings(steps=1, trains="scales"))[1]
    assert report.best_step == 1 and report.after < report.before


def test_training_killed_after_its_last_step_takes_no_other(pair: Pair, tmp_path: Path) -> None:
    """Ten steps of which three make an epoch; the Trainer alone would begin the next step before it looks."""
    records, settings = encode(pair, ImPartRdConfig(), 24), DistillSettings(steps=10, batch_size=4, patience=8)
    first = distill_records(*checkpoints(pair), records, TOKENS, settings, checkpoints=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    assert distill_records(*checkpoints(pair), records, TOKENS, settings, checkpoints=tmp_path) == first


def test_interrupted_training_goes_on(pair: Pair, tmp_path: Path) -> None:
    settings = DistillSettings(steps=24, batch_size=4, checks=4, patience=8)
    seen: list[int] = []
    unbroken, go_on = interrupted(pair, settings, tmp_path, seen, list(range(1, 16)))
    # A checkpoint that was cut short while it was written
    shutil.copytree(tmp_path / "checkpoint-12", tmp_path / "checkpoint-18")
    state = tmp_path / "checkpoint-18" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:100])
    assert go_on() == unbroken
    assert seen[0] == 13


def test_accumulated_gradients_are_those_of_the_batch(pair: Pair) -> None:
    records = encode(pair, ImPartRdConfig(), 24)
    fields = [{"gradient_accumulation_steps": parts, "max_grad_norm": 10} for parts in (1, 4)]
    settings = [DistillSettings(steps=8, batch_size=4, training=training) for training in fields]
    reports = [distill(pair, records, each)[1] for each in settings]
    assert reports[0].after == pytest.approx(reports[1].after, rel=0.05) and reports[1].after < reports[1].before


def test_mixed_precision(pair: Pair) -> None:
    records = encode(pair, ImPartRdConfig(), 24)
    report = distill(pair, records, DistillSettings(steps=16, batch_size=4, training={"bf16": True}))[1]
    assert report.after < report.before


@pytest.mark.parametrize(
    "name", ["seed", "max_steps", "output_dir", "eval_steps", "save_only_model", "greater_is_better",
             "gradient_checkpointing", "weight_decay", "optim", "adam_beta1", "lr_scheduler_type", "warmup_steps"]
)  # fmt: skip
def test_training_fields_that_are_not_the_users(pair: Pair, name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' cannot be set here"):
        distill(pair, encode(pair, DareConfig(), 8), DistillSettings(training={name: 1}))


@pytest.mark.parametrize(
    "training",
    [{"max_grad_norm": "x"}, {"data_seed": "x"}, {"bf16": 1}, {"ddp_backend": "nothing"}],
)
def test_training_fields_that_the_trainer_cannot_do_with(pair: Pair, training: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="^training: "):
        distill(pair, encode(pair, LowRankConfig(), 8), dataclasses.replace(SETTINGS, training=training))


@pytest.mark.parametrize(
    "tokens",
    [TOKENS[0], TOKENS[:, :0], TOKENS.int(), TOKENS.float(), TOKENS - 10, TOKENS + 10],
    ids=["one axis", "no tokens", "int32", "float", "negative", "beyond the vocabulary"],
)
def test_tokens_that_will_not_do(pair: Pair, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="tokens must be"):
        distill(pair, encode(pair, DareConfig(), 8), tokens=tokens)


def test_a_single_sequence(pair: Pair) -> None:
    with pytest.raises(ValueError, match="two or more sequences, .* got 1: give more text"):
        distill(pair, encode(pair, DareConfig(), 8), tokens=TOKENS[:1])


@pytest.mark.parametrize(
    "field, value",
    [("steps", 0), ("steps", 1.5), ("batch_size", 0), ("batch_size", True), ("seed", -1), ("scale_rate", 0)]
    + [("scale_rate", float("nan")), ("code_rate", 1.1), ("code_rate", "fast"), ("trains", "masks")]
    + [("validation_share", 0), ("validation_share", 1), ("validation_share", None)],
)
def test_settings_out_of_range(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be"):
        DistillSettings(**{field: value})


def test_logits_that_are_not_finite(pair: Pair) -> None:
    records = encode(pair, DareConfig(), 8)
    name = "model.layers.1.mlp.up_proj.weight"
    (record,) = parsed(records)[name]
    records[name] = pack_record(dataclasses.replace(record, scale=3e38))
    with pytest.raises(ValueError, match="logits of the fine-tuned or of the compressed model are not finite"):
        distill(pair, records)


def test_a_checkpoint_that_lacks_a_tensor(pair: Pair, tmp_path: Path) -> None:
    shutil.copytree(pair.finetuned, tmp_path / "finetuned")
    edit_tensors(tmp_path / "finetuned", lambda tensors: tensors.__delitem__("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.norm\.weight"):
        distill(Pair(pair.base, tmp_path / "finetuned"), encode(pair, DareConfig(), 8))
