"""What decides the bits of a run beside its recipe: the version of the arithmetic, the machine's kernels, the
libraries.

The weights of a run are a function of its recipe, its seed, `NUMERICS`, `describe_machine` and `describe_versions`, all
of which are in its record. docs/numerics.md lists what each version of the arithmetic changed.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from importlib.metadata import version
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from cnvzoo import __version__
from cnvzoo.models.compiled import compiler_version, compiles
from cnvzoo.models.registry import model_spec
from cnvzoo.progress import print_line
from cnvzoo.training.device import describe_device, onednn_level, training_dtype

# Version of the arithmetic, from initialisation to the weights that are scored. Raise it with every change that gives
# any recipe other bits, say in docs/numerics.md what changed, and write the golden sha256s again
# (tests/training/golden.py). All records of an older version are then due to be trained again.
NUMERICS = 2


class Machine(BaseModel):
    """The machine of a run: its device and, for a CPU, which kernels it uses.

    Attributes:
        kind: type of device, `cpu` or `cuda`.
        name: name of the processor or GPU.
        threads: number of threads. This and all keys below are None on a GPU, and in records older than the key.
        capability: instruction set of ATen's kernels, such as AVX512; `ATEN_CPU_CAPABILITY` can lower it.
        onednn: instruction set of oneDNN's kernels (convolutions, and matrix products in bfloat16), by its name in
            `ONEDNN_MAX_CPU_ISA`, which can lower it.
        precision: `float32` where training has no bfloat16 autocast, as `cnvzoo.training.device.training_dtype` says.
        loops: whether the loops that `cnvzoo.models.compiled` compiles ran compiled.
        compiler: name and version of the compiler of these loops.
        kernels: first 16 digits of the sha256 of what PyTorch's kernels compute from fixed numbers. Machines with the
            same value round alike.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: str = Field(pattern="^[a-z]+$")
    name: str = Field(min_length=1)
    threads: int | None = Field(default=None, ge=1)
    capability: str | None = None
    onednn: str | None = None
    precision: Literal["float32"] | None = None
    loops: Literal["compiled", "eager"] | None = None
    compiler: str | None = None
    kernels: str | None = Field(default=None, pattern="^[0-9a-f]{16}$")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The fields of `Machine` that are known of `device`, as in records.

    Call it within `cnvzoo.training.device.deterministic`, as runs do: the caller's settings would change `kernels`.
    """
    machine = describe_device(device)
    if device.type == "cpu":
        compiled = compiles(device)
        machine |= {
            "onednn": onednn_level(),
            "precision": None if training_dtype(device) == torch.bfloat16 else "float32",
            "loops": "compiled" if compiled else "eager",
            "compiler": compiler_version() if compiled else None,
            "kernels": _kernels_sha256(torch.get_num_threads())[:16],
        }
    return Machine(**machine).model_dump(exclude_none=True)


def describe_versions(model: str, device: torch.device) -> dict[str, str]:
    """Versions of Python and of the libraries that training `model` on `device` uses, by name."""
    versions: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"cnvzoo": __version__, "numpy": version("numpy")}  # a checkout may not be installed
    if model_spec(model).quantized:
        versions["brevitas"] = version("brevitas")
    if device.type == "cuda":
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {name: str(value) for name, value in versions.items()}


def warn_of_slow_loops(machine: dict[str, Any]) -> None:
    """Print a line to stderr where a run on a CPU trains without compiled loops."""
    if machine.get("loops") == "eager":
        print_line("training runs uncompiled on this CPU: slower, and with other bits than compiled")


@functools.cache
def _kernels_sha256(threads: int) -> str:
    """sha256 of results of the kinds of kernels that training runs; `threads` is only the key of the cache."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    digest = hashlib.sha256()
    with torch.autocast("cpu", enabled=False), torch.enable_grad():
        for groups, kernel in ((1, 3), (1, 1), (16, 3)):
            layout = {"memory_format": torch.channels_last}
            x = values(8, 16, 12, 12).contiguous(**layout).requires_grad_()
            weight = values(16, 16 // groups, kernel, kernel).contiguous(**layout).requires_grad_()
            y = F.conv2d(x, weight, padding=kernel // 2, groups=groups)
            results = [y, *torch.autograd.grad(y.float().square().sum(), (x, weight))]
            results += [F.conv2d(x.float(), weight.float(), padding=kernel // 2, groups=groups)]
            _update(digest, results)
        a, b = values(2, 96, 200), values(2, 200, 64)
        product = torch.bmm(a, b)
        wide = values(64, 1000, dtype=torch.float32)
        _update(digest, [product, torch.baddbmm(product, a, b, beta=0.5, alpha=2.0), a[0].float() @ b[0].float()])
        _update(digest, [F.linear(a[0], b[0].mT), wide.sum(1), wide.norm(dim=1), F.log_softmax(wide, 1), wide.rsqrt()])
    return digest.hexdigest()


def _update(digest: Any, results: list[Tensor]) -> None:
    for result in results:
        digest.update(result.detach().float().contiguous().numpy().tobytes())
