"""cnvzoo-runtime: it works without torch, and refuses unsuitable files and images with clear errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from typing import cast

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

import cnvzoo
import cnvzoo.deploy
from cnvzoo.data import dataset_info
from cnvzoo.deploy import DeployError
from cnvzoo_runtime import graphs
from cnvzoo_runtime.cli import main
from cnvzoo_runtime.images import ImageError
from cnvzoo_runtime.onnx_file import DATA_LOCATION, EXTERNAL_DATA, MESSAGES, read_properties

_WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchvision", "brevitas", "onnx", "pydantic", "typer", "safetensors"}:
            raise ImportError(f"{name} is not needed here")
sys.meta_path.insert(0, Refuse())
import cnvzoo.deploy, numpy
model = cnvzoo.deploy.load(sys.argv[1], threads=1)
predictions = model.predict([numpy.zeros((40, 50, 3), numpy.uint8)], top=2)
print(len(predictions[0]), predictions[0][0].label)
"""


@pytest.fixture(scope="module")
def exported(make_net, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "m.onnx"
    cnvzoo.export(make_net(2, 2), path, dataset="cifar10")
    return path


def test_exported_files_run_without_torch(exported):
    done = subprocess.run([sys.executable, "-c", _WITHOUT_TORCH, str(exported)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, label = done.stdout.split()
    assert count == "2"
    assert label in dataset_info("cifar10").classes


def test_predict_is_the_softmax_of_the_logits(exported):
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(3, 32, 32, 3)).astype(np.uint8)
    model = cnvzoo.deploy.load(exported, threads=1)
    expected = torch.from_numpy(model.logits(images.transpose(0, 3, 1, 2))).softmax(1)
    for row, predictions in zip(expected, model.predict(list(images), top=10), strict=True):
        np.testing.assert_allclose([g.probability for g in predictions], [row[g.index] for g in predictions], rtol=1e-5)
        assert [g.probability for g in predictions] == sorted((g.probability for g in predictions), reverse=True)
        assert predictions[0].label == dataset_info("cifar10").classes[predictions[0].index]
    as_list = model.predict([Image.fromarray(image) for image in images], top=10)
    assert as_list == model.predict(list(images), top=10)
    assert model.predict([]) == []


@pytest.mark.parametrize("threads", ["2", 0, -1, True, 2.0, 5000])
def test_threads_are_a_whole_number_of_at_least_1(exported, threads):
    with pytest.raises(DeployError, match=r"^threads=.*: a whole number, 1 to 4096, or None for one for each core$"):
        cnvzoo.deploy.load(exported, threads=threads)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 32, 32), np.float32), "uint8 array .* got float32"),
        (np.zeros((1, 3, 28, 28), np.uint8), r"\[N, 3, 32, 32\], got shape \[1, 3, 28, 28\]"),
        (np.zeros((3, 32, 32), np.uint8), r"got shape \[3, 32, 32\]"),
        ([[0]], "got list"),
    ],
)
def test_logits_refuses_arrays_of_other_dtypes_and_shapes(exported, images, message):
    with pytest.raises(DeployError, match=message):
        cnvzoo.deploy.load(exported, threads=1).logits(images)


def test_predict_refuses_values_that_are_not_a_list_of_images(exported):
    model = cnvzoo.deploy.load(exported, threads=1)
    with pytest.raises(ImageError, match="got str"):
        model.predict(cast("list[Image.Image]", ["photo.png"]))
    with pytest.raises(ImageError, match="got str"):
        model.predict(cast("Image.Image", "photo.png"))


def test_predict_takes_one_image_or_a_list(exported):
    model, image = cnvzoo.deploy.load(exported, threads=1), Image.new("RGB", (8, 8), (9, 90, 200))
    assert model.predict(image, top=3) == model.predict([image], top=3)[0]
    assert model.predict(np.asarray(image), top=3) == model.predict(image, top=3)
    assert model.predict([]) == []


def test_the_command_prints_file_names_that_are_not_utf8(exported, tmp_path, capsys):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")
    Image.new("RGB", (8, 8)).save(path)
    assert main(["predict", str(exported), path, "--top", "1"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/\\udcff.png: ")


@pytest.mark.parametrize("bad", ["black.png", "none.png"])
def test_the_command_prints_the_json_of_the_images_before_a_bad_one(exported, tmp_path, capsys, bad):
    good, clear = tmp_path / "good.png", Image.new("RGBA", (8, 8))
    Image.new("RGB", (8, 8)).save(good)
    clear.putpixel((0, 0), (0, 0, 0, 255))  # black on nothing, which is refused
    clear.save(tmp_path / "black.png")
    assert main(["predict", str(exported), str(good), str(tmp_path / bad), "--json"]) == 1
    printed = capsys.readouterr()
    assert [row["image"] for row in json.loads(printed.out)] == [str(good)]
    assert printed.err.startswith(f"error: {tmp_path / bad}: ")


@pytest.mark.parametrize("name", ["info", "predict"])
def test_the_command_is_silent_when_nothing_reads_its_output(exported, tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    arguments = [name, str(exported), *([str(tmp_path / "x.png")] if name == "predict" else [])]
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", "import sys; from cnvzoo_runtime.cli import main; sys.exit(main())", *arguments]
    with open(writer, "wb") as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "")


def test_predict_takes_whole_numbers_of_classes_only(exported):
    model, images = cnvzoo.deploy.load(exported, threads=1), [np.zeros((32, 32, 3), np.uint8)]
    assert model.predict(images, top=cast("int", np.int64(2))) == model.predict(images, top=2)
    assert len(model.predict(images, top=99)[0]) == 10
    for top in (0, -1, True, np.bool_(True), 2.0, None):
        with pytest.raises(DeployError, match=r"top=.*a whole number of at least 1"):
            model.predict(images, top=cast("int", top))


def _rewrite(path, target, change):
    model = onnx.load(path)
    change(model)
    onnx.save(model, target)
    return target


def _with_metadata(**changes):
    def change(model):
        entry = model.metadata_props[0]
        entry.value = json.dumps(json.loads(entry.value) | changes)

    return change


def _without(key):
    def change(model):
        entry = model.metadata_props[0]
        values = json.loads(entry.value)
        del values[key]
        entry.value = json.dumps(values)

    return change


def _with_external_data(model):
    tensor = model.graph.initializer[-1]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/hostname")


def _without_input(model):
    graph = model.graph
    for part in (graph.input, graph.output, graph.node, graph.initializer):
        del part[:]
    value = helper.make_tensor("scores", TensorProto.INT32, [1, 10], [0] * 10)
    graph.node.append(helper.make_node("Constant", [], ["scores"], value=value))
    graph.output.append(helper.make_tensor_value_info("scores", TensorProto.INT32, [1, 10]))


def _for_one_image(model):
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 1


def _with_a_missing_class(model):
    """An eleventh of ten outputs is read when the graph runs."""
    graph = model.graph
    indices = helper.make_tensor("indices", TensorProto.INT64, [10], [*range(9), 10])
    graph.initializer.append(indices)
    name = graph.output[0].name
    next(node for node in graph.node if name in node.output).output[0] = "all"
    graph.node.append(helper.make_node("Gather", ["all", "indices"], [name], axis=1))


def test_a_damaged_graph_is_an_error_of_one_line_when_it_runs(exported, tmp_path):
    path = _rewrite(exported, tmp_path / "other.onnx", _with_a_missing_class)
    model = cnvzoo.deploy.load(path, threads=1)
    with pytest.raises(
        DeployError, match=r"^[^\n]*other\.onnx: ONNX Runtime cannot run it: [^\n]*out of data bounds[^\n]*$"
    ):
        model.logits(np.zeros((1, 3, 32, 32), np.uint8))


def test_every_field_of_onnx_that_holds_a_tensor_is_checked():
    """The fields are those that the onnx package has in ModelProto and the messages inside it."""
    named = {name: onnx.__dict__[f"{name}Proto"].DESCRIPTOR for name in MESSAGES if name != "TrainingInfo"}
    named["TrainingInfo"] = onnx.TrainingInfoProto.DESCRIPTOR
    leading, tensor = {"TensorProto"}, onnx.TensorProto.DESCRIPTOR
    for _ in range(10):
        leading |= {
            d.name for d in named.values() if any(f.message_type and f.message_type.name in leading for f in d.fields)
        }
    for name, descriptor in named.items():
        found = {f.number: f.message_type.name for f in descriptor.fields if f.message_type}
        expected = {number: kind.removesuffix("Proto") for number, kind in found.items() if kind in leading}
        assert {number: kind for number, kind in MESSAGES[name].items() if kind != "Entry"} == expected, name
    numbers = {field.name: field.number for field in tensor.fields}
    assert (numbers["external_data"], numbers["data_location"]) == (EXTERNAL_DATA, DATA_LOCATION)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.metadata_props.pop(), "not a file that cnvzoo exported"),
        (_with_metadata(version=9), "version 9, and this cnvzoo reads 1"),
        (_with_metadata(classes=["cat"]), "with 1 classes"),
        (_with_metadata(size=40), "its input is not"),
        (_with_metadata(scale=-1.0), "scale positive"),
        (_with_metadata(format="zip"), "format 'zip' is not one of"),
        (_with_metadata(extra=1), "damaged"),
        (lambda m: setattr(m.metadata_props[0], "value", "{"), "damaged"),
        (lambda m: setattr(m.metadata_props[0], "value", "[" * 200_000), "nested too deep"),
        (lambda m: setattr(m.metadata_props[0], "value", "[]"), "a JSON object is expected"),
        (lambda m: setattr(m.metadata_props[0], "value", " " * 2**20 + "{}"), "1,048,578 characters"),
        (lambda m: m.metadata_props.add(key="cnvzoo", value="{}"), "has 'cnvzoo' twice"),
        (_without("scale"), "'scale' is missing"),
        (_with_metadata(size=32.0), "size 32.0 is not a whole number of pixels"),
        (_with_metadata(size=True, image_size=1), "size True is not a whole number"),
        (_with_metadata(image_size=31), "images of 31 pixels cannot be padded equally to 32"),
        (_with_metadata(classes="airplane"), "classes must be 1 to 10,000 printable names"),
        (_with_metadata(classes=["a\x1b[2J"] * 10), "class 0, .* must be a printable name"),
        (_with_metadata(mean=[0.0, 10**400, 0.0]), "must be finite"),
        (_with_metadata(w_bits=9), "w_bits 9 is not a bit width"),
        (_with_metadata(version=True), "version True"),
        (_with_metadata(mean=[0.5, 0.5, 0.5]), "mean and std must be 0 and 1 in format integer, whose input is pixels"),
        (_without_input, "its graph has no input: export it again"),
        (_with_external_data, "a tensor of it is in another file"),
        (_for_one_image, "not for any number of images"),
    ],
)
def test_a_file_with_invalid_metadata_is_refused(exported, tmp_path, change, message):
    path = _rewrite(exported, tmp_path / "other.onnx", change)
    with pytest.raises(DeployError, match=message):
        cnvzoo.deploy.load(path, threads=1)


def test_a_field_number_that_protobuf_shortens_is_refused():
    """Of a field number, protobuf reads 29 bits: a field may be another one in a runtime than where it was checked."""

    def field(number: int, content: bytes) -> bytes:
        tag, head = number << 3 | 2, bytearray()
        while tag > 0x7F:
            head.append(tag & 0x7F | 0x80)
            tag >>= 7
        return bytes([*head, tag, len(content)]) + content

    entry = onnx.StringStringEntryProto(key="location", value="secret.bin").SerializeToString()
    content = field(7, field(5, field(EXTERNAL_DATA + (1 << 29), entry)))
    with pytest.raises(DeployError, match=r"^m\.onnx: not an ONNX file: a field number is out of range$"):
        read_properties(content, "m.onnx")


def _message(number: int, content: bytes) -> bytes:
    """A field that is a message."""
    size, length = len(content), bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + content


def test_a_file_of_many_empty_messages_is_checked_in_little_memory():
    content = _message(7, _message(1, b"") * 100_000)  # nodes of a graph
    tracemalloc.start()
    try:
        assert read_properties(content, "m.onnx") == {}
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_file_that_is_too_deep_for_protobuf_is_refused():
    content = _message(1, b"")
    for _ in range(33):  # a graph with a node with an attribute with a graph
        content = _message(1, _message(5, _message(6, content)))
    content = _message(7, content)
    with pytest.raises(DeployError, match=r"^m\.onnx: not an ONNX file: its messages are more than 100 deep$"):
        read_properties(content, "m.onnx")


def test_a_file_that_is_too_large_for_protobuf_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "large.onnx"
    path.touch()
    os.truncate(path, 1 << 31)
    with pytest.raises(DeployError) as error:
        cnvzoo.deploy.load(path)
    says = "2,147,483,648 bytes, where an ONNX file has at most 2,147,483,647: export it again"
    assert str(error.value) == f"{path}: {says}"


def test_a_file_that_cnvzoo_did_not_export_is_refused(tmp_path):
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(DeployError, match=r"text.onnx: not an ONNX file"):
        cnvzoo.deploy.load(tmp_path / "text.onnx")
    for name, says in (
        ("none.onnx", "none.onnx: cannot be read: No such file"),
        ("a\0b.onnx", r"a\\x00b.onnx': cannot be read: embedded null byte"),
        ("~no-such-user/m.onnx", "~no-such-user/m.onnx: cannot be read: Could not determine home directory"),
    ):
        with pytest.raises(DeployError, match=says):
            cnvzoo.deploy.load(name if name.startswith("~") else tmp_path / name)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g",
        [value("x", TensorProto.FLOAT, [1])], [value("y", TensorProto.FLOAT, [1])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "f.onnx")
    with pytest.raises(DeployError, match="not a file that cnvzoo exported"):
        cnvzoo.deploy.load(tmp_path / "f.onnx")


@pytest.mark.parametrize(
    ("machine", "flags", "exact"),
    [
        ("x86_64", "flags : avx512f avx512_vnni amx_tile", True),
        ("x86_64", "flags : fma avx2 avx_vnni", True),
        ("x86_64", "flags : fma avx2 avx512f", False),
        ("AMD64", None, False),
        ("aarch64", None, True),
    ],
)
def test_exact_kernels_are_chosen_where_the_fast_ones_may_saturate(monkeypatch, tmp_path, machine, flags, exact):
    """ONNX Runtime's fast kernels on x86 CPUs without VNNI."""
    monkeypatch.setattr(graphs.platform, "machine", lambda: machine)
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(flags)
    assert graphs.sums_products_exactly(tmp_path / "cpuinfo") is exact


def test_exact_kernels_give_the_same_accumulators(exported, noise, monkeypatch):
    images = noise(4).numpy()
    fast = cnvzoo.deploy.load(exported, threads=1).accumulators(images)
    monkeypatch.setattr(graphs, "sums_products_exactly", lambda: False)
    np.testing.assert_array_equal(cnvzoo.deploy.load(exported, threads=1).accumulators(images), fast)
