"""What the loopback Hub answers: requests, replies, access checks and one small function per endpoint.

Errors are typed by `X-Error-Code`, which is all that huggingface_hub looks at to choose an exception.
"""

from __future__ import annotations

import base64
import hmac
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote

from support.card_rules import card_errors
from support.loopback_hub_store import Entry, HubError, Repo, file_item, folder_item, is_lfs_upload, tree_items

if TYPE_CHECKING:
    from support.loopback_hub import LoopbackHub


@dataclass
class Request:
    """One request: `args` are the unquoted parts of the path, `repo` is set where the route names a repository."""

    hub: LoopbackHub
    args: dict[str, str]
    query: dict[str, list[str]]
    headers: Any
    body: Iterator[bytes]
    repo: Repo = field(init=False)

    @property
    def token(self) -> str | None:
        """The bearer token, if one was sent."""
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip() or None

    def text(self) -> str:
        """Return the body as text."""
        return b"".join(self.body).decode()

    def json(self) -> dict[str, Any]:
        """Return the body as a JSON object."""
        value: dict[str, Any] = json.loads(self.text() or "{}")
        return value

    def flag(self, name: str) -> bool:
        """Return a boolean of the query string."""
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass
class Reply:
    """One answer; with `file`, the body is the `span` (offset, length) of that file."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    file: Path | None = None
    span: tuple[int, int] = (0, 0)

    @property
    def length(self) -> int:
        """The length of the body in bytes."""
        return len(self.body) if self.file is None else self.span[1]

    @classmethod
    def json(cls, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
        """Answer with JSON."""
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    @classmethod
    def error(cls, error: HubError) -> Reply:
        """Answer with an error that the client turns into the matching exception."""
        headers = {"X-Error-Message": re.sub(r"[^ -~]", "?", error.message), **error.headers}
        if error.code is not None:
            headers["X-Error-Code"] = error.code
        return cls.json({"error": error.message}, error.status, headers)


_Answer = Callable[[Request], Reply]
_ROUTES: list[tuple[str, re.Pattern[str], str, _Answer]] = []
_PARTS = {"repo": "[^/]+(?:/[^/]+)?", "path": ".+"}


def _route(methods: str, template: str, access: str) -> Callable[[_Answer], _Answer]:
    """Register an answer. `access` is "public", "user", "read" (a visible repository), "content" or "write"."""

    def replace(match: re.Match[str]) -> str:
        return f"(?P<{match[1]}>{_PARTS.get(match[1], '[^/]+')})"

    pattern = re.compile(re.sub(r"{(\w+)}", replace, template.replace(".", r"\.")))

    def register(answer: _Answer) -> _Answer:
        _ROUTES.extend((method, pattern, access, answer) for method in methods.split())
        return answer

    return register


def answer_request(method: str, path: str, query: str, request: Request) -> Reply:
    """Find the route of a raw path, check access and answer. Only single path parts are unquoted."""
    for route_method, pattern, access, answer in _ROUTES:
        match = pattern.fullmatch(path) if route_method == method else None
        if match is not None:
            request.args = {name: unquote(value) for name, value in match.groupdict().items()}
            request.query = parse_qs(query)
            _authorize(request, access)
            return answer(request)
    raise HubError(404, None, f"The loopback Hub does not serve {method} {path}")


def _authorize(request: Request, access: str) -> None:
    """Refuse a token, a repository or an action as the Hub does; find the repository."""
    hub, token = request.hub, request.token
    if access == "public":
        return
    if token is not None and token not in hub.users:
        raise HubError(401, None, "Invalid credentials in Authorization header")
    if access == "user" and token is None:
        raise HubError(401, None, "Invalid username or password.")
    if access != "user":
        request.repo = _visible_repo(hub, request.args["repo"], token)
    if access == "content":
        _check_gate(hub, request.repo, token)
    if access == "write" and token != hub.token:
        raise HubError(403 if token else 401, None, "You don't have the rights to write to this repository")


def _visible_repo(hub: LoopbackHub, repo_id: str, token: str | None) -> Repo:
    """Return a repository; a private one looks missing to those who may not see it."""
    repo = hub.store.find(repo_id)
    if repo is not None and (token == hub.token or not repo.state["private"]):
        return repo
    if token is None:
        raise HubError(401, "RepoNotFound", "Invalid username or password.")
    raise HubError(404, "RepoNotFound", "Repository not found")


def _check_gate(hub: LoopbackHub, repo: Repo, token: str | None) -> None:
    """Refuse the content of a gated repository to a token that was not accepted."""
    state = repo.state
    if state["gated"] and token not in (hub.token, *state["accepted"]):
        raise HubError(403, "GatedRepo", f"Access to model {repo.id} is restricted and you are not authorized.")


# Account and repositories -------------------------------------------------------------------------------------------


@_route("GET", "/api/whoami-v2", "user")
def _whoami(request: Request) -> Reply:
    name, role = request.hub.users[request.token or ""], "write" if request.token == request.hub.token else "read"
    auth = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": role}}
    return Reply.json({"type": "user", "id": name, "name": name, "fullname": name, "orgs": [], "auth": auth})


@_route("POST", "/api/validate-yaml", "public")
def _validate_yaml(request: Request) -> Reply:
    errors = card_errors(request.json()["content"])
    found = {"errors": [{"message": error} for error in errors], "warnings": []}
    return Reply.json(found, 400 if errors else 200)


def _named_repo(request: Request) -> tuple[str, dict[str, Any]]:
    """Return the repository that a create or delete request is about, and the request's payload."""
    payload = request.json()
    if request.token != request.hub.token:
        raise HubError(403, None, "You don't have the rights to manage models under this namespace")
    if payload.get("type", "model") != "model":
        raise HubError(400, None, "The loopback Hub serves only model repositories")
    return f"{payload.get('organization') or request.hub.users[request.token]}/{payload['name']}", payload


@_route("POST", "/api/repos/create", "user")
def _create_repo(request: Request) -> Reply:
    repo_id, payload = _named_repo(request)
    url = f"{request.hub.url}/{repo_id}"
    try:
        request.hub.store.create(repo_id, private=payload.get("visibility") == "private")
    except HubError as error:
        if error.status != 409:
            raise
        return Reply.json({"error": error.message, "url": url}, 409)
    return Reply.json({"url": url, "name": repo_id})


@_route("DELETE", "/api/repos/delete", "user")
def _delete_repo(request: Request) -> Reply:
    request.hub.store.delete(_named_repo(request)[0])
    return Reply.json({})


@_route("GET", "/api/models/{repo}/auth-check", "content")
@_route("GET", "/api/models/{repo}/auth-check/write", "write")
def _auth_check(request: Request) -> Reply:
    return Reply.json({})


# Revisions and listings ---------------------------------------------------------------------------------------------


@_route("GET", "/api/models/{repo}/refs", "read")
def _list_refs(request: Request) -> Reply:
    def refs(kind: str, prefix: str) -> list[dict[str, str]]:
        items = request.repo.state[kind].items()
        return [{"name": name, "ref": f"{prefix}/{name}", "targetCommit": sha} for name, sha in items]

    branches, tags = refs("branches", "refs/heads"), refs("tags", "refs/tags")
    return Reply.json({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})


@_route("POST", "/api/models/{repo}/branch/{branch}", "write")
def _create_branch(request: Request) -> Reply:
    start = request.repo.resolve(request.json().get("startingPoint", "main"))
    request.repo.set_ref("branches", request.args["branch"], start)
    return Reply.json({})


@_route("DELETE", "/api/models/{repo}/branch/{branch}", "write")
def _delete_branch(request: Request) -> Reply:
    if request.args["branch"] == "main":
        raise HubError(403, None, "The main branch cannot be deleted")
    request.repo.delete_ref("branches", request.args["branch"])
    return Reply.json({})


@_route("POST", "/api/models/{repo}/tag/{rev}", "write")
def _create_tag(request: Request) -> Reply:
    request.repo.set_ref("tags", request.json()["tag"], request.repo.resolve(request.args["rev"]))
    return Reply.json({})


@_route("DELETE", "/api/models/{repo}/tag/{tag}", "write")
def _delete_tag(request: Request) -> Reply:
    request.repo.delete_ref("tags", request.args["tag"])
    return Reply.json({})


@_route("GET", "/api/models/{repo}/commits/{rev}", "read")
def _list_commits(request: Request) -> Reply:
    authors = [{"user": request.hub.users[request.hub.token]}]
    commits = request.repo.history(request.repo.resolve(request.args["rev"]))
    fields = ("title", "message", "date")
    return Reply.json([{"id": c["sha"], "authors": authors, **{name: c[name] for name in fields}} for c in commits])


@_route("GET", "/api/models/{repo}/discussions", "read")
def _list_discussions(request: Request) -> Reply:
    return Reply.json({"discussions": [], "count": 0, "start": 0})


@_route("GET", "/api/models/{repo}/tree/{rev}/{path}", "read")
@_route("GET", "/api/models/{repo}/tree/{rev}", "read")
def _list_tree(request: Request) -> Reply:
    sha, folder = request.repo.resolve(request.args["rev"]), request.args.get("path", "").strip("/")
    items = tree_items(request.repo.files(sha), folder, request.flag("recursive"))
    if folder and not items:
        raise HubError(404, "EntryNotFound", f"{folder} does not exist on this revision", {"X-Repo-Commit": sha})
    return Reply.json(items)


@_route("POST", "/api/models/{repo}/paths-info/{rev}", "read")
def _paths_info(request: Request) -> Reply:
    files = request.repo.files(request.repo.resolve(request.args["rev"]))
    items = []
    for path in parse_qs(request.text()).get("paths", []):
        if path in files:
            items.append(file_item(path, files[path]))
        elif any(name.startswith(f"{path}/") for name in files):
            items.append(folder_item(path, files))
    return Reply.json(items)


@_route("GET", "/api/models/{repo}/revision/{rev}", "read")
@_route("GET", "/api/models/{repo}", "read")
def _model_info(request: Request) -> Reply:
    repo, state = request.repo, request.repo.state
    sha = repo.resolve(request.args.get("rev", "main"))
    siblings = [_sibling(path, entry, request.flag("blobs")) for path, entry in repo.files(sha).items()]
    info: dict[str, Any] = {
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.id.split("/")[0],
        "sha": sha,
        "siblings": siblings,
    }
    info |= {"private": state["private"], "gated": "manual" if state["gated"] else False, "disabled": False}
    info |= {"tags": [], "cardData": None, "downloads": 0, "likes": 0}
    return Reply.json({**info, "createdAt": state["created"], "lastModified": next(repo.history(sha))["date"]})


def _sibling(path: str, entry: Entry, with_blobs: bool) -> dict[str, Any]:
    """Describe a file as model info does, with sizes and hashes only where they are asked for."""
    if not with_blobs:
        return {"rfilename": path}
    lfs = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size} if entry.is_lfs else None
    return {"rfilename": path, "size": entry.size, "blobId": entry.git_oid, "lfs": lfs}


# Uploads and commits ------------------------------------------------------------------------------------------------


def _refuse_pull_requests(request: Request) -> None:
    """Never turn a pull request into a commit on the branch itself."""
    if request.flag("create_pr"):
        raise HubError(400, None, "The loopback Hub has no pull requests")


@_route("POST", "/api/models/{repo}/preupload/{rev}", "write")
def _preupload(request: Request) -> Reply:
    _refuse_pull_requests(request)
    files = request.repo.files(request.repo.resolve(request.args["rev"]))
    answers = []
    for item in request.json()["files"]:
        path, sample = item["path"], base64.b64decode(item["sample"])
        mode = "lfs" if is_lfs_upload(path, item["size"], sample, request.hub.lfs_threshold) else "regular"
        known = {"oid": files[path].etag} if path in files else {}
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
    return Reply.json({"files": answers})


@_route("POST", "/{repo}.git/info/lfs/objects/batch", "write")
def _lfs_batch(request: Request) -> Reply:
    payload = request.json()
    if payload["operation"] != "upload":
        raise HubError(400, None, "The loopback Hub serves LFS downloads through resolve alone")
    objects = [_lfs_object(request, item["oid"], item["size"]) for item in payload["objects"]]
    return Reply.json({"transfer": "basic", "objects": objects})


def _lfs_object(request: Request, oid: str, size: int) -> dict[str, Any]:
    """Say where to upload an LFS object, or that it is stored already."""
    if request.repo.blob_path(oid).is_file():
        return {"oid": oid, "size": size}
    signature = request.hub.sign(request.repo.id, oid, size)
    href = f"{request.hub.url}/lfs/{quote(request.repo.id)}/{oid}?size={size}&signature={signature}"
    return {"oid": oid, "size": size, "authenticated": True, "actions": {"upload": {"href": href}}}


@_route("PUT", "/lfs/{repo}/{oid}", "public")
def _lfs_put(request: Request) -> Reply:
    hub, repo_id, oid = request.hub, request.args["repo"], request.args["oid"]
    size, signature = int(request.query.get("size", ["-1"])[0]), request.query.get("signature", [""])[0]
    repo = hub.store.find(repo_id)
    if repo is None or not hmac.compare_digest(hub.sign(repo_id, oid, size), signature):
        raise HubError(403, None, "Invalid upload URL")
    repo.store_blob(request.body, oid, size)
    return Reply()


@_route("POST", "/api/models/{repo}/commit/{rev}", "write")
def _commit(request: Request) -> Reply:
    _refuse_pull_requests(request)
    lines = [json.loads(line) for line in request.text().splitlines() if line.strip()]
    if not lines or lines[0]["key"] != "header":
        raise HubError(400, None, "A commit starts with its header")
    operations = [(line["key"], _decoded(line["value"])) for line in lines[1:]]
    sha = request.repo.commit(request.args["rev"], lines[0]["value"], operations)
    url = f"{request.hub.url}/{request.repo.id}/commit/{sha}"
    return Reply.json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


def _decoded(value: dict[str, Any]) -> dict[str, Any]:
    """Decode the content of a file operation."""
    return {**value, "content": base64.b64decode(value["content"])} if "content" in value else value


# Downloads ----------------------------------------------------------------------------------------------------------


@_route("GET HEAD", "/{repo}/resolve/{rev}/{path}", "content")
def _resolve(request: Request) -> Reply:
    sha, path = request.repo.resolve(request.args["rev"]), request.args["path"]
    headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    entry = request.repo.files(sha).get(path)
    if entry is None:
        raise HubError(404, "EntryNotFound", f"{path} does not exist on this revision", {"X-Repo-Commit": sha})
    headers["ETag"] = f'"{entry.etag}"'
    if entry.is_lfs:
        headers |= {"X-Linked-Etag": f'"{entry.etag}"', "X-Linked-Size": str(entry.size)}
    start, stop, status = 0, entry.size, 200
    span = _span(request.headers.get("Range"), entry.size)
    if span is not None:
        start, stop, status = *span, 206
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{entry.size}"
    return Reply(status, b"", headers, request.repo.blob_path(entry.sha256), (start, stop - start))


def _span(header: str | None, size: int) -> tuple[int, int] | None:
    """Return the first and the last-plus-one byte that a Range header asks for, or None without one."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header or "")
    if match is None or not (match[1] or match[2]):
        return None
    start = int(match[1]) if match[1] else max(0, size - int(match[2]))
    stop = min(size, int(match[2]) + 1) if match[1] and match[2] else size
    if start >= stop:
        raise HubError(416, None, "Range not satisfiable", {"Content-Range": f"bytes */{size}"})
    return start, stop
