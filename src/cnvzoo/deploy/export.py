"""One entrance for all formats: choose, check, and write the file whole."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cnvzoo.checkpoints.folder import preprocessing_from
from cnvzoo.checkpoints.format import CheckpointConfig, IntegerResult
from cnvzoo.checkpoints.load import load_checkpoint
from cnvzoo.data.datasets import Dataset, DatasetInfo, dataset_info, load_dataset
from cnvzoo.deploy.metadata import FORMATS, KEY, DeployError, Metadata
from cnvzoo.deploy.runner import DeployedModel, load
from cnvzoo.errors import ModelError, nearest
from cnvzoo.files import replacing
from cnvzoo.models.registry import ModelSpec
from cnvzoo.training.evaluation import Evaluation, preprocessing_of
from cnvzoo.training.progress import counted

_COMPARED_AT_ONCE = 250


def export(
    model: nn.Module | str | Path, path: str | Path, *, format: str = "integer", dataset: str | None = None
) -> Metadata:
    """Write a model to an ONNX file.

    Args:
        model: a model of this library, or the name or folder of a checkpoint.
        path: of the file to write; it is replaced whole, or left as it is.
        format: `integer`, integer operators that ONNX Runtime computes exactly and fast, for `quant_cnv`; `qonnx`, for
            FINN, for `quant_cnv`; `onnx`, plain float32, for float models.
        dataset: what the model was trained on, if it has no published weights.

    Returns:
        What the file says of itself; `cnvzoo.deploy.load(path)` runs it.

    Raises:
        DeployError: the model cannot be expressed in that format, or a package is missing.
        ModelError: the dataset is not known, or its classes and channels are not the model's.
    """
    if not isinstance(model, nn.Module):
        model = load_checkpoint(model)[0]
    return write_model(model, path, replace(_facts(model, dataset), format=format))


def _facts(model: nn.Module, dataset: str | None) -> Metadata:
    spec, config = getattr(model, "spec", None), getattr(model, "pretrained_cfg", None)
    if not isinstance(spec, ModelSpec):
        raise ModelError(f"{type(model).__name__} is not a model of cnvzoo, whose models can be exported")
    if dataset is not None:
        info = dataset_info(dataset)
        preprocessing, name, classes = preprocessing_of(spec.name, dataset), f"{spec.name}.{dataset}", info.classes
    elif isinstance(config, CheckpointConfig):
        preprocessing, name, classes, dataset = preprocessing_from(config), config.name, config.classes, config.dataset
    else:
        raise ModelError("a model without published weights: give dataset=, which its images and classes are of")
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    channels, outputs = layers[0].weight.shape[1], layers[-1].weight.shape[0]
    if (channels, outputs) != (preprocessing.in_chans, len(classes)):
        raise ModelError(
            f"the model has {channels} channel(s) and {outputs} classes, and {dataset} has {preprocessing.in_chans} "
            f"and {len(classes)}: give dataset=, what the model was trained on"
        )
    w_bits, a_bits = _bits(model) if spec.quantized else (None, None)
    return Metadata(
        format="onnx", name=name, dataset=dataset, classes=tuple(classes), size=preprocessing.size,
        image_size=preprocessing.native_size, mean=preprocessing.mean, std=preprocessing.std,
        w_bits=w_bits, a_bits=a_bits,
    )  # fmt: skip


def _bits(model: nn.Module) -> tuple[int, int]:
    """Of the last layer's weights, and of the activations in front of it."""
    from brevitas.nn import QuantLinear, QuantReLU

    from cnvzoo.models.quant import quantizer_of

    weights = [m for m in model.modules() if isinstance(m, QuantLinear)]
    activations = [m for m in model.modules() if isinstance(m, QuantReLU)]
    return quantizer_of(weights[-1]).bits, quantizer_of(activations[-1]).bits


def evaluate_file(model: DeployedModel, dataset: str, *, data_root: str | Path | None = None) -> Evaluation:
    """Score an exported model on the test set of a dataset.

    Raises:
        ModelError: the dataset has other images or classes than the model.
    """
    info: DatasetInfo = dataset_info(dataset)
    m = model.metadata
    if (info.in_chans, info.image_size, info.num_classes) != (m.in_chans, m.image_size, len(m.classes)):
        raise ModelError(f"{m.name} cannot be scored on {dataset}: it has other images or classes")
    data = load_dataset(dataset, root=data_root)
    correct = model.count_correct(data.test_images.numpy(), data.test_labels.numpy())
    return Evaluation(correct, len(data.test_labels))


def measure_integer(model: nn.Module, dataset: str | Dataset, *, quiet: bool = False) -> IntegerResult:
    """Compare the integer graph of a published quantized model with the model, and with the slow reference.

    All test images go through all three: about a minute for ten thousand on two cores.

    Args:
        model: with published weights, as `load_checkpoint` gives it.
        dataset: what it was trained on, of which the test set is used.
        quiet: show no progress.

    Raises:
        DeployError: the model cannot be expressed in integers, or ONNX Runtime's output is not the reference's.
    """
    from cnvzoo.deploy.integer import integer_net, run_reference

    data = load_dataset(dataset) if isinstance(dataset, str) else dataset
    net = integer_net(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        facts = export(model, path, format="integer")
        size, deployed = path.stat().st_size, load(path)
    preprocessing = preprocessing_of("quant_cnv", data.info.name)
    labels, correct, agreeing = data.test_labels.numpy(), 0, 0
    for start in counted(range(0, len(labels), _COMPARED_AT_ONCE), facts.name, quiet=quiet):
        part = slice(start, start + _COMPARED_AT_ONCE)
        images = preprocessing.pad(data.test_images[part])
        found = deployed.accumulators(images.permute(0, 3, 1, 2).contiguous().numpy())
        if not np.array_equal(found, run_reference(net, images.permute(0, 3, 1, 2).numpy())):
            raise DeployError(
                f"{facts.name}: ONNX Runtime and the reference differ on test images {start} to "
                f"{start + len(images) - 1}: its integer graph cannot be trusted on this machine"
            )
        with torch.inference_mode():
            expected = model(preprocessing(data.test_images[part])).argmax(1).numpy()
        correct += int((found.argmax(1) == labels[part]).sum())
        agreeing += int((found.argmax(1) == expected).sum())
    return IntegerResult(
        correct=correct, agreeing=agreeing, differing=net.differing, reachable=net.reachable, bytes=size
    )


def write_model(model: nn.Module, path: str | Path, facts: Metadata) -> Metadata:
    """Write `model` in the format that `facts` names, with facts; the file is whole or not there.

    Returns:
        What the file says of itself: the facts with the scale of an integer graph.

    Raises:
        DeployError: the model cannot be expressed in the format, or a package that it takes is not installed.
    """
    if facts.format not in FORMATS:
        raise DeployError(f"unknown format {facts.format!r}: {nearest(facts.format, FORMATS)}")
    try:
        import onnx  # noqa: F401  (said in words, before a minute's work)
    except ImportError:
        raise DeployError("exporting needs onnx and its friends: pip install 'cnvzoo[export]'") from None
    was_training = model.training
    model.eval()
    try:
        proto, facts = _graph(model, facts)
    finally:
        model.train(was_training)
    entry = proto.metadata_props.add()
    entry.key, entry.value = KEY, facts.to_json()
    with replacing(path) as temporary:
        temporary.write_bytes(proto.SerializeToString())
    return facts


def _graph(model: nn.Module, facts: Metadata) -> tuple[Any, Metadata]:
    if facts.format == "integer":
        from cnvzoo.deploy.integer import integer_net
        from cnvzoo.deploy.writers import integer_graph

        net = integer_net(model)
        return integer_graph(net), replace(facts, scale=net.scale)
    if facts.format == "qonnx":
        from cnvzoo.deploy.writers import qonnx_graph

        return qonnx_graph(model, facts.in_chans, facts.size), facts
    from cnvzoo.deploy.writers import plain_graph

    return plain_graph(model, facts.in_chans, facts.size), facts
