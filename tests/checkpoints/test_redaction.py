"""No token and no password is printed in errors, in the exceptions they are chained to, or in logs."""

from __future__ import annotations

import logging
import time
import traceback
from pathlib import Path

import pytest
from fake_http import GOOD_TOKEN
from fake_hub import FakeHub
from fake_repos import Commit

import cnvzoo
from cnvzoo.checkpoints.format import CheckpointError, FileFacts, StoreError
from cnvzoo.checkpoints.huggingface import HubStore
from cnvzoo.checkpoints.locations import open_store
from cnvzoo.checkpoints.retry import RetryPolicy, _quoted, redacted

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own upload

ONCE = RetryPolicy(tries=1, timeout=0.3)
OPAQUE = "c0ffee00token"  # does not look like a token


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
        ("Invalid credentials in Authorization header", "Invalid credentials in Authorization header"),
        ("401 at hf://zoo, hf-mirror.com, shf_x", "401 at hf://zoo, hf-mirror.com, shf_x"),
    ],
)
def test_redacted_removes_credentials_and_nothing_else(text: str, expected: str) -> None:
    assert redacted(text) == expected


def test_the_time_is_in_proportion_to_the_text() -> None:
    text = "a" * 200_000  # seconds, where each letter is tried as the start of a long scheme
    start = time.process_time()
    assert redacted(text) == text
    assert time.process_time() - start < 1


def test_a_long_message_is_quoted_in_little_time() -> None:
    start = time.process_time()
    assert _quoted("no route " + "a://b:" * 20_000) == "no route"
    assert _quoted("no route " * 20_000) == ("no route " * 40)[:300]
    assert time.process_time() - start < 1


def test_a_message_is_not_cut_within_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first URL becomes so short that the end of the cut text is quoted."""
    monkeypatch.setenv("HF_TOKEN", OPAQUE)
    for secret in (f"https://user:{'s3cret' * 99}@host", OPAQUE, "hf_s3crets3cret"):
        for shift in range(20):
            found = _quoted(f"https://u:{'p' * (3970 + shift)}@h {secret} end")
            assert not any(part in found for part in ("s3cret", "c0ff", "user", "pp"))


def everything_printed(error: BaseException, caplog: pytest.LogCaptureFixture) -> str:
    """The error with its traceback and everything it is chained to, and the log."""
    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    texts = [str(error), *traceback.format_exception(error), *map(repr, chain)]
    return "\n".join([*texts, *(record.getMessage() for record in caplog.records), caplog.text])


@pytest.fixture
def logs(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Everything that the client logs at INFO and above, URLs included."""
    for name in ("huggingface_hub", "httpx", "httpx2"):
        caplog.set_level(logging.INFO, logger=name)
    return caplog


ECHOES = ("you sent {}", "headers: {{'Authorization': '{}'}}", "\x1b[31m{}\n")


def check_message(error: StoreError, token: str, status: int, logs: pytest.LogCaptureFixture) -> None:
    assert token not in everything_printed(error, logs)
    assert f"failed: {status} " in str(error)
    assert str(error).isprintable()  # one line, without control characters


@pytest.mark.parametrize(
    ("stage", "token", "status", "echo"),
    [
        ("info", GOOD_TOKEN, 403, ECHOES[0]),
        ("info", GOOD_TOKEN, 500, ECHOES[1]),
        ("info", OPAQUE, 403, ECHOES[1]),
        ("info", OPAQUE, 500, ECHOES[2]),
        ("head", OPAQUE, 403, ECHOES[0]),
    ],
)
def test_a_token_that_the_server_sends_back_to_a_reader(
    hub: FakeHub, store: HubStore, checkpoint: Path, facts: dict[str, FileFacts], stage: str, token: str, status: int,
    echo: str, monkeypatch: pytest.MonkeyPatch, logs: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    store.publish(checkpoint, message="first")
    monkeypatch.setenv("HF_TOKEN", token)
    hub.fail(stage, status, times=9, says=echo)
    once = HubStore("zoo", endpoint=hub.endpoint, cache_dir=store.cache_dir, retry=ONCE)
    with pytest.raises(StoreError) as caught:
        once.fetch(checkpoint.name, facts)
    check_message(caught.value, token, status, logs)
    assert ("***" in str(caught.value)) == (stage == "info")  # the answer to a HEAD has no text


@pytest.mark.parametrize(("status", "echo"), [(403, ECHOES[0]), (500, ECHOES[1]), (403, ECHOES[2])])
@pytest.mark.parametrize("stage", ["create", "preupload", "commit", "tag"])
def test_a_token_that_the_server_sends_back_to_a_publisher(
    hub: FakeHub, tmp_path: Path, checkpoint: Path, stage: str, status: int, echo: str, logs: pytest.LogCaptureFixture
) -> None:
    hub.fail(stage, status, times=9, says=echo)
    once = HubStore("zoo", endpoint=hub.endpoint, cache_dir=tmp_path / "cache", retry=ONCE)
    with pytest.raises(StoreError, match=r"\*\*\*") as caught:
        once.publish(checkpoint, message="first", tag="v1")
    check_message(caught.value, GOOD_TOKEN, status, logs)


@pytest.mark.parametrize("address", ["https://somebody:pass%2Fw0rd@host", "https://hf_abc@host/"])
def test_an_endpoint_with_a_password_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub logs the URLs that it retries."""
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(StoreError, match=r"^https://\*\*\*@host: HF_ENDPOINT has a user name or password"):
        open_store("hf://zoo")


def test_a_commit_id_from_the_server_that_is_the_token(
    hub: FakeHub, store: HubStore, checkpoint: Path, facts: dict[str, FileFacts], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.publish(checkpoint, message="first")
    monkeypatch.setattr(Commit, "id", OPAQUE)
    with pytest.raises(StoreError, match=f"'{OPAQUE}' is not a commit"):  # not the token in use
        store.fetch(checkpoint.name, facts)
    monkeypatch.setenv("HF_TOKEN", OPAQUE)
    with pytest.raises(StoreError, match=r"'\*\*\*' is not a commit"):
        store.fetch(checkpoint.name, facts)


@pytest.mark.parametrize("place", ["https://somebody:s3cret@host/zoo", "hf://somebody:s3cret@host"])
def test_a_password_in_a_location_is_not_printed(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_revision_is_not_redacted() -> None:
    with pytest.raises(CheckpointError, match="neither published nor in hf://zoo@v1: "):
        cnvzoo.load_checkpoint("cnv.nothing", hub="hf://zoo@v1")
