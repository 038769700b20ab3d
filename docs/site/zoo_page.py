"""The table of all published checkpoints, written into docs/zoo.md when the site is built.

Everything in it is read from files of the repository: the index of the package, the configs of the checkpoints, and
the measurements of benchmarks/speed.
"""

from __future__ import annotations

import json
from pathlib import Path

from cnvzoo.checkpoints.folder import read_config
from cnvzoo.checkpoints.index import CheckpointInfo, list_checkpoints, read_index
from cnvzoo.training import PUBLISHED_SEED

COLUMNS = ("checkpoint", "dataset", "bits", "accuracy, %", "bytes", "MACs", "latency, ms", "from", "Python")
WORDS = ("checkpoint", "dataset", "from", "Python")  # columns that are not numbers
FLOAT_RUNTIME, INTEGER_RUNTIME = "ONNX Runtime float32", "ours, ONNX Runtime"  # as benchmarks/speed/infer.json has them


def table(root: Path) -> str:
    """A Markdown table with a row for each checkpoint, in a container of class `zoo`, and the cards it leads to."""
    measured = latencies(root)
    rows = [_row(root, info, measured.get(info["name"])) for info in list_checkpoints()]
    rule = ["---" if name in WORDS else "--:" for name in COLUMNS]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in (COLUMNS, rule, *rows))
    cards = "\n".join(f"/hub/{info['name']}/README" for info in list_checkpoints())
    return f"::::{{container}} zoo\n\n{text}\n\n::::\n\n:::{{toctree}}\n:hidden:\n:maxdepth: 1\n\n{cards}\n:::\n"


def latencies(root: Path) -> dict[str, float]:
    """Milliseconds for one image, by checkpoint, where the measured weights are those that are published."""
    measured = json.loads((root / "benchmarks" / "speed" / "infer.json").read_text(encoding="utf-8"))
    published = read_index().checkpoints
    found = {}
    for name, files in measured["checkpoints"].items():
        if name not in published or any(published[name].files[file].sha256 != sha for file, sha in files.items()):
            continue
        for contender in measured["contenders"]:
            runtime = INTEGER_RUNTIME if "_w" in name else FLOAT_RUNTIME
            milliseconds = contender["milliseconds"]
            if contender["runtime"] == runtime and contender["net"] == name.partition(".")[0] and "1" in milliseconds:
                found[name] = milliseconds["1"]
    return found


def bits(info: CheckpointInfo) -> str:
    """`float`, or the bits of weights and activations, such as 4/4."""
    return "float" if info["w_bits"] is None else f"{info['w_bits']}/{info['a_bits']}"


def _row(root: Path, info: CheckpointInfo, milliseconds: float | None) -> tuple[str, ...]:
    name = info["name"]
    entry = read_config(root / "hub" / name).recipe["name"]
    recipe, record = f"configs/{entry}.yaml", f"results/{entry}/seed{PUBLISHED_SEED}.json"
    return (
        f"[{name}](../hub/{name}/README.md)",
        info["dataset"],
        bits(info),
        f"{info['accuracy']:.2f}",
        f"{info['bytes']:,}",
        f"{info['macs']:,}",
        "" if milliseconds is None else f"{milliseconds:.2f}",
        f"[recipe](../benchmarks/{recipe}), [record](../benchmarks/{record})",
        f'`cnvzoo.create_model("{name}", pretrained=True)`',
    )
