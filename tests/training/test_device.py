"""Devices: resolved or refused with words, described for records, and left as they were found."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from synthetic import StepHook, noise, recipe, run
from torch import Tensor

import cnvzoo
from cnvzoo.errors import CnvzooError
from cnvzoo.models import build_model
from cnvzoo.training import RunRecord, resolve_device
from cnvzoo.training.device import (
    _malloc_settings,
    describe_device,
    deterministic,
    keep_freed_memory,
    onednn_level,
    training_dtype,
)
from cnvzoo.training.numerics import describe_machine

ABSENT = "cuda:99" if torch.cuda.is_available() else "cuda"


def test_auto_takes_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda answer=available: answer)
        assert resolve_device("auto") == torch.device(kind)


def test_a_device_is_taken_by_name_or_as_it_is() -> None:
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")


def test_what_is_no_device_is_refused_in_a_line() -> None:
    for given, kind in ((None, "NoneType"), (1.5, "float")):
        says = rf"^device '{given}' cannot be used \(of type {kind}\): use auto, cpu or cuda$"
        with pytest.raises(CnvzooError, match=says):
            resolve_device(given)  # type: ignore[arg-type]


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


# --- the dtype of training

AVX2 = {"avx2"}
AVX512 = AVX2 | {"avx512_f", "avx512_bw", "avx512_vl", "avx512_dq"}
PROCESSORS = {
    "SSE4": (set(), "", "SSE41", torch.float32),
    "AVX2": (AVX2, "", "AVX2", torch.float32),
    "AVX2 and VNNI": (AVX2 | {"avx512_vnni"}, "", "AVX2", torch.float32),
    "AVX512": (AVX512, "", "AVX512_CORE", torch.bfloat16),
    "AMX": (
        AVX512 | {"avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"}, "",
        "AVX512_CORE_AMX", torch.bfloat16,
    ),
    "AVX512, of which AVX2 is allowed": (AVX512, "avx2", "AVX2", torch.float32),
    "AVX512, of which SSE4 is allowed": (AVX512, "SSE41", "SSE41", torch.float32),
    "AVX512, with a limit that oneDNN does not know": (AVX512, "AVX3", "AVX512_CORE", torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize(("features", "limit", "level", "dtype"), PROCESSORS.values(), ids=PROCESSORS)
def test_training_is_in_bfloat16_where_onednn_has_kernels_for_it(
    features: set[str], limit: str, level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(features, True))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert onednn_level() == level
    assert training_dtype(torch.device("cpu")) == dtype
    assert training_dtype(torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize(
    ("operations", "dtype"),
    [
        (SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True), torch.bfloat16),
        (SimpleNamespace(_is_mkldnn_bf16_supported=lambda: False), torch.float32),
        (SimpleNamespace(), torch.float32),  # built without oneDNN
    ],
    ids=["kernels", "none", "no oneDNN"],
)
def test_other_processors_than_x86_are_asked_for_kernels(
    operations: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch.ops, "mkldnn", operations, raising=False)
    assert onednn_level() is None
    assert training_dtype(torch.device("cpu")) == dtype


def test_a_machine_that_trains_in_float32_says_so_in_its_records(monkeypatch: pytest.MonkeyPatch) -> None:
    for level, precision in (("AVX2", "float32"), ("AVX512_CORE_AMX", None)):
        monkeypatch.setattr("cnvzoo.training.device.onednn_level", lambda level=level: level)
        with deterministic(torch.device("cpu")):
            assert describe_machine(torch.device("cpu")).get("precision") == precision


# --- the settings under which a seed gives the same bits

BACKENDS: Any = torch.backends
FILLS: Any = torch.utils.deterministic
CUDNN, MATMUL, ONEDNN = BACKENDS.cudnn, BACKENDS.cuda.matmul, BACKENDS.mkldnn
FLOAT32_SETTINGS: dict[str, Any] = {
    "all": BACKENDS,
    "cudnn": CUDNN,
    "cudnn.conv": CUDNN.conv,
    "cudnn.rnn": CUDNN.rnn,
    "cuda.matmul": MATMUL,
    "mkldnn": ONEDNN,
    "mkldnn.matmul": ONEDNN.matmul,
    "mkldnn.conv": ONEDNN.conv,
    "mkldnn.rnn": ONEDNN.rnn,
}


def older(read: Callable[[], Any]) -> Any:
    """The values of the older settings, which raise an error if the newer ones disagree."""
    try:
        return read()
    except RuntimeError:
        return "mixed"


def settings() -> dict[str, Any]:
    """Every setting of torch, of either kind, that arithmetic depends on."""
    found = {name: owner.fp32_precision for name, owner in FLOAT32_SETTINGS.items()}
    return found | {
        "float32_matmul_precision": older(torch.get_float32_matmul_precision),
        "matmul.allow_tf32": older(lambda: MATMUL.allow_tf32),
        "cudnn.allow_tf32": older(lambda: CUDNN.allow_tf32),
        "benchmark": CUDNN.benchmark,
        "bf16 sums": MATMUL.allow_bf16_reduced_precision_reduction,
        "bf16 split": getattr(MATMUL, "allow_bf16_reduced_precision_reduction_split_k", None),
        "fp16 sums": MATMUL.allow_fp16_reduced_precision_reduction,
        "fp16 split": getattr(MATMUL, "allow_fp16_reduced_precision_reduction_split_k", None),
        "fp16 accumulation": MATMUL.allow_fp16_accumulation,
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": FILLS.fill_uninitialized_memory,
        "dtype": torch.get_default_dtype(),
        "flushes": float(torch.full((), 2.0**-140, dtype=torch.float32) * 1) == 0,
    }


@pytest.fixture
def changed() -> Iterator[Callable[[str], object]]:
    """`changed(case)` has the settings of a caller, until the end of the test."""
    defaults = settings()
    yield lambda case: CALLERS[case]()
    BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    CUDNN.allow_tf32 = True
    for name in ("cuda.matmul", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"):
        FLOAT32_SETTINGS[name].fp32_precision = "none"
    CUDNN.fp32_precision = "none"
    MATMUL.allow_bf16_reduced_precision_reduction = MATMUL.allow_fp16_reduced_precision_reduction = True
    MATMUL.allow_fp16_accumulation = CUDNN.benchmark = False
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)
    torch.set_flush_denormal(False)
    assert settings() == defaults


def set_all(owner: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(owner, name, value)


CALLERS: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "older, matmul": lambda: set_all(MATMUL, allow_tf32=True),
    "older, cuDNN": lambda: set_all(CUDNN, allow_tf32=False),
    "newer, all": lambda: set_all(BACKENDS, fp32_precision="tf32"),
    "newer, all in bf16": lambda: set_all(BACKENDS, fp32_precision="bf16"),
    "newer, cuDNN": lambda: set_all(CUDNN, fp32_precision="ieee"),
    "newer, matmul": lambda: set_all(MATMUL, fp32_precision="tf32"),
    "newer, convolution": lambda: set_all(CUDNN.conv, fp32_precision="ieee"),
    "newer, oneDNN": lambda: (
        set_all(ONEDNN.matmul, fp32_precision="bf16"),
        set_all(ONEDNN.conv, fp32_precision="tf32"),
    ),
    "both": lambda: (torch.set_float32_matmul_precision("medium"), set_all(MATMUL, fp32_precision="ieee")),
    "sums": lambda: set_all(
        MATMUL,
        allow_bf16_reduced_precision_reduction=False,
        allow_fp16_reduced_precision_reduction=False,
        allow_fp16_accumulation=True,
    ),
    "kernels": lambda: (torch.use_deterministic_algorithms(True, warn_only=True), set_all(CUDNN, benchmark=True)),
    "float64": lambda: torch.set_default_dtype(torch.float64),
    "flushed": lambda: torch.set_flush_denormal(True),
}
ARITHMETIC = {"float32_matmul_precision": "highest", "matmul.allow_tf32": False, "cudnn.allow_tf32": False} | {
    "dtype": torch.float32,
    "flushes": False,
}
ON_CUDA = {"benchmark": False, "algorithms": True, "warn only": False, "fill": False, "fp16 accumulation": False} | {
    f"{dtype} {part}": True for dtype in ("bf16", "fp16") for part in ("sums", "split")
}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("case", CALLERS)
def test_arithmetic_is_one_whatever_the_caller_has_set_and_the_settings_are_put_back(
    kind: str, case: str, changed: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    changed(case)
    before = settings()

    def fail() -> None:
        with deterministic(torch.device(kind)):
            within = settings()
            assert {within[name] for name in FLOAT32_SETTINGS} <= {"none", "ieee"}
            expected = ARITHMETIC | (ON_CUDA if kind == "cuda" else {})
            assert {name: within[name] for name in expected if within[name] is not None} == {
                name: value for name, value in expected.items() if within[name] is not None
            }
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert settings() == before
    if kind == "cpu":
        with deterministic(torch.device(kind)):
            assert all(settings()[name] == before[name] for name in ON_CUDA)


def test_a_setting_that_follows_another_follows_it_again(changed: Callable[[str], object]) -> None:
    changed("newer, all")
    with deterministic(torch.device("cpu")):
        pass
    set_all(BACKENDS, fp32_precision="ieee")
    assert [FLOAT32_SETTINGS[name].fp32_precision for name in ("cudnn", "cuda.matmul", "mkldnn.conv")] == ["ieee"] * 3


@pytest.mark.parametrize("found", [None, ":16:8"])
def test_the_workspace_of_cublas_is_put_back(found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", found or "")
    if found is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with deterministic(torch.device("cuda")):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == (found or ":4096:8")
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == found


def test_tensors_are_made_on_the_cpu_whatever_the_default_device_of_the_caller() -> None:
    with torch.device("meta"), deterministic(torch.device("cpu")):
        assert torch.zeros(1).device.type == "cpu"


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_overlapping_uses_keep_the_settings_until_the_last_one_ends(
    kind: str, changed: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    changed("medium")
    before, device = settings(), torch.device(kind)
    first, second = deterministic(device), deterministic(device)
    first.__enter__()
    within = settings()
    second.__enter__()
    first.__exit__(None, None, None)  # as of two threads, of which the first ends first
    assert settings() == within != before
    second.__exit__(None, None, None)
    assert settings() == before


@pytest.mark.parametrize("case", ["medium", "newer, oneDNN", "float64", "flushed", "autocast", "autocast off"])
def test_settings_of_the_caller_do_not_change_the_bits_of_a_run_or_an_evaluation(
    case: str, changed: Callable[[str], object], plain_run: tuple[Path, RunRecord], tmp_path: Path, each_step: StepHook
) -> None:
    folder, record = plain_run
    model = build_model("resnet8", in_chans=1)
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    logits: list[Tensor] = []
    model.register_forward_hook(lambda _module, _inputs, output: logits.append(output.clone()))
    cnvzoo.evaluate(model, noise(), device="cpu")

    within: list[dict[str, Any]] = []
    each_step(lambda _: within.append(settings()))
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast") if "autocast" in case else nullcontext():
        if case in CALLERS:
            changed(case)
        before = settings()
        assert run(recipe(), tmp_path).weights_sha256 == record.weights_sha256
        cnvzoo.evaluate(model, noise(), device="cpu")
        assert settings() == before
        assert torch.is_autocast_enabled("cpu") == (case == "autocast")
    assert torch.equal(*logits)
    assert logits[1].dtype == torch.float32
    assert all(now["mkldnn.matmul"] == "ieee" and now["mkldnn.conv"] == "none" for now in within)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_run_computes_gradients_in_any_mode_of_the_caller(
    mode: Callable[[], AbstractContextManager[None]], plain_run: tuple[Path, RunRecord], tmp_path: Path
) -> None:
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        assert run(recipe(), tmp_path, noise()).weights_sha256 == plain_run[1].weights_sha256
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunRecord]:
    folder = tmp_path_factory.mktemp("plain")
    return folder, run(recipe(), folder)


# --- memory that glibc keeps


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {"mmap_max": 65536, "trim_threshold": 64 << 20, "mmap_threshold": 32 << 20}),
        ({"MALLOC_TOP_PAD_": "0"}, {"mmap_max": 65536, "trim_threshold": 128 << 10, "mmap_threshold": 128 << 10}),
        (
            {"MALLOC_TRIM_THRESHOLD_": "1000", "MALLOC_MMAP_MAX_": "7"},
            {"mmap_max": 7, "trim_threshold": 1000, "mmap_threshold": 128 << 10},
        ),
        (
            {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=0x40000:glibc.cpu.x=1", "MALLOC_MMAP_THRESHOLD_": "1"},
            {"mmap_max": 65536, "trim_threshold": 128 << 10, "mmap_threshold": 0x40000},
        ),
        (
            {"MALLOC_MMAP_MAX_": "many", "GLIBC_TUNABLES": "::"},
            {"mmap_max": 65536, "trim_threshold": 64 << 20, "mmap_threshold": 32 << 20},
        ),
    ],
)
def test_the_setting_of_glibc_from_the_environment_is_restored(
    environment: dict[str, str], expected: dict[str, int]
) -> None:
    assert _malloc_settings(environment) == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_threshold_above_32_bits_is_restored_to_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    """glibc reads the environment as a size_t, and mallopt takes an int, of which ctypes keeps the lowest bits: 0."""
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", str(2**35))
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "9" * 20)
    calls: list[tuple[int, int]] = []
    libc = SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments), malloc_trim=lambda pad: 0)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    with keep_freed_memory():
        calls.clear()
    assert calls == [(-1, 2**31 - 1), (-3, 128 << 10), (-4, 2**31 - 1)]


def test_the_meta_device_cannot_be_used() -> None:
    with pytest.raises(CnvzooError, match=r"^device 'meta' cannot be used .*: use auto, cpu or cuda$"):
        resolve_device("meta")
