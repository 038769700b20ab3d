"""Graphs in ONNX Runtime and in OpenVINO, and which of the two runs a file.

OpenVINO is optional and imported when it is first used.
"""

from __future__ import annotations

import functools
import importlib.util
import platform
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from cnvzoo_runtime.metadata import DeployError, Metadata, whole_number

RUNTIMES = ("auto", "onnxruntime", "openvino")
OPENVINO_FORMATS = ("qdq", "onnx")
LEAST_FOR_OPENVINO = 16  # images at a time, from which OpenVINO was measured to be faster with a `qdq` file
_MOST_THREADS = 4096
Run = Callable[[NDArray[Any]], NDArray[Any]]


class OnnxRuntimeGraph:
    """A graph in ONNX Runtime.

    Args:
        content: the ONNX file.
        path: its name, for messages.
        threads: number of threads; None for one for each core.

    Attributes:
        session: the `onnxruntime.InferenceSession`.

    Raises:
        DeployError: ONNX Runtime is not installed, or cannot run the graph; also from `run`.
    """

    def __init__(self, content: bytes, path: Path, threads: int | None) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise DeployError("running exported models needs onnxruntime: pip install onnxruntime") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.add_session_config_entry("session.load_model_format", "ONNX")  # and not ORT's own, which is not checked
        if not sums_products_exactly():
            options.add_session_config_entry("session.x64quantprecision", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            # without the fallback, which loads a second time and reports the first error on standard output
            self.session: Any = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:  # its error classes have no common base
            raise _refused(path, "ONNX Runtime", error) from None
        self._path = path
        _check_ends(path, self.session.get_inputs(), self.session.get_outputs())
        self.inputs = [(value.type, value.shape) for value in self.session.get_inputs()]
        output = self.session.get_outputs()[0]
        self.output = output.type, output.shape
        self._names = self.session.get_inputs()[0].name, output.name

    def run(self, images: NDArray[Any]) -> NDArray[Any]:
        """The first output for images [N, C, size, size]."""
        name, output = self._names
        try:
            return self.session.run([output], {name: images})[0]
        except Exception as error:
            raise _refused(self._path, "ONNX Runtime", error) from None


class OpenVinoGraph:
    """A graph in OpenVINO on the CPU, for any number of images; float tensors are computed in float32.

    Args, raises: as `OnnxRuntimeGraph`.
    """

    def __init__(self, content: bytes, path: Path, threads: int | None) -> None:
        if not _openvino_is_installed():
            raise DeployError("runtime='openvino' needs the openvino package: pip install openvino")
        try:
            import openvino
        except Exception as error:  # also OSError for a library, or what an unfit NumPy raises
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise DeployError(f"the openvino package cannot be imported: {reason}: install it again") from None
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            core = _made_once(openvino.Core)
            compiled = core.compile_model(core.read_model(content), "CPU", settings)
        except RuntimeError as error:
            raise _refused(path, "OpenVINO", error) from None
        self._path = path
        _check_ends(path, compiled.inputs, compiled.outputs)
        self.inputs = [_described(value) for value in compiled.inputs]
        self.output = _described(compiled.outputs[0])
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()  # a request runs one batch at a time

    def run(self, images: NDArray[Any]) -> NDArray[Any]:
        """The first output for images [N, C, size, size]."""
        try:
            with self._lock:
                return self._request.infer([images], share_inputs=True, share_outputs=False)[0]
        except RuntimeError as error:
            raise _refused(self._path, "OpenVINO", error) from None


def _check_ends(path: Path, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    if not inputs or not outputs:
        raise DeployError(f"{path}: its graph has no {'output' if inputs else 'input'}: export it again")


def _refused(path: Path, runtime: str, error: Exception) -> DeployError:
    return DeployError(f"{path}: {runtime} cannot run it: {' '.join(str(error).split())}")


@functools.cache
def _made_once(core: Callable[[], Any]) -> Any:
    """OpenVINO's `Core` of this process, given its class; it is never freed.

    Its CPU plugin replaces the alternate signal stack of the thread that loads it, and unmaps that stack when the last
    Core and model are freed. If the garbage collector frees them in another thread, the next signal that Python
    handles, such as Ctrl-C, is a segmentation fault.
    """
    return core()


def _described(value: Any) -> tuple[str, list[int | str]]:
    """The type and shape of an input or output of OpenVINO, in ONNX Runtime's words."""
    kinds = {"u8": "uint8", "i32": "int32", "f32": "float"}
    kind, shape = value.get_element_type().get_type_name(), value.get_partial_shape()
    return f"tensor({kinds.get(kind, kind)})", ["N" if side.is_dynamic else side.get_length() for side in shape]


class Graphs:
    """A file in the runtimes that are to run it.

    `auto` takes OpenVINO for `qdq` files where it is installed, for calls with `LEAST_FOR_OPENVINO` images or more, on
    CPUs on which ONNX Runtime's fast kernels are exact; ONNX Runtime for everything else. OpenVINO reads the file at
    the first such call; where it cannot be imported, or cannot run the file, ONNX Runtime does. If `openvino` is chosen
    by name for a `qdq` file on other CPUs, a warning says that its sums can saturate.

    Args:
        content: the ONNX file.
        path: its name, for messages.
        metadata: that of the file.
        runtime: one of `RUNTIMES`.
        threads: of each runtime, 1 to 4096; None for one for each core.

    Attributes:
        onnxruntime: the graph in ONNX Runtime; None if `runtime` is `openvino`.

    Raises:
        DeployError: unknown runtime, one that cannot run files of this format or is not installed, a number of threads
            out of range, or an invalid graph.
    """

    def __init__(
        self, content: bytes, path: Path, metadata: Metadata, runtime: str = "auto", threads: int | None = None
    ) -> None:
        if runtime not in RUNTIMES:
            raise DeployError(f"unknown runtime {runtime!r}: {', '.join(RUNTIMES)}")
        if runtime == "openvino" and metadata.format not in OPENVINO_FORMATS:
            raise DeployError(
                f"{path}: a file of format {metadata.format!r} runs in ONNX Runtime only: export the model with "
                "format='qdq' for OpenVINO"
            )
        if threads is not None:
            threads = _checked_threads(threads)
        self.onnxruntime = None if runtime == "openvino" else OnnxRuntimeGraph(content, path, threads)
        self._openvino = OpenVinoGraph(content, path, threads) if runtime == "openvino" else None
        _check(self.onnxruntime or self._openvino, metadata, path)
        if runtime == "openvino" and metadata.format == "qdq" and not sums_products_exactly():
            warnings.warn(
                f"{path}: sums of 8-bit products can saturate in OpenVINO on this CPU (x86 without VNNI), which gives "
                "wrong scores: runtime='onnxruntime' has exact sums",
                stacklevel=3,
            )
        self._lock = threading.Lock()
        self._unread: tuple[bytes, Path, int | None] | None = None  # what OpenVINO reads when it is needed
        if runtime == "auto" and metadata.format == "qdq" and sums_products_exactly() and _openvino_is_installed():
            self._unread = content, path, threads

    def runtime(self, images: int) -> str:
        """The runtime that a call with so many images takes, `onnxruntime` or `openvino`."""
        if self.onnxruntime is None:
            return "openvino"
        return "openvino" if self._unread is not None and images >= LEAST_FOR_OPENVINO else "onnxruntime"

    def run_for(self, images: int) -> Run:
        """What takes the parts of a call with so many images to the first output of the graph."""
        if self.runtime(images) == "onnxruntime":
            assert self.onnxruntime is not None
            return self.onnxruntime.run
        with self._lock:
            if self._openvino is None and self._unread is not None:
                try:
                    self._openvino = OpenVinoGraph(*self._unread)
                except DeployError:  # `auto` chose it, and ONNX Runtime runs the file too
                    self._unread = None
            graph = self._openvino or self.onnxruntime
            assert graph is not None
            return graph.run


def _checked_threads(threads: Any) -> int:
    number = whole_number(threads)
    if number is None or not 1 <= number <= _MOST_THREADS:
        raise DeployError(f"threads={threads!r}: a whole number, 1 to {_MOST_THREADS}, or None for one for each core")
    return number


def _openvino_is_installed() -> bool:
    spec = importlib.util.find_spec("openvino")
    return spec is not None and spec.origin is not None  # a folder of that name beside the user's script has none


def sums_products_exactly(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the fastest kernels on this CPU sum products of 8-bit integers in 32 bits.

    On x86 without VNNI those of ONNX Runtime and of OpenVINO sum pairs in 16 bits, which can saturate. ONNX Runtime has
    exact ones there too, half as fast.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    try:
        return "vnni" in cpuinfo.read_text()
    except OSError:
        return False  # unknown: slower and exact


def _check(graph: OnnxRuntimeGraph | OpenVinoGraph | None, m: Metadata, path: Path) -> None:
    """Raise DeployError where the input or output of the graph is not as the metadata says."""
    assert graph is not None
    input_type = "tensor(float)" if m.format == "onnx" else "tensor(uint8)"
    output_type = "tensor(int32)" if m.format == "integer" else "tensor(float)"
    expected, (kind, shape) = [m.in_chans, m.size, m.size], graph.output
    sizes = [*(shape for _, shape in graph.inputs), shape]
    if any(not sides or isinstance(sides[0], int) for sides in sizes):
        raise DeployError(f"{path}: its input or output is not for any number of images; export it again")
    if len(graph.inputs) != 1 or graph.inputs[0][0] != input_type or graph.inputs[0][1][1:] != expected:
        raise DeployError(
            f"{path}: its input is not {input_type} {['N', *expected]}, as its metadata says; export it again"
        )
    if kind != output_type or shape[1:] != [len(m.classes)]:
        raise DeployError(
            f"{path}: its output is {kind} {shape}, and its metadata says {output_type} with {len(m.classes)} "
            "classes; export it again"
        )
