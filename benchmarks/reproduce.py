"""Reproduce the tables of this project: train what has no valid record yet, and show the results.

    python benchmarks/reproduce.py --table cifar10                              every entry of a table, three seeds
    python benchmarks/reproduce.py --table mnist --entry mnist_cnv --seeds 0    one run
    python benchmarks/reproduce.py --table all --time-limit 0                   train nothing, show the tables
    python benchmarks/reproduce.py --table cifar10 --epochs 3                   a short trial of each, in no table
    python benchmarks/reproduce.py --table cifar10 --at-once 4                  four runs at once
    python benchmarks/reproduce.py --table cifar100 --on ray                    on a Ray cluster (docs/cluster.md)
    python benchmarks/reproduce.py --table cifar10 --publish hf://ORG           and publish the checkpoints at the end

It works like make: a run with a valid record of the current arithmetic under benchmarks/results/ is not trained again,
an interrupted run is resumed, and a record whose recipe has changed is out of date. Several runs are trained at once,
by default as many as keep the machine busy: on a CPU each in a process of its own with one thread, on a GPU in one
process, each on a stream of its own. A run's bits do not depend on what runs beside it. To merge the work of several
machines, copy their records into benchmarks/results/, and the folders of their runs of seed 0 into runs/: the tables,
printed and written to benchmarks/RESULTS.md and README.md, are made of the records and of benchmarks/retired.json,
which keeps the results of replaced records; the checkpoints are the weights of seed 0.

After the runs, unless a signal or the time limit stopped them, the checkpoints of the selected entries are measured as
integer graphs, if they are quantized and have not been measured, and verified as `cnvzoo verify` does it: about a
minute for each measurement, and some seconds for each verification. This is left out with --epochs, and where --seeds
has no 0. With --publish they are verified after the time limit too, and then sent to a directory or to the Hugging Face
Hub, unless one of them fails its verification.

Several of these commands may share their folders: each leaves alone what another is training, and does not train again
what another has finished. A run that fails does not stop the others, and tables that cannot be written are still
printed.

Exit status: 0 every selected run has a valid record; 1 a run failed, a selected run has no valid record, a checkpoint
fails its verification or could not be published, or a file of the results is out of date and cannot be written;
2 invalid request, recipe or reference; 3 stopped at the time limit; 4 all is done except what another process is
training, and what needs that; 130 or 143 stopped by Ctrl-C or SIGTERM. After 3, 4, 130 and 143 the same command
resumes.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from harness.cluster import RayRunner, cluster_device, joined_cluster
from harness.entries import SEEDS, TABLES, Entry, HarnessError, Layout, load_entries, select_entries, shown
from harness.execute import Outcome, execute
from harness.outputs import Outputs
from harness.publish import publish_checkpoints
from harness.records import Records, load_retired, recipes_scored
from harness.references import load_references
from harness.report import print_listing, print_table, print_trials, rows
from harness.schedule import Run, make_plan
from harness.workers import LocalRunner, ProcessRunner, Runner, default_runs_at_once, process_settings
from rich.console import Console
from torch import nn

from cnvzoo.checkpoints.folder import checkpoint_folders
from cnvzoo.checkpoints.format import IntegerResult, StoreError
from cnvzoo.checkpoints.locations import open_store
from cnvzoo.checkpoints.store import DirectoryStore
from cnvzoo.checkpoints.verify import Verification, verify
from cnvzoo.deploy.export import measure_integer
from cnvzoo.errors import CnvzooError, in_a_line
from cnvzoo.progress import print_line
from cnvzoo.training import PUBLISHED_SEED, RecipeError, RunRecord, resolve_device, run_recipe

_HOME = Path(__file__).resolve().parent
_EXIT = {"time limit": 3, "SIGINT": 130, "SIGTERM": 143}
_EXIT_LEFT_TO_OTHERS = 4
_LEFT_SHOWN = 10


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
        train: instead of cnvzoo.training.run_recipe; called in this process, in threads if several runs go at once.
        verify: what verifies checkpoints, called as cnvzoo.verify.
        measure: what measures the integer graph of a quantized model, called as cnvzoo.deploy.export.measure_integer.
    """
    arguments = _parser().parse_args(argv)
    try:
        return _reproduce(arguments, Layout.of(home, arguments.runs), train, verify, measure)
    except (CnvzooError, OSError) as error:
        print(f"reproduce.py: error: {in_a_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, (HarnessError, RecipeError)) else 1
    except KeyboardInterrupt:  # between two runs; a run under way catches the signal itself and saves its state
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
        print_listing(Console(), selected, records.survey(), seeds)
        return 0
    _check_publish(arguments)
    if arguments.dry_run:
        publish_checkpoints(selected, layout, arguments.publish, tag=arguments.tag, dry_run=True, say=print)
        return 0

    references = load_references(layout.references, entries)
    load_retired(layout.retired)  # reports a problem in it before anything is trained
    on_ray = arguments.on == "ray"
    device = None if on_ray else _device(arguments.device)
    deadline = None if arguments.time_limit is None else time.monotonic() + arguments.time_limit
    verify = partial(verify, device="auto" if on_ray else arguments.device)
    outputs = Outputs(list(selected), records, references, verify, print_line)
    outputs.collect_records(seeds)
    for problem in records.problems():
        print_line(f"in no table: {problem}")

    runs = make_plan(selected, seeds, records=records, epochs=arguments.epochs, retrain=arguments.retrain)
    outputs.add_entries(run.entry for run in runs if run.record_path is not None)
    outcome = _train(runs, arguments, device, deadline, train, outputs)
    outputs.update()
    verified: list[Verification] = []
    publish_to: str | None = arguments.publish if outcome.stopped in (None, "time limit") else None
    published = True
    in_time = outcome.stopped is None and (deadline is None or time.monotonic() < deadline)
    complete = in_time and arguments.epochs is None and PUBLISHED_SEED in seeds
    if complete:
        outputs.measure(measure)
    if complete or publish_to is not None:
        present = checkpoint_folders(layout.hub)
        names = [name for entry in selected if (name := layout.checkpoint(entry.recipe).name) in present]
        verified = verify(names, hub=layout.hub)

    try:
        _print_tables(arguments, selected, seeds, outputs)
    except (CnvzooError, OSError, SystemExit) as error:  # no reason to leave out what follows
        outputs.out_of_date.add("the printed tables")
        why = "nothing reads the output" if isinstance(error, SystemExit) else in_a_line(error)  # rich exits then
        print_line(f"the tables are not printed: {why}")
    if publish_to is not None:
        published = _publish(selected, arguments, outputs, verified)
    if outputs.out_of_date:
        print_line(f"not written, see above: {', '.join(sorted(outputs.out_of_date))}")
    status = _conclude(outcome, verified, arguments.retrain)
    if status == 0 and arguments.epochs is None and (missing := _without_record(selected, seeds, records)):
        print_line(f"without a valid record, see above: {', '.join(missing)}")
        return 1
    incomplete = outcome.failed or outputs.out_of_date or not published
    return 1 if incomplete and status in (0, _EXIT["time limit"], _EXIT_LEFT_TO_OTHERS) else status


def _publish(
    selected: Sequence[Entry], arguments: argparse.Namespace, outputs: Outputs, verified: Sequence[Verification]
) -> bool:
    """Publish the checkpoints of the selected entries, and return whether all of them were; says why if not."""
    if any(result.problem for result in verified):
        print_line("nothing is published: a checkpoint fails its verification, see below")
        return False
    ready = [entry for entry in selected if outputs.has_checkpoint_of_record(entry)]
    if left_out := [entry.name for entry in selected if entry not in ready]:
        print_line(f"not published, because the checkpoint is not that of the record, see above: {', '.join(left_out)}")
    try:
        publish_checkpoints(
            ready, outputs.records.layout, arguments.publish, tag=arguments.tag, dry_run=False, say=print_line
        )
    except (CnvzooError, OSError) as error:  # no reason to leave out what follows
        print_line(f"not published: {in_a_line(error)}")
        return False
    present = checkpoint_folders(outputs.records.layout.hub)
    lacking = [
        entry.name
        for entry in ready
        if outputs.records.status(entry, PUBLISHED_SEED).record is not None
        and outputs.records.layout.checkpoint(entry.recipe).name not in present
    ]
    if lacking:
        print_line(f"not published, because there is a record and no checkpoint: {', '.join(lacking)}")
    return not left_out and not lacking


def _without_record(selected: Sequence[Entry], seeds: Sequence[int], records: Records) -> list[str]:
    """The selected runs that have no valid record of the current arithmetic."""
    survey = records.survey()
    runs = ((entry.name, seed) for entry in selected for seed in seeds)
    return [f"{name} seed {seed}" for name, seed in runs if survey[name, seed].done is None]


def _check_publish(arguments: argparse.Namespace) -> None:
    """Raise HarnessError for an impossible --publish, or options that contradict or need it."""
    if arguments.publish is None:
        for given, option in ((arguments.dry_run, "--dry-run shows"), (arguments.tag is not None, "--tag marks")):
            if given:
                raise HarnessError(f"{option} what --publish would send: give both")
        return
    if arguments.epochs is not None:
        raise HarnessError("--publish sends the checkpoints of full runs: leave --epochs out")
    try:
        store = open_store(arguments.publish)
    except StoreError as error:
        raise HarnessError(f"--publish: {error}") from None
    if isinstance(store, DirectoryStore) and arguments.tag is not None:
        raise HarnessError(f"{arguments.publish} is a directory and has no tags: leave --tag out")


def _device(name: str) -> torch.device:
    try:
        return resolve_device(name)
    except CnvzooError as error:
        raise HarnessError(f"--device {name}: {error}") from None


def _train(
    runs: Sequence[Run],
    arguments: argparse.Namespace,
    device: torch.device | None,
    deadline: float | None,
    train: Callable[..., RunRecord] | None,
    outputs: Outputs,
) -> Outcome:
    """Train the runs: in worker processes if several go at once on a CPU, else in this process.

    Without a device, on a Ray cluster.
    """
    threads, records = arguments.threads, outputs.records
    run_all = partial(execute, runs, records=records, deadline=deadline, say=print_line, on_finished=outputs.update)
    if not runs:
        return Outcome()
    if device is None:
        with joined_cluster():
            on_cluster = RayRunner(threads, cluster_device(arguments.device), deadline, print_line, train or run_recipe)
            return run_all(on_cluster, at_once=arguments.at_once or on_cluster.at_once)
    at_once = min(arguments.at_once or default_runs_at_once(device, threads), len(runs))
    if train is None and device.type == "cpu" and at_once > 1:
        runner: Runner = ProcessRunner(threads, deadline, print_line, run_recipe)
    else:
        own_stream = device.type == "cuda" and at_once > 1
        runner = LocalRunner(train or run_recipe, device, deadline, own_stream=own_stream)
    with process_settings(device, threads):
        return run_all(runner, at_once=at_once)


def _print_tables(
    arguments: argparse.Namespace, selected: Sequence[Entry], seeds: Sequence[int], outputs: Outputs
) -> None:
    console, records = Console(), outputs.records
    survey, entries = records.survey(), list(records.entries.values())
    recipes = recipes_scored(entries, records.layout)
    for table in TABLES:
        if arguments.table in ("all", table):
            members = [entry for entry in entries if entry.table == table]
            print_table(console, table, rows(members, survey, outputs.references, recipes))
    print_trials(console, records.trials(selected, seeds, arguments.epochs))


def _conclude(outcome: Outcome, verified: Sequence[Verification], retrain: bool) -> int:
    """Say what is missing or not as it should be, and what to do about it; returns the exit status."""
    if outcome.failed:
        print_line(f"failed, see above: {', '.join(map(str, outcome.failed))}")
    different = [result for result in verified if result.problem]
    for result in different:
        print_line(f"{result.name} fails its verification: {result.problem}")
    if len(verified) > len(different):
        print_line(
            f"{len(verified) - len(different)} checkpoints verified: their files, and their accuracy on the test set"
        )
    if outcome.stopped and not outcome.left:
        print_line(f"stopped ({outcome.stopped}) after the last run; the same command verifies the checkpoints")
    if outcome.left:
        again = ", after training the finished ones once more: choose with --entry and --seeds" if retrain else ""
        why = f"stopped ({outcome.stopped})" if outcome.stopped else "another process is training the rest"
        print_line(f"{why}; the same command resumes here{again}. Left, {len(outcome.left)} in all:")
    for run in outcome.left[:_LEFT_SHOWN]:
        print_line(f"  {run}: {_progress(run, outcome)}")
    if len(outcome.left) > _LEFT_SHOWN:
        print_line(f"  and {len(outcome.left) - _LEFT_SHOWN} more")
    if outcome.stopped is not None and not different:
        return _EXIT[outcome.stopped]
    if outcome.failed or different:
        return 1
    return _EXIT_LEFT_TO_OTHERS if outcome.left else 0


def _progress(run: Run, outcome: Outcome) -> str:
    if run in outcome.elsewhere:
        return "another process is training it"
    return f"state in {shown(run.run_dir)}" if run.started else "not started"


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
        "--on",
        choices=("this-machine", "ray"),
        default="this-machine",
        help="ray: the Ray cluster of RAY_ADDRESS, or a new one on this machine; --device is then that of its nodes",
    )
    add(
        "--epochs",
        type=_whole("epochs"),
        metavar="N",
        help="at most N epochs per run; a run of fewer than its recipe's is a trial: it enters no table and is kept in "
        "<runs>/trials",
    )
    add(
        "--time-limit", type=_seconds, metavar="SECONDS", help="stop after this time, with the state of every run saved"
    )
    add(
        "--at-once",
        type=_whole("runs"),
        metavar="N",
        help="train N runs at once (default: on a CPU the usable cores divided by --threads, on a GPU 3; on Ray the "
        "same for all of its nodes); each needs its own memory; its bits do not depend on N",
    )
    add(
        "--threads",
        type=_whole("threads", most=1024),
        default=1,
        metavar="N",
        help="threads of one run on a CPU (default: 1). The bits of a run depend on it, so it is the same on every "
        "machine unless you choose another; a record states the number that it was made with",
    )
    add(
        "--runs",
        type=Path,
        metavar="DIR",
        help="where weights and the state of runs under way are kept (default: runs/ in the checkout)",
    )
    add("--publish", metavar="TO", help="publish the checkpoints at the end: to a directory, or to hf://ORG")
    add("--tag", help="with --publish: a tag to set at each, such as a release; it is never moved")
    add("--dry-run", action="store_true", help="with --publish: train nothing, only show what would be sent")
    add("--list", action="store_true", help="print the status of every run of the entries, and do nothing else")
    add(
        "--retrain",
        action="store_true",
        help="train again what has a record, which the finished run replaces; an interrupted run is resumed",
    )
    return parser


def _whole(what: str, most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text) if text.isascii() and text.isdigit() else 0
        if number < 1 or (most is not None and number > most):
            allowed = "1 or more" if most is None else f"from 1 to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {what}: a whole number, {allowed}")
        return number

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
