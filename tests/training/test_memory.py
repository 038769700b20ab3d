"""Memory beyond dataset, model and optimizer does not grow over epochs, and is returned to the system afterwards."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys

import pytest
import torch
from synthetic import CNV_BITS, noise, recipe

from cnvzoo.data import TrainBatches
from cnvzoo.models import build_model
from cnvzoo.training import Trainer, preprocessing_of

MEGABYTE = 1 << 20


class MallocInfo(ctypes.Structure):
    """The struct of glibc's mallinfo2(3)."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


def allocated() -> int:
    """Bytes that this process has allocated and not freed; resident memory would include freed parts of the heap."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallocInfo
    found = mallinfo2()
    return found.uordblks + found.hblkhd


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's mallinfo2")
def test_memory_does_not_grow_over_epochs() -> None:
    data = noise("mnist", train=40)
    wanted = recipe(
        **CNV_BITS, name="mnist_quant_cnv_w2a2", epochs=12, batch_size=8,
        augmentation={"crop_padding": 2, "flip": True, "cutout": 4, "mixup": 0.2},
    )  # fmt: skip
    batches = TrainBatches(
        data.train_images, data.train_labels, num_classes=10, preprocessing=preprocessing_of("quant_cnv", "mnist"),
        augmentation=wanted.augmentation, batch_size=8, seed=0, device="cpu",
    )  # fmt: skip
    model = build_model("quant_cnv", num_classes=10, in_chans=1, w_bits=2, a_bits=2)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer, seen = Trainer(model, batches, wanted, 12), []

    def note(trainer: Trainer) -> None:
        if trainer.step % trainer.steps_per_epoch == 0:
            seen.append(allocated())

    trainer.train(lambda: False, note)
    assert len(seen) == 12
    # A step takes about 15 MB here; keeping 100 KB of it would exceed the limit in these eight epochs of five steps.
    assert max(seen[4:]) - seen[3] < 2 * MEGABYTE


# Takes 520 MB in tensors of 1 to 60 MB, lets go of them, and notes how many MB are resident: within nested uses, and
# then after the outermost one, which ended as `ending` says, and after a tensor of 700 MB.
KEEPING = """
import json, os, sys
import torch
from cnvzoo.training.device import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

def take():
    tensors = [torch.ones(size << 18) for size in (1, 3, 8, 20, 33, 60, 5) * 4]
    small = [torch.ones(1000) for _ in range(1000)]
    assert len(tensors) * len(small) == 28000

def use():
    with keep_freed_memory():
        take()
    seen.append(resident())
    if sys.argv[1] == "error":
        raise KeyError

take()
seen = [resident()]
decorated = keep_freed_memory()(use)
try:
    decorated()
except KeyError as error:
    pass
seen.append(resident())
large = torch.ones(700 << 18)  # more than what malloc has at hand, though it gave its pages back
del large
seen.append(resident())
print(json.dumps(seen))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
@pytest.mark.parametrize("ending", ["return", "error"])
def test_memory_is_returned_to_the_system_at_the_end_of_the_outermost_use(ending: str) -> None:
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name and "GLIBC" not in name}
    command = [sys.executable, "-c", KEEPING, ending]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    before, within, after, later = json.loads(done.stdout)
    assert within > before + 400
    assert after < before + 40
    assert later < after + 40  # glibc gives large tensors back at once again
