"""Memory beyond the dataset, the model and its optimizer stays flat over epochs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from synthetic import CNV_BITS, noise, recipe

from cnvzoo.data import TrainBatches
from cnvzoo.models import build_model
from cnvzoo.train import Trainer, preprocessing_of

MEGABYTE = 1 << 20


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_epochs_leave_nothing_behind() -> None:
    data = noise("mnist", train=320)
    wanted = recipe(
        **CNV_BITS, name="mnist_quant_cnv_w2a2", epochs=12, batch_size=32, ema=0.9, precision="bf16",
        augmentation={"crop_padding": 2, "flip": True, "cutout": 4, "mixup": 0.2, "cutmix": 1.0},
    )  # fmt: skip
    batches = TrainBatches(
        data.train_images, data.train_labels, num_classes=10, preprocessing=preprocessing_of("quant_cnv", "mnist"),
        augmentation=wanted.augmentation, batch_size=32, seed=0, device="cpu",
    )  # fmt: skip
    model = build_model("quant_cnv", num_classes=10, in_chans=1, w_bits=2, a_bits=2)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer, seen = Trainer(model, batches, wanted, 12), []

    def note(trainer: Trainer) -> None:
        if trainer.step % trainer.steps_per_epoch == 0:
            seen.append(resident())

    trainer.train(lambda: False, note)
    assert len(seen) == 12
    # what a step needs at once is about 60 MB here: keeping any part of it would show within eight epochs of ten steps
    assert max(seen[4:]) - seen[3] < 8 * MEGABYTE
