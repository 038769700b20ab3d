"""From 8-bit images to a network's input: pad, scale, normalise.

`Preprocessing` does it for batches, in training and evaluation. `transforms` is a torchvision pipeline that does it for
a user's own images, of any size. On images of the dataset's own size both give the same bits.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cnvzoo.data.published import DatasetInfo, dataset_info
from cnvzoo.errors import DatasetError
from cnvzoo_runtime.images import ImageError, prepare
from cnvzoo_runtime.metadata import whole_number

if TYPE_CHECKING:
    from PIL.Image import Image
    from torchvision.transforms.v2 import Compose


@dataclass(frozen=True)
class Preprocessing:
    """Zero-pad to `size`, scale to [0, 1], subtract `mean`, divide by `std`.

    Attributes:
        size: height and width in pixels of the network's input.
        mean: per channel, for pixels in [0, 1]; its length is the number of channels, 1 or 3.
        std: per channel, for pixels in [0, 1].
        image_size: height and width in pixels of the images before padding (None: `size`). `transforms` resizes images
            of another size to it.

    Padding is the same on all sides and comes before normalisation, so a padded pixel is a black pixel.
    Scaling multiplies by float32(1/255), as torchvision's `ToDtype(scale=True)` does.

    Raises:
        ValueError: values that are impossible or do not fit together.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int | None = None

    def __post_init__(self) -> None:
        try:
            for key in ("mean", "std"):
                object.__setattr__(self, key, tuple(float(value) for value in getattr(self, key)))
        except (TypeError, ValueError):
            raise ValueError(
                f"mean and std must be tuples of numbers, one per channel: got {self.mean!r} and {self.std!r}."
            ) from None
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ValueError(
                f"mean and std must have one value per channel, 1 or 3 of them: got {self.mean} and {self.std}."
            )
        if not all(map(math.isfinite, self.mean)) or not all(0 < s < math.inf for s in self.std):
            raise ValueError(f"mean must be finite and std positive: got {self.mean} and {self.std}.")
        for key in ("size", "image_size"):
            if (value := getattr(self, key)) is None and key == "image_size":
                continue
            number = whole_number(value)
            if number is None or number < 1:
                raise ValueError(f"{key} must be a positive whole number of pixels, got {value!r}.")
            object.__setattr__(self, key, number)
        self._padding(self.native_size)

    @classmethod
    def for_dataset(cls, info: DatasetInfo, *, size: int | None = None, normalize: bool = True) -> Preprocessing:
        """The preprocessing of a dataset's images for a network whose input has `size` (None: that of the images).

        `normalize=False` sets mean 0 and std 1: quantized models take the image as uint8 / 255.
        """
        mean = info.mean if normalize else (0.0,) * info.in_chans
        std = info.std if normalize else (1.0,) * info.in_chans
        return cls(info.image_size if size is None else size, mean, std, info.image_size)

    @property
    def in_chans(self) -> int:
        return len(self.mean)

    @property
    def native_size(self) -> int:
        """Height and width in pixels of the images before padding."""
        return self.size if self.image_size is None else self.image_size

    @property
    def normalizes(self) -> bool:
        """Whether mean and std change anything: False for mean 0 and std 1."""
        return any(self.mean) or any(s != 1 for s in self.std)

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON has them: lists in place of tuples."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`. Raises ValueError for unknown or missing keys."""
        known = {"size", "mean", "std", "image_size"}
        if not {"size", "mean", "std"} <= values.keys() <= known:
            raise ValueError(f"A preprocessing has the keys size, mean, std and image_size, got {sorted(values)}.")
        return cls(values["size"], values["mean"], values["std"], values.get("image_size"))

    def _padding(self, side: int) -> int:
        margin = self.size - side
        if side < 1 or margin < 0 or margin % 2:
            raise DatasetError(
                f"Images of side {side} cannot be padded symmetrically to {self.size}: expected {self.size}, "
                "or smaller by an even number of pixels. Resize them first, as "
                f"load_dataset(folder, size={self.size}) and cnvzoo.transforms do."
            )
        return margin // 2

    def pad(self, images: Tensor) -> Tensor:
        """Zero-pad uint8 images [N, H, W, C], H == W, to [N, size, size, C]; no copy if they have that size.

        Raises:
            TypeError: images that are not uint8.
            ValueError: another shape or number of channels.
            DatasetError: a size that cannot be padded equally on all sides; it is a ValueError too.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"Images must be uint8 (0 to 255), got {images.dtype}.")
        if images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != self.in_chans:
            raise ValueError(
                f"Images must be [N, H, W, C] with H == W and C == {self.in_chans}, got shape {list(images.shape)}."
            )
        p = self._padding(images.shape[1])
        return nn.functional.pad(images, (0, 0, p, p, p, p)) if p else images

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, H, W, C] -> float32 [N, C, size, size] in channels_last. Raises as `pad` does."""
        x = self.pad(images).to(torch.float32, memory_format=torch.contiguous_format).mul_(1.0 / 255.0)
        if self.normalizes:
            # Whole rows at a time: a broadcast over 1 or 3 channels does not vectorise.
            constants = _row_constants if type(x) is Tensor else _row_constants.__wrapped__  # keep no tracer's tensors
            mean, std = constants(self, x.device)
            x.view(len(x), self.size, self.size * self.in_chans).sub_(mean).div_(std)
        return x.permute(0, 3, 1, 2)


@lru_cache(maxsize=64)
def _row_constants(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # tensors for every later call, whatever its mode
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=device).repeat(preprocessing.size)
            for values in (preprocessing.mean, preprocessing.std)
        )
    return mean, std


class _PrepareImage(nn.Module):
    """PIL image, uint8 tensor [C, H, W] or batch [N, C, H, W], of any size, to uint8 [in_chans, size, size] or a batch.

    See `cnvzoo_runtime.images.prepare`.
    """

    def __init__(self, in_chans: int, image_size: int, size: int) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.image_size = image_size
        self.size = size

    def extra_repr(self) -> str:
        return f"in_chans={self.in_chans}, image_size={self.image_size}, size={self.size}"

    def forward(self, image: Image | Tensor) -> Tensor:
        if isinstance(image, Tensor):
            if image.dtype != torch.uint8:
                raise ImageError(f"an image tensor has to be uint8 (0 to 255), got {image.dtype}")
            if image.ndim == 4 and len(image):
                return torch.stack([self(one) for one in image])
            if image.ndim != 3 or image.shape[0] not in (1, 3):
                raise ImageError(f"an image tensor has to be [C, H, W] with C 1 or 3, got shape {list(image.shape)}")
            pixels = prepare(image.permute(1, 2, 0).cpu().numpy(), self.in_chans, self.image_size, self.size)
            return torch.from_numpy(pixels).to(image.device)
        return torch.from_numpy(prepare(image, self.in_chans, self.image_size, self.size))


def transforms(source: str | DatasetInfo | Preprocessing) -> Compose:
    """A torchvision v2 pipeline for a user's own images: PIL image or uint8 [C, H, W] -> float32 [C, size, size].

    Greyscale and colour are converted to the channels that the network takes. An image of another size is resized to
    the dataset's own: its shorter side (bilinear, antialiased, by Pillow), then the centre is cropped. On an image of
    the dataset's own size and channels the result equals that of `Preprocessing` bit for bit.

    Args:
        source: name or info of a dataset (normalised, no padding), or the preprocessing of a checkpoint.

    Raises:
        DatasetError: unknown dataset name.
        ImageError: by the pipeline, for input that is not an 8-bit image of 1 or 3 channels.
    """
    from torchvision.transforms import v2

    if isinstance(source, str):
        source = dataset_info(source)
    preprocessing = Preprocessing.for_dataset(source) if isinstance(source, DatasetInfo) else source
    return v2.Compose(
        [
            _PrepareImage(preprocessing.in_chans, preprocessing.native_size, preprocessing.size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(preprocessing.mean), list(preprocessing.std)),
        ]
    )
