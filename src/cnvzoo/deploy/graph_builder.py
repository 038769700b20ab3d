"""ONNX graphs under construction, whose weights of few bits are packed in bytes and unpacked by nodes."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 13  # the first whose QuantizeLinear and DequantizeLinear have a scale for each channel
IR_VERSION = 8  # read by onnxruntime 1.10 and later
_ROW_NODES_SIZE = 512  # bytes, about: of the two nodes that put rows of zeros back


class GraphBuilder:
    """Collects the nodes and constants of a graph; the methods return the names of the tensors that they add.

    Args:
        outputs: the names of the outputs of the graph.
        compact: whether to save the bytes of names and repeated constants: equal constants are one, tensors but the
            outputs have numbers in place of the names that they are added with, and nodes have no names. For graphs of
            many small layers, in which these are a large part of the file.
    """

    def __init__(self, outputs: Collection[str], *, compact: bool) -> None:
        self.outputs, self.compact = outputs, compact
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._constant_names: dict[tuple[str, tuple[int, ...], bytes], str] = {}  # by type, shape and content
        self._numbers = itertools.count()

    def _name(self, name: str) -> str:
        return str(next(self._numbers)) if self.compact and name not in self.outputs else name

    def model(self, name: str, image: onnx.ValueInfoProto, outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
        """The graph as a model, checked by onnx."""
        model = helper.make_model(
            helper.make_graph(self.nodes, name, [image], outputs, self.constants),
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="cnvzoo",
        )
        onnx.checker.check_model(model, full_check=True)
        return model

    def add_constant(self, name: str, value: ArrayLike, *, shared: bool = True) -> str:
        """A constant; one that is not `shared` is no other's, even if it is equal.

        ONNX Runtime rewrites the weights of each layer and their zero points for CPUs without VNNI, and fails if two
        layers share them.
        """
        array = np.asarray(value)
        content = array.dtype.str, array.shape, array.tobytes()
        if self.compact and shared and content in self._constant_names:
            return self._constant_names[content]
        name = self._name(name)
        if shared:
            self._constant_names[content] = name
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add a node with one output."""
        (output,) = self.add_several(kind, inputs, [output], **attributes)
        return output

    def add_several(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> list[str]:
        """Add a node with several outputs."""
        outputs = [self._name(output) for output in outputs]
        name = None if self.compact else outputs[0]
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, **attributes))
        return outputs

    def add_weight(self, name: str, weight: NDArray[np.int8]) -> str:
        """An int8 weight; packed if that saves bytes, with the nodes that unpack it.

        Rows of zeros, which channels with a constant level have, are left out if that saves bytes too: among 1-bit
        weights, zero is a third value.
        """
        used = np.asarray(weight.reshape(len(weight), -1).any(1))
        rows, position = weight[used], _position(used)
        if not used.any() or _packed_size(rows) + position.nbytes + _ROW_NODES_SIZE >= _packed_size(weight):
            return self._add_packed(name, weight)
        stored = self._add_packed(f"{name}.used", rows)
        pads = np.zeros((2, weight.ndim), np.int64)  # before and after, for each axis
        pads[1, 0] = 1
        padded = self.add("Pad", [stored, self.add_constant(f"{name}.pads", pads.reshape(-1))], f"{name}.and_zeros")
        return self.add("Gather", [padded, self.add_constant(f"{name}.position", position)], f"{name}.weight")

    def add_weights(self, weights: Mapping[str, NDArray[np.int8]]) -> dict[str, str]:
        """Several int8 weights by name; those of one bit width are packed and unpacked together."""
        groups: dict[tuple[int, int], list[str]] = {}
        for name, weight in weights.items():
            unit = int(np.gcd.reduce(weight.reshape(-1).astype(np.int64)))  # the gain, as a rule
            groups.setdefault((_per_byte(np.unique(weight)), unit), []).append(name)
        added = {}
        for names in groups.values():
            values = np.concatenate([weights[name].reshape(-1) for name in names])
            packed = pack_by_table(values)
            if len(names) == 1 or packed is None:
                added.update({name: self.add_weight(name, weights[name]) for name in names})
                continue
            flat = self._unpacked(names[0], *packed)
            flat = self.add(
                "Reshape", [flat, self.add_constant(f"{names[0]}.flat", np.array([-1]))], f"{names[0]}.padded"
            )
            sizes = [weights[name].size for name in names]
            sizes.append(packed[0].size * packed[1].shape[1] - sum(sizes))  # the padding
            parts = [*(f"{name}.values" for name in names), f"{names[0]}.rest"]
            sizes_name = self.add_constant(f"{names[0]}.sizes", np.array(sizes))
            *parts, _ = self.add_several("Split", [flat, sizes_name], parts)
            for name, part in zip(names, parts, strict=True):
                shape = self.add_constant(f"{name}.shape", np.array(weights[name].shape))
                added[name] = self.add("Reshape", [part, shape], f"{name}.weight")
        return added

    def add_zeros(self, sizes: Mapping[str, int]) -> dict[str, str]:
        """Vectors of int8 zeros of these sizes, one for each name, from a single zero."""
        length = self.add_constant("zeros.length", np.array([sum(sizes.values())]))
        zeros = self.add("Expand", [self.add_constant("zeros.zero", np.int8(0)), length], "zeros")
        lengths = self.add_constant("zeros.sizes", np.array(list(sizes.values())))
        parts = self.add_several("Split", [zeros, lengths], [f"{name}.zero" for name in sizes])
        return dict(zip(sizes, parts, strict=True))

    def _add_packed(self, name: str, weight: NDArray[np.int8]) -> str:
        packed = pack_by_table(weight)
        if packed is None:
            return self.add_constant(f"{name}.weight", weight, shared=False)
        content, table = packed
        flat = self._unpacked(name, content, table)
        if content.size * table.shape[1] != weight.size:
            flat = self.add("Reshape", [flat, self.add_constant(f"{name}.flat", np.array([-1]))], f"{name}.padded")
            slice_bounds = (("start", 0), ("end", weight.size))
            bounds = [self.add_constant(f"{name}.{key}", np.array([value])) for key, value in slice_bounds]
            flat = self.add("Slice", [flat, *bounds], f"{name}.values")
        shape = self.add_constant(f"{name}.shape", np.array(weight.shape))
        return self.add("Reshape", [flat, shape], f"{name}.weight")

    def _unpacked(self, name: str, content: NDArray[np.uint8], table: NDArray[np.int8]) -> str:
        """The rows of the table that the bytes are indices of: [bytes, weights in a byte]."""
        index = self.add("Cast", [self.add_constant(f"{name}.packed", content)], f"{name}.index", to=TensorProto.INT32)
        return self.add("Gather", [self.add_constant(f"{name}.table", table), index], f"{name}.gathered")


def _position(used: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Where each row is among the used rows, followed by one row of zeros."""
    return np.where(used, np.cumsum(used) - 1, used.sum()).astype(np.int32)


def _packed_size(weight: NDArray[np.int8]) -> int:
    """Bytes of a weight in the file: of what `pack_by_table` returns, or of the weight itself."""
    packed = pack_by_table(weight)
    return weight.nbytes if packed is None else sum(part.nbytes for part in packed)


def _per_byte(values: NDArray[np.int8]) -> int:
    """How many weights that have only these values fit in a byte."""
    return max((n for n in range(1, 9) if len(values) ** n <= 256), default=1)


def pack_by_table(weight: NDArray[np.int8]) -> tuple[NDArray[np.uint8], NDArray[np.int8]] | None:
    """Several weights in each byte: 8 of two values, 5 of three (2 bits), 3 of up to six, 2 of up to 16 (4 bits).

    A byte is the index of a row of a table that holds the weights as int8. So one Gather unpacks them, whose inputs are
    constant: ONNX Runtime computes it once, when it loads the file, and then runs as with int8 weights.

    Returns:
        (bytes [n], table int8 [rows, weights in a byte]): `table[bytes].reshape(-1)` starts with the weights in
        row-major order, and ends with padding. None for more than 16 values, which need a byte each.
    """
    values = np.unique(weight)
    count = _per_byte(values)
    if count == 1:
        return None
    table = np.array(list(itertools.product(values, repeat=count)), np.int8)
    digits = np.searchsorted(values, weight.reshape(-1))
    digits = np.pad(digits, (0, -len(digits) % count)).reshape(-1, count)
    powers = len(values) ** np.arange(count - 1, -1, -1)
    return (digits @ powers).astype(np.uint8), table
