"""Quantization-aware training in your own loop: train a float CNV, quantize it, and train it further.

    python examples/train_quantized.py --w-bits 2 --a-bits 2

Published checkpoints are trained by `cnvzoo.train` with a recipe; this example is for those who have their own loop.
Models are scored on a held-out part of the training set: read the test set only at the end of a project.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import cnvzoo
from cnvzoo.data import Augmentation, Dataset, Preprocessing, TrainBatches


def fit(model: nn.Module, data: Dataset, preprocessing: Preprocessing, steps: int, lr: float) -> None:
    """Train by SGD with Nesterov momentum and a learning rate that falls linearly to zero."""
    batches = TrainBatches(
        data.train_images,
        data.train_labels,
        num_classes=data.info.num_classes,
        preprocessing=preprocessing,
        augmentation=Augmentation(crop_padding=2),
        batch_size=64,
        seed=0,
        device="cpu",
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model.train()
    step = epoch = 0
    while step < steps:
        for images, labels in batches.epoch(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step == steps:
                break
        epoch += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist", help="a dataset of cnvzoo (default: mnist)")
    parser.add_argument("--w-bits", type=int, default=2)
    parser.add_argument("--a-bits", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100, help="training steps of each model")
    parser.add_argument("--holdout", type=int, default=1000, help="number of training images to score on")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    data = cnvzoo.load_dataset(arguments.dataset).holdout(arguments.holdout)
    info = data.info

    model = cnvzoo.create_model("cnv", num_classes=info.num_classes, in_chans=info.in_chans)
    fit(model, data, Preprocessing.for_dataset(info, size=32), arguments.steps, lr=0.05)
    print(f"float: {cnvzoo.evaluate(model, data).accuracy:.2f} %")

    # The same weights, with scales that fit them. A quantized model takes the image as uint8 / 255, not normalised:
    # mean and standard deviation become part of its first layer.
    quantized = cnvzoo.quantize(model, w_bits=arguments.w_bits, a_bits=arguments.a_bits, dataset=arguments.dataset)
    bits = f"{arguments.w_bits}-bit weights, {arguments.a_bits}-bit activations"
    print(f"{bits}, before training: {cnvzoo.evaluate(quantized, data).accuracy:.2f} %")

    fit(quantized, data, Preprocessing.for_dataset(info, size=32, normalize=False), arguments.steps, lr=0.02)
    cnvzoo.quantize_bias(quantized)  # so that the exported integer graph computes the same
    print(f"{bits}, after {arguments.steps} steps: {cnvzoo.evaluate(quantized, data).accuracy:.2f} %")


if __name__ == "__main__":
    main()
