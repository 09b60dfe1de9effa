"""A recipe: its YAML file, its stages in order, and which earlier stage each of them needs.

Nothing here imports torch or reads a model: what is wrong with the file's form and order is found at once.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

PRUNING = ("layers", "width")
MODELS = (*PRUNING, "recover", "compress")  # the stages that make a model
KINDS = ("importance", *MODELS, "push")
KEEP = ("all", "last")
_REPEAT = "repeat"
_MOST_STAGES = 99  # their folders are numbered with two digits


class RecipeError(ValueError):
    """A recipe that cannot be run, or a stage that failed; the message names the stage and the setting."""


@contextlib.contextmanager
def errors_of(place: str, *others: type[Exception]) -> Iterator[None]:
    """Turn the errors that a wrong recipe or model raises, and others, into a RecipeError that names their place."""
    caught: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, ImportError, *others)
    try:
        yield
    except caught as error:
        raise RecipeError(f"{place}: {error}") from error


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe, after repetitions are written out.

    Attributes:
        number: its place, from 1.
        kind: one of `KINDS`.
        settings: as the recipe gives them.
        model: number of the stage whose model it takes; 0 for the recipe's model.
        importance: number of the stage whose report it takes; None if it takes none.
        base: for `compress`, number of the stage whose model is the base; for `push` of a delta, that of its base.
    """

    number: int
    kind: str
    settings: Mapping[str, Any]
    model: int = 0
    importance: int | None = None
    base: int | None = None

    @property
    def name(self) -> str:
        """Its name in reports and errors, and the name of its folder."""
        return f"{self.number:02}-{self.kind}"

    @property
    def makes_model(self) -> bool:
        return self.kind in MODELS

    @property
    def inputs(self) -> list[int]:
        """The numbers of the stages whose folders it reads."""
        return sorted({n for n in (self.model, self.importance, self.base) if n})


@dataclass(frozen=True)
class Recipe:
    """What is done to a model, stage by stage.

    Attributes:
        model: the model to begin with: a folder or Hub id.
        stages: as in the file: each a kind, or a mapping of one kind to its settings; or a `repeat`.
        revision: branch, tag or commit of the model on the Hub.
        base_name: Hub id to record for a model that is a folder.
        data: text to train on, unless a stage gives another: anything that `prune importance` takes, or a mapping with
            `source` and `field`.
        eval: how the models are measured: arguments of `compare_models`; empty for costs alone.
        keep: "all" to keep the folders of all stages, "last" for the last model and its base alone.
    """

    model: str
    stages: Sequence[Any]
    revision: str | None = None
    base_name: str | None = None
    data: Any = None
    eval: Mapping[str, Any] = field(default_factory=dict)
    keep: str = "all"

    def __post_init__(self) -> None:
        """Check everything that can be checked without reading models or texts.

        Raises:
            RecipeError: naming the key, and in a stage its name.
        """
        for name in ("model", "revision", "base_name"):
            value = getattr(self, name)
            if (value is not None or name == "model") and (not isinstance(value, str) or not value):
                raise RecipeError(f"{name} must be a text, got {value!r:.80}")
        if self.data is not None and (not isinstance(self.data, str | list | Mapping) or not self.data):
            raise RecipeError(f"data must be a text's path or name, got {self.data!r:.80}")
        if not isinstance(self.eval, Mapping):
            raise RecipeError(f"eval must map settings to values, got {self.eval!r:.80}")
        if self.keep not in KEEP:
            raise RecipeError(f"keep must be {' or '.join(KEEP)}, got {self.keep!r:.80}")
        for name in ("data", "eval"):
            json_form(getattr(self, name), name)
        linked(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as its YAML file has it."""
        content = {
            "model": self.model,
            "revision": self.revision,
            "base_name": self.base_name,
            "data": self.data,
            "eval": dict(self.eval),
        }
        content = {key: value for key, value in content.items() if value}
        return content | ({} if self.keep == "all" else {"keep": self.keep}) | {"stages": list(self.stages)}

    @classmethod
    def from_dict(cls, content: Any) -> Recipe:
        """Create a recipe from the content of a YAML file.

        Raises:
            RecipeError: if a key is unknown or missing, or a value is wrong.
        """
        keys = list(cls.__dataclass_fields__)
        if not isinstance(content, Mapping):
            raise RecipeError(f"a recipe maps keys to values; its keys are {', '.join(keys)}")
        if unknown := [key for key in content if key not in keys]:
            raise RecipeError(f"unknown key {unknown[0]!r}; choose one of {', '.join(keys)}")
        if missing := [key for key in ("model", "stages") if not content.get(key)]:
            raise RecipeError(f"the key {missing[0]} is missing or empty")
        return cls(**{key: value for key, value in content.items() if value is not None})

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a YAML file.

        Raises:
            FileNotFoundError: if it does not exist.
            RecipeError: if it is not valid YAML, and for the errors of `from_dict`; the message names the file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"'{path}' does not exist or is not a file")
        try:
            content = yaml.load(Path(path).read_text("utf-8"), _Loader)
            with errors_of(str(path)):
                return cls.from_dict(content)
        except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:  # an alias may stand for what it is in
            raise RecipeError(f"{path} is not valid YAML: {error}") from error

    @classmethod
    def of(cls, recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
        """Return the recipe that a function is given: a `Recipe`, a mapping or the path of a YAML file."""
        if isinstance(recipe, Recipe):
            return recipe
        return cls.from_yaml(recipe) if isinstance(recipe, str | Path) else cls.from_dict(recipe)


def linked(recipe: Recipe) -> list[Stage]:
    """Return the stages in order, with repetitions written out, each with the stages that it takes its inputs from.

    Raises:
        RecipeError: if a stage has no valid form, or cannot stand where it does.
    """
    written = list(itertools.islice(_written_out(recipe.stages, "stages"), _MOST_STAGES + 1))
    if len(written) > _MOST_STAGES:
        raise RecipeError(f"stages: there are more than {_MOST_STAGES}: repeat fewer")
    stages: list[Stage] = []
    model, base = 0, 0  # numbers of the stages that made the model so far, and what it was before its recovery
    report: int | None = None  # of the importance of that model, unless a stage has used it
    unused = narrowed = False
    for number, (kind, settings) in enumerate(written, 1):
        stage = Stage(number, kind, settings, model)
        for key, value in settings.items():
            json_form(value, f"{stage.name}: {key}")
        last = stages[-1] if stages else None
        if last is not None and last.kind == "push":
            raise RecipeError(f"{last.name}: push must be the last stage, but {stage.name} follows")
        if last is not None and last.kind == "compress" and kind != "push":
            raise RecipeError(f"{stage.name}: only push can follow compress, whose result is a delta")
        if unused and kind not in PRUNING:
            _refuse_unused(stages, report)
        if kind == "importance":
            report, unused = number, True
        elif kind in PRUNING:
            if _merges(kind, settings):
                _check_merging(stage, stages[report - 1] if report else None, narrowed)
            narrowed = narrowed or (kind == "width" and settings.get("exponent") != 0)
            if _takes_report(kind, settings):
                if report is None:
                    raise RecipeError(
                        f"{stage.name}: there is no importance report on the model that it prunes: add an importance "
                        "stage before it"
                    )
                stage = Stage(number, kind, settings, model, report)
                unused = False
            elif unused:
                _refuse_unused(stages, report)
            model, base, report = number, number, None
        elif kind == "recover":
            model, report = number, None
        elif kind == "compress":
            if last is None or last.kind != "recover":
                raise RecipeError(
                    f"{stage.name}: compress stores what a recovery changed, so it must follow a recover stage"
                )
            stage, model = Stage(number, kind, settings, model, base=base), number
        else:
            stage = _push(stage, stages, base, recipe)
        stages.append(stage)
    if unused:
        _refuse_unused(stages, report)
    if not any(stage.makes_model for stage in stages):
        raise RecipeError("stages: none of them makes a model")
    return stages


def _refuse_unused(stages: Sequence[Stage], report: int | None) -> None:
    assert report is not None
    raise RecipeError(
        f"{stages[report - 1].name}: no stage uses its report: let layers or width follow, or leave it out"
    )


def _takes_report(kind: str, settings: Mapping[str, Any]) -> bool:
    """Return whether a pruning stage takes an importance report: all but named layers that are only dropped."""
    return kind == "width" or settings.get("layers") is None or _merges(kind, settings)


def _merges(kind: str, settings: Mapping[str, Any]) -> bool:
    return kind == "layers" and settings.get("merge", True) is not False


def _check_merging(stage: Stage, importance: Stage | None, narrowed: bool) -> None:
    """Check that layers can be merged.

    Args:
        stage: the stage that merges.
        importance: the one whose report it takes.
        narrowed: whether a stage before gave every layer a width of its own.
    """
    if narrowed:
        raise RecipeError(
            f"{stage.name}: after width, layers differ in their widths and cannot be merged: set merge: false, or let "
            "layers come first"
        )
    if importance is not None and importance.settings.get("masks") is False:
        raise RecipeError(
            f"{stage.name}: merging needs the masks that {importance.name} is told to leave out: take out its masks: "
            "false, or set merge: false here"
        )


def _push(stage: Stage, stages: Sequence[Stage], base: int, recipe: Recipe) -> Stage:
    """Return a push stage after checking that others can load what it publishes."""
    is_delta = bool(stages) and stages[-1].kind == "compress"
    for key in ("repo", "base_repo"):
        value = stage.settings.get(key)
        if value is not None and (not isinstance(value, str) or not value):
            raise RecipeError(f"{stage.name}: {key} must be a Hub repository, got {value!r:.80}")
    if stage.settings.get("repo") is None:
        raise RecipeError(f"{stage.name}: repo is missing: the Hub repository to push to")
    if not any(earlier.kind in (*PRUNING, "compress") for earlier in stages):
        raise RecipeError(f"{stage.name}: nothing was pruned or compressed, so there is nothing of impart-hf to push")
    needs_base = is_delta and base > 0
    if needs_base and stage.settings.get("base_repo") is None:
        raise RecipeError(
            f"{stage.name}: base_repo is missing: the Hub repository of the pruned model, which the delta rests on"
        )
    if not needs_base and stage.settings.get("base_repo") is not None:
        what = "the base is the recipe's model" if is_delta else "what is pushed is no delta"
        raise RecipeError(f"{stage.name}: base_repo has no effect, because {what}: leave it out")
    if needs_base and stage.settings.get("revision") is not None:
        raise RecipeError(
            f"{stage.name}: revision cannot be set beside base_repo, whose main branch the delta reads: "
            "leave revision out"
        )
    if stage.settings.get("base_repo") == stage.settings["repo"]:
        raise RecipeError(f"{stage.name}: repo and base_repo are the same: the delta needs a repository of its own")
    if is_delta and base == 0 and Path(recipe.model).is_dir() and recipe.base_name is None:
        raise RecipeError(
            f"{stage.name}: base_name is missing: the Hub id of '{recipe.model}', which the delta rests on"
        )
    return Stage(stage.number, stage.kind, stage.settings, stage.model, base=base if needs_base else None)


def _written_out(entries: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield kind and settings of every stage in order."""
    if not isinstance(entries, list | tuple) or not entries:
        raise RecipeError(f"{place} must be a list of stages, got {entries!r:.80}")
    for index, entry in enumerate(entries, 1):
        where = f"{place}, entry {index}"
        if isinstance(entry, str):
            entry = {entry: None}
        if not isinstance(entry, Mapping) or len(entry) != 1:
            raise RecipeError(f"{where} must be one stage, as `- width: {{ratio: 0.2}}`, got {entry!r:.80}")
        ((kind, settings),) = entry.items()
        settings = {} if settings is None else settings
        if kind not in (*KINDS, _REPEAT):
            raise RecipeError(f"{where}: unknown stage {kind!r}; choose one of {', '.join((*KINDS, _REPEAT))}")
        if not isinstance(settings, Mapping) or not all(isinstance(key, str) for key in settings):
            raise RecipeError(f"{where}: {kind} must map settings to values, got {settings!r:.80}")
        if kind != _REPEAT:
            yield kind, settings
            continue
        if unknown := [key for key in settings if key not in ("times", "stages")]:
            raise RecipeError(f"{where}: repeat has no setting {unknown[0]!r}; its settings are times and stages")
        times = settings.get("times")
        if isinstance(times, bool) or not isinstance(times, int) or not 1 <= times <= _MOST_STAGES:
            raise RecipeError(f"{where}: repeat: times must be a whole number from 1 to {_MOST_STAGES}, got {times!r}")
        for _ in range(times):
            yield from _written_out(settings.get("stages"), f"{where}: repeat: stages")


def json_form(value: Any, place: str) -> str:
    """Return a value as JSON, in which fingerprints, reports and the state of a run hold it.

    Raises:
        RecipeError: if it holds something else than texts, numbers, true, false, lists and mappings, such as a date.
    """
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{place} holds a value that is no text, finite number, list or mapping: {error}") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, to which 1e-4 is a number, and a key that is given twice an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if isinstance(key, str) and keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
