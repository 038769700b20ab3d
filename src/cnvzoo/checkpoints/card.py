"""The model card of a checkpoint: README.md of its folder, with the metadata that the Hub indexes.

It depends only on config.json and on the size of the model: the same checkpoint has the same card, byte for byte. A
config may come from anyone, so its text is escaped in sentences and tables, fenced in blocks and quoted in commands.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import yaml

from cnvzoo.checkpoints.folder import preprocessing_from
from cnvzoo.checkpoints.format import CheckpointConfig, IntegerResult
from cnvzoo.data.published import DatasetInfo, dataset_info, list_datasets

_INSTALLED = ("torch", "torchvision", "numpy", "brevitas")  # packages that pip installs for a reproduction

# Special characters within a line of Markdown on the Hub and GitHub; _ is one only at the start or end of a word.
_SPECIAL = re.compile(r"[\\`*\[\]<>|~&$@#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.", re.IGNORECASE)


def render_card(config: CheckpointConfig, summary: str, parameters: int, macs: int) -> str:
    """The text of a checkpoint's card.

    Args:
        config: config of the checkpoint.
        summary: one line about the topology, with its source.
        parameters, macs: from `cnvzoo.model_info`, for images of the size after preprocessing.
    """
    from huggingface_hub import ModelCard  # slow to import, and loading does not need it

    sections = [
        _opening(config, summary),
        *([_accuracy(config)] if config.accuracy is not None else []),
        _use(config),
        _preprocessing(config),
        _cost(config, parameters, macs),
        *([_integer(config, config.integer)] if config.integer else []),
        *([_recipe(config), _reproduce(config)] if config.recipe else []),
        _limits(config),
    ]
    return str(ModelCard(f"---\n{_metadata(config)}\n---\n\n" + "\n".join(sections)))


def _metadata(config: CheckpointConfig) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    info = _dataset_info(config)
    dataset = info.huggingface_id if info and info.huggingface_id else config.dataset
    bits = ["quantization", "quantization-aware-training", "brevitas", _bits(config)] if _is_quantized(config) else []
    known: dict[str, Any] = {}
    if dataset is not None:
        known["datasets"] = [dataset]
    if dataset is not None and config.correct is not None and config.total is not None:
        known |= {"metrics": ["accuracy"], "model_name": config.name}
        known["eval_results"] = [
            EvalResult(
                task_type="image-classification",
                task_name="Image Classification",
                dataset_type=dataset,
                dataset_name=info.title if info else dataset,
                dataset_split="test",
                metric_type="accuracy",
                metric_name="Top-1 accuracy",
                metric_value=config.correct / config.total,
            )
        ]
    return ModelCardData(
        license="apache-2.0" if config.results else None,  # of published ones; others are their owners'
        library_name="cnvzoo",
        pipeline_tag="image-classification",
        tags=["image-classification", "pytorch", config.model["name"], *bits],
        **known,
    ).to_yaml()


def _opening(config: CheckpointConfig, summary: str) -> str:
    kind = "Float weights"
    if _is_quantized(config):
        bits: dict[str, Any] = {"first_w_bits": 8} | config.model
        kind = (
            f"Weights of {bits['w_bits']} bits (first layer {bits['first_w_bits']}) and activations of "
            f"{bits['a_bits']} bits"
        )
        others = [f"{_escaped(layer)} {_widths(pair)}" for layer, pair in bits.get("bits", {}).items()]
        kind += f" (other weight / activation bits: {', '.join(others)})" if others else ""
    return f"# {config.name}\n\n{summary.rstrip('.')}. {kind}{_trained_on(config)}.{_trial(config)}\n"


def _widths(pair: Sequence[int | None]) -> str:
    return " / ".join("unchanged" if width is None else str(width) for width in pair)


def _trained_on(config: CheckpointConfig) -> str:
    return f", trained on {_title(config)} with cnvzoo" if config.dataset else ", saved with cnvzoo"


def _trial(config: CheckpointConfig) -> str:
    """What was not as in a full run of the recipe, for the run of a trial."""
    if config.trial is None:
        return ""
    trial, full = config.trial, _escaped(str(config.recipe.get("epochs")))
    text = f" The run was a trial of the recipe: {trial.epochs:,} of its {full} epochs"
    if trial.holdout:
        text += f", scored on {trial.holdout:,} held-out training images and not on the test set"
    return f"{text}."


def _accuracy(config: CheckpointConfig) -> str:
    if not config.results:
        return (
            f"## Accuracy\n\n{config.accuracy:.2f} % top-1 on the test set of {_title(config)}: {config.correct:,} of "
            f"{config.total:,} images, with these weights; one crop per image, float32.\n"
        )
    accuracies = [100 * result.correct / result.total for result in config.results]
    lines = [
        f"| {result.seed} | {accuracy:.2f} | {result.correct:,} of {result.total:,} | `{result.weights_sha256[:16]}` |"
        for result, accuracy in zip(config.results, accuracies, strict=True)
    ]
    spread = f", standard deviation {stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    seeds = f"{len(accuracies)} seeds" if len(accuracies) > 1 else "one seed"
    return (
        f"## Accuracy\n\n{config.accuracy:.2f} % top-1 on the test set of {_title(config)}: {config.correct:,} of "
        f"{config.total:,} images, with the weights of this repository, those of seed {config.seed}.\n\n"
        "| seed | top-1, % | correct images | sha256 of the run's weights |\n| --: | --: | --: | --- |\n"
        + "\n".join(lines)
        + f"\n\nMean of {seeds}: {fmean(accuracies):.2f} %{spread}. Each run read the test set once, at its end, "
        f"with the weights of the last epoch; one crop per image, float32.{_evidence(config)}\n"
    )


def _evidence(config: CheckpointConfig) -> str:
    """What can be said of numbers that the weights of this repository alone do not confirm."""
    text = ""
    if len(config.results) > 1:
        entry = config.recipe.get("name")
        records = f" ({_code(f'benchmarks/results/{entry}/')} of cnvzoo)" if entry else ""
        text += (
            f"\n\nOnly the weights of seed {config.seed} are published. The results of the other seeds are in the "
            f"records of their runs{records}, with the sha256 of their weights."
        )
    if config.recipes_scored is not None:
        text += f"\n\nNumber of recipes of this entry that were scored on the test set: {config.recipes_scored:,}."
    if len({result.numerics for result in config.results}) > 1:
        versions = (f"{r.numerics or 'not recorded'} (seed {r.seed})" for r in config.results)
        text += f"\n\nThe runs used different versions of the training arithmetic: {', '.join(versions)}."
    return text


def _use(config: CheckpointConfig) -> str:
    return (
        "## Use\n\n```python\nimport cnvzoo\nfrom PIL import Image\n\n"
        f"model = cnvzoo.create_model({_source(config)}, pretrained=True)\n"
        'for guess in cnvzoo.predict(model, Image.open("photo.png")):\n'
        '    print(f"{guess.label}: {guess.probability:.1%}")\n```\n\n'
        + (
            "cnvzoo compares the sha256 of every file with its index before it reads the file. "
            f"`cnvzoo verify {config.name}` measures the accuracy again.\n"
            if config.results
            else f"`{config.name}` is the folder of this file. cnvzoo compares the sha256 of the weights with "
            "config.json before it reads them.\n"
        )
    )


def _source(config: CheckpointConfig) -> str:
    """The first argument of create_model: the name of a checkpoint of the zoo, or the path of a folder."""
    return f'"{config.name}"' if config.results else f'"./{config.name}"'


def _preprocessing(config: CheckpointConfig) -> str:
    preprocessing = preprocessing_from(config)
    native, size = preprocessing.native_size, preprocessing.size
    padded = f", padded with black to {size}x{size}" if native != size else ""
    scaled = "scaled to [0, 1]"
    if preprocessing.normalizes:
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (preprocessing.mean, preprocessing.std))
        scaled += f", then mean {mean} subtracted and divided by standard deviation {std}"
    colour = "RGB" if preprocessing.in_chans == 3 else "grey"
    return (
        f"## Preprocessing\n\nImages of {native}x{native} pixels, {colour}{padded}, {scaled}. "
        "`cnvzoo.transforms(model)` returns this as a transform for images of any size.\n\n"
        f"Classes, in the order of the outputs: {', '.join(map(_escaped, config.classes))}.\n"
    )


def _cost(config: CheckpointConfig, parameters: int, macs: int) -> str:
    size, channels = config.preprocessing["size"], len(config.preprocessing["mean"])
    bits = _bits(config) if _is_quantized(config) else "float"
    packed = "; quantized weights are stored as packed integers with scales" if _is_quantized(config) else ""
    return (
        f"## Size\n\n| parameters | multiply-accumulates at {channels}x{size}x{size} | weights | model.safetensors |\n"
        f"| --: | --: | --: | --: |\n| {parameters:,} | {macs:,} | {bits} | {config.file.size:,} bytes |\n\n"
        f"The format is safetensors{packed}.\n"
    )


def _integer(config: CheckpointConfig, result: IntegerResult) -> str:
    return (
        "## Without PyTorch\n\n"
        f"`cnvzoo export {config.name} -o model.onnx` writes an ONNX file of integer operators, {result.bytes:,} "
        "bytes, whose input is the image as uint8.\n\n"
        "| top-1 in ONNX Runtime, % | correct images | same class as in PyTorch | accumulators off by a level |\n"
        f"| --: | --: | --: | --: |\n| {100 * result.correct / (config.total or 1):.2f} | {result.correct:,} of "
        f"{config.total or 0:,} | {result.agreeing:,} | {result.differing:,} of {result.reachable:,} |\n\n"
        "On every test image its outputs equal those of a reference implementation bit for bit.\n"
    )


def _recipe(config: CheckpointConfig) -> str:
    recipe = yaml.safe_dump(config.recipe, sort_keys=False, allow_unicode=True, width=110)
    needed = [key for key in ("float_start_sha256", "teacher_sha256") if config.recipe.get(key)]
    verb = "is the fingerprint of the recipe" if len(needed) == 1 else "are fingerprints of the recipes"
    note = f"\n{' and '.join(map(_code, needed))} {verb} of what the run needs, not of its weights.\n" if needed else ""
    return f"## Recipe\n\n{_fenced(recipe, 'yaml')}{note}"


def _reproduce(config: CheckpointConfig) -> str:
    entry = config.recipe.get("name")
    facts = f"- {_listed(config.device)}\n- {_listed(config.versions)}\n"
    if config.numerics is not None:
        facts += f"- arithmetic version {config.numerics} (docs/numerics.md)\n"
    if not config.results or _dataset_info(config) is None or not entry:
        return (
            "## Reproduce\n\nThis run is in no table of cnvzoo, so no command trains it again. "
            + (f"The weights of the run have the sha256 `{config.weights_sha256}`. " if config.weights_sha256 else "")
            + f"Its machine and versions:\n\n{facts}"
        )
    base, changed = (config.commit or "").rstrip("+"), (config.commit or "").endswith("+")
    where = "In a checkout of cnvzoo:" if base else "In a checkout of cnvzoo (the commit was not recorded):"
    outcome = f"The weights have the sha256 `{config.weights_sha256}` again on the same machine with the same versions:"
    if changed:  # which may include the weights that the run started from: the commit alone would undo them
        where = f"The run used commit {_code(base)} with uncommitted changes. In a checkout that has this checkpoint:"
        outcome = f"The weights of the run have the sha256 `{config.weights_sha256}`. Its machine and versions:"
    lines = [f"git checkout {shlex.quote(base)}"] if base and not changed else []
    lines += [_installation(config.versions), _command(config, entry)]
    return (
        f"## Reproduce\n\n{where}\n\n{_fenced(chr(10).join(lines) + chr(10), 'sh')}\n"
        f"{outcome}\n\n{facts}\n"
        "Other machines add in another order: expect an accuracy within the spread of the seeds.\n"
    )


def _installation(versions: Mapping[str, str]) -> str:
    """The command that installs the checkout with the versions of the run, without local parts such as +cu130.

    Newer commits need the package in their folder runtime/, which older ones do not have.
    """
    pins = (f"{name}=={versions[name].partition('+')[0]}" for name in versions if name in _INSTALLED)
    return f"{shlex.join(['pip', 'install', *pins])} $(ls -d ./runtime 2>/dev/null) --editable ."


def _command(config: CheckpointConfig, entry: str) -> str:
    """The command that trains the run again.

    On a CPU the bits depend on the number of threads. Older commits have no --threads and read OMP_NUM_THREADS, so both
    are given; --threads only where it is not its default, 1.
    """
    kind, threads = config.device.get("kind"), config.device.get("threads")
    command = ["python", "benchmarks/reproduce.py", "--table", "all", "--entry", entry]
    command += ["--device", kind] if kind in ("cpu", "cuda") else []
    command += ["--seeds", str(config.seed), "--retrain"]
    if kind == "cuda" or threads is None:
        return shlex.join(command)
    command += ["--threads", str(threads)] if threads != 1 else []
    return f"OMP_NUM_THREADS={shlex.quote(str(threads))} {shlex.join(command)}"


def _limits(config: CheckpointConfig) -> str:
    measured, classes = config.accuracy is not None, f"{len(config.classes)} classes"
    known = f"the {classes} of {_title(config)}" if config.dataset else f"its {classes}"
    lines = [
        f"It knows only {known}. Any other image gets one of these labels too, often with high confidence.",
        "The probabilities are not calibrated.",
        "It was tested only on the test set of its dataset: not for other light, cameras or styles, and not against "
        "adversarial attacks."
        if measured
        else "Its accuracy on a test set is not known.",
    ]
    if config.dataset:
        lines.append(f"{_title(config)} has its own licence terms and biases.")
    if _is_quantized(config):
        what = "The top-1 above was measured" if measured else "PyTorch runs the model"
        lines.append(
            f"{what} with fake quantization in float32. Integer hardware may round differently: measure the accuracy "
            "there."
        )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def _is_quantized(config: CheckpointConfig) -> bool:
    return config.model.get("w_bits") is not None


def _bits(config: CheckpointConfig) -> str:
    return f"w{config.model['w_bits']}a{config.model['a_bits']}"


def _title(config: CheckpointConfig) -> str:
    info = _dataset_info(config)
    return _escaped(info.title if info else config.dataset or "an unknown dataset")


def _dataset_info(config: CheckpointConfig) -> DatasetInfo | None:
    """The facts about the dataset; None for a dataset of a user's own."""
    return dataset_info(config.dataset) if config.dataset is not None and config.dataset in list_datasets() else None


def _listed(facts: Mapping[str, Any]) -> str:
    return ", ".join(_escaped(f"{key} {value}") for key, value in facts.items()) or "unknown"


def _escaped(text: str) -> str:
    """The text escaped for Markdown, within a line."""
    return _SPECIAL.sub(r"\\\g<0>", text)


def _code(text: str) -> str:
    """The text as inline code, with more backticks around it than inside."""
    ticks = "`" * (_longest_run(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _fenced(text: str, language: str) -> str:
    """Lines as a code block, with a longer fence than any inside."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}{fence}\n"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
