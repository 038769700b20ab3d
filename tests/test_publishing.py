"""Publishing with `cnvzoo.publish` and the command `cnvzoo publish`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import cnvzoo
from cnvzoo import files
from cnvzoo.checkpoints import folder
from cnvzoo.checkpoints.folder import read_config, write_config
from cnvzoo.checkpoints.format import CARD, CheckpointError, FileFacts, StoreError
from cnvzoo.checkpoints.save import _known_of, checkpoint_facts
from cnvzoo.checkpoints.store import Publication
from cnvzoo.cli import main
from cnvzoo.training import NUMERICS, recipe_from_dict
from cnvzoo.training.record import RunRecord

ROOT = Path(__file__).resolve().parents[1]
FILES = ("model.safetensors", "README.md", "config.json")


@pytest.fixture
def hub(tmp_path: Path, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of two checkpoints, in which names are looked up."""
    for model in ("resnet20", "cnv"):
        cnvzoo.write_card(make_checkpoint(tmp_path / "hub", model, "mnist"))
    monkeypatch.setenv("CNVZOO_HUB", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`command(*arguments)`: status, output and errors of `cnvzoo publish`."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cnvzoo", "publish", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def test_names_and_folders_are_published_to_a_store(hub: Path, tmp_path: Path) -> None:
    seen: list[Publication] = []
    store = tmp_path / "store"
    published = cnvzoo.publish(["resnet20.mnist", hub / "cnv.mnist"], store, on_published=seen.append)
    assert seen == published
    assert [(p.name, p.new) for p in published] == [("resnet20.mnist", FILES), ("cnv.mnist", FILES)]
    assert sorted(path.name for path in store.iterdir() if not path.name.startswith(".")) == [
        "cnv.mnist",
        "resnet20.mnist",
    ]
    for path in hub.rglob("*.*"):
        if path.is_file():
            assert (store / path.relative_to(hub)).read_bytes() == path.read_bytes()
    (again,) = cnvzoo.publish("cnv.mnist", store)
    assert again.unchanged == FILES


def test_a_published_checkpoint_loads_from_the_store(hub: Path, tmp_path: Path) -> None:
    cnvzoo.publish("cnv.mnist", tmp_path / "store")
    model = cnvzoo.create_model("cnv.mnist", pretrained=True, hub=tmp_path / "store")
    assert model.state_dict().keys() == cnvzoo.create_model("cnv.mnist", pretrained=True).state_dict().keys()


@pytest.mark.parametrize("message", [None, "A message"])
@pytest.mark.parametrize("file", ["model.safetensors", "README.md"])
def test_with_a_damaged_checkpoint_nothing_is_published(
    hub: Path, tmp_path: Path, file: str, message: str | None
) -> None:
    (hub / "cnv.mnist" / file).unlink() if file == "README.md" else (hub / "cnv.mnist" / file).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=rf"cnv\.mnist.*{file}"):
        cnvzoo.publish(["resnet20.mnist", "cnv.mnist"], tmp_path / "store", message=message)
    assert not (tmp_path / "store").exists()


def test_damaged_checkpoints_that_are_not_published_are_ignored(hub: Path, tmp_path: Path) -> None:
    (hub / "cnv.mnist" / "config.json").write_text("{")
    (published,) = cnvzoo.publish("resnet20.mnist", tmp_path / "store")
    assert published.new == FILES


@pytest.mark.parametrize("message", [None, "A message"])
def test_weights_that_do_not_fit_the_model_are_not_published(hub: Path, tmp_path: Path, message: str | None) -> None:
    folder = hub / "resnet20.mnist"
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, folder / "model.safetensors")
    facts = FileFacts.of((folder / "model.safetensors").read_bytes())
    write_config(folder, read_config(folder).model_copy(update={"file": facts}))
    with pytest.raises(CheckpointError, match=name):
        cnvzoo.publish("resnet20.mnist", tmp_path / "store", message=message)
    assert not (tmp_path / "store").exists()


def test_a_folder_without_a_card_is_refused(hub: Path, tmp_path: Path) -> None:
    (hub / "cnv.mnist" / "README.md").unlink()
    with pytest.raises(StoreError, match=r"README.md missing.*write the card with cnvzoo.write_card"):
        cnvzoo.publish("cnv.mnist", tmp_path / "store")


@pytest.mark.parametrize("dry_run", [False, True])
def test_two_folders_of_one_name_are_refused_before_the_first_is_sent(hub: Path, tmp_path: Path, dry_run: bool) -> None:
    other = shutil.copytree(hub / "cnv.mnist", tmp_path / "desk" / "cnv.mnist")
    with pytest.raises(CheckpointError) as error:
        cnvzoo.publish(["cnv.mnist", other], tmp_path / "store", dry_run=dry_run)
    assert str(error.value) == (
        f"{hub / 'cnv.mnist'} and {other}: both would be published as cnv.mnist: rename one, or publish them to two "
        "stores"
    )
    assert not (tmp_path / "store").exists()
    twice = cnvzoo.publish(["cnv.mnist", hub / "cnv.mnist"], tmp_path / "store", dry_run=dry_run)
    assert [p.name for p in twice] == ["cnv.mnist", "cnv.mnist"]


def test_an_unknown_name(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint 'cnv.mnst' in .*hub: did you mean 'cnv.mnist'"):
        cnvzoo.publish("cnv.mnst", tmp_path / "store")
    monkeypatch.setenv("CNVZOO_HUB", "hf://zoo")
    with pytest.raises(
        CheckpointError, match=r"cannot be published from hf://zoo: give a directory with hub= or CNVZOO_HUB"
    ):
        cnvzoo.publish("cnv.mnist", tmp_path / "store")


def test_a_store_that_is_no_directory_is_refused_by_the_command(
    hub: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    says = "error: cnv.mnist cannot be published from hf://zoo: give a directory with hub= or CNVZOO_HUB\n"
    assert command("cnv.mnist", "--to", "store", "--hub", "hf://zoo") == (1, "", says)


def test_the_command_prints_a_line_for_each(
    hub: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    store, files = tmp_path / "store", ", ".join(FILES)
    status, out, err = command("cnv.mnist", "resnet20.mnist", "--to", store, "--dry-run")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        f"cnv.mnist to {store}: would publish new {files}",
        f"resnet20.mnist to {store}: would publish new {files}",
    ]
    assert not store.exists()
    assert command("cnv.mnist", "--to", store) == (0, f"cnv.mnist to {store}: published new {files}\n", "")
    assert command("cnv.mnist", "--to", store) == (0, f"cnv.mnist to {store}: unchanged\n", "")
    assert command("cnv.mnist", "--to", store, "--dry-run") == (0, f"cnv.mnist to {store}: nothing to publish\n", "")


def test_the_command_prints_what_was_published_before_an_error(
    hub: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "resnet20.mnist").symlink_to(tmp_path)
    status, out, err = command("cnv.mnist", "resnet20.mnist", "--to", store)
    assert status == 1
    assert out == f"cnv.mnist to {store}: published new {', '.join(FILES)}\n"
    assert err.startswith(f"error: {store / 'resnet20.mnist'}: a symbolic link")


@pytest.mark.parametrize("to", ["https://127.0.0.1/zoo", "hf://zoo/cnv.mnist"])
def test_an_invalid_store(hub: Path, to: str, command: Callable[..., tuple[int, str, str]]) -> None:
    status, out, err = command("cnv.mnist", "--to", to)
    assert (status, out) == (1, "")
    assert err == f"error: {to!r} is not a store: give a directory, hf://ORG or hf://ORG@REVISION\n"


def test_a_copy_of_a_folder_is_published_by_its_path(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(hub / "cnv.mnist", tmp_path / "desk" / "cnv.mnist")
    monkeypatch.chdir(tmp_path / "desk" / "cnv.mnist")
    (published,) = cnvzoo.publish(Path("."), "../../store")
    assert published.name == "cnv.mnist"
    assert (tmp_path / "store" / "cnv.mnist" / "config.json").is_file()


def test_a_record_with_values_that_no_config_can_have() -> None:
    record = RunRecord.model_validate_json((ROOT / "benchmarks" / "results" / "mnist_cnv" / "seed0.json").read_bytes())
    versions = {**record.versions, "torch": "2.14; id"}
    with pytest.raises(CheckpointError, match=r"^the record of mnist_cnv, seed 0: .*versions\.torch: [^\n]+$"):
        checkpoint_facts(record.model_copy(update={"versions": versions}))


def test_an_empty_location_is_no_store(hub: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    """As of a variable that is not set."""
    status, out, err = command("cnv.mnist", "--to", "")
    assert (status, out) == (1, "")
    assert err == "error: '' is not a store: give a directory, hf://ORG or hf://ORG@REVISION\n"


def test_a_card_that_is_a_link_is_not_written(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("precious")
    card = hub / "cnv.mnist" / CARD
    card.unlink()
    card.symlink_to(tmp_path / "other")
    with pytest.raises(StoreError, match=r"README\.md: a symbolic link, which could lead out of the folder"):
        cnvzoo.write_card(hub / "cnv.mnist")
    assert (tmp_path / "other").read_text() == "precious"


@pytest.mark.parametrize("file", ["README.md", "config.json"])
def test_an_interrupted_save_leaves_no_checkpoint_of_two_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    preprocessing = cnvzoo.Preprocessing(32, (0.0,) * 3, (1.0,) * 3)
    first, second = (cnvzoo.create_model("resnet20", num_classes=n) for n in (10, 7))
    cnvzoo.save_checkpoint(first, tmp_path / "a", preprocessing=preprocessing)
    write = folder.write_text

    def interrupted(path: Path, text: str) -> None:
        if path.name == file:
            raise KeyboardInterrupt
        write(path, text)

    for module in (folder, files):
        monkeypatch.setattr(module, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cnvzoo.save_checkpoint(second, tmp_path / "a", preprocessing=preprocessing)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not the file that config\.json describes"):
        cnvzoo.publish(tmp_path / "a", tmp_path / "store")


@pytest.mark.parametrize("file", ["README.md", "config.json", "model.safetensors"])
def test_saving_replaces_no_file_of_something_else(tmp_path: Path, file: str) -> None:
    model, preprocessing = cnvzoo.create_model("resnet20"), cnvzoo.Preprocessing(32, (0.0,) * 3, (1.0,) * 3)
    project = tmp_path / "project"
    project.mkdir()
    (project / file).write_text("{}")
    (project / "main.py").touch()
    with pytest.raises(CheckpointError) as error:
        cnvzoo.save_checkpoint(model, project, preprocessing=preprocessing)
    assert str(error.value) == (
        f"{project}: {file} would be replaced, and this is not the folder of a checkpoint that this cnvzoo reads: "
        "choose another folder"
    )
    assert sorted(path.name for path in project.iterdir()) == sorted([file, "main.py"])
    assert (project / file).read_text() == "{}"


@pytest.mark.parametrize("place", ["link", "./"])
def test_saving_through_a_link_keeps_the_name_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    model, preprocessing = cnvzoo.create_model("resnet20"), cnvzoo.Preprocessing(32, (0.0,) * 3, (1.0,) * 3)
    cnvzoo.save_checkpoint(model, tmp_path / "mine", preprocessing=preprocessing)
    (tmp_path / "link").symlink_to("mine")
    monkeypatch.chdir(tmp_path if place == "link" else tmp_path / "mine")
    assert cnvzoo.save_checkpoint(model, place, preprocessing=preprocessing).name == "mine"
    (published,) = cnvzoo.publish(tmp_path / "mine", tmp_path / "store")
    assert published.name == "mine"


@pytest.mark.parametrize("left", [("model.safetensors",), ("model.safetensors", "README.md"), FILES])
def test_a_checkpoint_and_an_interrupted_one_can_be_saved_again(tmp_path: Path, left: tuple[str, ...]) -> None:
    model, preprocessing = cnvzoo.create_model("resnet20"), cnvzoo.Preprocessing(32, (0.0,) * 3, (1.0,) * 3)
    for _ in range(2):
        config = cnvzoo.save_checkpoint(model, tmp_path / "mine", preprocessing=preprocessing)
        for file in set(FILES).difference(left):
            (tmp_path / "mine" / file).unlink()
        (tmp_path / "mine" / ".config.json.abc.tmp").touch()
        assert config.name == "mine"


def test_paths_of_a_recipe_are_not_published(tmp_path: Path) -> None:
    values = {
        "name": "photos_cnv", "model": "resnet20", "dataset": f"{tmp_path}/private/photos", "epochs": 2,
        "batch_size": 4, "optimizer": {"lr": 0.1}, "start": f"{tmp_path}/private/before",
    }  # fmt: skip
    record = RunRecord.model_construct(
        recipe=recipe_from_dict(values, "test").model_dump(mode="json"), seed=0, versions={}, device={}, commit=None,
        numerics=NUMERICS, trial=False, epochs=1, holdout=0, correct=1, total=2, data_sha256="0" * 64,
    )  # fmt: skip
    known = _known_of(record)
    assert (known["dataset"], known["recipe"]["dataset"], known["recipe"]["start"]) == (
        "photos", "./photos", "./before",
    )  # fmt: skip
