"""The folder and the Hub that every document begins with.

As the documents say, it is a checkout after `make demo`. Names that stand for a reader's own models are there as well:

    BASE, MODEL, FINETUNED, TEXT          links to the demo's base, fine-tune, and a folder with its held-out text
    run/step-1000, -2000, -3000           checkpoints of a training of the demo's base
    ORG/BASE, ME/FINETUNE                 the demo's pair on the Hub
    ME/ADAPTER, ME/REWARD-MODEL           a LoRA adapter of ORG/BASE, a classifier on it
    user/my-finetune-delta                the delta repository of ME/FINETUNE
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from impart_hf import ImPartRdConfig, compress
from support.adapters import lora, save_adapter
from support.document_blocks import ROOT
from support.load_script import load_script
from support.loopback_hub_store import Store
from support.tiny_models import fine_tune, save_pair, tiny_config

_LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "demo", "demo-llm"
)
# Large enough that ratios of 32 can be reached, small enough for a command to take a second.
_SMALL = {
    "num_hidden_layers": 3,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True)
class Ground:
    """What documents start from.

    Attributes:
        checkout: the folder, of which each document has a copy.
        store: the Hub's repositories, of which each document has a copy.
        demo_output: what `make demo` printed; "" on the small ground.
    """

    checkout: Path
    store: Path
    demo_output: str

    def copy(self, folder: Path) -> Ground:
        """A copy that a document may change."""
        for name, source in (("checkout", self.checkout), ("hub", self.store)):
            shutil.copytree(source, folder / name, symlinks=True)
        return Ground(folder / "checkout", folder / "hub", self.demo_output)


def small_ground(folder: Path) -> Ground:
    """A ground that takes seconds to make: the demo's files with random weights and little text."""
    checkout = folder / "checkout"
    demo = checkout / "demo"
    config = tiny_config("llama", **_SMALL, initializer_range=0.02)
    pair = save_pair(demo / "pair", config)
    for model in (pair.base, pair.finetuned):
        (model / "chat_template.jinja").unlink()  # which the demo's tokenizer has not
    for number, name in enumerate(("finetune_train", "base_heldout", "finetune_heldout")):
        lines = (f"The statement {i} has {i * 7 + number} words, and says why.\n" for i in range(300))
        (demo / "pair" / f"{name}.txt").write_text("".join(lines))
    exact_answers = load_script("exact_answers")
    train, test = exact_answers.exact_records(20, seed=0), exact_answers.exact_records(10, seed=0, held_out=True)
    exact_answers.write_tasks(demo / "pair" / "tasks", train, test)
    compress(str(pair.base), str(pair.finetuned), demo / "delta", ImPartRdConfig(compression_ratio=16))
    shutil.copytree(ROOT / "docs" / "recipes", checkout / "docs" / "recipes")
    _add_names(checkout, folder / "hub")
    return Ground(checkout, folder / "hub", "")


def whole_ground(folder: Path) -> Ground:
    """A copy of the checkout in which `make demo` has run; one that is in the folder already is taken as it is.

    The environment is the tests' own, linked as .venv.
    """
    checkout, printed = folder / "checkout", folder / "demo-output.txt"
    if not printed.exists():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ROOT, checkout, symlinks=True, ignore=_LEFT_OUT)
        (checkout / ".venv").symlink_to(sys.prefix)
        for name in ("pyproject.toml", "constraints.txt"):
            os.utime(checkout / name, (0, 0))  # so that make takes the environment to be up to date
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        done = subprocess.run(["make", "demo"], cwd=checkout, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        _add_names(checkout, folder / "hub")
        printed.write_text(done.stdout)
    return Ground(checkout, folder / "hub", printed.read_text())


def _add_names(checkout: Path, hub: Path) -> None:
    """Add the models that documents name beside the demo's."""
    pair = checkout / "demo" / "pair"
    for name, model in (("BASE", "base"), ("MODEL", "base"), ("FINETUNED", "finetuned")):
        (checkout / name).symlink_to(Path("demo", "pair", model))
    (checkout / "TEXT").mkdir()
    (checkout / "TEXT" / "text.txt").symlink_to(Path("..", "demo", "pair", "finetune_heldout.txt"))

    finetuned = AutoModelForCausalLM.from_pretrained(pair / "finetuned")
    files = [path.name for path in (pair / "base").glob("tokenizer*")]

    def save(folder: Path, model: PreTrainedModel) -> Path:
        model.save_pretrained(folder)
        for name in files:
            shutil.copy(pair / "base" / name, folder)
        return folder

    for step in (1000, 2000, 3000):
        save(checkout / "run" / f"step-{step}", fine_tune(finetuned, seed=step, strength=1e-6 * step))
    store, work = Store(hub), hub.with_name("work")
    base = _publish(store, "ORG/BASE", pair / "base")
    _publish(store, "ME/FINETUNE", pair / "finetuned")
    _publish(store, "ME/ADAPTER", save_adapter(pair / "base", lora(), work / "adapter"))
    classifier = LlamaForSequenceClassification.from_pretrained(pair / "base", num_labels=1)
    _publish(store, "ME/REWARD-MODEL", save(work / "reward", fine_tune(classifier)))
    models, method = (str(pair / "base"), str(pair / "finetuned")), ImPartRdConfig(compression_ratio=16)
    compress(*models, work / "delta", method, base_name="ORG/BASE", base_revision=base)
    _publish(store, "user/my-finetune-delta", work / "delta")


def _publish(store: Store, repo_id: str, folder: Path) -> str:
    """Put a folder's files on the Hub, and return the commit."""
    store.create(repo_id)
    repo = store.find(repo_id)
    assert repo is not None
    files = ({"path": path.name, "content": path.read_bytes()} for path in sorted(folder.iterdir()) if path.is_file())
    return repo.commit("main", {"summary": "Upload"}, (("file", file) for file in files))
