"""The registry of topologies: names, builders, and what is known about a model before it is built.

Model modules register their builders here. `build_model` checks the arguments once for all of them.
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from cnvzoo.errors import ModelError, nearest
from cnvzoo.models.classifier import (
    NEEDS_A_CLASS,
    OR_NO_HEAD,
    Classifier,
    check_bits,
    check_count,
    check_input,
    check_layer_bits,
    find_input_layer,
)
from cnvzoo.models.initialization import without_initialization
from cnvzoo_runtime.metadata import whole_number


@dataclass(frozen=True)
class ModelSpec:
    """What is known about a topology before it is built.

    Attributes:
        name: the name that `create_model` takes.
        build: called as `build(num_classes=, in_chans=, **options)`, for quantized models with `w_bits=` and `a_bits=`
            too.
        summary: one line for listings, with the source of the topology.
        quantized: whether the model takes `w_bits` and `a_bits`, and images as uint8 / 255 instead of normalised ones.
        input_size: the only height and width in pixels that the model takes; None for any of at least `min_size`.
        min_size: the smallest height and width in pixels.
        float_twin: for a quantized model, the name of the float model with the same graph.
        shallower: for a float model, the names of those with fewer blocks whose weights it can start from
            (`cnvzoo.models.resnet.start_from_shallower`).
        headless: whether `build` takes `num_classes=0` and then returns a model without its last layer.
        options: names of further arguments of `build`.
    """

    name: str
    build: Callable[..., nn.Module]
    summary: str
    quantized: bool = False
    input_size: int | None = None
    min_size: int = 8
    float_twin: str | None = None
    shallower: tuple[str, ...] = ()
    headless: bool = False
    options: tuple[str, ...] = field(default=())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by name, since a builder may be of any kind: reading it needs the registered model."""
        return model_spec, (self.name,)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelSpec:
        """The object itself, which cannot be changed: a model can be copied when its name is registered no more."""
        return self

    def __copy__(self) -> ModelSpec:
        return self


_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*", re.ASCII)
_REGISTRY: dict[str, ModelSpec] = {}
_WIDTHS = ("w_bits", "a_bits")
_COMMON = ("num_classes", "in_chans", *_WIDTHS)
_SET_ON_MODELS = ("spec", "arguments", "classes", "preprocessing", "pretrained_cfg", "_input_layer")


def register_model(
    name: str,
    *,
    summary: str,
    quantized: bool = False,
    input_size: int | None = None,
    min_size: int = 8,
    float_twin: str | None = None,
    shallower: tuple[str, ...] = (),
    headless: bool = False,
) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Register the decorated builder as `name`.

    Args:
        name, summary, quantized, input_size, min_size, float_twin, shallower, headless: as in `ModelSpec`; its
            `options` are the further arguments of the builder.

    The builder may return any module; with a `Classifier` the functions for features and head work too. Registering a
    builder of the same module and name again replaces it, so a notebook's cell may run twice.

    A run is reproducible if the builder draws its random numbers from torch's default generator, as the layers and
    initialisers of torch do, and the forward pass draws none: `nn.Dropout` does, from the generator of the program. So
    do `F.gumbel_softmax` and the samples of `torch.distributions`, in a builder too.

    No layer, parameter or buffer of the module itself may be called `spec`, `arguments`, `classes`, `preprocessing` or
    `pretrained_cfg`: these attributes say what a model is.

    Raises:
        ValueError: the name has other characters than letters, digits, `_` and `-`; another builder has it, which
            `unregister_model` frees; the builder takes `*args` or `**kwargs`, so that its options are not known; or it
            does not take `num_classes`, `in_chans` and, of a quantized model, `w_bits` and `a_bits`.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"model {name!r}: give a name of letters, digits, _ and -: a dot separates model and dataset")

    def register(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if name in _REGISTRY and _origin(_REGISTRY[name].build) != _origin(build):
            raise ValueError(
                f"model {name!r} is registered already: choose another name, or call unregister_model({name!r}) first"
            )
        parameters = inspect.signature(build).parameters
        if unnamed := [str(p) for p in parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]:
            raise ValueError(f"model {name!r}: the builder takes {unnamed[0]}: name each of its options")
        given = _COMMON if quantized else _COMMON[:2]
        by_name = [key for key, p in parameters.items() if p.kind is not p.POSITIONAL_ONLY]
        if lacking := [key for key in given if key not in by_name]:
            raise ValueError(
                f"model {name!r}: the builder has no argument {lacking[0]}: it is called with {', '.join(given)}"
            )
        options = tuple(p for p in parameters if p not in _COMMON)
        _REGISTRY[name] = ModelSpec(
            name,
            build,
            summary,
            quantized,
            input_size,
            min_size,
            float_twin=float_twin,
            shallower=shallower,
            headless=headless,
            options=options,
        )
        return build

    return register


def unregister_model(name: str) -> None:
    """Remove a model from the registry, so that its name can be registered again. Models that were built remain usable.

    Raises:
        ModelError: no such model.
    """
    del _REGISTRY[model_spec(name).name]


def _origin(build: Callable[..., nn.Module]) -> tuple[Any, ...]:
    """The module and the name in it that define a builder, and the arguments that are bound to it."""
    bound: tuple[Any, ...] = ()
    while isinstance(build, functools.partial):
        bound, build = (*build.args, *sorted(build.keywords.items()), *bound), build.func
    named = build if hasattr(build, "__qualname__") else type(build)  # an object with __call__
    return named.__module__, named.__qualname__, bound


def model_names(pattern: str = "*") -> list[str]:
    """Names of the registered models that match a shell pattern, in the order of registration."""
    return [name for name in _REGISTRY if fnmatch.fnmatchcase(name, pattern)]


def model_spec(name: str) -> ModelSpec:
    """The `ModelSpec` of `name`. Raises ModelError, with the nearest names, if there is none."""
    try:
        return _REGISTRY[name]
    except KeyError:
        raise ModelError(f"unknown model {name!r}: {nearest(name, _REGISTRY)}") from None


def with_defaults(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that build a model, `name` included, and the defaults of its builder for those left out."""
    parameters = inspect.signature(model_spec(arguments["name"]).build).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty} | dict(arguments)


def quantized_twin(spec: ModelSpec) -> ModelSpec | None:
    """The quantized model with the graph of `spec`, which is itself if it is quantized; None without one."""
    if spec.quantized:
        return spec
    return next((s for s in _REGISTRY.values() if s.float_twin == spec.name), None)


def build_model(
    name: str,
    *,
    num_classes: int = 10,
    in_chans: int = 3,
    w_bits: int | None = None,
    a_bits: int | None = None,
    **kwargs: Any,
) -> Classifier:
    """Build a freshly initialised model; see `cnvzoo.create_model` for the arguments and errors."""
    spec = model_spec(name)
    least, needs = (0, OR_NO_HEAD) if spec.headless else (1, NEEDS_A_CLASS)
    num_classes = check_count("num_classes", num_classes, needs, least=least)
    in_chans = check_count("in_chans", in_chans, "an image has at least 1 channel")
    widths = {"w_bits": w_bits, "a_bits": a_bits}
    if spec.quantized:
        widths = {key: check_bits(key, bits, name) for key, bits in widths.items()}
    given = {key: bits for key, bits in widths.items() if bits is not None}
    kwargs = check_options(spec, given | kwargs)
    if not kwargs.get("bits", True):  # none, or an empty mapping
        del kwargs["bits"]
    elif "bits" in kwargs:
        kwargs["bits"] = check_layer_bits(kwargs["bits"], name)
    arguments = {"num_classes": num_classes, "in_chans": in_chans, **kwargs}
    for key, value in arguments.items():  # numpy's whole numbers become Python's, which JSON and pickle take
        if not isinstance(value, int) and (number := whole_number(value)) is not None:
            arguments[key] = number
    if lacking := [option for option in _required(spec.build) if option not in arguments]:
        raise ModelError(f"{name} needs {lacking[0]}: its builder has no default for it: give {lacking[0]}=")
    model = spec.build(**arguments)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name}: its builder returned {type(model).__name__}, not a module: have it return the model")
    return _described(model, spec, arguments)


def check_options(spec: ModelSpec, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a model and its `w_bits` and `a_bits`, those that are given, after checks.

    Raises:
        ModelError: an unknown option; or bit widths out of range, or of a float model.
    """
    for key in given:
        if key not in (*_WIDTHS, *spec.options):
            takes = nearest(key, spec.options) if spec.options else "it takes no further options"
            raise ModelError(f"{spec.name} has no option {key!r}: {takes}")
    widths = {key: given[key] for key in _WIDTHS if key in given}
    if widths and not spec.quantized:
        twin = quantized_twin(spec)
        remedy = f"use {twin.name!r}, its quantized twin" if twin else "leave w_bits and a_bits out"
        raise ModelError(f"{spec.name} is a float model and has no bit widths: {remedy}")
    return {**given, **{key: check_bits(key, bits, spec.name) for key, bits in widths.items()}}


def _required(build: Callable[..., nn.Module]) -> list[str]:
    """The names of a builder's arguments without a default."""
    return [p.name for p in inspect.signature(build).parameters.values() if p.default is p.empty]


def _described(model: nn.Module, spec: ModelSpec, arguments: dict[str, Any]) -> Classifier:
    """Set on a new model the attributes that say what it is, and have it check its input."""
    own = {**model._modules, **model._parameters, **model._buffers}  # assigning another value to these raises TypeError
    if taken := next((attribute for attribute in _SET_ON_MODELS if attribute in own), None):
        raise ModelError(f"{spec.name}: cnvzoo sets an attribute {taken!r} on models: give its layer another name")
    described = cast("Classifier", model)
    described.spec, described.arguments = spec, {"name": spec.name, **arguments}
    described._input_layer = find_input_layer(model, arguments["in_chans"])
    if not isinstance(model, Classifier):  # a model of its own class gets attributes for what a Classifier has
        for name in ("classes", "preprocessing", "pretrained_cfg", "w_bits", "a_bits", "num_classes", "in_chans"):
            if not hasattr(model, name):
                setattr(model, name, arguments.get(name))
    model.register_forward_pre_hook(check_input, with_kwargs=True)
    model.register_load_state_dict_pre_hook(_check_state_bits)
    model.register_load_state_dict_post_hook(_place_constants)
    return described


def _check_state_bits(model: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Refuse a state of other bit widths before a part of it is loaded."""
    metadata = getattr(state, "_metadata", None) or {}
    for name, layer in model.named_modules():
        if callable(check := getattr(layer, "check_state_bits", None)):
            check(f"{prefix}{name}.", metadata.get(f"{prefix}{name}", {}))


def _place_constants(model: nn.Module, _: Any) -> None:
    """Have constants, which no state has, follow the tensors of a state that was assigned to a model without values."""
    device = next((p.device for p in model.parameters() if not p.is_meta), None)
    for layer in model.modules():
        if device is not None and callable(place := getattr(layer, "place_constants", None)):
            place(device)


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


def model_info(
    name: str,
    *,
    num_classes: int = 10,
    in_chans: int = 3,
    w_bits: int | None = None,
    a_bits: int | None = None,
    input_size: int | None = None,
    **kwargs: Any,
) -> ModelInfo:
    """Count parameters, multiply-accumulates and weight bytes of a model.

    Args:
        name: a model of `list_models()`.
        num_classes: number of outputs, at least 1, or 0 for a `headless` model without its last layer.
        in_chans: number of image channels, at least 1.
        w_bits, a_bits: bit widths of weights and activations, 1 to 8; quantized models need both, float models take
            neither.
        input_size: height and width in pixels to count for; by default the only one that the model takes, else 32.
        **kwargs: options of the model, as for `create_model`.

    Raises:
        ModelError: as `create_model` does, and for an input size that the model does not take.
    """
    spec = model_spec(name)
    with without_initialization():
        model = build_model(
            name, num_classes=num_classes, in_chans=in_chans, w_bits=w_bits, a_bits=a_bits, **kwargs
        ).eval()
    if input_size is not None:
        input_size = check_count("input_size", input_size, "height and width, at least 1 pixel")
    size, channels = input_size or spec.input_size or 32, model.arguments["in_chans"]
    macs = weight_bits = 0

    def count(layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal macs, weight_bits
        assert isinstance(layer.weight, Tensor)
        positions = output[0].numel() // len(layer.weight)  # of the output map; 1 for most linear layers
        macs += layer.weight.numel() * positions
        if id(layer) not in counted:  # a layer that is called twice has one weight
            counted.add(id(layer))
            weight_bits += layer.weight.numel() * _weight_bits(layer)

    counted: set[int] = set()
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, channels, size, size))
    parameters = sum(p.numel() for p in model.parameters())
    return ModelInfo(name, spec.summary, (channels, size, size), parameters, macs, -(-weight_bits // 8))


def _weight_bits(layer: nn.Module) -> int:
    if not hasattr(layer, "weight_quant"):
        return 32
    from cnvzoo.models.quant import quantizer_of

    return quantizer_of(layer).bits
