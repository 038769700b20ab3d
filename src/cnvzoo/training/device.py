"""Devices: choosing one, describing it in a record, and the settings under which a seed always gives the same bits."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from cnvzoo.errors import CnvzooError

# by backend and operation; where a setting is "none", the one listed before it applies
_FLOAT32_SETTINGS = [
    ("generic", "all"),
    *((backend, part) for backend in ("cuda", "mkldnn") for part in ("all", "matmul", "conv", "rnn")),
]

# whether cuBLAS may sum in bfloat16 and float16: torch's defaults, with which all records were made
_CUBLAS_DEFAULTS = {
    "allow_bf16_reduced_precision_reduction": True,
    "allow_fp16_reduced_precision_reduction": True,
    "allow_fp16_accumulation": False,
}
_CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_MALLOC_PARAMETERS = {"trim_threshold": -1, "mmap_threshold": -3, "mmap_max": -4}  # parameters of glibc's mallopt(3)
_MALLOC_FIXED = {"trim_threshold": 128 << 10, "mmap_threshold": 128 << 10, "mmap_max": 1 << 16}
_MALLOC_MOVED = _MALLOC_FIXED | {"trim_threshold": 64 << 20, "mmap_threshold": 32 << 20}

# levels of oneDNN's kernels by the names of ONEDNN_MAX_CPU_ISA, with the processor features that each adds
_ONEDNN_LEVELS = (
    ("AVX2", ("avx2",)),
    ("AVX512_CORE", ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq")),
    ("AVX512_CORE_VNNI", ("avx512_vnni",)),
    ("AVX512_CORE_BF16", ("avx512_bf16",)),
    ("AVX512_CORE_FP16", ("avx512_fp16",)),
    ("AVX512_CORE_AMX", ("amx_tile", "amx_int8", "amx_bf16")),
    ("AVX512_CORE_AMX_FP16", ("amx_fp16",)),
)


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device of that name; `auto` is CUDA if available, else the CPU. Raises CnvzooError if it cannot be used."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty((), device=resolved).item()  # a tensor of the device `meta` has no value
    except (RuntimeError, AssertionError, TypeError) as error:
        is_type = isinstance(error, TypeError)  # whose message lists all that torch.device takes
        reason = f"of type {type(device).__name__}" if is_type else str(error).splitlines()[0]
        raise CnvzooError(f"device {str(device)!r} cannot be used ({reason}): use auto, cpu or cuda") from None
    return resolved


def describe_device(device: torch.device) -> dict[str, Any]:
    """Kind and name of a device and, for a CPU, number of threads and instruction set, which bits depend on."""
    if device.type == "cuda":
        return {"kind": "cuda", "name": torch.cuda.get_device_name(device)}
    return {
        "kind": device.type,
        "name": _cpu_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def training_dtype(device: torch.device) -> torch.dtype:
    """dtype of convolutions and matrix products in training: bfloat16, or float32 on CPUs without kernels for it.

    There torch falls back to loops for bfloat16: on a processor with AVX2 alone, a convolution takes eight times as
    long as in float32, and a matrix product ninety times. Weights and BatchNorms are float32 on every device.
    """
    if device.type != "cpu":
        return torch.bfloat16
    level = onednn_level()
    names = [name for name, _ in _ONEDNN_LEVELS]
    fast = _torch_has_bfloat16_kernels() if level is None else level in names[names.index("AVX512_CORE") :]
    return torch.bfloat16 if fast else torch.float32


def _torch_has_bfloat16_kernels() -> bool:
    """Whether torch computes bfloat16 by oneDNN here; False where torch is built without oneDNN."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


def onednn_level() -> str | None:
    """Instruction set of oneDNN's kernels: the highest that this processor has and `ONEDNN_MAX_CPU_ISA` allows.

    None for a processor other than x86-64.
    """
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    if get_capabilities is None or platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA")
    has = get_capabilities()
    names = [name for name, _ in _ONEDNN_LEVELS]
    allowed = names.index(limit.upper()) if limit and limit.upper() in names else len(names) - 1
    level = "SSE41" if limit and limit.upper() in ("SSE41", "AVX") else None
    for name, needs in _ONEDNN_LEVELS[: 0 if level else allowed + 1]:
        if not all(has.get(feature) for feature in needs):
            break
        level = name
    return level or "SSE41"


@contextmanager
def using_threads(threads: int | None) -> Iterator[None]:
    """So many threads for the CPU kernels inside; None leaves them as they are."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)


class _ProcessSetting:
    """A context manager for a setting of the whole process, whose uses may overlap in threads.

    The first use sets it and the last one restores it. Uses have to be counted as the setting is global: otherwise a
    use that ends would restore it while another still needs it.
    """

    def __init__(self, setting: Callable[[], AbstractContextManager[None]]) -> None:
        self._setting = setting
        self._lock = threading.Lock()
        self._uses = 0
        self._set = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._uses:
                self._set.enter_context(self._setting())
            self._uses += 1
        try:
            yield
        finally:
            with self._lock:
                self._uses -= 1
                if not self._uses:
                    self._set.close()


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """The same arithmetic inside whatever the caller has set, with deterministic kernels on CUDA.

    float32 is computed as float32 (no TF32, no bfloat16), and autocasts of the caller are suspended. All settings are
    restored at the end, also after an error.
    """
    with ExitStack() as settings:
        settings.enter_context(_full_float32())
        settings.enter_context(_thread_arithmetic(device))
        if device.type == "cuda":
            settings.enter_context(_deterministic_cuda())
        yield


@_ProcessSetting
@contextmanager
def _full_float32() -> Iterator[None]:
    """float32 as the default dtype, and computed as such: without TF32, which is the default for convolutions on CUDA.

    torch has these settings twice: by backend and operation, where "none" means that the more general one applies, and
    as the older allow_tf32 and float32_matmul_precision, which raise where the two disagree. Both are set, so that
    neither raises inside. Reading a setting gives the one that applies, so each is read after all more general ones are
    "none".
    """
    old: Any = torch.backends
    dtype, before = torch.get_default_dtype(), []
    for backend, part in _FLOAT32_SETTINGS:
        before.append(torch._C._get_fp32_precision_getter(backend, part))
        torch._C._set_fp32_precision_setter(backend, part, "none")
    matmul = torch.get_float32_matmul_precision()
    try:
        cudnn = old.cudnn.allow_tf32
    except RuntimeError:  # it is on, and disagrees with the "none" of its operations
        cudnn = True
    try:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        old.cudnn.allow_tf32 = False
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(matmul)
        old.cudnn.allow_tf32 = cudnn
        for (backend, part), precision in zip(_FLOAT32_SETTINGS, before, strict=True):
            torch._C._set_fp32_precision_setter(backend, part, precision)


@contextmanager
def _thread_arithmetic(device: torch.device) -> Iterator[None]:
    """Denormal numbers are kept inside, no autocast of the caller is in effect, and new tensors are on the CPU.

    Autocast caches its casts of weights until the outermost autocast ends: within one of the caller's, a step would use
    the weights of the step before.
    """
    flushes = float(torch.full((), 2.0**-140, dtype=torch.float32, device="cpu") * 1) == 0
    autocasts = torch.autocast_increment_nesting() - 1
    for _ in range(autocasts + 1):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    enabled = {kind: torch.is_autocast_enabled(kind) for kind in {"cpu", device.type}}
    cached = torch.is_autocast_cache_enabled()
    try:
        for kind in enabled:
            torch.set_autocast_enabled(kind, False)
        torch.set_autocast_cache_enabled(True)
        if flushes:
            torch.set_flush_denormal(False)
        # entered only where it changes something, since every function of torch takes longer inside
        with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
            yield
    finally:
        torch.set_flush_denormal(flushes)
        torch.set_autocast_cache_enabled(cached)
        for kind, was in enabled.items():
            torch.set_autocast_enabled(kind, was)
        for _ in range(autocasts):
            torch.autocast_increment_nesting()


@_ProcessSetting
@contextmanager
def _deterministic_cuda() -> Iterator[None]:
    workspace = os.environ.get(_CUBLAS_WORKSPACE)
    os.environ.setdefault(_CUBLAS_WORKSPACE, ":4096:8")  # read when cuBLAS makes its first handle
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    fills: Any = torch.utils.deterministic
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, filled = cudnn.benchmark, fills.fill_uninitialized_memory
    sums = {name: getattr(matmul, name) for name in _CUBLAS_DEFAULTS}
    for name, value in sums.items():
        if (split := getattr(matmul, f"{name}_split_k", None)) is not None:  # is set as a pair with the other
            sums[name] = value, split
    try:
        torch.use_deterministic_algorithms(True)
        cudnn.benchmark = False
        fills.fill_uninitialized_memory = False  # costs time, and every kernel here writes all of its result
        for name, value in _CUBLAS_DEFAULTS.items():
            setattr(matmul, name, value)
        yield
    finally:
        if workspace is None:
            os.environ.pop(_CUBLAS_WORKSPACE, None)
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        cudnn.benchmark, fills.fill_uninitialized_memory = benchmark, filled
        for name, value in sums.items():
            setattr(matmul, name, value)


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Have glibc keep the memory of freed tensors inside, and return it to the system at the end.

    Otherwise a CPU training step spends up to a third of its time in page faults. As a decorator it also returns what
    the function's local variables held. Without glibc it does nothing.
    """
    with _kept_memory():
        yield


@_ProcessSetting
@contextmanager
def _kept_memory() -> Iterator[None]:
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MALLOC_PARAMETERS["mmap_max"], 0)
    libc.mallopt(_MALLOC_PARAMETERS["trim_threshold"], 2**31 - 1)
    try:
        yield
    finally:
        for name, value in _malloc_settings(os.environ).items():
            # the parameter is a C int, while the environment may have more, which glibc reads as a size_t
            libc.mallopt(_MALLOC_PARAMETERS[name], max(-(2**31), min(value, 2**31 - 1)))
        gc.collect()  # a Trainer and its Steps refer to each other
        libc.malloc_trim(0)


def _malloc_settings(environment: Mapping[str, str]) -> dict[str, int]:
    """The values to restore by mallopt(3), whose parameters cannot be read: from the environment, or else defaults.

    Where the environment sets none, glibc raises its thresholds with the sizes that are freed, until one of them is
    set. So they are restored to the end of that range: from its start every large tensor would be a memory mapping of
    its own, with three times the page faults of a process that never set anything.
    """
    tunables = dict(pair.split("=", 1) for pair in environment.get("GLIBC_TUNABLES", "").split(":") if "=" in pair)
    given = {}
    for name in (*_MALLOC_PARAMETERS, "top_pad"):
        text = tunables.get(f"glibc.malloc.{name}", environment.get(f"MALLOC_{name.upper()}_", ""))
        with suppress(ValueError):
            given[name] = int(text, 0)
    defaults = _MALLOC_FIXED if given else _MALLOC_MOVED
    return {name: given.get(name, value) for name, value in defaults.items()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
