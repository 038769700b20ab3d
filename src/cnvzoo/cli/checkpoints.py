"""The commands on checkpoints: they score, verify, export, publish and classify."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import cnvzoo
from cnvzoo.cli.app import app
from cnvzoo.cli.imports import Import
from cnvzoo.cli.options import DataRoot, Device, Hub, Json, Threads, checkpoint_names
from cnvzoo.cli.output import Column, print_json, print_table
from cnvzoo.errors import CnvzooError

if TYPE_CHECKING:
    from cnvzoo.checkpoints.format import CheckpointConfig
    from cnvzoo.checkpoints.store import Publication
    from cnvzoo.checkpoints.verify import Verification
    from cnvzoo.training.evaluation import Evaluation
    from cnvzoo_runtime.deployed_model import Prediction


@app.command("eval")
def eval_(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Name of a checkpoint, the path of its folder, or an exported .onnx file.",
            autocompletion=checkpoint_names,
        ),
    ],
    dataset: Annotated[
        str | None,
        typer.Option(help="Name of a dataset, or path of own images, to score on; default the one it was trained on."),
    ] = None,
    hub: Hub = None,
    device: Device = "auto",
    threads: Threads = None,
    data_root: DataRoot = None,
    imported: Import = None,
    as_json: Json = False,
) -> None:
    """Score a checkpoint or an exported file on a test set; for a checkpoint, show the published number too.

    Example: `cnvzoo eval cnv.mnist`, or `cnvzoo eval m.onnx --dataset cifar10`
    """
    if _is_exported(checkpoint):
        from cnvzoo.deploy.export import evaluate_file
        from cnvzoo_runtime.deployed_model import load

        if device != "auto" or hub is not None:
            option = "--hub" if hub is not None else "--device"
            raise typer.BadParameter(f"{option} is for checkpoints: {checkpoint} is a file, and runs on the CPU")
        exported = load(checkpoint, threads=threads)
        scored = evaluate_file(exported, dataset, data_root=data_root)
        name = dataset or exported.metadata.dataset
        if as_json:
            _print_score(checkpoint, name, scored, None)
        else:
            typer.echo(f"{checkpoint}: {scored.accuracy:.2f} % ({scored.correct} of {scored.total}) on {name}")
        return
    from cnvzoo.checkpoints.folder import preprocessing_from
    from cnvzoo.checkpoints.test_set import load_test_set
    from cnvzoo.training.device import using_threads

    model, config = cnvzoo.load_checkpoint(checkpoint, hub=hub)
    if dataset is None and config.dataset not in cnvzoo.list_datasets():
        own = f"its own dataset, {config.dataset}" if config.dataset else "an unknown dataset"
        raise CnvzooError(f"{config.name} was trained on {own}: give --dataset, a name or the path of images")
    source = dataset or config.dataset
    assert source is not None
    preprocessing = preprocessing_from(config)
    data = load_test_set(
        source, config.name, image_size=preprocessing.native_size, in_chans=preprocessing.in_chans,
        classes=config.classes, data_root=data_root,
    )  # fmt: skip
    with using_threads(threads):
        result = cnvzoo.evaluate(model, data, preprocessing=preprocessing, device=device)
    is_own = dataset in (None, config.dataset)
    if as_json:
        _print_score(config.name, source, result, config if is_own else None)
        return
    text = f"{config.name}: {result.accuracy:.2f} % ({result.correct} of {result.total})"
    if is_own:
        text += f"; published {config.score}" if config.results else f"; recorded {config.score}"
    else:
        text += f" on {dataset}"
    typer.echo(text)


def _print_score(name: str, dataset: str | None, found: Evaluation, recorded: CheckpointConfig | None) -> None:
    def facts(score: Evaluation | CheckpointConfig) -> dict[str, Any]:
        return {"accuracy": score.accuracy, "correct": score.correct, "total": score.total}

    published = None if recorded is None or recorded.accuracy is None else facts(recorded)
    print_json({"name": name, "dataset": dataset, **facts(found), "published": published})


@app.command()
def verify(
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names, or paths of folders.",
            autocompletion=checkpoint_names,
        ),
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Verify every published checkpoint.")] = False,
    hub: Hub = None,
    device: Device = "auto",
    threads: Threads = None,
    data_root: DataRoot = None,
    dataset: Annotated[
        str | None, typer.Option(help="Path of the images of checkpoints that were trained on own ones.")
    ] = None,
    imported: Import = None,
    as_json: Json = False,
) -> None:
    """Compare files of checkpoints with the index, and their test scores with the published ones.

    The number of correct images must equal the published one on the kind of machine that published it; elsewhere it
    may differ by a few images. The exit status is 1 if anything differs or cannot be compared. A checkpoint given by
    its path is compared with its own config.json instead of the index, also one with the name of a published one.

    Example: `cnvzoo verify cnv.mnist`, or `cnvzoo verify --all`
    """
    if bool(checkpoints) == all_:
        raise typer.BadParameter("give names of checkpoints, or --all")
    from cnvzoo.training.device import using_threads

    with using_threads(threads):
        results = cnvzoo.verify(checkpoints or None, hub=hub, device=device, data_root=data_root, dataset=dataset)
    if as_json:
        print_json([asdict(result) for result in results])
    else:
        _print_verifications(results)
    problems: dict[str, dict[str, list[str]]] = {}
    for result in results:
        if result.problem:
            kind = "not verified" if result.missing_data else "not as recorded"
            problems.setdefault(kind, {}).setdefault(result.problem, []).append(result.name)
    if problems:
        said = {
            kind: "; ".join(f"{', '.join(n)}: {what}" for what, n in found.items()) for kind, found in problems.items()
        }
        raise CnvzooError("; ".join(f"{kind}: {text}" for kind, text in said.items()))


def _print_verifications(results: list[Verification]) -> None:
    titles = ("published", "found", "of", "allowed")
    rows = []
    for result in results:
        counts = (result.published, result.found, result.total, result.allowed)
        shown = ["-" if count is None else f"{count:,}" for count in counts]
        rows.append((result.name, *shown, _verdict(result)))
    numbers = (Column(title, is_number=True) for title in titles)
    print_table([Column("checkpoint"), *numbers, Column("verdict")], rows)
    if allowed := max((result.allowed for result in results), default=0):
        typer.echo(f"on another kind of machine than the publisher's, a difference of {allowed} images is allowed")


def _verdict(result: Verification) -> str:
    if result.problem:
        return "not verified" if result.missing_data else "differs"
    if result.published is None:
        return "nothing published to compare"
    return "not scored: give --dataset" if result.found is None else "as recorded"


@app.command()
def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Name of a checkpoint, or the path of its folder.",
            autocompletion=checkpoint_names,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    format: Annotated[
        str,
        typer.Option(
            help="integer: exact and fast on CPUs; qdq: for OpenVINO and others; qonnx: for FINN; onnx: float models; "
            "c: C source for microcontrollers, and a header beside it."
        ),
    ] = "integer",
    hub: Hub = None,
    imported: Import = None,
) -> None:
    """Write a checkpoint's model to an ONNX file, which `eval` and `predict` take, or to C source.

    Example: `cnvzoo export quant_cnv_w4a4.cifar10 -o m.onnx --format integer`
    """
    from cnvzoo.files import expanded

    output = expanded(output)
    model, _ = cnvzoo.load_checkpoint(checkpoint, hub=hub)
    facts = cnvzoo.export(model, output, format=format)
    header = f" and {output.with_suffix('.h').name}" if facts.format == "c" else ""
    typer.echo(f"{output}{header}: {facts.name} as {facts.format}, {output.stat().st_size:,} bytes")


@app.command()
def publish(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            help="Names in --hub, or paths of folders.",
            autocompletion=checkpoint_names,
        ),
    ],
    to: Annotated[str, typer.Option(help="Store to publish to: a directory, or hf://ORG on the Hugging Face Hub.")],
    hub: Annotated[
        str | None, typer.Option(help="Directory of named checkpoints; default CNVZOO_HUB, else the checkout's hub/.")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Tag of each new version, such as a release; never moved.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message; default name and accuracy.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be published.")] = False,
    imported: Import = None,
    as_json: Json = False,
) -> None:
    """Publish checkpoints: weights, config and model card, in one commit each; nothing if nothing changed.

    For the Hub, log in first: `hf auth login`.

    Example: `cnvzoo publish cnv.mnist --to hf://my-organisation --dry-run`
    """
    done: list[Publication] = []
    shown = done.append if as_json else typer.echo
    try:
        cnvzoo.publish(checkpoints, to, hub=hub, tag=tag, message=message, dry_run=dry_run, on_published=shown)
    finally:  # those before one that failed are published
        if as_json:
            print_json([asdict(publication) for publication in done])


@app.command()
def predict(
    images: Annotated[
        list[Path],
        typer.Argument(help="Image files of any size and format that Pillow reads; before them, an .onnx file if any."),
    ],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Name of a checkpoint, or the path of its folder.",
            autocompletion=checkpoint_names,
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of classes to show.")] = 3,
    hub: Hub = None,
    imported: Import = None,
    as_json: Json = False,
) -> None:
    """Classify images with a checkpoint or an exported file: the most probable classes and their probabilities.

    Example: `cnvzoo predict photo.png --checkpoint quant_cnv_w4a4.cifar10`, or `cnvzoo predict m.onnx photo.png`
    """
    from cnvzoo_runtime.images import read_image

    exported = images[0] if _is_exported(str(images[0])) else None
    if (exported is None) == (checkpoint is None):
        raise CnvzooError("predict takes either --checkpoint or an exported .onnx file before the images")
    if exported is not None and hub is not None:
        raise typer.BadParameter(f"--hub is for checkpoints: {exported} is a file")
    if exported is not None and not images[1:]:
        raise CnvzooError(f"no image after {exported}: give the files to classify")
    classify = _classifier(exported, checkpoint, hub, top)
    found_in = []
    try:
        for path in images[1:] if exported is not None else images:
            image = read_image(path)
            try:
                predictions = classify(image)
            except ValueError as error:  # an image of another kind than the model takes
                raise CnvzooError(f"{path}: {error}") from None
            if as_json:
                found_in.append({"image": str(path), "predictions": [asdict(found) for found in predictions]})
            else:
                typer.echo(f"{path}: " + ", ".join(f"{found.label} {found.probability:.1%}" for found in predictions))
    finally:
        if as_json:  # those before an image that cannot be classified, too
            print_json(found_in)


def _classifier(
    exported: Path | None, checkpoint: str | None, hub: str | None, top: int
) -> Callable[[Any], list[Prediction]]:
    """The function from a PIL image to its predictions."""
    if exported is not None:
        from cnvzoo_runtime.deployed_model import load

        deployed = load(exported)
        return lambda image: deployed.predict(image, top)
    assert checkpoint is not None
    model, _ = cnvzoo.load_checkpoint(checkpoint, hub=hub)
    return lambda image: cnvzoo.predict(model, image, top)


def _is_exported(name: str) -> bool:
    return name.endswith(".onnx")
