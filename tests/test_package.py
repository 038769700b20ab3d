"""The package as a whole: its public names, the layers of its modules, and what importing it costs."""

from __future__ import annotations

import ast
import builtins
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import cnvzoo
import cnvzoo.data
import cnvzoo.training
import cnvzoo_runtime

SOURCE = Path(cnvzoo.__file__).parent
RUNTIME = Path(cnvzoo_runtime.__file__).parent
# from the lowest layer up; packages of one layer do not import each other
LAYERS = [
    {"errors"},
    {"files", "images", "progress", "recipe_folder", "strict_yaml"},
    {"data", "models"},
    {"training"},
    {"checkpoints"},
    {"deploy"},
    {"inference"},
    {"zoo"},
    {"train_and_save"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    """The modules of this package that a module imports, except for type checking."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            if node.module and node.module.partition(".")[0] == "cnvzoo":
                for alias in node.names:
                    module = f"{node.module}.{alias.name}".removeprefix("cnvzoo.")
                    found.add(module if module in MODULES else node.module.removeprefix("cnvzoo").lstrip("."))
        elif isinstance(node, ast.Import):
            found.update(a.name.removeprefix("cnvzoo").lstrip(".") for a in node.names if a.name.startswith("cnvzoo"))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"}
GRAPH = {name: imports(path) - {"", name} for name, path in MODULES.items()}


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_from_lower_layers(module: str) -> None:
    package = module.partition(".")[0]
    for imported in GRAPH[module]:
        other = imported.partition(".")[0]
        if other == package or (package, imported) == ("cli", ""):
            continue
        assert LEVEL[other] < LEVEL[package], f"{module} imports {imported}"


def test_no_imports_are_circular() -> None:
    packages = {name for name in MODULES if (SOURCE / name.replace(".", "/")).is_dir()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module in done or module in packages:
            return
        for imported in sorted(GRAPH.get(module, ())):
            visit(imported, (*path, module))
        done.add(module)

    for module in MODULES:
        visit(module, ())


def test_the_design_names_every_module() -> None:
    """Those of the command line, which are its commands, as one package."""
    root = SOURCE.parents[1]
    listed = (root / "docs" / "design.md").read_text(encoding="utf-8").partition("## Layers")[2]
    words = set(re.findall(r"\w+", listed.partition("## ")[0]))
    names = {name.rpartition(".")[2] for name in MODULES if not name.startswith(("cli.", "__main__"))}
    names |= {path.stem for folder in (RUNTIME, root / "benchmarks" / "harness") for path in folder.glob("[!_]*.py")}
    assert names <= words


RUNTIME_LAYERS = ["errors", "images metadata", "onnx_file graphs", "deployed_model", "cli"]  # as LAYERS


def test_the_runtime_does_not_import_cnvzoo_and_its_modules_import_only_from_lower_layers() -> None:
    level = {name: number for number, names in enumerate(RUNTIME_LAYERS) for name in names.split()}
    third_party = {"numpy", "PIL", "onnxruntime", "openvino", "cnvzoo_runtime"}
    assert {path.stem for path in RUNTIME.glob("*.py")} == {*level, "__init__"}
    for path in RUNTIME.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                package, _, module = name.partition(".")
                assert package in third_party | sys.stdlib_module_names, f"{path}: {name}"
                if module and package == "cnvzoo_runtime" and path.stem in level:
                    assert level[module] < level[path.stem], f"{path}: {name}"


@pytest.mark.parametrize("package", [cnvzoo, cnvzoo_runtime], ids=lambda package: package.__name__)
def test_public_names_are_listed_imported_for_types_and_defined(package: ModuleType) -> None:
    name = package.__name__
    tree = ast.parse(Path(package.__file__ or "").read_text())
    typed = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {public: f"{name}.{module}" for public, module in package._DEFINED_IN.items()}
    assert sorted(typed) == sorted(package.__all__)
    assert sorted(public for names in package._MODULES.values() for public in names) == sorted(typed)
    for public in package.__all__:
        module = getattr(package, public).__module__
        assert module in (typed[public], "typing") or module.startswith("cnvzoo_runtime.")
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'nonsense'"):
        _ = package.nonsense


def test_what_the_runtime_defines_is_the_same_in_both_packages() -> None:
    for name in ("CnvzooError", "ImageError", "Metadata", "Prediction"):
        assert getattr(cnvzoo, name) is getattr(cnvzoo_runtime, name)
    assert issubclass(cnvzoo_runtime.DeployError, cnvzoo.CnvzooError)
    assert issubclass(cnvzoo_runtime.ImageError, cnvzoo.CnvzooError)


def test_every_error_that_the_docstrings_of_public_functions_name_is_public() -> None:
    modules = (cnvzoo, cnvzoo.data, cnvzoo.training, cnvzoo_runtime, builtins)
    public = {name for module in modules for name in dir(module)}
    for name in cnvzoo.__all__:
        value = getattr(cnvzoo, name)
        if value.__module__.startswith("cnvzoo"):
            named = re.findall(r"^ +(\w+Error):", value.__doc__ or "", re.MULTILINE)
            assert set(named) <= public, name


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not modules_after("import cnvzoo, cnvzoo.errors") & {
        "torch",
        "pydantic",
        "numpy",
        "PIL",
        "brevitas",
        "huggingface_hub",
    }


def test_subpackages_are_imported_when_they_are_first_used() -> None:
    assert "torch" not in modules_after("import cnvzoo; cnvzoo.deploy.load")
    for name in cnvzoo._SUBPACKAGES:
        assert name in dir(cnvzoo)
        assert cnvzoo.__getattr__(name) is sys.modules[f"cnvzoo.{name}"]


def test_torch_does_not_warn_of_a_missing_gpu_on_machines_with_a_cuda_folder(tmp_path: Path) -> None:
    code = "import cnvzoo; cnvzoo.create_model('quant_cnv', w_bits=4, a_bits=4)"
    environment = {**os.environ, "CUDA_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_models_and_training_import_no_network_and_no_quantization() -> None:
    assert not modules_after("import cnvzoo; cnvzoo.create_model, cnvzoo.train") & {
        "brevitas", "huggingface_hub", "torchvision", "onnx",
    }  # fmt: skip
