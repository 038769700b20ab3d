"""The base class of the models, and the checks of their arguments and of their input.

`forward_features`, `forward_head`, `num_features`, `head_hidden_size`, `get_classifier` and `reset_classifier` mean
what they mean in timm. A subclass defines `forward_features`, `forward_head`, `get_classifier`, `set_classifier`, and
`new_classifier` where its last layer is not an `nn.Linear`. What a model is made of and what it was trained on travels
with it in attributes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from cnvzoo.errors import ModelError
from cnvzoo.models.layers import Layers
from cnvzoo_runtime.metadata import whole_number

if TYPE_CHECKING:
    from cnvzoo.checkpoints.format import CheckpointConfig
    from cnvzoo.data.preprocessing import Preprocessing
    from cnvzoo.models.registry import ModelSpec

BITS = range(1, 9)
LayerBits: TypeAlias = Mapping[str, Sequence[int | None]]  # (w_bits, a_bits) by name of a layer, as of `create_model`
NEEDS_A_CLASS = "a classifier needs at least 1 class"
OR_NO_HEAD = f"{NEEDS_A_CLASS}, and a model without its last layer has 0"


class Classifier(nn.Module):
    """A model of this library: images [N, in_chans, H, W] to logits [N, num_classes].

    `create_model` sets the first five attributes, also on models of other classes that were registered by
    `register_model`, and gives these `num_classes`, `in_chans`, `w_bits` and `a_bits` as plain attributes.

    Attributes:
        spec: what is known about the topology.
        arguments: the arguments of `create_model` that build the model again, `name` included, without weights.
        classes: names of the classes, in the order of the logits; None where they are not known.
        preprocessing: from images to the model's input; None where it is not known.
        pretrained_cfg: config of the checkpoint that the weights come from; None for other weights.
        num_features: channels of what `forward_features` returns.
        head_hidden_size: width of what the last layer takes, and of the output of a model with `num_classes=0`.
    """

    spec: ModelSpec
    arguments: dict[str, Any]
    # path of the convolution that takes the images; private, as a user's model may have a layer called `input_layer`
    _input_layer: str | None = None
    classes: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    pretrained_cfg: CheckpointConfig | None = None
    num_features: int
    head_hidden_size: int

    @property
    def num_classes(self) -> int:
        """Number of logits of the present last layer; 0 without one."""
        head = self.get_classifier()
        if isinstance(head, nn.Identity):
            return 0
        layers = [m for m in head.modules() if isinstance(m, nn.Linear)]
        return layers[-1].out_features if layers else self.arguments["num_classes"]

    @property
    def in_chans(self) -> int:
        """Channels of the images, of the layer that is now where the one that takes them was built."""
        return input_channels(self) or self.arguments["in_chans"]

    @property
    def w_bits(self) -> int | None:
        """Bit width of the weights; None for a float model."""
        return self.arguments.get("w_bits")

    @property
    def a_bits(self) -> int | None:
        """Bit width of the activations; None for a float model."""
        return self.arguments.get("a_bits")

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, H, W] to logits [N, num_classes], or to [N, head_hidden_size] without a last layer."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [N, in_chans, H, W] to the features [N, num_features, h, w] that the head takes."""
        raise NotImplementedError

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [N, num_features, h, w] to logits [N, num_classes].

        Args:
            features: as `forward_features` returns them.
            pre_logits: return what the last layer takes, [N, head_hidden_size].
        """
        raise NotImplementedError

    def get_classifier(self) -> nn.Module:
        """The last layer; `nn.Identity` in a model with `num_classes=0`."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer by an untrained one, whose weights are drawn from torch's default generator.

        The model then has no `classes` and no `pretrained_cfg`; `arguments` has the new number.

        Args:
            num_classes: number of logits; 0 for none: the model then returns [N, head_hidden_size].

        Raises:
            ModelError: not a whole number, or negative.
        """
        num_classes = check_count("num_classes", num_classes, OR_NO_HEAD, least=0)
        like = next(self.parameters())
        layer = self.new_classifier(num_classes).to(like.device, like.dtype).train(self.training)
        self.set_classifier(layer)
        self.arguments = {**self.arguments, "num_classes": num_classes}
        self.classes = self.pretrained_cfg = None

    def new_classifier(self, num_classes: int) -> nn.Module:
        """A new last layer for `num_classes`, `nn.Identity` for 0; by default `nn.Linear`."""
        return nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    def set_classifier(self, layer: nn.Module) -> None:
        """Put `layer` in the place of the last layer."""
        raise NotImplementedError


class PooledClassifier(Classifier):
    """A model whose head is an average pool over all pixels and one linear layer, `fc`.

    Args:
        layers: factory of the layers.
    """

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers = layers
        self.fc: nn.Module

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [N, num_features, h, w] to logits [N, num_classes], or to their means over the pixels."""
        pooled = torch.flatten(nn.functional.adaptive_avg_pool2d(features, 1), 1)
        return pooled if pre_logits else self.fc(pooled)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def new_classifier(self, num_classes: int) -> nn.Module:
        if not num_classes:
            return nn.Identity()
        return self.layers.linear(self.head_hidden_size, num_classes, last=True, bias=True)

    def set_classifier(self, layer: nn.Module) -> None:
        self.fc = layer
        self.layers.finish(self, layer)


def class_names(model: nn.Module, outputs: int) -> tuple[str, ...]:
    """The names of a model's `outputs` logits: its `classes`, or "0", "1", ... where they are not known.

    After a layer was replaced by hand, `classes` of another number are those of the old last layer, and are not used.
    """
    classes = getattr(model, "classes", None)
    return tuple(classes) if classes and len(classes) == outputs else tuple(map(str, range(outputs)))


def find_input_layer(model: nn.Module, in_chans: int) -> str:
    """The path of the convolution of a new model that takes its images; "" without one.

    It is the first that takes as many channels: a head of convolutions may be defined before it, and what rearranges
    the pixels, such as `nn.PixelUnshuffle`, changes their number.
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    return next((path for path, layer in layers.items() if layer.in_channels == in_chans), "")


def input_channels(model: nn.Module) -> int | None:
    """Channels that the input layer of a model takes, which may have been replaced; None without a convolution."""
    path: str | None = getattr(model, "_input_layer", None)
    if path == "":
        return None
    try:
        layer = model if path is None else model.get_submodule(path)
    except AttributeError:  # the model was taken apart
        layer = model
    return next((m.in_channels for m in layer.modules() if isinstance(m, nn.Conv2d)), None)


def check_input(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ModelError for input of a wrong type or shape, instead of the error of some layer: a forward pre-hook."""
    x = args[0] if args else next(iter(kwargs.values()), None)
    if x is None or isinstance(x, fx.Proxy):  # without input `forward` raises; a proxy of torch.fx has no shape
        return
    spec: ModelSpec = model.spec  # type: ignore[assignment]
    in_chans: int = model.in_chans  # type: ignore[assignment]
    if not isinstance(x, Tensor):
        raise ModelError(f"{spec.name} takes a tensor of images [N, {in_chans}, H, W], not {type(x).__name__}")
    if not x.is_floating_point():  # an autocast would convert them to floating point, with values up to 255
        raise ModelError(
            f"{spec.name} takes images as floating-point numbers, not {x.dtype}: cnvzoo.transforms makes them of images"
        )
    if x.dim() != 4:
        raise ModelError(
            f"{spec.name} takes a batch of images [N, {in_chans}, H, W], not a tensor of shape {list(x.shape)}"
        )
    _, channels, height, width = x.shape
    if channels != in_chans and channels != input_channels(model):
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


def check_bits(argument: str, bits: Any, model: str) -> int:
    """Return `bits` as an int if it is a whole number from 1 to 8, else raise ModelError naming `argument`."""
    if bits is None:
        raise ModelError(f"{model} needs {argument}: a whole number from {BITS[0]} to {BITS[-1]}")
    number = whole_number(bits)
    if number is None or number not in BITS:
        raise ModelError(
            f"{argument}={bits!r} is not a whole number from {BITS[0]} to {BITS[-1]}"
            f"{_nearest_bits(argument, bits if number is None else number, model)}"
        )
    return number


def _nearest_bits(argument: str, bits: Any, model: str) -> str:
    """The remedy for a number out of range or in quotes; "" for anything else, which none is near."""
    try:
        near = float(bits) if isinstance(bits, str) else bits
    except ValueError:
        return ""
    if not isinstance(near, (int, float)) or near != near:  # NaN
        return ""
    return f": the nearest that {model} takes is {argument}={round(min(max(BITS[0], near), BITS[-1]))}"


def check_layer_bits(bits: Any, model: str) -> dict[str, list[int | None]]:
    """Return `bits` of `create_model` as a dict of lists, which JSON and YAML keep, or raise ModelError."""
    if not isinstance(bits, Mapping):
        raise ModelError(
            f'bits={bits!r} is not a mapping such as {{"stages.2": (2, 4)}}, from a layer to its bit widths'
        )
    found: dict[str, list[int | None]] = {}
    for name, pair in bits.items():
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise ModelError(f"bits: {name!r} has {pair!r}, not a pair of weight and activation bits, such as (2, 4)")
        found[str(name)] = [
            None if width is None else check_bits(f"bits[{str(name)!r}]", width, model) for width in pair
        ]
    return found


# more than any use; numbers far beyond need more memory than there is
LARGEST = {"num_classes": 1_000_000, "in_chans": 10_000, "input_size": 4096}


def check_count(argument: str, count: Any, remedy: str, *, least: int = 1) -> int:
    """Return `count` as an int if it is a whole number from `least` to that of `LARGEST`, else raise ModelError."""
    number = whole_number(count)
    if number is None:
        raise ModelError(f"{argument}={count!r} is not a whole number: {remedy}")
    if number < least:
        raise ModelError(f"{argument}={number}: {remedy}")
    if number > LARGEST[argument]:
        raise ModelError(f"{argument}={number}: {LARGEST[argument]:,} at most")
    return number
