"""The class by which transformers reads a model's tokenizer, kept for what is made from the model."""

from pathlib import Path

from transformers import AutoTokenizer

from ..common.files import write_json
from ..modeling.model_files import HubOptions, read_json

# As every version of transformers knows it.
_NAMES = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def keep_tokenizer_class(source: str, options: HubOptions, folder: Path) -> None:
    """Let a folder's tokenizer be read as that of the model whose sidecar files it has.

    Against what tokenizer_config.json says, transformers chooses the class of some tokenizers by the model type
    (Qwen 2, Phi-3) or by the Hub id. A folder with another type would get the class that the file names, which splits
    text otherwise. So the right one is written there.

    Args:
        source, options: local folder or Hub repository of the model.
        folder: with its sidecar files, and its own config.json.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file() and not (folder / "tokenizer.json").is_file():
        return  # of some types, transformers makes an empty tokenizer of nothing
    own = _class_name(source, options)
    if own is None or own == _class_name(str(folder), HubOptions()):
        return
    content = read_json(path) if path.is_file() else {}
    write_json(path, {**content, "tokenizer_class": _NAMES.get(own, own)})


def _class_name(source: str, options: HubOptions) -> str | None:
    """Return the class of a tokenizer; None if there is none, or it cannot be read without its own code."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=options.revision, token=options.token, cache_dir=options.cache_dir,
            subfolder=options.subfolder, local_files_only=options.local_files_only, trust_remote_code=False,
            mistral_format=False,  # otherwise the class depends on whether mistral-common is installed
        )  # fmt: skip
    except Exception:  # of any kind, by files that are no tokenizer's
        return None
    return type(tokenizer).__name__
