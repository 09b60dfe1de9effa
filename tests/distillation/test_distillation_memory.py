"""Memory of distillation: logits in parts, layers that are run again, micro-batches, and the forecast of all."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.distilled import TOKENS, checkpoints, distill, encode, load, spoiled
from support.messages import naming
from support.tiny_models import Pair, save_pair, tiny_config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from impart_hf import DareConfig, ImPartConfig, ImPartQtConfig, ImPartRdConfig, LowRankConfig
from impart_hf.common import partial_logits, token_losses
from impart_hf.common.live_bytes import LiveBytes
from impart_hf.common.partial_logits import LogitsOf
from impart_hf.distillation import DistillSettings, fit, text
from impart_hf.distillation.distillation import distill as distill_records
from impart_hf.distillation.memory import DeltaSize, DistillationMemory, Forecast, checkpoint_bytes_for
from impart_hf.distillation.recomputation import recompute_layers
from impart_hf.distillation.record_trainer import RecordTrainer
from impart_hf.distillation.student import Place, attach, exact_delta, load_model, owners_of, student_tensors
from impart_hf.distillation.trained_delta import TrainedPlane
from impart_hf.distillation.trainer import arguments_for
from impart_hf.evaluation.metrics import evaluate
from impart_hf.modeling.codebook import CODEBOOKS
from impart_hf.modeling.delta_record import parse_stack
from impart_hf.training.trainer import StepWatch

SETTINGS = DistillSettings(steps=4, batch_size=4)
# Soft-capped, nested, tied, with a bias, under other names, without attention, with experts.
HEADS = ["gemma2", "gemma3-vision", "llama-tied", "phi", "gpt2", "biogpt", "mamba", "qwen2-moe"]


def sizes_of(records: dict[str, bytes]) -> dict[str, list[DeltaSize]]:
    arrays = {name: np.frombuffer(data, np.uint8) for name, data in records.items()}
    return {name: [DeltaSize.of(record) for record in parse_stack(data, name)] for name, data in arrays.items()}


def student_of(pair: Pair, records: dict[str, bytes]) -> tuple[Any, Any, dict[str, Any]]:
    """A teacher, a student, and the deltas of the student whose values are trained."""
    base, finetuned = checkpoints(pair)
    arrays = {name: np.frombuffer(data, np.uint8) for name, data in records.items()}
    teacher = load(pair.finetuned).requires_grad_(False)
    owners = owners_of(teacher)
    arrays = {name: data for name, data in arrays.items() if name in owners}
    tensors = student_tensors(base, finetuned, arrays, list(arrays))
    student = load_model(finetuned, tensors, torch.float32, torch.device("cpu"))
    deltas = {
        name: attach(student, name, data, exact_delta(base, finetuned, name), Place(owners[name]))
        for name, data in arrays.items()
    }
    return teacher, student, deltas


def gradients(loss: Any, deltas: dict[str, Any]) -> tuple[float, list[Tensor]]:
    value = loss(TOKENS[:3])
    value.backward()
    numbers = [p for delta in deltas.values() for p in delta.parameters()]
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in numbers]
    for number in numbers:
        number.grad = None
    return value.item(), found


@pytest.mark.parametrize("kind", HEADS)
def test_parts_of_logits_are_those_of_the_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load(save_pair(tmp_path, tiny_config(kind)).finetuned)
    whole = LogitsOf(model)(TOKENS[:2])
    assert whole.are_whole
    monkeypatch.setattr(token_losses, "CHUNK_ENTRIES", 7 * 320)
    logits_of = LogitsOf(model)
    parts = logits_of(TOKENS[:2])
    assert logits_of.why_whole is None and not parts.are_whole and parts.chunk == 7
    found = torch.cat([parts.part(start, 7) for start in range(0, 48, 7)])
    assert torch.allclose(found, whole.states.flatten(0, 1), atol=1e-5)
    assert "forward" not in vars(model.base_model)


@pytest.mark.parametrize("kind", ["gemma2", pytest.param("gpt-oss", marks=pytest.mark.slow)])
def test_memory_is_saved_without_changing_loss_or_gradients(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of the logits, and layers that are run again, each and together; Gemma 2's logits are soft-capped."""
    pair = save_pair(tmp_path, tiny_config(kind))
    teacher, student, deltas = student_of(pair, spoiled(encode(pair, ImPartRdConfig(), 12)))
    wanted, expected = gradients(text.whole_model_loss(teacher, student, False), deltas)
    assert all(each.abs().max() > 0 for each in expected if len(each))

    def check(recomputes: bool) -> None:
        value, found = gradients(text.whole_model_loss(teacher, student, recomputes), deltas)
        assert value == pytest.approx(wanted, rel=1e-5)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-9

    with monkeypatch.context() as patch:
        patch.setattr(token_losses, "CHUNK_ENTRIES", 10 * 320)
        check(False)
    recompute_layers(student)
    check(True)
    monkeypatch.setattr(token_losses, "CHUNK_ENTRIES", 10 * 320)
    check(True)


@pytest.mark.slow
def test_whole_logits_are_never_alive_in_parts(tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    records, peaks = encode(tiny_pair, LowRankConfig(), 12), {}
    for recomputes in (False, True):
        teacher, student, _ = student_of(tiny_pair, records)
        if recomputes:
            recompute_layers(student)
        for entries in (1 << 25, 16 * 320):
            monkeypatch.setattr(token_losses, "CHUNK_ENTRIES", entries)
            loss = text.whole_model_loss(teacher, student, recomputes)
            loss(TOKENS[:1])  # the check of the head
            student.zero_grad()
            with LiveBytes() as live:
                loss(TOKENS).backward()
            peaks[recomputes, entries > 16 * 320] = live.peak
    logits = TOKENS.numel() * 320 * 4
    for recomputes in (False, True):
        assert peaks[recomputes, False] < peaks[recomputes, True] - 2 * logits
    assert peaks[True, False] < 0.8 * peaks[False, False]


def test_a_head_that_cannot_be_run_alone_gets_whole_logits(tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load(tiny_pair.finetuned)
    forward, said = model.forward, list[str]()

    def shifted(*args: Any, **kwargs: Any) -> Any:
        """Logits that depend on more than the hidden states."""
        output = forward(*args, **kwargs)
        output.logits = output.logits + kwargs["input_ids"][..., None]
        return output

    model.forward = shifted
    monkeypatch.setattr(token_losses, "CHUNK_ENTRIES", 7 * 320)
    monkeypatch.setattr(partial_logits.logger, "warning", said.append)
    logits_of = LogitsOf(model)
    assert all(logits_of(TOKENS[:2]).are_whole for _ in range(2))
    (message,) = said
    assert "LlamaForCausalLM" in message and str(logits_of.why_whole) in message


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_evaluation_in_parts(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = save_pair(tmp_path, tiny_config(kind))
    model, reference = load(pair.base), load(pair.finetuned)
    wanted = evaluate(model, reference, TOKENS, 4)  # type: ignore[arg-type]
    monkeypatch.setattr(token_losses, "CHUNK_ENTRIES", 7 * 320)
    assert evaluate(model, reference, TOKENS, 4) == pytest.approx(wanted, rel=1e-5)  # type: ignore[arg-type]
    assert evaluate(model, model, TOKENS, 4)[1] == 0  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [None, 1, 2])
def test_distillation_is_the_same_within_rounding(
    blocks: int | None, tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 14 sequences 3 batches of 4 make an epoch, of micro-batches too."""
    records = spoiled(encode(tiny_pair, ImPartRdConfig(), 12))
    settings = dataclasses.replace(SETTINGS, blocks=blocks)
    _, usual = distill(tiny_pair, records, settings)
    monkeypatch.setattr(token_losses, "CHUNK_ENTRIES", 10 * 320)
    frugal = dataclasses.replace(settings, micro_batch_size=3, gradient_checkpointing=True)
    _, report = distill(tiny_pair, records, frugal)
    assert (report.before, report.after) == pytest.approx((usual.before, usual.after), rel=0.01)
    assert report.after < report.before


@pytest.mark.slow
def test_micro_batches_have_the_gradients_of_the_batch(tiny_pair: Pair) -> None:
    records = spoiled(encode(tiny_pair, ImPartConfig(), 12))
    settings = dataclasses.replace(SETTINGS, trains="scales", steps=6)
    whole, *parts = (
        distill(tiny_pair, records, dataclasses.replace(settings, micro_batch_size=size))[1] for size in (None, 1, 3)
    )
    for part in parts:
        assert part.after == pytest.approx(whole.after, rel=1e-4)


@pytest.mark.slow
def test_eight_bit_moments(tiny_pair: Pair, tmp_path: Path) -> None:
    """Nearly the same result; killed, it goes on from its checkpoint to the very same."""
    pytest.importorskip("bitsandbytes")
    records = spoiled(encode(tiny_pair, ImPartRdConfig(), 12))
    settings = DistillSettings(steps=8, batch_size=4, checks=2, patience=8)
    _, usual = distill(tiny_pair, records, settings)
    frugal = dataclasses.replace(settings, optim="adamw_bnb_8bit")
    result, report = distill(tiny_pair, records, frugal)
    assert report.after == pytest.approx(usual.after, rel=0.2) and report.after < report.before
    watched = StepWatch.on_log

    def killed(self: StepWatch, args: Any, state: Any, *others: Any, **named: Any) -> None:
        if state.global_step == 6:
            raise KeyboardInterrupt
        watched(self, args, state, *others, **named)

    def again() -> Any:
        return distill_records(*checkpoints(tiny_pair), records, TOKENS, frugal, checkpoints=tmp_path)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StepWatch, "on_log", killed)
        again()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert again() == (result, report)


def test_an_optimizer_that_is_not_installed(tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    settings = dataclasses.replace(SETTINGS, optim="adamw_bnb_8bit")
    with pytest.raises(ModuleNotFoundError, match=naming("'adamw_bnb_8bit'", "pip install bitsandbytes")):
        distill(tiny_pair, encode(tiny_pair, DareConfig(), 8), settings)


@pytest.mark.parametrize("field, value", [("optim", "sgd"), ("gradient_checkpointing", "yes"), ("micro_batch_size", 0)])
def test_settings_of_memory_out_of_range(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=naming(field, repr(value))):
        DistillSettings(**{field: value})


def record_trainer(pair: Pair, arguments: Any, settings: DistillSettings) -> RecordTrainer:
    return RecordTrainer(*checkpoints(pair), len(TOKENS), settings, arguments, 8)


def test_a_micro_batch_that_runs_out_of_memory_is_halved(tiny_pair: Pair) -> None:
    most, tried = 3, list[int]()

    def loss(rows: Tensor) -> Tensor:
        tried.append(len(rows))
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return torch.zeros(())

    with arguments_for(SETTINGS, torch.device("cpu"), None) as arguments:
        trainer = record_trainer(tiny_pair, arguments, SETTINGS)
        trainer.fit_micro_batch({}, loss)
        assert trainer.micro_batch_size == 2 and tried == [8, 4, 2]
        most = 0
        with pytest.raises(ValueError, match=naming("sequence", "memory", "blocks")):
            trainer.fit_micro_batch({}, loss)


def measured(pair: Pair, records: dict[str, bytes], tokens: Tensor, recomputes: bool) -> int:
    """Bytes alive in the second step of a real distillation, at their peak."""
    teacher, student, deltas = student_of(pair, records)
    if recomputes:
        recompute_layers(student)
    loss = text.whole_model_loss(teacher, student, recomputes)
    numbers = [p for delta in deltas.values() for p in delta.parameters()]
    optimizer = torch.optim.Adam(numbers)
    loss(tokens).backward()
    optimizer.step()
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held_tensors(teacher, student, optimizer)}
    with LiveBytes() as live:
        loss(tokens).backward()
        optimizer.step()
    return sum(held.values()) + live.peak


def held_tensors(teacher: nn.Module, student: nn.Module, optimizer: Any) -> list[Tensor]:
    models = [t for model in (teacher, student) for t in [*model.parameters(), *model.buffers()]]
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    planes = [p for m in student.modules() if isinstance(m, TrainedPlane) for p in m.fixed_tensors()]
    moments = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return [*models, *gradients, *planes, *moments]


@pytest.mark.parametrize("recomputes", [False, True], ids=["activations kept", "recomputed"])
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_forecast_is_near_what_is_measured(kind: str, recomputes: bool, tmp_path: Path) -> None:
    """Deeper than the numbers of layers with which a step is measured, so that it is extrapolated."""
    config = tiny_config(kind)
    config.num_hidden_layers = 7
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * 8)[:7]
    pair = save_pair(tmp_path, config)
    records = encode(pair, ImPartQtConfig(), 12)
    tokens = TOKENS.repeat(1, 4)[:4]
    sizes = sizes_of(records)
    memory = DistillationMemory(config, sizes, DistillSettings(), bf16=False, tokens=(16, tokens.shape[1]))
    forecast = memory.forecast(len(tokens), recomputes)
    found = measured(pair, records, tokens, recomputes)
    assert forecast.device == pytest.approx(found, rel=0.25)
    fixed = forecast.weights + forecast.state
    assert forecast.step == pytest.approx(found - fixed, rel=0.25)


def test_a_model_without_a_forecast(tiny_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are run again then, to be safe."""
    said: list[str] = []
    monkeypatch.setattr(fit, "_free_bytes", lambda _: 1000)
    monkeypatch.setattr(fit.logger, "warning", said.append)
    monkeypatch.setattr(DistillationMemory, "_model", lambda *_: {}["nothing"])
    with arguments_for(SETTINGS, torch.device("cpu"), None) as arguments:
        assert fit.fit(tiny_config("llama"), {}, SETTINGS, arguments, (16, 96)) == fit.Fit(4, True)
    assert "cannot be forecast" in said[0]


def test_what_fits_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller micro-batches first, then layers that are run again; a setting that is given is left alone."""

    def forecast(_: DistillationMemory, sequences: int, gradient_checkpointing: bool) -> Forecast:
        step = sequences * (1 if gradient_checkpointing else 4) * 10**6
        return Forecast(weights=10**6, state=10**6, step=step, host=0, disk=0, values=1)

    monkeypatch.setattr(DistillationMemory, "forecast", forecast)

    def chosen(step: float, settings: DistillSettings | None = None) -> tuple[int, bool]:
        """The choice if so many million bytes are left for a step."""
        settings = settings or DistillSettings(batch_size=8)
        monkeypatch.setattr(fit, "_free_bytes", lambda _: int((2 + step) * 10**6 / fit._USABLE) + 1)
        with arguments_for(settings, torch.device("cpu"), None) as arguments:
            how = fit.fit(tiny_config("llama"), {}, settings, arguments, (16, 96))
        return how.micro_batch_size, how.recomputes

    said: list[str] = []
    monkeypatch.setattr(fit.logger, "warning", said.append)
    assert [chosen(step) for step in (32, 31, 8, 4, 3, 1)] == [
        (8, False), (4, False), (2, False), (1, False), (2, True), (1, True)
    ]  # fmt: skip
    assert chosen(1e6) == (8, False) and not said
    assert chosen(0) == (1, True) and "are free" in said[0] and "optim" in said[0]
    assert chosen(16, DistillSettings(micro_batch_size=4)) == (4, False)
    assert chosen(15, DistillSettings(micro_batch_size=4)) == (4, True)
    assert chosen(31, DistillSettings(gradient_checkpointing=True)) == (8, True)
    assert chosen(3, DistillSettings(gradient_checkpointing=False)) == (1, False)


def test_codebooks_are_left_alone_by_forecasts(tiny_pair: Pair) -> None:
    """Their tables would have no values afterwards."""
    sizes = sizes_of(encode(tiny_pair, ImPartQtConfig(), 12))
    DistillationMemory(tiny_config("llama"), sizes, SETTINGS, bf16=False, tokens=(16, 24)).forecast(1, False)
    for book in CODEBOOKS.values():
        assert not any(isinstance(table, FakeTensor) for table in getattr(book, "_tables", {}).values())


def test_checkpoints_on_disk() -> None:
    settings = DistillSettings()
    whole = checkpoint_bytes_for(1000, "impart-rd", 10, settings)
    assert whole == 3 * 12 * 6100
    assert checkpoint_bytes_for(1000, "impart-rd", 10, dataclasses.replace(settings, blocks=2)) == whole // 5
    assert (
        checkpoint_bytes_for(1000, "impart-rd", 10, dataclasses.replace(settings, optim="adamw_bnb_8bit")) == whole // 2
    )
    assert checkpoint_bytes_for(1000, "new-method", 10, settings) > whole
