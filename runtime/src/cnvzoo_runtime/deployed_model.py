"""Running exported files with numpy and ONNX Runtime or OpenVINO, without PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cnvzoo_runtime.graphs import Graphs
from cnvzoo_runtime.images import normalize, prepare
from cnvzoo_runtime.metadata import KEY, DeployError, Metadata, is_printable, whole_number
from cnvzoo_runtime.onnx_file import LARGEST, read_properties

if TYPE_CHECKING:
    from PIL.Image import Image

C_SOURCE = b"/* cnvzoo: C source of "  # how files of format `c` begin
_BATCH = 64  # images at a time; the activations of more do not fit into the caches of a CPU


@dataclass(frozen=True)
class Prediction:
    """One class of an image.

    Attributes:
        label: name of the class.
        index: number of the class, from 0.
        probability: softmax of the logits, 0 to 1.
    """

    label: str
    index: int
    probability: float


class DeployedModel:
    """An exported model in ONNX Runtime, in OpenVINO or in both.

    Attributes:
        metadata: the metadata in the file.
    """

    def __init__(self, graphs: Graphs, metadata: Metadata) -> None:
        self._graphs = graphs
        self.metadata = metadata

    @property
    def session(self) -> Any:
        """The `onnxruntime.InferenceSession`; None where only OpenVINO runs the file."""
        graph = self._graphs.onnxruntime
        return None if graph is None else graph.session

    def runtime(self, images: int) -> str:
        """The runtime that computes a call with so many images: `onnxruntime` or `openvino`."""
        return self._graphs.runtime(images)

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 images [N, C, size, size] to float32 logits [N, num_classes].

        Raises:
            DeployError: wrong dtype or shape.
        """
        if self.metadata.format == "integer":
            return self.accumulators(images).astype(np.float32) * np.float32(self.metadata.scale)
        self._check(images)
        if self.metadata.format == "qdq":
            return self._run(images, lambda part: part, np.float32)
        mean, std = self.metadata.mean, self.metadata.std
        return self._run(images, lambda part: normalize(part, mean, std), np.float32)

    def accumulators(self, images: NDArray[np.uint8]) -> NDArray[np.int32]:
        """uint8 images [N, C, size, size] to the int32 output [N, num_classes] of an integer graph.

        Raises:
            DeployError: wrong dtype or shape, or the file's format is not `integer`.
        """
        if self.metadata.format != "integer":
            raise DeployError(f"a file of format {self.metadata.format!r} has logits, not accumulators")
        self._check(images)
        return self._run(images, lambda part: part, np.int32)

    @overload
    def predict(self, images: Image | NDArray[np.uint8], top: int = 5) -> list[Prediction]: ...

    @overload
    def predict(self, images: Sequence[Image | NDArray[np.uint8]], top: int = 5) -> list[list[Prediction]]: ...

    def predict(self, images: Any, top: int = 5) -> list[Prediction] | list[list[Prediction]]:
        """The most probable classes of one image, or of each image of a list, most probable first.

        Args:
            images: a PIL image or a uint8 array [H, W] or [H, W, C], of any size; or a list of them.
            top: number of classes, at least 1.

        Raises:
            DeployError: `top` is not a whole number of at least 1.
            ImageError: an item is not an 8-bit image of 1 or 3 channels.
        """
        count = whole_number(top)
        if count is None or count < 1:
            raise DeployError(f"top={top!r}: a whole number of at least 1")
        if isinstance(images, Sequence) and not isinstance(images, str):
            return self._classify(images, count)
        return self._classify([images], count)[0]

    def _classify(self, images: Sequence[Any], top: int) -> list[list[Prediction]]:
        if not images:
            return []
        m = self.metadata
        logits = self.logits(np.stack([prepare(image, m.in_chans, m.image_size, m.size) for image in images]))
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        probabilities = exponentials / exponentials.sum(1, keepdims=True)
        best = np.argsort(-logits, axis=1, kind="stable")[:, : min(top, len(m.classes))]
        return [
            [Prediction(m.classes[i], int(i), float(row[i])) for i in order]
            for row, order in zip(probabilities, best, strict=True)
        ]

    def _check(self, images: Any) -> None:
        m = self.metadata
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
            kind = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
            raise DeployError(f"images must be a uint8 array (0 to 255), got {kind}")
        if images.ndim != 4 or images.shape[1:] != (m.in_chans, m.size, m.size):
            raise DeployError(
                f"images must be [N, {m.in_chans}, {m.size}, {m.size}], got shape {list(images.shape)}; "
                "predict takes images of any size"
            )

    def _run(
        self, images: NDArray[np.uint8], convert: Callable[[NDArray[np.uint8]], NDArray[Any]], dtype: DTypeLike
    ) -> NDArray[Any]:
        """Run the graph on batches of images, each converted to the graph's input."""
        run = self._graphs.run_for(len(images))
        parts = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
        rows = [run(np.ascontiguousarray(convert(part))) for part in parts]
        return np.concatenate([np.empty((0, len(self.metadata.classes)), dtype), *rows])


def load(path: str | Path, *, runtime: str = "auto", threads: int | None = None) -> DeployedModel:
    """Load a file that `cnvzoo.export` wrote, in format `integer`, `qdq` or `onnx`.

    Args:
        path: the ONNX file.
        runtime: `onnxruntime`; `openvino`, for `qdq` and `onnx` files; or `auto`, the faster of the two: OpenVINO for
            calls with at least 16 images to a `qdq` file, where it is installed and the CPU has VNNI or is not x86,
            else ONNX Runtime. On other CPUs sums of 8-bit products can saturate in OpenVINO: choosing it by name for a
            `qdq` file gives a warning.
        threads: number of threads of the runtime, 1 to 4096; default one for each core.

    Raises:
        DeployError: the file cannot be read, was not written by `cnvzoo.export`, has tensors in other files (external
            data), or the runtime is unknown, not installed, or not for files of this format; or `threads` is out of
            range.
    """
    path, content, metadata = _read(path)
    if metadata.format == "qonnx":
        raise DeployError(f"{path}: QONNX is for FINN and the qonnx package, not for ONNX Runtime")
    return DeployedModel(Graphs(content, path, metadata, runtime, threads), metadata)


def read_metadata(path: str | Path) -> Metadata:
    """The metadata in a file that `cnvzoo.export` wrote; also in a QONNX file, which `load` refuses.

    Raises:
        DeployError: as `load`.
    """
    return _read(path)[2]


def _read(path: str | Path) -> tuple[Path, bytes, Metadata]:
    """The path of an exported file with the home folder in place of `~`, its content, and its metadata."""
    try:
        path = Path(path).expanduser()
        if (size := path.stat().st_size) > LARGEST:
            raise DeployError(f"{path}: {size:,} bytes, where an ONNX file has at most {LARGEST:,}: export it again")
        content = path.read_bytes()
    except DeployError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # an unknown user's home folder, or a zero byte
        reason = getattr(error, "strerror", None) or error
        shown = path if is_printable(str(path)) else repr(str(path))
        raise DeployError(f"{shown}: cannot be read: {reason}") from None
    if content.startswith(C_SOURCE):
        raise DeployError(
            f"{path}: C source of cnvzoo, to be compiled into a program; to run the model here, export it with "
            "format 'integer'"
        )
    text = read_properties(content, str(path)).get(KEY)
    if text is None:
        raise DeployError(f"{path}: not a file that cnvzoo exported: its metadata has no {KEY!r}")
    return path, content, Metadata.from_json(text, str(path))
