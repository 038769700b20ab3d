"""Networks with BatchNorm folded into the layer before it: the outputs are the same, and the original is unchanged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from cnvzoo.errors import ModelError
from cnvzoo.models import build_model
from cnvzoo.training.distillation import fold_batch_norms

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def trained(name: str) -> nn.Module:
    """A net whose BatchNorms do something, some of them with a negative factor."""
    torch.manual_seed(0)
    model = build_model(name, num_classes=10, in_chans=3).eval()
    for norm in model.modules():
        if isinstance(norm, NORMS):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            for tensor, low, high in (
                (norm.weight, -0.5, 1.5),
                (norm.bias, -0.3, 0.3),
                (norm.running_mean, -0.3, 0.3),
                (norm.running_var, 0.2, 2.0),
            ):
                nn.init.uniform_(tensor, low, high)
    return model


@pytest.mark.parametrize(("name", "left"), [("cnv", 0), ("mobilenet_v1", 0), ("resnet20", 19)])
def test_the_outputs_are_the_same(name: str, left: int) -> None:
    model = trained(name)
    images = torch.randn(4, 3, 32, 32)
    folded = fold_batch_norms(model)
    with torch.no_grad():
        torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-4)
        assert model(images).std() > 1e-3
    assert sum(isinstance(module, NORMS) for module in folded.modules()) == left


def test_the_original_network_is_unchanged() -> None:
    model = trained("cnv").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not fold_batch_norms(model).training
    assert model.training
    assert before.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_layer_that_is_used_twice_is_not_folded() -> None:
    torch.manual_seed(0)
    shared = nn.Conv2d(3, 3, 3, padding=1)
    parts = [nn.Sequential(shared, nn.BatchNorm2d(3)), nn.Sequential(shared, nn.BatchNorm2d(3))]
    model = nn.Sequential(*parts, nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8) + 1)
    folded, images = fold_batch_norms(model.eval()), torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-4)
    assert sum(isinstance(module, NORMS) for module in folded.modules()) == 2


def test_a_batch_norm_after_another_kind_of_layer_is_not_folded() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.BatchNorm1d(4))
    folded = fold_batch_norms(model)
    assert [type(layer) for layer in folded.children()] == [type(layer) for layer in model]


def test_layers_around_a_shared_activation_are_no_neighbours() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.Conv2d(4, 4, 1), shared, norm(), nn.Conv2d(4, 4, 1), norm())
    check_folded(model, left=1)


def test_a_batch_norm_that_follows_two_convolutions_is_folded_into_both() -> None:
    shared = norm()
    check_folded(nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.ReLU(), nn.Conv2d(4, 4, 1), shared), left=0)


class Centred(nn.Conv2d):
    """Computes with another weight than it holds, as a weight-standardised convolution does."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Rectified(nn.BatchNorm2d):
    """Does more than its base class."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(torch.relu(input))


class Backwards(nn.Sequential):
    """Applies its last layer first."""

    def forward(self, input: Tensor) -> Tensor:
        for layer in reversed(list(self)):
            input = layer(input)
        return input


def with_hook(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda _module, _inputs, output: output.abs())
    return layer


def norm(**options: bool) -> nn.BatchNorm2d:
    """Of four channels, with other statistics than those that it starts with."""
    made = nn.BatchNorm2d(4, **options)
    if made.running_mean is not None:
        made.running_mean += 0.3
    return made


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(Centred(3, 4, 1), norm()),
        nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), norm()),
        nn.Sequential(with_hook(nn.Conv2d(3, 4, 1)), norm()),
        nn.Sequential(nn.Conv2d(3, 4, 1), Rectified(4)),
        nn.Sequential(nn.Conv2d(3, 4, 1), norm(track_running_stats=False)),
        Backwards(nn.Conv2d(4, 4, 1), norm(), nn.Conv2d(3, 4, 1)),
    ],
    ids=["subclass", "parametrized", "hook", "subclass of BatchNorm", "statistics of the batch", "other order"],
)
def test_a_layer_that_may_compute_something_else_is_not_folded(model: nn.Sequential) -> None:
    check_folded(model, left=1)


def test_a_batch_norm_over_channels_is_not_taken_for_one_over_the_features_of_a_linear_layer() -> None:
    """As many of both: nothing but the number of dimensions tells them apart."""
    layers = [nn.Linear(4, 4), nn.BatchNorm1d(4)]
    layers[1].weight.data[:] = torch.tensor([1.0, 2.0, -1.0, 0.5])
    rows, sequences = torch.randn(5, 4), torch.randn(5, 4, 4)
    folded = fold_batch_norms(nn.Sequential(*layers).eval())
    torch.testing.assert_close(folded(rows), layers[1](layers[0](rows)))
    with pytest.raises(ModelError, match=r"outputs are \[5, 4, 4\], not \[B, F\]: put it into a module of its own"):
        folded(sequences)
    apart = fold_batch_norms(nn.Sequential(layers[0], nn.Sequential(layers[1])))
    assert torch.equal(apart(sequences), layers[1](layers[0](sequences)))


def check_folded(model: nn.Module, left: int) -> None:
    """The outputs stay the same, and so many BatchNorms are left."""
    folded, images = fold_batch_norms(model.eval()), torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-4)
    assert sum(isinstance(module, NORMS) for module in folded.modules()) == left
