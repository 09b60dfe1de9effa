"""Measure how errors of a delta affect a model, by where they are: the basis of impart-rd's `ErrorWeights`.

    python scripts/experiments/rate_distortion/harm.py BASE FINETUNED --text heldout.txt

Prints two tables. The first is KL(fine-tune || model) when the deltas of all linear layers, or of embeddings and output
projection, have an error of the same squared Frobenius norm in one place: shrinkage; noise in U; noise in V; noise
everywhere. The second, for linear layers, compares the variance of the inputs along singular vectors (relative to the
mean over all directions) with the squared singular value (relative to its mean). The two are about equal, which is why
the inputs can be estimated from a delta.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # the other scripts

import measure
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import logging

from impart_hf.evaluation.metrics import evaluate, load

_BATCH = 8
_COMPONENTS = (0, 3, 10, 30, 100)  # shown in the second table
_Factors = tuple[Tensor, Tensor, Tensor]
_Error = Callable[[_Factors, float, torch.Generator], Tensor]


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _shrunk(factors: _Factors, size: float, generator: torch.Generator) -> Tensor:
    u, sigma, v = factors
    return (u * sigma * (1 - size)) @ v


def _noisy_u(factors: _Factors, size: float, generator: torch.Generator) -> Tensor:
    u, sigma, v = factors
    return ((u + size * _normal(u.shape, generator) / len(u) ** 0.5) * sigma) @ v


def _noisy_v(factors: _Factors, size: float, generator: torch.Generator) -> Tensor:
    u, sigma, v = factors
    return (u * sigma) @ (v + size * _normal(v.shape, generator) / v.shape[1] ** 0.5)


def _noisy(factors: _Factors, size: float, generator: torch.Generator) -> Tensor:
    u, sigma, v = factors
    shape = len(u), v.shape[1]
    return (u * sigma) @ v + size * float(sigma.norm()) * _normal(shape, generator) / (shape[0] * shape[1]) ** 0.5


ERRORS: dict[str, _Error] = {"shrunk": _shrunk, "noise in U": _noisy_u, "noise in V": _noisy_v, "everywhere": _noisy}


class Pair:
    """A base, its fine-tune, and the singular components of all matrices' deltas."""

    def __init__(self, base: str, finetuned: str, tokens: Tensor):
        self._tokens = tokens
        self.finetuned = load(finetuned, torch.float32, "cpu")
        self.model = load(base, torch.float32, "cpu")
        target = dict(self.finetuned.named_parameters())
        own = {name: weight for name, weight in self.model.named_parameters() if weight.dim() == 2}
        self._base = {name: weight.detach().clone() for name, weight in own.items()}
        self.factors: dict[str, _Factors] = {
            name: tuple(torch.linalg.svd((target[name] - weight).detach(), full_matrices=False))
            for name, weight in own.items()
        }

    @torch.no_grad()
    def divergence(self, error: _Error, size: float, layers: bool) -> float:
        """Return the KL with an error of `size` times the delta's norm, in all layers or in all other matrices."""
        generator, target = torch.Generator().manual_seed(0), dict(self.finetuned.named_parameters())
        for name, weight in self.model.named_parameters():
            if name in self.factors and (".layers." in name) == layers:
                weight.copy_(self._base[name] + error(self.factors[name], size, generator))
            else:
                weight.copy_(target[name])
        return evaluate(self.model, self.finetuned, self._tokens, _BATCH)[1]

    @torch.no_grad()
    def input_moments(self) -> dict[str, Tensor]:
        """Return the sum of x x^T over the text, for the inputs x of each linear layer of the decoder."""
        moments: dict[str, Tensor] = {}

        def add(name: str, module: nn.Module, inputs: tuple[Tensor], _: object) -> None:
            flat = inputs[0].flatten(0, 1)
            moments[name] = moments.get(name, 0) + flat.t() @ flat

        hooks = [
            module.register_forward_hook(lambda *call, name=name: add(name, *call))
            for name, module in self.finetuned.named_modules()
            if isinstance(module, nn.Linear) and ".layers." in name
        ]
        for batch in self._tokens.split(_BATCH):
            self.finetuned(input_ids=batch)
        for hook in hooks:
            hook.remove()
        return moments

    def alignment(self) -> dict[str, Tensor]:
        """Return each component's squared singular value and variance of the inputs along it, by kind of layer.

        Both are relative to their means; (2, r), geometric means over the layers.
        """
        kinds: dict[str, list[Tensor]] = {}
        for name, moments in self.input_moments().items():
            _, sigma, v = self.factors[f"{name}.weight"]
            along = ((v @ moments) * v).sum(1) / moments.diagonal().mean()
            kinds.setdefault(name.rpartition(".")[2], []).append(
                torch.stack([sigma.square() / sigma.square().mean(), along])
            )
        return {kind: torch.stack(parts).log().mean(0).exp() for kind, parts in kinds.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="harm.py", description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("finetuned")
    parser.add_argument("--text", type=Path, required=True, help="text of the kind that the fine-tune was trained on")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence (default: 256)")
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.finetuned)
    tokens = measure.text_sequences(arguments.text, tokenizer, arguments.tokens, arguments.length)
    pair = Pair(arguments.base, arguments.finetuned, tokens)
    rows = [
        {"in": where, "squared error": f"{size**2:g}"}
        | {name: f"{pair.divergence(error, size, layers):.2g}" for name, error in ERRORS.items()}
        for where, layers in (("linear layers", True), ("embeddings, output", False))
        for size in (0.5, 1.0)
    ]
    print(f"KL, nats a token; errors in the delta's own squared norm\n\n{measure.table(rows)}\n")
    rows = [
        {"layers": kind}
        | {f"component {k}": f"{found[0, k]:.2g} / {found[1, k]:.2g}" for k in _COMPONENTS if k < found.shape[1]}
        for kind, found in pair.alignment().items()
    ]
    print(f"Squared singular value / variance of the inputs along v, each in its mean\n\n{measure.table(rows)}\n")
    print(measure.machine_line())
    return 0


if __name__ == "__main__":
    sys.exit(main())
