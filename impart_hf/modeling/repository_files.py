"""Copying a delta repository's files to another folder, and uploading them to the Hub."""

import fnmatch
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, hf_hub_download, is_offline_mode, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import CHAT_TEMPLATE_DIR, CONFIG_NAME, GENERATION_CONFIG_NAME, logging

from .configuration_delta_compressed import DeltaCompressedConfig
from .delta_file import DELTA_FILE, DELTA_INDEX, DeltaFile, find_delta_files
from .delta_record import DeltaFormatError
from .model_files import CheckpointError, HubOptions, read_json
from .repository_kind import RepositoryKind, kind_of

logger = logging.get_logger(__name__)

_UNNAMED = "REPO_ID"  # a card's placeholder for the Hub id, until the repository is published
_CARD = "README.md"
_STAGING = ".saving-"  # begins the name of the folder in which files are written first
_WEIGHTS = (DELTA_FILE, DELTA_INDEX, DELTA_FILE.replace(".", "-*-of-*."))
_DENSE_WEIGHTS = (  # of a pruned model
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
)
_CONFIGS = (CONFIG_NAME, GENERATION_CONFIG_NAME)
# Fields of config.json by which the tensors are decoded.
_OF_TENSORS = ("tensor_dtype", "tensor_dtype_exceptions", "absent_tensors", "row_counts", "base_tensors")
# A tokenizer's files are taken as a whole: those of two tokenizers do not fit together.
_TOKENIZER = (
    *("tokenizer*", "tokenization_*.py", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "*.tiktoken", "tekken.json", "chat_template*", f"{CHAT_TEMPLATE_DIR}/*"),
)


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    replaces_all: bool = True,
    tags: Iterable[str] | None = None,
) -> str:
    """Upload a delta repository's folder to the Hub in one commit, without files that the Hub already has.

    Weight files of another delta or pruned model that the Hub has are deleted by the same commit.

    Args:
        folder: the files; its card's loading example will name the repository.
        repo_id, token, private, revision, create_pr, commit_message, commit_description: as for any upload.
        replaces_all: whether files that do not belong to the delta itself, such as tokenizer and model card, replace
            those that the Hub has.
        tags: added to the model card's tags.

    Returns:
        The commit's URL.

    Raises:
        CheckpointError: if the Hub cannot be reached.
        HfHubHTTPError: if the Hub refuses the upload.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        present = () if replaces_all else api.list_repo_files(repo_id, revision=revision)
        names = _names(folder)
        kept = _kept(names, present)
        card = folder / _CARD
        if tags and card.name in kept:
            kept.remove(card.name)
            card = Path(hf_hub_download(repo_id, card.name, revision=revision, token=token))
        with _with_card(folder, card, repo_id, tags or ()) as carded:
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=carded,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or "Upload delta repository",
                commit_description=commit_description,
                ignore_patterns=[*sorted(kept), f"{_STAGING}*"],  # the latter of a process that was killed
                delete_patterns=_replaced(names),
            )
    except HfHubHTTPError:  # the Hub's answer says what is wrong
        raise
    except Exception as error:  # the HTTP library's own errors, whichever library huggingface_hub uses
        if not type(error).__module__.startswith("http"):
            raise
        raise CheckpointError(f"the Hub cannot be reached, nothing was published: {error}") from error


@contextmanager
def _with_card(folder: Path, card: Path, repo_id: str, tags: Iterable[str]) -> Iterator[Path]:
    """Yield the folder to publish, with a card whose loading example names the repository, and with tags."""
    text = card.read_text("utf-8") if card.is_file() else ""
    if _UNNAMED not in text and not tags:
        yield folder
        return
    with tempfile.TemporaryDirectory() as holder:
        named = Path(holder, "named")
        shutil.copytree(folder, named, copy_function=_link)
        (named / _CARD).unlink(missing_ok=True)
        text = text.replace(_UNNAMED, repo_id)
        if tags:
            content: Any = ModelCard(text, ignore_metadata_errors=True)
            content.data.tags = sorted({*(content.data.tags or []), *tags})
            text = str(content)
        (named / _CARD).write_text(text, "utf-8")
        yield named


def _link(source: str, target: str) -> None:
    try:
        os.symlink(os.path.abspath(source), target)
    except OSError:  # the system has no links
        shutil.copyfile(source, target)


def repository_folder(source: str, options: HubOptions) -> Path:
    """Return the folder that holds a delta repository's files, downloaded if it is on the Hub.

    Raises:
        CheckpointError: if the repository no longer exists.
    """
    if os.path.isabs(source) or os.path.isdir(source):
        folder = Path(source, options.subfolder)
    else:
        find_delta_files(source, options)  # raises a clear error if the repository cannot be read
        if options.local_files_only or is_offline_mode():
            logger.warning(f"The Hub is offline: only the files of '{source}' in the local cache are saved.")
        prefix = f"{options.subfolder}/" if options.subfolder else ""
        snapshot = snapshot_download(
            source,
            revision=options.revision,
            token=options.token,
            cache_dir=options.cache_dir,
            local_files_only=options.local_files_only,
            allow_patterns=f"{prefix}*",
        )
        folder = Path(snapshot, options.subfolder)
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(f"the delta repository '{source}' that this model was loaded from no longer exists")
    return folder


def delta_digest(file: DeltaFile, config: DeltaCompressedConfig) -> str:
    """Return a digest of what the tensors of a delta repository are decoded from; only checksum tables are read.

    The base is part of it, because its checksums are an entry of the file.
    """
    content = [sorted(file.checksums().items()), [getattr(config, name) for name in _OF_TENSORS]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def holds_delta(folder: Path, digest: str) -> bool:
    """Return whether a folder holds the delta repository of a digest, and not another model by now."""
    try:
        content = read_json(folder / CONFIG_NAME)
        if kind_of(content) is not RepositoryKind.DELTA:
            return False
        fields = {name: content[name] for name in _OF_TENSORS if name in content}
        file = DeltaFile(find_delta_files(str(folder), HubOptions())[0])
        return delta_digest(file, DeltaCompressedConfig(**fields)) == digest
    except (CheckpointError, DeltaFormatError):
        return False


def save_repository(folder: Path, target: Path, texts: Mapping[str, str]) -> None:
    """Write a delta repository's files to another folder: all of them, or none if the disk is full.

    The delta's weights, configurations and reader are written over what is there. Other files, such as tokenizer, model
    card and licence, are copied only where the folder has none.

    Args:
        folder: holds the files.
        target: made if missing; may be the same folder.
        texts: contents that replace those of the files with these names.

    Raises:
        OSError: if a file cannot be written; the target is then as it was.
    """
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    names = _names(folder)
    present = _names(target)
    kept = _kept(names, present)
    written = [name for name in {**dict.fromkeys(names), **dict.fromkeys(texts)} if name not in kept]
    if target.samefile(folder):
        written = list(texts)
    if not written:
        return
    try:
        with tempfile.TemporaryDirectory(dir=target, prefix=_STAGING) as holder:
            for name in written:
                _write(Path(holder, name), folder / name, texts.get(name))
            # The configuration comes last: until then, it is of what was there.
            for name in sorted(written, key=lambda name: name == CONFIG_NAME):
                (target / name).parent.mkdir(exist_ok=True)
                os.replace(Path(holder, name), target / name)
    except OSError as error:
        if is_new and not any(target.iterdir()):
            target.rmdir()
        raise OSError(error.errno, f"{error.strerror}: '{target}' cannot be written and is left as it was") from error
    for name in present:
        if _is_weights(name) and name not in names:  # of another delta, of which it would be read
            (target / name).unlink()


def _write(path: Path, original: Path, text: str | None) -> None:
    """Write a text, or a copy of a file, and flush it to disk."""
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        if text is not None:
            file.write(text.encode())
        else:
            with original.open("rb") as source:
                shutil.copyfileobj(source, file)
        file.flush()
        os.fsync(file.fileno())


def _names(folder: Path) -> list[str]:
    """Return the files that a repository's folder holds, by their names in the repository, hidden ones aside."""
    paths = [*folder.iterdir(), *folder.glob(f"{CHAT_TEMPLATE_DIR}/*")]
    return sorted(
        path.relative_to(folder).as_posix() for path in paths if path.is_file() and not path.name.startswith(".")
    )


def _kept(names: Iterable[str], present: Collection[str]) -> set[str]:
    """Return those of a repository's files that are not written, because the place has files of its own for them."""
    has_tokenizer = "tokenizer_config.json" in present
    return {
        name for name in names if not _is_own(name) and (name in present or (has_tokenizer and is_tokenizer_file(name)))
    }


def is_tokenizer_file(name: str) -> bool:
    """Return whether a file, given by its name in the repository, belongs to a tokenizer."""
    return _matches(name, _TOKENIZER)


def _is_own(name: str) -> bool:
    """Return whether a file belongs to the delta itself."""
    return name in _CONFIGS or _is_weights(name) or name in {path.name for path in Path(__file__).parent.glob("*.py")}


def _is_weights(name: str) -> bool:
    return _matches(name, _WEIGHTS)


def _replaced(names: Iterable[str]) -> list[str] | None:
    """Return patterns of all weight files of a repository's kind.

    Shards of another delta or model would be read in place of a new file, or the other way round.
    """
    kinds = [patterns for patterns in (_WEIGHTS, _DENSE_WEIGHTS) if any(_matches(name, patterns) for name in names)]
    return [pattern for patterns in kinds for pattern in patterns] or None


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
