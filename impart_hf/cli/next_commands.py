"""What the user of a new delta repository may do next, as commands to copy."""

import json
import os
import shlex
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from ..adapters.adapter_files import ADAPTER_CONFIG
from ..common.names import is_on_hub


def next_commands(
    output: str,
    base: str,
    finetuned: str | None = None,
    *,
    base_revision: str | None = None,
    finetuned_revision: str | None = None,
    pushed: str | None = None,
) -> list[str]:
    """Return commands that work on a repository that was just made.

    Args:
        output: its folder.
        base, finetuned: the models it was made of; no fine-tune for a merge.
        base_revision, finetuned_revision: their revisions on the Hub; `evaluate` has one for all models, so that a
            model of a given revision is left out.
        pushed: the Hub repository to which it goes.
    """
    config = json.loads((Path(output) / "config.json").read_text("utf-8"))
    compared = [base] if base_revision is None else []
    if finetuned is not None and finetuned_revision is None and not _is_adapter(finetuned):
        compared.append(finetuned)
    commands = [
        f"impart-hf inspect {shlex.quote(output)}",
        f"impart-hf evaluate {shlex.join([*compared, output])} --text TEXT",
    ]
    if pushed is None and is_on_hub(config["base_model_name_or_path"]):
        return [*commands, f"impart-hf push {shlex.quote(output)} USER/NAME"]
    auto_class = [name for name in config["auto_map"] if name != "AutoConfig"][-1]
    load = f"{auto_class}.from_pretrained({json.dumps(pushed or output)}, trust_remote_code=True)"
    return [*commands, f"in Python: transformers.{load}"]


def _is_adapter(source: str) -> bool:
    """Return whether a model that was read is an adapter, which `evaluate` does not take."""
    if os.path.isdir(source):
        return os.path.exists(os.path.join(source, ADAPTER_CONFIG))
    return isinstance(try_to_load_from_cache(source, ADAPTER_CONFIG), str)
