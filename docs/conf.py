"""Configuration of the site, and what its pages get that the same pages on a code host do not have.

The pages are those of the repository: README.md, docs/, the results and the model cards, where links lead from one to
the other. The source folder is therefore the repository, and docs/site/build.py builds it.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, is_typeddict

sys.path.insert(0, str(Path(__file__).resolve().parent / "site"))

import zoo_page
from pydantic import BaseModel

import cnvzoo
from cnvzoo.checkpoints.format import CheckpointFacts

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]

project = "cnvzoo"
author = "The cnvzoo authors"
copyright = author
release = version = cnvzoo.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "benchmarks/RESULTS.md", "benchmarks/speed/*.md", "runtime/*.md", "hub/*/*.md"]
exclude_patterns = ["build", "docs/site", ".*", "runs"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
myst_all_links_external = False
suppress_warnings = [
    "myst.header",  # model cards begin below the name of their checkpoint
    "ref.python",  # several classes have an attribute of one name, such as w_bits
]

default_role = "py:obj"  # `name` in a docstring is a link where that name is on the page, else code
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True, "exclude-members": "model_config, model_post_init"}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "cnvzoo"
html_favicon = "site/static/icon.svg"
html_static_path = ["site/static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_search_summary = False  # pages that are opened as files cannot fetch it
html_theme_options = {"navigation_with_keys": True}

SCRIPTS = {  # of single pages, in this order; build.py puts those of other projects into vendor/
    "docs/zoo": ("vendor/tabulator.min.js", "vendor/chart.umd.min.js", "zoo.js"),
    "docs/browser": ("vendor/ort.wasm.min.js", "models/models.js", "browser.js"),
}
STYLES = {"docs/zoo": ("vendor/tabulator_simple.min.css",)}

CONTENTS = {
    "Start": ("docs/zoo", "docs/browser", "docs/own-data", "docs/command-line", "benchmarks/RESULTS"),
    "Guide": ("docs/models", "docs/checkpoints", "docs/recipes", "docs/quantization", "docs/data", "docs/publishing"),
    "Deployment": (
        "docs/deployment",
        "docs/microcontrollers",
        "docs/finn",
        "runtime/README",
        "benchmarks/speed/README",
    ),
    "Reference": ("docs/api", "docs/numerics", "docs/cluster", "docs/design", "CHANGELOG", "CONTRIBUTING"),
}


def setup(app: Sphinx) -> None:
    app.connect("env-get-outdated", lambda *_: ["docs/api", "docs/browser", "docs/zoo"])  # made of more than their text
    app.connect("source-read", extend_page)
    app.connect("html-page-context", add_files)
    app.connect("autodoc-process-signature", shorten_signature)


def extend_page(app: Sphinx, name: str, source: list[str]) -> None:
    """Add to the text of a page what is written at build time, in place of comments that a code host does not show."""
    text = source[0]
    if name == root_doc:
        text += "".join(_contents(caption, pages) for caption, pages in CONTENTS.items())
    text = text.replace("<!-- zoo -->", zoo_page.table(ROOT)) if name == "docs/zoo" else text
    text = re.sub(r"<!-- api: (\S+) -->", lambda match: _reference(match[1]), text) if name == "docs/api" else text
    here = (ROOT / name).parent
    # a code host shows a folder, and the site has none: only the words remain
    source[0] = re.sub(r"\[([^]]+)\]\(([\w./-]+)\)", lambda m: m[1] if (here / m[2]).is_dir() else m[0], text)


def _contents(caption: str, pages: tuple[str, ...]) -> str:
    lines = [f":::{{toctree}}\n:hidden:\n:caption: {caption}\n", *(f"/{page}" for page in pages), ":::"]
    return "\n" + "\n".join(lines) + "\n"


def _reference(module: str) -> str:
    """The directives for all public names of a module, but those that the page has under another module already."""
    owners = {
        "cnvzoo.data": "cnvzoo",
        "cnvzoo.training": "cnvzoo",
        "cnvzoo.deploy": "cnvzoo_runtime",
        "cnvzoo": "cnvzoo_runtime",
    }
    public = importlib.import_module(module)
    owner = importlib.import_module(owners[module]) if module in owners else None
    lines = []
    for name in public.__all__:
        value = getattr(public, name)
        if owner is not None and getattr(owner, name, None) is value:
            continue
        lines.append(f".. {_directive(value)}:: {module}.{name}")
        if isinstance(value, type) and issubclass(value, CheckpointFacts):  # the attributes of both in one place
            lines[-1] += "\n   :show-inheritance:"
            lines.append(f".. autoclass:: {CheckpointFacts.__module__}.{CheckpointFacts.__name__}")
        if is_typeddict(value):  # its docstring describes the keys together
            lines[-1] += "\n   :undoc-members:"
    return "\n\n".join(("```{eval-rst}", *lines)) + "\n```"


def _directive(value: Any) -> str:
    if isinstance(value, type):
        return "autoexception" if issubclass(value, BaseException) else "autoclass"
    return "autofunction" if inspect.isroutine(value) else "autodata"


def add_files(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Load scripts and styles on the pages that use them, as far as build.py found them."""
    known = [Path(app.confdir) / folder for folder in app.config.html_static_path]
    for files, add in ((SCRIPTS, app.add_js_file), (STYLES, app.add_css_file)):
        wanted = files.get(page, ())
        if all(any((folder / file).is_file() for folder in known) for file in wanted):
            for file in wanted:
                add(file)


def shorten_signature(
    app: Sphinx, kind: str, name: str, value: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Leave out the arguments of a pydantic model, which are its fields with every condition on them."""
    return ("", returns) if isinstance(value, type) and issubclass(value, BaseModel) else (signature, returns)
