"""Build the site: `python3 dev.py docs` runs this in the environment of dev.py.

1. npm fetches what the pages run in the browser, in the versions and with the checksums of package-lock.json: Tabulator
   (the table of the zoo), Chart.js (its plot) and ONNX Runtime (the page on which networks classify what one draws).
   Without npm or a network the site is built without them, and a line says so.
2. The published `quant_cnv` checkpoints are exported as integer files.
3. Sphinx writes the pages, with warnings as errors.

Pages that are opened as files may not fetch other files, but may load scripts. So ONNX Runtime's WebAssembly and the
exported files are written as scripts that hold them in base64, the former compressed.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import onnxruntime
from filelock import FileLock
from sphinx.cmd.build import main as sphinx_build

import cnvzoo
import cnvzoo_runtime
from cnvzoo.checkpoints.index import CheckpointInfo, list_checkpoints
from cnvzoo.files import sha256_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DATASETS = ("mnist", "fashion_mnist", "cifar10")  # what the page in the browser is for
# from node_modules to the folder vendor of the site
SCRIPTS = {
    "tabulator-tables/dist/js/tabulator.min.js": "tabulator.min.js",
    "tabulator-tables/dist/css/tabulator_simple.min.css": "tabulator_simple.min.css",
    "tabulator-tables/LICENSE": "tabulator.LICENSE.txt",
    "chart.js/dist/chart.umd.min.js": "chart.umd.min.js",
    "chart.js/LICENSE.md": "chart.LICENSE.txt",
    "onnxruntime-web/dist/ort.wasm.min.js": "ort.wasm.min.js",
}
LICENCES = {"LICENSE": "ort.LICENSE.txt", "ThirdPartyNotices.txt": "ort.ThirdPartyNotices.txt"}  # of ONNX Runtime
FRONT = """<!doctype html>
<meta charset="utf-8">
<meta http-equiv="refresh" content="0; url=README.html">
<link rel="icon" href="_static/icon.svg">
<title>cnvzoo</title>
<a href="README.html">cnvzoo</a>
"""
WEBASSEMBLY = ("ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def main(argv: list[str]) -> int:
    """Build the site and return the exit status. Two builds of one folder wait for each other."""
    parser = argparse.ArgumentParser(prog="dev.py docs", description="Build the site with warnings as errors.")
    parser.add_argument("--to", type=Path, default=ROOT / "build" / "site", help="folder; default build/site")
    build = Path(parser.parse_args(argv).to).resolve()
    extra = build.with_name(f"{build.name}-extra")  # what the pages load besides docs/site/static
    extra.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{extra}.lock"):
        if fetch_packages():
            copy_packages(HERE / "node_modules", extra / "vendor")
            export_models(extra / "models")
        pages = extra.with_name(f"{build.name}-pages")  # Sphinx's own state, which makes a second build fast
        options = ["-W", "--keep-going", "-q", "-b", "html", "-c", str(ROOT / "docs"), "-d", str(pages)]
        options += ["-D", f"html_static_path=site/static,{extra}"]
        if status := sphinx_build([*options, str(ROOT), str(build)]):
            return status
        (build / "index.html").write_text(FRONT, encoding="utf-8")
    print(f"the site is {build / 'index.html'}", flush=True)
    return 0


def fetch_packages() -> bool:
    """Whether node_modules has the packages of package-lock.json; runs `npm ci` if it does not."""
    installed, wanted = HERE / "node_modules" / ".cnvzoo-lock", HERE / "package-lock.json"
    if installed.is_file() and installed.read_bytes() == wanted.read_bytes():
        return True
    missing = "the table of the zoo will not sort, and the page in the browser will not run"
    npm = shutil.which("npm")
    if npm is None:
        print(f"npm is not installed: {missing}. On Debian and Ubuntu, 'apt install npm' installs it", flush=True)
        return False
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    if subprocess.run(command, cwd=HERE).returncode:
        print(f"npm failed, see above: {missing}", flush=True)
        return False
    installed.write_bytes(wanted.read_bytes())
    return True


def copy_packages(packages: Path, vendor: Path) -> None:
    """Copy the scripts with their licences, without references to source maps, and wrap the WebAssembly in a script."""
    vendor.mkdir(exist_ok=True)
    for source, name in SCRIPTS.items():
        text = (packages / source).read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if not line.startswith(("//# sourceMappingURL", "/*# sourceMapp"))]
        (vendor / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    for source, name in LICENCES.items():
        shutil.copy(Path(onnxruntime.__file__).parent / source, vendor / name)
    for name in WEBASSEMBLY:
        content = (packages / "onnxruntime-web" / "dist" / name).read_bytes()
        write_script(vendor / f"{name}.js", name, gzip.compress(content, mtime=0))


def write_script(path: Path, name: str, content: bytes) -> None:
    """Write a script that sets `zooFiles[name]` to the content in base64."""
    text = base64.b64encode(content).decode()
    path.write_text(f'(window.zooFiles ??= {{}})[{json.dumps(name)}] = "{text}";\n', encoding="ascii")


def export_models(folder: Path) -> None:
    """Export the published `quant_cnv` checkpoints, and write their list, models.js.

    A file that the same code made of the same weights is kept.
    """
    folder.mkdir(exist_ok=True)
    listed = []
    for info in list_checkpoints("quant_cnv_w*"):
        if info["dataset"] in DATASETS:
            listed.append(_export(info, folder))
    listed.sort(key=lambda model: (DATASETS.index(model["dataset"]), model["w_bits"]))
    (folder / "models.js").write_text(f"window.zooModels = {json.dumps(listed, indent=1)};\n", encoding="utf-8")


def _export(info: CheckpointInfo, folder: Path) -> dict[str, object]:
    """Export one checkpoint to `<name>.onnx` and `<name>.js`; what the page has to know about it."""
    name = info["name"]
    file, key = folder / f"{name}.onnx", folder / f"{name}.made-of"
    made_of = [*sorted((ROOT / "src" / "cnvzoo").rglob("*.py")), ROOT / "hub" / name / "model.safetensors"]
    state = " ".join(map(sha256_of, made_of))
    if not file.is_file() or not key.is_file() or key.read_text() != state:
        cnvzoo.export(name, file)
        key.write_text(state)
    write_script(folder / f"{name}.js", name, file.read_bytes())
    facts = asdict(cnvzoo_runtime.read_metadata(file))
    keys = ("name", "dataset", "classes", "size", "image_size", "scale", "w_bits", "a_bits")
    known = {key: facts[key] for key in keys}
    return known | {"in_chans": len(facts["mean"]), "accuracy": info["accuracy"], "bytes": file.stat().st_size}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
