"""Credentials, taken out of text before it is printed.

A server may send back what it was sent, an exception of the transport may have the address that was asked, and an
address may have a password in it. Such text reaches our messages, and from there logs that others read.


Asking the Hub again when it makes sense, and saying in words what came back when it does not.

huggingface_hub raises its HfHubHTTPError for an answer that is an error. Whatever else can go wrong on the way (no
connection, an answer cut short, JSON that is none) comes up as an exception of the transport, of json or of Python.
All of it ends here as a StoreError.

What a server or the transport says is quoted without the credentials in it, and the exception is not chained to theirs,
whose text has them still.
"""

from __future__ import annotations

import base64
import errno
import logging
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TypeVar
from urllib.parse import unquote

from cnvzoo.checkpoints.format import StoreError

REDACTED = "***"
_SHORTEST = 4  # characters: a shorter secret would be found in any word
_LOGGERS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2")

# of an address. A password may have an @ itself, and a / where somebody forgot to encode it; host:port/path@x has none
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:/+)([^\s/?#\"<>]*|[^\s/?#\"<>:]*:(?!\d+/)[^\s\"<>]*)@")
_HEADER = re.compile(
    r"((?:proxy-)?authorization[\"']?\s*[:=,]\s*[\"']?)(?:(?:bearer|basic|digest|token)\s+)?[^\s\"',;)}\]]+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(\bbearer\s+)[^\s\"',;)}\]]+", re.IGNORECASE)
_TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_\w+(?:[.-]\w+)*")


def redacted(text: str, secrets: Collection[str] = ()) -> str:
    """`text` without credentials, in the place of which there are asterisks.

    These are user and password of an address, the value of an Authorization header, what follows `Bearer`, tokens of
    the Hub (`hf_...`), and each of `secrets`.
    """
    for secret in sorted(secrets, key=len, reverse=True):  # one may be a part of another
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, REDACTED)
    text = _USER.sub(rf"\1{REDACTED}@", text)
    text = _HEADER.sub(rf"\1{REDACTED}", text)
    text = _BEARER.sub(rf"\1{REDACTED}", text)
    return _TOKEN.sub(REDACTED, text)


def secrets_in_use(endpoint: str) -> frozenset[str]:
    """The token that huggingface_hub sends, and the credentials in the address of the Hub in every form they take."""
    from huggingface_hub import get_token

    token, secrets = get_token(), set()
    if token:
        secrets.add(token)
    if match := _USER.match(endpoint):
        user, separator, password = match[2].partition(":")
        pair = f"{unquote(user)}:{unquote(password)}"
        secrets |= {match[2], pair, base64.b64encode(pair.encode()).decode()}
        own = password if separator else user  # a token may stand alone, in the place of the user
        secrets |= {own, unquote(own)}
    return frozenset(secrets)


@contextmanager
def redacted_logs(secrets: Collection[str]) -> Iterator[None]:
    """Within, what huggingface_hub and its transport log has no credentials; it logs addresses and what servers say."""

    def redact(record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage(), secrets), None
        return True

    names = [name for name in list(logging.root.manager.loggerDict) if name.partition(".")[0] in _LOGGERS]
    for name in names:
        logging.getLogger(name).addFilter(redact)
    try:
        yield
    finally:
        for name in names:
            logging.getLogger(name).removeFilter(redact)


T = TypeVar("T")
_LONGEST_QUOTE = 300  # characters
_DISK_PROBLEMS = frozenset((errno.EROFS, errno.ENOSPC, errno.EDQUOT))


@dataclass(frozen=True)
class Patience:
    """How long to wait for the Hub, and how often to ask it again.

    Attributes:
        tries: requests in all.
        first_wait: seconds before the second; each further wait is twice as long.
        longest_wait: seconds; where the Hub asks for a longer wait (Retry-After), that is said instead.
        in_all: seconds after which nothing is tried again.
        read_timeout, write_timeout: seconds without a byte after which an answer is given up, of downloads and of
            uploads.
    """

    tries: int = 4
    first_wait: float = 1.0
    longest_wait: float = 60.0
    in_all: float = 60.0
    read_timeout: float = 10.0
    write_timeout: float = 60.0

    def ask(
        self, asked: str, request: Callable[[], T], *, again_on: Collection[int] = (), secrets: Collection[str] = ()
    ) -> T:
        """Return what `request` returns; call it again where it fails in a way that may pass.

        Args:
            asked: what is asked and of whom, for the message.
            request: safe to repeat; its StoreErrors are passed on.
            again_on: HTTP statuses to try again on besides 408, 429 and 5xx.
            secrets: the credentials in use, which no message and no log is to have.

        Raises:
            StoreError: it failed for good, or once too often.
        """
        started, wait = time.monotonic(), self.first_wait
        for left in reversed(range(self.tries)):
            try:
                with redacted_logs(secrets):
                    return request()
            except StoreError:
                raise
            except Exception as error:  # the client's own, the transport's, and whatever an answer's shape provokes
                failure = _Failure.of(error, secrets)
            # out here the error raised has no context, whose text would have the credentials
            pause = max(wait, failure.retry_after or 0.0)
            late = time.monotonic() - started + pause > self.in_all
            if not left or late or pause > self.longest_wait or not failure.may_pass(again_on):
                raise StoreError(f"{asked}: {failure}")
            time.sleep(pause)
            wait *= 2
        raise AssertionError("tries is at least 1")


@dataclass(frozen=True)
class _Failure:
    """Why a request failed: the HTTP status, if there was an answer, and what to do."""

    came_back: str
    remedy: str
    status: int | None = None
    retry_after: float | None = None
    is_final: bool = False

    def __str__(self) -> str:
        return f"{self.came_back}. {self.remedy}"

    def may_pass(self, again_on: Collection[int]) -> bool:
        if self.status is None:
            return not self.is_final
        return self.status in (408, 429) or self.status >= 500 or self.status in again_on

    @classmethod
    def of(cls, error: BaseException, secrets: Collection[str]) -> _Failure:
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        for cause in _causes(error):
            if isinstance(cause, HfHubHTTPError):
                return cls._of_answer(cause, secrets)
            if isinstance(cause, OfflineModeIsEnabled):
                return cls(
                    "HF_HUB_OFFLINE is set, and what is needed is not in the cache",
                    "Unset it, or choose a directory with hub= or CNVZOO_HUB",
                    is_final=True,
                )
            if isinstance(cause, OSError) and (cause.errno in _DISK_PROBLEMS or cause.filename is not None):
                where = f" ({cause.filename})" if cause.filename else ""
                return cls(
                    f"this machine's disk refused: {cause.strerror}{where}",
                    "Make room or allow writing there, or choose another folder with HF_HUB_CACHE",
                    is_final=True,
                )
        *_, origin = _causes(error)
        said = _quoted(origin, secrets)
        return cls(
            f"no answer came back, or not a whole one ({type(origin).__name__}{': ' + said if said else ''})",
            "Check the network and its proxy, then try again; where there is none, choose a directory with hub= or "
            "CNVZOO_HUB",
        )

    @classmethod
    def _of_answer(cls, error: object, secrets: Collection[str]) -> _Failure:
        response = error.response  # type: ignore[attr-defined]
        status = response.status_code
        code = response.headers.get("X-Error-Code")
        phrase = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "unknown"
        message = error.server_message  # type: ignore[attr-defined]
        said = f": {_quoted(message, secrets)}" if message else ""
        after = response.headers.get("Retry-After", "")
        wait = float(after) if after.isdigit() else None
        return cls(f"the answer was {status} ({phrase}{said})", _remedy(status, code, wait), status, wait)


def _quoted(said: object, secrets: Collection[str]) -> str:
    """What somebody else says, for a line of ours: without credentials and control characters, and not too long."""
    text = " ".join(redacted(str(said), secrets).split())
    return "".join(character if character.isprintable() else "?" for character in text)[:_LONGEST_QUOTE]


def _remedy(status: int, code: str | None, wait: float | None) -> str:
    if code == "RepoNotFound" and status in (401, 404):
        return "There is no such repository, or it is private: check the name, or log in with 'hf auth login'"
    if status == 401:
        return "No token was sent, or one that is not valid: log in with 'hf auth login'"
    if status == 403:
        return "The account may not do this: log in with 'hf auth login' as one that may, with a token that can write"
    if status == 404:
        return "It is not there under this name or revision: check both"
    if status in (409, 412):
        return "Somebody else is publishing to the same place: try again when they are done"
    if status == 429:
        when = f"in {wait:.0f} seconds" if wait else "in some minutes"
        return f"Too many requests came from here: try again {when}; logged in ('hf auth login') more are allowed"
    if status >= 500:
        return "The Hub has a problem of its own: try again in some minutes"
    return "The request itself was refused: try again, and if it stays so, update huggingface_hub"


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, in this order."""
    causes: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in causes:
        causes.append(current)
        current = current.__cause__
    return causes
