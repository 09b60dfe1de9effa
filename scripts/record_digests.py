"""Print digests of everything that compression writes, to show that a code change does not change the bytes.

    python scripts/record_digests.py > before.txt      # in the old checkout
    python scripts/record_digests.py --compare before.txt  # in the new one

Digests are valid on one machine only, because other processors and versions of torch round differently. A line is a
case and the first 16 digits of the SHA-256 of what it wrote:

- `record …`: one matrix, encoded by a method into a fixed number of bytes, and decoded onto a base;
- `repository …`: the delta files of a whole repository, whose budgets also depend on config.json and model card;
- `merge …`: the weights of a merged model.
"""

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

import impart_hf
from impart_hf import compress, merge
from impart_hf.distillation import DistillSettings
from impart_hf.methods import method_class, method_names
from impart_hf.modeling.delta_decode import add_delta

SHAPES = (96, 320), (320, 96), (1100, 1040)  # wide, tall, and large enough for the Krylov decomposition
RATIOS = 12.0, 40.0
SIZES = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "initializer_range": 0.15,
}  # fmt: skip
KINDS = {
    "llama": (LlamaConfig(**SIZES), LlamaForCausalLM),
    "mixtral": (MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2), MixtralForCausalLM),
}
TEXT = ["A fine-tune differs little from its base, and that difference is what is kept. " * 8] * 12


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def random_delta(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return falling singular values plus noise, float32."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(*shape[:-1], 16, generator=generator) * 0.8 ** torch.arange(16.0)
    right = torch.randn(*shape[:-2], 16, shape[-1], generator=generator)
    return 0.01 * (left @ right + 0.3 * torch.randn(shape, generator=generator))


def record_cases() -> Iterator[tuple[str, str]]:
    """Encode single matrices by every method: with and without second moments of the inputs, and as an embedding."""
    for rows, columns in SHAPES:
        delta = random_delta((rows, columns), rows)
        inputs = random_delta((512, columns), columns)
        hessian = inputs.t() @ inputs / len(inputs)
        base = random_delta((rows, columns), 7).to(torch.bfloat16)
        for name in method_names():
            for ratio in RATIOS:
                method = method_class(name)(compression_ratio=ratio)
                variants = {"plain": {}, "vocabulary": {"vocabulary": True}}
                if method.quantises:
                    variants["calibrated"] = {"hessian": hessian}
                for variant, more in variants.items():
                    data = method.encode(delta, int(2 * delta.numel() / ratio), 3, **more).data
                    decoded = add_delta(base, np.frombuffer(data, np.uint8), name, torch.bfloat16)
                    found = digest(data, decoded.view(torch.uint8).numpy().tobytes())
                    yield f"record {name} {rows}x{columns} {ratio:g} {variant}", found


def write_pair(kind: str, folder: Path) -> tuple[Path, Path]:
    """Write a base and a fine-tune with random weights and a byte-level tokenizer."""
    torch.manual_seed(0)
    config, model_class = KINDS[kind]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    model = model_class(config).to(torch.bfloat16)
    paths = folder / f"{kind}-base", folder / f"{kind}-finetuned"
    for path in paths:
        model.save_pretrained(path)
        fast.save_pretrained(path)
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter += random_delta(tuple(parameter.shape), number) if parameter.dim() > 1 else 0.01
    return paths


def weights_digest(folder: Path) -> str:
    return digest(*(path.read_bytes() for path in sorted(folder.glob("*.safetensors"))))


def repository_cases(folder: Path) -> Iterator[tuple[str, str]]:
    """Compress whole models by every method: with calibration text if the method quantises, some with distillation."""
    pairs = {kind: write_pair(kind, folder) for kind in KINDS}
    text = {"calibration_samples": 6, "calibration_length": 48}
    for kind, (base, finetuned) in pairs.items():
        for name in method_names():
            settings = {"groups": (2, 8)} if name in ("impart-qt", "delta-come") else {}
            method = method_class(name)(compression_ratio=6.0, **settings)
            variants: dict[str, dict] = {"plain": {"calibration": None}}
            if method.quantises and kind == "llama":
                variants["calibrated"] = {"calibration": TEXT, **text}
            if kind == "llama":
                variants["distilled"] = {
                    "distill": TEXT,
                    "distill_settings": DistillSettings(steps=4, checks=2),
                    **text,
                }
                if name in ("impart-rd", "bitdelta"):
                    by_blocks = DistillSettings(steps=4, checks=2, blocks=2)
                    variants["distilled by blocks"] = {"distill": TEXT, "distill_settings": by_blocks, **text}
            for variant, more in variants.items():
                output = folder / f"{kind}-{name}-{variant.replace(' ', '-')}"
                compress(str(base), str(finetuned), output, method, base_name="owner/base", **more)
                yield f"repository {kind} {name} {variant}", weights_digest(output)


def merge_cases(folder: Path) -> Iterator[tuple[str, str]]:
    """Merge the fine-tune with a delta repository of it."""
    models = [
        {"model": str(folder / "llama-finetuned"), "parameters": {"weight": 0.6}},
        {"model": str(folder / "llama-lowrank-plain"), "parameters": {"weight": 0.7}},
    ]
    for name in ("task_arithmetic", "ties", "dare_linear", "impart_ties"):
        parameters = {} if name == "task_arithmetic" else {"density": 0.4}
        output = folder / f"merged-{name}"
        merge(
            {
                "merge_method": name,
                "base_model": str(folder / "llama-base"),
                "models": models,
                "parameters": parameters,
                "dtype": "bfloat16",
            },
            output,
        )
        yield f"merge {name}", weights_digest(output)


def all_cases() -> Iterator[tuple[str, str]]:
    yield from record_cases()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield from repository_cases(folder)
        yield from merge_cases(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--compare", metavar="FILE", type=Path, help="digests of another checkout, made on this machine"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    print(f"# impart-hf {impart_hf.__version__}, torch {torch.__version__}", file=sys.stderr)
    expected = {}
    if options.compare:
        expected = dict(line.rsplit(" ", 1) for line in options.compare.read_text("utf-8").splitlines())
    differing = 0
    for case, found in all_cases():
        differs = bool(expected) and expected.pop(case, None) != found
        differing += differs
        print(f"{case} {found}{'  DIFFERS' if differs else ''}", flush=True)
    for case in expected:
        print(f"{case} is missing")
    if options.compare:
        print(f"{differing} differ, {len(expected)} are missing", file=sys.stderr)
    return int(differing > 0 or bool(expected))


if __name__ == "__main__":
    sys.exit(main())
