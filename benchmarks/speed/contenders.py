"""The ways to run a trained CNV that infer.py compares: what users of PyTorch, ONNX Runtime and OpenVINO would do.

All compute with the same number of threads, and each takes images in the form that it likes best, made beforehand:
normalising and converting them is left out of everybody's time but that of the integer graph, which needs neither.
"""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import cnvzoo
import cnvzoo.deploy
from cnvzoo.deploy.images import normalised
from cnvzoo.hub import CheckpointConfig, find_checkpoint

_CALIBRATION_IMAGES = 512
Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Contender:
    """One way to run one net.

    Attributes:
        runtime: what runs it, and how.
        net: the checkpoint it was made of, such as `quant_cnv_w4a4`.
        bytes: of the file that is deployed.
        prepare: uint8 images [N, C, H, W] to what `run` takes.
        run: to logits, or to integers that rank the classes, [N, num_classes].
    """

    runtime: str
    net: str
    bytes: int
    prepare: Callable[[Images], Any]
    run: Callable[[Any], NDArray[Any]]


def float_contenders(checkpoint: str, calibration: Images, threads: int, folder: Path) -> Iterator[Contender]:
    """Of a float net: PyTorch four ways, ONNX Runtime, and ONNX Runtime after static quantization without training.

    Args:
        checkpoint: its name.
        calibration: uint8 training images [N, C, H, W] for the quantization without training.
        threads: of each runtime.
        folder: for files.
    """
    model, config = cnvzoo.load_checkpoint(checkpoint)
    net, size = config.name.split(".")[0], _weight_bytes(config)
    mean, std = config.preprocessing["mean"], config.preprocessing["std"]

    def prepare(images: Images) -> NDArray[np.float32]:
        return normalised(images, mean, std)

    plain_layout = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    yield Contender("PyTorch float32", net, size, lambda x: torch.from_numpy(prepare(x)), _run(plain_layout))
    yield Contender("PyTorch float32, channels_last", net, size, _channels_last(prepare), _eager(model))
    half = copy.deepcopy(model).bfloat16()
    yield Contender("PyTorch bfloat16, channels_last", net, size, _channels_last(prepare, torch.bfloat16), _eager(half))
    compiled = copy.deepcopy(model)
    compiled.compile(dynamic=False)
    yield Contender("torch.compile float32, channels_last", net, size, _channels_last(prepare), _eager(compiled))
    plain, quantized = folder / f"{net}.onnx", folder / f"{net}_ptq.onnx"
    cnvzoo.export(model, plain, format="onnx")
    yield Contender("ONNX Runtime float32", net, plain.stat().st_size, prepare, onnxruntime_session(plain, threads))
    _quantize_without_training(plain, quantized, prepare(calibration[:_CALIBRATION_IMAGES]))
    session = onnxruntime_session(quantized, threads)
    yield Contender("ONNX Runtime static PTQ int8", net, quantized.stat().st_size, prepare, session)


def quantized_contenders(checkpoint: str, threads: int, folder: Path) -> Iterator[Contender]:
    """Of a quantized net: Brevitas' layers, Brevitas' QCDQ export in two runtimes, and the integer graph.

    OpenVINO reads no QLinearConv with a multiplier for each channel (2026.4 does not come back), so not that graph.
    """
    model, config = cnvzoo.load_checkpoint(checkpoint)
    net = config.name.split(".")[0]
    scale = np.float32(1 / 255)

    def prepare(images: Images) -> NDArray[np.float32]:
        return images.astype(np.float32) * scale

    yield Contender("Brevitas eager", net, _weight_bytes(config), _channels_last(prepare), _eager(model))
    qcdq, integer = folder / f"{net}_qcdq.onnx", folder / f"{net}.onnx"
    _export_qcdq(model, qcdq, config)
    size = qcdq.stat().st_size
    yield Contender("Brevitas QCDQ, ONNX Runtime", net, size, prepare, onnxruntime_session(qcdq, threads))
    if openvino := _openvino_session(qcdq, threads):
        yield Contender("Brevitas QCDQ, OpenVINO", net, size, prepare, openvino)
    cnvzoo.export(model, integer)
    session = cnvzoo.deploy.load(integer, threads=threads).session
    yield Contender("ours, ONNX Runtime", net, integer.stat().st_size, np.ascontiguousarray, _first_output(session))


def _weight_bytes(config: CheckpointConfig) -> int:
    return (find_checkpoint(config.name).folder / "model.safetensors").stat().st_size


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


def _openvino_session(path: Path, threads: int) -> Callable[[Any], NDArray[Any]] | None:
    """A file in OpenVINO, for each batch size anew, which is how it is fastest; None where it is not installed."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  (it would send figures of use)
    try:
        import openvino
    except ImportError:
        return None
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
    for layer in model.modules():  # the exporter asks Brevitas' own tensors for scales and bit widths
        if hasattr(layer, "skip_create_quant_tensor"):
            layer.skip_create_quant_tensor = False  # type: ignore[assignment]
    side, channels = config.preprocessing["size"], len(config.preprocessing["mean"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's words about its own future
        from brevitas.export import export_onnx_qcdq

        export_onnx_qcdq(
            model, args=torch.zeros(2, channels, side, side), export_path=str(path), opset_version=13,
            input_names=["image"], output_names=["logits"], dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
            dynamo=False,
        )  # fmt: skip


def _quantize_without_training(path: Path, quantized: Path, images: NDArray[np.float32]) -> None:
    """ONNX Runtime's static quantization, as its documentation has it for x86: QDQ, int8 weights per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(np.split(images, range(64, len(images), 64)))

        def get_next(self) -> dict[str, Any] | None:  # type: ignore[override]
            return next(({"image": batch} for batch in self._batches), None)

    prepared = quantized.with_suffix(".prepared.onnx")
    logging.getLogger().setLevel(logging.ERROR)  # it advises on the root logger
    quant_pre_process(str(path), str(prepared))
    quantize_static(
        str(prepared), str(quantized), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
