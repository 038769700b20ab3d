"""Integers of 1 to 8 bits without a gap between them: a 2-bit weight takes 2 bits.

Value k takes the bits k*b to k*b + b - 1 of the stream, its lowest bit first; bit j of the stream is bit j % 8 of
byte j // 8. Values are in two's complement; binary ones are 0 for -1 and 1 for +1. The bits that fill the last byte
are zero. So each sequence of values has one packed form only.


The model that a config asks for, before it has weights.

model.safetensors: a model's tensors, the weights of quantized layers as packed integers, and reading them strictly.

A float model's file is the one that its run left, byte for byte: all of its state in float32, so that a quantized run
can start from exactly these weights. In a quantized model's file

- the weight of a quantized layer is a uint8 tensor of packed integers (`packing`). The metadata key `packed` says, as
  JSON, bits, sign and shape of each. The float weight is integer times scale;
- its scale is the one that divides, so never below the quantizer's floor;
- everything else is as in the state_dict, but BatchNorm's counters of batches, which are not stored.

https://github.com/huggingface/safetensors#format has the format of the file around them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from cnvzoo.checkpoints.format import CheckpointError
from cnvzoo.errors import ModelError, explain
from cnvzoo.models.fake_quant import IntRange
from cnvzoo.models.layers import without_initialization
from cnvzoo.models.registry import build_model


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take."""
    return -(-count * bits // 8)


def pack(values: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
    """Integers (any shape, taken in C order) to bytes [packed_size].

    Raises:
        ValueError: a value that signed symmetric (at 1 bit: binary) integers of `bits` bits do not have.
    """
    ints, count = IntRange.of(bits, signed=True), values.size
    if not _in_range(values, ints):
        raise ValueError(f"values from {values.min()} to {values.max()} are not those of {bits} bits")
    codes = np.zeros((-(-count // 8), 8), np.uint64)
    codes.reshape(-1)[:count] = (values > 0 if ints.binary else values.view(np.uint8) & (2**bits - 1)).reshape(-1)
    words = np.bitwise_or.reduce(codes << _shifts(bits), axis=1).astype("<u8")
    return words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)[: packed_size(count, bits)]


def unpack(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int8]:
    """The inverse of `pack`: bytes to `count` integers, [count].

    Raises:
        ValueError: bytes that `pack` does not give: too many or too few, a value out of range, filling that is not 0.
    """
    if data.shape != (packed_size(count, bits),):
        raise ValueError(f"{count} values of {bits} bits take {packed_size(count, bits)} bytes, not {data.size}")
    if (used := count * bits % 8) and data[-1] >> used:
        raise ValueError("the bits after the last value are not zero")
    groups = -(-count // 8)  # 8 values take as many bytes as one has bits, and fit into a word
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


def build_empty(arguments: Mapping[str, Any]) -> nn.Module:
    """A model on the CPU with any values; the random numbers of the caller stay as they are.

    Raises:
        CheckpointError: there is no such model.
    """
    try:
        return _build(arguments)
    except (TypeError, RuntimeError, ModelError) as error:
        raise CheckpointError(f"its model cannot be built: {error}") from None


def build_skeleton(arguments: Mapping[str, Any]) -> nn.Module:
    """The names, shapes and types of a model's tensors, for which no memory is taken, whatever the config asks for.

    Raises:
        CheckpointError: there is no such model.
    """
    try:
        with torch.device("meta"):
            return _build(arguments)
    except (TypeError, ModelError) as error:
        raise CheckpointError(f"its model cannot be built: {error}") from None
    except RuntimeError:  # its builder computes with values, which a skeleton does not have
        return build_empty(arguments)


def _build(arguments: Mapping[str, Any]) -> nn.Module:
    with without_initialization():
        return build_model(**arguments)


_PACKED = "packed"
_COUNTER = "num_batches_tracked"
_LARGEST_HEADER = 1 << 20  # bytes


class Packed(BaseModel):
    """How the values of a packed tensor are stored; at 1 bit they are -1 and 1, above symmetric around 0."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bits: int = Field(ge=1, le=8)
    signed: Literal[True]
    shape: list[int]

    def __str__(self) -> str:
        return f"{self.bits} bits {self.shape}"


_METADATA = TypeAdapter(dict[str, Packed])


def is_quantized(model: nn.Module) -> bool:
    """Whether the model has weights that are stored packed."""
    return bool(_quantizers(model))


@torch.no_grad()
def packed_file(model: nn.Module) -> bytes:
    """The content of a quantized model's file; the model is on the CPU. The same state gives the same bytes.

    Raises:
        CheckpointError: integers and scale would not give the very weights that the model computes with.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(_COUNTER)}
    descriptions = {}
    for layer, quantizer in _quantizers(model).items():
        weight, scale = state[f"{layer}.weight"], quantizer.effective_scale()
        integers = quantizer.ints.round(weight / scale)
        if not torch.equal(integers * scale, quantizer(weight)[0]):
            raise CheckpointError(f"{layer}.weight: not the product of integers and the scale: is a value not finite?")
        packed = pack(integers.to(torch.int8).numpy(), quantizer.bits)
        state |= {f"{layer}.weight": torch.from_numpy(packed), _scale_of(model, quantizer): scale}
        descriptions[f"{layer}.weight"] = _description(quantizer, weight).model_dump()
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    return save(contiguous, {_PACKED: json.dumps(descriptions, separators=(",", ":"))})


def read_plain(content: bytes, skeleton: nn.Module) -> dict[str, Tensor]:
    """The state in a file that holds exactly the tensors of the model's state_dict, as a run leaves it.

    Args:
        content: of the file.
        skeleton: a model of the same topology; its values do not matter, and it may be on the device `meta`.

    Raises:
        CheckpointError: no safetensors file; or tensors that are missing, unexpected, or of another shape or type than
            the model's, all of which are named; or values that are not finite.
    """
    return _read(content, skeleton.state_dict(), {})


def read_published(content: bytes, skeleton: nn.Module) -> dict[str, Tensor]:
    """The state in a checkpoint's file, in which weights of quantized layers are packed; for `fill`.

    Arguments and errors are those of `read_plain`; packed values that no quantizer of the model gives are errors too.
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
            raise CheckpointError(f"{_scale_of(skeleton, quantizer)}: so large that {name} is not finite")
    return state


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model the state that `read_published` returned, every tensor of it.

    Raises:
        CheckpointError: a scale that its quantizer would replace by its floor.
    """
    counters = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(_COUNTER)}
    model.load_state_dict({**counters, **state}, strict=True)
    for quantizer in _quantizers(model).values():
        if not torch.equal(quantizer.scale, quantizer.effective_scale()):
            raise CheckpointError(f"{_scale_of(model, quantizer)}: a scale below the least that a quantizer has")


def fit_scale(model: nn.Module, layer: str) -> None:
    """Fit the scale of a quantized layer, by name, to its weight; a float layer has none and is left alone."""
    if quantizer := _quantizers(model).get(layer):
        quantizer.fit(model.get_parameter(f"{layer}.weight"))


def _quantizers(model: nn.Module) -> dict[str, Any]:
    """The weight quantizer of each quantized layer, by the layer's name."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "weight_quant")}
    if not layers:
        return {}
    from cnvzoo.models.quant import quantizer_of  # Brevitas, which a float model does without

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
                wrong.append(f"{name}: {_said(tensor.dtype)} {list(tensor.shape)}, not {_said(wanted[0])} {wanted[1]}")
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
    """The tensors, and how those are packed that are."""
    header = int.from_bytes(content[:8], "little")
    if header > min(_LARGEST_HEADER, len(content) - 8):
        raise CheckpointError(f"not a safetensors file: a header of {header:,} bytes")
    try:
        stored = load(content)
        metadata = json.loads(content[8 : 8 + header]).get("__metadata__", {})
        return stored, _METADATA.validate_json(metadata.get(_PACKED, "{}"))
    except ValidationError as error:
        raise CheckpointError(f"metadata {_PACKED}: {explain(error)}") from None
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # a type that torch has not is a KeyError
        raise CheckpointError(f"not a safetensors file that can be read: {error}") from None


def _said(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
