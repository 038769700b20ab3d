"""No token and no password in what is printed: errors with all that they are chained to, and logs."""

from __future__ import annotations

import base64
import logging
import traceback
from pathlib import Path

import pytest
from fake_http import GOOD_TOKEN
from fake_hub import FakeHub
from huggingface_hub.utils import http_backoff

import cnvzoo
from cnvzoo.checkpoints.format import CheckpointError, FileFacts, StoreError
from cnvzoo.checkpoints.huggingface import HubStore
from cnvzoo.checkpoints.locations import open_store
from cnvzoo.checkpoints.retry import Patience, redacted, redacted_logs

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own upload

ONCE = Patience(tries=1, read_timeout=0.3, write_timeout=0.3)
OPAQUE = "c0ffee00token"  # of no form that tells it from a word
PASSWORD = "pass%2Fw0rd"
CREDENTIALS = ("pass%2Fw0rd", "pass/w0rd", base64.b64encode(b"somebody:pass/w0rd").decode())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:secret@host/x: refused", "https://***@host/x: refused"),
        ("'http://user:p@ss:w0rd@127.0.0.1:80/x'", "'http://***@127.0.0.1:80/x'"),
        ("https://user:pa/ss@host/x", "https://***@host/x"),
        ("https:/user:secret@host", "https:/***@host"),  # as a Path writes it
        ("https://hf_abcDEF123@host", "https://***@host"),
        ("https://host:443/zoo/cnv.mnist@v1, a@b", "https://host:443/zoo/cnv.mnist@v1, a@b"),
        ("Authorization: Bearer abc.DEF-1_2 was sent", "Authorization: *** was sent"),
        ("authorization=Basic dXNlcjpwYXNz==; x", "authorization=***; x"),
        ("{'Authorization': 'Bearer abc', 'Accept': '*'}", "{'Authorization': '***', 'Accept': '*'}"),
        ('{"authorization":"abc","b":1}', '{"authorization":"***","b":1}'),
        ("('Proxy-Authorization', 'Basic abc')", "('Proxy-Authorization', '***')"),
        ("got bearer abcdef.", "got bearer ***"),
        ("token hf_aBcDeF0123456789, or api_org_Xyz1.", "token ***, or ***."),
        ("hf_jwt_eyJhbGci.eyJzdWIi.c2ln-_x", "***"),
        ("c0ffee00token and xc0ffee00tokenx", "*** and x***x"),
        ("Invalid credentials in Authorization header", "Invalid credentials in Authorization header"),
        ("401 at hf://zoo, hf-mirror.com, shf_x", "401 at hf://zoo, hf-mirror.com, shf_x"),
    ],
)
def test_credentials_are_taken_out_and_nothing_else(text: str, expected: str) -> None:
    assert redacted(text, [OPAQUE, "zoo"]) == expected  # zoo is too short to be told from a word


def everything_printed(error: BaseException, caplog: pytest.LogCaptureFixture) -> str:
    """The error with its traceback and whatever it is chained to in any way, and the log."""
    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    texts = [str(error), *traceback.format_exception(error), *map(repr, chain)]
    return "\n".join([*texts, *(record.getMessage() for record in caplog.records), caplog.text])


@pytest.fixture
def logs(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """All that the client logs at INFO and above, addresses among it."""
    for name in ("huggingface_hub", "httpx", "httpx2"):
        caplog.set_level(logging.INFO, logger=name)
    return caplog


ECHOES = ("you sent {}", "headers: {{'Authorization': '{}'}}", "\x1b[31m{}\n")


def check_message(error: StoreError, token: str, status: int, logs: pytest.LogCaptureFixture) -> None:
    """Of an answer that had the token in its text."""
    assert token not in everything_printed(error, logs)
    assert f"the answer was {status}" in str(error)
    assert str(error).isprintable()  # on one line, and without what would change the colours of a terminal


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("status", [403, 500])
@pytest.mark.parametrize("token", [GOOD_TOKEN, OPAQUE])
@pytest.mark.parametrize("stage", ["info", "head"])
def test_a_server_that_echoes_the_token_of_a_reader(
    hub: FakeHub, store: HubStore, checkpoint: Path, facts: dict[str, FileFacts], stage: str, token: str, status: int,
    echo: str, monkeypatch: pytest.MonkeyPatch, logs: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    store.publish(checkpoint, message="first")
    monkeypatch.setenv("HF_TOKEN", token)
    hub.fail(stage, status, times=9, says=echo)
    once = HubStore("zoo", endpoint=hub.endpoint, cache_dir=store._cache_dir, patience=ONCE)
    with pytest.raises(StoreError) as caught:
        once.fetch(checkpoint.name, facts)
    check_message(caught.value, token, status, logs)
    assert ("***" in str(caught.value)) == (stage == "info")  # the answer to a HEAD has no text


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("status", [403, 500])
@pytest.mark.parametrize("stage", ["create", "preupload", "commit", "tag"])
def test_a_server_that_echoes_the_token_of_a_publisher(
    hub: FakeHub, tmp_path: Path, checkpoint: Path, stage: str, status: int, echo: str, logs: pytest.LogCaptureFixture
) -> None:
    hub.fail(stage, status, times=9, says=echo)
    once = HubStore("zoo", endpoint=hub.endpoint, cache_dir=tmp_path / "cache", patience=ONCE)
    with pytest.raises(StoreError, match=r"\*\*\*") as caught:
        once.publish(checkpoint, message="first", tag="v1")
    check_message(caught.value, GOOD_TOKEN, status, logs)


@pytest.mark.parametrize("fault", [500, 403, "cut", "wrong"])
def test_a_password_in_the_address(
    hub: FakeHub, tmp_path: Path, facts: dict[str, FileFacts], fault: str | int, monkeypatch: pytest.MonkeyPatch,
    logs: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    address = hub.endpoint.replace("//", f"//somebody:{PASSWORD}@")
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.delenv("HF_TOKEN")
    hub.fail("info", fault, times=9, says="you sent {}, which is somebody:pass/w0rd")
    store = open_store("hf://zoo", cache_dir=tmp_path, patience=ONCE)
    with pytest.raises(StoreError) as caught:
        store.fetch("resnet20.mnist", facts)
    assert hub.faults["info"]
    printed = everything_printed(caught.value, logs)
    assert not [secret for secret in CREDENTIALS if secret in printed]
    assert f"was asked of {hub.endpoint.replace('//', '//***@')}: " in str(caught.value)


def test_what_the_client_logs(logs: pytest.LogCaptureFixture, hub: FakeHub) -> None:
    """It writes the address of each request that it tries again."""
    address = f"http://somebody:{PASSWORD}@127.0.0.1:9/x"
    with redacted_logs([]), pytest.raises(Exception, match="refused"):
        http_backoff("GET", address, max_retries=1)
    assert "thrown while requesting GET http://***@127.0.0.1:9/x" in logs.text
    assert PASSWORD not in logs.text
    logs.clear()
    with pytest.raises(Exception, match="refused"):  # and afterwards its logs are its own again
        http_backoff("GET", address, max_retries=0)
    assert PASSWORD in logs.text


def test_a_server_that_says_a_token_is_a_commit(
    hub: FakeHub, store: HubStore, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish(checkpoint, message="first")
    hub.repos[f"zoo/{checkpoint.name}"].tags["v1"] = OPAQUE
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    with pytest.raises(StoreError, match="'c0ffee00token' is not a commit"):  # here it is no token in use
        store.publish(checkpoint, message="second", tag="v1")
    monkeypatch.setenv("HF_TOKEN", OPAQUE)
    with pytest.raises(StoreError, match=r"'\*\*\*' is not a commit") as caught:
        store.publish(checkpoint, message="second", tag="v1")
    assert OPAQUE not in str(caught.value)


@pytest.mark.parametrize("place", ["https://somebody:s3cret@host/zoo", "hf://somebody:s3cret@host"])
def test_a_password_in_the_place_of_checkpoints(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNVZOO_HUB", place)
    for call in (
        lambda: open_store(place),
        lambda: open_store(Path(place)),
        lambda: cnvzoo.publish("cnv.mnist", "store"),
        lambda: cnvzoo.create_model("cnv.mnist", pretrained=True),
        lambda: cnvzoo.load_checkpoint("cnv.nothing"),
        lambda: cnvzoo.load_checkpoint("cnv.nothing", hub=Path(place)),
    ):
        with pytest.raises(CheckpointError, match=r":/+\*\*\*@host") as caught:
            call()
        assert "s3cret" not in "".join(traceback.format_exception(caught.value))


def test_a_revision_is_no_password() -> None:
    with pytest.raises(CheckpointError, match="neither published nor in hf://zoo@v1: "):
        cnvzoo.load_checkpoint("cnv.nothing", hub="hf://zoo@v1")
