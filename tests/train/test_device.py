"""Devices: resolved or refused with words, described for records, and left as they were found."""

from __future__ import annotations

import pytest
import torch

from cnvzoo import CnvzooError
from cnvzoo.train import resolve_device
from cnvzoo.train.device import describe_device, deterministic

ABSENT = "cuda:99" if torch.cuda.is_available() else "cuda"


def test_auto_takes_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda answer=available: answer)
        assert resolve_device("auto") == torch.device(kind)


def test_a_device_is_taken_by_name_or_as_it_is() -> None:
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", [ABSENT, "gpu", "", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(CnvzooError) as caught:
        resolve_device(name)
    assert str(caught.value).startswith(f"device {name!r} cannot be used (")
    assert str(caught.value).endswith("use auto, cpu or cuda")
    assert "\n" not in str(caught.value)


def test_a_cpu_is_described_by_what_the_bits_depend_on() -> None:
    facts = describe_device(torch.device("cpu"))
    assert facts["kind"] == "cpu"
    assert facts["name"].strip()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["capability"] == torch.backends.cpu.get_cpu_capability()


def test_cuda_is_described_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    assert describe_device(torch.device("cuda")) == {"kind": "cuda", "name": "Some GPU"}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_settings_for_determinism_are_put_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    cudnn = torch.backends.cudnn

    def settings() -> tuple[bool, bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, cudnn.allow_tf32

    def fail() -> None:
        with deterministic(torch.device(kind)):
            if kind == "cuda":
                assert settings() == (True, False, False)
            raise KeyError

    before = settings()
    with pytest.raises(KeyError):
        fail()
    assert settings() == before
