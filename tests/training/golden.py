"""Golden bits: small runs of every kind that the tables need, and the sha256 of the weights that they have to give.

    python tests/training/golden.py            compare this machine's weights with golden.json
    python tests/training/golden.py --write    write them there, with those of other kinds of machines left as they are

A changed bit without a new `cnvzoo.training.NUMERICS` is refused, also by --write: raise the version, say in
docs/numerics.md what changed, and write again. Golden values are kept for each kind of machine (processor's kernels,
compiler, versions); a machine of another kind, or a family that was added on another kind since, compares losses with
those of the first machine that has the family, to a tolerance.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from synthetic import noise

from cnvzoo.data import Dataset, dataset_info
from cnvzoo.files import write_text
from cnvzoo.models import build_model
from cnvzoo.training import NUMERICS, Recipe, RunRecord, recipe_from_dict, run_recipe
from cnvzoo.training.device import deterministic
from cnvzoo.training.numerics import describe_machine

FILE = Path(__file__).with_name("golden.json")
# of the mean loss of an epoch, relative: kernels of another instruction set, or loops that run uncompiled, round
# otherwise. On one CPU, over all families, at most 0.04 between AVX2 or uncompiled loops and compiled ones of AVX512.
TOLERANCE = 0.12
# what tells kinds of machines apart, of `describe_machine`: the number of threads is 1, and the name decides nothing
_KIND = ("kind", "capability", "onednn", "precision", "loops", "compiler", "kernels")
_PACKAGES = ("torch", "numpy", "brevitas")

# rates are low, so that two epochs from nothing do not amplify what machines round otherwise
_SGD: dict[str, Any] = {"name": "sgd", "lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4}
_MUON: dict[str, Any] = {"name": "muon", "lr": 0.005, "weight_decay": 0.05, "sgd_lr": 0.02, "sgd_weight_decay": 5e-4}
_CIFAR: dict[str, Any] = {"crop_padding": 4, "flip": True}
# temperature and standardized logits of CIFAR-100's recipes; the logits of this untrained teacher stay small
_MUON_DISTILLED: dict[str, Any] = {
    "optimizer": _MUON,
    "early_crops": {"side": 24, "epochs": 1},
    "teacher": "cifar10_mobilenet_v1",
    "distillation": {"views": 1, "temperature": 2.0, "standardize": True},
    "augmentation": _CIFAR | {"cutout": 8},
}
_QUANTIZED: dict[str, Any] = {
    "optimizer": _SGD | {"lr": 0.01},
    "float_start": "cifar10_cnv",
    "quantize_bias": True,
}


@dataclass(frozen=True)
class Family:
    """A kind of run: its recipe, of two epochs, by the values that differ from `recipe_of`'s."""

    model: str
    dataset: str = "cifar10"
    bits: int | None = None
    images: int = 128
    values: dict[str, Any] = field(default_factory=dict)


FAMILIES = {
    "cnv": Family("cnv", values={"label_smoothing": 0.1, "augmentation": _CIFAR | {"cutout": 8}}),
    "cnv_digits": Family("cnv", "mnist", values={"label_smoothing": 0.1, "augmentation": {"crop_padding": 2}}),
    "cnv_muon": Family("cnv", values={"optimizer": _MUON, "augmentation": _CIFAR | {"cutout": 8}}),
    "mobilenet_v1": Family("mobilenet_v1", values={"label_smoothing": 0.1, "augmentation": _CIFAR | {"cutout": 8}}),
    "mobilenet_v1_distilled": Family(
        "mobilenet_v1",
        values={
            "early_crops": {"side": 24, "epochs": 1},
            "teacher": "cifar10_resnet32",
            "distillation": {"views": 1},
            "augmentation": _CIFAR | {"cutout": 8},
        },
    ),
    "mobilenet_v1_muon": Family("mobilenet_v1", images=64, values=_MUON_DISTILLED),
    "resnet18_muon": Family(
        "resnet18",
        "fashion_mnist",
        images=64,
        values={"optimizer": _MUON, "augmentation": {"crop_padding": 2, "flip": True, "cutout": 8}},
    ),
    "resnet20": Family(
        "resnet20",
        values={"optimizer": _MUON, "early_crops": {"side": 24, "epochs": 1}, "augmentation": _CIFAR | {"cutout": 8}},
    ),
    "resnet20_distilled": Family("resnet20", images=64, values=_MUON_DISTILLED),
    "resnet20_digits": Family("resnet20", "mnist", values={"augmentation": {"crop_padding": 2}}),
    **{
        f"resnet{depth}": Family(
            f"resnet{depth}",
            images=64,
            values={
                "optimizer": _MUON,
                "early_crops": {"side": 24, "epochs": 1},
                "label_smoothing": 0.1,
                "augmentation": _CIFAR | {"cutout": 12},
            },
        )
        for depth in (32, 44, 56, 110)
    },
    "resnet32_started": Family("resnet32", images=64, values=_MUON_DISTILLED | {"float_start": "cifar10_resnet20"}),
    "w8a8": Family("quant_cnv", bits=8, values=_QUANTIZED | {"label_smoothing": 0.1, "augmentation": {"cutout": 8}}),
    "w4a4": Family("quant_cnv", bits=4, values=_QUANTIZED | {"teacher": "cifar10_cnv", "augmentation": _CIFAR}),
    "w2a2": Family(
        "quant_cnv",
        bits=2,
        values=_QUANTIZED
        | {
            "teacher": ["cifar10_cnv", "cifar10_mobilenet_v1"],
            "distillation": {"views": 1},
            "augmentation": _CIFAR,
        },
    ),
    "w2a2_muon": Family(
        "quant_cnv",
        bits=2,
        images=64,
        values=_QUANTIZED
        | {
            "optimizer": _MUON,
            "teacher": ["cifar10_cnv", "cifar10_mobilenet_v1"],
            "distillation": {"views": 1},
            "augmentation": _CIFAR,
        },
    ),
    **{
        f"quant_resnet20_w{bits}a{bits}": Family(
            "quant_resnet20",
            bits=bits,
            values={
                "optimizer": _MUON,
                "early_crops": {"side": 24, "epochs": 1},
                "float_start": "cifar10_resnet20",
                "quantize_bias": True,
                "teacher": "cifar10_resnet32",
                "distillation": {"views": 1},
                "augmentation": _CIFAR,
            },
        )
        for bits in (4, 2)
    },
    "quant_mobilenet_v1_w4a4": Family(
        "quant_mobilenet_v1",
        bits=4,
        values={
            "optimizer": _SGD | {"lr": 0.01},
            "early_crops": {"side": 24, "epochs": 1},
            "float_start": "cifar10_mobilenet_v1",
            "quantize_bias": True,
            "teacher": "cifar10_resnet32",
            "distillation": {"views": 1},
            "augmentation": _CIFAR,
        },
    ),
    "w2a2_digits": Family("quant_cnv", "mnist", bits=2, values={"label_smoothing": 0.1, "float_start": "mnist_cnv"}),
}


def recipe_of(name: str) -> Recipe:
    """The recipe of a family: SGD, batches of 32."""
    family = FAMILIES[name]
    tag = family.model if family.bits is None else f"{family.model}_w{family.bits}a{family.bits}"
    values: dict[str, Any] = {
        "name": f"{family.dataset}_{tag}",
        "model": family.model,
        "dataset": family.dataset,
        "w_bits": family.bits,
        "a_bits": family.bits,
        "epochs": 2,
        "batch_size": 32,
        "optimizer": _SGD,
        "schedule": {"warmup_epochs": 1},
    }
    return recipe_from_dict(values | family.values, name)


def run_family(name: str, folder: Path, device: str = "cpu") -> RunRecord:
    """Train a family for its two epochs, by one thread on a CPU; its float start and teachers are untrained nets."""
    recipe, family = recipe_of(name), FAMILIES[name]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run_recipe(
            recipe,
            run_dir=folder,
            device=device,
            dataset=_images(family.dataset, family.images),
            float_start=_weights(recipe.float_start, folder) if recipe.float_start else None,
            teacher=[_weights(teacher, folder) for teacher in recipe.teacher] or None,
            quiet=True,
        )
    finally:
        torch.set_num_threads(before)


@functools.cache
def _images(dataset: str, count: int) -> Dataset:
    return noise(dataset, train=count, test=40)


def _weights(entry: str, folder: Path) -> Path:
    """Weights of a float entry: those that seed 0 initialises, with statistics that BatchNorm could have gathered."""
    dataset, _, model = entry.partition("_")
    info = dataset_info(dataset)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        state = build_model(model, num_classes=info.num_classes, in_chans=info.in_chans).state_dict()
    generator = torch.Generator().manual_seed(1)
    for key, tensor in state.items():
        if key.endswith("running_mean"):
            tensor.normal_(0, 0.1, generator=generator)
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
    path = folder.parent / f"{folder.name}-{entry}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    return path


def kind_of_machine(device: str = "cpu") -> dict[str, Any]:
    """What the bits of golden runs depend on here: the kernels of the machine, and the versions."""
    target = torch.device(device)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with deterministic(target):
            machine = describe_machine(target)
    finally:
        torch.set_num_threads(before)
    keys = (*_KIND, "name") if device != "cpu" else _KIND
    return {key: machine[key] for key in keys if key in machine} | {
        package: version(package).partition("+")[0] for package in _PACKAGES
    }


def read() -> dict[str, Any]:
    """`{"numerics": version, "machines": [{"kind": ..., "families": {name: {"sha256": ..., "losses": [...]}}}]}`."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {"numerics": 0, "machines": []}


def expected_here(device: str = "cpu") -> dict[str, Any] | None:
    """The golden values of this kind of machine, by family; None where none are kept."""
    kind = kind_of_machine(device)
    return next((machine["families"] for machine in read()["machines"] if machine["kind"] == kind), None)


def reference(kept: dict[str, Any], name: str) -> dict[str, Any]:
    """The values of a family on the first kind of machine that has it, of the golden file `kept`.

    Raises:
        ValueError: none has it.
    """
    for machine in kept["machines"]:
        if name in machine["families"]:
            return machine["families"][name]
    raise ValueError(f"{name}: {FILE.name} has no values of it: python tests/training/golden.py --write")


def values_of(record: RunRecord) -> dict[str, Any]:
    """What is kept of a golden run."""
    return {"sha256": record.weights_sha256, "losses": [epoch["loss"] for epoch in record.history]}


def merged(kept: dict[str, Any], kind: dict[str, Any], families: dict[str, Any]) -> dict[str, Any]:
    """The golden file with the values of a kind of machine.

    Raises:
        ValueError: a value differs from one that is kept for this version of the arithmetic.
    """
    machines = kept["machines"] if kept["numerics"] == NUMERICS else []
    others = [machine for machine in machines if machine["kind"] != kind]
    before = next((machine["families"] for machine in machines if machine["kind"] == kind), {})
    if changed := [name for name, values in families.items() if name in before and before[name] != values]:
        raise ValueError(
            f"{', '.join(changed)}: other bits than {FILE.name} has for arithmetic version {NUMERICS}: raise "
            "cnvzoo.training.NUMERICS, and say in docs/numerics.md what changed, or find the change and take it back"
        )
    families = {name: values for name, values in (before | families).items() if name in FAMILIES}
    return {"numerics": NUMERICS, "machines": [*others, {"kind": kind, "families": families}]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the values of this kind of machine")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    families = {}
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            families[name] = values_of(run_family(name, Path(folder) / "run", arguments.device))
        print(f"{name}: {families[name]['sha256'][:16]} {families[name]['losses']}", flush=True)
    expected = expected_here(arguments.device)
    if arguments.write:
        try:
            kept = merged(read(), kind_of_machine(arguments.device), families)
        except ValueError as error:
            print(f"golden.py: error: {error}", file=sys.stderr)
            return 1
        write_text(FILE, json.dumps(kept, indent=1) + "\n")
        return 0
    if expected is None:
        print("no golden values are kept for this kind of machine")
        return 0
    if missing := families.keys() - expected.keys():
        print(f"no golden values are kept for this kind of machine: {', '.join(sorted(missing))}")
    return int(any(families[name] != values for name, values in expected.items()))


if __name__ == "__main__":
    sys.exit(main())
