"""`cnvzoo eval`, `list --checkpoints`, `verify`, `predict` and `publish`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnvzoo.checkpoints.save import write_card
from cnvzoo.checkpoints.verify import verify
from cnvzoo.data import Preprocessing, published
from cnvzoo.errors import CnvzooError, DatasetError, in_a_line
from cnvzoo.train_and_save import save_checkpoint
from cnvzoo.zoo import create_model


class TestEval:
    def test_by_name_with_the_published_number(self, cnvzoo, hub, small_datasets):
        small_datasets()
        result = cnvzoo("eval", "quant_cnv_w4a4.cifar10", "--device", "cpu")
        assert result.status == 0
        assert result.out.startswith("quant_cnv_w4a4.cifar10: ")
        assert "of 50); published 10.00 % (5 of 50)" in result.out

    def test_json(self, cnvzoo, hub, small_datasets):
        small_datasets()
        said = cnvzoo("eval", "resnet20.mnist", "--device", "cpu").out
        found = json.loads(cnvzoo("eval", "resnet20.mnist", "--device", "cpu", "--json").out)
        assert list(found) == ["name", "dataset", "accuracy", "correct", "total", "published"]
        assert said.startswith(f"{found['name']}: {found['accuracy']:.2f} % ({found['correct']} of {found['total']})")
        assert found["dataset"] == "mnist"
        assert found["published"] == {"accuracy": 10.0, "correct": 5, "total": 50}

    def test_by_folder(self, cnvzoo, hub, small_datasets, monkeypatch):
        small_datasets()
        named = cnvzoo("eval", "resnet20.mnist", "--device", "cpu")
        monkeypatch.delenv("CNVZOO_HUB")
        assert cnvzoo("eval", hub / "resnet20.mnist", "--device", "cpu").out == named.out

    @pytest.fixture
    def mine(self, tmp_path) -> Path:
        """A checkpoint for images of 48x48 pixels of cats and dogs; folders of such images, and of other classes."""
        preprocessing = Preprocessing(48, (0.5,) * 3, (0.25,) * 3)
        model = create_model("resnet20", num_classes=2)
        save_checkpoint(model, tmp_path / "mine", classes=["cat", "dog"], preprocessing=preprocessing)
        for folder, names in (("pets", "cat dog"), ("letters", "a b")):
            for name in names.split():
                (tmp_path / folder / name).mkdir(parents=True)
                for n in range(5):
                    Image.new("L", (60, 50 + n), 40 * n).save(tmp_path / folder / name / f"{n}.png")
        return tmp_path / "mine"

    def test_own_images_are_prepared_as_the_checkpoint_takes_them(self, cnvzoo, mine, monkeypatch):
        seen = []
        monkeypatch.setattr(
            "cnvzoo.training.evaluation._check_classes", lambda outputs, info: seen.append((info, outputs))
        )
        result = cnvzoo("eval", "./mine", "--dataset", "./pets", "--device", "cpu")
        assert (result.status, result.err) == (0, "")
        assert [(info.image_size, info.in_chans) for info, _ in seen] == [(48, 3)] * 2
        (verified,) = verify(mine, dataset=mine.parent / "pets", device="cpu")
        assert (verified.problem, verified.total) == (None, 2)

    def test_images_of_other_classes_or_another_size_are_refused(self, cnvzoo, mine):
        for command in (("eval", "./mine", "--dataset"), ("verify", "./mine", "--dataset")):
            result = cnvzoo(*command, "./letters", "--device", "cpu")
            assert result.status == 1
            assert "is for the classes cat, dog, and letters has a, b: evaluate it on its own" in result.err
        result = cnvzoo("eval", "./mine", "--dataset", "cifar10")
        says = "mine is for images of 48x48 pixels, 3 channel(s) and 2 classes, and cifar10 has images of 32x32"
        assert result.err.startswith(f"error: {says}")

    def test_unknown_checkpoint(self, cnvzoo, hub):
        result = cnvzoo("eval", "quant_cnv_w4a4.cifar100")
        assert result.status == 1
        assert "did you mean 'quant_cnv_w4a4.cifar10'" in result.err
        assert str(hub) in result.err

    def test_a_hub_folder_without_checkpoints(self, cnvzoo, monkeypatch, tmp_path):
        monkeypatch.setenv("CNVZOO_HUB", str(tmp_path / "empty"))
        assert f"{tmp_path / 'empty'}: no such folder: give a directory" in cnvzoo("eval", "cnv.mnist").err
        (tmp_path / "empty").mkdir()
        result = cnvzoo("eval", "cnv.mnist")
        assert result.status == 1
        assert str(tmp_path / "empty") in result.err
        assert "cnv.mnist" in result.err

    @pytest.mark.parametrize("option", ["--data-root", "--hub", "CNVZOO_DATA", "CNVZOO_HUB"])
    def test_an_unknown_home_folder(self, cnvzoo, hub, monkeypatch, option):
        if option.startswith("--"):
            arguments: tuple[str, ...] = (option, "~no-such-user/x")
        else:
            monkeypatch.setenv(option, "~no-such-user/x")
            arguments = ()
        result = cnvzoo("eval", "resnet20.mnist", *arguments)
        says = "~no-such-user/x: ~no-such-user is not a known home folder: write the path without ~"
        assert (result.status, result.err) == (1, f"error: {says}\n")

    def test_damaged_weights(self, cnvzoo, hub):
        weights = hub / "resnet20.mnist" / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        result = cnvzoo("eval", "resnet20.mnist")
        assert result.status == 1
        assert "sha256" in result.err
        assert str(weights) in result.err


class TestListCheckpoints:
    def test_every_number(self, cnvzoo, hub):
        lines = cnvzoo("list", "--checkpoints").out.splitlines()
        quantized = next(line for line in lines if "quant_cnv_w4a4.cifar10" in line)
        size = (hub / "quant_cnv_w4a4.cifar10" / "model.safetensors").stat().st_size
        assert all(text in quantized for text in ("10.00", "4/4", "59,461,376", f"{size:,}"))
        float_ = next(line for line in lines if "resnet20.mnist" in line)
        assert all(text in float_ for text in ("float", "272,186"))  # 3 * 3 * 2 * 16 fewer than with 3 channels

    @pytest.mark.parametrize(
        ("conditions", "names"),
        [
            (("--dataset", "mnist"), ["resnet20.mnist"]),
            (("--bits", "4/4"), ["quant_cnv_w4a4.cifar10"]),
            (("--bits", "float"), ["resnet20.mnist"]),
            (("--min-accuracy", 10), ["quant_cnv_w4a4.cifar10", "resnet20.mnist"]),
            (("--max-bytes", 1_000_000), ["quant_cnv_w4a4.cifar10"]),
            (("--bits", "4/4", "--dataset", "cifar10", "--max-bytes", 1_000_000), ["quant_cnv_w4a4.cifar10"]),
        ],
    )
    def test_conditions(self, cnvzoo, hub, conditions, names):
        result = cnvzoo("list", "--checkpoints", *conditions)
        assert [line.split()[0] for line in result.out.splitlines()[1:]] == names

    def test_conditions_that_none_fulfils(self, cnvzoo, hub):
        result = cnvzoo("list", "--checkpoints", "--min-accuracy", 50, "--bits", "2/2")
        says = "no published checkpoint matches '*' with --bits 2/2, --min-accuracy 50.0"
        assert (result.status, result.out) == (1, "")
        assert result.err == f"error: {says}: cnvzoo list --checkpoints shows all of them\n"

    @pytest.mark.parametrize(
        ("arguments", "status", "says"),
        [
            (("--max-bytes", 5), 2, "--max-bytes selects checkpoints: give --checkpoints too"),
            (("--checkpoints", "--bits", "4"), 2, "--bits 4: W/A, each 1 to 8, such as 4/4; or float"),
            (("--checkpoints", "--bits", "9/4"), 2, "--bits 9/4: W/A, each 1 to 8, such as 4/4; or float"),
            (("--checkpoints", "--dataset", "mnits"), 1, "did you mean 'mnist'"),
        ],
    )
    def test_invalid_conditions(self, cnvzoo, hub, monkeypatch, arguments, status, says):
        monkeypatch.setenv("COLUMNS", "200")
        result = cnvzoo("list", *arguments)
        assert result.status == status
        assert says in result.said

    def test_pattern(self, cnvzoo, hub):
        assert "cifar10" not in cnvzoo("list", "--checkpoints", "*.mnist").out
        result = cnvzoo("list", "--checkpoints", "*.cifar100")
        assert (result.status, result.out) == (1, "")
        assert "no published checkpoint matches '*.cifar100'" in result.err


@pytest.mark.parametrize(("message", "line"), [("a  b: c", "a  b: c"), ("a\n", "a"), ("\na:\r\n  b\n\nc", "a: b c")])
def test_the_lines_of_an_error_are_joined(message, line):
    assert in_a_line(CnvzooError(message)) == line


class TestVerify:
    def test_a_checkpoint_as_published(self, cnvzoo, hub, small_datasets):
        small_datasets()
        table = cnvzoo("eval", "resnet20.mnist", "--device", "cpu").out
        found = int(table.split("(")[1].split()[0])
        result = cnvzoo("verify", "resnet20.mnist", "--device", "cpu")
        assert f"resnet20.mnist 5 {found} 50 5 " in result.said
        assert result.status == int(abs(found - 5) > 5)
        assert "another kind of machine" in result.out

        result = cnvzoo("verify", "resnet20.mnist", "--device", "cpu", "--json")
        (verified,) = json.loads(result.out)
        assert (result.status == 0) == (verified.pop("problem") is None)
        assert verified == {
            "name": "resnet20.mnist", "published": 5, "found": found, "total": 50, "allowed": 5, "missing_data": False,
        }  # fmt: skip

    def test_all_and_a_difference(self, cnvzoo, hub, small_datasets):
        small_datasets()
        (hub / "resnet20.mnist" / "config.json").unlink()
        result = cnvzoo("verify", "--all", "--hub", hub, "--device", "cpu")
        assert result.status == 1
        assert all(name in result.out for name in ("quant_cnv_w4a4.cifar10", "resnet20.mnist"))
        assert f"resnet20.mnist: {hub / 'resnet20.mnist' / 'config.json'}: " in result.err
        assert "Traceback" not in result.err

    def test_a_missing_test_set_is_tried_once_and_no_difference(self, cnvzoo, hub, make_checkpoint, monkeypatch):
        tried = []

        def unreachable(name, root):
            tried.append(name)
            raise DatasetError(f"{name}: no network\n connect to one")

        make_checkpoint(hub, "cnv", "mnist")
        monkeypatch.setattr(published, "load_arrays", unreachable)
        names = ("resnet20.mnist", "cnv.mnist", "quant_cnv_w4a4.cifar10")
        (hub / "quant_cnv_w4a4.cifar10" / "config.json").unlink()
        result = cnvzoo("verify", *names, "--device", "cpu")
        rows = [" ".join(line.split()) for line in result.out.splitlines()]
        assert rows[-3:] == [
            "resnet20.mnist 5 - 50 0 not verified",
            "cnv.mnist 5 - 50 0 not verified",
            "quant_cnv_w4a4.cifar10 - - - 0 differs",
        ]
        assert result.status == 1
        assert result.err.startswith(
            "error: not verified: resnet20.mnist, cnv.mnist: mnist: no network connect to one; "
            f"not as recorded: quant_cnv_w4a4.cifar10: {hub / 'quant_cnv_w4a4.cifar10' / 'config.json'}: "
        )
        assert len(result.err.splitlines()) == 1
        assert tried == ["mnist"]

    def test_a_typo_is_an_unknown_name_not_a_difference(self, cnvzoo, hub):
        result = cnvzoo("verify", "resnet20.mnits")
        assert (result.status, result.out) == (1, "")
        assert "error: no checkpoint 'resnet20.mnits'" in result.err
        assert "did you mean 'resnet20.mnist'" in result.err

    def test_checkpoints_without_a_number_or_images_to_compare(self, cnvzoo, tmp_path):
        for name in ("unknown", "damaged"):
            model, preprocessing = create_model("resnet20", in_chans=1), Preprocessing(28, (0.5,), (0.25,))
            save_checkpoint(model, tmp_path / name, preprocessing=preprocessing)
        result = cnvzoo("verify", "./unknown")
        assert (result.status, result.out.splitlines()[-1].split(maxsplit=5)[5]) == (0, "nothing published to compare")
        config = json.loads((tmp_path / "unknown" / "config.json").read_text())
        config |= {"correct": 3, "total": 5, "dataset": "photos"}
        (tmp_path / "unknown" / "config.json").write_text(json.dumps(config))
        assert "not scored: give --dataset" in cnvzoo("verify", "./unknown").out
        for name in ("unknown", "damaged"):
            (tmp_path / name / "model.safetensors").write_bytes(b"")
        result = cnvzoo("verify", "./unknown", "./damaged")
        assert result.status == 1
        assert len(result.err.splitlines()) == 1
        assert "unknown/model.safetensors" in result.err
        assert "damaged/model.safetensors" in result.err

    @pytest.mark.parametrize("arguments", [(), ("resnet20.mnist", "--all")])
    def test_either_names_or_all(self, cnvzoo, hub, arguments):
        result = cnvzoo("verify", *arguments)
        assert result.status == 2
        assert "give names of checkpoints, or --all" in result.said


class TestPredict:
    @pytest.fixture
    def photo(self, tmp_path) -> Path:
        pixels = np.arange(60 * 80 * 3, dtype=np.uint32).reshape(60, 80, 3) % 251
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photo.png")
        return tmp_path / "photo.png"

    @pytest.mark.parametrize("checkpoint", ["quant_cnv_w4a4.cifar10", "resnet20.mnist"])
    def test_any_size_and_colour(self, cnvzoo, hub, photo, checkpoint):
        Image.open(photo).convert("L").save(grey := photo.with_name("grey.gif"))
        result = cnvzoo("predict", photo, grey, "--checkpoint", checkpoint, "--top", 10)
        assert result.status == 0
        for path, line in zip((photo, grey), result.out.splitlines(), strict=True):
            assert line.startswith(f"{path}: ")
            shares = [float(guess.split()[-1].rstrip("%")) for guess in line.removeprefix(f"{path}: ").split(", ")]
            assert len(shares) == 10
            assert shares == sorted(shares, reverse=True)
            assert sum(shares) == pytest.approx(100, abs=0.5)  # each is rounded to 0.1

    def test_top(self, cnvzoo, hub, photo):
        assert cnvzoo("predict", photo, "--checkpoint", "resnet20.mnist", "--top", 2).out.count("%") == 2

    def test_json(self, cnvzoo, hub, photo):
        result = cnvzoo("predict", photo, photo, "--checkpoint", "resnet20.mnist", "--top", 2, "--json")
        first, second = json.loads(result.out)
        assert first == second
        assert first["image"] == str(photo)
        assert [list(guess) for guess in first["predictions"]] == [["label", "index", "probability"]] * 2
        said = cnvzoo("predict", photo, "--checkpoint", "resnet20.mnist", "--top", 1).out
        best = first["predictions"][0]
        assert said == f"{photo}: {best['label']} {best['probability']:.1%}\n"

    def test_a_file_name_that_is_not_utf8(self, cnvzoo, hub, photo):
        other = photo.rename(os.fsdecode(os.fsencode(photo.parent) + b"/\xff.png"))
        result = cnvzoo("predict", other, "--checkpoint", "resnet20.mnist", "--top", 1)
        assert (result.status, result.err) == (0, "")
        assert result.out.startswith(f"{photo.parent}/\\udcff.png: ")
        (found,) = json.loads(cnvzoo("predict", other, "--checkpoint", "resnet20.mnist", "--json").out)
        assert found["image"] == str(other)

    @pytest.mark.parametrize("content", [None, b"not an image", b"\x89PNG\r\n\x1a\n"])
    def test_a_file_that_is_not_an_image(self, cnvzoo, hub, tmp_path, content):
        path = tmp_path / "broken.png"
        if content is not None:
            path.write_bytes(content)
        result = cnvzoo("predict", path, "--checkpoint", "resnet20.mnist")
        assert result.status == 1
        assert f"error: {path}: cannot be read as an image" in result.err
        assert "Traceback" not in result.err

    def test_an_image_of_more_than_8_bits(self, cnvzoo, hub, tmp_path):
        Image.fromarray(np.zeros((8, 8), dtype=np.int32)).save(path := tmp_path / "deep.tiff")
        result = cnvzoo("predict", path, "--checkpoint", "resnet20.mnist")
        assert result.status == 1
        assert str(path) in result.err
        assert "8-bit" in result.err


class TestPublish:
    def test_json(self, cnvzoo, hub, tmp_path):
        write_card(hub / "resnet20.mnist")
        (found,) = json.loads(cnvzoo("publish", "resnet20.mnist", "--to", "store", "--dry-run", "--json").out)
        files = sorted(found.pop("new"))
        assert files == ["README.md", "config.json", "model.safetensors"]
        assert found == {
            "name": "resnet20.mnist", "location": "store", "changed": [], "unchanged": [], "commit": None, "tag": None,
            "dry_run": True,
        }  # fmt: skip
        assert not (tmp_path / "store").exists()

    def test_json_of_those_before_an_error(self, cnvzoo, hub, tmp_path):
        write_card(hub / "resnet20.mnist")
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "quant_cnv_w4a4.cifar10").symlink_to(tmp_path)
        write_card(hub / "quant_cnv_w4a4.cifar10")
        result = cnvzoo("publish", "resnet20.mnist", "quant_cnv_w4a4.cifar10", "--to", "store", "--json")
        assert result.status == 1
        assert [done["name"] for done in json.loads(result.out)] == ["resnet20.mnist"]
