"""Exported C source: it compiles without warnings, and its scores are those of the integer graph, bit for bit."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

import cnvzoo
import cnvzoo.deploy
from cnvzoo.cli.app import app
from cnvzoo.deploy import DeployError, Metadata
from cnvzoo.deploy.c_source import c_source
from cnvzoo.deploy.c_weights import pack_rows
from cnvzoo.deploy.fixed_point import fixed_point
from cnvzoo.deploy.integer import Head, Image, IntegerNet, Layer, Node, Rounding, Sum
from cnvzoo.deploy.lowering import integer_net
from cnvzoo.deploy.reference import run_reference
from cnvzoo.deploy.requantize import Requantization, StepFunctions, requantize

HUB = Path(__file__).resolve().parents[2] / "hub"
EXAMPLE = HUB.parent / "examples" / "microcontroller"
COMPILERS = [compiler for compiler in ("gcc", "clang") if shutil.which(compiler)]
FLAGS = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
SANITIZED = {  # packages of clang are often without the libraries of its sanitizers
    "gcc": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "clang": ["-O2"],
}
PROGRAM = """
#include <stdio.h>
#include "net.h"
static uint8_t image[NET_IMAGE_BYTES];
static int32_t scores[NET_CLASSES];
int main(void)
{
    while (fread(image, sizeof image, 1, stdin) == 1) {
        net_run(image, scores);
        fwrite(scores, sizeof scores, 1, stdout);
    }
    return 0;
}
"""
needs_compiler = pytest.mark.skipif(not COMPILERS, reason="neither gcc nor clang is installed")


def compiled(folder: Path, flags: list[str], compiler: str) -> Path:
    """A program that runs net.c on the images that it reads, and writes the scores."""
    (folder / "main.c").write_text(PROGRAM)
    command = [compiler, *FLAGS, *flags, "-o", "program", "net.c", "main.c"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "program"


def scores_of(program: Path, images: NDArray[np.uint8]) -> NDArray[np.int32]:
    done = subprocess.run([program], input=images.tobytes(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return np.frombuffer(done.stdout, np.int32).reshape(len(images), -1)


def write_c(net: IntegerNet, folder: Path) -> None:
    classes = tuple(str(i) for i in range(len(net.head.weight)))
    zeros = (0.0,) * net.image.channels
    facts = Metadata("c", "test", None, classes, net.image.size, net.image.size, zeros, zeros, net.head.scale, 2, 2)
    written = c_source(net, facts, "net")
    (folder / "net.c").write_text(written.source)
    (folder / "net.h").write_text(written.header)


def assert_equals_reference(net: IntegerNet, images: NDArray[np.uint8], folder: Path) -> NDArray[np.int32]:
    write_c(net, folder)
    expected = run_reference(net, images)
    for compiler in COMPILERS:
        np.testing.assert_array_equal(scores_of(compiled(folder, SANITIZED[compiler], compiler), images), expected)
    return expected


def images_for(net: IntegerNet, count: int) -> NDArray[np.uint8]:
    """The first image is black, the second white."""
    shape = (count, net.image.channels, net.image.size, net.image.size)
    images = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    images[0], images[1] = 0, 255
    return images


@needs_compiler
@pytest.mark.parametrize("kind", ["residual", "separable"])
@pytest.mark.parametrize(("w_bits", "a_bits"), [(8, 8), (4, 4), (2, 2), (1, 1), (3, 8), (7, 3)])
def test_residual_and_depthwise_nets_equal_the_reference(small_net, tmp_path, kind, w_bits, a_bits):
    net = integer_net(small_net(kind, w_bits, a_bits), 8)
    expected = assert_equals_reference(net, images_for(net, 40), tmp_path)
    assert len(np.unique(expected)) > 20


@needs_compiler
@pytest.mark.parametrize(("name", "bits"), [("quant_resnet20", 4), ("quant_mobilenet_v1", 2)])
def test_models_of_the_registry_equal_the_reference(registered_net, tmp_path, name, bits):
    model = copy.deepcopy(registered_net(name, bits))
    cnvzoo.export(model, tmp_path / "net.c", format="c", dataset="cifar10")
    net = integer_net(model)
    images = images_for(net, 5)
    program = compiled(tmp_path, ["-O2"], COMPILERS[0])
    np.testing.assert_array_equal(scores_of(program, images), run_reference(net, images))


@needs_compiler
@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_published_checkpoint_has_the_scores_of_onnxruntime(noise, tmp_path, compiler):
    facts = cnvzoo.export(HUB / "quant_cnv_w2a2.mnist", tmp_path / "net.c", format="c")
    cnvzoo.export(HUB / "quant_cnv_w2a2.mnist", tmp_path / "m.onnx")
    images = noise(20, 1).numpy()
    deployed = cnvzoo.deploy.load(tmp_path / "m.onnx", threads=1)
    found = scores_of(compiled(tmp_path, SANITIZED[compiler], compiler), images)
    np.testing.assert_array_equal(found, deployed.accumulators(images))
    assert (facts.format, facts.scale) == ("c", pytest.approx(deployed.metadata.scale))
    assert len(np.unique(found)) > 50


@pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("make", "arm-none-eabi-gcc", "qemu-system-arm")),
    reason="make, arm-none-eabi-gcc or qemu-system-arm is not installed",
)
def test_the_example_has_the_same_scores_on_a_cortex_m4_in_qemu(noise, tmp_path):
    """And fits into 380,000 bytes of flash and 70,000 of RAM."""
    cnvzoo.export(HUB / "quant_cnv_w2a2.cifar10", tmp_path / "net.c", format="c")
    cnvzoo.export(HUB / "quant_cnv_w2a2.cifar10", tmp_path / "m.onnx")
    images = noise(2).numpy()
    images.tofile(tmp_path / "images.bin")
    make = ["make", "-s", "-C", EXAMPLE, f"DIR={tmp_path}"]
    size, emulated = (
        subprocess.run([*make, target], capture_output=True, text=True, check=True, timeout=120).stdout
        for target in ("size", "emulate")
    )
    flash, data, static = map(int, size.splitlines()[1].split()[:3])
    assert (flash < 380_000, data, static < 70_000) == (True, 0, True)
    rows = re.findall(r"^(\w+): ([-\d ]+); (\d+) instructions$", emulated, re.MULTILINE)
    deployed = cnvzoo.deploy.load(tmp_path / "m.onnx", threads=1)
    expected = deployed.accumulators(images)
    assert [list(map(int, scores.split())) for _, scores, _ in rows] == expected.tolist()
    assert [label for label, _, _ in rows] == [deployed.metadata.classes[i] for i in expected.argmax(1)]
    assert all(59_000_000 < int(count) < 300_000_000 for *_, count in rows)  # 59 million products


def layer(taken: int, weight: Any, *, bias: int = 0, multiplier: float = 1, high: int = 255, **settings: Any) -> Layer:
    """A layer with int8 weights [out, in / groups, rows, columns], and one bias and multiplier for all channels."""
    weight, counts = np.array(weight, np.int8), np.zeros(1, np.int64)
    biases, multipliers = np.full(len(weight), bias, np.int32), np.full(len(weight), multiplier, np.float32)
    low = settings.pop("low", 0)
    chosen = Requantization(1, biases, multipliers, low, low + high, counts, counts)
    return Layer(f"layer {taken}", (taken,), weight, 8, chosen, **settings)


def net_of(channels: int, size: int, *nodes: Node, **head: Any) -> IntegerNet:
    settings: dict[str, Any] = {"gain": 1, "bias": None, "pixels": None, "scale": 1.0, "w_bits": 8, **head}
    last = Head("head", (len(nodes),), **settings)
    return IntegerNet((Image("image", (), channels, size), *nodes, last))


def random_weights(*shape: int) -> NDArray[np.int8]:
    return np.random.default_rng(5).integers(-127, 128, shape).astype(np.int8)


@needs_compiler
@pytest.mark.parametrize(
    "settings",
    [
        {"stride": (2, 1), "padding": (1, 2)},
        {"stride": (3, 2), "padding": (0, 1), "pooled": True},
        {"groups": 2, "padding": (1, 1)},
        {"groups": 6, "padding": (1, 1), "pooled": True},
        {"padding": (5, 5)},
        {"padding": (6, 1), "pooled": True},
    ],
)
def test_strides_padding_groups_and_pooling(tmp_path, settings):
    """Of the second layer, which is computed in strips, on maps with an odd number of rows."""
    first = layer(0, random_weights(6, 3, 3, 3), multiplier=1e-3, bias=20_000, padding=(1, 1))
    second = layer(1, random_weights(6, 6 // settings.get("groups", 1), 3, 3), multiplier=2e-3, bias=30_000, **settings)
    net = net_of(3, 13, first, second, weight=np.zeros((1, 1), np.int8))
    features = run_features(net)
    head = Head("head", (2,), random_weights(9, features) // 4, 8, 3, np.arange(9, dtype=np.int32) * 1000, None, 1.0)
    expected = assert_equals_reference(IntegerNet((*net.nodes[:-1], head)), images_for(net, 8), tmp_path)
    assert len(np.unique(expected)) > 60


def run_features(net: IntegerNet) -> int:
    """How many levels the node before the head has."""
    from cnvzoo.deploy.reference import apply

    levels: list[Any] = [np.zeros((1, net.image.channels, net.image.size, net.image.size), np.uint8)]
    for node in net.nodes[1:-1]:
        levels.append(apply(node, *(levels[i] for i in node.inputs)))
    return levels[-1].size


@needs_compiler
@pytest.mark.parametrize("channels", [1, 3])
def test_a_net_that_is_only_a_head(tmp_path, channels):
    net = net_of(channels, 5, weight=random_weights(3, channels * 25), bias=np.array([1, -2, 3], np.int32))
    expected = assert_equals_reference(net, images_for(net, 4), tmp_path)
    assert expected[0].tolist() == [1, -2, 3]  # a black image


@needs_compiler
def test_sums_and_roundings_are_clipped_for_every_pair_of_levels(tmp_path):
    values = np.arange(256)
    pairs = np.stack([np.repeat(values, 256), np.tile(values, 256)], 1).astype(np.uint8)
    images = pairs.reshape(-1, 2, 1, 1)
    first = layer(0, [[[[1]], [[0]]]])
    second = layer(0, [[[[0]], [[1]]]], bias=-128, low=-128)
    exact = StepFunctions(np.array([1 / 17]), np.zeros(1), np.zeros(1, np.int64), np.full(1, 255), 15)
    rounded = Rounding("rounding", (3,), requantize(exact, 1, biased=False))
    net = net_of(2, 1, first, second, Sum("sum", (2, 1)), rounded, weight=np.ones((1, 1), np.int8))
    write_c(net, tmp_path)
    found = scores_of(compiled(tmp_path, ["-O2"], COMPILERS[0]), images)
    total = np.clip(pairs[:, 0].astype(int) + pairs[:, 1].astype(int) - 128, 0, 255)
    np.testing.assert_array_equal(found[:, 0], (total + 8) // 17)


@needs_compiler
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_rounded_to_fewer_levels(tmp_path, channels):
    """A grey image is read where the caller has it, so its levels need a place of their own."""
    exact = StepFunctions(np.array([1 / 17]), np.zeros(1), np.zeros(1, np.int64), np.full(1, 255), 15)
    rounded = Rounding("rounding", (0,), requantize(exact, 1, biased=False))
    net = net_of(channels, 5, rounded, weight=random_weights(3, channels * 25))
    assert_equals_reference(net, images_for(net, 20), tmp_path)
    assert ("channels red, green, blue" in (tmp_path / "net.h").read_text()) == (channels == 3)


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_the_header_has_the_bytes_of_constants_and_static_arrays(tmp_path):
    cnvzoo.export(HUB / "quant_cnv_w2a2.cifar10", tmp_path / "net.c", format="c")
    subprocess.run([COMPILERS[0], *FLAGS, "-O2", "-c", "net.c"], cwd=tmp_path, check=True)
    listing = subprocess.run(["nm", "-S", "net.o"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    sizes = {"r": 0, "b": 0, "d": 0, "t": 0, "T": 0}
    for size, kind, name in re.findall(r"^\w+ (\w+) (\w) (\w+)$", listing, re.MULTILINE):
        sizes[kind] += 0 if name.startswith("layer_") else int(size, 16)
    header = (tmp_path / "net.h").read_text()
    stated = {name: int(value) for name, value in re.findall(r"#define NET_(\w+_BYTES) (\d+)", header)}
    assert (sizes["r"], sizes["b"], sizes["d"]) == (stated["CONSTANT_BYTES"], stated["STATIC_BYTES"], 0)
    assert sizes["t"] + sizes["T"] < 16_000
    assert stated["CONSTANT_BYTES"] < 340_000
    assert stated["STATIC_BYTES"] < 45_000
    assert f"{stated['CONSTANT_BYTES']:,} bytes" in header
    source = re.sub(r"/\*.*?\*/", "", (tmp_path / "net.c").read_text(), flags=re.DOTALL)
    assert re.findall(r"#include (.*)", header + source) == ["<stdint.h>", '"net.h"']
    assert not re.search(r"\b(float|double|malloc)\b", source)


@pytest.mark.parametrize(("low", "most"), [(0, 255), (-128, 255), (0, 15), (0, 3)])
@pytest.mark.parametrize("gain", [1, 18])
def test_fixed_point_levels_are_those_of_the_integer_graph_for_every_accumulator(low, most, gain):
    """By brute force; with the changes that rounding to float32 needs at 8 bits."""
    rng = np.random.default_rng(3)
    channels, end = 8, 300_000
    multiplier = rng.uniform(1, 4, channels) * most / end / 4
    counts = np.zeros(channels, np.int64)
    chosen = Requantization(
        gain, rng.integers(-gain * end // 8, gain * end // 8, channels).astype(np.int32),
        (multiplier / gain).astype(np.float32), low, low + most, counts, counts,
    )  # fmt: skip
    ends = np.full(channels, end)
    found = fixed_point(chosen, -ends, ends)
    acc = np.arange(-end, end + 1)[:, None]
    expected = chosen.levels(gain * acc) - low
    levels = np.clip((acc * found.multiplier + found.offset) >> found.shift, 0, most)
    for channel, begins, otherwise in found.changes.tolist():
        levels[:, channel] += (acc[:, 0] >= begins).astype(int) - (acc[:, 0] >= otherwise)
    np.testing.assert_array_equal(levels, expected)
    reached = (acc[:, :, None] >= found.thresholds).sum(2) if most == 3 else expected
    np.testing.assert_array_equal(reached, expected)
    assert len(found.changes) > 0 if (most, gain) == (255, 1) else most == 255 or not len(found.changes)
    assert found.multiplier.min() >= 0
    assert found.multiplier.max() < 1 << 31


def test_levels_of_the_steepest_slopes_are_those_of_the_integer_graph():
    """A multiplier of a level for each accumulator and more, as after a BatchNorm with a huge gamma."""
    counts, acc = np.zeros(3, np.int64), np.arange(-50, 51)[:, None]
    slopes = np.array([1.0, 2.0**31, 1e12], np.float32)
    chosen = Requantization(1, np.array([0, 3, -7], np.int32), slopes, 0, 255, counts, counts)
    found = fixed_point(chosen, np.full(3, -50), np.full(3, 50))
    levels = np.clip((acc * found.multiplier + found.offset) >> found.shift, 0, 255)
    for channel, begins, otherwise in found.changes.tolist():
        levels[:, channel] += (acc[:, 0] >= begins).astype(int) - (acc[:, 0] >= otherwise)
    np.testing.assert_array_equal(levels, chosen.levels(acc))
    assert 0 <= found.multiplier.min() <= found.multiplier.max() < 1 << 31


def unpack_rows(packed: NDArray[np.uint8], bits: int, n: int) -> NDArray[np.int8]:
    """The inverse of `pack_rows`, by the arithmetic of the C code: [count, n]."""
    if bits == 8:
        return packed.view(np.int8)
    if bits == 2:
        rest = (packed[:, None].astype(np.int64) * 3 ** np.arange(5)[:, None]) & 255
        return (((rest * 3) >> 8) - 1).reshape(len(packed), -1)[:, :n].astype(np.int8)
    codes, start, up = np.zeros((len(packed), n), np.int64), 0, 0
    for part in (4, 2, 1):
        if bits & part:
            size = -(-n * part // 8)
            part_bytes = packed[:, start : start + size].astype(np.int64)
            planes = (part_bytes[:, None] >> (part * np.arange(8 // part))[:, None]) & ((1 << part) - 1)
            codes |= planes.reshape(len(packed), -1)[:, :n] << up
            start, up = start + size, up + part
    return (codes * 2 - 1 if bits == 1 else codes - (1 << (bits - 1)) + 1).astype(np.int8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [1, 7, 27, 80])
def test_rows_are_packed_at_their_bit_width(bits, n):
    most = max(1, (1 << (bits - 1)) - 1)
    rows = np.random.default_rng(bits).integers(-most, most + 1, (5, n)).astype(np.int8)
    rows[0], rows[1] = most, -most
    if bits == 1:
        rows[rows == 0] = 1
    packed = pack_rows(rows, bits)
    np.testing.assert_array_equal(unpack_rows(packed, bits, n), rows)
    exact = n / 5 if bits == 2 else n * bits / 8
    assert packed.shape[1] < exact + bits.bit_count()


def test_the_command_writes_a_source_and_a_header(tmp_path):
    arguments = ["export", str(HUB / "quant_cnv_w2a2.mnist"), "-o", str(tmp_path / "my-net 2.c"), "--format", "c"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.exception
    assert f"{tmp_path / 'my-net 2.c'} and my-net 2.h: quant_cnv_w2a2.mnist as c, " in done.output
    header = (tmp_path / "my-net 2.h").read_text()
    assert "void my_net_2_run(const uint8_t image[MY_NET_2_IMAGE_BYTES], int32_t scores[MY_NET_2_CLASSES]);" in header
    assert '#define MY_NET_2_LABELS {"0", "1", "2", "3", "4", "5", "6", "7", "8", "9"}' in header
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my-net 2.c", "my-net 2.h"]
    for path in tmp_path.iterdir():
        with pytest.raises(DeployError, match=r"C source of cnvzoo, to be compiled .*export it with format 'integer'"):
            cnvzoo.deploy.load(path)


def test_what_cannot_be_written_is_refused(tmp_path):
    checkpoint = HUB / "quant_cnv_w2a2.mnist"
    with pytest.raises(DeployError, match=r"net\.onnx: format 'c' writes a source and a header .* ends in \.c"):
        cnvzoo.export(checkpoint, tmp_path / "net.onnx", format="c")
    with pytest.raises(DeployError, match=r"the name of a C file cannot have quotes"):
        cnvzoo.export(checkpoint, tmp_path / 'a"b.c', format="c")
    with pytest.raises(DeployError, match="is for quantized models"):
        cnvzoo.export(HUB / "cnv.mnist", tmp_path / "net.c", format="c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("label", "literal"), [('a"b', r'"a\042b"'), ("é??/", r'"\303\251\077\077/"'), ("a\\", r'"a\134"')]
)
def test_labels_are_escaped(make_net, tmp_path, label, literal):
    classes = [label, *map(str, range(9))]
    cnvzoo.export(make_net(2, 2), tmp_path / "net.c", format="c", dataset="cifar10", classes=classes, name="a */ b")
    header = (tmp_path / "net.h").read_text()
    assert f"NET_LABELS {{{literal}," in header
    assert "/* cnvzoo: C source of a * / b, with" in header


@needs_compiler
def test_a_layer_may_have_the_name_of_a_function_of_the_source(tmp_path):
    """The table of a rounding `round` was called as the function that rounds."""
    image = Image("image", (), 1, 4)
    counts = np.zeros(1, np.int64)
    steps = Requantization(1, np.zeros(1, np.int32), np.full(1, 0.1, np.float32), 0, 25, counts, counts)
    head = Head("score", (1,), np.ones((2, 16), np.int8), 8, 1, None, None, 1.0)
    net = IntegerNet((image, Rounding("round", (0,), steps), head))
    assert_equals_reference(net, images_for(net, 8), tmp_path)
