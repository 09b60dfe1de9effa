"""Recipes: pruning, recovery, compression and publishing as one YAML file, resumed stage by stage."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plan import RecipePlan, plan_recipe
    from .recipe import Recipe, RecipeError
    from .report import RecipeReport
    from .run import run_recipe

# The modules are imported on first use, because torch and transformers' Trainer take seconds to import.
_MODULES = {
    "Recipe": "recipe",
    "RecipeError": "recipe",
    "RecipePlan": "plan",
    "RecipeReport": "report",
    "plan_recipe": "plan",
    "run_recipe": "run",
}

__all__ = ["Recipe", "RecipeError", "RecipePlan", "RecipeReport", "plan_recipe", "run_recipe"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
