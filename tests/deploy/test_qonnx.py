"""QONNX: the qonnx package computes from the file what PyTorch computes, and the graph fits FINN's first steps.

FINN's requirements are in its sources (Xilinx/finn, src/finn/transformation/qonnx and src/finn/builder). FINN is not a
dependency, so only those of its steps run here that are part of the qonnx package.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from brevitas.nn import QuantIdentity, QuantReLU
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_node, execute_onnx
from qonnx.custom_op.registry import getCustomOp
from qonnx.transformation.batchnorm_to_affine import BatchNormToAffine
from qonnx.transformation.extract_conv_bias import ExtractBiasFromConv
from qonnx.transformation.fold_constants import FoldConstants
from qonnx.transformation.gemm_to_matmul import GemmToMatMul
from qonnx.transformation.general import (
    ConvertDivToMul,
    ConvertSubToAdd,
    GiveReadableTensorNames,
    GiveUniqueNodeNames,
    RemoveStaticGraphInputs,
    RemoveUnusedTensors,
)
from qonnx.transformation.infer_data_layouts import InferDataLayouts
from qonnx.transformation.infer_datatypes import InferDataTypes
from qonnx.transformation.infer_shapes import InferShapes
from qonnx.transformation.insert_topk import InsertTopK
from qonnx.transformation.quant_constant_folding import FoldTransposeIntoQuantInit
from qonnx.util.cleanup import cleanup_model
from qonnx.util.inference_cost import inference_cost
from torch import nn

import cnvzoo
import cnvzoo.deploy
from cnvzoo.deploy import DeployError
from cnvzoo.deploy.torch_onnx import qonnx_graph
from cnvzoo.models import quant

HUB = Path(__file__).resolve().parents[2] / "hub"
QUANTIZERS = ("Quant", "BipolarQuant")


def export(model: nn.Module, folder: Path, dataset: str = "cifar10") -> ModelWrapper:
    cnvzoo.export(model, folder / "m.onnx", format="qonnx", dataset=dataset)
    return ModelWrapper(str(folder / "m.onnx"))


def logits(wrapped: ModelWrapper, image: torch.Tensor) -> np.ndarray:
    """The logits of one uint8 image [1, C, H, W]."""
    return execute_onnx(wrapped, {"global_in": image.float().numpy()})[wrapped.graph.output[0].name]


def constant(wrapped: ModelWrapper, name: str) -> np.ndarray:
    value = wrapped.get_initializer(name)
    assert isinstance(value, np.ndarray)
    return value


@torch.no_grad()
def weights_of(model: nn.Module) -> list[np.ndarray]:
    """The weights as PyTorch quantizes them, in ONNX's layout."""
    layers = [cast(Any, model.get_submodule(name)) for name in cnvzoo.integer_weights(model)]
    weights = [quant.quantizer_of(layer)(layer.weight)[0].numpy() for layer in layers]
    has_bias = [layer.bias is not None for layer in layers]  # a Gemm then, whose weights are not transposed
    return [w.T if w.ndim == 2 and not bias else w for w, bias in zip(weights, has_bias, strict=True)]


@torch.no_grad()
def activations_of(model: nn.Module, image: torch.Tensor) -> tuple[list[np.ndarray], np.ndarray]:
    """All activations and the logits that PyTorch computes of one uint8 image."""
    found, hooks = [], []
    for name, layer in model.named_modules():
        if isinstance(layer, (QuantReLU, QuantIdentity)) and name != "input":
            hooks.append(layer.register_forward_hook(lambda _layer, _inputs, output: found.append(output.numpy())))
    output = model(image / 255).numpy()
    for hook in hooks:
        hook.remove()
    return found, output


def assert_same(model: nn.Module, wrapped: ModelWrapper, images: torch.Tensor) -> None:
    """Compare layer by layer, each given PyTorch's own activations, so that differences do not add up.

    Two float32 kernels may round a sum at the border of two levels differently: one value in 10,000 may be one level
    off, which moves the logits of the whole network a little.
    """
    opsets = wrapped.get_opset_imports()
    off = total = 0
    for image in images.split(1):
        weights, (expected, output) = weights_of(model), activations_of(model, image)
        assert np.abs(logits(wrapped, image) - output).max() <= 0.1 * output.std()
        context: dict[str, Any] = wrapped.make_empty_exec_context() | {"global_in": image.float().numpy()}
        for node in wrapped.graph.node:
            execute_node(node, context, wrapped.graph, opsets[node.domain])
            (name,) = node.output
            if node.op_type not in QUANTIZERS:
                continue
            if wrapped.find_producer(node.input[0]) is None:
                np.testing.assert_allclose(context[name], weights.pop(0), rtol=1e-6)
                continue
            if cast(Any, getCustomOp(node)).get_nodeattr("signed"):  # a summand, which PyTorch rounds inside of the sum
                continue
            wanted = expected.pop(0)
            levels = np.abs(context[name] - wanted) / constant(wrapped, node.input[1])
            np.testing.assert_allclose(levels, levels > 0.5, atol=1e-3)  # none off, or one whole level
            rounded = (context[node.input[0]] / constant(wrapped, node.input[1]))[levels > 0.5]
            np.testing.assert_allclose(rounded % 1, 0.5, atol=1e-4)
            # a white image has the same value in all pixels of a channel
            off, total = off + np.unique(rounded).size, total + levels.size
            context[name] = wanted
        assert not weights
        assert not expected
        np.testing.assert_allclose(context["global_out"], output, rtol=1e-4, atol=1e-4 * output.std())
    assert off <= 1e-4 * total


@pytest.fixture(scope="module")
def test_images(real_data) -> torch.Tensor:
    """uint8 [32, 3, 32, 32]."""
    data = cnvzoo.load_dataset("cifar10", root=real_data("cifar10"))
    return data.test_images[:32].permute(0, 3, 1, 2).contiguous()


def most_confident(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The two images with the largest margin between classes: one level more or less does not change the class."""
    with torch.no_grad():
        first, second = model(images / 255).topk(2).values.unbind(1)
    return images[(first - second).argsort(descending=True)[:2]]


@pytest.mark.parametrize("w_bits", [1, 2, 4, 8])
def test_real_images_at_every_bit_width(test_images, tmp_path, make_net, w_bits):
    if w_bits == 1:  # no such checkpoint is published
        model = make_net(1, 2)
    else:
        model, _ = cnvzoo.load_checkpoint(HUB / f"quant_cnv_w{w_bits}a{w_bits}.cifar10")
    images = most_confident(model, test_images)
    wrapped = export(model, tmp_path)
    assert_same(model, wrapped, images)
    with torch.no_grad():
        expected = model(images / 255).argmax(1).tolist()
    assert [int(logits(wrapped, image).argmax()) for image in images.split(1)] == expected


def test_real_images_of_a_published_checkpoint(test_images, tmp_path):
    model, _ = cnvzoo.load_checkpoint(HUB / "quant_cnv_w4a4.cifar10")
    wrapped = export(model, tmp_path)
    assert_same(model, wrapped, test_images[:2])
    labels = [3, 8, 8, 0, 6, 6, 1, 6]  # the first of the test set: cat, ship, ship, airplane, frog, frog, car, frog
    assert [int(logits(wrapped, image).argmax()) for image in test_images[:8].split(1)] == labels


@pytest.mark.parametrize(("w_bits", "a_bits", "in_chans"), [(4, 3, 3), (1, 2, 3), (3, 8, 1)])
def test_noise_with_every_kind_of_batch_norm(make_net, noise, tmp_path, w_bits, a_bits, in_chans):
    model = make_net(w_bits, a_bits, in_chans)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = export(model, tmp_path, "cifar10" if in_chans == 3 else "mnist")
    assert_same(model, wrapped, noise(3, in_chans))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("w_bits", "a_bits"), [(8, 8), (4, 3)])
def test_the_integers_of_residual_sums(small_net, noise, w_bits, a_bits):
    """The summands have signed quantizers, -128 to 127, and the sum an unsigned one, 0 to 255, all of one scale."""
    model = small_net("residual", w_bits, a_bits)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrapped = ModelWrapper(qonnx_graph(model, 3, 8))
    assert_same(model, wrapped, noise(4)[:, :, :8, :8].contiguous())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    summands = 0
    for sum_node in wrapped.get_nodes_by_op_type("Add"):
        (relu,) = wrapped.find_consumers(sum_node.output[0])
        (rounding,) = wrapped.find_consumers(relu.output[0])
        assert (relu.op_type, rounding.op_type) == ("Relu", "Quant")
        for name, expected in ((rounding.output[0], "UINT8"), *((name, "") for name in sum_node.input)):
            node = wrapped.find_producer(name)
            assert node is not None
            found = cast(Any, getCustomOp(node)).get_integer_datatype(wrapped).name
            assert found in ((expected,) if expected else ("INT8", "UINT8"))
            assert constant(wrapped, node.input[1]) == constant(wrapped, rounding.input[1])
            signed = cast(Any, getCustomOp(node)).get_nodeattr("signed")
            assert cast(Any, getCustomOp(node)).get_nodeattr("narrow") == 0
            summands += signed
    assert summands == 5  # of four blocks, one of which has a convolution in its shortcut


@pytest.mark.parametrize(("w_bits", "a_bits"), [(8, 8), (4, 3), (1, 2)])
def test_depthwise_layers_and_a_biased_head(small_net, noise, w_bits, a_bits):
    model = small_net("separable", w_bits, a_bits)
    assert_same(model, ModelWrapper(qonnx_graph(model, 3, 8)), noise(4)[:, :, :8, :8].contiguous())


@pytest.mark.parametrize(("w_bits", "a_bits"), [(4, 3), (1, 2)])
def test_the_graph_has_the_nodes_and_attributes_that_finn_expects(make_net, tmp_path, w_bits, a_bits):
    wrapped = export(make_net(w_bits, a_bits), tmp_path)
    graph = wrapped.graph
    kinds = [node.op_type for node in graph.node if node.op_type not in QUANTIZERS]
    hidden = ["BatchNormalization", "Relu"]
    assert kinds == [
        "Conv", "Mul", *hidden, "Conv", *hidden, "MaxPool", "Conv", *hidden, "Conv", *hidden, "MaxPool",
        "Conv", *hidden, "Conv", *hidden, "Flatten", "MatMul", *hidden, "MatMul", *hidden, "MatMul",
    ]  # fmt: skip
    assert [(entry.domain, entry.version) for entry in wrapped.model.opset_import] == [
        ("", 13), ("qonnx.custom_op.general", 1),
    ]  # fmt: skip
    assert [(tensor.name, wrapped.get_tensor_shape(tensor.name)) for tensor in (*graph.input, *graph.output)] == [
        ("global_in", [1, 3, 32, 32]), ("global_out", [1, 10]),
    ]  # fmt: skip
    assert wrapped.get_tensor_datatype("global_in").name == "UINT8"
    assert wrapped.get_tensor_layout("global_in") == ["N", "C", "H", "W"]
    assert wrapped.check_all_tensor_shapes_specified()
    onnx.checker.check_model(wrapped.model)

    types = []
    for node in (node for node in graph.node if node.op_type in QUANTIZERS):
        operator, producer = cast(Any, getCustomOp(node)), wrapped.find_producer(node.input[0])
        scale = constant(wrapped, node.input[1])
        types.append(operator.get_integer_datatype(wrapped).name)
        if node.op_type == "Quant":
            assert constant(wrapped, node.input[2]) == 0
            assert operator.get_nodeattr("rounding_mode") == "ROUND"
            is_weight = producer is None
            assert [operator.get_nodeattr(name) for name in ("signed", "narrow")] == [is_weight, is_weight]
        if producer is not None:
            assert (producer.op_type, scale.size) == ("Relu", 1)
            continue
        (consumer,) = wrapped.find_consumers(node.output[0])
        shape = constant(wrapped, node.input[0]).shape
        channels = {"Conv": (shape[0], 1, 1, 1), "MatMul": (1, shape[-1])}[consumer.op_type]
        assert scale.shape == (() if consumer.output[0] == "global_out" else channels)
    weights = "BIPOLAR" if w_bits == 1 else f"INT{w_bits}"
    assert types == ["INT8", *[weights] * 8, *[f"UINT{a_bits}"] * 8]


@pytest.mark.parametrize(("w_bits", "a_bits"), [(4, 3), (1, 2)])
def test_finns_first_steps_in_the_qonnx_package_keep_the_logits(make_net, noise, tmp_path, w_bits, a_bits):
    wrapped = export(make_net(w_bits, a_bits), tmp_path)
    image = noise(3)[2:]
    expected = logits(wrapped, image)
    wrapped = cleanup_model(wrapped)  # of step_qonnx_to_finn, with what ConvertQONNXtoFINN has of qonnx
    for step in (ExtractBiasFromConv(), GemmToMatMul(), FoldTransposeIntoQuantInit(), InferDataTypes()):
        wrapped = wrapped.transform(step)
    for step in (  # step_tidy_up
        InferShapes(), FoldConstants(), GiveUniqueNodeNames(), GiveReadableTensorNames(), InferDataTypes(),
        RemoveStaticGraphInputs(),
    ):  # fmt: skip
        wrapped = wrapped.transform(step)
    np.testing.assert_array_equal(logits(wrapped, image), expected)
    # how step_streamline begins and ends
    for step in (ConvertSubToAdd(), ConvertDivToMul(), BatchNormToAffine(), InferDataLayouts(), RemoveUnusedTensors()):
        wrapped = wrapped.transform(step)
    np.testing.assert_allclose(logits(wrapped, image), expected, rtol=1e-4, atol=0.1 * expected.std())
    assert wrapped.get_tensor_datatype("global_in").name == "UINT8"
    layouts = {kind: wrapped.get_tensor_layout(wrapped.get_nodes_by_op_type(kind)[-1].output[0]) for kind in _LAYOUTS}
    assert layouts == _LAYOUTS
    wrapped = wrapped.transform(InsertTopK(k=1)).transform(InferShapes())
    assert logits(wrapped, image).item() == expected.argmax()


_LAYOUTS = {"Conv": ["N", "C", "H", "W"], "MaxPool": ["N", "C", "H", "W"], "Flatten": ["N", "C"], "MatMul": ["N", "C"]}


def test_qonnx_counts_the_same_cost_as_model_info(make_net, tmp_path):
    found = inference_cost(export(make_net(4, 3), tmp_path), discount_sparsity=False)["total_cost"]
    info = cnvzoo.model_info("quant_cnv", w_bits=4, a_bits=3)
    assert found["total_macs"] == info.macs
    assert found["total_mem_w_bits"] == 8 * info.weight_bytes
    first = 30 * 30 * 64 * 27
    macs = {name: value for name, value in found.items() if name.startswith("op_mac")}
    assert macs == {"op_mac_UINT8_SCALEDINT<8>": first, "op_mac_SCALEDINT<3>_SCALEDINT<4>": info.macs - first}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.features.__setitem__(2, nn.ReLU()), "features.2: ReLU is not quantized"),
        (lambda m: m.classifier.__setitem__(6, nn.Linear(512, 10)), "classifier.6: Linear is not quantized"),
        (lambda m: m.features[1].bias.data.fill_(float("nan")), "features.1.bias: not finite"),
    ],
)
def test_a_layer_that_is_not_quantized_is_named_and_nothing_is_written(make_net, tmp_path, change, message):
    model = copy.deepcopy(make_net(2, 2))
    change(model)
    with pytest.raises(DeployError, match=message):
        export(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_models_and_1_bit_activations_are_refused(make_net, tmp_path):
    with pytest.raises(
        DeployError,
        match=r"^\S+: QONNX has no node for 1-bit activations .*: give it 2 bits or more, by a_bits or bits$",
    ):
        export(make_net(1, 1), tmp_path)
    with pytest.raises(DeployError, match="is a float model"):
        export(cnvzoo.create_model("cnv"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_cnvzoo_runtime_refuses_qonnx(make_net, tmp_path):
    export(make_net(2, 2), tmp_path)
    with pytest.raises(DeployError, match="QONNX is for FINN"):
        cnvzoo.deploy.load(tmp_path / "m.onnx")
