"""Quantized layers: Brevitas' layers with the quantizer of this library, and their scales.

Every quantizer has its scale as a parameter from the start. So a new model has its whole state before it first runs,
the first steps gather no statistics, and torch.compile does not recompile after them.

Brevitas' QuantTensors break torch.compile and torch.export. So the layers pass plain tensors, which their quantizers
give, and take the way through Brevitas' proxies only where it is asked for: in its exporters, with a quantizer that was
disabled, and for QuantTensors. The proxies themselves are as in any Brevitas model: `layer.quant_weight()` and
`layer.act_quant.scale()` give what they document.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from brevitas.inject import ExtendedInjector
from brevitas.nn import QuantConv2d, QuantIdentity, QuantLinear, QuantReLU
from brevitas.nn.quant_layer import QuantNonLinearActLayer
from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector
from brevitas.proxy.quant_proxy import QuantProxyFromInjector
from brevitas.quant_tensor import QuantTensor
from torch import Tensor, nn
from torch.nn import functional as F

from cnvzoo.errors import ModelError
from cnvzoo.models.fake_quant import IntRange, fake_quantize, least_squares_scale
from cnvzoo.models.initialization import without_initialization
from cnvzoo.models.layers import DepthwiseConv2d, FullFieldConv2d, PointwiseConv2d, autocast_dtype
from cnvzoo.models.norm_act import QuantizedActivation, QuantizedResidualActivation
from cnvzoo.models.residual import add_fake_quantized

_SCALE_FLOOR = 1e-8
_GRADIENT_LIMIT = 0.02  # largest gradient of a scale, as a share of the scale


class _PositiveScale(torch.autograd.Function):
    """The scale clamped to the floor; its gradient is multiplied by `gain` and limited to a share of the scale.

    A step that makes a scale negative would end the training of its channel: all weights round to the ends of the
    range, BatchNorm sees a constant, and the ReLU after it passes no gradient. A limit of a fiftieth excludes that up
    to lr 0.1 at momentum 0.9: under the worst sequence of gradients the scale is a damped oscillator, critically damped
    at lr * limit = (1 - momentum)^2 / 4.
    """

    @staticmethod
    def forward(ctx: Any, scale: Tensor, gain: float, limit: float) -> Tensor:
        ctx.gain, ctx.limit = gain, limit
        ctx.save_for_backward(scale)
        return scale.clamp_min(_SCALE_FLOOR)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        limit = scale.abs() * ctx.limit
        return (grads[0] * ctx.gain).clamp(-limit, limit), None, None


class _TransformablePositiveScale(torch.autograd.Function):
    """The same function for torch.func, which needs `setup_context`; torch inspects its signature in every call."""

    @staticmethod
    def forward(scale: Tensor, gain: float, limit: float) -> Tensor:
        return scale.clamp_min(_SCALE_FLOOR)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        scale, ctx.gain, ctx.limit = inputs
        ctx.save_for_backward(scale)

    backward = _PositiveScale.backward


class IntQuantizer(nn.Module):
    """A quantizer, in the form of Brevitas' `tensor_quant`: x to (fake-quantized x, scale, zero point 0, bit width).

    Args:
        bits: bit width, 1 to 8.
        signed: True for weights, whose integers are symmetric around 0; False for activations, whose are from 0 on.
        scale_shape: `()` for one scale, `(channels, 1, ...)` for one per output channel.
        scale: value of the scale to begin with.
        learned: True for a scale that is a parameter, False for a constant that is not in the state_dict.
        uses: how often one forward pass of the model uses the quantizer.
    """

    bit_width: Tensor

    def __init__(
        self,
        bits: int,
        *,
        signed: bool,
        scale_shape: tuple[int, ...] = (),
        scale: float = 1.0,
        learned: bool = True,
        uses: int = 1,
    ) -> None:
        super().__init__()
        self.bits = bits
        self.signed = signed
        self.ints = IntRange.of(bits, signed=signed)
        self.learned = learned
        self.uses = uses
        value = torch.full(scale_shape, scale, dtype=torch.float32)
        if learned:
            self.scale = nn.Parameter(value)
        else:
            self.register_buffer("scale", value, persistent=False)
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.float32), persistent=False)
        self.register_buffer("bit_width", torch.tensor(float(bits), dtype=torch.float32), persistent=False)
        # no state has these buffers, and on the meta device they have no values
        self.constants = {"zero_point": 0.0, "bit_width": float(bits)} | ({} if learned else {"scale": scale})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale = self.positive_scale(x)
        # the dtype to which autocast would convert the weights, in a pass of its own
        dtype = autocast_dtype(x)
        # a model that only evaluates, with gradients on or off, must not wait for a compiler
        values = fake_quantize(x, scale, self.ints, dtype, compiled=self.training)
        return values, scale, self.zero_point, self.bit_width  # type: ignore[return-value]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> IntQuantizer:
        """Move the tensors, and keep constants, in float32: 1/255 in bfloat16 would be another scale."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in self.constants.items():
            new = self._buffers[name]
            if new is not None and new is not before[name]:  # its values are arbitrary after `to_empty`
                self._buffers[name] = torch.full_like(new, value, dtype=torch.float32)
        return self

    def place_constants(self, device: torch.device) -> None:
        """Make the constants of a model of the meta device anew, after `load_state_dict(assign=True)`."""
        for name, value in self.constants.items():
            buffer = self._buffers[name]
            if buffer is not None and buffer.is_meta:
                self._buffers[name] = torch.full_like(buffer, value, device=device)

    def effective_scale(self) -> Tensor:
        """The scale that values are divided by, in float32: the parameter, clamped to a floor above zero."""
        return self.scale.float().clamp_min(_SCALE_FLOOR) if self.learned else self.scale

    def integers(self, x: Tensor) -> Tensor:
        """The integers of x, in its shape, as float32: those that `forward` multiplies by the scale."""
        return self.ints.round(x.float() / self.effective_scale())

    def positive_scale(self, x: Tensor) -> Tensor:
        """The effective scale, for training: its gradient is divided by sqrt(values * levels) (LSQ, section 2.2).

        `values` is the number of weights, or of activations of one image, that share one scale. Without the division
        the steps of a scale are larger than those of a weight by orders of magnitude. A quantizer that is used several
        times in a forward pass has the gradient of all uses, and the limit of one.
        """
        if not self.learned:
            return self.scale
        if torch.jit.is_tracing():  # a trace with a Python function cannot be saved
            return self.effective_scale()
        values = x.numel() // self.scale.numel() if self.signed else math.prod(x.shape[1:])  # for empty batches too
        gain, limit = 1 / math.sqrt(values * self.uses * self.ints.high), _GRADIENT_LIMIT / self.uses
        transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
        function = _TransformablePositiveScale if transformed else _PositiveScale
        return function.apply(self.scale.float(), gain, limit)  # type: ignore[no-any-return]

    def set_bits(self, bits: int) -> None:
        """Change the bit width; the scale stays, so fit it to the values after that."""
        self.bits, self.ints = bits, IntRange.of(bits, signed=self.signed)
        self.constants["bit_width"] = float(bits)
        self.bit_width.fill_(bits)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (metadata := getattr(destination, "_metadata", None)) is not None:  # beside the tensors; torch.save keeps it
            metadata[prefix[:-1]]["bits"] = self.bits

    def check_state_bits(self, prefix: str, local_metadata: Any) -> None:
        """Raise ModelError for the metadata of a state of another bit width; arguments as of load_state_dict."""
        bits = local_metadata.get("bits", self.bits)
        if bits != self.bits:
            raise ModelError(
                f"{prefix}scale is of {bits} bits, and the model has {self.bits} there: build the model with "
                "the bits of the state, or make one of other bits from it by cnvzoo.quantize(model, w_bits=, a_bits=)"
            )

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        self.check_state_bits(prefix, local_metadata)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set each scale to that of least squared error for its values in x; on the meta device there are none."""
        if x.is_meta:  # where 20 iterations for each layer of a deep net take 10 seconds
            return
        rows = x.reshape(max(self.scale.numel(), 1), -1)
        self.scale.copy_(least_squares_scale(rows, self.ints).reshape(self.scale.shape))


def _injector(quantizer: IntQuantizer, proxy: type, *, signed: bool) -> type:
    """The quantizer as Brevitas takes it: a class whose attributes are the parts."""
    return type(
        "Quant",
        (ExtendedInjector,),
        {
            "proxy_class": proxy,
            "tensor_quant": quantizer,
            "signed": signed,
            "narrow_range": signed,
            "quant_type": "int",
            "float_to_int_impl_type": "ROUND",  # in upper case, which is all that older readers of QONNX know
        },
    )


class _ClampedReLU(nn.ReLU):
    """ReLU before an unsigned quantizer, which clamps at zero itself: ReLU is needed only in exported graphs."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if torch.onnx.is_in_onnx_export() else input


class _CopiedLayer:
    """A Brevitas layer that is copied and pickled as a new layer with its tensors, quantizer and settings.

    Brevitas keeps the layer and the quantizer in classes made at run time, as attributes: pickle refuses these, and a
    copy would share them, so that loading a state into the copy would give it the quantizer of the original.
    """

    _modules: dict[str, nn.Module | None]

    def __reduce__(self) -> tuple[Any, ...]:
        proxies = {n: m for n, m in self._modules.items() if isinstance(m, QuantProxyFromInjector)}
        others = {n: m for n, m in self._modules.items() if n not in proxies}
        quantizer = quantizer_of(self)  # type: ignore[arg-type]  (a mixin of layers)
        settings = {
            f"{name}.{path}".removesuffix("."): {
                k: v for k, v in part.__dict__.items() if isinstance(v, bool) or "_hooks" in k
            }
            for name, proxy in proxies.items()
            for path, part in proxy.named_modules()
            if part is not quantizer
        }
        return _new_layer, (type(self), quantizer, settings), self.__dict__ | {"_modules": others}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"_modules": self._modules | state["_modules"]})  # type: ignore[misc]  (nn.Module's)


def _new_layer(layer_class: type[nn.Module], quantizer: IntQuantizer, settings: dict[str, Any]) -> nn.Module:
    """A layer of any size with this quantizer, for `__setstate__`; `settings`: flags and hooks of proxies by name."""
    with without_initialization():
        if issubclass(layer_class, QuantConv2d):
            layer = layer_class(1, 1, 1, bias=False, weight_quant=weight_quant(quantizer))
        elif issubclass(layer_class, QuantLinear):
            layer = layer_class(1, 1, bias=False, weight_quant=weight_quant(quantizer))
        else:
            layer = layer_class(act_quant=act_quant(quantizer))
    device: Any = quantizer.zero_point.device
    parts = dict(layer.to(device).named_modules())
    for name, values in settings.items():
        if name in parts:  # a new layer has no handler of an export
            parts[name].__dict__.update(values)
    return layer


def _is_plain(layer: Any, proxy: Any, input: Any) -> bool:
    """Whether a layer needs only the values of its quantizer, not what Brevitas adds to them."""
    return proxy.is_quant_enabled and not (
        proxy.export_mode or layer.return_quant_tensor or isinstance(input, QuantTensor)
    )


class _PlainActivation(QuantNonLinearActLayer):
    """A quantized activation that gives plain tensors."""

    def forward(self, input: Any) -> Any:
        proxy: Any = self.act_quant
        if not _is_plain(self, proxy, input):
            return super().forward(input)
        return proxy.fused_activation_quant_proxy(input)[0]

    @property
    def activation_quantizer(self) -> IntQuantizer | None:
        """None, for a step that is not fused, in a class of a user, whose forward may be another."""
        is_own = type(self).__module__.startswith("cnvzoo.models.")
        return quantizer_of(self) if is_own and _is_plain(self, self.act_quant, None) else None


class PlainQuantIdentity(_CopiedLayer, _PlainActivation, QuantIdentity, QuantizedActivation):  # type: ignore[misc]
    """QuantIdentity that gives plain tensors."""


class PlainQuantReLU(_CopiedLayer, _PlainActivation, QuantReLU, QuantizedActivation):  # type: ignore[misc]
    """QuantReLU with `_ClampedReLU`, given as the class because Brevitas builds the activation again at every load."""

    def __init__(self, act_quant: type) -> None:
        QuantNonLinearActLayer.__init__(
            self,
            act_impl=_ClampedReLU,
            passthrough_act=True,
            input_quant=None,
            act_quant=act_quant,  # type: ignore[arg-type]
            return_quant_tensor=False,
        )


class ResidualQuantReLU(PlainQuantReLU, QuantizedResidualActivation):  # type: ignore[misc]  (as in its base)
    """A quantized ReLU of one input, or of the sum of two whose integers are added.

    With scale s, the integers of the sum are clamp(clamp(round(input / s), -128, 127) + r, 0, 255), where r are the
    integers of the residual. A residual that is no output of this layer is rounded as the input is.
    """

    def forward(self, input: Any, residual: Any = None, *, rounded: bool = True) -> Any:
        """The activation of input + residual.

        Args:
            input, residual: floating point [N, C, H, W]; no residual: the activation of the input.
            rounded: whether the residual has been rounded already, as an earlier output of this layer.
        """
        if residual is None:
            return super().forward(input)
        if not _is_plain(self, self.act_quant, input):
            return super().forward(input + residual)
        quantizer = quantizer_of(self)
        return add_fake_quantized(input, residual, quantizer.positive_scale(input), quantizer.ints.high, rounded)


class PlainQuantConv2d(_CopiedLayer, QuantConv2d):
    """Brevitas' convolution on plain tensors."""

    def forward(self, input: Any) -> Any:
        if not _is_plain(self, self.weight_quant, input):
            return QuantConv2d.forward(self, input)
        return self._conv_forward(input, quantizer_of(self)(self.weight)[0], self.bias)


class FullFieldQuantConv2d(FullFieldConv2d, PlainQuantConv2d):  # type: ignore[misc]  (a parameter has two names)
    """With the fast training of the float layer."""


class DepthwiseQuantConv2d(DepthwiseConv2d, PlainQuantConv2d):  # type: ignore[misc]
    """With the fast training of the float layer."""


class PointwiseQuantConv2d(PointwiseConv2d, PlainQuantConv2d):  # type: ignore[misc]
    """With the fast training of the float layer."""


class PlainQuantLinear(_CopiedLayer, QuantLinear):
    """Brevitas' linear layer on plain tensors."""

    def forward(self, input: Any) -> Any:
        if not _is_plain(self, self.weight_quant, input):
            return super().forward(input)
        return F.linear(input, quantizer_of(self)(self.weight)[0], self.bias)


def weight_quant(quantizer: IntQuantizer) -> type:
    """A quantizer of weights as Brevitas' layers take it."""
    return _injector(quantizer, WeightQuantProxyFromInjector, signed=True)


def act_quant(quantizer: IntQuantizer) -> type:
    """A quantizer of activations as Brevitas' layers take it."""
    return _injector(quantizer, ActQuantProxyFromInjector, signed=False)


def check_quantizers(layers: Mapping[str, nn.Module]) -> None:
    """Raise ModelError for a quantized layer without an IntQuantizer: Brevitas' own give other integers."""
    for name, layer in layers.items():
        if isinstance(layer, (QuantConv2d, QuantLinear, QuantReLU, QuantIdentity)):
            try:
                known = isinstance(quantizer_of(layer), IntQuantizer)
            except AttributeError:  # it has none
                known = False
            if not known:
                raise ModelError(f"{name}: not a quantizer of cnvzoo: build it with the layers of cnvzoo.models.quant")


def quantizer_of(layer: nn.Module) -> IntQuantizer:
    """The weight quantizer of a quantized convolution or linear layer; the activation quantizer of another layer."""
    brevitas: Any = layer
    if isinstance(layer, (QuantConv2d, QuantLinear)):
        return brevitas.weight_quant.tensor_quant
    return brevitas.act_quant.fused_activation_quant_proxy.tensor_quant
