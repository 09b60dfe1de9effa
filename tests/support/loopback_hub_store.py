"""Disk storage of the loopback Hub: repositories, commits, refs and content-addressed blobs.

One repository is one folder, `<root>/<namespace>/<name>`:

    repo.json            visibility, gating, branches and tags; always replaced last
    commits/<sha>.json   parent, title and the whole file table of one commit; never rewritten
    blobs/<sha256>       file contents, small and large alike; never rewritten

Every file is written beside its destination, checked, fsynced and renamed. A process killed at any point
therefore leaves the refs on a complete commit and, at worst, some `.incoming-*` files that nothing reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

LFS_PATTERNS = ("*.bin", "*.gguf", "*.h5", "*.npz", "*.onnx", "*.pt", "*.pth", "*.safetensors", "*.zip")
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class HubError(Exception):
    """A refusal to be sent to the client; `code` becomes the `X-Error-Code` that types the client's exception."""

    def __init__(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers or {}


@dataclass(frozen=True)
class Entry:
    """One file of a commit. `git_oid` is the blob id of the content, or of the pointer file for an LFS file."""

    sha256: str
    size: int
    git_oid: str
    pointer_size: int = 0

    @property
    def is_lfs(self) -> bool:
        """Whether the file is stored through LFS."""
        return self.pointer_size > 0

    @property
    def etag(self) -> str:
        """The id by which clients recognise the content: sha256 for LFS, git blob sha1 otherwise."""
        return self.sha256 if self.is_lfs else self.git_oid

    @classmethod
    def regular(cls, content: bytes) -> Entry:
        """Describe a small file committed inline."""
        return cls(hashlib.sha256(content).hexdigest(), len(content), git_blob_oid(content))

    @classmethod
    def lfs(cls, sha256: str, size: int) -> Entry:
        """Describe a large file, of which git would only hold the pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return cls(sha256, size, git_blob_oid(pointer), len(pointer))


def git_blob_oid(content: bytes) -> str:
    """Return the sha1 that git gives to a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def timestamp() -> str:
    """Return the current time as the Hub writes it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file beside `path`; fsync it and rename it over `path` if the block succeeds."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".incoming-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by the JSON text of `value`, atomically."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1).encode())


class Repo:
    """One repository on disk. Nothing is cached, so a new instance on the same folder sees the same state."""

    def __init__(self, folder: Path, repo_id: str, lock: threading.RLock):
        self.folder = folder
        self.id = repo_id
        self._lock = lock

    @property
    def exists(self) -> bool:
        """Whether the repository has been created."""
        return (self.folder / "repo.json").is_file()

    @property
    def state(self) -> dict[str, Any]:
        """The content of `repo.json`."""
        state: dict[str, Any] = json.loads((self.folder / "repo.json").read_bytes())
        return state

    def create(self, private: bool) -> None:
        """Create the repository with the first commit that the Hub makes, so that `main` resolves."""
        for name in ("commits", "blobs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        files = {".gitattributes": self._add_regular(GITATTRIBUTES)}
        sha = self._write_commit(None, "initial commit", "", files)
        state = {"private": private, "gated": False, "accepted": [], "branches": {"main": sha}, "tags": {}}
        write_json(self.folder / "repo.json", {**state, "created": timestamp()})

    def update(self, **changes: Any) -> None:
        """Change settings of `repo.json`, such as `private`, `gated` and `accepted`."""
        with self._lock:
            write_json(self.folder / "repo.json", {**self.state, **changes})

    # Revisions -------------------------------------------------------------------------------------------------------

    def resolve(self, revision: str) -> str:
        """Return the commit sha of a branch, a tag or a full sha."""
        state = self.state
        sha: str | None = state["branches"].get(revision) or state["tags"].get(revision)
        if sha is None and re.fullmatch(r"[0-9a-f]{40}", revision) and self._commit_path(revision).is_file():
            sha = revision
        if sha is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def set_ref(self, kind: str, name: str, sha: str) -> None:
        """Create a branch (`kind` "branches") or a tag ("tags"); refuse one that exists."""
        with self._lock:
            refs = self.state[kind]
            if name in refs:
                raise HubError(409, None, f"Reference {name} already exists")
            self.update(**{kind: {**refs, name: sha}})

    def delete_ref(self, kind: str, name: str) -> None:
        """Delete a branch or a tag."""
        with self._lock:
            refs = dict(self.state[kind])
            if refs.pop(name, None) is None:
                raise HubError(404, "RevisionNotFound", f"Reference {name} does not exist")
            self.update(**{kind: refs})

    def history(self, sha: str) -> Iterator[dict[str, Any]]:
        """Yield the commits from `sha` back to the first one."""
        parent: str | None = sha
        while parent is not None:
            commit = json.loads(self._commit_path(parent).read_bytes())
            yield {**commit, "sha": parent}
            parent = commit["parent"]

    def files(self, sha: str) -> dict[str, Entry]:
        """Return the file table of a commit, by path."""
        commit = json.loads(self._commit_path(sha).read_bytes())
        return {path: Entry(**entry) for path, entry in commit["files"].items()}

    # Commits ---------------------------------------------------------------------------------------------------------

    def commit(self, branch: str, header: dict[str, Any], operations: Iterable[tuple[str, dict[str, Any]]]) -> str:
        """Apply the operations of a commit request to the head of `branch` and return the sha of the new head."""
        with self._lock:
            branches = self.state["branches"]
            if branch not in branches:
                raise HubError(404, "RevisionNotFound", f"Invalid rev id: {branch}")
            head = branches[branch]
            if header.get("parentCommit", head) != head:
                raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
            files = self.files(head)
            for key, value in operations:
                self._apply(files, key, value)
            sha = self._write_commit(head, header["summary"], header.get("description", ""), files)
            self.update(branches={**branches, branch: sha})
            return sha

    def _apply(self, files: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        """Apply one commit operation to a file table."""
        path = value["path"].rstrip("/")
        if not path or any(part in ("", ".", "..", ".git") for part in path.split("/")):
            raise HubError(400, None, f"Invalid path in commit: {value['path']!r}")
        if key == "file":
            files[path] = self._add_regular(value["content"])
        elif key == "lfsFile":
            files[path] = self._stored_lfs(value["oid"])
        elif key == "deletedFile":
            self._delete(files, [path] if path in files else [], path)
        elif key == "deletedFolder":
            self._delete(files, [name for name in files if name.startswith(f"{path}/")], path)
        else:
            raise HubError(400, None, f"Unknown commit operation: {key!r}")

    @staticmethod
    def _delete(files: dict[str, Entry], names: list[str], path: str) -> None:
        """Remove `names` from a file table; there must be at least one."""
        if not names:
            raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
        for name in names:
            del files[name]

    def _add_regular(self, content: bytes) -> Entry:
        """Store the content of a small file."""
        entry = Entry.regular(content)
        self.store_blob([content], entry.sha256, entry.size)
        return entry

    def _stored_lfs(self, sha256: str) -> Entry:
        """Describe an LFS file whose content must have been uploaded before."""
        blob = self.blob_path(sha256)
        if not blob.is_file():
            raise HubError(400, None, f"LFS object {sha256} has not been uploaded")
        return Entry.lfs(sha256, blob.stat().st_size)

    def _write_commit(self, parent: str | None, title: str, message: str, files: dict[str, Entry]) -> str:
        """Store a commit, which no ref names yet, and return its sha."""
        table = {path: asdict(files[path]) for path in sorted(files)}
        commit = {"parent": parent, "title": title, "message": message, "date": timestamp(), "files": table}
        sha = hashlib.sha1(json.dumps([self.id, commit]).encode()).hexdigest()
        write_json(self._commit_path(sha), commit)
        return sha

    def _commit_path(self, sha: str) -> Path:
        return self.folder / "commits" / f"{sha}.json"

    # Blobs -----------------------------------------------------------------------------------------------------------

    def blob_path(self, sha256: str) -> Path:
        """Return where the content with this hash is, or would be."""
        if not _SHA256.fullmatch(sha256):
            raise HubError(400, None, f"Not a sha256: {sha256!r}")
        return self.folder / "blobs" / sha256

    def store_blob(self, chunks: Iterable[bytes], sha256: str, size: int) -> None:
        """Store content that must have the announced hash and size."""
        digest, total = hashlib.sha256(), 0
        with replacing(self.blob_path(sha256)) as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                total += len(chunk)
            if (digest.hexdigest(), total) != (sha256, size):
                raise HubError(400, None, f"Received {total} bytes that are not the announced {size} of {sha256}")


class Store:
    """All repositories below one folder."""

    def __init__(self, root: Path):
        self.root = Path(root)
        self.lock = threading.RLock()

    def find(self, repo_id: str) -> Repo | None:
        """Return the repository called `namespace/name`, or None."""
        namespace, _, name = repo_id.partition("/")
        if not (_NAME.fullmatch(namespace) and _NAME.fullmatch(name)):
            return None
        repo = Repo(self.root / namespace / name, repo_id, self.lock)
        return repo if repo.exists else None

    def create(self, repo_id: str, private: bool = False) -> None:
        """Create a repository; refuse one that exists."""
        with self.lock:
            namespace, _, name = repo_id.partition("/")
            if not (_NAME.fullmatch(namespace) and _NAME.fullmatch(name)):
                raise HubError(400, None, f"Invalid repository name: {repo_id!r}")
            if self.find(repo_id) is not None:
                raise HubError(409, None, "You already created this model repo")
            Repo(self.root / namespace / name, repo_id, self.lock).create(private)

    def delete(self, repo_id: str) -> None:
        """Delete a repository with all its history."""
        with self.lock:
            repo = self.find(repo_id)
            if repo is None:
                raise HubError(404, "RepoNotFound", "Repository not found")
            shutil.rmtree(repo.folder)


def is_lfs_upload(path: str, size: int, sample: bytes, threshold: int) -> bool:
    """Decide as the Hub does whether a file goes through LFS: by `.gitattributes`, by size, or as binary data."""
    name = path.rsplit("/", 1)[-1]
    return size > threshold or b"\0" in sample or any(fnmatch(name, pattern) for pattern in LFS_PATTERNS)


def file_item(path: str, entry: Entry) -> dict[str, Any]:
    """Describe a file as tree listings and paths-info do."""
    item: dict[str, Any] = {"type": "file", "path": path, "size": entry.size, "oid": entry.git_oid}
    if entry.is_lfs:
        item["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    return item


def folder_item(path: str, files: dict[str, Entry]) -> dict[str, Any]:
    """Describe a folder as tree listings and paths-info do."""
    below = [(name, entry.git_oid) for name, entry in files.items() if name.startswith(f"{path}/")]
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(json.dumps(below).encode()).hexdigest()}


def tree_items(files: dict[str, Entry], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """List the files and folders inside `folder` ("" for the root), or everything below it."""
    base = f"{folder}/" if folder else ""
    items: dict[str, dict[str, Any]] = {}
    for path in sorted(name for name in files if name.startswith(base)):
        parts = path[len(base) :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            inner = base + "/".join(parts[:depth])
            items.setdefault(inner, folder_item(inner, files))
        if recursive or len(parts) == 1:
            items[path] = file_item(path, files[path])
    return list(items.values())
