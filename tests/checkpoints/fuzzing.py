"""Thousands of damaged checkpoint folders, in a process with hardly more memory than it has: `python fuzzing.py CASES`.

Each case is a small checkpoint with one or two mutations. Half of them are loaded as a published one, with the sizes
and sha256 of what was published; the others as a folder of somebody's own, whose config was made to fit the mutated
weights, so that the mutation reaches the parser. A case has to end in a CheckpointError, or in a model with exactly
the tensors that an independent reader, written from the description of the format, finds in the files. Prints what
came of how many, as JSON; anything else, MemoryError and warnings included, is a traceback.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from samples import TINY, publish, registered_tiny, trained
from torch import nn

from cnvzoo.checkpoints.folder import read_model
from cnvzoo.checkpoints.format import CheckpointError, FileFacts
from cnvzoo.checkpoints.load import load_checkpoint
from cnvzoo.models import register_model

SPARE = 192 << 20  # bytes of address space that a case may take
CONFIG, WEIGHTS = "config.json", "model.safetensors"
Files = dict[str, bytes]
STRANGE: list[Any] = [
    None, True, -1, 0, 1, 2, 7, 9, 255, 2**31, 2**40, 2**63, 2**64 - 1, 2**70, 1.5, 1e308, "", "F32", "I64", "U8",
    "F64", "BF16", "F4", "BOOL", "F8_E8M0", "../../etc/passwd", "\x00", "x" * 5000, [], [0], [1], [5, 1, 3, 3],
    [0, 2**62], [2**33], [2**32, 2**32], [-1], {}, {"a": 1}, [[[[[]]]]],
]  # fmt: skip


class TinyFloat(nn.Module):
    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_chans)
        self.fc = nn.Linear(in_chans, num_classes)


# --- mutations: each takes a generator of random numbers and the files, and changes the files ------------------------


def split(content: bytes) -> tuple[bytes, bytes]:
    header = int.from_bytes(content[:8], "little")
    return content[8 : 8 + header], content[8 + header :]


def join(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def flip(rng: random.Random, content: bytes, start: int = 0, stop: int | None = None) -> bytes:
    place = rng.randrange(start, len(content) if stop is None else stop)
    changed = bytearray(content)
    changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_header(rng: random.Random, files: Files) -> None:
    files[WEIGHTS] = flip(rng, files[WEIGHTS], 8, 8 + len(split(files[WEIGHTS])[0]))


def flip_data(rng: random.Random, files: Files) -> None:
    files[WEIGHTS] = flip(rng, files[WEIGHTS], 8 + len(split(files[WEIGHTS])[0]))


def header_length(rng: random.Random, files: Files) -> None:
    header, data = split(files[WEIGHTS])
    near = len(header) + rng.choice([-9, -2, -1, 1, 2, 8])
    files[WEIGHTS] = join(header, data, rng.choice([0, 1, near, 2**20, 2**27, 2**31, 2**40, 2**63, 2**64 - 1]))


def truncate(rng: random.Random, files: Files) -> None:
    name = rng.choice([CONFIG, WEIGHTS])
    files[name] = files[name][: rng.choice([0, 1, 7, 8, 9, rng.randrange(len(files[name])), len(files[name]) - 1])]


def extend(rng: random.Random, files: Files) -> None:
    files[WEIGHTS] += rng.randbytes(rng.choice([1, 4, 100]))


def leave_out(rng: random.Random, files: Files) -> None:
    del files[rng.choice([CONFIG, WEIGHTS])]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, as keys and indices."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


def mutate_json(rng: random.Random, values: dict[str, Any]) -> str:
    """Replace, remove, rename, duplicate or nudge something, anywhere."""
    path = rng.choice([place for place in places(values) if place])
    parent: Any = values
    for key in path[:-1]:
        parent = parent[key]
    key, old = path[-1], parent[path[-1]]
    action = rng.randrange(6)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, dict):
        parent[rng.choice([key + "x", "", key.upper(), "__metadata__", "conv.weight"])] = parent.pop(key)
    elif action == 2 and isinstance(old, int):
        parent[key] = old + rng.choice([-8, -4, -1, 1, 4, 8, 2**32])
    elif action == 3 and isinstance(old, list):
        parent[key] = rng.choice([old[::-1], old + old, old[:-1], [*old, 1], [*old, 0], [1, *old]])
    elif action == 4:
        text = json.dumps(values)
        return text[:-1] + "," + json.dumps({path[0]: rng.choice(STRANGE)})[1:]  # a key that is there twice
    else:
        parent[key] = rng.choice(STRANGE)
    return json.dumps(values)


def header_json(rng: random.Random, files: Files) -> None:
    header, data = split(files[WEIGHTS])
    files[WEIGHTS] = join(mutate_json(rng, json.loads(header)).encode(), data)


def offsets(rng: random.Random, files: Files) -> None:
    """Tensors that change places, overlap, or end elsewhere."""
    header, data = split(files[WEIGHTS])
    values = json.loads(header)
    a, b = rng.sample([name for name in values if name != "__metadata__"], 2)
    if rng.random() < 0.5:
        values[a]["data_offsets"], values[b]["data_offsets"] = values[b]["data_offsets"], values[a]["data_offsets"]
    else:
        values[a]["data_offsets"][rng.randrange(2)] = rng.choice([*values[b]["data_offsets"], 0, len(data), 2**63])
    files[WEIGHTS] = join(json.dumps(values).encode(), data)


def packed_metadata(rng: random.Random, files: Files) -> None:
    header, data = split(files[WEIGHTS])
    values = json.loads(header)
    metadata = values.setdefault("__metadata__", {})
    packed = json.loads(metadata.get("packed", '{"fc.weight": {"bits": 3, "signed": true, "shape": [3, 5]}}'))
    broken = rng.choice(["", "[" * 100_000, "null", "[]", '{"conv.weight": 3}', "NaN", '{"a":' * 90_000])
    metadata["packed"] = mutate_json(rng, packed) if rng.random() < 0.9 else broken
    files[WEIGHTS] = join(json.dumps(values).encode(), data)


def deep_header(rng: random.Random, files: Files) -> None:
    _, data = split(files[WEIGHTS])
    files[WEIGHTS] = join(rng.choice([b"[", b'{"a":', b'{"__metadata__":{"a":']) * rng.choice([100, 10_000]), data)


def config_json(rng: random.Random, files: Files) -> None:
    files[CONFIG] = mutate_json(rng, json.loads(files[CONFIG])).encode()


def config_model(rng: random.Random, files: Files) -> None:
    """Another model than the weights are of, in a config that agrees with itself."""
    values = json.loads(files[CONFIG])
    classes = rng.choice([1, 2, 4, 3000])
    values["classes"] = [str(number) for number in range(classes)]
    values["model"]["num_classes"] = classes
    values["model"]["name"] = rng.choice(["tiny", "tiny_float", "cnv", "resnet18", "quant_cnv", "mobilenet_v1"])
    if rng.random() < 0.5:
        values["model"][rng.choice(["w_bits", "a_bits", "in_chans", "x"])] = rng.choice(STRANGE)
    files[CONFIG] = json.dumps(values).encode()


def flip_config(rng: random.Random, files: Files) -> None:
    files[CONFIG] = flip(rng, files[CONFIG])


MUTATIONS: list[Callable[[random.Random, Files], None]] = [
    flip_header, flip_header, flip_data, flip_data, header_length, truncate, extend, leave_out, header_json,
    header_json, header_json, offsets, offsets, packed_metadata, packed_metadata, deep_header, config_json,
    config_json, config_model, flip_config,
]  # fmt: skip


# --- what the files say ----------------------------------------------------------------------------------------------


def independent_reading(content: bytes) -> dict[str, np.ndarray]:
    """The tensors in a file, by the description of the format alone."""
    header, data = split(content)
    values = json.loads(header)
    packed = json.loads(values.pop("__metadata__", {}).get("packed", "{}"))
    tensors = {}
    for name, info in values.items():
        start, stop = info["data_offsets"]
        dtype = {"F32": "<f4", "I64": "<i8", "U8": "u1"}[info["dtype"]]
        tensors[name] = np.frombuffer(data[start:stop], dtype).reshape(info["shape"])
    for name, info in packed.items():
        bits, stream = info["bits"], int.from_bytes(tensors[name].tobytes(), "little")
        codes = [stream >> (k * bits) & (2**bits - 1) for k in range(int(np.prod(info["shape"])))]
        signed = [code - 2**bits if code >= 2 ** (bits - 1) else code for code in codes]
        integers = np.array(signed, np.float32).reshape(info["shape"])
        tensors[name] = integers * tensors[name.removesuffix("weight") + "weight_quant.tensor_quant.scale"]
    return tensors


def check(model: nn.Module, content: bytes) -> None:
    expected, found = independent_reading(content), model.state_dict()
    assert {n for n in found if not n.endswith("num_batches_tracked")} <= expected.keys() <= found.keys()
    for name, array in expected.items():
        assert found[name].shape == array.shape, name
        assert np.array_equal(found[name].numpy(), array), name


def fit_config(files: Files) -> None:
    """Have the config say that the weights are the right ones, if it can be read at all."""
    try:
        values = json.loads(files[CONFIG])
        values["file"] = {"sha256": hashlib.sha256(files[WEIGHTS]).hexdigest(), "size": len(files[WEIGHTS])}
        files[CONFIG] = json.dumps(values).encode()
    except (KeyError, TypeError, ValueError, RecursionError):
        pass


def main(cases: int) -> None:
    warnings.simplefilter("error")
    counts: Counter[str] = Counter()
    with registered_tiny(), tempfile.TemporaryDirectory() as temporary:
        register_model("tiny_float", summary="of tests")(TinyFloat)
        root, originals = Path(temporary), []
        for arguments in (TINY, {"name": "tiny_float", "num_classes": 3, "in_chans": 1}):
            folder = root / arguments["name"]
            publish(folder, trained(arguments), arguments)
            load_checkpoint(folder)  # whatever is imported or allocated once is there
            originals.append({name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)})
        address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (address_space + SPARE, resource.RLIM_INFINITY))
        for case in range(cases):
            rng = random.Random(case)
            original = rng.choice(originals)
            files, published = dict(original), rng.random() < 0.3
            for _ in range(rng.choice([1, 1, 1, 2])):
                with suppress(AttributeError, LookupError, RecursionError, TypeError, ValueError):
                    rng.choice(MUTATIONS)(rng, files)  # a second one may find nothing left to change
            if not published:
                fit_config(files)
            folder = root / f"case{case % 8}"
            folder.mkdir(exist_ok=True)
            for name in (CONFIG, WEIGHTS):
                (folder / name).unlink(missing_ok=True)
            for name, content in files.items():
                (folder / name).write_bytes(content)
            try:
                if published:
                    known = {name: FileFacts.of(content) for name, content in original.items()}
                    model, _ = read_model(folder, known)
                    assert files == original
                else:
                    model, _ = load_checkpoint(folder)
                check(model, files[WEIGHTS])
            except CheckpointError as error:
                assert str(folder) in str(error)  # noqa: PT017
                counts["refused, published" if published else "refused, own"] += 1
            except BaseException:
                print(f"case {case}:", {name: content[:600] for name, content in files.items()}, file=sys.stderr)
                raise
            else:
                counts["loaded as it is written"] += 1
    print(json.dumps(counts))


if __name__ == "__main__":
    main(int(sys.argv[1]))
