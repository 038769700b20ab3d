"""Preparing an image of any size for a model, with Pillow and numpy.

`cnvzoo.transforms`, which runs with PyTorch, and `cnvzoo-runtime`, which does not, both call `prepare`, so that the
same image gives the same bits in both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from cnvzoo_runtime.errors import CnvzooError

Pixels = NDArray[np.uint8]

_MODES = {1: "L", 3: "RGB"}  # Pillow's names of 8-bit greyscale and colour, by channels
_MAX_ASPECT = 64  # ratio of the sides; images with a larger one are cropped before they are resized, too
_OPAQUE = 255
_BLACK = (0, 0, 0, _OPAQUE)
# how an image is turned or mirrored to be upright, by its EXIF orientation; 1 is upright
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(CnvzooError, ValueError):
    """An image that is missing, damaged or not of 8 bits, or an array not of shape [H, W] or [H, W, 1 or 3]."""


def prepare(image: Any, in_chans: int, image_size: int, size: int) -> Pixels:
    """Turn upright, convert, resize, crop and pad one image.

    A PIL image is turned and mirrored as its EXIF orientation says. A transparent one is composed on black, which is
    also the colour of the padding: the images of MNIST are white on black. Channels are converted by Pillow
    (`Image.convert`; grey is the luma of ITU-R 601). The shorter side is resized to `image_size` (bilinear,
    antialiased), as torchvision's Resize does with a PIL image, and the centre is cropped. The pixels of an image that
    already has this size and these channels do not change.

    Args:
        image: a PIL image, or a uint8 array [H, W] or [H, W, C] with C 1 or 3.
        in_chans: channels of the result, 1 or 3.
        image_size: height and width in pixels before padding.
        size: height and width in pixels of the result; padded with black to it, equally on all sides.

    Returns:
        uint8 [in_chans, size, size].

    Raises:
        ImageError: not an image, damaged, not of 8 bits, an array not of 1 or 3 channels, or a picture with
            transparency that is black everywhere else; or channels and sizes that are impossible or do not fit
            together.
    """
    if in_chans not in _MODES:
        raise ImageError(f"in_chans={in_chans!r}: 1 for grey or 3 for colour")
    if image_size < 1 or size < image_size or (size - image_size) % 2:
        raise ImageError(f"images of {image_size} pixels cannot be padded equally to {size}")
    picture = _pil_image(image)
    if picture.mode != _MODES[in_chans]:
        picture = picture.convert(_MODES[in_chans])
    pixels = np.asarray(_resize_and_crop(picture, image_size)).reshape(image_size, image_size, in_chans)
    margin = (size - image_size) // 2
    return np.pad(pixels.transpose(2, 0, 1), ((0, 0), (margin, margin), (margin, margin)))


def read_image(path: str | Path) -> Image.Image:
    """Read an image file, with its pixels, of any format that Pillow reads; a leading `~` is the home folder.

    Raises:
        ImageError: the file is missing, damaged or not an image, or the home folder of a user is not known; the message
            names the file.
    """
    try:
        with Image.open(Path(path).expanduser()) as image:
            image.load()
            return image
    except Exception as error:  # of many classes, one for each format, some without a message
        remedy = ": make it smaller" if isinstance(error, Image.DecompressionBombError) else ""
        raise ImageError(f"{path}: cannot be read as an image: {_reason(error)}{remedy}") from None


def _reason(error: Exception) -> str:
    """What was wrong with an image, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def normalize(pixels: Pixels, mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """uint8 [N, C, H, W] to float32: times float32(1/255), minus `mean`, divided by `std`, given for each channel."""
    center, spread = (np.array(values, np.float32)[:, None, None] for values in (mean, std))
    return (pixels.astype(np.float32) * np.float32(1 / 255) - center) / spread


def _pil_image(image: Any) -> Image.Image:
    """The image in mode L or RGB, upright and without transparency."""
    if isinstance(image, Image.Image):
        if image.mode in ("F", "I") or image.mode.startswith("I;"):
            raise ImageError(f"expected an 8-bit image, got one of PIL mode {image.mode!r}: scale it to 8 bits")
        if 0 in image.size:
            raise ImageError(f"expected an image with pixels, got one of {image.width}x{image.height}")
        try:
            return _decoded(image)
        except ImageError:
            raise
        except Exception as error:  # as in read_image: an image that was only opened is decoded here
            raise ImageError(f"damaged, or not an image: {_reason(error)}") from None
    if not isinstance(image, np.ndarray):
        raise ImageError(f"expected a PIL image or a uint8 array [H, W, C], got {type(image).__name__}")
    if image.dtype != np.uint8:
        raise ImageError(f"an image has to be uint8 (0 to 255), got {image.dtype}")
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in _MODES or 0 in image.shape:
        raise ImageError(f"an image has to be [H, W] or [H, W, C] with C 1 or 3, got shape {list(image.shape)}")
    return Image.fromarray(np.ascontiguousarray(image[:, :, 0] if image.shape[2] == 1 else image))


def _decoded(image: Image.Image) -> Image.Image:
    image = _upright(image)
    if image.has_transparency_data:
        return _on_black(image)
    return image if image.mode in _MODES.values() else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """The image turned and mirrored as its EXIF orientation says."""
    image.load()  # Pillow turns a TIFF when it loads it, and then removes the orientation
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises SyntaxError, struct.error and others for damaged EXIF data, which is ignored
        return image
    return image.transpose(_TO_UPRIGHT[orientation]) if orientation in _TO_UPRIGHT else image


def _on_black(image: Image.Image) -> Image.Image:
    """The image composed on black, in mode RGB."""
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # La has no direct way to RGBA
    composed = Image.alpha_composite(Image.new("RGBA", image.size, _BLACK), image).convert("RGB")
    alpha = np.asarray(image.getchannel("A"))
    if composed.getbbox() is None and alpha.any() and alpha.min() < _OPAQUE:
        raise ImageError(
            "the image is black where it is not transparent, and transparent images are composed on black: "
            "compose it on another colour"
        )
    return composed


def _resize_and_crop(image: Image.Image, side: int) -> Image.Image:
    """Resize the shorter side to `side` and crop the centre, side x side. Sizes are rounded as torchvision does."""
    shorter = min(image.size)
    # Resizing a whole image of 1x20000 would make one of 32x640000, of which the crop keeps 32x32. The number of pixels
    # that are cropped first is even, so that the centre is the same.
    width, height = (min(length, _MAX_ASPECT * shorter + length % 2) for length in image.size)
    image = _crop_centre(image, width, height)
    if shorter != side:
        size = (side * width // shorter, side * height // shorter)
        image = image.resize(size, Image.Resampling.BILINEAR)
    return _crop_centre(image, side, side)


def _crop_centre(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
