"""Credentials, taken out of text before it is printed.

A server may send back what it was sent, an exception of the transport may have the address that was asked, and an
address may have a password in it. Such text reaches our messages, and from there logs that others read.
"""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from urllib.parse import unquote

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
