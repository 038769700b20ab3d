"""The registry of architectures: names, builders, and what is known about a model before it is built.

Model modules register their builders here. `build_model` checks the arguments once for all of them.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cnvzoo.errors import ModelError, nearest
from cnvzoo.models.layers import without_initialization

BITS = range(1, 9)


@dataclass(frozen=True)
class ModelSpec:
    """What is known about an architecture before it is built.

    Attributes:
        name: the name that `create_model` takes.
        build: called as `build(num_classes=, in_chans=, **options)`, for quantized models with `w_bits=` and `a_bits=`
            too.
        summary: one line for listings, with the source of the topology.
        quantized: whether the model takes `w_bits` and `a_bits`, and images as uint8 / 255 instead of normalised ones.
        input_size: the only height and width in pixels that the model takes; None for any of at least `min_size`.
        min_size: the smallest height and width in pixels.
        float_twin: for a quantized model, the name of the float model with the same graph.
        options: names of further arguments of `build`.
    """

    name: str
    build: Callable[..., nn.Module]
    summary: str
    quantized: bool = False
    input_size: int | None = None
    min_size: int = 8
    float_twin: str | None = None
    options: tuple[str, ...] = field(default=())


_REGISTRY: dict[str, ModelSpec] = {}
_COMMON = ("num_classes", "in_chans", "w_bits", "a_bits")


def register_model(
    name: str, *, summary: str, **spec: Any
) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Register the decorated builder as `name`; further keywords are fields of `ModelSpec`.

    Raises:
        ValueError: the name is registered already; `unregister_model` frees it.
    """

    def register(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if name in _REGISTRY:
            raise ValueError(
                f"model {name!r} is registered already: choose another name, or call unregister_model({name!r}) first"
            )
        options = tuple(p for p in inspect.signature(build).parameters if p not in _COMMON)
        _REGISTRY[name] = ModelSpec(name=name, build=build, summary=summary, options=options, **spec)
        return build

    return register


def unregister_model(name: str) -> None:
    """Remove a model from the registry, so that its name can be registered again. Models that were built remain usable.

    Raises:
        ModelError: no such model.
    """
    del _REGISTRY[model_spec(name).name]


def model_names(pattern: str = "*") -> list[str]:
    """Names of the registered models that match a shell pattern, in the order of registration."""
    return [name for name in _REGISTRY if fnmatch.fnmatchcase(name, pattern)]


def model_spec(name: str) -> ModelSpec:
    """The `ModelSpec` of `name`. Raises ModelError, with the nearest names, if there is none."""
    try:
        return _REGISTRY[name]
    except KeyError:
        raise ModelError(f"unknown model {name!r}: {nearest(name, _REGISTRY)}") from None


def build_model(
    name: str,
    *,
    num_classes: int = 10,
    in_chans: int = 3,
    w_bits: int | None = None,
    a_bits: int | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a freshly initialised model; see `cnvzoo.create_model` for the arguments and errors."""
    spec = model_spec(name)
    _check_count("num_classes", num_classes, "a classifier needs at least 1 class")
    _check_count("in_chans", in_chans, "an image has at least 1 channel")
    unknown = [key for key in kwargs if key not in spec.options]
    if unknown:
        takes = nearest(unknown[0], spec.options) if spec.options else "it takes no further options"
        raise ModelError(f"{name} has no option {unknown[0]!r}: {takes}")
    if spec.quantized:
        kwargs |= {"w_bits": check_bits("w_bits", w_bits, name), "a_bits": check_bits("a_bits", a_bits, name)}
    elif w_bits is not None or a_bits is not None:
        twins = [s.name for s in _REGISTRY.values() if s.float_twin == name]
        remedy = f"use {twins[0]!r}, its quantized twin" if twins else "leave w_bits and a_bits out"
        raise ModelError(f"{name} is a float model and has no bit widths: {remedy}")
    model = spec.build(num_classes=num_classes, in_chans=in_chans, **kwargs)
    model.spec = spec  # type: ignore[assignment]  (a public attribute: evaluation and export read it)
    guard_input(model, spec, in_chans)
    return model


def check_bits(argument: str, bits: int | None, model: str) -> int:
    """Return `bits` if it is a whole number from 1 to 8, else raise ModelError naming `argument`."""
    if bits is None:
        raise ModelError(f"{model} needs {argument}: a whole number from {BITS[0]} to {BITS[-1]}")
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
        close = round(min(max(BITS[0], bits), BITS[-1])) if isinstance(bits, (int, float)) else BITS[-1]
        raise ModelError(
            f"{argument}={bits!r} is not a whole number from {BITS[0]} to {BITS[-1]}: "
            f"the nearest that {model} takes is {argument}={close}"
        )
    return bits


def _check_count(argument: str, count: int, remedy: str) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise ModelError(f"{argument}={count!r} is not a whole number: {remedy}")
    if count < 1:
        raise ModelError(f"{argument}={count}: {remedy}")


def guard_input(model: nn.Module, spec: ModelSpec, in_chans: int) -> None:
    """Make `model` raise ModelError for input of a wrong shape, instead of the error of some layer."""

    def check(_module: nn.Module, args: tuple[Any, ...]) -> None:
        shape = tuple(args[0].shape)
        if len(shape) != 4:
            raise ModelError(
                f"{spec.name} takes a batch of images [N, {in_chans}, H, W], not a tensor of shape {list(shape)}"
            )
        _, channels, height, width = shape
        if channels != in_chans:
            raise ModelError(
                f"{spec.name} was built for {in_chans} channel(s) and was given {channels}: "
                f"create it with in_chans={channels}, or convert the images"
            )
        size = spec.input_size
        if size is not None and (height, width) != (size, size):
            raise ModelError(
                f"{spec.name} takes {size}x{size} images and was given {height}x{width}: "
                f"cnvzoo.transforms pads or resizes images to {size}x{size}"
            )
        if min(height, width) < spec.min_size:
            raise ModelError(
                f"{spec.name} takes images of at least {spec.min_size}x{spec.min_size} and was given {height}x{width}"
            )

    model.register_forward_pre_hook(check)


@dataclass(frozen=True)
class ModelInfo:
    """The size and the cost of a model.

    Attributes:
        name: name of the model.
        summary: one line, with the source of the topology.
        input_shape: (channels, height, width) for which `macs` is counted.
        parameters: number of trainable values; a quantized model has the scales in addition to its float twin's.
        macs: multiply-accumulates of convolutions and linear layers for one image.
        weight_bytes: bytes of convolution and linear weights, each at its bit width (32 for float), without biases.
    """

    name: str
    summary: str
    input_shape: tuple[int, int, int]
    parameters: int
    macs: int
    weight_bytes: int


def model_info(name: str, *, input_size: int | None = None, in_chans: int = 3, **arguments: Any) -> ModelInfo:
    """Count parameters, multiply-accumulates and weight bytes of a model.

    Args:
        name, in_chans, **arguments: as for `create_model`.
        input_size: height and width in pixels to count for; by default the only one that the model takes, else 32.

    Raises:
        ModelError: as `create_model` does, and for an input size that the model does not take.
    """
    spec = model_spec(name)
    with without_initialization():
        model = build_model(name, in_chans=in_chans, **arguments).eval()
    size = input_size or spec.input_size or 32
    macs = weight_bits = 0

    def count(layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal macs, weight_bits
        assert isinstance(layer.weight, Tensor)
        positions = output[0, 0].numel()  # pixels of the output map; 1 for linear layers
        macs += layer.weight.numel() * positions
        weight_bits += layer.weight.numel() * _weight_bits(layer)

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, in_chans, size, size))
    parameters = sum(p.numel() for p in model.parameters())
    return ModelInfo(name, spec.summary, (in_chans, size, size), parameters, macs, -(-weight_bits // 8))


def _weight_bits(layer: nn.Module) -> int:
    if not hasattr(layer, "weight_quant"):
        return 32
    from cnvzoo.models.quant import quantizer_of

    return quantizer_of(layer).bits
