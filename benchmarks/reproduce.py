"""Reproduce the tables of this project: train what has no record yet, and show what came out.

    python benchmarks/reproduce.py --table cifar10                              every entry of a table, three seeds
    python benchmarks/reproduce.py --table mnist --entry mnist_cnv --seeds 0    one run
    python benchmarks/reproduce.py --table all --time-limit 0                   train nothing, show the tables
    python benchmarks/reproduce.py --table cifar10 --epochs 3                   a trial of everything, in no table
    python benchmarks/reproduce.py --table cifar10 --at-once 4                  four runs at once
    python benchmarks/reproduce.py --table cifar10 --publish hf://ORG           and publish the checkpoints at the end

Like make: a run with a valid record under benchmarks/results/ is not trained again, one that was stopped goes on
where it stopped, and a record of a recipe that has changed since is out of date. Several runs go at once, by default
as many as keep the machine busy: on a CPU each in a process of its own, with one thread, on a GPU in one process, each
on a stream of its own. What goes beside a run changes none of its bits. To merge the work of several
machines, copy their records into benchmarks/results/: the tables, printed and written to benchmarks/RESULTS.md and
into README.md, are made of these and of what benchmarks/retired.json keeps of replaced ones.

Once nothing is left to train, and before the time limit, the published checkpoints of the entries asked for are
measured as integer graphs, if they are quantized and have not been, and verified as `cnvzoo verify` does it: a minute
and some seconds each. Then, with --publish, those that are there go to a directory or
to the Hugging Face Hub, unless one of them was found to be other than published.

Several of these commands may share their folders: what one is training the others leave to it, and what one has
finished the others do not train again. A run that fails does not keep the others from being trained, and tables that
cannot be written are printed all the same.

Exit status: 0 every run asked for has its record; 1 a run failed, a checkpoint is not as it was published or could
not be published, or a file of the results is out of date and cannot be written; 2 wrong request, recipe or reference;
3 stopped at the time limit; 4 all is done but for what another process is training, and what waits for that; 130 or
143 stopped by Ctrl-C or SIGTERM. After 3, 4, 130 and 143 the same command goes on.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from harness.entries import SEEDS, TABLES, HarnessError, Layout, load_entries, select_entries, shown
from harness.execute import Outcome, execute
from harness.plot import update_plot
from harness.publish import keep_missing, measure_missing, publish_checkpoints, update_index
from harness.records import Records, load_retired, recipes_scored
from harness.references import load_references
from harness.report import page, print_listing, print_table, print_trials, rows, summary, update_readme
from harness.schedule import Job, make_plan
from harness.workers import LocalRunner, ProcessRunner, Runner, at_once_by_default, settings
from rich.console import Console
from torch import nn

from cnvzoo.checkpoints.format import IntegerResult
from cnvzoo.checkpoints.verify import Verification, verify
from cnvzoo.deploy.export import measure_integer
from cnvzoo.errors import CnvzooError, in_a_line
from cnvzoo.files import FileError, update_text
from cnvzoo.training import PUBLISHED_SEED, RecipeError, RunRecord, resolve_device, run_recipe

_T = TypeVar("_T")
_HOME = Path(__file__).resolve().parent
_EXIT = {"time limit": 3, "SIGINT": 130, "SIGTERM": 143}
_EXIT_LEFT_TO_OTHERS = 4
_LEFT_SHOWN = 10


@dataclass
class _Writing:
    """The writing of what follows from the runs. A file that cannot be written keeps no other from being written.

    out_of_date: what could not be written when it was last tried
    """

    say: Callable[[str], None]
    out_of_date: set[str] = field(default_factory=set)
    said: set[str] = field(default_factory=set)

    def attempt(self, what: str, write: Callable[[], _T], otherwise: _T) -> _T:
        """What `write` returns, or `otherwise` where it fails, for a reason that is said once."""
        try:
            result = write()
        except (CnvzooError, OSError, UnicodeDecodeError) as error:
            self.out_of_date.add(what)
            self.once(f"{what} stays as it was: {in_a_line(error)}")
            return otherwise
        self.out_of_date.discard(what)
        return result

    def once(self, text: str) -> None:
        if text not in self.said:
            self.said.add(text)
            self.say(text)


def main(
    argv: Sequence[str] | None = None,
    *,
    home: Path = _HOME,
    train: Callable[..., RunRecord] | None = None,
    verify: Callable[..., list[Verification]] = verify,
    measure: Callable[[nn.Module, str], IntegerResult] = measure_integer,
) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: arguments; those of the process if None.
        home: the folder with configs/, references.yaml and results/.
        train: in the place of cnvzoo.training.run_recipe, and in this process, in threads where several go at once.
        verify: what verifies checkpoints, called as cnvzoo.verify.
        measure: what measures the integer graph of a quantized model, called as cnvzoo.deploy.export.measure_integer.
    """
    arguments = _parser().parse_args(argv)
    try:
        return _reproduce(arguments, Layout.of(home, arguments.runs), train, verify, measure)
    except (CnvzooError, OSError) as error:
        print(f"reproduce.py: error: {in_a_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, (HarnessError, RecipeError)) else 1
    except KeyboardInterrupt:  # between two runs: one under way saves its state, and stops as an outcome
        print("reproduce.py: interrupted", file=sys.stderr)
        return _EXIT["SIGINT"]


def _reproduce(
    arguments: argparse.Namespace,
    layout: Layout,
    train: Callable[..., RunRecord] | None,
    verify: Callable[..., list[Verification]],
    measure: Callable[[nn.Module, str], IntegerResult],
) -> int:
    entries = load_entries(layout.configs)
    selected = select_entries(entries, arguments.table, arguments.entry)
    seeds = tuple(dict.fromkeys(arguments.seeds))
    records = Records(entries, layout)
    if arguments.list:
        print_listing(Console(), selected, records.survey())
        return 0

    if arguments.dry_run and arguments.publish is None:
        raise HarnessError("--dry-run shows what --publish would send: give both")
    if arguments.dry_run:
        publish_checkpoints(selected, layout, arguments.publish, tag=arguments.tag, dry_run=True, say=print)
        return 0

    references = load_references(layout.references, entries)
    load_retired(layout.retired)  # a problem in it is named before anything is trained
    device = resolve_device(arguments.device)
    deadline = None if arguments.time_limit is None else time.monotonic() + arguments.time_limit
    messages = Console(stderr=True)

    def say(text: str) -> None:
        with suppress(OSError):  # stderr may be a file on the disk that is full, which is no reason to end a run
            messages.print(text, soft_wrap=True, highlight=False, markup=False)

    writing = _Writing(say)

    def bring_index_up_to_date() -> bool:
        try:
            for problem in update_index(layout.index, layout.hub):
                writing.once(problem)
        except FileError:
            raise
        except CnvzooError as error:  # what was trained is worth keeping, whatever else is in the folder
            writing.once(f"the index of published checkpoints stays as it was: {error}")
            return False
        return True

    def keep() -> None:
        for entry in selected:
            write = partial(keep_missing, [entry], records, verify)
            for folder in writing.attempt(f"the checkpoint of {entry.name}", write, []):
                say(f"{shown(folder)}: checkpoint written")
        if writing.attempt("the index of published checkpoints", bring_index_up_to_date, False):
            problem = writing.attempt("the picture", partial(update_plot, layout.plot, layout.index), None)
            if problem is not None:
                writing.once(problem)
        survey = records.survey()
        lines = rows(entries.values(), survey, references, recipes_scored(entries.values(), layout))
        writing.attempt("the page of results", partial(update_text, layout.page, page(lines, survey)), False)
        writing.attempt("the README", partial(update_readme, layout.readme, summary(lines)), None)

    for entry in selected:
        for seed in seeds:
            collect = partial(records.collect, entry, seed)
            if path := writing.attempt(f"the record of {entry.name} seed {seed}", collect, None):
                say(f"{shown(path)}: brought from the run that finished before")
    for problem in records.problems():
        say(f"no table reads {problem}")
    jobs = make_plan(selected, seeds, records=records, epochs=arguments.epochs, retrain=arguments.retrain)
    threads = arguments.threads
    at_once = min(arguments.at_once or at_once_by_default(device, threads), max(1, len(jobs)))
    if train is None and device.type == "cpu" and at_once > 1:
        runner: Runner = ProcessRunner(threads, deadline, say)
    else:
        own_stream = device.type == "cuda" and at_once > 1
        runner = LocalRunner(train or run_recipe, device, deadline, own_stream=own_stream)
    with settings(device, threads):
        outcome = execute(
            jobs,
            runner,
            at_once=at_once,
            records=records,
            deadline=deadline,
            say=say,
            on_finished=keep,
        )
    keep()
    verified: list[Verification] = []
    in_time = outcome.stopped is None and (deadline is None or time.monotonic() < deadline)
    if in_time and arguments.epochs is None and PUBLISHED_SEED in seeds:
        for entry in selected:
            write = partial(measure_missing, [entry], layout, measure, say)
            if writing.attempt(f"the config of {layout.checkpoint(entry.recipe).name}", write, []):
                keep()
        names = [folder.name for entry in selected if (folder := layout.checkpoint(entry.recipe)).is_dir()]
        verified = verify(names, hub=layout.hub, device=arguments.device)

    console, survey = Console(), records.survey()
    recipes = recipes_scored(entries.values(), layout)
    for table in TABLES:
        if arguments.table in ("all", table):
            members = [entry for entry in entries.values() if entry.table == table]
            print_table(console, table, rows(members, survey, references, recipes))
    print_trials(console, records.trials(selected, seeds, arguments.epochs))
    if arguments.publish is not None and outcome.stopped in (None, "time limit"):
        if any(result.problem for result in verified):
            say("nothing is published: see below")
        else:
            publish_checkpoints(selected, layout, arguments.publish, tag=arguments.tag, dry_run=False, say=say)
    if writing.out_of_date:
        say(f"not written, see above: {', '.join(sorted(writing.out_of_date))}")
    status = _conclude(outcome, verified, say, arguments.retrain)
    return 1 if writing.out_of_date and status in (0, _EXIT["time limit"], _EXIT_LEFT_TO_OTHERS) else status


def _conclude(outcome: Outcome, verified: Sequence[Verification], say: Callable[[str], None], retrain: bool) -> int:
    """Say what is not there, or not as it should be, and what to do about it; returns the exit status."""
    if outcome.failed:
        say(f"failed, see above: {', '.join(map(str, outcome.failed))}")
    different = [result for result in verified if result.problem]
    for result in different:
        say(f"{result.name}: not as published: {result.problem}")
    if len(verified) > len(different):
        say(f"{len(verified) - len(different)} checkpoints verified: their files, and their numbers on the test set")
    if outcome.left:
        again = ", after training the finished ones once more: choose with --entry and --seeds" if retrain else ""
        why = f"stopped ({outcome.stopped})" if outcome.stopped else "another process is training the rest"
        say(f"{why}; the same command goes on from here{again}. Left, {len(outcome.left)} in all:")
    for job in outcome.left[:_LEFT_SHOWN]:
        say(f"  {job}: {_state(job, outcome)}")
    if len(outcome.left) > _LEFT_SHOWN:
        say(f"  and {len(outcome.left) - _LEFT_SHOWN} more")
    if outcome.stopped is not None:
        return _EXIT[outcome.stopped]
    if outcome.failed or different:
        return 1
    return _EXIT_LEFT_TO_OTHERS if outcome.left else 0


def _state(job: Job, outcome: Outcome) -> str:
    if job in outcome.elsewhere:
        return "another process is training it"
    return f"state in {shown(job.run_dir)}" if job.started else "not started"


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
        type=_whole("epochs"),
        metavar="N",
        help="at most N epochs a run; a run that is cut short is a trial: it enters no table and lives under "
        "<runs>/trials",
    )
    add("--time-limit", type=_seconds, metavar="SECONDS", help="stop then, with every run under way saved")
    add(
        "--at-once",
        type=_whole("runs"),
        metavar="N",
        help="train N runs at once (default: on a CPU the usable cores divided by --threads, on a GPU 3); each needs "
        "memory of its own, and its bits do not depend on N",
    )
    add(
        "--threads",
        type=_whole("threads"),
        default=1,
        metavar="N",
        help="threads of one run on a CPU (default: 1). The bits of a run depend on it, so it is the same on every "
        "machine unless you say otherwise; a record has the number that it was made with",
    )
    add(
        "--runs",
        type=Path,
        metavar="DIR",
        help="where weights and the state of runs under way are kept (default: runs/ in the checkout)",
    )
    add("--publish", metavar="TO", help="publish the checkpoints at the end: to a directory, or to hf://ORG")
    add("--tag", help="with --publish: a tag to set at each, such as a release; it is never moved")
    add("--dry-run", action="store_true", help="with --publish: train nothing, and only show what would go")
    add("--list", action="store_true", help="print the status of every run of the entries, and do nothing else")
    add(
        "--retrain",
        action="store_true",
        help="train again what has a record, which is replaced at the end of the new run; a run under way goes on",
    )
    return parser


def _whole(what: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) == 0:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {what}: a whole number, 1 or more")
        return int(text)

    return parse


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
