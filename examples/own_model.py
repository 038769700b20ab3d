"""Train your own model with a recipe of this library.

    python examples/own_model.py --epochs 1

`register_model` gives a model a name. It is then created, counted, trained and scored like any other model.
"""

from __future__ import annotations

import argparse

from torch import Tensor, nn

import cnvzoo
from cnvzoo.data import Augmentation, dataset_info
from cnvzoo.training import Optimizer, Schedule


@cnvzoo.register_model("patchnet", summary="4x4 patches, one 3x3 convolution, and global average pooling")
class PatchNet(nn.Module):
    """Images [N, in_chans, H, W] to logits [N, num_classes]."""

    def __init__(self, num_classes: int, in_chans: int, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Sequential(nn.Conv2d(in_chans, width, 4, 4, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.mix = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mix(self.patches(x)).mean((2, 3)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mnist", help="a dataset of cnvzoo (default: mnist)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--holdout", type=int, default=5000, help="number of training images to score on")
    arguments = parser.parse_args()

    data = dataset_info(arguments.dataset)
    info = cnvzoo.model_info(
        "patchnet", input_size=data.image_size, in_chans=data.in_chans, num_classes=data.num_classes
    )
    print(f"patchnet: {info.parameters:,} parameters, {info.macs:,} multiply-accumulates")

    recipe = cnvzoo.Recipe(
        name=f"{arguments.dataset}_patchnet",
        model="patchnet",
        dataset=arguments.dataset,
        epochs=arguments.epochs,
        batch_size=128,
        optimizer=Optimizer(lr=0.1),
        schedule=Schedule(warmup_epochs=0.2),
        augmentation=Augmentation(crop_padding=2),
    )
    result = cnvzoo.train(recipe, holdout=arguments.holdout)
    print(f"{result.record.accuracy:.2f} % of {result.record.total:,} held-out images")


if __name__ == "__main__":
    main()
