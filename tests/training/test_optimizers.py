"""Which parameter is in which group, and that Muon's step is orthogonal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from cnvzoo.errors import ModelError
from cnvzoo.models import build_model
from cnvzoo.training import Optimizer
from cnvzoo.training.optimizers import Muon, build_optimizers, orthogonalize

MODELS = {
    "cnv": {},
    "resnet20": {},
    "mobilenet_v1": {},
    "quant_cnv": {"w_bits": 2, "a_bits": 3},
    "quant_resnet20": {"w_bits": 2, "a_bits": 3},
}
OPTIMIZERS = {
    "sgd": Optimizer(name="sgd", lr=0.1, weight_decay=0.25),
    "muon": Optimizer(name="muon", lr=0.02, sgd_lr=0.3, weight_decay=0.25),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build_model(request.param, **MODELS[request.param])


def groups_by_parameter(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, dict[str, Any]]:
    """The group of each parameter by name, which must be one, of `optimizers`."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(names[id(p)], group) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert Counter(name for name, _ in found) == Counter(names.values())
    return dict(found)


@pytest.mark.parametrize("config", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_only_filters_decay(model: nn.Module, config: Optimizer) -> None:
    groups = groups_by_parameter(model, build_optimizers(model, config))
    for name, parameter in model.named_parameters():
        # weights of convolutions are [out, in, h, w], of linear layers [out, in], of BatchNorm [channels]
        is_filter = name.endswith(".weight") and parameter.dim() > 1
        assert groups[name]["weight_decay"] == (0.25 if is_filter else 0), name


def test_in_a_quantized_cnv_nine_filters_decay_and_seventeen_scales_do_not() -> None:
    model = build_model("quant_cnv", w_bits=2, a_bits=3)
    groups = groups_by_parameter(model, build_optimizers(model, OPTIMIZERS["sgd"]))
    decay = {name for name, group in groups.items() if group["weight_decay"]}
    convolutions = {f"features.{i}.weight" for i in (0, 3, 7, 10, 14, 17)}
    assert decay == convolutions | {f"classifier.{i}.weight" for i in (0, 3, 6)}
    # of nine layers' weights, and of the activations behind all but the last
    assert sum(name.endswith(".scale") for name in groups.keys() - decay) == 9 + 8


def test_muon_moves_the_hidden_filters_and_sgd_the_rest(model: nn.Module) -> None:
    muon, sgd = build_optimizers(model, OPTIMIZERS["muon"])
    assert isinstance(muon, Muon)
    assert isinstance(sgd, torch.optim.SGD)
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    groups = groups_by_parameter(model, [muon, sgd])
    for name, group in groups.items():
        depthwise = model.get_parameter(name).shape[1:] == (1, 3, 3)
        hidden = name.removesuffix(".weight") in layers[1:-1] and not depthwise
        assert group["peak_lr"] == (0.02 if hidden else 0.3), name
        assert any(group is g for g in (muon if hidden else sgd).param_groups), name


def test_first_and_last_layer_of_a_resnet_stay_with_sgd() -> None:
    model = build_model("resnet20")
    _, sgd = build_optimizers(model, OPTIMIZERS["muon"])
    groups = groups_by_parameter(model, build_optimizers(model, OPTIMIZERS["muon"]))
    decaying = [p for g in sgd.param_groups if g["weight_decay"] for p in g["params"]]
    assert {id(p) for p in decaying} == {id(model.get_parameter(name)) for name in ("conv.weight", "fc.weight")}
    assert groups["stages.0.0.conv1.weight"]["peak_lr"] == 0.02


def test_the_13_depthwise_layers_of_mobilenet_v1_stay_with_sgd_and_decay_with_its_rate() -> None:
    model = build_model("mobilenet_v1")
    config = Optimizer(name="muon", lr=0.02, sgd_lr=0.3, weight_decay=0.25, sgd_weight_decay=0.125)
    groups = groups_by_parameter(model, build_optimizers(model, config))
    weights = {name: p for name, p in model.named_parameters() if p.dim() == 4 and p.shape[1:] == (1, 3, 3)}
    assert len(weights) == 13
    assert {(groups[name]["peak_lr"], groups[name]["weight_decay"]) for name in weights} == {(0.3, 0.125)}


@pytest.mark.parametrize("sgd_weight_decay", [0.0, 5e-4])
def test_first_and_last_layer_may_decay_otherwise_with_muon(sgd_weight_decay: float) -> None:
    model = build_model("resnet20")
    config = Optimizer(name="muon", lr=0.02, sgd_lr=0.3, weight_decay=0.25, sgd_weight_decay=sgd_weight_decay)
    groups = groups_by_parameter(model, build_optimizers(model, config))
    for name in ("conv.weight", "fc.weight"):
        assert groups[name]["weight_decay"] == sgd_weight_decay
    assert groups["stages.0.0.conv1.weight"]["weight_decay"] == 0.25
    assert groups["norm.weight"]["weight_decay"] == groups["fc.bias"]["weight_decay"] == 0


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.0, False)])
def test_sgd_is_nesterov_where_it_has_momentum(momentum: float, nesterov: bool) -> None:
    (sgd,) = build_optimizers(nn.Linear(3, 2), Optimizer(name="sgd", lr=0.1, momentum=momentum))
    assert all((g["momentum"], g["nesterov"]) == (momentum, nesterov) for g in sgd.param_groups)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SHAPES = {
    "nearly square": (64, 96),
    "wide": (16, 200),
    "tall": (200, 16),
    "filters": (32, 16, 3, 3),
    "first filters": (64, 3, 3, 3),
    "depthwise": (48, 1, 3, 3),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_orthogonalized_updates_have_singular_values_about_one(shape: tuple[int, ...], size: float) -> None:
    update = draw(*shape) * size
    (result,) = orthogonalize([update])
    assert result.shape == update.shape
    assert result.dtype == torch.float32
    matrix = result.flatten(1)
    scale = 0.2 * max(matrix.shape) ** 0.5  # gives a semi-orthogonal matrix entries of root mean square 0.2
    singular = torch.linalg.svdvals(matrix) / scale
    assert 0.6 < singular.min() <= singular.max() < 1.3
    assert matrix.square().mean().sqrt() == pytest.approx(0.2, rel=0.25)


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
def test_orthogonalized_updates_keep_the_singular_directions(shape: tuple[int, int]) -> None:
    update = draw(*shape)
    u, _, vh = torch.linalg.svd(update, full_matrices=False)
    in_its_basis = u.T @ orthogonalize([update])[0] @ vh.T / (0.2 * max(shape) ** 0.5)
    assert (in_its_basis - torch.diag(in_its_basis.diagonal())).abs().max() < 0.05
    assert in_its_basis.diagonal().min() > 0.6


def test_a_batch_of_updates_gives_what_each_gives_alone() -> None:
    updates = [draw(*shape, seed=seed) for seed in range(3) for shape in ((8, 4, 3, 3), (20, 8), (8, 20))]
    together = orthogonalize(updates)
    for update, result in zip(updates, together, strict=True):
        (alone,) = orthogonalize([update])
        torch.testing.assert_close(result, alone, rtol=0, atol=0.02)  # bfloat16 inside


@pytest.mark.parametrize(("instructions", "error"), [("AVX512_CORE", 0.02), ("AVX2", 1e-5)])
@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
def test_the_iteration_maps_singular_values_in_the_dtype_of_training(
    shape: tuple[int, int], instructions: str, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the quintic of Jordan et al. applied to each singular value, in float64."""
    monkeypatch.setattr("cnvzoo.training.device.onednn_level", lambda: instructions)
    update = draw(*shape)
    u, s, vh = torch.linalg.svd(update.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = (u * s) @ vh * 0.2 * 60**0.5
    difference = (orthogonalize([update])[0].double() - expected).abs().max().item()
    assert error / 1000 < difference < error


def test_muon_step_is_nesterov_momentum_orthogonalized_and_decoupled_decay() -> None:
    weight = nn.Parameter(draw(6, 10, seed=1))
    muon = Muon([weight], lr=0.1, momentum=0.75, weight_decay=0.5)
    expected, velocity = weight.detach().clone(), torch.zeros(6, 10)
    for seed in (2, 3):
        weight.grad = draw(6, 10, seed=seed)
        velocity = 0.75 * velocity + 0.25 * weight.grad
        ahead = 0.25 * weight.grad + 0.75 * velocity
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * orthogonalize([ahead])[0]
        muon.step()
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-3)


def test_muon_leaves_parameters_without_gradient_alone() -> None:
    used, unused = nn.Parameter(draw(4, 4)), nn.Parameter(draw(4, 4))
    used.grad = draw(4, 4, seed=1)
    before = unused.detach().clone()
    muon = Muon([used, unused], weight_decay=0.1)
    muon.step()
    assert torch.equal(unused, before)
    assert not torch.equal(used, before)
    Muon([unused]).step()


class Tied(nn.Module):
    """The first layer and the last have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.last = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.last.weight = self.first.weight


def test_a_weight_that_layers_share_is_updated_once() -> None:
    model = Tied()
    muon, sgd = build_optimizers(model, OPTIMIZERS["muon"])
    assert [len(group["params"]) for group in sgd.param_groups] == [2, 0]
    assert muon.param_groups[0]["params"] == []
    (plain,) = build_optimizers(model, OPTIMIZERS["sgd"])
    assert [len(group["params"]) for group in plain.param_groups] == [2, 0]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal, nn.utils.weight_norm],
    ids=["weight_norm", "spectral_norm", "orthogonal", "older weight_norm"],
)
@pytest.mark.parametrize("config", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_parameters_that_a_weight_is_computed_from_are_trained(
    wrap: Callable[[nn.Module], nn.Module], config: Optimizer
) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)), wrap(nn.Linear(4, 4)))
    wrap(model[1])
    optimizers = build_optimizers(model, config)
    groups = groups_by_parameter(model, optimizers)
    assert {name for name, group in groups.items() if group["weight_decay"]} == {"0.weight", "2.weight", "3.weight"}
    model(torch.ones(2, 4)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize("model", [nn.BatchNorm2d(3), nn.Sequential(nn.Flatten(), nn.Linear(3, 2))])
def test_muon_needs_hidden_layers(model: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"has [01] convolution or linear layers: .*use `optimizer: {name: sgd}`$"):
        build_optimizers(model, OPTIMIZERS["muon"])
