"""The site: it builds without warnings, and works in Chromium, opened as files, on a desktop's screen and a phone's."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from pydantic import BaseModel

import cnvzoo
import cnvzoo.deploy

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parents[1]
DESKTOP, PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}
WIDTHS = ["w2a2", "w4a4", "w8a8"]
API = ("cnvzoo", "cnvzoo.data", "cnvzoo.training", "cnvzoo.deploy", "cnvzoo_runtime")


@pytest.fixture(scope="session")
def packages() -> None:
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason=f"building the site needs {package}: pip install --group docs")


@pytest.fixture(scope="session")
def site(packages) -> Path:
    """The folder of the site, built from the files as they are now, once for all workers of a run of pytest."""
    folder = ROOT / "build" / "site"
    folder.parent.mkdir(exist_ok=True)
    this_run, built_by = os.environ.get("PYTEST_XDIST_TESTRUNUID", ""), folder.with_name("tested-by")
    with FileLock(folder.with_name("tested.lock")):
        if this_run and built_by.is_file() and built_by.read_text() == this_run:
            return folder
        command = [sys.executable, str(ROOT / "docs" / "site" / "build.py")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        built_by.write_text(this_run)
    return folder


@pytest.fixture(scope="module")
def chromium(site) -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install --group test")
    if not (site / "_static" / "vendor" / "ort.wasm.min.js").is_file():
        pytest.skip("the site was built without its npm packages: npm or the network was missing")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium: apt install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(site, chromium) -> Iterator[Callable[..., Page]]:
    """`visit(page, screen)`: the page in Chromium. A message on its console or a request elsewhere fails the test."""
    problems: list[str] = []
    contexts = []

    def go(name: str, screen: dict[str, int] = DESKTOP) -> Page:
        context = chromium.new_context(viewport=screen, has_touch=screen is PHONE)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else problems.append(r.url))
        page.goto((site / name).as_uri())
        return page

    yield go
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def build(packages, monkeypatch, tmp_path) -> ModuleType:
    """docs/site/build.py with a package-lock.json of no packages, on a machine without any program."""
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "docs" / "site" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", tmp_path / "site")
    (tmp_path / "site" / "node_modules").mkdir(parents=True)
    (tmp_path / "site" / "package-lock.json").write_text("{}")
    (tmp_path / "programs").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))
    return module


def test_without_npm_a_line_says_what_will_not_run(build, capsys):
    assert build.fetch_packages() is False
    assert capsys.readouterr().out == (
        "npm is not installed: the table of the zoo will not sort, and the page in the browser will not run. "
        "On Debian and Ubuntu, 'apt install npm' installs it\n"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="the program is a script of a POSIX shell")
def test_npm_is_asked_again_only_after_a_failure_or_for_another_lock_file(build, tmp_path, capsys):
    npm = tmp_path / "programs" / "npm"
    for status, lock, expected in ((1, "{}", False), (0, "{}", True), (1, "{}", True), (1, "{ }", False)):
        npm.write_text(f"#!/bin/sh\nexit {status}\n")
        npm.chmod(0o755)
        (tmp_path / "site" / "package-lock.json").write_text(lock)
        assert build.fetch_packages() is expected
    assert capsys.readouterr().out.count("npm failed, see above") == 2


@pytest.mark.parametrize("module", API)
def test_every_public_name_is_on_the_page_of_the_api(site, module):
    page = (site / "docs" / "api.html").read_text(encoding="utf-8")
    described = {name.rpartition(".")[2] for name in re.findall(r'id="((?:cnvzoo|cnvzoo_runtime)\.[\w.]+)"', page)}
    assert set(importlib.import_module(module).__all__) <= described


def test_every_field_of_a_public_type_is_described_on_the_page_of_the_api(site):
    page = (site / "docs" / "api.html").read_text(encoding="utf-8")
    described = set(re.findall(r"\w+", " ".join(re.findall("<strong>([^<]*)</strong>", page))))
    public = [getattr(module, name) for module in map(importlib.import_module, API) for name in module.__all__]
    types = [value for value in public if isinstance(value, type) and issubclass(value, BaseModel)]
    assert {"Augmentation", "CheckpointConfig", "Recipe"} <= {value.__name__ for value in types}
    for value in types:
        assert value.model_fields.keys() <= described, (value, value.model_fields.keys() - described)


def test_checkpoints_that_were_not_measured_with_one_image_have_no_latency(packages, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    zoo_page = importlib.import_module("zoo_page")
    kept = json.loads((ROOT / "benchmarks" / "speed" / "infer.json").read_text())
    assert zoo_page.latencies(ROOT)
    for contender in kept["contenders"]:
        del contender["milliseconds"]["1"]
    (file := tmp_path / "benchmarks" / "speed" / "infer.json").parent.mkdir(parents=True)
    file.write_text(json.dumps(kept))
    assert zoo_page.latencies(tmp_path) == {}


def test_pages_load_nothing_from_other_hosts(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = re.findall(r'<(?:script|img|link|iframe)\b[^>]*(?:src|href)="(https?:[^"]*)"', page.read_text("utf-8"))
        assert loaded == [], page


def test_every_row_leads_to_its_card_recipe_record_and_line_of_python(site):
    page = (site / "docs" / "zoo.html").read_text(encoding="utf-8")
    rows = re.findall(r"<tr.*?</tr>", page.partition("<tbody>")[2], re.DOTALL)
    assert len(rows) == len(cnvzoo.list_checkpoints())
    for row, info in zip(rows, cnvzoo.list_checkpoints(), strict=True):
        targets = re.findall(r'href="([^"#]+)', row)
        assert all((site / "docs" / target).is_file() for target in targets)
        kinds = [target.rpartition(".")[2] for target in targets]
        assert kinds == ["html", "yaml", "json"], info["name"]
        plain = re.sub(r"<[^>]+>", "", row).replace("&quot;", '"')
        assert f'cnvzoo.create_model("{info["name"]}", pretrained=True)' in plain


def names(page: Page) -> list[str]:
    """The checkpoints that the table shows, in order."""
    return page.evaluate("zoo.table.getData('active').map((row) => row.name)")


def test_the_table_sorts_and_filters_and_the_plot_follows(visit):
    page = visit("docs/zoo.html")
    everything = cnvzoo.list_checkpoints()
    assert names(page) == [info["name"] for info in everything]
    heading = page.locator(".tabulator-col", has_text="bytes")
    for descending in (False, True):
        heading.locator(".tabulator-col-title").click()
        ordered = sorted(everything, key=lambda info: info["bytes"], reverse=descending)
        assert names(page) == [info["name"] for info in ordered]
        shown = page.locator(".tabulator-row").first.inner_text()
        assert ordered[0]["name"] in shown
    page.locator(".tabulator-col", has_text="checkpoint").locator("input").press_sequentially(".cifar10")
    page.locator(".tabulator-col", has_text="accuracy").locator("input").press_sequentially("91.5")
    heading.locator("input").press_sequentially("1900000")
    wanted = cnvzoo.list_checkpoints("*.cifar10", min_accuracy=91.5, max_bytes=1_900_000)
    page.wait_for_function(f"zoo.table.getDataCount('active') == {len(wanted)}")
    assert sorted(names(page)) == [info["name"] for info in wanted]
    points = page.evaluate("zoo.plot.data.datasets.flatMap((each) => each.data.map((point) => [point.name, point.x]))")
    assert sorted(points) == [[info["name"], info["bytes"]] for info in wanted]


def test_the_plot_says_what_a_point_is(visit):
    page = visit("docs/zoo.html")
    page.locator(".zoo-plot").scroll_into_view_if_needed()
    box = page.locator(".zoo-plot canvas").bounding_box()
    assert box is not None
    dot = page.evaluate("(({ x, y }) => ({ x, y }))(zoo.plot.getDatasetMeta(0).data[0])")
    page.mouse.move(box["x"] + dot["x"], box["y"] + dot["y"])
    page.wait_for_function("zoo.plot.tooltip.opacity > 0")
    first = next(info for info in cnvzoo.list_checkpoints())
    (line,) = page.evaluate("zoo.plot.tooltip.body[0].lines")
    assert line == f"{first['name']}: {first['accuracy']:.2f} %, {first['bytes']:,} bytes"


def results(page: Page) -> dict[str, str]:
    """The classes that the page shows, by the name of the checkpoint, once every network has run."""
    page.wait_for_function("[...document.querySelectorAll('.time')].every((time) => time.textContent)", timeout=60_000)
    cards = page.locator("#browser .result").all()
    return {str(card.get_attribute("data-model")): card.locator(".best").inner_text() for card in cards}


def deployed(site: Path, name: str) -> cnvzoo.deploy.DeployedModel:
    """The exported file that the site holds, in ONNX Runtime."""
    return cnvzoo.deploy.load(site.with_name("site-extra") / "models" / f"{name}.onnx", threads=1)


def click(page: Page, corners: list[tuple[float, float]]) -> None:
    """Draw lines with the mouse."""
    page.mouse.move(*corners[0])
    page.mouse.down()
    for corner in corners[1:]:
        page.mouse.move(*corner, steps=6)
    page.mouse.up()


def touch(page: Page, corners: list[tuple[float, float]]) -> None:
    """Draw lines with a finger."""
    finger = page.context.new_cdp_session(page)
    for kind, (x, y) in zip(("touchStart", "touchMove", "touchMove"), corners, strict=True):
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
    finger.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


@pytest.mark.parametrize("screen", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_drawn_seven_is_read_as_seven_at_every_width(visit, screen):
    page = visit("docs/browser.html", screen)
    pad = page.locator("canvas.draw")
    pad.scroll_into_view_if_needed()
    box = pad.bounding_box()
    assert box is not None
    seven = ((0.25, 0.2), (0.7, 0.2), (0.4, 0.8))
    corners = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in seven]
    (touch if screen is PHONE else click)(page, corners)
    assert results(page) == {f"quant_cnv_{width}.mnist": "7" for width in WIDTHS}


@pytest.mark.parametrize("page", ["README.html", "docs/zoo.html", "docs/browser.html", "docs/api.html"])
def test_no_page_is_wider_than_a_phone(visit, page):
    assert visit(page, PHONE).evaluate("document.documentElement.scrollWidth") == PHONE["width"]


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist", "cifar10"])
def test_scores_of_test_images_are_those_of_the_runner(visit, site, real_data, dataset):
    data = cnvzoo.load_dataset(dataset, root=real_data(dataset))
    images = np.asarray(data.test_images[:10])
    page = visit("docs/browser.html")
    for width in WIDTHS:
        name = f"quant_cnv_{width}.{dataset}"
        model = deployed(site, name)
        margin = (model.metadata.size - images.shape[1]) // 2
        padded = np.pad(images.transpose(0, 3, 1, 2), ((0, 0), (0, 0), (margin, margin), (margin, margin)))
        call = "async ([name, pixels]) => (await zoo.scores(name, pixels)).accumulators"
        scored = [page.evaluate(call, [name, image.ravel().tolist()]) for image in padded]
        np.testing.assert_array_equal(scored, model.accumulators(padded))


def test_a_chosen_picture_gets_the_class_and_probability_of_the_runner(visit, site, real_data):
    image = Image.fromarray(np.asarray(cnvzoo.load_dataset("cifar10", root=real_data("cifar10")).test_images[3]))
    image.save(file := BytesIO(), "PNG")
    page = visit("docs/browser.html")
    page.locator("#browser select").select_option("cifar10")
    page.locator("#browser input[type=file]").set_input_files(
        {"name": "photo.png", "mimeType": "image/png", "buffer": file.getvalue()}
    )
    results(page)
    bars = page.locator('[data-model="quant_cnv_w2a2.cifar10"] .bar').all()
    shown = [(bar.locator("span").first.inner_text(), bar.locator("span").last.inner_text()) for bar in bars]
    guesses = deployed(site, "quant_cnv_w2a2.cifar10").predict(image, top=3)
    assert shown == [(guess.label, f"{100 * guess.probability:.1f} %") for guess in guesses]


def test_a_file_that_is_no_picture_is_refused_in_words(visit):
    page = visit("docs/browser.html")
    page.locator("#browser input[type=file]").set_input_files(
        {"name": "notes.png", "mimeType": "image/png", "buffer": b"no picture"}
    )
    page.wait_for_function("document.querySelector('#browser .status').textContent")
    assert page.locator("#browser .status").inner_text() == "notes.png is not a picture that this browser reads"


def test_a_file_that_could_not_be_loaded_is_loaded_again(visit):
    page = visit("docs/browser.html")
    page.evaluate(
        """() => {
          const append = document.head.append;
          document.head.append = (element) => {
            document.head.append = append;
            setTimeout(() => element.onerror());
          };
        }"""
    )
    call = "async () => (await zoo.scores('quant_cnv_w2a2.mnist', new Array(32 * 32).fill(0))).accumulators.length"
    with pytest.raises(Exception, match=r"vendor/ort-wasm-simd-threaded\.mjs\.js cannot be loaded"):
        page.evaluate(call)
    assert page.evaluate(call) == 10
