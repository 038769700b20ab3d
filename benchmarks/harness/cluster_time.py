"""How long all runs of the datasets' tables take on so many cores: a simulation with the measured seconds of each.

A run that has no record of one thread of a CPU is estimated from those that have one, by multiply-accumulates.
"""

from __future__ import annotations

import functools
import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from cnvzoo.data.published import dataset_info
from cnvzoo.models.registry import model_info
from cnvzoo.training.recipe import PUBLISHED_SEED, Recipe
from harness.entries import EXTRA, SEEDS, Entry, Layout
from harness.records import Records, Survey
from harness.schedule import Run, make_plan, needed_entries

CORES = (1, 8, 64, 512)
_PASSES = 3  # of the net in a step: forward, and backward to the inputs and to the weights
MEASURED = "measured"
# how a run is estimated: by the mean of the closest runs that are measured
_KINDS = ("another seed", "another dataset", "another net of the same family", "nets of other families")


@dataclass(frozen=True)
class Cost:
    """The seconds of one run on one core, and how they are known: MEASURED or one of `_KINDS`."""

    seconds: float
    source: str


def run_costs(entries: Iterable[Entry], survey: Survey) -> dict[tuple[str, int], Cost]:
    """The cost of every run, by entry and seed. Empty if no run is measured."""
    entries = list(entries)
    measured = {
        (entry.name, seed): record.seconds
        for entry in entries
        for seed in SEEDS
        if (record := survey[entry.name, seed].record) is not None
        and (record.device["kind"], record.device.get("threads")) == ("cpu", 1)
    }
    if not measured:
        return {}
    rates: dict[object, list[float]] = {}  # seconds for each unit of work, of the runs that share a key
    for entry in entries:
        for seed in SEEDS:
            if (entry.name, seed) in measured:
                for key in _keys(entry.recipe):
                    rates.setdefault(key, []).append(measured[entry.name, seed] / work(entry.recipe))
    costs = {}
    for entry in entries:
        kind, key = next((k, key) for k, key in zip(_KINDS, _keys(entry.recipe), strict=True) if key in rates)
        estimate = Cost(fmean(rates[key]) * work(entry.recipe), kind)
        for seed in SEEDS:
            run = entry.name, seed
            costs[run] = Cost(measured[run], MEASURED) if run in measured else estimate
    return costs


def _keys(recipe: Recipe) -> tuple[object, ...]:
    """What runs of similar rate share, the most similar ones first: see `_KINDS`."""
    bits = (recipe.w_bits, recipe.a_bits)
    family = re.sub(r"\d+$", "", recipe.model)
    return recipe.name, (recipe.model, *bits), family, None


def work(recipe: Recipe) -> float:
    """Multiply-accumulates of a run: steps of the net, and what its teachers compute."""
    info = dataset_info(recipe.dataset)
    size = info.image_size
    crops = recipe.early_crops
    on_crops, share = (crops.epochs, (crops.side / size) ** 2) if crops else (0, 0.0)
    views = recipe.distillation.views or recipe.epochs

    def passes(most: int) -> float:
        """Cost of the epochs, in epochs on whole images, if at most so many of each kind (whole, crops) are counted."""
        return min(recipe.epochs - on_crops, most) + share * min(on_crops, most)

    teachers = sum(_macs(model, info.in_chans, size) for model in recipe.teacher_models)
    student = _macs(recipe.model, info.in_chans, size)
    return info.train_size * (_PASSES * student * passes(recipe.epochs) + teachers * passes(views))


@functools.cache
def _macs(model: str, in_chans: int, size: int) -> int:
    name = model.removeprefix("quant_")  # the same graph, which is faster to build
    return model_info(name, in_chans=in_chans, input_size=None if name == "cnv" else size).macs


def list_schedule(
    runs: Sequence[Run], seconds: Callable[[Run], float], needs: Callable[[Run], Iterable[Run]], cores: int
) -> float:
    """Seconds until all runs are done, if each free core takes the first run that can start, as `execute` does."""
    waiting, done = list(runs), set[Path]()
    under_way: list[tuple[float, int]] = []  # when each ends, with its number
    now = 0.0
    while waiting or under_way:
        while len(under_way) < cores:
            ready = next((r for r in waiting if all(needed.run_dir in done for needed in needs(r))), None)
            if ready is None:
                break
            waiting.remove(ready)
            heapq.heappush(under_way, (now + seconds(ready), runs.index(ready)))
        now, number = heapq.heappop(under_way)
        done.add(runs[number].run_dir)
    return now


def critical_path(
    runs: Sequence[Run], seconds: Callable[[Run], float], needs: Callable[[Run], Iterable[Run]]
) -> list[Run]:
    """The chain of runs, each of which needs the one before, that takes longest."""
    longest: dict[Path, tuple[float, list[Run]]] = {}
    for run in runs:  # what a run needs comes before it
        before = max((longest[needed.run_dir] for needed in needs(run)), key=lambda chain: chain[0], default=(0.0, []))
        longest[run.run_dir] = before[0] + seconds(run), [*before[1], run]
    return max(longest.values(), key=lambda chain: chain[0])[1]


def cluster_table(records: Records) -> str:
    """The part of docs/cluster.md that follows from the records."""
    entries = {name: entry for name, entry in records.entries.items() if entry.table != EXTRA}
    waiting = list(entries.values())
    while waiting:  # what they start or learn from, and so on
        for needed in needed_entries(waiting.pop(), records.entries):
            if needed.name not in entries:
                entries[needed.name] = needed
                waiting.append(needed)
    costs = run_costs(entries.values(), records.survey())
    if not costs:
        return "No run has been measured on a CPU yet."
    nowhere = Path("nowhere")  # as if nothing had been trained
    empty = Records(records.entries, Layout(home=nowhere, runs=nowhere, hub=nowhere))
    runs = [
        run
        for run in make_plan(list(entries.values()), SEEDS, records=empty)
        if (run.entry.name, run.seed) in costs and (run.entry.table != EXTRA or run.seed == PUBLISHED_SEED)
    ]
    by_name = {(run.entry.name, run.seed): run for run in runs}

    def seconds(run: Run) -> float:
        return costs[run.entry.name, run.seed].seconds

    def needs(run: Run) -> list[Run]:
        return [by_name[needed.name, PUBLISHED_SEED] for needed in needed_entries(run.entry, records.entries)]

    total = sum(map(seconds, runs))
    lines = ["| cores | hours | cores busy |", "| --: | --: | --: |"]
    for cores in CORES:
        end = list_schedule(runs, seconds, needs, cores)
        lines.append(f"| {cores} | {end / 3600:,.1f} | {100 * total / end / cores:.0f} % |")
    chain = critical_path(runs, seconds, needs)
    steps = ", then ".join(f"{run} ({seconds(run) / 3600:.1f})" for run in chain)
    return "\n".join(
        [
            *lines,
            "",
            f"The {len(runs)} runs take {total / 3600:,.1f} core hours. The longest chain of runs, each of "
            f"which needs the weights of the one before, takes {sum(map(seconds, chain)) / 3600:,.1f} hours, which no "
            f"number of cores shortens: {steps}. " + _sources(costs),
        ]
    )


def _sources(costs: Mapping[tuple[str, int], Cost]) -> str:
    counts = Counter(cost.source for cost in costs.values())
    others = [f"{counts[kind]} from {kind}" for kind in _KINDS if counts[kind]]
    text = f"{counts[MEASURED]} runs are measured, on one core of the machines named in the records"
    return f"{text}; the others are estimated by multiply-accumulates: {', '.join(others)}." if others else f"{text}."
