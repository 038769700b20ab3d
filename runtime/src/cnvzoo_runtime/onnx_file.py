"""Reading the metadata of an ONNX file, and checking that all its tensors are inside it, before ONNX Runtime opens it.

A tensor of an ONNX file may be in another file (external data), which ONNX Runtime then reads, wherever its path leads.
Files that cnvzoo exports have none, so a file with external data is refused. An ONNX file is a protobuf message: a
sequence of fields, each of a number, a type and a value, where the value may be a message too. Only the messages that
may contain tensors are visited.
"""

from __future__ import annotations

from collections.abc import Iterator

from cnvzoo_runtime.metadata import DeployError

# The messages of onnx.proto through which a tensor can be reached, and the types of their fields by number.
MESSAGES = {
    "Model": {7: "Graph", 14: "Entry", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
}  # fmt: skip
EXTERNAL_DATA, DATA_LOCATION = 13, 14  # fields of a tensor
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's types of values
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_VARINT = 10  # bytes
_DEEPEST = 100  # messages in each other; protobuf reads no more
LARGEST = (1 << 31) - 1  # bytes; protobuf reads no more


def read_properties(content: bytes, source: str) -> dict[str, str]:
    """The metadata in an ONNX file, by key, after a check that the file has no external data.

    Args:
        content: the bytes of the file.
        source: the name of the file, for error messages.

    Raises:
        DeployError: not an ONNX file, a tensor is in another file, or a key of the metadata occurs twice.
    """
    found: dict[str, str] = {}
    try:
        for kind, message in _messages(memoryview(content)):
            if kind == "Tensor" and _is_external(message):
                raise DeployError(f"{source}: a tensor of it is in another file (external data): export it again")
            if kind == "Entry":
                texts = {number: bytes(v).decode() for number, v in _fields(message) if isinstance(v, memoryview)}
                key = texts.get(_ENTRY_KEY, "")
                if key in found:
                    raise DeployError(f"{source}: its metadata has {key!r} twice: export it again")
                found[key] = texts.get(_ENTRY_VALUE, "")
    except ValueError as error:
        if isinstance(error, DeployError):
            raise
        raise DeployError(f"{source}: not an ONNX file: {error}") from None
    return found


def _is_external(tensor: memoryview) -> bool:
    """Whether a tensor names another file, or says that it is in one."""
    return any(number == EXTERNAL_DATA or (number == DATA_LOCATION and value != 0) for number, value in _fields(tensor))


def _messages(content: memoryview) -> Iterator[tuple[str, memoryview]]:
    """The type and the bytes of every message that has a type in MESSAGES or is one of their fields; no empty ones.

    Only the messages around the current one are kept, since a small file can have very many.
    """
    around = [_children("Model", content)]
    while around:
        found = next(around[-1], None)
        if found is None:
            around.pop()
            continue
        yield found
        if found[0] in MESSAGES:
            if len(around) == _DEEPEST:
                raise ValueError(f"its messages are more than {_DEEPEST} deep")
            around.append(_children(*found))


def _children(kind: str, message: memoryview) -> Iterator[tuple[str, memoryview]]:
    """The type and the bytes of the messages in a message of type `kind` that are to be visited."""
    fields = MESSAGES[kind]
    for number, value in _fields(message):
        if number in fields and isinstance(value, memoryview) and value:
            yield fields[number], value


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a message; integers of fixed size are given as their bytes.

    Raises:
        ValueError: it is not a message.
    """
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        if tag >> 32:  # protobuf drops these bits, and so reads another field than the one checked here
            raise ValueError("a field number is out of range")
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire == _BYTES:
            size, position = _varint(message, position)
        elif wire in _FIXED_SIZES:
            size = _FIXED_SIZES[wire]
        else:
            raise ValueError(f"a value of unknown type {wire}")
        if not number or size > len(message) - position:
            raise ValueError("a value is cut off")
        yield number, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """The integer of variable length at a position, and the position after it."""
    value = 0
    for index, byte in enumerate(message[position : position + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise ValueError("a number is cut off")
