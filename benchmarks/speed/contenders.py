"""The contenders of infer.py: trained nets in PyTorch, ONNX Runtime and OpenVINO, as users of these would run them.

All compute with the same number of threads. Each takes images in the dtype and memory layout that are fastest for it,
made before its turn: the time to normalize and convert them is not counted. The files of this library need neither.
"""

from __future__ import annotations

import copy
import importlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import memory
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import cnvzoo
import cnvzoo.deploy
from cnvzoo.checkpoints.format import WEIGHTS, CheckpointConfig
from cnvzoo.checkpoints.locations import find_checkpoint
from cnvzoo_runtime.images import normalize

PYTORCH, PYTORCH_CHANNELS_LAST = "PyTorch float32", "PyTorch float32, channels_last"
COMPILED, BREVITAS = "torch.compile float32, channels_last", "Brevitas eager"
ONNXRUNTIME_FLOAT, ONNXRUNTIME_INT8 = "ONNX Runtime float32", "ONNX Runtime static PTQ int8"
OPENVINO_FLOAT, OPENVINO_INT8 = "OpenVINO float32", "OpenVINO NNCF PTQ int8"
OURS, FASTEST = "ours, ONNX Runtime", "ours QDQ, auto"
QDQ = {"onnxruntime": "ours QDQ, ONNX Runtime", "openvino": "ours QDQ, OpenVINO", "auto": FASTEST}
CALIBRATION_IMAGES = 512  # training images, for each quantization without training
Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Contender:
    """One net in one runtime.

    Attributes:
        runtime: its name, with how it is used.
        net: the checkpoint it was made of, such as `quant_cnv_w4a4`.
        bytes: of the file that is deployed.
        prepare: uint8 images [N, C, H, W] to what `run` takes.
        run: to logits, or to integers that rank the classes, [N, num_classes].
        file: what `memory.peak_growth` loads, and how: its path and loader. None where PyTorch runs the net.
    """

    runtime: str
    net: str
    bytes: int
    prepare: Callable[[Images], Any]
    run: Callable[[Any], NDArray[Any]]
    file: tuple[Path, str] | None = None


def float_contenders(
    checkpoint: str, calibration: Images, threads: int, folder: Path, say: Callable[[str], None]
) -> Iterator[Contender]:
    """Of a float net: in PyTorch with four settings, and what `float_files` gives, which has the same arguments."""
    yield from _in_pytorch(checkpoint)
    yield from float_files(checkpoint, calibration, threads, folder, say)


def float_files(
    checkpoint: str, calibration: Images, threads: int, folder: Path, say: Callable[[str], None]
) -> Iterator[Contender]:
    """Of a float net: in ONNX Runtime and in OpenVINO, and in both after their own quantization without training.

    Args:
        checkpoint: its name.
        calibration: uint8 training images [N, C, H, W] for the quantization without training.
        threads: of each runtime.
        folder: for files.
        say: is called with a line for each package that is not installed, whose contenders are left out.
    """
    model, net, prepare = _published_net(checkpoint)
    plain, quantized, calibration = folder / f"{net}.onnx", folder / f"{net}_ptq.onnx", calibration[:CALIBRATION_IMAGES]
    cnvzoo.export(model, plain, format="onnx")
    size = plain.stat().st_size
    session = onnxruntime_session(plain, threads)
    yield Contender(ONNXRUNTIME_FLOAT, net, size, prepare, session, (plain, memory.ONNXRUNTIME))
    quantize_with_onnxruntime(plain, quantized, prepare(calibration))
    session, bytes = onnxruntime_session(quantized, threads), quantized.stat().st_size
    yield Contender(ONNXRUNTIME_INT8, net, bytes, prepare, session, (quantized, memory.ONNXRUNTIME))
    if (openvino := _import_if_installed("openvino")) is None:
        return say("openvino is not installed: its contenders are left out")
    session = _openvino_session(openvino, plain, threads)
    yield Contender(OPENVINO_FLOAT, net, size, prepare, session, (plain, memory.OPENVINO))
    if (nncf := _import_if_installed("nncf")) is None:
        return say(f"nncf is not installed: {OPENVINO_INT8} is left out")
    quantized = folder / f"{net}_nncf.xml"
    quantize_with_nncf(openvino, nncf, plain, quantized, prepare(calibration))
    bytes, session = quantized.stat().st_size, _openvino_session(openvino, quantized, threads)
    bytes += quantized.with_suffix(".bin").stat().st_size
    yield Contender(OPENVINO_INT8, net, bytes, prepare, session, (quantized, memory.OPENVINO))
    return None


def _published_net(checkpoint: str) -> tuple[nn.Module, str, Callable[[Images], NDArray[np.float32]]]:
    """A published model, its name, and what normalizes its images."""
    model, config = cnvzoo.load_checkpoint(checkpoint)
    mean, std = config.preprocessing["mean"], config.preprocessing["std"]
    return model, config.name.split(".")[0], lambda images: normalize(images, mean, std)


def _in_pytorch(checkpoint: str) -> Iterator[Contender]:
    model, net, prepare = _published_net(checkpoint)
    size = _weight_bytes(checkpoint)
    contiguous = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    yield Contender(PYTORCH, net, size, lambda x: torch.from_numpy(prepare(x)), _run(contiguous))
    yield Contender(PYTORCH_CHANNELS_LAST, net, size, _channels_last(prepare), _eager(model))
    half = copy.deepcopy(model).bfloat16()
    yield Contender("PyTorch bfloat16, channels_last", net, size, _channels_last(prepare, torch.bfloat16), _eager(half))
    compiled = copy.deepcopy(model)
    compiled.compile(dynamic=False)
    yield Contender(COMPILED, net, size, _channels_last(prepare), _eager(compiled))


def eager(checkpoint: str) -> Contender:
    """A net of any kind in PyTorch, channels_last."""
    model, net, prepare = _published_net(checkpoint)
    return Contender(PYTORCH_CHANNELS_LAST, net, _weight_bytes(checkpoint), _channels_last(prepare), _eager(model))


def quantized_contenders(checkpoint: str, threads: int, folder: Path) -> Iterator[Contender]:
    """Of a quantized net: Brevitas' layers, Brevitas' QCDQ export in ONNX Runtime and, where it is installed, in
    OpenVINO, and what `our_files` gives.
    """
    model, config = cnvzoo.load_checkpoint(checkpoint)
    net = config.name.split(".")[0]
    scale = np.float32(1 / 255)

    def prepare(images: Images) -> NDArray[np.float32]:
        return images.astype(np.float32) * scale

    yield Contender(BREVITAS, net, _weight_bytes(checkpoint), _channels_last(prepare), _eager(model))
    qcdq = folder / f"{net}_qcdq.onnx"
    _export_qcdq(model, qcdq, config)
    size = qcdq.stat().st_size
    session = onnxruntime_session(qcdq, threads)
    yield Contender("Brevitas QCDQ, ONNX Runtime", net, size, prepare, session, (qcdq, memory.ONNXRUNTIME))
    if openvino := _import_if_installed("openvino"):
        session = _openvino_session(openvino, qcdq, threads)
        yield Contender("Brevitas QCDQ, OpenVINO", net, size, prepare, session, (qcdq, memory.OPENVINO))
    yield from our_files(checkpoint, threads, folder)


def our_files(checkpoint: str, threads: int, folder: Path) -> Iterator[Contender]:
    """Of a quantized net: the integer graph in ONNX Runtime, and the QDQ graph in the runtimes that run it.

    The integer graph is not run in OpenVINO: 2026.4.1 takes the scales of a QLinearConv, one for each output channel,
    for those of the input channels, so `read_model` raises an error (8 bits) or crashes the process (4 and 2 bits).
    The QDQ graph is run by `cnvzoo.deploy.load(path, runtime=...).logits`, with the checks of it.
    """
    model, config = cnvzoo.load_checkpoint(checkpoint)
    net = config.name.split(".")[0]
    integer, qdq = folder / f"{net}.onnx", folder / f"{net}_qdq.onnx"
    cnvzoo.export(model, integer)
    session, size = cnvzoo.deploy.load(integer, threads=threads).session, integer.stat().st_size
    yield Contender(OURS, net, size, np.ascontiguousarray, _first_output(session), (integer, memory.OURS_AUTO))
    cnvzoo.export(model, qdq, format="qdq")
    for runtime, name in QDQ.items():
        if runtime == "openvino" and _import_if_installed("openvino") is None:
            continue
        run = cnvzoo.deploy.load(qdq, runtime=runtime, threads=threads).logits
        loader = memory.OURS_AUTO if runtime == "auto" else runtime
        yield Contender(name, net, qdq.stat().st_size, np.ascontiguousarray, run, (qdq, loader))


def _weight_bytes(checkpoint: str) -> int:
    return (find_checkpoint(checkpoint).folder / WEIGHTS).stat().st_size


def _channels_last(
    prepare: Callable[[Images], NDArray[np.float32]], dtype: torch.dtype = torch.float32
) -> Callable[[Images], Tensor]:
    def convert(images: Images) -> Tensor:
        return torch.from_numpy(prepare(images)).to(dtype).contiguous(memory_format=torch.channels_last)

    return convert


def _eager(model: nn.Module) -> Callable[[Tensor], NDArray[Any]]:
    layout: Any = model
    return _run(layout.to(memory_format=torch.channels_last))


def _run(model: nn.Module) -> Callable[[Tensor], NDArray[Any]]:
    model.eval()

    @torch.inference_mode()
    def run(images: Tensor) -> NDArray[Any]:
        return model(images).float().numpy()

    return run


def onnxruntime_session(path: Path, threads: int) -> Callable[[Any], NDArray[Any]]:
    """A file in ONNX Runtime on the CPU, as its documentation sets it up."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return _first_output(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))


def _first_output(session: Any) -> Callable[[Any], NDArray[Any]]:
    name, output = session.get_inputs()[0].name, session.get_outputs()[0].name
    return lambda images: session.run([output], {name: images})[0]


def _import_if_installed(package: str) -> Any:
    """openvino or nncf; None where it is not installed."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  (both would send figures of use)
    with _quiet():
        try:
            return importlib.import_module(package)
        except ImportError:
            return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings, log lines and progress bars of other packages: stdout is for the results."""
    root = logging.getLogger()
    level = root.level
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        root.setLevel(logging.ERROR)
        try:
            yield
        finally:
            root.setLevel(level)


def _openvino_session(openvino: Any, path: Path, threads: int) -> Callable[[Any], NDArray[Any]]:
    """A file in OpenVINO, compiled for each batch size separately, which is its fastest form."""
    core, requests = openvino.Core(), {}

    def run(images: NDArray[Any]) -> NDArray[Any]:
        request = requests.get(images.shape)
        if request is None:
            graph = core.read_model(path)
            graph.reshape({graph.inputs[0]: images.shape})
            compiled = core.compile_model(
                graph, "CPU", {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
            )
            request = requests[images.shape] = compiled.create_infer_request()
        return request.infer([images], share_inputs=True, share_outputs=False)[0]

    return run


def _export_qcdq(model: nn.Module, path: Path, config: CheckpointConfig) -> None:
    """Brevitas' own export for runtimes: QuantizeLinear, Clip and DequantizeLinear around float operators."""
    model = copy.deepcopy(model)
    side, channels = config.preprocessing["size"], len(config.preprocessing["mean"])
    with _quiet():  # the exporter warns of its own deprecation
        from brevitas.export import export_onnx_qcdq

        export_onnx_qcdq(
            model, args=torch.zeros(2, channels, side, side), export_path=str(path), opset_version=13,
            input_names=["image"], output_names=["logits"], dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
            dynamo=False,
        )  # fmt: skip


def quantize_with_onnxruntime(path: Path, quantized: Path, images: NDArray[np.float32]) -> None:
    """ONNX Runtime's static quantization as its documentation recommends for x86: QDQ, int8 weights per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(np.split(images, range(64, len(images), 64)))

        def get_next(self) -> dict[str, Any] | None:  # type: ignore[override]
            return next(({"image": batch} for batch in self._batches), None)

    prepared = quantized.with_suffix(".prepared.onnx")
    with _quiet():
        quant_pre_process(str(path), str(prepared))
        quantize_static(
            str(prepared), str(quantized), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip


def quantize_with_nncf(openvino: Any, nncf: Any, path: Path, quantized: Path, images: NDArray[np.float32]) -> None:
    """OpenVINO's quantization without training, written as `quantized` (.xml) and a file .bin beside it.

    The options are those of its documentation ("Basic Quantization Flow"): the preset PERFORMANCE, symmetric weights
    and activations, which is for nets with ReLU (MIXED is for other activation functions), and fast bias correction.
    """
    with _quiet():
        model = nncf.quantize(
            openvino.convert_model(path),  # read_model would leave shape operations in front of each bias
            nncf.Dataset([image[None] for image in images]),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(images),
        )
        openvino.save_model(model, quantized)
