"""The chat template of a merged model, chosen as mergekit chooses it."""

import importlib.util
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .vocabulary import Tokens

AUTO = "auto"
_SHORTEST = 20  # of a template's text: mergekit takes anything shorter for a name


def check_chat_template(wanted: Any) -> None:
    """Check a configuration's chat template.

    Raises:
        ValueError: if it is neither "auto", nor a Jinja template, nor the name of one that mergekit has.
    """
    if not isinstance(wanted, str) or (wanted != AUTO and not _is_template(wanted) and _named(wanted) is None):
        raise ValueError(
            f"chat_template must be auto, a Jinja template, or the name of a template of mergekit, if that is "
            f"installed, got {wanted!r:.80}"
        )


def chat_template(wanted: str, models: Iterable["Tokens"]) -> str | None:
    """Return the text of a merged model's chat template; None if "auto" finds none.

    Args:
        wanted: a Jinja template, a name, or "auto" for the template that most models have, the first of several.
        models: tokens of the models that are merged.
    """
    if wanted != AUTO:
        return wanted if _is_template(wanted) else _named(wanted)
    templates = [model.chat_template.strip() for model in models if model.chat_template]
    return Counter(templates).most_common(1)[0][0] if templates else None


def write_chat_template(folder: Path, template: str) -> None:
    """Make a text the only chat template of the tokenizer in a folder."""
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        content = json.loads(settings.read_text("utf-8"))
        if content.pop("chat_template", None) is not None:
            settings.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _is_template(text: str) -> bool:
    return len(text) >= _SHORTEST and "{" in text


def _named(name: str) -> str | None:
    """Return the text of one of mergekit's templates, which are read where mergekit is installed."""
    package = importlib.util.find_spec("mergekit")
    if package is None or package.origin is None or not name.isidentifier():
        return None
    path = Path(package.origin).with_name("_data") / "chat_templates" / f"{name}.jinja"
    return path.read_text("utf-8") if path.is_file() else None
