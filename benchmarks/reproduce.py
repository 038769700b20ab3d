"""Reproduce the tables of this project: train what has no record yet, and show what came out.

    python benchmarks/reproduce.py --table cifar10                              every entry of a table, three seeds
    python benchmarks/reproduce.py --table mnist --entry mnist_cnv --seeds 0    one run
    python benchmarks/reproduce.py --table all --time-limit 0                   train nothing, show the tables
    python benchmarks/reproduce.py --table cifar10 --epochs 3                   a trial of everything, in no table

Like make: a run with a valid record under benchmarks/results/ is not trained again, one that was stopped goes on
where it stopped, and a record of a recipe that has changed since is out of date. To merge the work of several
machines, copy their records into benchmarks/results/: the tables, printed and written to benchmarks/RESULTS.md and
into README.md, are made of these alone.

Exit status: 0 every run asked for has its record; 1 a run failed; 2 wrong request, recipe or reference; 3 stopped
at the time limit; 130 or 143 stopped by Ctrl-C or SIGTERM. After 3, 130 and 143 the same command goes on.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from harness import index, readme, records, render
from harness.checkpoints import keep_missing
from harness.entries import SEEDS, TABLES, load_entries, select_entries
from harness.errors import HarnessError
from harness.execute import LocalRunner, Outcome, execute
from harness.files import shown
from harness.layout import Layout
from harness.plan import make_plan
from harness.references import load_references
from harness.tables import rows
from rich.console import Console

from cnvzoo.errors import CnvzooError
from cnvzoo.files import write_text
from cnvzoo.train import RecipeError, RunRecord, resolve_device, run_recipe

_HOME = Path(__file__).resolve().parent
_EXIT = {"time limit": 3, "SIGINT": 130, "SIGTERM": 143}
_LEFT_SHOWN = 10


def main(
    argv: Sequence[str] | None = None,
    *,
    home: Path = _HOME,
    train: Callable[..., RunRecord] = run_recipe,
) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: arguments; those of the process if None.
        home: the folder with configs/, references.yaml and results/.
        train: what trains a run, called as cnvzoo.train.run_recipe.
    """
    arguments = _parser().parse_args(argv)
    try:
        return _reproduce(arguments, Layout.of(home, arguments.runs), train)
    except CnvzooError as error:
        print(f"reproduce.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (HarnessError, RecipeError)) else 1
    except KeyboardInterrupt:  # between two runs: one under way saves its state, and stops as an outcome
        print("reproduce.py: interrupted", file=sys.stderr)
        return _EXIT["SIGINT"]


def _reproduce(arguments: argparse.Namespace, layout: Layout, train: Callable[..., RunRecord]) -> int:
    entries = load_entries(layout.configs)
    selected = select_entries(entries, arguments.table, arguments.entry)
    seeds = tuple(dict.fromkeys(arguments.seeds))
    if arguments.list:
        render.print_listing(Console(), selected, records.survey(selected, layout))
        return 0

    references = load_references(layout.references, entries)
    resolve_device(arguments.device)
    deadline = None if arguments.time_limit is None else time.monotonic() + arguments.time_limit
    messages = Console(stderr=True)

    def say(text: str) -> None:
        messages.print(text, soft_wrap=True, highlight=False, markup=False)

    def publish() -> None:
        for folder in keep_missing(selected, layout):
            say(f"{shown(folder)}: checkpoint written")
        index.update(layout.index, layout.hub)
        survey = records.survey(entries.values(), layout)
        lines = rows(entries.values(), survey, references)
        write_text(layout.page, render.page(lines, survey))
        readme.update(layout.readme, render.summary(lines))

    for path in records.collect(selected, seeds, layout):
        say(f"{shown(path)}: brought from the run that finished before")
    for problem in records.problems(entries, layout):
        say(f"no table reads {problem}")
    jobs = make_plan(
        selected, seeds, entries=entries, layout=layout, epochs=arguments.epochs, retrain=arguments.retrain
    )
    runner = LocalRunner(train=train, device=arguments.device, deadline=deadline)
    outcome = execute(jobs, runner, entries=entries, layout=layout, deadline=deadline, say=say, on_finished=publish)
    publish()

    console, survey = Console(), records.survey(entries.values(), layout)
    for table in TABLES:
        if arguments.table in ("all", table):
            members = [entry for entry in entries.values() if entry.table == table]
            render.print_table(console, table, rows(members, survey, references))
    render.print_trials(console, records.trials(selected, seeds, layout, arguments.epochs))
    return _conclude(outcome, say, arguments.retrain)


def _conclude(outcome: Outcome, say: Callable[[str], None], retrain: bool) -> int:
    """Say what is not there, if anything, and what to do about it; returns the exit status."""
    if outcome.failed:
        say(f"failed, see above: {', '.join(map(str, outcome.failed))}")
    if outcome.stopped is None:
        return 1 if outcome.failed else 0
    again = ", after training the finished ones once more: choose with --entry and --seeds" if retrain else ""
    say(f"stopped ({outcome.stopped}); the same command goes on from here{again}. Left, {len(outcome.left)} in all:")
    for job in outcome.left[:_LEFT_SHOWN]:
        say(f"  {job}: {f'state in {shown(job.run_dir)}' if job.started else 'not started'}")
    if len(outcome.left) > _LEFT_SHOWN:
        say(f"  and {len(outcome.left) - _LEFT_SHOWN} more")
    return _EXIT[outcome.stopped]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reproduce.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--table", choices=(*TABLES, "all"), required=True, help="the table to reproduce")
    add("--entry", nargs="+", action="extend", metavar="NAME", help="only these entries of it")
    add("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS, help="only these seeds (default: 0 1 2)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is cuda where there is one")
    add(
        "--epochs",
        type=_epochs,
        metavar="N",
        help="at most N epochs a run; a run that is cut short is a trial: it enters no table and lives under "
        "<runs>/trials",
    )
    add("--time-limit", type=_seconds, metavar="SECONDS", help="stop then, with the run under way saved")
    add(
        "--runs",
        type=Path,
        metavar="DIR",
        help="where weights and the state of runs under way are kept (default: runs/ in the checkout)",
    )
    add("--list", action="store_true", help="print the names of the entries and do nothing else")
    add(
        "--retrain",
        action="store_true",
        help="train again what has a record, which is replaced at the end of the new run; a run under way goes on",
    )
    return parser


def _epochs(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of epochs: a whole number, 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
