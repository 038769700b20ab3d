"""Memory that an exported file takes: the peak growth of the process that loads it and classifies images.

What is measured is resident memory (Linux: VmHWM and VmRSS of /proc/self/status): its peak while the file is loaded and
run, above what it was when the runtime had been imported. Each figure is from a process of its own, which imports no
other runtime and no PyTorch. This file is that process too.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

OURS_AUTO, ONNXRUNTIME, OPENVINO = "auto", "onnxruntime", "openvino"
MEMORY_BATCHES = (1, 64)  # images at a time, of which infer.py measures the memory
_STATUS = Path("/proc/self/status")
_RUNS = 3  # some memory is allocated at the second run


def peak_growth(loader: str, path: Path, batch: int, threads: int) -> float | None:
    """MiB that a process needs more for a file at its peak; None where the system does not tell.

    Args:
        loader: `auto`, the runtime of this library, or `onnxruntime` or `openvino`.
        path: the file.
        batch: images at a time.
        threads: of the runtime.

    Raises:
        CnvzooError: the process ended with an error.
    """
    if not _STATUS.exists():
        return None
    command = [sys.executable, str(Path(__file__).resolve()), loader, str(path), str(batch), str(threads)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        from cnvzoo.errors import CnvzooError  # the process that is measured does without it

        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise CnvzooError(f"memory of {path.name} with {loader}: its process ended: {last}")
    return float(done.stdout.split()[-1])


def _child(loader: str, path: str, batch: int, threads: int) -> float:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  (it would send figures of use)
    for package in {ONNXRUNTIME: [ONNXRUNTIME], OPENVINO: [OPENVINO]}.get(loader, [ONNXRUNTIME, OPENVINO]):
        try:
            importlib.import_module(package)
        except ImportError:
            assert loader == OURS_AUTO
    from cnvzoo_runtime import deployed_model  # noqa: F401  (numpy and Pillow, for every loader)

    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present value
    run, shape, dtype = _LOADERS[loader](path, batch, threads)
    images = np.zeros((batch, *shape), dtype)
    for _ in range(_RUNS):
        run(images)
    return _resident("VmHWM") - before


def _resident(key: str) -> float:
    """MiB."""
    found = re.search(rf"^{key}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


Loaded = tuple[Callable[[Any], Any], list[int], str]  # what runs, the shape of an image, the dtype of its pixels


def _load_auto(path: str, batch: int, threads: int) -> Loaded:
    from cnvzoo_runtime import load

    model = load(path, threads=threads)
    m = model.metadata
    return model.logits, [m.in_chans, m.size, m.size], "uint8"


def _load_onnxruntime(path: str, batch: int, threads: int) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    image = session.get_inputs()[0]
    dtype = "uint8" if image.type == "tensor(uint8)" else "float32"
    return lambda images: session.run(None, {image.name: images}), image.shape[1:], dtype


def _load_openvino(path: str, batch: int, threads: int) -> Loaded:
    import openvino

    core = openvino.Core()
    graph = core.read_model(path)
    image = graph.inputs[0]
    shape = [side.get_length() for side in list(image.get_partial_shape())[1:]]
    graph.reshape({image: [batch, *shape]})
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(graph, "CPU", settings).create_infer_request()
    dtype = "uint8" if image.get_element_type().get_type_name() == "u8" else "float32"
    return lambda images: request.infer([images], share_inputs=True), shape, dtype


_LOADERS = {OURS_AUTO: _load_auto, ONNXRUNTIME: _load_onnxruntime, OPENVINO: _load_openvino}

if __name__ == "__main__":
    print(_child(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
