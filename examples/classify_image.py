"""Classify images with a checkpoint: the model, its preprocessing, and the names of its classes.

    python examples/classify_image.py hub/cnv.mnist digit.png

`cnvzoo predict` does the same on the command line, and `cnvzoo.predict` in one call. These steps are for programs
that classify images in batches, or use the model in another way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

import cnvzoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder with model.safetensors and config.json")
    parser.add_argument("images", type=Path, nargs="+", help="image files of any size, grey or colour")
    arguments = parser.parse_args()

    model, config = cnvzoo.load_checkpoint(arguments.checkpoint)  # in eval mode; checks the weights' sha256
    transform = cnvzoo.transforms(config)  # a torchvision pipeline, which also works in a DataLoader
    images = []
    for path in arguments.images:
        with Image.open(path) as image:
            images.append(transform(image))

    with torch.inference_mode():
        probabilities = model(torch.stack(images)).softmax(dim=1)
    for path, row in zip(arguments.images, probabilities, strict=True):
        best = int(row.argmax())
        print(f"{path}: {config.classes[best]} ({float(row[best]):.1%})")


if __name__ == "__main__":
    main()
