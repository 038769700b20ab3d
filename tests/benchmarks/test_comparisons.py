"""The comparisons on held-out images: those here are valid, and wrong ones are refused by line and key."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparisons import load_comparisons
from harness.entries import HarnessError
from workbench import BENCHMARKS

VALID = """\
- entries: [_base]
  date: 2026-11-27
  command: cnvzoo train a.yaml --holdout 5000
  machine: a CPU
  versions: torch 2.14.1
  holdout: 5000
  seed: 0
  epochs: 20
  variants:
    - {name: sgd, change: as it is, accuracy: 90.0, seconds_per_epoch: [98, 107]}
    - {name: muon, change: {optimizer: {name: muon}}, correct: 4526}
  chosen: muon
"""


def write(folder: Path, text: str) -> tuple[Path, Path]:
    configs = folder / "configs"
    configs.mkdir()
    for name in ("_base", "mnist_cnv"):
        (configs / f"{name}.yaml").touch()
    path = folder / "comparisons.yaml"
    path.write_text(text)
    return path, configs


def test_the_comparisons_of_this_repository_are_valid():
    comparisons = load_comparisons(BENCHMARKS / "comparisons.yaml", BENCHMARKS / "configs")
    assert {name for comparison in comparisons for name in comparison.entries} >= {"cifar10_cnv", "mnist_cnv"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("accuracy: 90.0", "accuracy: 90.01"), "10: variants.0.accuracy: 90.01: 4500.50 of 5000 images, not a whole"),
        (
            ("accuracy: 90.0", "accuracy: 190"),
            "10: variants.0.accuracy: 190: input should be less than or equal to 100",
        ),
        (("accuracy: 90.0", "correct: 9, accuracy: 1"), "10: variants.0: give either correct or accuracy"),
        (("correct: 4526", "correct: 5001"), "11: variants.1.correct: 5001: more than the 5000 images held out"),
        (("name: muon,", "name: sgd,"), "11: variants.1.name: 'sgd': the name of another variant too"),
        (("chosen: muon", "chosen: mouon"), "12: chosen: 'mouon': no variant: did you mean 'muon'?"),
        (("  machine: a CPU\n", ""), "1: machine: missing: add it"),
        (("correct: 4526", "correct: 4526, corect: 1"), "11: variants.1.corect: unknown key: did you mean 'correct'?"),
        (("seed: 0", "sead: 0"), "7: sead: unknown key: did you mean 'seed'?"),
        (
            ("[_base]", "[mnist_cnv, mnist_cvn]"),
            "1: entries: no recipe is named 'mnist_cvn': did you mean 'mnist_cnv'?",
        ),
        (("seed: 0", "seed: -3"), "7: seed: -3: input should be greater than or equal to 0"),
        (("[98, 107]", "[107, 98]"), "10: variants.0: seconds_per_epoch: give the least first, then the most"),
        (("[98, 107]", "[98, 107, 110]"), "10: variants.0.seconds_per_epoch"),
        (("2026-11-27", "2026-99-99"), "2: date: '2026-99-99': month must be in 1..12"),
        (("2026-11-27", "27.11.2026"), "2: date: '27.11.2026': string should match pattern"),
        ((VALID, "entries: []\n"), "1: comparisons are a list, not dict"),
    ],
)
def test_a_wrong_comparison_is_refused_by_line_and_key(tmp_path, change, complaint):
    with pytest.raises(HarnessError) as caught:
        load_comparisons(*write(tmp_path, VALID.replace(*change)))
    assert f"{tmp_path / 'comparisons.yaml'}:{complaint}" in str(caught.value)
