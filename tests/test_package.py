"""The package as a whole: its public names, the layers of its modules, and what importing it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cnvzoo

SOURCE = Path(cnvzoo.__file__).parent
# from the lowest layer up; packages of one layer do not import each other
LAYERS = [
    {"errors"},
    {"files", "images", "progress", "strict_yaml"},
    {"data", "models"},
    {"training"},
    {"checkpoints"},
    {"deploy"},
    {"zoo"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    """The modules of this package that a module imports anywhere but for type checking."""
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
def test_imports_run_down_the_layers_only(module: str) -> None:
    package = module.partition(".")[0]
    for imported in GRAPH[module]:
        other = imported.partition(".")[0]
        if other == package or (package, imported) == ("cli", ""):
            continue
        assert LEVEL[other] < LEVEL[package], f"{module} imports {imported}"


def test_no_module_imports_itself_through_others() -> None:
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


def test_public_names_are_listed_imported_for_types_and_defined() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    typed = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == {name: f"cnvzoo.{module}" for name, module in cnvzoo._DEFINED_IN.items()}
    assert sorted(typed) == sorted(cnvzoo.__all__)
    for name in cnvzoo.__all__:
        assert getattr(cnvzoo, name).__module__ in (typed[name], "typing")
    assert set(cnvzoo.__all__) <= set(dir(cnvzoo))
    with pytest.raises(AttributeError, match="module 'cnvzoo' has no attribute 'nonsense'"):
        _ = cnvzoo.nonsense  # type: ignore[attr-defined]


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not modules_after("import cnvzoo") & {"torch", "pydantic", "numpy", "brevitas", "huggingface_hub"}


def test_models_and_training_import_no_network_and_no_quantization() -> None:
    assert not modules_after("import cnvzoo; cnvzoo.create_model, cnvzoo.train") & {
        "brevitas", "huggingface_hub", "torchvision", "onnx",
    }  # fmt: skip
