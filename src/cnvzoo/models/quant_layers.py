"""The factory of quantized layers, and the scales that a quantized model starts with."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from brevitas.nn import QuantConv2d, QuantIdentity, QuantLinear
from torch import Tensor, nn

from cnvzoo.errors import ModelError, nearest
from cnvzoo.models.classifier import Classifier, LayerBits, check_bits
from cnvzoo.models.graph import LayerCall, trace
from cnvzoo.models.initialization import skips_initialization
from cnvzoo.models.quant import (
    DepthwiseQuantConv2d,
    FullFieldQuantConv2d,
    IntQuantizer,
    PlainQuantConv2d,
    PlainQuantIdentity,
    PlainQuantLinear,
    PlainQuantReLU,
    PointwiseQuantConv2d,
    ResidualQuantReLU,
    act_quant,
    quantizer_of,
    weight_quant,
)

INPUT_SCALE = 1 / 255
BLOCK_BITS = 8  # of the outputs of residual blocks
_NORMAL_SAMPLES = 1 << 14
_BLOCK_SAMPLES = 1 << 10  # for the sum of independent values


class QuantLayers:
    """The quantized layers of a topology, in the place of `cnvzoo.models.layers.FloatLayers`.

    Weights have one scale per output channel, which the BatchNorm after them absorbs in a deployed graph. Those of the
    last layer have one scale in all, so that its integer outputs rank the classes. The outputs of residual blocks have
    8 bits whatever `a_bits` is: what the blocks compute is added to them, and is rounded to `a_bits` where weights are
    multiplied with it.

    Args:
        w_bits: bit width of the weights, 1 to 8.
        a_bits: bit width of what weights are multiplied with, 1 to 8.
        first_w_bits: bit width of the first convolution's weights, 1 to 8.
        bits: other bit widths of single layers, as of `cnvzoo.create_model`.
    """

    def __init__(self, w_bits: int, a_bits: int, first_w_bits: int, bits: LayerBits | None = None) -> None:
        self.w_bits, self.a_bits = w_bits, a_bits
        self.first_w_bits = check_bits("first_w_bits", first_w_bits, "a quantized model")
        self.bits = dict(bits or {})

    def input(self) -> nn.Module:
        """The image as uint8 / 255, unchanged up to rounding: the layer tells exports the scale of the input."""
        return _activation(PlainQuantIdentity, IntQuantizer(8, signed=False, scale=INPUT_SCALE, learned=False))

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int = 0,
        first: bool = False,
    ) -> nn.Module:
        full_field = kernel > 1 and padding == 0
        return (FullFieldQuantConv2d if full_field else PlainQuantConv2d)(
            in_channels, out_channels, kernel, stride, padding, bias=False,
            weight_quant=self._per_channel(out_channels, self.first_w_bits if first else self.w_bits),
        )  # fmt: skip

    def depthwise(self, channels: int, stride: int) -> nn.Module:
        return DepthwiseQuantConv2d(
            channels, channels, 3, stride, 1, groups=channels, bias=False,
            weight_quant=self._per_channel(channels, self.w_bits),
        )  # fmt: skip

    def pointwise(self, in_channels: int, out_channels: int) -> nn.Module:
        quantizer = self._per_channel(out_channels, self.w_bits)
        return PointwiseQuantConv2d(in_channels, out_channels, 1, bias=False, weight_quant=quantizer)

    def linear(self, in_features: int, out_features: int, *, last: bool, bias: bool = False) -> nn.Module:
        quantizer = IntQuantizer(self.w_bits, signed=True, scale_shape=() if last else (out_features, 1))
        return PlainQuantLinear(in_features, out_features, bias=bias, weight_quant=weight_quant(quantizer))

    def relu(self) -> nn.Module:
        quantizer = IntQuantizer(self.a_bits, signed=False)
        layer = _activation(PlainQuantReLU, quantizer)
        if not skips_initialization():
            _fit_to_standard_normal(quantizer)
        return layer

    def residual_relu(self, uses: int) -> nn.Module:
        return _activation(ResidualQuantReLU, IntQuantizer(BLOCK_BITS, signed=False, uses=uses))

    def block_input(self) -> nn.Module:
        """Rounds the output of a block to `a_bits`."""
        return _activation(PlainQuantIdentity, IntQuantizer(self.a_bits, signed=False))

    def finish(self, model: nn.Module, only: nn.Module | None = None) -> None:
        """Set the bit widths of single layers, and fit the scales to the initial weights.

        Args:
            model: the whole model.
            only: a layer that is new in it; by default all are.

        Raises:
            ModelError: `bits` names no layer of the model.
        """
        layers = {name: m for name, m in model.named_modules() if _has_bits(m) and only in (None, m)}
        known = None if only is not None else [*layers, *_left_out_head(model)]
        changed = set_layer_bits(layers, self.bits, known)
        for name, layer in layers.items():
            if isinstance(layer, QuantIdentity) and quantizer_of(layer).bits == BLOCK_BITS:
                model.set_submodule(name, nn.Identity())  # outputs of blocks have these bits already
        if skips_initialization():
            return
        for layer in layers.values():
            if isinstance(layer, (QuantConv2d, QuantLinear)):
                quantizer_of(layer).fit(layer.weight)
            elif isinstance(layer, PlainQuantReLU) and layer in changed:
                _fit_to_standard_normal(quantizer_of(layer))
        if only is None and any(isinstance(m, ResidualQuantReLU) for m in model.modules()):
            _fit_activations(trace(model), of_blocks=True)

    def _per_channel(self, channels: int, bits: int) -> type:
        return weight_quant(IntQuantizer(bits, signed=True, scale_shape=(channels, 1, 1, 1)))


def _left_out_head(model: nn.Module) -> list[str]:
    """The name of the head of a model that is without it: `bits` may name it, and a head set later has these bits."""
    head = model.get_classifier() if isinstance(model, Classifier) else None
    return [name for name, m in model.named_modules() if m is head and isinstance(m, nn.Identity)]


def set_layer_bits(
    layers: Mapping[str, nn.Module], bits: LayerBits, known: Sequence[str] | None = None
) -> list[nn.Module]:
    """Set the bit widths of the layers that `bits` names; returns the layers whose bit width is another now.

    Args:
        layers: the layers with a bit width, by name.
        bits: (w_bits, a_bits) by the name of a layer, of a module around layers, or a shell pattern of these names;
            later ones override earlier ones; None leaves a bit width as it is.
        known: names of layers, one of which each name in `bits` has to match; by default none has to match.

    Raises:
        ModelError: a name matches none of `known`, or only layers that do not have what its bit width is of.
    """
    wanted = {}
    for pattern, (w_bits, a_bits) in bits.items():
        matching = [name for name in layers if _matches(name, pattern)]
        if known is not None and not any(_matches(name, pattern) for name in known):
            names = [*known, *dict.fromkeys(name.rpartition(".")[0] for name in known if "." in name)]
            raise ModelError(
                f"bits: {pattern!r} names no layer whose bit width can be chosen: {nearest(pattern, names)}"
            )
        widths = {name: w_bits if isinstance(layers[name], (QuantConv2d, QuantLinear)) else a_bits for name in matching}
        given = {name: width for name, width in widths.items() if width is not None}
        if known is not None and matching and not given and (w_bits, a_bits) != (None, None):
            lacks = "activations" if w_bits is None else "weights"
            raise ModelError(f"bits: {pattern!r} has no {lacks}, whose bit width is given: give (w_bits, a_bits)")
        wanted |= given
    changed = [layers[name] for name, width in wanted.items() if quantizer_of(layers[name]).bits != width]
    for name, width in wanted.items():
        quantizer_of(layers[name]).set_bits(width)
    return changed


def _matches(name: str, pattern: str) -> bool:
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _has_bits(layer: nn.Module) -> bool:
    """Whether the bit width of a layer can be chosen: not of the input, nor of the outputs of blocks."""
    if isinstance(layer, (QuantConv2d, QuantLinear)):
        return True
    if not isinstance(layer, (PlainQuantIdentity, PlainQuantReLU)) or isinstance(layer, ResidualQuantReLU):
        return False
    return quantizer_of(layer).learned


def _activation(layer_class: Callable[..., nn.Module], quantizer: IntQuantizer) -> nn.Module:
    return layer_class(act_quant=act_quant(quantizer))


class _Normal(NamedTuple):
    """The distribution that a BatchNorm gives: independent channels, each N(beta, gamma^2)."""

    gamma: Tensor
    beta: Tensor

    def quantiles(self, samples: int = _NORMAL_SAMPLES) -> Tensor:
        """[channels, samples], in ascending order."""
        grid = (torch.arange(samples, device=self.gamma.device, dtype=torch.float32) + 0.5) / samples
        z = math.sqrt(2) * torch.erfinv(2 * grid - 1)
        return self.beta[:, None] + self.gamma.abs()[:, None] * z


def _fit_to_standard_normal(quantizer: IntQuantizer) -> None:
    quantizer.fit(
        torch.relu(_Normal(torch.ones(1, dtype=torch.float32), torch.zeros(1, dtype=torch.float32)).quantiles())
    )


@torch.no_grad()
def _fit_activations(calls: Sequence[LayerCall], *, of_blocks: bool = False) -> None:
    """Fit the scales of activations to the distributions that the BatchNorms give, so no images are needed.

    The summands of a residual addition are taken to be independent.

    Args:
        calls: the model.
        of_blocks: fit only the outputs of residual blocks and what is rounded from these.

    Raises:
        ModelError: no BatchNorm gives the distribution of an activation.
    """
    given: list[_Normal | Tensor | None] = []  # what each call gives: a distribution, or samples [channels, samples]
    sums: dict[ResidualQuantReLU, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    for call in calls:
        layer, taken = call.layer, [given[i] for i in call.inputs]
        result: _Normal | Tensor | None = None
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            if layer.weight is None:
                raise ModelError(f"{call.name}: must have a weight and a bias, which scales are fitted to")
            result = _Normal(layer.weight, layer.bias)
        elif isinstance(layer, ResidualQuantReLU):
            given_to = [x for x in taken if x is not None]
            if len(given_to) < len(taken):
                raise ModelError(
                    f"{call.name}: a residual activation adds outputs of BatchNorms and of its own kind only"
                )
            result = torch.relu(torch.stack([_shuffled(x, generator) for x in given_to]).sum(0))
            sums.setdefault(layer, []).append(result)
        elif isinstance(layer, PlainQuantReLU) and not of_blocks:
            norm = taken[0]
            if not isinstance(norm, _Normal):
                raise ModelError(f"{call.name}: a quantized activation has to follow a BatchNorm")
            quantizer_of(layer).fit(torch.relu(norm.quantiles()))
        elif isinstance(layer, PlainQuantIdentity) and quantizer_of(layer).learned:
            samples = taken[0]
            if not isinstance(samples, Tensor):
                raise ModelError(f"{call.name}: what rounds the input of a block has to follow a residual activation")
            quantizer_of(layer).fit(samples)
        given.append(result)
    for layer, found in sums.items():
        quantizer_of(layer).fit(torch.cat([samples.flatten() for samples in found])[None])


def _shuffled(values: _Normal | Tensor, generator: torch.Generator) -> Tensor:
    """Samples of what a call gives; those of a BatchNorm are independent of all others."""
    if isinstance(values, Tensor):
        return values
    order = torch.randperm(_BLOCK_SAMPLES, generator=generator, device="cpu")
    return values.quantiles(_BLOCK_SAMPLES)[:, order.to(values.gamma.device)]


@torch.no_grad()
def start_from_float(
    model: nn.Module, state: Mapping[str, Tensor], mean: Sequence[float], std: Sequence[float]
) -> None:
    """Copy the weights of the float twin into a quantized model, in place, and fit the scales to them.

    The float model takes normalised images, the quantized one images as uint8 / 255. The first convolution and its
    BatchNorm are changed to make up for that. This is exact but for the border of a first convolution that pads: the
    quantized model pads images with zeros, which are black, and the float model pads normalised ones, whose zeros are
    the mean colour. Training makes up for that.

    Args:
        model: a new quantized model.
        state: state_dict of its float twin, with the same classes and channels.
        mean, std: the preprocessing of the float model, one value per channel, for pixels in [0, 1].

    Raises:
        ValueError: tensors are missing, unexpected, or of another shape; the message names all of them.
        ModelError: the model does not begin with a convolution and a BatchNorm, or an activation follows no BatchNorm.
    """
    own = model.state_dict()
    scales = {name for name in own if name.endswith(".scale")}
    wrong = [f"missing {n}" for n in own if n not in scales and n not in state]
    wrong += [f"unexpected {n}" for n in state if n not in own]
    wrong += [
        f"{n}: {list(t.shape)}, not {list(own[n].shape)}"
        for n, t in state.items()
        if n in own and t.shape != own[n].shape
    ]
    if wrong:
        raise ValueError("these weights are not those of the model's float twin: " + "; ".join(wrong))
    model.load_state_dict({**own, **state}, strict=True)

    calls = trace(model)
    found = [s for s in calls if isinstance(s.layer, (nn.Conv2d, nn.BatchNorm2d))][:2]
    first, norm = [s.layer for s in found] if len(found) == 2 else (None, None)
    if not (isinstance(first, QuantConv2d) and isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None):
        raise ModelError(
            f"{found[0].name if found else type(model).__name__}: a quantized model has to begin with a quantized "
            "convolution and a BatchNorm, which take over the normalisation of the images"
        )
    std_values = torch.tensor(std, device=first.weight.device, dtype=torch.float32).view(1, -1, 1, 1)
    mean_values = torch.tensor(mean, device=first.weight.device, dtype=torch.float32).view(1, -1, 1, 1)
    first.weight.div_(std_values)
    norm.running_mean.add_((first.weight * mean_values).sum((1, 2, 3)))

    for call in calls:
        if isinstance(call.layer, (QuantConv2d, QuantLinear)):
            quantizer_of(call.layer).fit(call.layer.weight)
    _fit_activations(calls)
