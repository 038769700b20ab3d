"""The C99 source of an integer net: a source and a header that need no library, no allocation and no floating point.

The functions are those of c_kernels.c that the net needs; this module writes the constants, a descriptor of each layer,
and the function that calls them in the order of the net.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnvzoo.deploy.c_memory import Memory, Place, plan_memory
from cnvzoo.deploy.c_text import comment, constants, designated, identifier, string
from cnvzoo.deploy.c_weights import pack_rows
from cnvzoo.deploy.fixed_point import FixedPoint, fixed_point
from cnvzoo.deploy.integer import Head, Image, IntegerNet, Layer, Rounding, Sum
from cnvzoo.deploy.requantize import reachable_accumulators
from cnvzoo_runtime.metadata import Metadata

_ALIGNED = 16  # weights of a row in the buffer: a multiple, for vectors
_MOST_ROWS = 64  # that are unpacked at a time
_LEAST_BUFFER = 4608  # bytes for unpacked rows: eight 3x3 kernels of 64 channels
_CTYPES = {"uint8": "uint8_t", "int32": "int32_t", "int64": "int64_t"}


@dataclass(frozen=True)
class CSource:
    """The two files, and the bytes that they take on any target, without code and the stack.

    Attributes:
        source, header: text of the files.
        constant_bytes: of the tables of weights and requantization, in read-only memory.
        static_bytes: of the arrays that are written, in RAM.
    """

    source: str
    header: str
    constant_bytes: int
    static_bytes: int


def c_source(net: IntegerNet, metadata: Metadata, stem: str) -> CSource:
    """The source of a net.

    Args:
        net: the integer net.
        metadata: of the export: names of the model and its classes, and the scale.
        stem: name of the files without suffix, from which the names in them are made.
    """
    return _Writer(net, metadata, identifier(stem)).written(stem)


@dataclass
class _Writer:
    net: IntegerNet
    metadata: Metadata
    prefix: str
    memory: Memory = field(init=False)
    tables: list[str] = field(default_factory=list)
    constant_bytes: int = 0
    used: set[str] = field(default_factory=set)  # sections and conditions of the kernels
    names: dict[int, str] = field(default_factory=dict)  # of nodes, as identifiers
    buffer: int = 0  # bytes of unpacked rows
    window: int = 0
    block: int = 0

    def __post_init__(self) -> None:
        self.memory = plan_memory(self.net)
        taken: set[str] = set()
        for position, node in enumerate(self.net.nodes):
            name = identifier(node.name)
            while name in taken:
                name += "_"
            taken.add(name)
            self.names[position] = name
        self.largest_row = max([_row(node) for node in self.net.nodes if isinstance(node, (Layer, Head))])

    def written(self, stem: str) -> CSource:
        calls = self._calls()
        static = self.memory.size + self.buffer + self.window
        source = "\n".join([*self._top(stem), self._kernels(), *self.tables, *calls])
        return CSource(source, self._header(stem, static), self.constant_bytes, static)

    def _calls(self) -> list[str]:
        """The function that runs the net, after the tables of its nodes were added."""
        body: list[str] = []
        for position, node in enumerate(self.net.nodes):
            strip = self.memory.strip if position in (1, 2) else None
            if isinstance(node, Image) and node.channels > 1:
                self.used.add("interleave")
                body.append(f"    interleave(image, {node.channels}, {node.size**2}, {self._at(position)});")
            elif isinstance(node, Layer):
                self._add_layer(position, node)
                if strip is None:
                    rows = self._place(position).shape[0]
                    body.append(f"    {self._call(position, node, '0', str(rows))}")
                elif position == 2:
                    body += self._strips(strip)
            elif isinstance(node, Rounding):
                body.append(self._rounding(position, node))
            elif isinstance(node, Sum):
                body.append(self._sum(position, node))
            elif isinstance(node, Head):
                body.append(self._head(position, node))
        p = self.prefix
        size = f"const uint8_t image[{p.upper()}_IMAGE_BYTES], int32_t scores[{p.upper()}_CLASSES]"
        return [f"void {p}_run({size})", "{", *body, "}", ""]

    def _strips(self, strip: int) -> list[str]:
        """The first two layers, a few rows at a time."""
        first, second = self.net.nodes[1], self.net.nodes[2]
        assert isinstance(first, Layer)
        assert isinstance(second, Layer)
        rows, in_rows = self._place(2).shape[0], self._place(1).shape[0]
        pool, height = 2 if second.pooled else 1, second.weight.shape[2]
        rows_read = f"(end{f' * {pool}' if pool > 1 else ''} - 1) * {second.stride[0]} - {second.padding[0]} + {height}"
        needed = f"smaller({rows_read}, {in_rows})"
        if (pool - 1) * second.stride[0] - second.padding[0] + height < 0:  # the first rows are of padding alone
            self.used.add("larger")
            needed = f"larger(ready, {needed})"
        return [
            f"    /* {comment(first.name)} and {comment(second.name)} in strips of {strip} rows of the second */",
            f"    for (int32_t row = 0, ready = 0; row < {rows}; row += {strip}) {{",
            f"        const int32_t end = smaller(row + {strip}, {rows});",
            f"        const int32_t needed = {needed};",
            f"        {self._call(1, first, 'ready', 'needed')}",
            f"        {self._call(2, second, 'row', 'end')}",
            "        ready = needed;",
            "    }",
        ]

    def _call(self, position: int, layer: Layer, first: str, last: str) -> str:
        function = "convolve_depthwise" if _is_depthwise(layer) else "convolve"
        source = self._at(layer.inputs[0])
        return f"{function}(&layer_{self.names[position]}, {source}, {self._at(position)}, {first}, {last});"

    def _add_layer(self, position: int, layer: Layer) -> None:
        """The tables and the descriptor of a layer."""
        name, (taken,) = self.names[position], layer.inputs
        source, place = self._place(taken), self._place(position)
        rows, block = _rows(layer), self._block(layer)
        depthwise = _is_depthwise(layer)
        self.used |= {"depthwise"} if depthwise else {"dot", "convolve"}
        plain = layer.weight.reshape(len(layer.weight), -1)
        steps = fixed_point(layer.requantization, *reachable_accumulators(plain, source.high))
        out, _, *kernel = layer.weight.shape
        groups = f", {layer.groups} groups" if layer.groups > 1 else ""
        shapes = " to ".join(" x ".join(map(str, each.shape)) for each in (source, place))
        pooled = ", then max pooling" if layer.pooled else ""
        self._comment(
            f"{layer.name}: {shapes} (rows, columns, channels), kernel {kernel[0]} x {kernel[1]}{groups}{pooled}, "
            f"weights of {layer.w_bits} bits, levels 0 to {steps.most}"
        )
        packed = self._add_weights(name, rows, layer.w_bits)
        fields: dict[str, Any] = {
            "weights": f"table_{name}_weights", "bits": layer.w_bits, "row_bytes": packed.shape[1],
            "row_weights": rows.shape[1], "row": _row(layer), "block": block,
            "in_rows": source.shape[0], "in_columns": source.shape[1], "in_channels": source.shape[2],
            "in_kept": source.kept, "kernel_rows": kernel[0], "kernel_columns": kernel[1],
            "stride_rows": layer.stride[0], "stride_columns": layer.stride[1],
            "pad_rows": layer.padding[0], "pad_columns": layer.padding[1], "groups": layer.groups,
            "out_columns": place.shape[1], "out_channels": out, "out_kept": place.kept,
            "pool": 2 if layer.pooled else 1,
        }  # fmt: skip
        fields["steps"] = self._steps(name, steps)
        self.tables.append(f"static const struct layer layer_{name} = {designated(fields)};\n")

    def _steps(self, name: str, steps: FixedPoint) -> str:
        """The tables of a requantization, and the descriptor that names them."""
        fields: dict[str, Any] = {"most": steps.most}
        if not steps.has_multipliers:
            self.used.add("thresholds")
            self._table(f"table_{name}_thresholds", steps.thresholds.T.astype(np.int32))
            return designated(fields | {"thresholds": f"table_{name}_thresholds"})
        self.used.add("multipliers")
        self._table(f"table_{name}_multiplier", steps.multiplier.astype(np.int32))
        self._table(f"table_{name}_offset", steps.offset)
        self._table(f"table_{name}_shift", steps.shift.astype(np.uint8))
        fields |= {key: f"table_{name}_{key}" for key in ("multiplier", "offset", "shift")}
        if len(steps.changes):
            self.used.add("changes")
            self._table(f"table_{name}_changes", steps.changes.astype(np.int32))
            fields |= {"changes": f"table_{name}_changes", "change_count": len(steps.changes)}
        return designated(fields)

    def _rounding(self, position: int, node: Rounding) -> str:
        self.used.add("round_levels")
        name, (taken,) = self.names[position], node.inputs
        source = self._place(taken)
        table = node.requantization.levels(np.arange(source.high + 1)[:, None])[:, 0]
        self._comment(f"{node.name}: levels of 0 to {source.high} rounded to 0 to {node.requantization.high}")
        levels = f"table_{name}_levels"
        self._table(levels, table.astype(np.uint8))
        return f"    round_levels({levels}, {self._at(taken)}, {self._at(position)}, {self._place(position).size});"

    def _sum(self, position: int, node: Sum) -> str:
        self.used.add("add")
        first, second = node.inputs
        above, place = sum(self._place(i).below for i in node.inputs), self._place(position)
        return f"    add({self._at(first)}, {self._at(second)}, {above}, {self._at(position)}, {place.size});"

    def _head(self, position: int, head: Head) -> str:
        self.used |= {"dot", "score"}
        name, (taken,) = self.names[position], head.inputs
        rows_of_source, columns, channels = self._place(taken).shape
        weight = head.weight
        if head.pixels is None:
            maps = weight.reshape(len(weight), channels, rows_of_source, columns)
            weight = maps.transpose(0, 2, 3, 1).reshape(len(weight), -1)
        averaged = f"averaged over {head.pixels} pixels, " if head.pixels else ""
        self._comment(f"{head.name}: {weight.shape[1]} features, {averaged}to {len(weight)} scores")
        packed, bias = self._add_weights(name, weight, head.w_bits), "0"
        if head.bias is not None:
            bias = f"table_{name}_bias"
            self._table(bias, head.bias.astype(np.int32))
        fields = {
            "weights": f"table_{name}_weights", "bits": head.w_bits, "row_bytes": packed.shape[1],
            "row_weights": weight.shape[1], "row": _row(head), "block": self._block(head), "out_channels": len(weight),
        }  # fmt: skip
        self.tables.append(f"static const struct layer layer_{name} = {designated(fields)};\n")
        return f"    score(&layer_{name}, {self._at(taken)}, {head.pixels or 1}, {head.gain}, {bias}, scores);"

    def _block(self, layer: Layer | Head) -> int:
        """Rows that are unpacked at a time, or channels in a row of a depthwise layer; the buffers grow to fit."""
        if isinstance(layer, Layer) and _is_depthwise(layer):
            block, size = _depthwise_block(layer), _row(layer)
        else:
            outputs = len(layer.weight) // (layer.groups if isinstance(layer, Layer) else 1)
            room = max(4 * self.largest_row, _LEAST_BUFFER) // _row(layer) // 4 * 4
            block = max(4, min(room, _MOST_ROWS, -(-outputs // 4) * 4))
            size = block * _row(layer)
            self.window = max(self.window, _row(layer))
        self.block = max(self.block, block)
        self.buffer = max(self.buffer, size + _ALIGNED)  # unpacking writes a few weights behind a row
        return block

    def _add_weights(self, name: str, rows: NDArray[np.int8], bits: int) -> NDArray[np.uint8]:
        packed = pack_rows(rows, bits)
        self.used |= (
            {"bits8"} if bits == 8 else {"bits2", "unpack_ternary"} if bits == 2 else {"bits_other", "unpack_bits"}
        )
        self._table(f"table_{name}_weights", packed)
        return packed

    def _table(self, name: str, values: NDArray[Any]) -> None:
        self.constant_bytes += values.nbytes
        ctype = _CTYPES[values.dtype.name]
        self.tables.append(f"static const {ctype} {name}[{values.size}] = {{\n{constants(values)}\n}};\n")

    def _comment(self, text: str) -> None:
        self.tables.append(f"/* {comment(text)} */")

    def _place(self, position: int) -> Place:
        return self.memory.places[position]

    def _at(self, position: int) -> str:
        start = self._place(position).start
        return "image" if start is None else f"memory + {start}" if start else "memory"

    def _kernels(self) -> str:
        """The functions of c_kernels.c that the net needs."""
        text = resources.files("cnvzoo.deploy").joinpath("c_kernels.c").read_text(encoding="utf-8")
        sections = dict(re.findall(r"/\* section: (\w+) \*/\n(.*?)(?=/\* section:|\Z)", text, re.DOTALL))
        needed = self.used | {"structs", "unpack_row"} | ({"to_levels"} if self.net.layers else set())
        kept = "".join(section for name, section in sections.items() if name in needed)
        parts = re.split(r" */\* (if \w+|end) \*/\n", kept)
        chosen = [parts[0]]
        for condition, part in zip(parts[1::2], parts[2::2], strict=True):
            if condition == "end" or condition.removeprefix("if ") in self.used:
                chosen.append(part)
        return "".join(chosen)

    def _top(self, stem: str) -> Iterable[str]:
        size = self.memory.size  # none in a network that is only a head, of a grey image
        levels = (
            [f"static uint8_t memory[{size}]; /* levels of all layers, [rows][columns][channels] */"] if size else []
        )
        return [
            f"/* cnvzoo: C source of {comment(self.metadata.name)}; what it computes is described in {stem}.h. */",
            f'#include "{stem}.h"', "",
            f"#define BLOCK {self.block} /* output channels at a time, at most */", "",
            *levels,
            f"static int8_t rows[{self.buffer}];    /* weights of some output channels, unpacked */",
            f"static uint8_t window[{self.window}]; /* levels under the kernel */", "",
        ]  # fmt: skip

    def _header(self, stem: str, static: int) -> str:
        m, image, upper = self.metadata, self.net.image, self.prefix.upper()
        labels = ", ".join(string(label) for label in m.classes)
        colours = ", channels red, green, blue" if image.channels == 3 else ""
        scale = float(np.float32(m.scale))
        bits = f"weights of {m.w_bits} bits and activations of {m.a_bits} bits"
        return f"""/* cnvzoo: C source of {comment(m.name)}, with {bits}.

   Integer arithmetic only; equal to the integer graph in ONNX, bit for bit. No allocation, and no library.

   Constants in read-only memory: {self.constant_bytes:,} bytes, without the code.
   Static arrays in RAM: {static:,} bytes, of which {self.memory.size:,} are levels: those of two layers at a time, and
   in residual nets what is added later. The arrays are shared by all calls: one call at a time. */
#ifndef {upper}_H
#define {upper}_H

#include <stdint.h>

#define {upper}_CHANNELS {image.channels}
#define {upper}_SIZE {image.size} /* rows and columns */
#define {upper}_IMAGE_BYTES {image.channels * image.size**2}
#define {upper}_CLASSES {len(m.classes)}
#define {upper}_CONSTANT_BYTES {self.constant_bytes}
#define {upper}_STATIC_BYTES {static}

/* The logits of the trained model are {upper}_SCALE * scores; the class is that of the largest score. */
#define {upper}_SCALE {scale!r} /* {scale.hex()} */
#define {upper}_LABELS {{{labels}}}

#ifdef __cplusplus
extern "C" {{
#endif

/* image: pixels of 0 to 255, image[(channel * {upper}_SIZE + row) * {upper}_SIZE + column]{colours}.
   scores: one for each class. */
void {self.prefix}_run(const uint8_t image[{upper}_IMAGE_BYTES], int32_t scores[{upper}_CLASSES]);

#ifdef __cplusplus
}}
#endif

#endif
"""


def _is_depthwise(layer: Layer) -> bool:
    """Whether each channel of the output is of one channel of the input, in the same place."""
    return layer.groups > 1 and layer.weight.shape[1] == 1 and layer.groups == len(layer.weight)


def _depthwise_block(layer: Layer) -> int:
    return min(_MOST_ROWS, len(layer.weight))


def _rows(layer: Layer) -> NDArray[np.int8]:
    """The rows of weights as they are stored: [out, kernel rows * columns * channels].

    Those of a depthwise layer: [blocks, kernel rows * columns * channels in a block].
    """
    if not _is_depthwise(layer):
        return layer.weight.transpose(0, 2, 3, 1).reshape(len(layer.weight), -1)
    block, channels = _depthwise_block(layer), len(layer.weight)
    padded = np.pad(layer.weight.reshape(channels, -1), ((0, -channels % block), (0, 0)))
    return padded.reshape(-1, block, padded.shape[1]).transpose(0, 2, 1).reshape(len(padded) // block, -1)


def _row(layer: Layer | Head) -> int:
    """Weights of an unpacked row, with the zeros after them."""
    n = _rows(layer).shape[1] if isinstance(layer, Layer) else layer.weight.shape[1]
    return -(-n // _ALIGNED) * _ALIGNED
