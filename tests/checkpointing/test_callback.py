"""Checkpoints of real trainings as deltas: their bits, what they rest on, and which of them stay."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoint_runs import decoded, dense, load_start, make_trainer, same_bits
from support.loaded_models import captured_log
from support.messages import naming
from support.tiny_models import Pair, edit_tensors, save_model
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, Trainer

from impart_hf import DeltaCheckpointCallback, ExactConfig, compress
from impart_hf.modeling.delta_repository import WrongBaseError
from impart_hf.modeling.model_files import CheckpointError

WEIGHTS = {"model.safetensors", "delta_model.safetensors"}


def weights_in(checkpoint: Path) -> set[str]:
    return WEIGHTS & {path.name for path in checkpoint.iterdir()}


def base_of(checkpoint: Path) -> Path:
    return Path(json.loads((checkpoint / "config.json").read_text())["base_model_name_or_path"])


def steps_in(output: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in output.iterdir())


@pytest.fixture(scope="module")
def plain(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run of six steps with dense checkpoints; not to be written to."""
    output = tmp_path_factory.mktemp("plain") / "out"
    make_trainer(load_start(tiny_pair.base), output, []).train()
    return output


@pytest.fixture(scope="module")
def trained(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with deltas of the start; not to be written to."""
    output = tmp_path_factory.mktemp("trained") / "out"
    make_trainer(load_start(tiny_pair.base), output, [DeltaCheckpointCallback()]).train()
    return output


@pytest.fixture
def output(trained: Path, tmp_path: Path) -> Path:
    """A copy of `trained` that a test may go on with."""
    return Path(shutil.copytree(trained, tmp_path / "out"))


def test_every_checkpoint_is_the_dense_one_bit_for_bit(tiny_pair: Pair, plain: Path, trained: Path) -> None:
    """The start is bfloat16, what is trained float32."""
    for step in (2, 4, 6):
        checkpoint = trained / f"checkpoint-{step}"
        assert weights_in(checkpoint) == {"delta_model.safetensors"}
        assert base_of(checkpoint) == tiny_pair.base
        assert same_bits(decoded(checkpoint), dense(plain / checkpoint.name))
    assert not same_bits(decoded(trained / "checkpoint-2"), decoded(trained / "checkpoint-4"))
    assert steps_in(trained) == [2, 4, 6], "nothing else is left in the output folder"


def test_a_checkpoint_loads_as_a_model(plain: Path, trained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained / "checkpoint-4", dtype=torch.float32)
    assert same_bits(dict(model.state_dict()), dense(plain / "checkpoint-4"))


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(
    step: int, tiny_pair: Pair, plain: Path, output: Path
) -> None:
    shutil.rmtree(output / "checkpoint-6")
    restored = DeltaCheckpointCallback.restore(output / f"checkpoint-{step}")
    assert restored is not None and same_bits(dense(Path(restored)), dense(plain / f"checkpoint-{step}"))
    trainer = make_trainer(load_start(tiny_pair.base), output, [DeltaCheckpointCallback()])
    trainer.train(resume_from_checkpoint=restored)
    assert same_bits(dict(trainer.model.state_dict()), dense(plain / "checkpoint-6"))
    assert same_bits(decoded(output / "checkpoint-6"), dense(plain / "checkpoint-6"))
    assert weights_in(output / f"checkpoint-{step}") == {"delta_model.safetensors"}, "removed when they are read"


def test_the_newest_whole_checkpoint_is_restored(output: Path, tmp_path: Path) -> None:
    assert DeltaCheckpointCallback.restore(tmp_path / "nothing") is None
    (output / "checkpoint-6" / "trainer_state.json").write_text("{", "utf-8")  # of a run that was killed
    with pytest.raises(CheckpointError, match=naming("checkpoint-6")):
        DeltaCheckpointCallback.restore(output / "checkpoint-6")
    assert DeltaCheckpointCallback.restore(output) == str(output / "checkpoint-4")


def test_an_output_folder_that_holds_the_last_model_too(plain: Path, output: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "trainer_state.json"):
        shutil.copy(plain / "checkpoint-6" / name, output)
    assert DeltaCheckpointCallback.restore(output) == str(output / "checkpoint-6")
    copied = shutil.copytree(output / "checkpoint-2", tmp_path / "copied")
    assert DeltaCheckpointCallback.restore(copied) == str(copied)
    for step in (2, 4, 6):
        shutil.rmtree(output / f"checkpoint-{step}")
    (output / "trainer_state.json").unlink()
    assert DeltaCheckpointCallback.restore(output) is None


def test_a_step_whose_second_save_was_killed_is_not_restored(plain: Path, output: Path) -> None:
    """The Trainer's state is there, of before; its weights have lost their end."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(plain / "checkpoint-6" / name, output / "checkpoint-6")
    assert DeltaCheckpointCallback.restore(output) == str(output / "checkpoint-6")
    os.truncate(output / "checkpoint-6" / "model.safetensors", 100_000)
    assert DeltaCheckpointCallback.restore(output) == str(output / "checkpoint-4")
    (output / "checkpoint-4" / "config.json").unlink()
    assert DeltaCheckpointCallback.restore(output) == str(output / "checkpoint-2")


def test_restoring_does_not_make_a_checkpoint_newer(output: Path) -> None:
    """The Trainer removes the oldest by the folder's time."""
    os.utime(output / "checkpoint-2", (1000, 1000))
    restored = DeltaCheckpointCallback.restore(output / "checkpoint-2")
    assert restored is not None and os.stat(restored).st_mtime == 1000
    trainer = make_trainer(load_start(base_of(Path(restored))), output, [DeltaCheckpointCallback()], max_steps=3)
    trainer.train(resume_from_checkpoint=restored)
    assert os.stat(restored).st_mtime == 1000 and weights_in(Path(restored)) == {"delta_model.safetensors"}


def test_a_base_that_has_changed_is_refused(pair: Pair, tmp_path: Path) -> None:
    output = tmp_path / "out"
    make_trainer(load_start(pair.base), output, [DeltaCheckpointCallback()], max_steps=2).train()
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(pair.base, lambda tensors: tensors[name].add_(1))
    with pytest.raises(WrongBaseError, match=naming(name)):
        DeltaCheckpointCallback.restore(output)
    assert weights_in(output / "checkpoint-2") == {"delta_model.safetensors"}


def test_a_moved_base_is_given(pair: Pair, plain: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    make_trainer(load_start(pair.base), output, [DeltaCheckpointCallback()], max_steps=2).train()
    moved = pair.base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=naming(str(pair.base))):
        DeltaCheckpointCallback.restore(output)
    restored = DeltaCheckpointCallback.restore(output, str(moved))
    assert restored is not None and same_bits(dense(Path(restored)), dense(plain / "checkpoint-2"))


def test_new_tokens_and_another_dtype_than_the_base_s(tiny_pair: Pair, tmp_path: Path) -> None:
    def start() -> torch.nn.Module:
        torch.manual_seed(0)
        model = load_start(tiny_pair.base, torch.float16)
        model.resize_token_embeddings(model.config.vocab_size + 7)
        return model

    make_trainer(start(), tmp_path / "plain", [], max_steps=2).train()
    make_trainer(start(), tmp_path / "out", [DeltaCheckpointCallback()], max_steps=2).train()
    expected = dense(tmp_path / "plain" / "checkpoint-2")
    assert expected["lm_head.weight"].shape[0] == 327 and expected["lm_head.weight"].dtype == torch.float16
    assert same_bits(decoded(tmp_path / "out" / "checkpoint-2"), expected)


def test_a_classifier(tiny_pair: Pair, tmp_path: Path) -> None:
    """It has a head that the base lacks."""

    class Rewards(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):  # type: ignore[no-untyped-def]
            inputs.pop("labels")
            outputs = model(**inputs)
            loss = outputs.logits.float().square().mean()
            return (loss, outputs) if return_outputs else loss

    def start() -> torch.nn.Module:
        torch.manual_seed(0)
        return LlamaForSequenceClassification.from_pretrained(tiny_pair.base, num_labels=1)

    for name, callbacks in (("plain", []), ("out", [DeltaCheckpointCallback()])):
        make_trainer(start(), tmp_path / name, callbacks, Rewards, max_steps=2, per_device_train_batch_size=1).train()
    assert same_bits(decoded(tmp_path / "out/checkpoint-2"), dense(tmp_path / "plain/checkpoint-2"))


def test_a_base_whose_files_have_other_names(pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    """GPT-2's files on the Hub lack a prefix; the Trainer passes over such names without an error."""
    base = Path(shutil.copytree(pair_of("gpt2").base, tmp_path / "base"))
    edit_tensors(base, without_prefix)
    make_trainer(load_start(base), tmp_path / "plain", []).train()
    make_trainer(load_start(base), tmp_path / "out", [DeltaCheckpointCallback()], max_steps=4).train()
    assert "h.0.ln_1.weight" in decoded(tmp_path / "out" / "checkpoint-4")
    restored = DeltaCheckpointCallback.restore(tmp_path / "out")
    assert restored is not None and same_bits(dense(Path(restored)), dense(tmp_path / "plain" / "checkpoint-4"))
    trainer = make_trainer(load_start(base), tmp_path / "out", [DeltaCheckpointCallback()])
    trainer.train(resume_from_checkpoint=restored)
    assert same_bits(dict(dense(tmp_path / "plain" / "checkpoint-6")), _saved(trainer.model, tmp_path / "model"))


def test_experts_that_files_hold_one_by_one(pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    """The Trainer does not read them back from its own checkpoints; from restored ones it does."""
    base = pair_of("mixtral").base
    make_trainer(load_start(base), tmp_path / "plain", []).train()
    make_trainer(load_start(base), tmp_path / "out", [DeltaCheckpointCallback()], max_steps=4).train()
    assert same_bits(decoded(tmp_path / "out" / "checkpoint-4"), dense(tmp_path / "plain" / "checkpoint-4"))
    trainer = make_trainer(load_start(base), tmp_path / "out", [DeltaCheckpointCallback()])
    trainer.train(resume_from_checkpoint=DeltaCheckpointCallback.restore(tmp_path / "out"))
    assert same_bits(decoded(tmp_path / "out" / "checkpoint-6"), dense(tmp_path / "plain" / "checkpoint-6"))


def without_prefix(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)


def _saved(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    return dense(save_model(model, folder))


def test_fsdp_s_copy_of_the_weights_is_restored(tiny_pair: Pair, plain: Path, tmp_path: Path) -> None:
    """Under FSDP the Trainer writes the weights twice, and resumes from the second file.

    accelerate has no FSDP on CPUs, so that the file is written here, as accelerate does.
    """

    class Twice(Trainer):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            super()._save_optimizer_and_scheduler(output_dir)
            torch.save(self.model.state_dict(), f"{output_dir}/pytorch_model_fsdp.bin")

    output = tmp_path / "out"
    make_trainer(load_start(tiny_pair.base), output, [DeltaCheckpointCallback()], Twice, max_steps=2).train()
    copy = output / "checkpoint-2" / "pytorch_model_fsdp.bin"
    assert not copy.exists()
    DeltaCheckpointCallback.restore(output)
    assert same_bits(torch.load(copy), dense(plain / "checkpoint-2"))


def test_the_best_checkpoint_stays_dense_until_it_is_read(tiny_pair: Pair, tmp_path: Path) -> None:
    losses, seen = iter([3.0, 1.0, 2.0]), []

    class Scripted(Trainer):
        def evaluate(self, *args, **more):  # type: ignore[no-untyped-def]
            return {**super().evaluate(*args, **more), "eval_loss": next(losses)}

    class Watch(DeltaCheckpointCallback):
        def on_save(self, args, state, control, **more):  # type: ignore[no-untyped-def]
            super().on_save(args, state, control, **more)
            seen.append({path.name: weights_in(path) for path in Path(args.output_dir).iterdir()})

    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 2}
    output, delta = tmp_path / "out", {"delta_model.safetensors"}
    trainer = make_trainer(load_start(tiny_pair.base), output, [Watch()], Scripted, **settings)
    trainer.train()
    assert seen == [
        {"checkpoint-2": WEIGHTS},
        {"checkpoint-2": delta, "checkpoint-4": WEIGHTS},
        {"checkpoint-4": WEIGHTS, "checkpoint-6": delta},
    ]
    assert weights_in(output / "checkpoint-4") == delta
    best = decoded(output / "checkpoint-4")
    assert same_bits(dict(trainer.model.state_dict()), best)
    assert not same_bits(best, decoded(output / "checkpoint-6"))


def test_without_the_optimizer(tiny_pair: Pair, plain: Path, tmp_path: Path) -> None:
    callbacks = [DeltaCheckpointCallback(keep=2)]
    make_trainer(load_start(tiny_pair.base), tmp_path, callbacks, save_only_model=True).train()
    assert steps_in(tmp_path) == [4, 6] and not (tmp_path / "checkpoint-6" / "optimizer.pt").exists()
    assert same_bits(decoded(tmp_path / "checkpoint-6"), dense(plain / "checkpoint-6"))


def test_deltas_of_the_last_rest_on_it_up_to_the_next_anchor(tiny_pair: Pair, tmp_path: Path) -> None:
    settings = {"max_steps": 5, "save_steps": 1}
    make_trainer(load_start(tiny_pair.base), tmp_path / "plain", [], **settings).train()
    output = tmp_path / "out"
    callback = DeltaCheckpointCallback(of="last", anchor_every=3)
    make_trainer(load_start(tiny_pair.base), output, [callback], **settings).train()
    found = [base_of(output / f"checkpoint-{step}") for step in range(1, 6)]
    one, two, four = (output / f"checkpoint-{step}" for step in (1, 2, 4))
    assert found == [tiny_pair.base, one, two, tiny_pair.base, four]
    for step in range(1, 6):
        name = f"checkpoint-{step}"
        assert weights_in(output / name) == {"delta_model.safetensors"}
        assert same_bits(decoded(output / name), dense(tmp_path / "plain" / name))
    # While the training runs, the dense weights of the last checkpoint stand for its delta. The result is the same.
    compress(str(two), str(tmp_path / "plain" / "checkpoint-3"), tmp_path / "third", ExactConfig())
    for name in ("config.json", "delta_model.safetensors"):
        found, expected = ((folder / name).read_bytes() for folder in (output / "checkpoint-3", tmp_path / "third"))
        assert json.loads(found) == json.loads(expected) if name == "config.json" else found == expected
    card = (output / "checkpoint-3" / "README.md").read_text("utf-8")
    assert f"base model `{two.name}`" in card and ".delta-" not in card


def test_of_the_last_with_other_names_than_the_base_s(pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    """The dense weights have the Trainer's names, with which no delta of the last can be made."""
    base = Path(shutil.copytree(pair_of("gpt2").base, tmp_path / "base"))
    edit_tensors(base, without_prefix)
    make_trainer(load_start(base), tmp_path / "plain", []).train()
    make_trainer(load_start(base), tmp_path / "out", [DeltaCheckpointCallback(of="last")]).train()
    assert base_of(tmp_path / "out" / "checkpoint-6") == tmp_path / "out" / "checkpoint-4"
    restored = DeltaCheckpointCallback.restore(tmp_path / "out")
    assert restored is not None and same_bits(dense(Path(restored)), dense(tmp_path / "plain" / "checkpoint-6"))


def test_checkpoints_that_rest_on_one_written_again_are_passed_over(
    tiny_pair: Pair, plain: Path, tmp_path: Path
) -> None:
    """A training that goes on from before them, and is killed, leaves them without what they rest on."""
    output = tmp_path / "out"
    make_trainer(load_start(tiny_pair.base), output, [DeltaCheckpointCallback(of="last")]).train()
    assert base_of(output / "checkpoint-6") == output / "checkpoint-4"
    compress(str(tiny_pair.base), str(plain / "checkpoint-6"), tmp_path / "other", ExactConfig())
    for name in ("config.json", "delta_model.safetensors"):
        shutil.copyfile(tmp_path / "other" / name, output / "checkpoint-4" / name)
    with captured_log() as lines:
        assert DeltaCheckpointCallback.restore(output) == str(output / "checkpoint-4")
    assert any("checkpoint-6 cannot be restored" in line for line in lines)
    with pytest.raises(WrongBaseError, match="checkpoint-4"):
        DeltaCheckpointCallback.restore(output / "checkpoint-6")


def test_what_a_kept_checkpoint_rests_on_is_kept(tiny_pair: Pair, tmp_path: Path) -> None:
    seen = []

    class Watch(DeltaCheckpointCallback):
        def on_save(self, args, state, control, **more):  # type: ignore[no-untyped-def]
            super().on_save(args, state, control, **more)
            seen.append(steps_in(Path(args.output_dir)))

    callback = Watch(of="last", anchor_every=3, keep=1)
    make_trainer(load_start(tiny_pair.base), tmp_path, [callback], max_steps=5, save_steps=1).train()
    assert seen == [[1], [1, 2], [1, 2, 3], [4], [4, 5]]


def test_a_resumed_run_goes_on_with_the_chain(tiny_pair: Pair, plain: Path, tmp_path: Path) -> None:
    make_trainer(load_start(tiny_pair.base), tmp_path, [DeltaCheckpointCallback(of="last")]).train()
    shutil.rmtree(tmp_path / "checkpoint-6")
    trainer = make_trainer(load_start(tiny_pair.base), tmp_path, [DeltaCheckpointCallback(of="last")])
    trainer.train(resume_from_checkpoint=DeltaCheckpointCallback.restore(tmp_path))
    assert base_of(tmp_path / "checkpoint-6") == tmp_path / "checkpoint-4"
    assert same_bits(decoded(tmp_path / "checkpoint-6"), dense(plain / "checkpoint-6"))


def test_a_training_that_starts_from_a_delta(tiny_pair: Pair, tmp_path: Path) -> None:
    start = tmp_path / "start"
    compress(str(tiny_pair.base), str(tiny_pair.finetuned), start, ExactConfig())
    make_trainer(load_start(tiny_pair.finetuned), tmp_path / "plain", [], max_steps=2).train()
    make_trainer(load_start(start), tmp_path / "out", [DeltaCheckpointCallback()], max_steps=2).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert base_of(checkpoint) == start and same_bits(decoded(checkpoint), dense(tmp_path / "plain" / "checkpoint-2"))
