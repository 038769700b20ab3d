"""The HTTP handlers of the fake Hub: the answer to each request, and the planned faults."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import yaml
from fake_repos import Blob, Commit, Fault, Repo

if TYPE_CHECKING:
    from fake_hub import FakeHub

GOOD_TOKEN, READ_TOKEN = "hf_may_write", "hf_may_only_read"
LFS_SUFFIXES = (".safetensors",)

_sleep = time.sleep  # kept because tests replace time.sleep to shorten the waits of the client


class Cut(Exception):
    """The connection is to be closed without an answer, or in the middle of one."""


class Handler(BaseHTTPRequestHandler):
    """Handles one request: finds its stage, applies the fault planned for that stage, and answers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # small answers in two writes would wait for the other side otherwise
    routes: tuple[tuple[str, str, str, str], ...] = ()  # method, path, stage, name of the method that answers

    @property
    def hub(self) -> FakeHub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.fault: Fault | None = None
        try:
            for method, pattern, stage, answer in self.routes:
                if self.command == method and (match := re.fullmatch(pattern, path)):
                    self._perform(stage, getattr(self, answer), match.groupdict())
                    return
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.refuse(404, f"the fake hub knows no {self.command} {path}")
        except (Cut, OSError):
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def _perform(self, stage: str, answer: Callable[..., None], arguments: dict[str, str]) -> None:
        self.fault = self.hub.take_fault(stage)
        length = int(self.headers.get("Content-Length") or 0)
        if self.fault and self.fault.kind == "cut":
            self.rfile.read(length // 2)
            raise Cut
        if self.fault and self.fault.kind == "stall":
            self.hub.closed.wait(self.hub.stall_seconds)
            raise Cut
        self.body = self.rfile.read(length)
        if action := self.hub.take_action(stage):
            action()
        if self.fault and self.fault.kind == "wrong" and self.body and stage == "upload":
            self.body = self.body[:-1] + bytes([self.body[-1] ^ 1])
        if self.fault and isinstance(self.fault.kind, int):
            headers, status, says = self.fault.headers, self.fault.kind, self.fault.says
            self.fault = None
            if status == 404:
                headers = {"X-Error-Code": "EntryNotFound" if stage in ("head", "get") else "RepoNotFound"} | headers
            self.refuse(status, says.format(self.headers.get("Authorization")), headers)
            return
        answer(**arguments)

    def refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self.answer(json.dumps({"error": message}).encode(), status=status, headers=headers)

    def answer_json(self, value: object, status: int = 200) -> None:
        self.answer(json.dumps(value).encode(), status=status)

    def answer(self, body: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Send a response, changed or cut as the fault of this request demands."""
        kind = self.fault.kind if self.fault else None
        if kind == "cut_after":
            raise Cut
        if kind == "wrong" and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            if kind == "truncated":
                raise Cut
            return
        if kind == "truncated":
            self.wfile.write(body[: len(body) // 2])
            raise Cut
        step = -(-len(body) // 8) if kind == "drip" and body else len(body)
        for start in range(0, len(body), step or 1):
            self.wfile.write(body[start : start + step])
            self.wfile.flush()
            if kind == "drip":
                _sleep(0.005)


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_API = rf"/api/models/{_REPO}"


class HubHandler(Handler):
    """The API of the Hub and its files; writing needs a token that may write."""

    routes = (
        ("GET", _API, "info", "info"),
        ("GET", rf"{_API}/revision/(?P<revision>.+)", "info", "info"),
        ("HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "head", "resolve"),
        ("GET", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "get", "resolve"),
        ("GET", rf"{_API}/tree/(?P<revision>[^/]+)", "tree", "tree"),
        ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", "tree", "paths_info"),
        ("GET", rf"{_API}/refs", "refs", "refs"),
        ("POST", r"/api/repos/create", "create", "create"),
        ("POST", r"/api/validate-yaml", "validate", "validate"),
        ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", "preupload", "preupload"),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "batch", "batch"),
        ("POST", rf"/{_REPO}/verify", "verify", "verify"),
        ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", "commit", "commit"),
        ("POST", rf"{_API}/tag/(?P<revision>[^/]+)", "tag", "tag"),
    )

    # Reading

    def _find(self, repo: str, revision: str) -> Commit | None:
        """The commit; None if there is none, which has then been answered."""
        if repo not in self.hub.repos:
            status = 404 if self.headers.get("Authorization") else 401
            self.refuse(status, "Repository not found", {"X-Error-Code": "RepoNotFound"})
            return None
        commit = self.hub.repos[repo].at(revision)
        if commit is None:
            self.refuse(404, f"Invalid rev id: {revision}", {"X-Error-Code": "RevisionNotFound"})
        return commit

    def info(self, repo: str, revision: str = "main") -> None:
        if commit := self._find(repo, revision):
            siblings = [{"rfilename": name, **blob.described()} for name, blob in commit.files.items()]
            self.answer_json({"id": repo, "modelId": repo, "sha": commit.id, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str) -> None:
        if commit := self._find(repo, revision):
            files = commit.files.items()
            self.answer_json([{"type": "file", "path": name, **blob.described()} for name, blob in files])

    def paths_info(self, repo: str, revision: str) -> None:
        if commit := self._find(repo, revision):
            wanted = re.findall(r"paths=([^&]+)", unquote(self.body.decode().replace("+", " ")))
            files = [(name, commit.files[name]) for name in wanted if name in commit.files]
            self.answer_json([{"type": "file", "path": name, **blob.described()} for name, blob in files])

    def refs(self, repo: str) -> None:
        if head := self._find(repo, "main"):
            found = self.hub.repos[repo]
            branches, tags = (
                [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit} for name, commit in refs.items()]
                for kind, refs in (("heads", {"main": head.id} | found.branches), ("tags", found.tags))
            )
            self.answer_json({"branches": branches, "converts": [], "tags": tags})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        commit = self._find(repo, revision)
        if commit is None:
            return
        headers = {"X-Repo-Commit": commit.id}
        blob = commit.files.get(path)
        if blob is None:
            self.refuse(404, "Entry not found", {"X-Error-Code": "EntryNotFound", **headers})
        elif blob.is_lfs:
            location = f"{self.hub.storage}/objects/{blob.sha256}"
            linked = {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
            self.answer(b"", status=302, headers={**headers, **linked, "Location": location})
        else:
            answer_range(self, blob.content, {**headers, "ETag": f'"{blob.etag}"'})

    # Writing

    def _may_write(self, repo: str | None = None) -> bool:
        """Whether the token may write; if it may not, that has been answered."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if not token:
            self.refuse(401, "Invalid username or password.")
        elif token == READ_TOKEN:
            self.refuse(403, "You don't have the rights to do this")
        elif token != GOOD_TOKEN:
            self.refuse(401, "Invalid credentials in Authorization header")
        elif repo is not None and repo not in self.hub.repos:
            self.refuse(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
        else:
            return True
        return False

    def create(self) -> None:
        if not self._may_write():
            return
        wanted = json.loads(self.body)
        repo = f"{wanted['organization']}/{wanted['name']}"
        url = f"{self.hub.endpoint}/{repo}"
        with self.hub.lock:
            if repo in self.hub.repos:
                self.answer_json({"error": "You already created this model repo", "url": url}, 409)
                return
            attributes = "".join(f"*{suffix} filter=lfs\n" for suffix in LFS_SUFFIXES)
            first = Commit("initial commit", None, {".gitattributes": Blob(attributes.encode(), is_lfs=False)})
            self.hub.repos[repo] = Repo([first])
        self.answer_json({"url": url, "name": repo, "id": repo})

    def validate(self) -> None:
        card = json.loads(self.body)["content"]
        try:
            metadata = yaml.safe_load(card.split("---\n")[1])
            errors = [] if isinstance(metadata["license"], str) else [{"message": '"license" must be a string'}]
        except (IndexError, KeyError, TypeError, yaml.YAMLError) as error:
            errors = [{"message": f"no metadata: {error}"}]
        self.answer_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo: str, revision: str) -> None:
        if self._may_write(repo) and (commit := self._find(repo, revision)):
            files = []
            for file in json.loads(self.body)["files"]:
                blob, mode = commit.files.get(file["path"]), "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
                files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
                files[-1] |= {"oid": blob.etag} if blob else {}
            self.answer_json({"files": files})

    def batch(self, repo: str) -> None:
        if not self._may_write(repo):
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.storage}/upload/{wanted['oid']}"}
            verify = {"href": f"{self.hub.endpoint}/{repo}/verify"}
            known = wanted["oid"] in self.hub.objects
            objects.append(wanted | ({} if known else {"actions": {"upload": upload, "verify": verify}}))
        self.answer_json({"transfer": "basic", "objects": objects})

    def verify(self, repo: str) -> None:
        if self._may_write(repo):
            wanted = json.loads(self.body)
            if len(self.hub.objects.get(wanted["oid"], b"")) == wanted["size"]:
                self.answer_json({})
            else:
                self.refuse(400, "the object was not uploaded")

    def commit(self, repo: str, revision: str) -> None:
        if not self._may_write(repo):
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            commits = self.hub.repos[repo].commits
            if header.get("parentCommit", commits[-1].id) != commits[-1].id:
                self.refuse(412, "A commit has happened since. Please refresh and try again.")
                return
            try:
                files = commits[-1].files | dict(self._added(lines))
            except (KeyError, binascii.Error) as error:
                self.refuse(400, f"a file is missing, or not as announced: {error}")
                return
            commits.append(Commit(header["summary"], commits[-1].id, files))
            made = commits[-1].id
        self.answer_json({"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{made}", "commitOid": made, "success": True})

    def _added(self, lines: list[dict[str, Any]]) -> Iterator[tuple[str, Blob]]:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                yield value["path"], Blob(base64.b64decode(value["content"], validate=True), is_lfs=False)
            elif line["key"] == "lfsFile":
                yield value["path"], Blob(self.hub.objects[value["oid"]], is_lfs=True)

    def tag(self, repo: str, revision: str) -> None:
        if not self._may_write(repo):
            return
        name = json.loads(self.body)["tag"]
        with self.hub.lock:
            tags, commit = self.hub.repos[repo].tags, self._find(repo, revision)
            if commit and name in tags:
                self.refuse(409, f"Tag reference exists already: {name}")
            elif commit:
                tags[name] = commit.id
                self.answer_json({})


class StorageHandler(Handler):
    """The storage of large files, by their sha256; it refuses requests with a token, which must not be sent here."""

    routes = (
        ("GET", r"/objects/(?P<oid>[0-9a-f]{64})", "storage_get", "download"),
        ("PUT", r"/upload/(?P<oid>[0-9a-f]{64})", "upload", "upload"),
    )

    def _token_leaked(self) -> bool:
        if leaked := "Authorization" in self.headers:
            self.refuse(400, "a token was sent to the storage")
        return leaked

    def download(self, oid: str) -> None:
        if not self._token_leaked():
            answer_range(self, self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def upload(self, oid: str) -> None:
        if self._token_leaked():
            return
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.refuse(400, "the content does not have the sha256 of its name")
            return
        self.hub.objects[oid] = self.body
        self.answer(b"")


def answer_range(handler: Handler, content: bytes, headers: dict[str, str]) -> None:
    """Answer with all of `content`, or with the range that was asked for."""
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range") or "")
    if wanted is None:
        handler.answer(content, headers={"Accept-Ranges": "bytes", **headers})
        return
    first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
    if first > last:
        handler.answer(b"", status=416, headers={"Content-Range": f"bytes */{len(content)}"})
        return
    span = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
    handler.answer(content[first : last + 1], status=206, headers={**span, **headers})
