"""Every example runs as its first lines say, with a plausible result."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnvzoo.models import model_names, unregister_model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """`run(name, *arguments)`: run the example as a script in an empty folder, and return what it prints."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        before = model_names()
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        finally:
            for registered in set(model_names()).difference(before):
                unregister_model(registered)
        return capsys.readouterr().out

    return call


def percents(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+) ?%", text)]


def test_every_example_is_tested_here():
    tested = set(re.findall(r"\w+\.(?:py|ipynb)", Path(__file__).read_text()))
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} <= tested


def test_train_quantized_learns(run, small_datasets, uncompiled):
    small_datasets(train=1000, test=100)
    out = run("train_quantized.py", "--steps", 8, "--holdout", 100)
    trained, started, recovered = percents(out)
    assert trained > 50  # of ten classes that are easy to tell apart
    assert recovered > 50
    assert recovered >= started


def test_train_quantized_on_real_digits(run, real_data, monkeypatch, uncompiled):
    monkeypatch.setenv("CNVZOO_DATA", str(real_data("mnist")))
    trained, _, recovered = percents(run("train_quantized.py", "--steps", 18, "--holdout", 300))
    assert trained > 40  # after 18 batches of 64 images
    assert recovered > 80


def test_classify_image(run, make_checkpoint, tmp_path):
    folder = make_checkpoint(tmp_path / "hub", "quant_cnv", "cifar10", w_bits=2, a_bits=2)
    for name, shape in (("grey.png", (28, 28)), ("photo.jpg", (50, 40, 3))):
        Image.fromarray(np.full(shape, 128, dtype=np.uint8)).save(tmp_path / name)
    lines = run("classify_image.py", folder, "grey.png", "photo.jpg").splitlines()
    assert [line.split(":")[0] for line in lines] == ["grey.png", "photo.jpg"]
    assert all(10 <= percents(line)[0] <= 100 for line in lines)  # the most probable of ten classes


def test_own_model(run, small_datasets, uncompiled):
    small_datasets(train=2000)
    out = run("own_model.py", "--epochs", 3, "--holdout", 300)
    # parameters 4*4*64 + 2*64, 9*64*64 + 2*64, 64*10 + 10; MACs 49 positions of 4*4*64 and 9*64*64, then 64*10
    assert "38,794 parameters, 1,857,152 multiply-accumulates" in out
    assert percents(out)[-1] > 50
    assert "of 300 held-out images" in out


def test_own_model_is_counted_for_the_dataset(run, small_datasets, uncompiled):
    small_datasets(train=400)
    out = run("own_model.py", "--dataset", "cifar100", "--holdout", 100)
    # parameters 3*4*4*64 + 2*64, 9*64*64 + 2*64, 64*100 + 100; MACs 64 positions of 3*4*4*64 and 9*64*64, then 64*100
    assert "46,692 parameters, 2,562,304 multiply-accumulates" in out


def test_the_model_of_an_example_is_not_registered_afterwards():
    assert "patchnet" not in model_names()


def test_tour_is_kept_without_outputs():
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_tour(tmp_path, uncompiled):
    nbformat, nbclient = (
        pytest.importorskip(name, reason=f"needs {name}: pip install --group test") for name in ("nbformat", "nbclient")
    )
    for package in ("ipykernel", "matplotlib"):
        pytest.importorskip(package, reason=f"needs {package}: pip install --group dev")
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert re.findall(r"^\d bits: (\w+)", printed, re.MULTILINE) == ["7", "7", "7"]
    (tuned,) = re.findall(r"^([\d.]+) % of 60 test images", printed, re.MULTILINE)
    assert float(tuned) > 80  # of three classes
    (agreeing,) = re.findall(r"^(\d+) of 60 test images get the same class", printed, re.MULTILINE)
    assert int(agreeing) >= 59
    sizes = [
        int(size.replace(",", "")) for size in re.findall(r"^ *(?:float|\d): +([\d,]+) bytes", printed, re.MULTILINE)
    ]
    assert len(sizes) == 4
    assert sizes == sorted(sizes, reverse=True)
