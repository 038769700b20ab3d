"""Counting right answers: float32, one crop, the model's own graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cnvzoo.data import Preprocessing

from .progress import counted

_BATCH = 1000


@torch.inference_mode()
def count_correct(
    model: nn.Module, images: Tensor, labels: Tensor, preprocessing: Preprocessing, *, quiet: bool = False
) -> int:
    """How many of uint8 `images` [N, H, W, C] the model classifies as `labels` [N].

    The model is put in eval mode meanwhile. Progress is shown unless `quiet`.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for start in counted(range(0, len(images), _BATCH), "evaluating", quiet=quiet):
        batch = preprocessing(images[start : start + _BATCH].to(device))
        target = labels[start : start + _BATCH].to(device)
        correct += (model(batch).argmax(1) == target).sum()
    model.train(was_training)
    return int(correct)
