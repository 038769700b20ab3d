"""Exporting a model to an ONNX file or to C source, and scoring the ONNX file."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import nn

from cnvzoo.checkpoints.format import CheckpointConfig, IntegerResult, checked_classes
from cnvzoo.checkpoints.load import load_checkpoint
from cnvzoo.checkpoints.test_set import load_test_set
from cnvzoo.data.datasets import Dataset, load_dataset
from cnvzoo.data.preprocessing import Preprocessing
from cnvzoo.data.published import dataset_info, list_datasets
from cnvzoo.errors import ModelError, nearest
from cnvzoo.files import expanded, replacing
from cnvzoo.models.classifier import Classifier, class_names
from cnvzoo.models.modes import evaluating, unwrapped
from cnvzoo.models.registry import ModelSpec
from cnvzoo.progress import counted
from cnvzoo.training.evaluation import Evaluation, preprocessing_of, preprocessing_of_model
from cnvzoo_runtime.deployed_model import DeployedModel, load
from cnvzoo_runtime.metadata import FORMATS, KEY, DeployError, Metadata

if TYPE_CHECKING:
    from onnx import ModelProto

_PACKAGES: dict[str, tuple[str, ...]] = {  # that each format needs, as modules
    "integer": ("onnx",), "qdq": ("onnx",), "onnx": ("onnx", "onnxscript"), "c": (),
    "qonnx": ("onnx", "onnxoptimizer", "qonnx.util.cleanup"),
}  # fmt: skip
_BATCH = 250  # images compared at a time by measure_integer


def export(
    model: nn.Module | str | Path,
    path: str | Path,
    *,
    format: str = "integer",
    dataset: str | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
) -> Metadata:
    """Write a model to an ONNX file, or to C source.

    Args:
        model: a model of this library, which may be compiled, or the name or folder of a checkpoint. One in another
            precision is exported in float32.
        path: the file to write. It is written whole, or left as it is if the export fails. A path that ends in .c for
            format `c`, which writes a header beside it too.
        format: `integer`, the integer graph of a quantized model, exact and fast in ONNX Runtime; `qdq`, the same with
            QuantizeLinear and DequantizeLinear, for ONNX Runtime, OpenVINO and others; `qonnx`, a quantized model for
            FINN; `onnx`, a float model in float32; `c`, the integer graph as C99 source for devices without an
            operating system.
        dataset: the dataset of the benchmark that the model was trained on, if the model does not know it.
        classes: names of the classes, printable text; default those that the model or the dataset has, else "0", "1",
            and so on.
        name: name of the model in the file; default that of its checkpoint, if that is of the same dataset, else of its
            topology and dataset.

    Returns:
        The metadata of the file. `cnvzoo.deploy.load(path)` runs an ONNX file.

    Raises:
        DeployError: unknown format, a model that it cannot express, a name or class that is not printable text, a
            package is missing, or a path with the suffix of another format.
        ModelError: unknown dataset, or its classes or channels are not the model's.
    """
    if format not in FORMATS:
        raise DeployError(f"unknown format {format!r}: {nearest(str(format), FORMATS)}")
    path = expanded(path)
    if format == "c":
        _check_c_path(path)
    elif path.suffix in (".c", ".h"):
        raise DeployError(
            f"{path}: format {format!r} writes an ONNX file: give a path that ends in .onnx, or format 'c'"
        )
    for package in _PACKAGES[format]:  # before the export, which can take a minute
        try:
            import_module(package)
        except ImportError:
            needed = package.partition(".")[0]
            raise DeployError(f"format {format!r} needs the {needed} package: pip install 'cnvzoo[export]'") from None
    if not isinstance(model, nn.Module):
        model = load_checkpoint(model)[0]
    model = _in_float32(unwrapped(model))
    if format != "onnx" and isinstance(getattr(model, "spec", None), ModelSpec):
        from cnvzoo.deploy.lowering import check_quantized

        check_quantized(model, "QONNX" if format == "qonnx" else "the integer graph")
    metadata = _describe(model, dataset, classes, name, format)
    (replace(metadata, format="integer") if format == "c" else metadata).check()  # no file holds the metadata of c
    with evaluating(model):
        if format == "c":
            return _write_c(model, metadata, path)
        proto, metadata = _build_graph(model, metadata)
    entry = proto.metadata_props.add()
    entry.key, entry.value = KEY, metadata.to_json()
    with replacing(path) as temporary:
        temporary.write_bytes(proto.SerializeToString())
    return metadata


def _in_float32(model: nn.Module) -> nn.Module:
    """The model, or a copy in float32 of one in another precision."""
    tensors = model.state_dict().values()
    is_other = any(tensor.is_floating_point() and tensor.dtype != torch.float32 for tensor in tensors)
    return copy.deepcopy(model).float() if is_other else model


def _check_c_path(path: Path) -> None:
    if path.suffix != ".c":
        raise DeployError(f"{path}: format 'c' writes a source and a header beside it: give a path that ends in .c")
    if not path.name.isprintable() or set(path.name) & set('"\\'):
        raise DeployError(f"{path}: the name of a C file cannot have quotes, backslashes or control characters")


def _write_c(model: nn.Module, metadata: Metadata, path: Path) -> Metadata:
    """Write the source and the header, and return the metadata with the scale of the scores."""
    from cnvzoo.deploy.c_source import c_source
    from cnvzoo.deploy.lowering import integer_net

    net = integer_net(model, metadata.size)
    metadata = replace(metadata, scale=net.head.scale)
    written = c_source(net, metadata, path.stem)
    with replacing(path.with_suffix(".h")) as header, replacing(path) as source:  # both can be written, or neither is
        for temporary, text in ((header, written.header), (source, written.source)):
            temporary.write_text(text, encoding="utf-8", newline="\n")
    return metadata


def _describe(
    model: nn.Module, dataset: str | None, classes: Sequence[str] | None, name: str | None, format: str
) -> Metadata:
    """The metadata of a model, from what it carries and from the arguments."""
    spec, config = getattr(model, "spec", None), getattr(model, "pretrained_cfg", None)
    preprocessing = getattr(model, "preprocessing", None)
    if not isinstance(spec, ModelSpec):
        raise ModelError(f"{type(model).__name__} is not a model of cnvzoo: only those can be exported")
    described = cast("Classifier", model)  # models of other classes have the attributes too
    channels, outputs = described.in_chans, described.num_classes
    if outputs == 0:
        raise ModelError("the model has no last layer: give it one (model.reset_classifier) and train it")
    if isinstance(config, CheckpointConfig) and dataset in (None, config.dataset):
        name = name or config.name
    if dataset is not None:
        info = dataset_info(dataset)
        preprocessing, name = (
            preprocessing_of_model(model, info, "only those can be exported"),
            name or f"{spec.name}.{dataset}",
        )
        classes = info.classes if classes is None else classes
    elif isinstance(config, CheckpointConfig):
        dataset = config.dataset
    if not isinstance(preprocessing, Preprocessing):
        raise ModelError(
            "the model does not know its preprocessing: give dataset=, the dataset that it was trained on, or set "
            "model.preprocessing"
        )
    if format != "onnx" and ({*preprocessing.mean} != {0} or {*preprocessing.std} != {1}):
        raise DeployError(
            f"format {format!r} takes images as pixels / 255, and this model has mean {preprocessing.mean} and std "
            f"{preprocessing.std}: train it without normalisation (Preprocessing.for_dataset(..., normalize=False))"
        )
    names = class_names(model, outputs) if classes is None else checked_classes(classes)
    if (channels, outputs) != (preprocessing.in_chans, len(names)):
        source = dataset or "what was given"
        raise ModelError(
            f"the model has {channels} channel(s) and {outputs} classes, and {source} has {preprocessing.in_chans} "
            f"and {len(names)}: give dataset=, the dataset that it was trained on, or classes="
        )
    return Metadata(
        format=format, name=name or spec.name, dataset=dataset, classes=names, size=preprocessing.size,
        image_size=preprocessing.native_size, mean=preprocessing.mean, std=preprocessing.std,
        w_bits=described.w_bits, a_bits=described.a_bits,
    )  # fmt: skip


def _build_graph(model: nn.Module, metadata: Metadata) -> tuple[ModelProto, Metadata]:
    """The graph in the format of `metadata`, and the metadata with the scale of an integer graph."""
    from cnvzoo.deploy.torch_onnx import plain_graph, qonnx_graph  # needs onnx

    if metadata.format in ("integer", "qdq"):
        from cnvzoo.deploy.integer_onnx import integer_graph
        from cnvzoo.deploy.lowering import integer_net
        from cnvzoo.deploy.qdq_onnx import qdq_graph

        net = integer_net(model, metadata.size)
        if metadata.format == "qdq":
            return qdq_graph(net), metadata
        return integer_graph(net), replace(metadata, scale=net.head.scale)
    build = qonnx_graph if metadata.format == "qonnx" else plain_graph
    return build(model, metadata.in_chans, metadata.size), metadata


def evaluate_file(
    model: DeployedModel, dataset: str | Path | Dataset | None = None, *, data_root: str | Path | None = None
) -> Evaluation:
    """Score an exported model on the test set of a dataset; by default the one that it was trained on.

    Args:
        model: as `cnvzoo.deploy.load` returns it.
        dataset: name of a dataset or path of own images, as for `cnvzoo.load_dataset`, or a loaded one.
        data_root: folder of the cached datasets.

    Raises:
        ModelError: the model's dataset is not known, or the dataset has other images or classes than the model.
    """
    m = model.metadata
    if dataset is None and m.dataset not in list_datasets():
        raise ModelError(f"{m.name} does not say which dataset of cnvzoo it was trained on: give a dataset")
    source = m.dataset if dataset is None else dataset
    assert source is not None
    data = load_test_set(
        source, m.name, image_size=m.image_size, in_chans=m.in_chans, classes=m.classes, data_root=data_root
    )
    images = Preprocessing(m.size, m.mean, m.std, m.image_size).pad(data.test_images).permute(0, 3, 1, 2)
    logits = model.logits(images.contiguous().numpy())
    return Evaluation.of_logits(torch.from_numpy(logits), data.test_labels)


def measure_integer(model: nn.Module, dataset: str | Dataset, *, quiet: bool = False) -> IntegerResult:
    """Compare the integer graph of a pretrained quantized model with the model and with the reference implementation.

    All three run on the whole test set: a minute or two for 10,000 images on two cores.

    Args:
        model: a pretrained model, as `load_checkpoint` returns it.
        dataset: the dataset that it was trained on.
        quiet: show no progress.

    Raises:
        DeployError: the model cannot be expressed in integers, or ONNX Runtime's output is not the reference's.
    """
    from cnvzoo.deploy.lowering import integer_net  # Brevitas takes a second to import
    from cnvzoo.deploy.reference import run_reference

    model = unwrapped(model)
    data = load_dataset(dataset) if isinstance(dataset, str) else dataset
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        metadata = export(model, path, format="integer")
        size, deployed = path.stat().st_size, load(path)
    net = integer_net(model, metadata.size)
    spec: ModelSpec = model.spec  # type: ignore[assignment]
    preprocessing = preprocessing_of(spec.name, data.info.name)
    labels, correct, agreeing = data.test_labels.numpy(), 0, 0
    for start in counted(range(0, len(labels), _BATCH), metadata.name, quiet=quiet):
        part = slice(start, start + _BATCH)
        images = preprocessing.pad(data.test_images[part]).permute(0, 3, 1, 2).contiguous().numpy()
        found = deployed.accumulators(images)
        if not np.array_equal(found, run_reference(net, images)):
            raise DeployError(
                f"{metadata.name}: ONNX Runtime and the reference differ on test images {start} to "
                f"{start + len(images) - 1}: its integer graph is not exact on this machine"
            )
        with torch.inference_mode(), evaluating(model):
            expected = model(preprocessing(data.test_images[part])).argmax(1).numpy()
        correct += int((found.argmax(1) == labels[part]).sum())
        agreeing += int((found.argmax(1) == expected).sum())
    return IntegerResult(
        correct=correct, agreeing=agreeing, differing=net.differing, reachable=net.reachable, bytes=size
    )
