"""A store that is an organisation of the Hugging Face Hub: one model repository for each checkpoint.

huggingface_hub does login, cache, transfer and the retries of transfers. Added here: each file is compared with the
index, a commit holds the files of one publisher, and a tag is never moved. Files are fetched one by one, not with
`snapshot_download`, which returns a cached folder without all of the files where their list cannot be fetched.
Uploads and the list of tags have no timeout, because huggingface_hub offers none.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import validate_repo_id

from cnvzoo.checkpoints.folder import FILES, checkpoint_files, plain_name, read_verified
from cnvzoo.checkpoints.format import CheckpointError, FileFacts, StoreError
from cnvzoo.checkpoints.retry import RetryPolicy, redacted
from cnvzoo.checkpoints.store import Publication
from cnvzoo.files import expanded

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONFLICTS = (409, 412)  # another publisher was faster
_OTHER_RELEASE = "Update cnvzoo, or choose the release that belongs to it with hub='hf://ORG@TAG' or CNVZOO_HUB"


@dataclass(frozen=True)
class _Snapshot:
    """A repository at one commit, with size and hash of each file."""

    commit: str
    files: Mapping[str, RepoSibling]

    def has(self, name: str, content: bytes) -> bool:
        """Whether the repository's file has this content, by its sha256 in LFS, else by git's hash."""
        file = self.files.get(name)
        if file is None or file.size != len(content):
            return False
        if file.lfs:
            return file.lfs.sha256 == hashlib.sha256(content).hexdigest()
        return file.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def has_all(self, files: Mapping[str, bytes]) -> bool:
        """Whether these files of the repository have these contents; others that are in it do not matter."""
        return all(self.has(name, content) for name, content in files.items())


class HubStore:
    """The model repositories `organisation/<name>`; arguments and errors are those of `open_store`."""

    def __init__(
        self,
        organisation: str,
        revision: str | None = None,
        *,
        endpoint: str | None = None,
        cache_dir: str | Path | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        self.organisation, self.revision = organisation, revision
        # huggingface_hub reads these variables only when it is imported.
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self.cache_dir = expanded(cache_dir or os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE)
        if redacted(self.endpoint) != self.endpoint:
            raise StoreError(
                f"{redacted(self.endpoint)}: HF_ENDPOINT has a user name or password, which logs would show: leave it "
                "out, and log in with 'hf auth login'"
            )
        self._retry = retry or RetryPolicy()
        self._api = HfApi(endpoint=self.endpoint, library_name="cnvzoo")

    @property
    def location(self) -> str:
        return f"hf://{self.organisation}" + (f"@{self.revision}" if self.revision else "")

    def fetch(self, name: str, files: Mapping[str, FileFacts]) -> Path:
        repo = self._repo(name)
        for file in files:
            plain_name(file, f"a file of {name}")
        for folder in sorted(self._snapshots(repo).glob("*")):
            if not _damaged(folder, files):
                return folder
        return self._download(repo, files)

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
        before = self._find(repo)
        present = [file for file in FILES if before and file in before.files]
        same = [file for file in present if before and before.has(file, files[file])]
        publication = Publication.of_comparison(folder.resolve().name, self.location, present, same, tag=tag)
        tagged = self._find_tag(repo, tag, is_new=before is None) if tag else None
        if tagged and not tagged.has_all(files):
            raise StoreError(
                f"{repo}: tag {tag} is at commit {tagged.commit[:12]} with other files, and a tag is never moved: "
                "choose a new one; nothing was published"
            )
        if dry_run:
            return replace(publication, dry_run=True)
        commit = before.commit if before else None
        if publication.to_write:
            commit = self._commit(repo, files, message, is_new=before is None)
            publication = replace(publication, commit=commit)
        if tag and commit and not tagged:
            self._tag(repo, tag, commit, files)
        return publication

    def _download(self, repo: str, files: Mapping[str, FileFacts]) -> Path:
        """The folder of the files in the cache. What is damaged, on the way or in the cache, is fetched once more."""
        snapshot = self._retry.call(self._get(repo), partial(self._snapshot, repo, self.revision))
        for file, facts in files.items():
            self._check_published(repo, file, facts, snapshot)
        folder, wrong = self._snapshots(repo) / snapshot.commit, dict.fromkeys(files, "")
        for force in (False, True):
            for file in wrong:
                if force and not (folder / file).is_symlink():  # huggingface_hub replaces only what links lead to
                    try:
                        (folder / file).unlink(missing_ok=True)
                    except OSError as error:  # a folder is in its place, or it may not be changed
                        raise StoreError(
                            f"{folder / file}: cannot be replaced ({error.strerror}): delete it, or choose another "
                            "cache with HF_HUB_CACHE"
                        ) from None
                download = partial(
                    self._api.hf_hub_download, repo, file, revision=snapshot.commit, cache_dir=self.cache_dir,
                    etag_timeout=self._retry.timeout, force_download=force,
                )  # fmt: skip
                self._retry.call(self._get(repo, file), download)
            if not (wrong := _damaged(folder, files)):
                return folder
        problems = "; ".join(wrong.values())
        raise StoreError(f"{self._get(repo)} failed: the wrong bytes came twice: {problems}. {_OTHER_RELEASE}")

    def _check_published(self, repo: str, file: str, facts: FileFacts, snapshot: _Snapshot) -> None:
        """Raise StoreError before anything is downloaded where the repository has another file, or none."""
        found = snapshot.files.get(file)
        if found is None or found.size != facts.size or (found.lfs and found.lfs.sha256 != facts.sha256):
            content = "no such file" if found is None else f"another file of {found.size} bytes"
            raise StoreError(
                f"{self._get(repo, file)} failed: commit {snapshot.commit[:12]} has {content}, and the index of this "
                f"cnvzoo expects {facts.size} bytes with sha256 {facts.sha256[:16]}.... {_OTHER_RELEASE}"
            )

    def _snapshots(self, repo: str) -> Path:
        return self.cache_dir / repo_folder_name(repo_id=repo, repo_type="model") / "snapshots"

    def _commit(self, repo: str, files: Mapping[str, bytes], message: str, *, is_new: bool) -> str:
        """Bring the repository to these files in one commit; returns its id.

        Every attempt compares with the newest commit, which becomes the parent: so the files of two publishers do not
        mix, and a commit whose response was lost is not made twice.
        """

        def commit() -> str:
            head = self._snapshot(repo, None)
            changed = [name for name in FILES if not head.has(name, files[name])]
            if not changed:
                return head.commit
            additions = [CommitOperationAdd(name, files[name]) for name in changed]
            made = self._api.create_commit(repo, additions, commit_message=message, parent_commit=head.commit)
            return _checked_commit(made.oid)

        if is_new:
            self._retry.call(f"Creating {repo} at {self.endpoint}", partial(self._api.create_repo, repo, exist_ok=True))
        return self._retry.call(f"Commit to {repo} at {self.endpoint}", commit, retry_on=_CONFLICTS)

    def _tag(self, repo: str, tag: str, commit: str, files: Mapping[str, bytes]) -> None:
        def create() -> None:
            found = self._tagged(repo, tag)
            if found is None:
                self._api.create_tag(repo, tag=tag, revision=commit)
                return
            if not found.has_all(files):
                raise StoreError(
                    f"{repo}: somebody else has set tag {tag} at commit {found.commit[:12]} meanwhile, and the files "
                    f"are in commit {commit[:12]}: choose a new tag"
                )

        self._retry.call(f"Tag {tag} of {repo} at {self.endpoint}", create, retry_on=_CONFLICTS)

    def _find(self, repo: str) -> _Snapshot | None:
        def find() -> _Snapshot | None:
            try:
                return self._snapshot(repo, None)
            except RepositoryNotFoundError:
                return None

        return self._retry.call(self._get(repo), find)

    def _find_tag(self, repo: str, tag: str, *, is_new: bool) -> _Snapshot | None:
        """The repository at a tag, None where it has no such tag. Raises StoreError for the name of a branch."""
        if tag == constants.DEFAULT_REVISION:  # the branch that a new repository will have
            raise _is_branch(repo, tag)
        return None if is_new else self._retry.call(self._get(repo), partial(self._tagged, repo, tag))

    def _tagged(self, repo: str, tag: str) -> _Snapshot | None:
        refs = self._api.list_repo_refs(repo)  # as a revision, the name of a branch or a commit would be found too
        if tag in {branch.name for branch in refs.branches}:
            raise _is_branch(repo, tag)
        return self._snapshot(repo, tag) if tag in {known.name for known in refs.tags} else None

    def _snapshot(self, repo: str, revision: str | None) -> _Snapshot:
        info = self._api.model_info(repo, revision=revision, files_metadata=True, timeout=self._retry.timeout)
        return _Snapshot(_checked_commit(info.sha), {file.rfilename: file for file in info.siblings or []})

    def _repo(self, name: str) -> str:
        repo = f"{self.organisation}/{plain_name(name, 'checkpoint')}"
        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise StoreError(f"{repo}: not a valid name of a repository on the Hub: {error}") from None
        return repo

    def _get(self, repo: str, file: str | None = None) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"GET {repo}{revision}{f'/{file}' if file else ''} from {self.endpoint}"


def _checked_commit(commit: object) -> str:
    """A commit id from a server. It becomes part of paths and messages, so anything else is a ValueError."""
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise ValueError(f"{commit!r} is not a commit")
    return commit


def _is_branch(repo: str, tag: str) -> StoreError:
    return StoreError(f"{repo}: {tag} is a branch, and a tag needs a name of its own: choose another one")


def _damaged(folder: Path, files: Mapping[str, FileFacts]) -> dict[str, str]:
    """The files that are not in `folder` as they were published, each with what is wrong."""
    wrong = {}
    for file, facts in files.items():
        try:
            read_verified(folder / file, facts)
        except CheckpointError as error:
            wrong[file] = str(error)
    return wrong
