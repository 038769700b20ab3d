"""`--import`: Python files and modules of the caller's own, which register topologies before a command runs.

Their errors are shown in one line too, with file and line, at the import and when a command uses what they define.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Annotated

import typer

from cnvzoo.errors import CnvzooError
from cnvzoo.files import expanded

_MARK = "__imported_by_cnvzoo__"  # a global variable of the modules whose errors are shown in one line


def import_all(context: typer.Context, sources: Sequence[str] | None) -> Sequence[str] | None:
    """Import each file or module, in order; returns `sources`, as typer wants it from a callback.

    Nothing is imported for a shell that asks for completions.

    Raises:
        CnvzooError: there is no such file or module, or it cannot be imported; in one line, with file and line.
    """
    for source in () if context.resilient_parsing else sources or ():
        is_file = source.endswith(".py") or any(s in source for s in (os.sep, os.altsep) if s)
        if is_file:
            _import_file(expanded(source))
        else:
            _import_module(source)
    return sources


def in_imported_code(error: BaseException) -> str | None:
    """`FILE:LINE: mistake` for an error that passed through an imported file; None for any other."""
    places = [
        f"{_shown(frame.f_code.co_filename)}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if _MARK in frame.f_globals
    ]
    return f"{places[-1]}: {_mistake(error)}" if places else None


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise CnvzooError(f"--import {path}: no such file: give a Python file, or the name of a module")
    path = path.resolve()
    name = f"cnvzoo_import_{path.stem}"  # a file called torch.py does not take the place of torch
    sys.path.insert(0, folder := str(path.parent))  # it may import its neighbours, as when Python runs it
    try:
        _execute(importlib.util.spec_from_file_location(name, path), str(path))
    finally:
        with suppress(ValueError):  # the file itself removed it
            sys.path.remove(folder)  # the first of equal entries, which is the one from above
    if folder not in sys.path:
        sys.path.append(folder)  # a builder may import a neighbour later; last, so that it hides no module


def _import_module(name: str) -> None:
    folder = os.getcwd()  # as `python -m` finds modules
    if is_new := folder not in sys.path:
        sys.path.append(folder)  # last, so that it hides none; it stays, as that of a file does
    try:
        _execute(_found(name), name)
    except CnvzooError:
        if is_new:
            with suppress(ValueError):
                sys.path.remove(folder)
        raise


def _found(name: str) -> ModuleSpec | None:
    """The module, after the packages that it is in were imported."""
    try:
        return importlib.util.find_spec(name)
    except SyntaxError as error:
        raise _syntax_error(error, name) from None
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]  # without this one
        own = next((frame for frame in frames if not frame.filename.startswith("<frozen")), None)
        place = f"{_shown(own.filename)}:{own.lineno}" if own else name
        raise CnvzooError(f"--import {place}: {_mistake(error)}") from None


def _execute(spec: ModuleSpec | None, source: str) -> None:
    """Import a module, marked before its first line runs."""
    if spec is None or spec.loader is None:
        raise CnvzooError(f"--import {source}: no such module: give its name as in an import, or a Python file")
    if spec.name in sys.modules and sys.modules[spec.name].__spec__ is spec:
        return
    module = importlib.util.module_from_spec(spec)
    setattr(module, _MARK, True)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        del sys.modules[spec.name]
        raise _syntax_error(error, source) from None
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        place = in_imported_code(error) or f"{source}: {_mistake(error)}"
        raise CnvzooError(f"--import {place}") from None


def _syntax_error(error: SyntaxError, source: str) -> CnvzooError:
    return CnvzooError(f"--import {_shown(error.filename or source)}:{error.lineno}: {_mistake(error)}")


def _mistake(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
    return text if isinstance(error, CnvzooError) else f"{type(error).__name__}: {text}"


def _shown(filename: str) -> str:
    """The path of a file, relative to this folder where it is below it."""
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else filename


Import = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        callback=import_all,
        is_eager=True,
        metavar="FILE_OR_MODULE",
        help="Python file or module that registers models of your own; repeat it for several.",
    ),
]
