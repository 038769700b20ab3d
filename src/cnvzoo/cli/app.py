"""The application that commands register with, and the function that runs it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

import cnvzoo
from cnvzoo.cli.imports import in_imported_code
from cnvzoo.errors import CnvzooError, in_a_line
from cnvzoo_runtime.errors import show_every_character

_UsageError: Any = typer.BadParameter.__mro__[1]  # of click, whichever copy of it typer uses

app = typer.Typer(
    help="Small image classifiers, float and quantized, with recipes, records of runs, and weights.",
    epilog="Start with: cnvzoo list, then cnvzoo info quant_cnv --w-bits 4 --a-bits 4",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cnvzoo {cnvzoo.__version__}")
        raise typer.Exit


@app.callback()
def cnvzoo_(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """A context in which a UserWarning is printed without the place in the code; other warnings are for developers."""
    with warnings.catch_warnings():
        show_place = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if category is UserWarning:
                typer.echo(f"warning: {' '.join(str(message).split())}", err=True)
            else:
                show_place(message, category, *place, **more)

        warnings.showwarning = show
        yield


def main() -> None:
    """Run the command line; print warnings and errors in one line, without a source line or a traceback.

    These are errors of cnvzoo, of the operating system, and of code that --import imported.
    """
    show_every_character()
    try:
        with warnings_in_a_line():
            sys.exit(app(prog_name="cnvzoo", standalone_mode=False) or 0)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # the help
        else:
            command = error.ctx.command_path if error.ctx else "cnvzoo"
            message = " ".join(error.format_message().split()).rstrip(".")
            typer.echo(f"error: {message}: {command} --help shows the usage", err=True)
        sys.exit(2)
    except typer.Abort:
        typer.echo("Aborted.", err=True)
        sys.exit(1)
    except (CnvzooError, OSError) as error:
        typer.echo(f"error: {in_a_line(error)}", err=True)
        sys.exit(1)
    except Exception as error:
        place = in_imported_code(error)
        if place is None:
            raise
        typer.echo(f"error: {place}", err=True)
        sys.exit(1)
