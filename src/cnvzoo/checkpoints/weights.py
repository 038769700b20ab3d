"""model.safetensors: a model's tensors, with the weights of quantized layers as packed integers.

A float model's file is the one that its run wrote, byte for byte: its whole state in float32, so that a quantized run
can start from exactly these weights. In a quantized model's file

- the weight of a quantized layer is a uint8 tensor of packed integers. The metadata key `packed` has bits, sign and
  shape of each, as JSON. The float weight is integer times scale;
- its scale is the one that the quantizer divides by, so never below the quantizer's floor;
- everything else is as in the state_dict, without BatchNorm's `num_batches_tracked`.

Packed integers have 1 to 8 bits without padding between them: a 2-bit weight takes 2 bits. Value k takes the bits k*b
to k*b + b - 1 of the stream, its lowest bit first; bit j of the stream is bit j % 8 of byte j // 8. Values are in two's
complement; at 1 bit, 0 is -1 and 1 is +1. The unused bits of the last byte are zero, so there is only one packed form
of each sequence of values.

The file format around the tensors: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from cnvzoo.checkpoints.format import CheckpointError
from cnvzoo.errors import CnvzooError, explain, in_a_line
from cnvzoo.models.classifier import Classifier
from cnvzoo.models.fake_quant import IntRange
from cnvzoo.models.initialization import without_initialization
from cnvzoo.models.registry import build_model


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take."""
    return -(-count * bits // 8)


def pack(values: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Integers (any shape, taken in C order) to bytes [packed_size].

    Raises:
        ValueError: a value is not a signed symmetric (at 1 bit: binary) integer of `bits` bits.
    """
    ints, count = IntRange.of(bits, signed=True), values.size
    if not _in_range(values, ints):
        raise ValueError(f"values from {values.min()} to {values.max()} do not fit {bits} bits")
    codes = np.zeros((-(-count // 8), 8), np.uint64)
    codes.reshape(-1)[:count] = (values > 0 if ints.binary else values.view(np.uint8) & (2**bits - 1)).reshape(-1)
    words = np.bitwise_or.reduce(codes << _shifts(bits), axis=1).astype("<u8")
    return words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)[: packed_size(count, bits)]


def unpack(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int8]:
    """The inverse of `pack`: bytes to `count` integers, [count].

    Raises:
        ValueError: bytes that `pack` never returns: too many or too few, a value out of range, unused bits that are not
            zero.
    """
    if data.shape != (packed_size(count, bits),):
        raise ValueError(f"{count} values of {bits} bits take {packed_size(count, bits)} bytes, not {data.size}")
    if (used := count * bits % 8) and data[-1] >> used:
        raise ValueError("the bits after the last value are not zero")
    groups = -(-count // 8)  # 8 values take `bits` bytes, which fit into one 64-bit word
    stream = np.zeros(groups * bits, np.uint8)
    stream[: data.size] = data
    words = np.zeros((groups, 8), np.uint8)
    words[:, :bits] = stream.reshape(groups, bits)
    codes = ((words.view("<u8") >> _shifts(bits)) & np.uint64(2**bits - 1)).astype(np.uint8).reshape(-1)[:count]
    ints = IntRange.of(bits, signed=True)
    if ints.binary:
        return codes.view(np.int8) * np.int8(2) - np.int8(1)
    values = (codes << (8 - bits)).view(np.int8) >> (8 - bits)  # the second shift repeats the sign
    if not _in_range(values, ints):
        raise ValueError(f"a value below {ints.low}, which symmetric integers of {bits} bits do not have")
    return values


def _shifts(bits: int) -> NDArray[np.uint64]:
    return np.arange(8, dtype=np.uint64) * np.uint64(bits)


def _in_range(values: NDArray[np.int8], ints: IntRange) -> bool:
    if ints.binary:
        return bool((np.abs(values) == 1).all())
    return not values.size or bool(values.min() >= ints.low and values.max() <= ints.high)


@contextmanager
def builder_errors(what: str) -> Iterator[None]:
    """Errors of a builder, which may be the user's own, are CheckpointErrors: `what` cannot be built, and why."""
    try:
        yield
    except CnvzooError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what} cannot be built: {in_a_line(error)}") from None


def build_empty(arguments: Mapping[str, Any]) -> Classifier:
    """A model on the CPU without initialization, in float32; the random number generators do not change.

    Raises:
        CheckpointError: no model has these arguments.
    """
    try:
        return _build(arguments)
    except Exception as error:  # the builder may be the user's own
        raise CheckpointError(f"its model cannot be built: {in_a_line(error)}") from None


def build_skeleton(arguments: Mapping[str, Any]) -> Classifier:
    """A model on the `meta` device: names, shapes and types of its tensors without their memory, whatever their size.

    Raises:
        CheckpointError: no model has these arguments.
    """
    try:
        with torch.device("meta"):
            return _build(arguments)
    except RuntimeError:  # the builder reads values of tensors, which the meta device does not have
        return build_empty(arguments)
    except Exception as error:
        raise CheckpointError(f"its model cannot be built: {in_a_line(error)}") from None


def _build(arguments: Mapping[str, Any]) -> Classifier:
    with without_initialization():
        return build_float32(arguments)


def build_float32(arguments: Mapping[str, Any]) -> Classifier:
    """`build_model`, in float32 as checkpoints and runs are, whatever the default dtype of the process."""
    model = build_model(**arguments)
    if (default := torch.get_default_dtype()) != torch.float32:
        model._apply(lambda tensor: tensor.float() if tensor.dtype == default else tensor)
    return model


_PACKED = "packed"
_COUNTER = "num_batches_tracked"
_LARGEST_HEADER = 1 << 20  # bytes


class Packed(BaseModel):
    """How a packed tensor is stored."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bits: int = Field(ge=1, le=8)
    signed: Literal[True]
    shape: list[int]

    def __str__(self) -> str:
        return f"{self.bits} bits {self.shape}"


_METADATA = TypeAdapter(dict[str, Packed])


def is_quantized(model: nn.Module) -> bool:
    """Whether the model has quantized layers."""
    return bool(_quantizers(model))


@torch.no_grad()
def packed_file(model: nn.Module) -> bytes:
    """The content of a quantized model's file. The model must be on the CPU; the same state gives the same bytes.

    Raises:
        CheckpointError: integer times scale is not bit for bit the weight that the model computes with.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(_COUNTER)}
    descriptions = {}
    for layer, quantizer in _quantizers(model).items():
        weight, scale = state[f"{layer}.weight"], quantizer.effective_scale()
        integers = quantizer.integers(weight)
        if not torch.equal(integers * scale, quantizer(weight)[0]):
            raise CheckpointError(f"{layer}.weight: not integer times scale: check for values that are not finite")
        packed = pack(integers.to(torch.int8).numpy(), quantizer.bits)
        state |= {f"{layer}.weight": torch.from_numpy(packed), _scale_of(model, quantizer): scale}
        descriptions[f"{layer}.weight"] = _description(quantizer, weight).model_dump()
    return tensors_file(state, {_PACKED: json.dumps(descriptions, separators=(",", ":"))})


def tensors_file(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The content of a safetensors file of tensors, which may share memory, as tied weights do."""
    form = torch.contiguous_format
    return save({name: tensor.clone(memory_format=form) for name, tensor in tensors.items()}, metadata)


def read_plain(content: bytes, skeleton: nn.Module) -> dict[str, Tensor]:
    """The state in a weights file of a run, which holds exactly the tensors of the model's state_dict.

    Args:
        content: the bytes of the file.
        skeleton: a model of the same topology; its values do not matter, and it may be on the device `meta`.

    Raises:
        CheckpointError: not a safetensors file; or tensors that are missing, unexpected, of another shape or type, or
            not finite. All of them are named.
    """
    return _read(content, skeleton.state_dict(), {})


def read_published(content: bytes, skeleton: nn.Module) -> dict[str, Tensor]:
    """The state in a checkpoint's file, for `fill`. Weights of quantized layers are unpacked.

    Arguments and errors are those of `read_plain`. Packed values that the quantizers cannot have are errors too.
    """
    expected, quantizers = skeleton.state_dict(), _quantizers(skeleton)
    if not quantizers:
        return _read(content, expected, {})
    expected = {name: tensor for name, tensor in expected.items() if not name.endswith(_COUNTER)}
    packed = {f"{n}.weight": _description(q, expected[f"{n}.weight"]) for n, q in quantizers.items()}
    state = _read(content, expected, packed)
    for layer, quantizer in quantizers.items():
        name, shape = f"{layer}.weight", expected[f"{layer}.weight"].shape
        try:
            integers = unpack(state[name].numpy(), quantizer.bits, shape.numel())
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from None
        state[name] = torch.from_numpy(integers).view(shape).float() * state[_scale_of(skeleton, quantizer)]
        if not torch.isfinite(state[name]).all():
            raise CheckpointError(f"{_scale_of(skeleton, quantizer)}: too large: {name} is not finite")
    return state


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the state that `read_published` returned into a model.

    Raises:
        CheckpointError: a scale is below the floor of its quantizer.
    """
    counters = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(_COUNTER)}
    model.load_state_dict({**counters, **state}, strict=True)
    for quantizer in _quantizers(model).values():
        if not torch.equal(quantizer.scale, quantizer.effective_scale()):
            raise CheckpointError(f"{_scale_of(model, quantizer)}: below the smallest scale of a quantizer")


def fit_scale(model: nn.Module, layer: str) -> None:
    """Fit the scale of the layer named `layer` to its weight, if the layer is quantized."""
    if quantizer := _quantizers(model).get(layer):
        quantizer.fit(model.get_parameter(f"{layer}.weight"))


def _quantizers(model: nn.Module) -> dict[str, Any]:
    """The weight quantizer of each quantized layer, by the layer's name."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "weight_quant")}
    if not layers:
        return {}
    from cnvzoo.models.quant import quantizer_of  # imports Brevitas, which float models do not need

    return {name: quantizer_of(layer) for name, layer in layers.items()}


def _scale_of(model: nn.Module, quantizer: nn.Module) -> str:
    return next(f"{name}.scale" for name, module in model.named_modules() if module is quantizer)


def _description(quantizer: Any, weight: Tensor) -> Packed:
    return Packed(bits=quantizer.bits, signed=quantizer.signed, shape=list(weight.shape))


def _read(content: bytes, expected: Mapping[str, Tensor], packed: Mapping[str, Packed]) -> dict[str, Tensor]:
    stored, descriptions = _parse(content)
    wrong = [f"missing {name}" for name in expected if name not in stored]
    wrong += [f"unexpected {name}" for name in stored if name not in expected]
    for name, tensor in stored.items():
        if name in expected:
            wanted = (expected[name].dtype, list(expected[name].shape))
            if name in packed:
                wanted = (torch.uint8, [packed_size(expected[name].numel(), packed[name].bits)])
            if (tensor.dtype, list(tensor.shape)) != wanted:
                wrong.append(
                    f"{name}: {_short(tensor.dtype)} {list(tensor.shape)}, not {_short(wanted[0])} {wanted[1]}"
                )
            elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
                wrong.append(f"{name}: values that are not finite")
    wrong += [
        f"{name}: packed as {descriptions.get(name, 'nothing')}, not {packed.get(name, 'nothing')}"
        for name in {**packed, **descriptions}
        if descriptions.get(name) != packed.get(name)
    ]
    if wrong:
        raise CheckpointError("; ".join(wrong))
    return stored


def _parse(content: bytes) -> tuple[dict[str, Tensor], dict[str, Packed]]:
    """The tensors in a safetensors file, and the descriptions of those that are packed."""
    header = int.from_bytes(content[:8], "little")
    if header > min(_LARGEST_HEADER, len(content) - 8):
        raise CheckpointError(f"not a safetensors file: a header of {header:,} bytes")
    try:
        stored = load(content)
        metadata = json.loads(content[8 : 8 + header]).get("__metadata__") or {}
        return stored, _METADATA.validate_json(metadata.get(_PACKED, "{}"))
    except ValidationError as error:
        raise CheckpointError(f"metadata {_PACKED}: {explain(error)}") from None
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # KeyError: a type that torch does not have
        raise CheckpointError(f"not a readable safetensors file: {error}") from None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
