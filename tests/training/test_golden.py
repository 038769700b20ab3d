"""Bits are frozen: today's code gives the weights that golden.json has, or NUMERICS is another.

Where golden.json has the family for this kind of machine, the sha256 has to be the one there. Elsewhere the losses have
to agree to a tolerance, and two runs bit for bit, so the tests never pass without having compared anything.
"""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

import golden
import pytest
import torch
from harness.entries import load_entries

from cnvzoo.data import Augmentation
from cnvzoo.training import NUMERICS, Recipe

CONFIGS = Path(__file__).resolve().parents[2] / "benchmarks" / "configs"
DOCS = Path(__file__).resolve().parents[2] / "docs"


def check(name: str, folder: Path, device: str) -> None:
    found = golden.values_of(golden.run_family(name, folder / "run", device))
    expected = golden.expected_here(device) or {}
    if name in expected:
        assert found == expected[name], (
            f"{name}: training gives other weights than golden.json has for arithmetic version {NUMERICS}: take the "
            "change back, or raise cnvzoo.training.NUMERICS and write golden.json anew (tests/training/golden.py)"
        )
        return
    again = golden.values_of(golden.run_family(name, folder / "again", device))
    assert again == found, f"{name}: two runs on this machine differ"
    assert found["losses"] == pytest.approx(golden.reference(golden.read(), name)["losses"], rel=golden.TOLERANCE)


@pytest.mark.parametrize("name", golden.FAMILIES)
def test_golden_bits(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, "cpu")


@pytest.mark.cuda
@pytest.mark.parametrize("name", golden.FAMILIES)
def test_golden_bits_on_a_gpu(name: str, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    check(name, tmp_path, "cuda")


def test_the_golden_file_is_of_this_version_of_the_arithmetic() -> None:
    kept = golden.read()
    assert kept["numerics"] == NUMERICS
    families = [machine["families"] for machine in kept["machines"]]
    assert set().union(*families) == golden.FAMILIES.keys()
    for name, values in chain.from_iterable(machine.items() for machine in families):
        assert values["losses"] == pytest.approx(golden.reference(kept, name)["losses"], rel=golden.TOLERANCE), name
    assert f"## Version {NUMERICS}\n" in (DOCS / "numerics.md").read_text(), "docs/numerics.md says what changed"


def kinds(recipe: Recipe) -> set[tuple[str, object]]:
    """What decides which code a recipe runs; numbers that only scale something are left out.

    Quantized ResNets of all depths run the same code, on the same widths.
    """
    augmentation = recipe.augmentation
    return {
        ("model", re.sub(r"^quant_resnet\d+", "quant_resnet", recipe.tag)),
        ("optimizer", recipe.optimizer.name),
        ("momentum", recipe.optimizer.momentum > 0),
        ("label_smoothing", recipe.label_smoothing > 0),
        *((f"augmentation.{key}", bool(getattr(augmentation, key))) for key in Augmentation.model_fields),
        ("early_crops", recipe.early_crops is not None),
        ("float_start of a float net" if recipe.w_bits is None else "float_start", recipe.float_start is not None),
        ("quantize_bias", recipe.quantize_bias),
        ("teachers", len(recipe.teacher)),
        ("views", recipe.distillation.views is not None),
        ("standardize", recipe.distillation.standardize),
        (f"optimizer of {re.sub(r'^quant_resnet[0-9]+', 'quant_resnet', recipe.model)}", recipe.optimizer.name),
    }


def test_every_entry_has_a_golden_family_for_all_that_it_uses() -> None:
    covered = set().union(*(kinds(golden.recipe_of(name)) for name in golden.FAMILIES))
    for entry in load_entries(CONFIGS).values():
        missing = kinds(entry.recipe) - covered
        assert not missing, f"{entry.path.name} uses {missing}, which no family of golden.py covers: add one"


def test_other_bits_are_not_written_without_a_new_version() -> None:
    kind, values = {"capability": "AVX512"}, {"cnv": {"sha256": "a" * 64, "losses": [2.0, 1.0]}}
    kept = golden.merged({"numerics": NUMERICS, "machines": []}, kind, values)
    assert golden.merged(kept, kind, values) == kept
    with pytest.raises(ValueError, match=f"cnv: other bits than golden.json has for arithmetic version {NUMERICS}"):
        golden.merged(kept, kind, {"cnv": {"sha256": "b" * 64, "losses": [2.0, 1.0]}})
    elsewhere = golden.merged(kept, {"capability": "AVX2"}, {"cnv": {"sha256": "b" * 64, "losses": [2.0, 1.0]}})
    assert [machine["kind"] for machine in elsewhere["machines"]] == [kind, {"capability": "AVX2"}]
    older = golden.merged(kept | {"numerics": NUMERICS - 1}, kind, {"cnv": {"sha256": "b" * 64, "losses": [2.0, 1.0]}})
    assert older["machines"][0]["families"]["cnv"]["sha256"] == "b" * 64
