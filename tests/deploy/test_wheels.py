"""The two distributions as wheels: cnvzoo-runtime works where only its own wheel and what it requires are installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cnvzoo
import cnvzoo.deploy
from cnvzoo.training import Recipe

ROOT = Path(__file__).resolve().parents[2]


def build(folder: Path, target: str, output: Path) -> Path:
    """The wheel or sdist of the project in `folder`, built without a network."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(output)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = output.iterdir()
    return built


@pytest.fixture(scope="module")
def runtime_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT / "runtime", "wheel", tmp_path_factory.mktemp("runtime"))


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the unpacked wheel of cnvzoo."""
    folder = tmp_path_factory.mktemp("cnvzoo")
    with zipfile.ZipFile(build(ROOT, "wheel", folder / "wheel")) as wheel:
        wheel.extractall(folder / "packages")
    return str(folder / "packages")


def required(names: list[str]) -> Iterator[str]:
    """The names of the packages, and of all that they require."""
    for name in names:
        yield name
        needs = [text for text in distribution(name).requires or [] if "extra ==" not in text]
        yield from required([re.split(r"[^\w.-]", text)[0] for text in needs])


@pytest.fixture(scope="module")
def python(runtime_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheel of the runtime and what it requires, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(runtime_wheel) as wheel:
        wheel.extractall(packages)
        metadata = next(name for name in wheel.namelist() if name.endswith("/METADATA"))
        lines = re.findall(r"^Requires-Dist: (.+)", wheel.read(metadata).decode(), re.MULTILINE)
        needs = [re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line]
    assert sorted(needs) == ["numpy", "onnxruntime", "pillow"]
    for name in set(required(needs)):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    return next(folder.glob("bin/python"))


@pytest.fixture(scope="module")
def exported(make_net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    cnvzoo.export(make_net(2, 2), folder / "m.onnx", dataset="cifar10")
    pixels = np.random.default_rng(0).integers(256, size=(40, 50, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder


def run(python: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, "-I", *arguments], cwd=cwd, capture_output=True, text=True)


COMMAND = "import sys; from cnvzoo_runtime.cli import main; sys.exit(main())"


def test_the_environment_has_no_other_package(python, tmp_path):
    for name in ("torch", "cnvzoo", "onnx", "pydantic", "brevitas"):
        assert "ModuleNotFoundError" in run(python, "-c", f"import {name}", cwd=tmp_path).stderr


def test_the_command_predicts_what_the_library_does(python, exported):
    done = run(python, "-c", COMMAND, "predict", "m.onnx", "photo.png", "--top", "2", "--json", cwd=exported)
    assert done.returncode == 0, done.stderr
    ((best, second),) = cnvzoo.deploy.load(exported / "m.onnx").predict([Image.open(exported / "photo.png")], top=2)
    fields = [{"label": g.label, "index": g.index, "probability": g.probability} for g in (best, second)]
    assert json.loads(done.stdout) == [{"image": "photo.png", "predictions": fields}]
    done = run(python, "-c", COMMAND, "predict", "m.onnx", "photo.png", "photo.png", "--top", "1", cwd=exported)
    assert done.stdout == f"photo.png: {best.label} {best.probability:.1%}\n" * 2


def test_from_a_folder_of_real_images_to_a_file_that_runs_without_torch(python, real_data, tmp_path, uncompiled):
    """Five classes of CIFAR-100, fine-tuned at 2 bits."""
    data, kept = cnvzoo.load_dataset("cifar100", root=real_data("cifar100")), ("apple", "bus", "castle", "lion", "sea")
    for split, images, labels in (
        ("train", data.train_images, data.train_labels), ("test", data.test_images, data.test_labels),
    ):  # fmt: skip
        for name in kept:
            folder = tmp_path / "five" / split / name
            folder.mkdir(parents=True)
            chosen = images[labels == data.info.classes.index(name)][: 120 if split == "train" else 40]
            for n, pixels in enumerate(chosen.numpy()):
                Image.fromarray(pixels).save(folder / f"{n:03}.png")
    recipe = Recipe.model_validate(
        {"name": "five", "model": "quant_cnv", "w_bits": 2, "a_bits": 2, "dataset": str(tmp_path / "five"), "epochs": 3,
         "batch_size": 50, "optimizer": {"lr": 0.05}, "augmentation": {"flip": True}, "start": "quant_cnv_w2a2.cifar10"}
    )  # fmt: skip
    result = cnvzoo.train(recipe, device="cpu", quiet=True)
    cnvzoo.save_checkpoint(result, tmp_path / "five_classes")
    cnvzoo.export(tmp_path / "five_classes", tmp_path / "five.onnx")
    files = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "five" / "test").glob("*/*.png"))
    done = run(python, "-c", COMMAND, "predict", "five.onnx", *files, "--top", "1", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [row["predictions"][0]["label"] for row in json.loads(done.stdout)]
    right = sum(label == Path(file).parent.name for label, file in zip(found, files, strict=True))
    scored = cnvzoo.evaluate(cnvzoo.create_model(tmp_path / "five_classes", pretrained=True), tmp_path / "five")
    assert (len(files), right) == (200, scored.correct)
    assert scored.correct == result.record.correct > 140  # 70 %; chance is 20 %


def test_the_command_shows_the_metadata_of_a_file(python, exported):
    done = run(python, "-c", COMMAND, "info", "m.onnx", cwd=exported)
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert rows["name"] == "quant_cnv.cifar10"
    assert rows["input"] == "32x32 colour, images of 32x32"
    assert rows["bits"] == "2 of weights, 2 of activations"
    assert rows["bytes"] == f"{(exported / 'm.onnx').stat().st_size:,}"
    done = run(python, "-c", COMMAND, "info", "m.onnx", "--json", cwd=exported)
    assert json.loads(done.stdout)["classes"][3] == "cat"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "m.onnx", "none.png"], "none.png: cannot be read as an image: No such file or directory"),
        (["predict", "m.onnx", "m.onnx"], "m.onnx: cannot be read as an image: cannot identify image file 'm.onnx'"),
        (["info", "none.onnx"], "none.onnx: cannot be read: No such file or directory"),
        (["info", "photo.png"], "photo.png: not an ONNX file: a value is cut off"),
    ],
)
def test_errors_of_the_command_are_one_line(python, exported, arguments, message):
    done = run(python, "-c", COMMAND, *arguments, cwd=exported)
    assert (done.returncode, done.stderr) == (1, f"error: {message}\n")


def test_the_python_block_of_its_readme_runs(python, exported):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "runtime" / "README.md").read_text(), re.DOTALL)
    done = run(python, "-c", block, cwd=exported)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3


def test_both_packages_have_one_version_and_licence(runtime_wheel):
    projects = [(ROOT / folder / "pyproject.toml").read_text() for folder in (".", "runtime")]
    for key in ("version", "requires-python"):
        values = {re.findall(rf'^{key} = "(.*?)"', project, re.MULTILINE)[0] for project in projects}
        assert len(values) == 1, key
    version = re.findall(r'^version = "(.*?)"', projects[0], re.MULTILINE)[0]
    assert f'"cnvzoo-runtime=={version}"' in projects[0]
    assert (ROOT / "LICENSE").read_bytes() == (ROOT / "runtime" / "LICENSE").read_bytes()
    with zipfile.ZipFile(runtime_wheel) as wheel:
        assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
        assert "cnvzoo_runtime/py.typed" in wheel.namelist()


@pytest.mark.parametrize("folder", [".", "runtime"])
def test_the_description_for_a_package_index_has_no_link_to_a_file(folder):
    command = [sys.executable, "-m", "hatchling", "metadata", "readme"]
    done = subprocess.run(command, cwd=ROOT / folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"\]\((?!https://)[^)]*\)", done.stdout) == []
    readme = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    for title in re.findall(r"^#+ .*$", readme, re.MULTILINE):
        assert title in done.stdout
    for path in re.findall(r"\]\(([^):]+)\)", readme):
        assert f"`{path}`" in done.stdout


def test_recipes_are_read_by_name_from_an_unpacked_wheel(unpacked):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import cnvzoo; assert sys.argv[1] in cnvzoo.__file__;"
        "print(*cnvzoo.list_recipes()); print(*(cnvzoo.load_recipe(n).fingerprint() for n in cnvzoo.list_recipes()))"
    )
    done = subprocess.run([sys.executable, "-c", code, unpacked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names, fingerprints = (line.split() for line in done.stdout.splitlines())
    configs = ROOT / "benchmarks" / "configs"
    assert names == sorted(path.stem for path in configs.glob("[!_]*.yaml"))
    assert fingerprints == [cnvzoo.load_recipe(configs / f"{name}.yaml").fingerprint() for name in names]


def test_names_of_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cnvzoo.list_recipes("mnist_c*") == ["mnist_cnv"]
    assert cnvzoo.load_recipe("mnist_cnv").name == "mnist_cnv"
    with pytest.raises(cnvzoo.CnvzooError, match="no file and no recipe 'mnist_cvn': did you mean 'mnist_cnv'"):
        cnvzoo.load_recipe("mnist_cvn")
    with pytest.raises(cnvzoo.CnvzooError, match=r"^mnist_cnv.yaml: no such recipe"):
        cnvzoo.load_recipe("mnist_cnv.yaml")


def test_the_sdist_has_the_recipes_and_no_checkpoints(tmp_path):
    with tarfile.open(build(ROOT, "sdist", tmp_path / "sdist")) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"benchmarks/configs/mnist_cnv.yaml", "src/cnvzoo/zoo.py", "LICENSE", "hatch_build.py"} <= names
    assert not [name for name in names if name.startswith(("hub/", "benchmarks/results/", "runs/"))]


def test_a_default_location_that_cannot_be_reached_is_one_line_with_remedies(unpacked, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.argv[1:] = ['eval', 'cnv.mnist'];"
        "from cnvzoo.cli import main; main()"
    )
    env = {key: value for key, value in os.environ.items() if key != "CNVZOO_HUB" and not key.lower().endswith("proxy")}
    env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code, unpacked], capture_output=True, text=True, env=env)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: cnv.mnist cannot be fetched from hf://cnvzoo, the default location of checkpoints")
    for remedy in ("HF_ENDPOINT", "CNVZOO_HUB", "path of the checkpoint's folder"):
        assert remedy in line
