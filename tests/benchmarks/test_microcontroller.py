"""The figures of the C source on a microcontroller: the page shows those that were measured, of today's checkpoints."""

from __future__ import annotations

import json
import sys
from typing import Any

import microcontroller
import pytest
from workbench import SPEED

import cnvzoo
from cnvzoo.files import sha256_of


@pytest.fixture
def kept() -> dict[str, Any]:
    return json.loads((SPEED / "microcontroller.json").read_text())


def test_the_page_shows_the_figures(kept):
    page = microcontroller.PAGE.read_text()
    shown = page.partition(microcontroller.START)[2].partition(microcontroller.END)[0].strip()
    assert shown == microcontroller.table(kept).strip()


def test_the_figures_are_of_the_published_checkpoints(kept):
    remedy = "run python benchmarks/speed/microcontroller.py --keep"
    assert [network["name"] for network in kept["networks"]] == microcontroller.published(), remedy
    for network in kept["networks"]:
        weights = microcontroller.ROOT / "hub" / network["name"] / "model.safetensors"
        assert network["sha256"] == sha256_of(weights), remedy


def test_figures_of_one_checkpoint_are_kept_beside_those_of_the_others(kept, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(microcontroller, "HERE", tmp_path)
    monkeypatch.setattr(microcontroller.shared, "HERE", tmp_path)
    monkeypatch.setattr(microcontroller, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(microcontroller.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(microcontroller, "_output", lambda compiler, option: f"{compiler} 12\n")
    first, second = (network["name"] for network in kept["networks"][:2])
    old = {"compilers": ["gcc 12", "arm-none-eabi-gcc 12"]}
    old["networks"] = [kept["networks"][0], kept["networks"][1], kept["networks"][0] | {"name": "quant_gone.mnist"}]
    (tmp_path / "microcontroller.json").write_text(json.dumps(old))
    microcontroller.PAGE.write_text(f"before\n{microcontroller.START}\nold\n{microcontroller.END}\nafter\n")
    new = kept["networks"][1] | {"flash": 123_456}
    monkeypatch.setattr(microcontroller, "measured", lambda name: new | {"name": name})
    assert microcontroller.main([second, "--keep"]) == 0
    networks = json.loads((tmp_path / "microcontroller.json").read_text())["networks"]
    assert [(network["name"], network["flash"]) for network in networks] == [
        (first, kept["networks"][0]["flash"]), (second, 123_456),
    ]  # fmt: skip
    page = microcontroller.PAGE.read_text()
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert f"| {second} | 123,456 |" in page

    monkeypatch.setattr(microcontroller, "_output", lambda compiler, option: f"{compiler} 13\n")
    with pytest.raises(SystemExit):
        microcontroller.main([second, "--keep"])
    assert "measured with gcc 12, arm-none-eabi-gcc 12: name none" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "problem"), [("quant_gone.mnist", "quant_gone.mnist"), ("cnv.mnist", "quantized")])
def test_a_checkpoint_that_cannot_be_measured_is_an_error_of_one_line(monkeypatch, capsys, name, problem):
    monkeypatch.setattr(microcontroller.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(microcontroller, "_output", lambda compiler, option: f"{compiler} 12\n")
    assert microcontroller.main([name]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("microcontroller.py: error: ")
    assert problem in line


def test_the_error_of_a_compiler_is_its_last_line_with_a_remedy():
    code = "import sys; sys.exit('one\\nstring.h: No such file or directory\\n')"
    with pytest.raises(
        cnvzoo.CnvzooError, match=r"failed: string\.h: No such file or directory; apt install libnewlib"
    ):
        microcontroller._output(sys.executable, "-c", code)


def test_every_network_has_the_scores_of_onnxruntime_and_fits(kept):
    """A CNV of 2 bits takes at most 380,000 bytes of flash and 70,000 of RAM.

    Of the speed, instructions are bounded and times are not, which depend on the processor: a multiply-accumulate of
    two 8-bit factors takes about three, two to load them and one to multiply and add. ResNet-20's narrow layers take
    more.
    """
    for network in kept["networks"]:
        assert (network["compared"], network["differing"]) == (1000, 0)
        assert network["ram"] + network["stack"] < 70_000
        model = json.loads((microcontroller.ROOT / "hub" / network["name"] / "config.json").read_text())["model"]
        macs = cnvzoo.model_info(**model).macs
        most = 3.3 if network["name"].startswith("quant_cnv") else 3.8
        assert 2 * macs < network["instructions"] < most * macs
    assert all(n["flash"] < 380_000 for n in kept["networks"] if "w2a2" in n["name"])


@pytest.mark.parametrize("text", ["no place", f"keep me\n{microcontroller.START}\n| old |\nkeep me too\n"])
def test_a_page_without_a_place_for_the_table_is_left_as_it_is(kept, tmp_path, monkeypatch, text):
    monkeypatch.setattr(microcontroller, "HERE", tmp_path)
    monkeypatch.setattr(microcontroller, "PAGE", tmp_path / "page.md")
    microcontroller.PAGE.write_text(text)
    with pytest.raises(cnvzoo.CnvzooError, match=r"page\.md: no <!-- begin: .* with <!-- end --> after it: restore it"):
        microcontroller.keep(kept, [])
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
    assert microcontroller.PAGE.read_text() == text


def test_nothing_to_measure_or_to_keep_is_an_error_of_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(microcontroller.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(microcontroller, "_output", lambda compiler, option: f"{compiler} 12\n")
    monkeypatch.setattr(microcontroller, "ROOT", tmp_path)
    monkeypatch.setattr(microcontroller.shared, "HERE", tmp_path)
    for arguments, problem in (
        ([], "no quantized checkpoints in it"),
        (["x", "--keep"], "No such file or directory"),
    ):
        assert microcontroller.main(arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("microcontroller.py: error: ")
        assert problem in line
