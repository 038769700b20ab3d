"""Models by name: their costs, creating, evaluating and quantizing them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import cnvzoo
from cnvzoo.checkpoints.folder import write_checkpoint
from cnvzoo.checkpoints.format import CheckpointFacts, SeedResult
from cnvzoo.data import Dataset, Preprocessing, dataset_info
from cnvzoo.errors import ModelError
from cnvzoo.files import sha256_of
from cnvzoo.models.layers import FloatLayers, Layers
from cnvzoo.models.quant_layers import QuantLayers

# CNV at 10 classes and 3 channels: 3x3 filters and output side of each convolution, then weights of linear layers.
CNV_CONVS = [(3 * 64, 30), (64 * 64, 28), (64 * 128, 12), (128 * 128, 10), (128 * 256, 3), (256 * 256, 1)]
CNV_LINEARS = 256 * 512 + 512 * 512
CNV_WEIGHTS = sum(9 * filters for filters, _ in CNV_CONVS) + CNV_LINEARS + 512 * 10


def cnv_macs(num_classes: int, in_chans: int = 3) -> int:
    first = in_chans * 64 * 9 * 30**2
    return first + sum(9 * f * side**2 for f, side in CNV_CONVS[1:]) + CNV_LINEARS + 512 * num_classes


def resnet_macs(depth: int, size: int) -> int:
    """Stem, 3 stages of 2n convolutions, two 1x1 shortcuts, head."""
    n = (depth - 2) // 6
    macs = 3 * 16 * 9 * size**2 + 64 * 10
    for stage, width in enumerate((16, 32, 64)):
        area = (size >> stage) ** 2
        macs += 2 * n * 9 * width**2 * area
        if stage:
            macs += (width // 2 * width - 9 * width * width // 2) * area  # 1x1; and the first 3x3 has half the inputs
    return macs


def mobilenet_macs() -> int:
    macs, width, side = 3 * 32 * 9 * 32**2, 32, 32
    for out in (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024):
        if out > width and out > 64:
            side //= 2
        macs += (9 * width + width * out) * side**2
        width = out
    return macs + 1024 * 10


def test_macs_of_cnv() -> None:
    assert cnvzoo.model_info("cnv").macs == cnv_macs(10)
    assert cnvzoo.model_info("cnv", num_classes=100, in_chans=1).macs == cnv_macs(100, in_chans=1)
    assert cnvzoo.model_info("quant_cnv", w_bits=2, a_bits=2).macs == cnv_macs(10)


@pytest.mark.parametrize(("depth", "size"), [(20, 32), (20, 28), (32, 32)])
def test_macs_of_cifar_resnets(depth: int, size: int) -> None:
    info = cnvzoo.model_info(f"resnet{depth}", input_size=size)
    assert info.macs == resnet_macs(depth, size)
    assert info.input_shape == (3, size, size)


def test_macs_of_mobilenet() -> None:
    assert cnvzoo.model_info("mobilenet_v1").macs == mobilenet_macs()


def test_info_of_a_float_model() -> None:
    info = cnvzoo.model_info("cnv")
    assert info.name == "cnv"
    assert "Umuroglu" in info.summary
    assert info.input_shape == (3, 32, 32)
    assert info.parameters == 1_546_688
    assert info.weight_bytes == 4 * CNV_WEIGHTS
    # without the bias of the last layer and the BatchNorms
    resnet = cnvzoo.model_info("resnet20")
    assert resnet.weight_bytes == 4 * (272_474 - 10 - 2 * (16 * 7 + 32 * 7 + 64 * 7))


@pytest.mark.parametrize("w_bits", [1, 2, 3, 4, 8])
def test_weight_bytes_of_quantized_models(w_bits: int) -> None:
    first = 3 * 64 * 9
    bits = first * 8 + (CNV_WEIGHTS - first) * w_bits
    assert bits % 8 == 0
    assert cnvzoo.model_info("quant_cnv", w_bits=w_bits, a_bits=2).weight_bytes == bits // 8
    info = cnvzoo.model_info("quant_cnv", w_bits=w_bits, a_bits=2, first_w_bits=3)
    assert info.weight_bytes == (bits - first * 5) // 8


def test_weight_bytes_are_rounded_up() -> None:
    info = cnvzoo.model_info("quant_cnv", w_bits=1, a_bits=1, num_classes=1, first_w_bits=7)
    assert info.weight_bytes == -(-(3 * 64 * 9 * 7 + (CNV_WEIGHTS - 3 * 64 * 9 - 512 * 9)) // 8)


def test_info_refuses_the_arguments_that_create_refuses() -> None:
    with pytest.raises(ModelError, match="quant_cnv"):
        cnvzoo.model_info("cnv", w_bits=2, a_bits=2)
    with pytest.raises(ModelError, match="32x32"):
        cnvzoo.model_info("cnv", input_size=28)
    for size in (0, -8, True, np.bool_(True), 8.0):
        with pytest.raises(ModelError, match=r"input_size=.*height and width, at least 1 pixel"):
            cnvzoo.model_info("resnet20", input_size=size)  # type: ignore[arg-type]


def test_info_takes_the_whole_numbers_of_numpy() -> None:
    info = cnvzoo.model_info("resnet20", input_size=np.int64(16), in_chans=np.uint8(1))  # type: ignore[arg-type]
    assert info == cnvzoo.model_info("resnet20", input_size=16, in_chans=1)
    assert [type(number) for number in info.input_shape] == [int, int, int]


def test_list_models() -> None:
    assert set(cnvzoo.list_models("resnet*")) == {f"resnet{n}" for n in (18, 20, 32, 44, 56, 110)}
    assert cnvzoo.list_models("*cnv") == ["cnv", "quant_cnv"]
    assert cnvzoo.list_models("vgg*") == []
    assert len(cnvzoo.list_models()) == 16  # eight topologies, float and quantized
    assert cnvzoo.list_models(["*cnv", "mobile*"], exclude="quant*") == ["cnv", "mobilenet_v1"]
    assert set(cnvzoo.list_models(exclude=["*cnv", "*resnet??", "*resnet110"])) == {
        "mobilenet_v1",
        "quant_mobilenet_v1",
    }
    assert cnvzoo.list_models([]) == []


def test_list_pretrained_models() -> None:
    names = cnvzoo.list_models(pretrained=True)
    assert names == [row["name"] for row in cnvzoo.list_checkpoints()]
    assert {"cnv.mnist", "quant_cnv_w2a2.mnist", "resnet20.cifar10"} <= set(names)
    assert cnvzoo.list_models(["cnv.*", "quant_cnv_w2*"], pretrained=True, exclude="*.*[!t]") == [
        "cnv.fashion_mnist", "cnv.mnist", "quant_cnv_w2a2.fashion_mnist", "quant_cnv_w2a2.mnist",
    ]  # fmt: skip


def test_create_model() -> None:
    model = cnvzoo.create_model("quant_cnv", num_classes=100, in_chans=1, w_bits=4, a_bits=4)
    assert model.training
    assert model.eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 100)
    with pytest.raises(cnvzoo.CnvzooError, match="did you mean 'resnet110'"):
        cnvzoo.create_model("resnet101")


# --- evaluate ------------------------------------------------------------------------------------------------------


class Brightest(nn.Module):
    """Classifies by the channel with the largest mean; records its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))
        self.fed: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        self.fed.append(x)
        return nn.functional.pad(x.mean((2, 3)), (0, 7)) + self.unused  # 10 classes, of which 3 occur


def colours(n: int, right: int) -> Dataset:
    """n test images with one bright channel each, which is the label of the first `right`."""
    channel = torch.arange(n) % 3
    images = torch.full((n, 32, 32, 3), 40, dtype=torch.uint8)
    images[torch.arange(n), :, :, channel] = 200
    labels = channel.clone()
    labels[right:] = (channel[right:] + 1) % 3
    info = replace(dataset_info("cifar10"), train_size=1, test_size=n)
    return Dataset(info, images[:1], labels[:1].to(torch.uint8), images, labels.to(torch.uint8))


RAW = Preprocessing(32, (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(("n", "right"), [(1, 1), (7, 0), (7, 7), (1201, 800)])
def test_evaluate_counts_every_image_once(n: int, right: int) -> None:
    model = Brightest()
    result = cnvzoo.evaluate(model, colours(n, right), preprocessing=RAW, device="cpu")
    assert (result.correct, result.total) == (right, n)
    assert result.accuracy == 100 * right / n
    assert sum(len(x) for x in model.fed) == n
    assert model.training
    cnvzoo.evaluate(model.eval(), colours(3, 3), preprocessing=RAW, device="cpu")
    assert not model.training


def test_evaluate_preprocesses_images_as_training_does() -> None:
    """Float models take normalised images, quantized ones uint8 / 255."""
    data = colours(4, 4)
    fed: list[Tensor] = []
    pixels = torch.tensor([40.0, 200.0]) / 255
    info = dataset_info("cifar10")
    for model, mean, std in (
        (cnvzoo.create_model("resnet20"), torch.tensor(info.mean), torch.tensor(info.std)),
        (cnvzoo.create_model("quant_cnv", w_bits=2, a_bits=2), torch.zeros(3), torch.ones(3)),
    ):
        handle = model.register_forward_pre_hook(lambda m, args: fed.append(args[0]))
        cnvzoo.evaluate(model, data, device="cpu")
        handle.remove()
        expected = ((pixels[0] - mean) / std).repeat(4, 1)
        rows, bright = torch.arange(4), torch.arange(4) % 3
        expected[rows, bright] = ((pixels[1] - mean) / std)[bright]
        torch.testing.assert_close(fed[-1].mean((2, 3)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_dtypes_are_scored_as_they_are(dtype: torch.dtype) -> None:
    model = cnvzoo.create_model("resnet20.cifar10", pretrained=True)
    data = cnvzoo.Dataset.from_arrays(
        torch.randint(256, (40, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        [0] * 40,
        [str(n) for n in range(10)],
    )
    expected = cnvzoo.evaluate(model, data, device="cpu").predictions
    found = cnvzoo.evaluate(model.to(dtype), data, device="cpu").predictions
    assert (found == expected).sum() >= len(expected) - 1
    image = data.train_images[0].permute(2, 0, 1)
    assert sum(guess.probability for guess in cnvzoo.predict(model, image, top=10)) == pytest.approx(1, abs=0.01)


def test_evaluate_pads_small_images_for_cnv() -> None:
    info = replace(dataset_info("mnist"), train_size=1, test_size=2)
    images, labels = torch.full((2, 28, 28, 1), 255, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)
    data = Dataset(info, images[:1], labels[:1], images, labels)
    fed: list[Tensor] = []
    model = cnvzoo.create_model("quant_cnv", in_chans=1, w_bits=2, a_bits=2)
    model.register_forward_pre_hook(lambda m, args: fed.append(args[0]))
    cnvzoo.evaluate(model, data, device="cpu")
    assert fed[0].shape == (2, 1, 32, 32)
    assert float(fed[0][0].sum()) == pytest.approx(28 * 28)
    assert not fed[0][:, :, :2].any()


def test_evaluate_refuses_images_that_cannot_be_padded() -> None:
    images = torch.zeros(2, 31, 31, 3, dtype=torch.uint8)
    data = Dataset.from_arrays(images, [0, 1], ["a", "b"], test_images=images, test_labels=[0, 1])
    with pytest.raises(cnvzoo.DatasetError, match="Images of side 31 cannot be padded symmetrically to 32"):
        cnvzoo.evaluate(cnvzoo.create_model("cnv", num_classes=2), data, device="cpu")


def test_evaluate_needs_the_preprocessing_of_other_modules() -> None:
    with pytest.raises(ModelError, match=r"Brightest is not a model of cnvzoo.*preprocessing="):
        cnvzoo.evaluate(Brightest(), colours(3, 3))


class Shaped(nn.Module):
    """Returns what `shape` makes of the logits."""

    def __init__(self, shape: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.zeros(()))
        self.preprocessing = RAW

    def forward(self, x: Tensor) -> Any:
        return self.shape(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("shape", "returned"),
    [
        (lambda x: {"logits": x}, "a dict"),
        (lambda x: (x, x), "a tuple"),
        (lambda x: x[:, 0], "a tensor of shape [{}]"),
        (lambda x: x[:, :, None, None], "a tensor of shape [{}, 3, 1, 1]"),
    ],
)
def test_a_model_that_does_not_return_logits_is_refused(shape: Callable[[Tensor], Any], returned: str) -> None:
    model, data = Shaped(shape), colours(3, 3)
    for call, images in (
        (lambda: cnvzoo.evaluate(model, data, preprocessing=RAW, device="cpu"), 3),
        (lambda: cnvzoo.predict(model, [image.permute(2, 0, 1) for image in data.test_images[:2]]), 2),
    ):
        says = f"the model returns {returned.format(images)} for {images} image(s), not logits [{images}, K]: give a"
        with pytest.raises(ModelError, match=f"^{re.escape(says)} module that returns these$"):
            call()


def test_an_exported_program_is_refused_in_a_line() -> None:
    program = torch.export.export(nn.Flatten(), (torch.zeros(1, 3, 32, 32),)).module()
    with pytest.raises(ModelError, match=r"^GraphModule has no eval mode.*: give the model that it was exported from$"):
        cnvzoo.evaluate(program, colours(3, 3), preprocessing=RAW, device="cpu")


class Volumes(nn.Module):
    """The means of the channels, through a convolution of five dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 10, (3, 1, 1), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, None]).mean((2, 3, 4))


def test_a_model_with_weights_of_five_dimensions_is_evaluated() -> None:
    model, data = Volumes(), colours(3, 3)
    with torch.no_grad():
        expected = model(RAW(data.test_images)).argmax(1)
    assert torch.equal(cnvzoo.evaluate(model, data, preprocessing=RAW, device="cpu").predictions, expected)


# --- quantize ------------------------------------------------------------------------------------------------------


def logits_of(model: nn.Module, preprocessing: Preprocessing, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(preprocessing(images))


def cnv_with_statistics_of(images: Tensor, preprocessing: Preprocessing) -> nn.Module:
    torch.manual_seed(0)
    model = cnvzoo.create_model("cnv", num_classes=5)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = None
    with torch.no_grad():
        for batch in preprocessing(images).split(16):
            model(batch)
    return model


def test_quantize_keeps_the_logits_of_the_float_model(tmp_path: Path) -> None:
    preprocessing = Preprocessing.for_dataset(dataset_info("cifar10"))
    images = torch.randint(256, (48, 8, 8, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    images = images.repeat_interleave(4, 1).repeat_interleave(4, 2)
    float_model = cnv_with_statistics_of(images, preprocessing)
    expected = logits_of(float_model, preprocessing, images[:8])

    save_file(float_model.state_dict(), tmp_path / "w.safetensors")
    sha256 = sha256_of(tmp_path / "w.safetensors")
    facts: dict[str, Any] = {"versions": {}, "device": {}, "commit": None, "recipe": {}, "weights_sha256": sha256}
    write_checkpoint(
        tmp_path / "cnv.cifar10",
        CheckpointFacts(
            name="cnv.cifar10",
            model={"name": "cnv", "num_classes": 5, "in_chans": 3},
            dataset="cifar10",
            classes=list("abcde"),
            preprocessing=preprocessing.to_dict(),
            seed=0,
            correct=1,
            total=2,
            results=[SeedResult(seed=0, correct=1, total=2, weights_sha256=sha256)],
            **facts,
        ),
        tmp_path / "w.safetensors",
    )
    for source, dataset in ((float_model, "cifar10"), (tmp_path / "cnv.cifar10", None)):
        model = cnvzoo.quantize(source, w_bits=8, a_bits=8, dataset=dataset)
        assert model.training
        logits = logits_of(model, RAW, images[:8])
        assert (logits - expected).square().mean().sqrt() < 0.25 * expected.std()
    low = cnvzoo.quantize(float_model, w_bits=1, a_bits=2, first_w_bits=2, dataset=preprocessing)
    assert logits_of(low, RAW, images[:8]).shape == (8, 5)


def test_quantize_refuses_other_models_and_a_missing_dataset() -> None:
    float_model = cnvzoo.create_model("cnv")
    with pytest.raises(ModelError, match="dataset="):
        cnvzoo.quantize(float_model, w_bits=4, a_bits=4)
    with pytest.raises(ModelError, match="w_bits=9"):
        cnvzoo.quantize(float_model, w_bits=9, a_bits=4, dataset="cifar10")
    with pytest.raises(ModelError, match="Linear has no quantized twin"):
        cnvzoo.quantize(nn.Linear(2, 2), w_bits=4, a_bits=4, dataset="cifar10")
    changed = cnvzoo.create_model("resnet20")
    changed.conv = nn.Conv2d(3, 16, 5, padding=2)
    with pytest.raises(ModelError, match=r"resnet20 cannot be quantized after its layers were changed.*conv\.bias"):
        cnvzoo.quantize(changed, w_bits=4, a_bits=4, dataset="cifar10")
    with pytest.raises(cnvzoo.CnvzooError, match="checkpoint folder"):
        cnvzoo.quantize("no/such/folder", w_bits=4, a_bits=4)


def test_quantize_takes_a_loaded_dataset() -> None:
    model = cnvzoo.create_model("resnet20")
    found = cnvzoo.quantize(model, w_bits=4, a_bits=4, dataset=colours(4, 2)).state_dict()
    expected = cnvzoo.quantize(model, w_bits=4, a_bits=4, dataset=Preprocessing.for_dataset(colours(4, 2).info))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.state_dict().items())
    with pytest.raises(ModelError, match=r"^dataset=3: the name of a dataset, a Dataset or a Preprocessing$"):
        cnvzoo.quantize(model, w_bits=4, a_bits=4, dataset=3)  # type: ignore[arg-type]


def test_quantize_asks_to_load_own_images() -> None:
    model = cnvzoo.create_model("resnet20")
    with pytest.raises(
        ModelError, match=r"^dataset='\./photos': load it: dataset=cnvzoo\.load_dataset\('\./photos'\)$"
    ):
        cnvzoo.quantize(model, w_bits=4, a_bits=4, dataset="./photos")
    with pytest.raises(ModelError, match=r"^dataset=\w+\('photos'\): load it: dataset=cnvzoo\.load_dataset\("):
        cnvzoo.quantize(model, w_bits=4, a_bits=4, dataset=Path("photos"))  # type: ignore[arg-type]


def test_quantize_refuses_an_unknown_dataset_for_quantized_models_too() -> None:
    for model in (cnvzoo.create_model("cnv"), cnvzoo.create_model("quant_cnv", w_bits=4, a_bits=4)):
        with pytest.raises(cnvzoo.DatasetError, match="unknown dataset 'cifar11': did you mean 'cifar10'"):
            cnvzoo.quantize(model, w_bits=2, a_bits=2, dataset="cifar11")


def test_quantize_takes_a_registered_twin_without_bits_of_its_own_for_the_first_layer() -> None:
    @cnvzoo.register_model("mine", summary="of tests")
    def mine(num_classes: int, in_chans: int) -> nn.Module:
        return cnvzoo.create_model("cnv", num_classes=num_classes, in_chans=in_chans)

    @cnvzoo.register_model("quant_mine", summary="of tests", quantized=True, float_twin="mine")
    def quant_mine(num_classes: int, in_chans: int, w_bits: int, a_bits: int) -> nn.Module:
        return cnvzoo.create_model(
            "quant_cnv", num_classes=num_classes, in_chans=in_chans, w_bits=w_bits, a_bits=a_bits
        )

    try:
        model = cnvzoo.quantize(cnvzoo.create_model("mine"), w_bits=2, a_bits=2, dataset="cifar10")
        assert model.arguments == {"name": "quant_mine", "num_classes": 10, "in_chans": 3, "w_bits": 2, "a_bits": 2}
        with pytest.raises(ModelError, match="quant_mine has no option 'first_w_bits'"):
            cnvzoo.quantize(cnvzoo.create_model("mine"), w_bits=2, a_bits=2, first_w_bits=4, dataset="cifar10")
    finally:
        cnvzoo.unregister_model("mine")
        cnvzoo.unregister_model("quant_mine")


@pytest.mark.parametrize("order", ["pool", "no norm", "sum", "block"])
def test_quantize_names_the_layer_of_a_pair_that_it_cannot_fit(order: str) -> None:
    """Scales are fitted to what the BatchNorms give."""

    class Pair(cnvzoo.Classifier):
        def __init__(self, layers: Layers, num_classes: int, in_chans: int) -> None:
            super().__init__()
            self.input = layers.input()
            self.conv = layers.conv(in_chans, 4, 3, padding=1, first=True)
            self.norm = nn.Identity() if order == "no norm" else nn.BatchNorm2d(4)
            self.pool = nn.MaxPool2d(2)
            self.act = layers.residual_relu(1) if order == "sum" else layers.relu()
            self.round = layers.block_input()
            self.fc = layers.linear(4, num_classes, last=True)

        def get_classifier(self) -> nn.Module:
            return self.fc

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.conv(self.input(x)))
            if order == "pool":
                x = self.act(self.pool(x))
            elif order == "sum":
                x = self.act(x, self.pool(x), rounded=True)
            else:
                x = self.act(x)
                x = self.round(x) if order == "block" else x
            return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))

    @cnvzoo.register_model("pair", summary="of tests")
    def pair(num_classes: int, in_chans: int) -> nn.Module:
        return Pair(FloatLayers(), num_classes, in_chans)

    @cnvzoo.register_model("quant_pair", summary="of tests", quantized=True, float_twin="pair")
    def quant_pair(num_classes: int, in_chans: int, w_bits: int, a_bits: int) -> nn.Module:
        return Pair(QuantLayers(w_bits, a_bits, 8), num_classes, in_chans)

    says = {
        "pool": "act: a quantized activation has to follow a BatchNorm",
        "no norm": "conv: a quantized model has to begin with a quantized convolution and a BatchNorm, which take over "
        "the normalisation of the images",
        "sum": "act: a residual activation adds outputs of BatchNorms and of its own kind only",
        "block": "round: what rounds the input of a block has to follow a residual activation",
    }[order]
    try:
        with pytest.raises(ModelError, match=f"^pair cannot be quantized as quant_pair: {says}$"):
            cnvzoo.quantize(cnvzoo.create_model("pair"), w_bits=4, a_bits=4, dataset="cifar10")
    finally:
        cnvzoo.unregister_model("pair")
        cnvzoo.unregister_model("quant_pair")


@pytest.mark.parametrize(("in_chans", "dataset"), [(3, "mnist"), (1, "cifar10")])
def test_quantize_refuses_the_preprocessing_of_other_channels(in_chans: int, dataset: str) -> None:
    model = cnvzoo.create_model("cnv", in_chans=in_chans)
    with pytest.raises(ModelError, match=f"takes {in_chans} channel.*give the dataset"):
        cnvzoo.quantize(model, w_bits=4, a_bits=4, dataset=dataset)
