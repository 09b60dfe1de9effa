"""The command `impart-hf prune run`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from ..options import add_device, add_flag, add_json, add_quiet, refuse

if TYPE_CHECKING:
    from ...recipes import RecipePlan, RecipeReport


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.set_defaults(resumes=True)
    parser.add_argument(
        "recipe",
        metavar="RECIPE.yaml",
        help="YAML file with model, data, eval and stages (importance, layers, width, recover, compress, push, repeat)",
    )
    parser.add_argument("output", metavar="OUT", help="folder for the stages and the report; an earlier run is resumed")
    add_device(parser, "every stage computes and models are measured", "each stage's own")
    add_flag(parser, "--dry-run", "check the recipe, and print its stages and the sizes to expect; write nothing")
    add_json(parser)
    add_quiet(parser)


def check(options: argparse.Namespace) -> None:
    """Refuse options that cannot be combined, and a recipe whose form or order is wrong."""
    from ...recipes import Recipe

    if options.dry_run:
        refuse(options, ["quiet"], "has no effect on a plan; leave out --dry-run")
    Recipe.from_yaml(options.recipe)


def run(options: argparse.Namespace) -> None:
    """Run the recipe, and print the report; or print the plan."""
    from ...recipes import run_recipe

    if options.dry_run:
        _print_plan(options)
        return
    report = run_recipe(options.recipe, options.output, device=options.device, progress=not options.quiet)
    print(json.dumps(report.to_dict(), indent=2) if options.json else _summary(report, options.output))


def _summary(report: RecipeReport, output: str) -> str:
    lines = [report.table(), "", f"{report.folder}: the result; {output} has every stage, report.md and report.json"]
    return "\n".join([*lines, *report.urls])


def _print_plan(options: argparse.Namespace) -> None:
    from ...recipes import Recipe, plan_recipe
    from ...recipes.folder import RunFolder
    from ...recipes.run import unfinished

    recipe = Recipe.from_yaml(options.recipe)
    folder = RunFolder(options.output, recipe.model)
    plan = plan_recipe(recipe, device=options.device)
    to_do = unfinished(plan, folder)
    if options.json:
        print(json.dumps({**plan.to_dict(), "to_do": to_do}, indent=2))
    else:
        print(_plan_table(plan, to_do))


def _plan_table(plan: RecipePlan, to_do: list[str]) -> str:
    """Return a table with a line for each stage: its settings, the model's size after it, and whether it is done."""
    from ...evaluation.tables import markdown_table
    from ...repository.report import human_bytes

    rows = [{"stage": "model", "settings": plan.recipe.model, "parameters": f"{plan.parameters:,}"}]
    for planned in plan.stages:
        settings = ", ".join(f"{name}: {value}" for name, value in planned.stage.settings.items())
        rows.append({"stage": planned.name, "settings": settings, "parameters": f"{planned.parameters:,}"})
    sizes = [plan.parameters, *(planned.parameters for planned in plan.stages)]
    for row, parameters in zip(rows, sizes, strict=True):
        row["weights"] = human_bytes(round(parameters * plan.bytes_per_parameter))
        row["state"] = "" if row["stage"] == "model" else "to do" if row["stage"] in to_do else "finished"
    return markdown_table(rows)
