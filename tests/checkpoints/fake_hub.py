"""A Hugging Face Hub for tests: real HTTP on the loopback interface, for the unmodified client of huggingface_hub.

There are two servers, as in reality: the Hub (API, resolve) and its storage (LFS uploads and downloads), which must
never get a token. Every request belongs to a stage (STAGES), and `fail` makes the requests of a stage fail in a given
way.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from http.server import ThreadingHTTPServer

from fake_http import HubHandler, StorageHandler
from fake_repos import Fault, Repo

# Reading: the files of a revision, metadata of a file, a small file, a large file from the storage.
# Writing: create, validate (the card), preupload, batch (where to upload), upload, verify, commit, refs, tag.
STAGES = (
    "info", "head", "get", "storage_get",
    "create", "validate", "preupload", "batch", "upload", "verify", "commit", "refs", "tag", "tree",
)  # fmt: skip


class FakeHub:
    """The state of the Hub and its two servers; a context manager that runs the servers.

    Attributes:
        repos: by `org/name`.
        requests: how many requests of each stage arrived.
        faults: how many requests of each stage failed because of `fail`.
        stall_seconds: how long a stalled connection stays open without an answer.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.closed = threading.Event()
        self.reset()
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in (HubHandler, StorageHandler)]
        for server in self._servers:
            server.hub = self  # type: ignore[attr-defined]
            server.daemon_threads = True
            server.block_on_close = False

    def reset(self) -> None:
        """Delete all repositories, counts and planned faults."""
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.stall_seconds = 5.0
        self._planned: dict[str, Fault] = {}
        self._actions: dict[str, Callable[[], object]] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def storage(self) -> str:
        return f"http://127.0.0.1:{self._servers[1].server_address[1]}"

    def __enter__(self) -> FakeHub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fail(
        self, stage: str, kind: str | int, *, times: float = 1, retry_after: int | None = None, says: str = "injected"
    ) -> None:
        """Let the next `times` requests of a stage fail.

        If `kind` is a status, `retry_after` is its header and `says` its message, in which {} is replaced by the
        Authorization header of the request.
        """
        assert stage in STAGES, stage
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        self._planned[stage] = Fault(kind, times, headers, says)

    def before(self, stage: str, action: Callable[[], object]) -> None:
        """Call `action` once, when the next request of a stage has arrived and before it is answered."""
        assert stage in STAGES, stage
        self._actions[stage] = action

    def take_action(self, stage: str) -> Callable[[], object] | None:
        with self.lock:
            return self._actions.pop(stage, None)

    def recover(self) -> None:
        """Cancel all planned faults."""
        self._planned.clear()

    def take_fault(self, stage: str) -> Fault | None:
        with self.lock:
            self.requests[stage] += 1
            fault = self._planned.get(stage)
            if fault is None or fault.times <= 0:
                return None
            fault.times -= 1
            self.faults[stage] += 1
            return fault

    def contents(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository, without those that the Hub itself adds."""
        commit = self.repos[repo].at(revision)
        assert commit is not None
        return {name: blob.content for name, blob in commit.files.items() if name != ".gitattributes"}
