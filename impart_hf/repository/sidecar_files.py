"""Sidecar files: files copied from the fine-tune, such as tokenizer, processor and licence.

They stay as they are, but for the class that tokenizer_config.json names (tokenizer_class.py).

No list of names can be complete, since every kind of tokenizer has files of its own. So it is a list of suffixes, those
of texts and vocabularies, with the files that the tokenizer's class names, less what must not be published or is not
the model's: secrets, weights, what describes them, and what training left behind. Of Python files, they are those of
tokenizers and processors, and all if a configuration names code of the repository.
"""

import contextlib
import fnmatch
import shutil
from collections.abc import Container, Iterable, Mapping
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name
from transformers.utils import logging
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from ..modeling.model_files import ADAPTER_CONFIG, CheckpointError, HubOptions, fetch_file, read_json
from ..modeling.repository_kind import RepositoryKind, kind_of
from .reader_files import is_reader_file

logger = logging.get_logger(__name__)

_LARGEST = 100_000_000  # bytes; the largest tokenizers have 35 MB
_SUFFIXES = (
    *(".json", ".txt", ".md", ".yaml", ".yml", ".proto", ".jinja", ".py"),
    *(".model", ".vocab", ".tiktoken", ".spm", ".bpe"),
)
# The names below are in lower case.
_OTHERS = ("license*", "licence*", "copying*", "notice*", "*use_policy*", "*.model.v[0-9]*")
_SECRETS = (
    *("*.env", "*.env.*", "*.pem", "*.key", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "netrc*", "kubeconfig*"),
    *("*secret*", "*credential*", "*password*", "*passwd*", "*service[-_]account*", "*api[-_]key*", "*apikey*"),
    *("*private[-_]key*", "*[-_]key.*", "token", "token.*", "*[-_]token", "*[-_]token.*", "hftoken*"),
)
_WEIGHTS = ("model.*", "pytorch_model*", "consolidated*", "*.safetensors*", "*.gguf*")
# `adapter_config.json` would make transformers look for an adapter.
_DESCRIPTIONS = ("config.json", "readme.md", "*.index.json", "adapter_config.json", "quant*_config.json")
_TRAINING = (
    *("optimizer*", "scheduler*", "rng_state*", "scaler*", "trainer_*", "training_*", "zero_to_fp32.py"),
    *("train_results.json", "eval_results.json", "all_results.json"),
)
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER_CODE = "tokenization_*.py"
_CODE = ("tokenization_*", "processing_*", "image_processing_*", "video_processing_*", "feature_extraction_*")
_NAMING_CODE = (_TOKENIZER_CONFIG, "processor_config.json", "preprocessor_config.json")


def sidecar_files(source: str, options: HubOptions) -> dict[str, Path]:
    """Return the sidecar files of a local folder or Hub repository, by their names there.

    If the Hub is offline, they are those in the local cache. Files of more than 100 MB are left out, with a warning.

    Raises:
        CheckpointError: if the repository cannot be reached, or does not give its files.
    """
    files = {}
    found = (fetch_file(source, name, options) for name in ("config.json", ADAPTER_CONFIG))
    config = next((path for path in found if path), None)
    listed = _listed(source, options, config.parent if config else Path(source, options.subfolder))
    naming = [fetch_file(source, name, options) for name in _NAMING_CODE if name in listed]
    has_code = _has_code([config, *naming])
    vocabulary = _class_files([config, *naming])
    for name in fnmatch.filter(listed, _TOKENIZER_CODE):
        code = fetch_file(source, name, options)
        text = code.read_text("utf-8", "replace") if code else ""
        vocabulary |= {each for each in listed if f'"{each}"' in text or f"'{each}'" in text}
    for name, size in sorted(listed.items()):
        if not _is_sidecar_file(PurePosixPath(name), has_code, vocabulary) or is_reader_file(name, listed):
            continue
        if size > _LARGEST:
            logger.warning(
                f"'{source}' has the file {name} of {size} bytes, which is too large to be copied: copy it into the "
                "result if the model needs it"
            )
            continue
        if path := fetch_file(source, name, options):
            files[name] = path
    return files


def copy_files(files: Mapping[str, Path], target: Path) -> None:
    """Copy files to a folder, under the names given."""
    for name, path in files.items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)


def copy_sidecar_files(source: str, options: HubOptions, target: Path) -> None:
    """Copy the sidecar files of a local folder or Hub repository to a folder; errors as for `sidecar_files`."""
    copy_files(sidecar_files(source, options), target)


def _is_sidecar_file(path: PurePosixPath, has_code: bool, vocabulary: Container[str]) -> bool:
    """Return whether a file of a model's repository is copied unchanged into what is made from the model.

    Args:
        path: in the repository.
        has_code: whether a configuration names code of the repository.
        vocabulary: the files that the tokenizer's class names.
    """
    name = path.name.lower()
    if name.startswith(".") or str(path.parent) not in (".", CHAT_TEMPLATE_DIR):
        return False
    if path.suffix == ".py" and not has_code and not _matches(name, _CODE):
        return False
    if path.name in vocabulary and not _matches(name, (*_SECRETS, *_DESCRIPTIONS)):
        return True
    if not name.endswith(_SUFFIXES) and not _matches(name, _OTHERS):
        return False
    return not _matches(name, (*_SECRETS, *_WEIGHTS, *_DESCRIPTIONS, *_TRAINING))


def _class_files(configs: Iterable[Path | None]) -> set[str]:
    """Return the names of the files that the tokenizer's class of a model reads, as far as transformers has it."""
    names = set()
    for path in configs:
        with contextlib.suppress(CheckpointError):
            content = read_json(path) if path else {}
            content = content.get("text_config", {}) if kind_of(content) is RepositoryKind.DELTA else content
            names |= {content.get("tokenizer_class"), TOKENIZER_MAPPING_NAMES.get(str(content.get("model_type")))}
    files: set[str] = set()
    for name in names:
        # A class that needs a package which is not there cannot be used here either.
        with contextlib.suppress(ImportError):
            known = tokenizer_class_from_name(name) if isinstance(name, str) else None
            files |= set(getattr(known, "vocab_files_names", {}).values())
    return files


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _has_code(configs: Iterable[Path | None]) -> bool:
    """Return whether a configuration of the model names code, which may import other files of the repository."""
    for path in configs:
        with contextlib.suppress(CheckpointError):  # a tokenizer that cannot be read is no reason to stop here
            content = read_json(path) if path else {}
            is_delta = kind_of(content) is RepositoryKind.DELTA  # whose own code is the reader
            if "auto_map" in (content.get("text_config", {}) if is_delta else content):
                return True
    return False


def _listed(source: str, options: HubOptions, folder: Path) -> dict[str, int]:
    """Return the sizes in bytes of a repository's files by name; if the Hub is not reached, of those in `folder`."""
    if Path(source).is_dir() or options.local_files_only or is_offline_mode():
        return _in_folder(folder)
    top = f"{options.subfolder.strip('/')}/" if options.subfolder else ""
    try:
        entries = HfApi(token=options.token).list_repo_tree(
            source, top.rstrip("/") or None, recursive=True, revision=options.revision
        )
        sizes = {entry.path.removeprefix(top): entry.size for entry in entries if isinstance(entry, RepoFile)}
    except HfHubHTTPError as error:
        raise CheckpointError(f"the files of '{source}' cannot be listed: {error}") from error
    except Exception as error:  # the HTTP library's own errors, whichever library huggingface_hub uses
        if not type(error).__module__.startswith("http"):
            raise
        return _in_folder(folder)
    return sizes


def _in_folder(folder: Path) -> dict[str, int]:
    paths = [path for path in (*folder.iterdir(), *folder.glob(f"{CHAT_TEMPLATE_DIR}/*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
