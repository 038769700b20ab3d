"""A temporary benchmarks folder and a fake training that takes no time, to test which runs are trained, and when."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness.entries import load_entries
from reproduce import main
from safetensors import safe_open
from safetensors.torch import save_file

from cnvzoo.checkpoints.format import IntegerResult
from cnvzoo.checkpoints.verify import Verification
from cnvzoo.data import dataset_info, published_sha256
from cnvzoo.deploy import DeployError
from cnvzoo.files import sha256_of
from cnvzoo.models import build_model
from cnvzoo.training import NUMERICS, RunError, RunInterrupted, RunRecord

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SPEED = BENCHMARKS / "speed"
FLOAT, QUANTIZED = "cifar10_cnv", "cifar10_quant_cnv_w4a4"

CPU = {"kind": "cpu", "name": "A CPU", "threads": 2}


def make_record(recipe: Any, seed: int = 0, /, *, accuracy: float = 90.0, **changes: Any) -> RunRecord:
    """A record as run_recipe leaves it, with `changes`."""
    values = {
        "entry": recipe.name,
        "seed": seed,
        "numerics": NUMERICS,
        "epochs": recipe.epochs,
        "trial": False,
        "holdout": 0,
        "accuracy": accuracy,
        "correct": round(100 * accuracy),
        "total": 10000,
        "recipe": recipe.model_dump(mode="json") | {"seed": seed},
        "recipe_sha256": recipe.fingerprint(),
        "data_sha256": published_sha256(recipe.dataset),
        "weights_sha256": f"{seed:064x}",  # inputs are of seed 0
        "seconds": 90.0,
        "device": CPU,
        "versions": {"torch": "2.14.1", "python": "3.11.9"},
        "commit": None,
        "float_start": next(iter(inputs(recipe, "float_start")), None),
        "teacher": inputs(recipe, "teacher") or None,
        "finished": "2025-01-01T00:00:00+00:00",
    } | changes
    history = [{"epoch": n + 1, "loss": 2.0, "lr": 0.1, "seconds": 1.0} for n in range(values["epochs"])]
    return RunRecord.model_validate({"history": history} | values)


def inputs(recipe: Any, purpose: str, *weights: Path) -> list[dict[str, Any]]:
    """What a record says of the weights that a run used; without files, the checksums are those of `make_record`."""
    digests = [sha256_of(path) for path in weights] or ["0" * 64] * len(recipe.needs.get(purpose, ()))
    entries = recipe.needs.get(purpose, ())
    return [{"entry": e, "seed": 0, "weights_sha256": sha} for e, sha in zip(entries, digests, strict=True)]


@functools.cache
def _state(model: str, dataset: str, w_bits: int | None, a_bits: int | None) -> dict[str, torch.Tensor]:
    info = dataset_info(dataset)
    bits = {} if w_bits is None else {"w_bits": w_bits, "a_bits": a_bits}
    return build_model(model, num_classes=info.num_classes, in_chans=info.in_chans, **bits).state_dict()


def write_weights(path: Path, recipe: Any, label: str) -> None:
    """Write initial weights of the recipe's model; files with different labels have different bytes."""
    save_file(_state(recipe.model, recipe.dataset, recipe.w_bits, recipe.a_bits), path, metadata={"label": label})


def label_of(weights: Path) -> str:
    with safe_open(weights, "pt") as file:
        return file.metadata()["label"]


@dataclass
class FakeTraining:
    """Replaces run_recipe: writes the same files, keeps the arguments of calls, and stops or fails where asked to."""

    accuracy: Callable[[str, int], float] = lambda name, seed: 90.0 + seed
    variant: str = ""  # makes other bytes of weights, as another machine would
    stop_at: dict[tuple[str, int], str] = field(default_factory=dict)
    fail_at: set[tuple[str, int]] = field(default_factory=set)
    calls: list[tuple[str, int]] = field(default_factory=list)
    options: list[dict[str, Any]] = field(default_factory=list)
    resumed: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self, recipe: Any, *, run_dir: Path, seed: int, epochs: int | None, **options: Any) -> RunRecord:
        weights_given = {"float_start": None, "teacher": None} | {
            k: options.pop(k) for k in recipe.needs if k in options
        }
        key = (recipe.name, seed)
        self.calls.append(key)
        self.options.append({"epochs": epochs, "run_dir": run_dir, **weights_given, **options})
        if any(weights_given[purpose] is None for purpose in recipe.needs):
            raise RunError("weights are missing")
        given = {k: v if isinstance(v, list) else [v] for k, v in weights_given.items() if v is not None}
        record_path, weights, state = (run_dir / n for n in ("record.json", "weights.safetensors", "state.safetensors"))
        if record_path.exists() and weights.exists():
            record = RunRecord.read(record_path)
            if record.recipe_sha256 == recipe.fingerprint():
                return record  # run_recipe does so with a finished run
        run_dir.mkdir(parents=True, exist_ok=True)
        if state.exists():
            self.resumed.append(key)
        if key in self.fail_at:
            raise RunError(f"{recipe.name} failed as the test wants")
        if reason := self.stop_at.pop(key, None):
            state.touch()
            raise RunInterrupted(f"{recipe.name}, seed {seed}", reason, 3, 10, run_dir)
        write_weights(weights, recipe, f"{self.variant}{key}")
        record = make_record(
            recipe,
            seed,
            accuracy=self.accuracy(*key),
            weights_sha256=sha256_of(weights),
            epochs=epochs or recipe.epochs,
            trial=epochs is not None,
            float_start=next(iter(inputs(recipe, "float_start", *given.get("float_start", []))), None),
            teacher=inputs(recipe, "teacher", *given.get("teacher", [])) or None,
        )
        record.write(record_path)
        state.unlink(missing_ok=True)
        return record


class Bench:
    """A temporary benchmarks folder with recipes, and the command line of reproduce.py on it."""

    def __init__(self, root: Path) -> None:
        self.home, self.runs, self.hub = root / "benchmarks", root / "runs", root / "hub"
        self.training = FakeTraining()
        self.train: Callable[..., RunRecord] = self.training
        self.verified: list[list[str]] = []
        self.devices: set[str] = set()
        self.measured: list[tuple[str, str]] = []
        self.unmeasurable: str | None = None
        self.problem: str | None = None
        self.unproven: str | None = None
        self.missing_data = False
        (self.home / "configs").mkdir(parents=True)
        self.write_references("")

    def write_references(self, text: str) -> None:
        (self.home / "references.yaml").write_text(text)

    def recipe(self, name: str, *, file: str | None = None, epochs: int = 10, **extra: Any) -> Path:
        """Write the recipe called `<dataset>_<model>[_w<W>a<A>]` to its file, or to `file`."""
        dataset = next(d for d in ("fashion_mnist", "mnist", "cifar100", "cifar10") if name.startswith(f"{d}_"))
        model, _, bits = name.removeprefix(f"{dataset}_").partition("_w")
        values: dict[str, Any] = {"model": model, "dataset": dataset, "epochs": epochs, "batch_size": 100}
        if bits:
            w_bits, a_bits = bits.split("a")
            values |= {"w_bits": int(w_bits), "a_bits": int(a_bits)}
        path = self.home / "configs" / f"{file or name}.yaml"
        path.write_text(json.dumps(values | {"optimizer": {"lr": 0.1}} | extra))  # JSON is YAML
        return path

    def entry(self, name: str) -> Any:
        return load_entries(self.home / "configs")[name]

    def result(self, name: str, seed: int = 0) -> Path:
        return self.home / "results" / name / f"seed{seed}.json"

    def put(self, name: str, seed: int = 0, /, **changes: Any) -> RunRecord:
        """Write a record of the current recipe to the results, as if it were copied from another machine."""
        record = make_record(self.entry(name).recipe, seed, **changes)
        record.write(self.result(name, seed))
        return record

    def run(self, *arguments: str) -> int:
        argv: Sequence[str] = ("--device", "cpu", "--runs", str(self.runs), "--at-once", "1", *arguments)
        return main(argv, home=self.home, train=self.train, verify=self.verify, measure=self.measure)

    def verify(
        self, names: list[str] | list[Path], *, hub: Path | None = None, device: str = "auto"
    ) -> list[Verification]:
        """Replaces cnvzoo.verify: keeps names and devices of the calls, and reports `problem` for each of the names.

        For folders that are to be published, which are given as paths, it reports `unproven`.
        """
        self.devices.add(device)
        if hub is None:
            return [Verification(str(p), problem=self.unproven, missing_data=self.missing_data) for p in names]
        assert hub == self.hub
        self.verified.append([str(name) for name in names])
        return [Verification(str(name), problem=self.problem) for name in names]

    def measure(self, model: Any, dataset: str) -> IntegerResult:
        """Replaces cnvzoo.deploy.export.measure_integer: keeps the arguments of each call."""
        self.measured.append((model.pretrained_cfg.name, dataset))
        if self.unmeasurable:
            raise DeployError(self.unmeasurable)
        return IntegerResult(correct=8990, agreeing=9991, differing=2, reachable=1000, bytes=500)

    @property
    def page(self) -> str:
        return (self.home / "RESULTS.md").read_text()
