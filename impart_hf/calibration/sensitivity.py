"""How much an error in each weight matrix changes a model's predictions: one backward pass, a layer at a time."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..common.progress import Progress
from ..modeling.checkpoints import all_finite
from ..modeling.precision import full_float32
from ..modeling.tensors import Model
from .streamed_model import StreamedModel, streamed_model

logger = logging.get_logger(__name__)

STAGE = "Measuring sensitivity"  # title of the progress bar

_LENGTH, _TOKENS = 256, 1024  # tokens of a sequence, and of all, that are enough


def sensitivities(
    finetuned: Model, tokens: Tensor, device: torch.device, progress: Progress | None = None
) -> dict[str, float]:
    """Return, for the linear layers' weights, how far white noise in them moves the model's predictions.

    To second order, an error E in the weight of a layer that maps x_t to y_t changes the next-token distribution by
    KL = 1/2 (g_t^T E x_t)^2, in expectation over tokens t and gradients g_t of log p(next token) by y_t, with the next
    token drawn from the model itself (the Fisher information). For entries of E that are independent this is
    |E|^2 |g_t|^2 |x_t|^2 / (2 m n). What an error does through other tokens is left out.

    The decoder layers are loaded one at a time, first forward and then backward; memory also holds embeddings, output
    projection, and the hidden states of all layers for at most 1,024 tokens.

    Args:
        finetuned: the fine-tuned model.
        tokens: int64 (sequences, length), without padding; the first few sequences are used.
        device: where the model is to run, in float32.
        progress: shows a bar over the layers.

    Returns:
        By tensor name, nats per token and unit of squared Frobenius norm; only of layers that the tokens reach. Empty
        if the model's layers cannot be run one after the other within it, which is logged.
    """
    tokens = enough_of(tokens)
    try:
        model = streamed_model(finetuned, tokens, device, dtype=torch.float32)
        with torch.no_grad():
            model.check_run(tokens[:1, :2].to(device))
        with full_float32():
            return _Backward(model, tokens.to(device)).run(progress or Progress(False))
    except (ValueError, RuntimeError) as error:  # the latter of layers that autograd cannot go back through
        logger.warning(f"all matrices count alike, because their sensitivity cannot be measured: {error}")
        return {}


def enough_of(tokens: Tensor) -> Tensor:
    """Return the part of a text, int64 (sequences, length), on which sensitivity is measured."""
    tokens = tokens[:, :_LENGTH]
    return tokens[: max(1, _TOKENS // tokens.shape[1])]


class _Backward:
    """A forward pass through all layers of a model, and a backward pass."""

    def __init__(self, model: StreamedModel, tokens: Tensor):
        self._model, self._tokens = model, tokens
        self._sums: dict[str, float] = defaultdict(float)
        self._outside = [*model.embedding_names, *model.output_names]

    def run(self, progress: Progress) -> dict[str, float]:
        model, layers = self._model, list(self._model.layers)
        # By layer and sequence, what the layer gets; a sequence at a time keeps few logits.
        inputs: list[list[Tensor | None]] = [[None] * len(self._tokens)]
        model.load(self._outside)
        for parameter in model.model.parameters():
            if not parameter.is_meta and not all_finite(parameter):
                parameter.data = parameter.nan_to_num(0, 0, 0)  # rows of padding tokens, which may hold anything
        gradients: list[Tensor | None] = [None] * len(self._tokens)
        generator = torch.Generator().manual_seed(0)
        with progress.bar(4 * len(layers) - 1, STAGE) as bar:
            for number, layer in enumerate(layers[:-1]):
                with self._loaded(layer), torch.no_grad():
                    inputs.append([self._output(number, i, states) for i, states in enumerate(inputs[number])])
                bar.update()
            for layer in layers[::-1]:
                number = len(inputs) - 1
                with self._loaded(layer), self._watched(layer), torch.enable_grad():
                    for i, states in enumerate(inputs.pop()):
                        gradients[i] = self._gradient(number, i, states, gradients[i], generator)
                bar.update(3)  # forward again, and backward, which takes as long as two of these
        model.release(self._outside)
        scale = 0.5 / self._tokens.numel()
        return {
            name: scale * total / model.linear[name].weight.numel() for name, total in self._sums.items() if total > 0
        }

    def _output(self, number: int, sequence: int, states: Tensor | None) -> Tensor:
        return self._model.run(self._tokens[sequence, None], states, range(number, number + 1))

    def _gradient(
        self, number: int, sequence: int, states: Tensor | None, gradient: Tensor | None, generator: torch.Generator
    ) -> Tensor | None:
        """Go back through a layer for a sequence.

        Args:
            states: the layer's input; None for the first layer.
            gradient: by its output; None for the last layer, whose output are the logits.

        Returns:
            The gradient by the layer's input; None for the first layer.
        """
        if states is not None:
            states = states.detach().requires_grad_()
        # A layer may write to its input, so that it gets a copy.
        output = self._output(number, sequence, None if states is None else states.clone())
        if gradient is None:
            logs = output[0].float().log_softmax(-1)
            drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator).to(logs.device)
            logs.gather(1, drawn).sum().backward()
        else:
            output.backward(gradient)
        return None if states is None else states.grad

    @contextmanager
    def _loaded(self, layer: str) -> Iterator[None]:
        names = self._model.names_in(layer)
        self._model.load(names)
        yield
        self._model.release(names)

    @contextmanager
    def _watched(self, layer: str) -> Iterator[None]:
        """Within this context, add up the squares of inputs and gradients of the layer's linear layers."""

        def hook(name: str) -> Any:
            def after(_: Any, arguments: tuple[Tensor, ...], output: Any) -> None:
                sizes = arguments[0].detach().square().sum(-1)
                if not isinstance(output, Tensor) or output.shape[:-1] != sizes.shape or not output.requires_grad:
                    return  # a router that is a linear layer, and gives something made of its product

                def add(gradient: Tensor) -> None:
                    self._sums[name] += float((sizes * gradient.square().sum(-1)).sum())

                output.register_hook(add)

            return after

        model = self._model
        handles = [model.linear[n].register_forward_hook(hook(n)) for n in model.names_in(layer) if n in model.linear]
        # The first layer's gradients need something before it that takes one.
        embeddings = model.model.get_input_embeddings()
        handles.append(embeddings.register_forward_hook(lambda _, __, output: output.detach().requires_grad_().clone()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
