"""Deltas among the models of vLLM's OpenAI-compatible server: listed, accepted in requests, and named in answers."""

from collections.abc import Callable
from typing import Any

from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

from .named_requests import answering_as


def offer_by_name(models: Any, offered: Callable[[], dict[str, str]], is_served: Callable[[str], bool]) -> None:
    """Let a server's models include deltas.

    Args:
        models: vLLM's `OpenAIServingModels`.
        offered: returns the deltas on offer now that vLLM does not know: by name, their folders or Hub ids.
        is_served: whether the engine's own weights answer requests with a name, besides the server's own ones.
    """
    listed, named, known = models.show_available_models, models.model_name, models.registry.is_base_model

    async def show_available_models() -> Any:
        found = await listed()
        base = found.data[0]
        found.data += [
            ModelCard(
                id=name, root=repo, parent=base.id, max_model_len=base.max_model_len, permission=[ModelPermission()]
            )
            for name, repo in offered().items()
        ]
        return found

    def model_name(*arguments: Any, **options: Any) -> str:
        return answering_as.get() or named(*arguments, **options)

    def is_base_model(name: str) -> bool:
        return known(name) or is_served(name)

    models.show_available_models, models.model_name = show_available_models, model_name
    models.registry.is_base_model = is_base_model
