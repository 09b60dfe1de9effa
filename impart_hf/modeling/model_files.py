"""The files of a model's repository, a local folder or on the Hub: found, downloaded, and read if they are JSON."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .repository_kind import RepositoryKind, kind_of

ADAPTER_CONFIG = "adapter_config.json"  # of an adapter in PEFT's format
_CONFIGS = ("config.json", ADAPTER_CONFIG)


class CheckpointError(OSError):
    """A checkpoint that is missing, cannot be reached, or cannot be read."""


@dataclass(frozen=True)
class HubOptions:
    """Options for finding and downloading files on the Hub, named as in `from_pretrained`."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    force_download: bool = False
    subfolder: str = ""

    def __deepcopy__(self, memo: dict) -> "HubOptions":
        return self

    def __reduce__(self) -> tuple:
        """Pickle without the token: a pickle may be shared, a token must not."""
        fields = (self.revision, None, self.cache_dir, self.local_files_only, self.force_download, self.subfolder)
        return HubOptions, fields


def fetch_file(repo: str, filename: str, options: HubOptions, required: bool = False) -> Path | None:
    """Return the path of one file of a local folder or Hub repository, or None if the repository does not have it.

    If the Hub is offline, a file that does not exist cannot be distinguished from one that was not downloaded: a file
    that is not in the cache counts as missing if the repository's config.json (or an adapter's) is there, unless it is
    `required`.

    Raises:
        CheckpointError: if the repository or revision does not exist, or cannot be accessed or reached.
    """
    if os.path.isdir(repo):
        path = Path(repo, options.subfolder, filename)
        return path if path.is_file() else None
    revision = options.revision or "main"
    try:
        return Path(
            hf_hub_download(
                repo,
                filename,
                subfolder=options.subfolder or None,
                revision=options.revision,
                token=options.token,
                cache_dir=options.cache_dir,
                local_files_only=options.local_files_only,
                force_download=options.force_download,
            )
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"'{repo}' is gated: accept its terms on the Hub and log in (`hf auth login`), or pass token="
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"'{repo}' is neither a local folder nor a repository that can be read on the Hub; if it is private, "
            "log in (`hf auth login`) or pass token="
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"'{repo}' has no revision '{revision}': check the branch, tag or commit") from error
    except LocalEntryNotFoundError as error:
        if not required and any(_is_cached(repo, name, options) for name in _CONFIGS if name != filename):
            return None
        what = f"'{repo}'" if filename in _CONFIGS else f"'{filename}' of '{repo}'"  # every model has a config
        raise CheckpointError(
            f"{what} is not in the local cache, and the Hub is offline; there is no local folder '{repo}' either: "
            "download it once online, or give a local folder"
        ) from error
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise CheckpointError(f"'{repo}' is neither a local folder nor a valid Hub id (owner/name)") from error
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"'{filename}' of '{repo}' cannot be downloaded: {error}") from error


def _is_cached(repo: str, filename: str, options: HubOptions) -> bool:
    """Return whether the Hub's cache has a file."""
    path = f"{options.subfolder}/{filename}" if options.subfolder else filename
    cached = try_to_load_from_cache(repo, path, cache_dir=options.cache_dir, revision=options.revision)
    return isinstance(cached, str)


def pinned(repo: str, options: HubOptions, filename: str = "config.json") -> HubOptions:
    """Return the options with their revision resolved to its current commit, so that all files are of one commit.

    For a local folder, or a repository without a file of this name, the options are returned unchanged.
    """
    path = None if os.path.isdir(repo) else fetch_file(repo, filename, options)
    if path is None:
        return options
    # The cache keeps files in snapshots/COMMIT, so the commit is known without a network.
    return replace(options, revision=path.parents[len(Path(options.subfolder).parts)].name)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises:
        CheckpointError: if it cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value


def fetch_config(repo: str, options: HubOptions) -> tuple[dict[str, Any], Path]:
    """Return the content of config.json of a local folder or Hub repository, and the folder that holds its files.

    Raises:
        CheckpointError: if the repository has no config.json, or cannot be reached or read.
    """
    path = fetch_file(repo, "config.json", options)
    if path is None and fetch_file(repo, ADAPTER_CONFIG, options):
        raise CheckpointError(
            f"'{repo}' is an adapter and no model: `compress`, `tune` and `merge` take it as a fine-tune of its "
            "base; for anything else merge it into its base with PEFT's merge_and_unload, save that model, and give it "
            "instead"
        )
    if path is None:
        hint = _hint(Path(repo, options.subfolder))
        raise CheckpointError(
            f"'{repo}' has no config.json: it is not a transformers checkpoint or delta repository{hint}"
        )
    return read_json(path), path.parent


def _hint(folder: Path) -> str:
    """Return a hint at a subfolder of a local folder that holds a model or an adapter, if there is one."""
    found = [path.parent for name in _CONFIGS for path in sorted(folder.glob(f"*/{name}"))]
    return f"; did you mean '{found[0]}'?" if found else ""


def repository_kind(repo: str, options: HubOptions) -> RepositoryKind:
    """Return the kind of model that a local folder or Hub repository holds; errors as for `fetch_config`."""
    return kind_of(fetch_config(repo, options)[0])
