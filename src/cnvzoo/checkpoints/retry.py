"""Calls to the Hugging Face Hub: retried where that can help, and reported in one line without credentials.

huggingface_hub retries uploads and downloads, but not requests for metadata, new repositories or tags; and its errors
are long and may quote a token that the server sent back.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, TypeVar

from cnvzoo.checkpoints.format import StoreError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

T = TypeVar("T")
_LONGEST_QUOTE = 300  # characters
_LONGEST_REDACTED = 4000  # characters; the time of redacting may grow with their square
_DISK_PROBLEMS = frozenset((errno.EROFS, errno.ENOSPC, errno.EDQUOT))
_SETTINGS = "Check HF_TOKEN, HF_ENDPOINT, SSL_CERT_FILE and the proxy variables"
_OTHER_STORE = "choose a directory with hub= or CNVZOO_HUB"

# User and password in a URL. A password may have an unescaped @ or /; host:port/path@x is not one. The length of the
# scheme is limited, so that the time is in proportion to that of the text.
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30}:/+)([^\s/?#\"<>]*|[^\s/?#\"<>:]*:(?!\d+/)[^\s\"<>]*)@")
_END_OF_PASSWORD = re.compile(r"[\s\"<>]")  # what none has
_HEADER = re.compile(
    r"((?:proxy-)?authorization[\"']?\s*[:=,]\s*[\"']?)(?:(?:bearer|basic|digest|token)\s+)?[^\s\"',;)}\]]+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(\bbearer\s+)[^\s\"',;)}\]]+", re.IGNORECASE)
_TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_\w+(?:[.-]\w+)*")


@dataclass(frozen=True)
class RetryPolicy:
    """How long to wait for the Hub, and how often to try again.

    Attributes:
        tries: attempts in all, at least 1.
        first_wait: seconds before the second attempt; each further wait is twice as long.
        deadline: seconds since the first attempt after which no other one starts. A longer wait that the Hub asks for
            (Retry-After) is reported.
        timeout: seconds without a byte after which a request for metadata is given up.
    """

    tries: int = 4
    first_wait: float = 1.0
    deadline: float = 60.0
    timeout: float = 10.0

    def call(self, action: str, request: Callable[[], T], *, retry_on: Collection[int] = ()) -> T:
        """Return what `request` returns. Call it again where it fails for a reason that may pass.

        Args:
            action: what the request does and to which repository, for the message: `GET <repo>`.
            request: safe to repeat. Its StoreErrors are passed on.
            retry_on: HTTP statuses to retry on besides 408, 429 and 5xx.

        Raises:
            StoreError: it failed for good, or in the last attempt.
        """
        started, wait = time.monotonic(), self.first_wait
        for tries_left in reversed(range(self.tries)):
            try:
                return request()
            except StoreError:
                raise
            except Exception as error:  # of huggingface_hub, of its HTTP client, or from a response of another form
                failure = _failure(error)
            # Raised outside of `except`: a chained exception would print what is redacted here.
            pause = max(wait, failure.retry_after)
            too_late = time.monotonic() - started + pause > self.deadline
            if not tries_left or too_late or not (failure.may_pass or failure.status in retry_on):
                raise StoreError(f"{action} failed: {failure.reason}. {failure.remedy}")
            time.sleep(pause)
            wait *= 2
        raise AssertionError("tries is at least 1")


def redacted(text: str) -> str:
    """`text` with asterisks in the place of credentials.

    These are user and password in a URL, the value of an Authorization header, what follows `Bearer`, and tokens of the
    Hub (`hf_...`).
    """
    text = _USER.sub(r"\1***@", text)
    text = _HEADER.sub(r"\1***", text)
    text = _BEARER.sub(r"\1***", text)
    return _TOKEN.sub("***", text)


@dataclass(frozen=True)
class _Failure:
    """Why a request failed, what the user can do, and whether another attempt may succeed."""

    reason: str
    remedy: str
    may_pass: bool = False
    status: int | None = None
    retry_after: float = 0.0  # seconds


def _failure(error: Exception) -> _Failure:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError):
            return _http_failure(cause)
        if isinstance(cause, OfflineModeIsEnabled):
            return _Failure("HF_HUB_OFFLINE is set, and the file is not in the cache", f"Unset it, or {_OTHER_STORE}")
        if isinstance(cause, OSError) and (cause.errno in _DISK_PROBLEMS or cause.filename is not None):
            place = f" ({cause.filename})" if cause.filename else ""
            remedy = "Free some space or allow writing there, or choose another folder with HF_HUB_CACHE"
            return _Failure(f"a local file cannot be written: {cause.strerror}{place}", remedy)
        if _is_of_settings(cause):
            return _Failure(f"no request can be made ({type(cause).__name__}: {_quoted(cause)})", _SETTINGS)
    *_, origin = _causes(error)
    reason = f"no response, or an incomplete one ({type(origin).__name__}: {_quoted(origin)})"
    remedy = f"Check the network and its proxy, then try again, or {_OTHER_STORE}"
    if "/xet-" in reason:
        remedy = "If the server has no Xet storage, set HF_HUB_DISABLE_XET=1"
    return _Failure(reason, remedy, may_pass=True)


def _is_of_settings(error: BaseException) -> bool:
    """Whether a request failed before it was sent: for the token, an address, a certificate or a proxy."""
    if isinstance(error, UnicodeError):
        return not isinstance(error, UnicodeDecodeError)  # of a response
    if type(error) is FileNotFoundError:  # huggingface_hub derives from it the error for no network
        return error.filename is None
    return isinstance(error, ImportError) or type(error).__name__ in ("UnsupportedProtocol", "InvalidURL")  # of httpx


def _http_failure(error: HfHubHTTPError) -> _Failure:
    status, headers = error.response.status_code, error.response.headers
    phrase = f" {HTTPStatus(status).phrase}" if status in HTTPStatus._value2member_map_ else ""
    message = f" ({_quoted(error.server_message)})" if error.server_message else ""
    after = headers.get("Retry-After", "")
    wait = float(after) if after.isdecimal() else 0.0
    remedy = _remedy(status, headers.get("X-Error-Code"), wait)
    return _Failure(f"{status}{phrase}{message}", remedy, status in (408, 429) or status >= 500, status, wait)


def _remedy(status: int, code: str | None, wait: float) -> str:
    if code == "RepoNotFound" and status in (401, 404):
        return "There is no such repository, or it is private: check the name, or log in with 'hf auth login'"
    if status == 401:
        return "There is no valid token: log in with 'hf auth login'"
    if status == 403:
        return "The account may not do this: log in with 'hf auth login' and a token that can write"
    if status == 404:
        return "Check the name and the revision"
    if status in (409, 412):
        return "Somebody else is publishing to the same repository: try again later"
    if status == 429:
        when = f"in {wait:.0f} seconds" if wait else "in a few minutes"
        return f"Too many requests: try again {when}; the limit is higher after 'hf auth login'"
    if status >= 500:
        return "The Hub has a problem: try again in a few minutes"
    return "The Hub refused the request: try again, then update huggingface_hub"


def _quoted(message: object) -> str:
    """A message of the server or the HTTP client: on one line, without credentials and control characters, cut."""
    from huggingface_hub import get_token

    text, token = str(message), get_token()
    if token:
        text = text.replace(token, "***")  # before the cut, which could leave a part of it
    if len(text) > _LONGEST_REDACTED:  # without the last word, since a password ends with the @ that was cut off
        text = text[:_LONGEST_REDACTED]
        text = text[: max((found.end() for found in _END_OF_PASSWORD.finditer(text)), default=0)]
    text = " ".join(redacted(text).split())
    return "".join(character if character.isprintable() else "?" for character in text)[:_LONGEST_QUOTE]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__
