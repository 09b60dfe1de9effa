"""Make impart_hf/model_cards/examples again: the model cards of real repositories of the demo's pair.

    python scripts/card_examples.py [DEMO] [--output FOLDER]     # four minutes on two cores

DEMO is the folder that `make demo` made. Every repository is made by the commands below, in a folder that is removed
afterwards; what stays are its README.md and the pictures that the card shows. Cards name their repository as REPO_ID
until `impart-hf push` puts its id there.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from impart_hf.cli.main import main as impart_hf

EXAMPLES = Path(__file__).resolve().parents[1] / "impart_hf" / "model_cards" / "examples"
BASE = "me/demo-base"  # as in docs/how-to/publish.md
MERGE = """merge_method: impart_ties
base_model: pair/base
models:
  - model: pair/finetuned
    parameters: {weight: 1.0, density: 0.5}
  - model: code
    parameters: {weight: 0.7, density: 0.5}
"""
TRAINING = "--full --steps 40 --learning-rate 5e-4 --length 128"
# By the name of the example, or of what the next ones need: how its repository is made
COMMANDS = {
    "delta": f"compress pair/base pair/finetuned delta --ratio 16 --base-name {BASE} --card-plot",
    "exact": f"compress pair/base pair/finetuned exact --method exact --base-name {BASE}",
    "lora": "export-lora delta lora --rank 64 --base-model pair/base",
    "code": f"prune recover pair/base code --data pair/base_heldout.txt {TRAINING}",
    "merged": "merge merge.yaml merged",
    "scores": "prune importance pair/base --data pair/finetune_train.txt --output scores --length 128",
    "narrow": f"prune width pair/base narrow --importance scores --ratio 0.25 --base-name {BASE}",
    "pruned": f"prune recover narrow pruned --data pair/finetune_train.txt {TRAINING}",
}
SHOWN = ("delta", "exact", "lora", "merged", "pruned")


def make_examples(demo: Path, output: Path) -> None:
    """Make every repository from a demo's pair, and replace the examples in a folder."""
    pair, output, before = (demo / "pair").resolve(), output.resolve(), Path.cwd()
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)  # cards name folders as they were given
        try:
            Path("pair").symlink_to(pair)
            Path("merge.yaml").write_text(MERGE)
            for command in COMMANDS.values():
                if impart_hf([*shlex.split(command), "--quiet"]) != 0:
                    raise SystemExit(f"impart-hf {command} has failed")
            for name in SHOWN:
                shutil.rmtree(output / name, ignore_errors=True)
                (output / name).mkdir(parents=True)
                for path in [Path(name, "README.md"), *sorted(Path(name).glob("*.png"))]:
                    shutil.copy(path, output / name)
        finally:
            os.chdir(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", metavar="DEMO", nargs="?", type=Path, default=Path("demo"))
    parser.add_argument("--output", type=Path, default=EXAMPLES)
    options = parser.parse_args()
    if not (options.demo / "pair").is_dir():
        parser.error(f"'{options.demo}' holds no pair; run make demo first")
    make_examples(options.demo, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
