"""Loading a checkpoint for other classes and channels: which tensors stay, which are new, and the warning."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import publish, registered_tiny, trained
from torch import Tensor, nn

from cnvzoo.checkpoints.format import CheckpointError
from cnvzoo.checkpoints.load import adapt_input, load_checkpoint
from cnvzoo.errors import ModelError
from cnvzoo.models import register_model
from cnvzoo.models.classifier import Classifier
from cnvzoo.models.quant import quantizer_of
from cnvzoo.zoo import create_model

QUANTIZED = {"name": "quant_cnv", "num_classes": 10, "in_chans": 3, "w_bits": 8, "a_bits": 8}
CASES = [
    ({"name": "resnet20", "num_classes": 10, "in_chans": 3}, "fc", "conv.weight"),
    (QUANTIZED, "classifier.6", "features.0.weight"),
]


@pytest.fixture(params=CASES, ids=lambda case: case[0]["name"])
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, nn.Module, str, str]:
    arguments, head, first = request.param
    model = trained(arguments)
    publish(tmp_path / "c", model, arguments)
    return tmp_path / "c", load_checkpoint(tmp_path / "c")[0], head, first


def images(in_chans: int) -> Tensor:
    return torch.rand(4, in_chans, 32, 32, generator=torch.Generator().manual_seed(1))


def test_other_classes_get_a_new_head(published: tuple[Path, nn.Module, str, str]) -> None:
    folder, model, head, _ = published
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match=rf"num_classes=7: {head} is new and untrained"):
        adapted, config = load_checkpoint(folder, num_classes=7)
    assert not adapted.training
    assert adapted(images(3)).shape == (4, 7)
    assert config.model["num_classes"] == 7
    own = model.state_dict()
    for name, tensor in adapted.state_dict().items():
        if not name.startswith(f"{head}."):
            assert torch.equal(tensor, own[name]), name
    torch.manual_seed(4)
    with pytest.warns(UserWarning, match="num_classes=7"):
        other = load_checkpoint(folder, num_classes=7)[0].state_dict()
    name = f"{head}.weight"
    assert other[name].std() > 0
    assert not torch.equal(other[name], adapted.state_dict()[name])  # initialised, by the caller's seed


def test_the_same_classes_change_nothing(published: tuple[Path, nn.Module, str, str]) -> None:
    folder, model, *_ = published
    same, _ = load_checkpoint(folder, num_classes=10, in_chans=3)
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_one_channel_responds_to_grey_images_like_three(published: tuple[Path, nn.Module, str, str]) -> None:
    folder, model, _, first = published
    with pytest.warns(UserWarning, match=rf"in_chans=1: the weights of {first.removesuffix('.weight')} are summed"):
        adapted, _ = load_checkpoint(folder, in_chans=1)
    grey = images(1)
    weight = model.state_dict()[first].sum(1, keepdim=True)
    assert torch.equal(adapted.state_dict()[first], weight)
    with torch.no_grad():
        expected, logits = model(grey.repeat(1, 3, 1, 1)), adapted(grey)
    # a sum of three 8-bit weights is not one 8-bit weight; float models differ by rounding alone
    allowed = 0.2 if hasattr(adapted.get_submodule(first.removesuffix(".weight")), "weight_quant") else 1e-4
    assert (logits - expected).square().mean().sqrt() < allowed * expected.std()


def test_quantized_scales_fit_the_adapted_weights(tmp_path: Path) -> None:
    publish(tmp_path / "c", trained(QUANTIZED), QUANTIZED)
    with pytest.warns(UserWarning, match="in_chans"):
        adapted, _ = load_checkpoint(tmp_path / "c", in_chans=1)
    layer: Any = adapted.get_submodule("features.0")
    error = (quantizer_of(layer)(layer.weight)[0] - layer.weight).square().sum() / layer.weight.square().sum()
    assert error < 1e-3  # the old scales would clip most sums: an error of a tenth and more


def test_both_at_once(published: tuple[Path, nn.Module, str, str]) -> None:
    folder, _, head, first = published
    with pytest.warns(UserWarning, match=rf"num_classes=2: {head} is new.*in_chans=5: .*repeated"):
        adapted, _ = load_checkpoint(folder, num_classes=2, in_chans=5)
    assert adapted(images(5)).shape == (4, 2)
    assert adapted.state_dict()[first].shape[1] == 5


@pytest.mark.parametrize(
    ("channels", "wanted", "expected"),
    [
        (3, 1, [6.0]),  # 1 + 2 + 3
        (3, 2, [1.5, 3.0]),
        (3, 4, [0.75, 1.5, 2.25, 0.75]),
        (3, 6, [0.5, 1.0, 1.5, 0.5, 1.0, 1.5]),
        (1, 3, [1 / 3, 1 / 3, 1 / 3]),
        (1, 2, [0.5, 0.5]),
    ],
)
def test_adapt_input(channels: int, wanted: int, expected: list[float]) -> None:
    """timm's adapt_input_conv: the sum for one channel, else in turn and rescaled."""
    weight = torch.arange(1.0, channels + 1).view(1, channels, 1, 1).expand(2, -1, 3, 3)
    adapted = adapt_input(weight, wanted)
    assert adapted.shape == (2, wanted, 3, 3)
    torch.testing.assert_close(adapted[0, :, 0, 0], torch.tensor(expected))


class Pooled(nn.Module):
    """A convolution, a mean and, but for `num_classes=0`, a linear layer; without the methods of a Classifier."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, 5, 3)
        self.fc = nn.Linear(5, num_classes) if num_classes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


class WithoutReset(Classifier):
    """A Classifier that does not define how its head is replaced."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.head_hidden_size = in_chans
        self.fc = nn.Linear(in_chans, num_classes)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.mean((2, 3)))


class OtherTensors(Pooled):
    """A wrong builder: without a head its tensors have other names."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__(num_classes, in_chans)
        if not num_classes:
            self.renamed = self.conv


OWN = {"name": "own", "num_classes": 2, "in_chans": 3}


def test_a_model_of_any_class_that_can_be_without_head_is_loaded_without_it(tmp_path: Path) -> None:
    with registered_tiny():
        register_model("own", summary="of tests", headless=True)(Pooled)
        model = trained(OWN)
        publish(tmp_path / "c", model, OWN)
        x = images(3)
        bare, config = load_checkpoint(tmp_path / "c", num_classes=0)
        assert torch.equal(bare(x), model.conv(x).mean((2, 3)))  # type: ignore[operator]
        assert torch.equal(create_model(tmp_path / "c", pretrained=True, num_classes=0)(x), bare(x))
        assert (bare.num_classes, bare.classes, config.classes, bare.training) == (0, None, [], False)
        with pytest.warns(UserWarning, match="in_chans=1"):
            grey, _ = load_checkpoint(tmp_path / "c", num_classes=0, in_chans=1)
        assert (grey(images(1)).shape, grey.num_classes, grey.in_chans) == ((4, 5), 0, 1)


@pytest.mark.parametrize(
    ("build", "headless", "message"),
    [
        (Pooled, False, "own cannot be without its last layer: register it with headless=True"),
        (WithoutReset, False, "own cannot be without its last layer: register it with headless=True"),
        (OtherTensors, True, "own without its last layer has other tensors: renamed.weight"),
    ],
)
def test_a_model_that_cannot_be_without_head_says_so(
    tmp_path: Path, build: Callable[..., nn.Module], headless: bool, message: str
) -> None:
    with registered_tiny():
        register_model("own", summary="of tests", headless=headless)(build)
        publish(tmp_path / "c", trained(OWN), OWN)
        for load in (load_checkpoint, partial(create_model, pretrained=True)):
            with pytest.raises(ModelError, match=f"^num_classes=0: {message}"):
                load(tmp_path / "c", num_classes=0)


class OfTwoClasses(Pooled):
    """A builder that fails in its own way for others."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__({2: 2, 0: 0}[num_classes], in_chans)


@pytest.mark.parametrize("headless", [False, True])
def test_an_error_of_the_builder_says_for_what(tmp_path: Path, headless: bool) -> None:
    with registered_tiny():
        register_model("own", summary="of tests", headless=headless)(OfTwoClasses)
        publish(tmp_path / "c", trained(OWN), OWN)
        for load in (load_checkpoint, partial(create_model, pretrained=True)):
            with pytest.raises(
                CheckpointError, match=r"^num_classes=3: .* cannot be built: KeyError: 3 \(test_adapt.py"
            ):
                load(tmp_path / "c", num_classes=3)


@pytest.mark.parametrize("arguments", [{"num_classes": -1}, {"in_chans": 0}, {"num_classes": 2.5}, {"in_chans": "3"}])
def test_impossible_requests(tmp_path: Path, arguments: dict[str, Any]) -> None:
    publish(tmp_path / "c", trained(CASES[0][0]), CASES[0][0])
    with pytest.raises(ModelError, match=next(iter(arguments))):
        load_checkpoint(tmp_path / "c", **arguments)


def test_a_topology_that_cannot_be_adapted(tmp_path: Path) -> None:
    class Depthwise(nn.Module):
        def __init__(self, num_classes: int, in_chans: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(in_chans, in_chans, 3, groups=in_chans)
            self.fc = nn.Linear(in_chans, num_classes)

    with registered_tiny():
        register_model("depthwise", summary="of tests")(Depthwise)
        arguments = {"name": "depthwise", "num_classes": 2, "in_chans": 3}
        publish(tmp_path / "c", trained(arguments), arguments)
        with pytest.raises(CheckpointError, match="in_chans=1: depthwise has no layer that could be adapted"):
            load_checkpoint(tmp_path / "c", in_chans=1)
