"""A store that is an organisation of the Hugging Face Hub: one model repository for each checkpoint.

Everything goes through huggingface_hub: its login, its cache, its transfer. What it cannot know is checked here: that
the bytes are the published ones, and that a commit holds the files of one publisher.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from filelock import FileLock
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import tqdm, validate_repo_id

from cnvzoo.checkpoints.folder import FILES, checkpoint_files, plain_name, read_verified
from cnvzoo.checkpoints.format import CheckpointError, FileFacts, StoreError
from cnvzoo.checkpoints.retry import Patience, redacted, secrets_in_use
from cnvzoo.checkpoints.store import Publication
from cnvzoo.files import expanded

T = TypeVar("T")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONFLICTS = (409, 412)  # another commit came first


@dataclass(frozen=True)
class _Head:
    """A repository at one commit: its files' sizes and hashes, sha256 for those in LFS, git's for others."""

    commit: str
    sizes: Mapping[str, int]
    sha256s: Mapping[str, str]
    git_hashes: Mapping[str, str]

    def has(self, name: str, content: bytes) -> bool:
        """Whether the repository's file is this one."""
        if self.sizes.get(name) != len(content):
            return False
        if name in self.sha256s:
            return self.sha256s[name] == hashlib.sha256(content).hexdigest()
        return self.git_hashes.get(name) == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubStore:
    """The model repositories `organisation/<name>`. See `cnvzoo.hub.Store` and `open_store`."""

    def __init__(
        self,
        organisation: str,
        revision: str | None = None,
        *,
        endpoint: str | None = None,
        cache_dir: str | Path | None = None,
        patience: Patience,
    ) -> None:
        self.organisation, self.revision = organisation, revision
        # huggingface_hub reads its environment once, when it is imported; here what holds now counts
        self._endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self._cache_dir = expanded(cache_dir or os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE)
        self._patience = patience
        self._api = HfApi(endpoint=self._endpoint, library_name="cnvzoo")

    @property
    def location(self) -> str:
        return f"hf://{self.organisation}" + (f"@{self.revision}" if self.revision else "")

    def fetch(self, name: str, files: Mapping[str, FileFacts]) -> Path:
        repo = self._repo(name)
        for file in files:
            plain_name(file, f"a file of {name}")
        if folder := self._cached(repo, files):
            return folder
        try:
            lock = self._cache_dir / ".locks" / repo_folder_name(repo_id=repo, repo_type="model") / "cnvzoo.lock"
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):  # one process downloads, and throws away; the others find what it has fetched
                return self._cached(repo, files) or self._download(repo, files)
        except OSError as error:
            raise StoreError(
                f"{repo}: the cache {self._cache_dir} cannot be written ({error.strerror}): allow it, or choose "
                "another folder with HF_HUB_CACHE"
            ) from None

    def publish(
        self, folder: str | Path, *, message: str, tag: str | None = None, dry_run: bool = False
    ) -> Publication:
        folder = Path(folder)
        if self.revision is not None:
            raise StoreError(f"{self.location} is one revision, for reading: publish to hf://{self.organisation}")
        if tag is not None:
            plain_name(tag, "tag")
        files = checkpoint_files(folder)
        repo = self._repo(folder.resolve().name)
        before = self._head(repo, may_be_missing=True)
        publication = self._compare(repo, files, before, tag)
        tagged = self._tags(repo).get(tag) if tag and before else None
        if tagged is not None and (publication.to_write or not before or tagged != before.commit):
            raise StoreError(
                f"{repo}: tag {tag} stands at commit {tagged[:12]} already, where other files are, and a tag is never "
                "moved: choose a new one; nothing was published"
            )
        if dry_run:
            return replace(publication, dry_run=True)
        commit = before.commit if before else None
        if publication.to_write:
            commit = self._commit(repo, files, message, exists=before is not None)
            publication = replace(publication, commit=commit)
        if tag and commit and tagged is None:
            self._tag(repo, tag, commit)
        return publication

    # Reading

    def _cached(self, repo: str, files: Mapping[str, FileFacts]) -> Path | None:
        """A snapshot in the cache with all the files, proven; no request is made."""
        for folder in sorted(self._snapshots(repo).glob("*")):
            if all(_differs(folder / file, facts) is None for file, facts in files.items()):
                return folder
        return None

    def _download(self, repo: str, files: Mapping[str, FileFacts]) -> Path:
        head = self._head(repo)
        assert head is not None
        for file, facts in files.items():
            if file not in head.sizes:
                raise StoreError(
                    f"{self._asked(repo, file)}: commit {head.commit[:12]} has no such file. {self._other()}"
                )
            if head.sizes[file] != facts.size or head.sha256s.get(file, facts.sha256) != facts.sha256:
                raise StoreError(
                    f"{self._asked(repo, file)}: commit {head.commit[:12]} has another file than this cnvzoo knows "
                    f"({head.sizes[file]:,} bytes, and {facts.size:,} were expected, sha256 {facts.sha256[:16]}...). "
                    f"{self._other()}"
                )
        for file, facts in files.items():
            self._download_file(repo, file, facts, head.commit)
        return self._snapshots(repo) / head.commit

    def _download_file(self, repo: str, file: str, facts: FileFacts, commit: str) -> None:
        asked, path = self._asked(repo, file), self._snapshots(repo) / commit / file

        def get() -> None:
            self._api.hf_hub_download(
                repo, file, revision=commit, cache_dir=self._cache_dir, etag_timeout=self._patience.read_timeout
            )

        self._ask(asked, get)
        if _differs(path, facts):
            _throw_away(path)
            self._ask(asked, get)
            if problem := _differs(path, facts):
                _throw_away(path)
                raise StoreError(f"{asked}: what came is not the published file, twice: {problem}. {self._other()}")

    def _snapshots(self, repo: str) -> Path:
        return self._cache_dir / repo_folder_name(repo_id=repo, repo_type="model") / "snapshots"

    def _other(self) -> str:
        if self.revision:
            return "Choose the revision that belongs to this cnvzoo, or another store with hub= or CNVZOO_HUB"
        return (
            f"Update cnvzoo, or choose the release that belongs to this one: hub='{self.location}@TAG', or CNVZOO_HUB"
        )

    # Writing

    def _commit(self, repo: str, files: Mapping[str, bytes], message: str, *, exists: bool) -> str:
        """Bring the repository to these files in one commit on top of what it has then; the commit's id.

        Asked again, it reads again first: what another publisher did is compared with, and a commit whose answer was
        lost on the way is found rather than made twice.
        """
        asked = self._asked(repo, "a commit")

        def create() -> None:
            with _patient_session(self._patience.write_timeout):
                self._api.create_repo(repo, exist_ok=True)

        def commit() -> str:
            head = self._head(repo)
            assert head is not None
            differing = [name for name in FILES if not head.has(name, files[name])]
            if not differing:
                return head.commit
            size = sum(len(files[name]) for name in differing)
            bar = tqdm(total=size, desc=repo, unit="B", unit_scale=True, delay=2, leave=False, disable=None)
            # file objects, because bytes and paths go through Xet, which only the Hub itself has
            additions = [CommitOperationAdd(name, _Watched(files[name], bar)) for name in differing]
            with bar, _patient_session(self._patience.write_timeout):
                made = self._api.create_commit(
                    repo, additions, commit_message=message, parent_commit=head.commit
                )  # fmt: skip
            return _checked_commit(made.oid)

        if not exists:
            self._ask(self._asked(repo, "a new repository"), create)
        made = self._ask(asked, commit, again_on=_CONFLICTS)
        after = self._head(repo, revision=made)
        assert after is not None
        if wrong := [name for name in FILES if not after.has(name, files[name])]:
            raise StoreError(
                f"{asked}: commit {made[:12]} was made, and {', '.join(wrong)} in it is not what was sent: "
                "publish again"
            )
        return made

    def _tags(self, repo: str) -> dict[str, str]:
        def get() -> dict[str, str]:
            with _patient_session(self._patience.read_timeout):
                return {ref.name: _checked_commit(ref.target_commit) for ref in self._api.list_repo_refs(repo).tags}

        return self._ask(self._asked(repo, "its tags"), get)

    def _tag(self, repo: str, tag: str, commit: str) -> None:
        def create() -> None:
            standing = self._tags(repo).get(tag)
            if standing == commit:
                return
            if standing is not None:
                raise StoreError(
                    f"{repo}: tag {tag} was set at commit {standing[:12]} by somebody else meanwhile, and the files "
                    f"are in commit {commit[:12]}: choose a new tag"
                )
            with _patient_session(self._patience.write_timeout):
                self._api.create_tag(repo, tag=tag, revision=commit)

        self._ask(self._asked(repo, f"tag {tag}"), create, again_on=_CONFLICTS)

    def _compare(self, repo: str, files: Mapping[str, bytes], head: _Head | None, tag: str | None) -> Publication:
        present = [name for name in FILES if head and name in head.sizes]
        same = [name for name in present if head and head.has(name, files[name])]
        return Publication(
            name=repo.split("/")[1],
            location=self.location,
            new=tuple(name for name in FILES if name not in present),
            changed=tuple(name for name in present if name not in same),
            unchanged=tuple(same),
            tag=tag,
        )

    # Both

    def _head(self, repo: str, *, revision: str | None = None, may_be_missing: bool = False) -> _Head | None:
        """The repository at `revision`, at the store's by default; None if it is missing and that is allowed."""

        def get() -> _Head | None:
            try:
                info = self._api.model_info(
                    repo, revision=revision or self.revision, files_metadata=True, timeout=self._patience.read_timeout
                )
            except RepositoryNotFoundError:
                if may_be_missing:
                    return None
                raise
            siblings = info.siblings or []
            return _Head(
                commit=_checked_commit(info.sha),
                sizes={file.rfilename: int(file.size or 0) for file in siblings},
                sha256s={file.rfilename: file.lfs.sha256 for file in siblings if file.lfs},
                git_hashes={file.rfilename: file.blob_id for file in siblings if file.blob_id},
            )

        return self._ask(self._asked(repo, "its files"), get)

    def _ask(self, asked: str, request: Callable[[], T], *, again_on: Collection[int] = ()) -> T:
        secrets = secrets_in_use(self._endpoint)
        return self._patience.ask(asked, request, again_on=again_on, secrets=secrets)

    def _repo(self, name: str) -> str:
        repo = f"{self.organisation}/{plain_name(name, 'checkpoint')}"
        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise StoreError(f"{repo}: not the name of a repository, as the Hub wants them: {error}") from None
        return repo

    def _asked(self, repo: str, what: str) -> str:
        return f"{repo}: {what} was asked of {redacted(self._endpoint)}" + (
            f" at {self.revision}" if self.revision else ""
        )


def _checked_commit(said: object) -> str:
    """What a server says is a commit, if it can be one. It is part of paths and of messages."""
    if not isinstance(said, str) or not _COMMIT.fullmatch(said):
        raise ValueError(f"{said!r} is not a commit")
    return said


def _differs(path: Path, facts: FileFacts) -> str | None:
    """What tells the cached file apart from the published one; None if it is that one."""
    try:
        read_verified(path, facts)
    except CheckpointError as error:
        return str(error)
    return None


def _throw_away(path: Path) -> None:
    """Remove a cached file and the blob that it stands for, so that both are fetched anew."""
    if path.is_symlink() and path.resolve().parent == (path.parents[2] / "blobs").resolve():
        path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


class _Watched(io.BytesIO):
    """A file in memory whose readers move a progress bar, back as well, where they begin again."""

    def __init__(self, content: bytes, bar: tqdm) -> None:
        super().__init__(content)
        self._bar, self._shown = bar, 0

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        self._bar.update(self.tell() - self._shown)
        self._shown = self.tell()
        return content


@contextmanager
def _patient_session(timeout: float) -> Iterator[None]:
    """Within, a request without a timeout of its own is given up after so many seconds without a byte.

    huggingface_hub sets none for uploads: a server that stops answering would be waited for until the end of days.
    What it says about file objects not going through Xet is left out: that is on purpose.
    """
    session, log = get_session(), logging.getLogger("huggingface_hub._commit_api")
    before, session.timeout = session.timeout, timeout
    log.addFilter(_is_not_about_xet)
    try:
        yield
    finally:
        session.timeout = before
        log.removeFilter(_is_not_about_xet)


def _is_not_about_xet(record: logging.LogRecord) -> bool:
    return "not supported by Xet" not in record.getMessage()
