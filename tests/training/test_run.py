"""`run_recipe`: what it trains and writes, how it stops and resumes, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from synthetic import CNV_BITS, EVERY_AUGMENTATION, StepHook, coloured, interrupted, noise, recipe, run

import cnvzoo
from cnvzoo.data import Dataset, published_sha256
from cnvzoo.errors import CnvzooError
from cnvzoo.files import FileError, sha256_of
from cnvzoo.models import build_model
from cnvzoo.models.compiled import compiles
from cnvzoo.models.integers import quantize_bias
from cnvzoo.training import (
    NUMERICS,
    RecipeError,
    RunError,
    RunInterrupted,
    RunRecord,
    RunUnderWay,
    Trainer,
    TrainingDiverged,
    count_correct,
    preprocessing_of,
)
from cnvzoo.training.state import load_checked

STEPS = 12  # of `recipe()` on `noise()`: two epochs of six


def fail(_: Trainer) -> None:
    raise AssertionError("this run must not train")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """The record of `recipe()`, trained without a stop; shared by tests, which must not change its folder."""
    return run(recipe(), tmp_path_factory.mktemp("whole"))


# --- what a run is and leaves behind


def test_a_record_describes_the_run(tmp_path: Path) -> None:
    wanted = recipe(label_smoothing=0.1, augmentation=EVERY_AUGMENTATION)
    record = run(wanted, tmp_path, seed=3)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".lock") == ["record.json", "weights.safetensors"]
    assert RunRecord.read(tmp_path / "record.json") == record
    assert (record.entry, record.seed, record.trial, record.holdout) == ("mnist_resnet8", 3, False, 0)
    assert (record.total, record.float_start) == (40, None)
    assert record.accuracy == pytest.approx(100 * record.correct / 40)
    assert record.recipe == wanted.model_dump(mode="json") | {"seed": 3}
    assert record.recipe_sha256 == wanted.fingerprint()
    assert record.weights_sha256 == sha256_of(tmp_path / "weights.safetensors")
    assert record.device["kind"] in ("cpu", "cuda")
    assert record.versions["torch"] == torch.__version__
    assert {"python", "cnvzoo"} <= record.versions.keys()
    assert record.finished.endswith("+00:00")
    assert [entry["epoch"] for entry in record.history] == [1, 2]
    assert record.seconds == pytest.approx(sum(entry["seconds"] for entry in record.history), abs=0.06)


def test_the_saved_weights_are_those_that_were_scored(tmp_path: Path) -> None:
    data = coloured(train=48, test=40)
    record = run(recipe(dataset="cifar10"), tmp_path, data)
    model = build_model("resnet8")
    model.load_state_dict(load_file(tmp_path / "weights.safetensors"), strict=True)
    preprocessing = preprocessing_of("resnet8", "cifar10")
    assert count_correct(model, data.test_images, data.test_labels, preprocessing, quiet=True) == record.correct


@pytest.mark.parametrize("changes", [{}, CNV_BITS], ids=["float", "quantized"])
def test_a_learnable_dataset_is_learned(tmp_path: Path, uncompiled: None, changes: dict[str, Any]) -> None:
    optimizer = {"lr": 0.05}
    wanted = recipe(**{"dataset": "cifar10", "epochs": 4, "batch_size": 16, "optimizer": optimizer} | changes)
    record = run(wanted, tmp_path, coloured(train=128, test=100))
    losses = [entry["loss"] for entry in record.history]
    assert losses[-1] < losses[0] * 0.7
    assert record.accuracy > 60  # chance is 10


@pytest.mark.parametrize("epochs", [1, 3])
def test_another_number_of_epochs_makes_a_trial(tmp_path: Path, epochs: int) -> None:
    record = run(recipe(), tmp_path, epochs=epochs)
    assert record.trial
    assert len(record.history) == epochs
    assert (record.epochs, record.recipe["epochs"]) == (epochs, 2)
    assert record.recipe_sha256 == recipe().fingerprint()


def test_as_many_epochs_as_the_recipe_make_no_trial(tmp_path: Path, whole: RunRecord) -> None:
    record = run(recipe(), tmp_path, epochs=2)
    assert not record.trial
    assert record.weights_sha256 == whole.weights_sha256


@pytest.mark.parametrize("epochs", [0, -1])
def test_no_epochs_at_all_are_refused(tmp_path: Path, epochs: int) -> None:
    with pytest.raises(CnvzooError, match="epochs"):
        run(recipe(), tmp_path, epochs=epochs)
    assert not (tmp_path / "record.json").exists()


# --- the held-out split


def test_a_holdout_reads_no_test_image_and_trains_on_no_held_out_one(tmp_path: Path) -> None:
    data = noise("mnist", train=60)
    split = data.holdout(12)
    other_test = replace(data, test_images=255 - data.test_images, test_labels=(data.test_labels + 1) % 10)
    held = (data.train_images[:, None] == split.test_images[None]).flatten(2).all(2).any(1)
    assert held.sum() == 12
    inverted = torch.where(held[:, None, None, None], 255 - data.train_images, data.train_images)
    other_held = replace(data, train_images=inverted)

    records = [run(recipe(), tmp_path / str(i), d, holdout=12) for i, d in enumerate((data, other_test, other_held))]
    assert all((r.trial, r.holdout, r.total) == (True, 12, 12) for r in records)
    assert len({r.weights_sha256 for r in records}) == 1
    assert records[0].correct == records[1].correct

    model = build_model("resnet8", in_chans=1)
    model.load_state_dict(load_file(tmp_path / "0" / "weights.safetensors"))
    preprocessing = preprocessing_of("resnet8", "mnist")
    for record, part in ((records[0], split), (records[2], other_held.holdout(12))):
        assert count_correct(model, part.test_images, part.test_labels, preprocessing, quiet=True) == record.correct


def test_a_holdout_leaves_other_weights_than_the_whole_set(whole: RunRecord, tmp_path: Path) -> None:
    assert run(recipe(), tmp_path, holdout=8).weights_sha256 != whole.weights_sha256


@pytest.mark.parametrize("n", [-1, 48])
def test_an_impossible_holdout_is_refused(tmp_path: Path, n: int) -> None:
    with pytest.raises(CnvzooError, match=rf"holdout\D{{1,2}}{n}\b"):
        run(recipe(), tmp_path, holdout=n)


# --- stopping and resuming


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGINT, 1), (signal.SIGTERM, 6), (signal.SIGINT, 8), (signal.SIGTERM, STEPS)]
)
def test_a_signal_stops_after_the_step_and_the_run_resumes_to_the_same_bits(
    number: signal.Signals, step: int, whole: RunRecord, tmp_path: Path, each_step: StepHook
) -> None:
    handler = signal.getsignal(number)
    steps: list[int] = []

    def note_and_interrupt(trainer: Trainer) -> None:
        steps.append(trainer.step)
        if steps == list(range(1, step + 1)):
            os.kill(os.getpid(), number)

    each_step(note_and_interrupt)
    with pytest.raises(RunInterrupted) as caught:
        run(recipe(), tmp_path)
    stop = caught.value
    assert (stop.reason, stop.step, stop.total_steps, stop.run_dir) == (number.name, step, STEPS, tmp_path)
    assert f"stopped ({number.name}) after step {step} of {STEPS}" in str(stop)
    assert "mnist_resnet8, seed 0" in str(stop)
    assert signal.getsignal(number) is handler
    assert not (tmp_path / "record.json").exists()

    record = run(recipe(), tmp_path)
    assert steps == list(range(1, STEPS + 1))  # none twice, none left out
    assert record.weights_sha256 == whole.weights_sha256
    assert (record.correct, [e["loss"] for e in record.history]) == (whole.correct, [e["loss"] for e in whole.history])


def test_a_second_interrupt_stops_at_once(tmp_path: Path, each_step: StepHook) -> None:
    def interrupt_twice(_: Trainer) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        fail(_)

    each_step(interrupt_twice)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    try:
        with pytest.raises(KeyboardInterrupt):
            run(recipe(), tmp_path)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_deadline_that_has_passed_stops_before_the_first_step(
    whole: RunRecord, tmp_path: Path, each_step: StepHook
) -> None:
    steps: list[int] = []
    each_step(lambda trainer: steps.append(trainer.step))
    for _ in range(2):  # the second time from a saved state
        with pytest.raises(RunInterrupted, match="time limit") as caught:
            run(recipe(), tmp_path, deadline=time.monotonic())
        assert (caught.value.reason, caught.value.step) == ("time limit", 0)
    assert steps == []
    assert run(recipe(), tmp_path).weights_sha256 == whole.weights_sha256


def test_a_stopped_run_without_a_folder_says_that_nothing_is_kept(uncompiled: None) -> None:
    with pytest.raises(RunInterrupted) as caught:
        cnvzoo.train(recipe(), dataset=noise(), deadline=time.monotonic(), device="cpu", quiet=True)
    assert caught.value.run_dir is None
    assert str(caught.value).endswith(
        "stopped (time limit) after step 0 of 12; nothing of it is kept, for lack of a run_dir"
    )


def test_a_deadline_stops_a_run_step_by_step_to_the_same_bits(
    whole: RunRecord, tmp_path: Path, each_step: StepHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    each_step(lambda _: clock.update(now=clock["now"] + 1))
    for step in (5, 10):
        with pytest.raises(RunInterrupted) as caught:
            run(recipe(), tmp_path, deadline=clock["now"] + 5)
        assert caught.value.step == step
    assert run(recipe(), tmp_path, deadline=clock["now"] + 5).weights_sha256 == whole.weights_sha256


def test_a_signal_stops_a_run_whose_state_cannot_be_saved(
    whole: RunRecord,
    tmp_path: Path,
    each_step: StepHook,
    full_disk: Callable[[int], AbstractContextManager[None]],
) -> None:
    with pytest.raises(RunInterrupted):
        run(recipe(), tmp_path, stop=iter([None] * 3 + ["time limit"]).__next__)
    each_step(lambda trainer: os.kill(os.getpid(), signal.SIGINT) if trainer.step == 5 else None)
    with full_disk(1000), pytest.raises(RunInterrupted, match="from the last state saved") as caught:
        run(recipe(), tmp_path)
    state = tmp_path / "state.safetensors"
    assert (caught.value.reason, caught.value.step, caught.value.run_dir) == ("SIGINT", 5, tmp_path)
    assert str(caught.value.unsaved).startswith(f"{state}: cannot be written: ")
    each_step(lambda _: None)
    assert run(recipe(), tmp_path).weights_sha256 == whole.weights_sha256


def test_a_deadline_does_not_hide_that_the_state_cannot_be_saved(
    tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]], uncompiled: None
) -> None:
    with full_disk(1000), pytest.raises(FileError, match=r"state\.safetensors: cannot be written"):
        run(recipe(), tmp_path, deadline=time.monotonic())


def test_state_is_saved_at_the_requested_interval(
    tmp_path: Path, each_step: StepHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, saved = {"now": 0.0}, []
    monkeypatch.setattr(time, "monotonic", lambda: clock["now"])
    state = tmp_path / "state.safetensors"

    def note(trainer: Trainer) -> None:
        clock["now"] += 1
        if state.exists():
            saved.append((trainer.step - 1, state.stat().st_mtime_ns))

    each_step(note)
    run(recipe(), tmp_path, save_every=4)
    moments = [step for (step, at), (_, before) in zip(saved[1:], saved, strict=False) if at != before]
    assert saved[0][0] == 4
    assert moments == [8]


def test_a_run_in_a_thread_trains_and_stops_too(tmp_path: Path) -> None:
    """Only the main thread may catch signals."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            run(recipe(), tmp_path, deadline=time.monotonic())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [type(error) for error in raised] == [RunInterrupted]


# --- what is in the folder already


def test_a_finished_run_is_returned_and_not_trained_again(tmp_path: Path, each_step: StepHook) -> None:
    record = run(recipe(), tmp_path)
    before = {path: (path.stat().st_mtime_ns, sha256_of(path)) for path in tmp_path.iterdir() if path.suffix}
    each_step(fail)
    assert run(recipe(), tmp_path) == record
    assert run(recipe(), tmp_path, seed=0, epochs=2, deadline=0.0) == record
    assert {path: (path.stat().st_mtime_ns, sha256_of(path)) for path in tmp_path.iterdir() if path.suffix} == before


@pytest.mark.parametrize("damage", ["weights changed", "weights gone", "record cut off", "record gone"])
def test_a_run_whose_files_were_damaged_is_trained_again(whole: RunRecord, tmp_path: Path, damage: str) -> None:
    run(recipe(), tmp_path)
    what, how = damage.split()[0], damage.split(" ", 1)[1]
    path = tmp_path / {"weights": "weights.safetensors", "record": "record.json"}[what]
    content = bytearray(path.read_bytes())
    if how == "changed":
        content[-1] ^= 1
        path.write_bytes(content)
    elif how == "cut off":
        path.write_bytes(content[:100])
    else:
        path.unlink()
    again = run(recipe(), tmp_path)
    assert again.weights_sha256 == sha256_of(tmp_path / "weights.safetensors") == whole.weights_sha256
    assert RunRecord.read(tmp_path / "record.json") == again


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_a_state_that_was_cut_off_is_refused_by_name(tmp_path: Path, each_step: StepHook, keep: int) -> None:
    state = interrupted(recipe(), tmp_path, each_step)
    state.write_bytes(state.read_bytes()[:keep])
    with pytest.raises(RunError, match="delete it to start over") as caught:
        run(recipe(), tmp_path)
    assert str(caught.value).startswith(f"{state}: ")


def test_a_safetensors_file_that_is_no_state_is_refused_by_name(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    save_file({"x": torch.zeros(1)}, state)
    with pytest.raises(RunError, match="delete it to start over") as caught:
        run(recipe(), tmp_path)
    assert str(caught.value).startswith(f"{state}: ")


@pytest.mark.parametrize("other", [{"batch_size": 16}, {"optimizer": {"lr": 0.01}}, {"seed": 1}])
def test_a_state_of_another_recipe_or_seed_is_moved_aside_and_can_be_resumed(
    whole: RunRecord, tmp_path: Path, each_step: StepHook, other: dict[str, Any]
) -> None:
    state = interrupted(recipe(), tmp_path, each_step)
    content = state.read_bytes()
    run(recipe(**other), tmp_path)
    (aside,) = tmp_path.glob("state-*.safetensors")
    assert aside.read_bytes() == content
    assert not state.exists()
    (tmp_path / "own").mkdir()
    aside.rename(tmp_path / "own" / state.name)
    assert run(recipe(), tmp_path / "own").weights_sha256 == whole.weights_sha256


def test_states_set_aside_one_after_another_are_all_kept(tmp_path: Path, each_step: StepHook) -> None:
    contents = [interrupted(recipe(), tmp_path, each_step, holdout=n).read_bytes() for n in (4, 8, 12)]
    kept = [path.read_bytes() for path in tmp_path.glob("state*.safetensors")]
    assert sorted(kept) == sorted(contents)


def test_a_state_from_other_conditions_is_refused_and_kept(tmp_path: Path, each_step: StepHook) -> None:
    state = interrupted(recipe(), tmp_path, each_step)
    content = state.read_bytes()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(RunError, match="threads") as caught:
            run(recipe(), tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert str(caught.value).startswith(f"{state}: ")
    assert state.read_bytes() == content


def test_a_state_of_compiled_loops_is_not_resumed_without_them(
    tmp_path: Path, each_step: StepHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiles(torch.device("cpu")):
        pytest.skip("no C++ compiler here to compile with")
    state = interrupted(recipe(), tmp_path, each_step)
    content = state.read_bytes()
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(RunError, match="here None, loops compiled, here eager: weights trained"):
        run(recipe(), tmp_path)
    assert state.read_bytes() == content


@pytest.mark.parametrize("other", [{"seed": 1}, {"epochs": 1}, {"holdout": 8}, {"dataset": noise(seed=1)}])
def test_a_finished_run_is_not_overwritten_by_another(tmp_path: Path, other: dict[str, Any]) -> None:
    run(recipe(), tmp_path)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunError, match="holds the finished run of mnist_resnet8, seed 0, which differs in") as caught:
        run(recipe(), tmp_path, **other)
    assert "give another folder, or move that one away" in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("other", ["model", "key"])
def test_a_finished_run_that_cannot_be_read_here_is_not_overwritten(
    tmp_path: Path, each_step: StepHook, other: str
) -> None:
    """Its model is not registered in this program, or its record has a key of a later version."""
    record = run(recipe(), tmp_path)
    values = json.loads((tmp_path / "record.json").read_text())
    values |= {"later": 1} if other == "key" else {"recipe": values["recipe"] | {"model": "my_net"}}
    (tmp_path / "record.json").write_text(json.dumps(values))
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    each_step(fail)
    says = (
        f"{tmp_path}: holds the finished run of mnist_resnet8, seed 0, which differs in recipe "
        f"{record.recipe_sha256!r}: give another folder, or move that one away"
    )
    with pytest.raises(RunError, match=f"^{re.escape(says)}$"):
        run(recipe(batch_size=16), tmp_path)
    with pytest.raises(RunError, match=r"differs in seed 0, holdout 0: give another folder, or move that one away$"):
        run(recipe(), tmp_path, seed=1, holdout=8)
    says = rf"^{re.escape(str(tmp_path / 'record.json'))}: not a valid run record: [^\n]*: give another folder, or move"
    with pytest.raises(RunError, match=says):
        run(recipe(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    (tmp_path / "weights.safetensors").unlink()
    each_step(None)
    assert run(recipe(), tmp_path).weights_sha256 == record.weights_sha256


def test_a_record_has_the_checksum_of_the_images(tmp_path: Path) -> None:
    data = noise(seed=1)
    ours, theirs = run(recipe(), tmp_path / "ours", data, epochs=1), run(recipe(), tmp_path / "theirs", epochs=1)
    assert ours.data_sha256 == data.sha256
    assert len({ours.data_sha256, theirs.data_sha256, published_sha256("mnist")}) == 3


def test_a_folder_that_another_process_trains_in_is_refused(tmp_path: Path, each_step: StepHook) -> None:
    each_step(fail)
    with FileLock(tmp_path / ".lock"), pytest.raises(RunUnderWay, match="another process is training") as caught:
        run(recipe(), tmp_path)
    assert str(tmp_path) in str(caught.value)


# --- starting from a float model


FLOAT_START = CNV_BITS | {"name": "mnist_quant_cnv_w2a2", "float_start": "mnist_cnv", "optimizer": {"lr": 1e-12}}


@pytest.fixture(scope="module")
def float_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunRecord]:
    folder = tmp_path_factory.mktemp("float")
    return folder / "weights.safetensors", run(recipe(name="mnist_cnv", model="cnv"), folder, seed=5, epochs=1)


def test_biases_are_quantized_before_the_model_is_scored(tmp_path: Path, uncompiled: None) -> None:
    """Only then: the weights are those of the run without quantized biases, rounded."""
    plain = run(recipe(**CNV_BITS), tmp_path / "plain")
    record = run(recipe(**CNV_BITS, quantize_bias=True), tmp_path / "quantized")
    model = build_model("quant_cnv", in_chans=1, num_classes=10, w_bits=2, a_bits=2)
    model.load_state_dict(load_file(tmp_path / "plain" / "weights.safetensors"))
    quantize_bias(model)
    found = load_file(tmp_path / "quantized" / "weights.safetensors")
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())
    assert record.weights_sha256 != plain.weights_sha256
    data, preprocessing = noise(), preprocessing_of("quant_cnv", "mnist")
    assert record.correct == count_correct(model.eval(), data.test_images, data.test_labels, preprocessing, quiet=True)


def test_a_quantized_run_starts_from_the_weights_of_its_float_twin(
    float_run: tuple[Path, RunRecord], tmp_path: Path, uncompiled: None
) -> None:
    weights, float_record = float_run
    record = run(recipe(**FLOAT_START), tmp_path, seed=5, epochs=1, float_start=weights)
    expected = {"entry": "mnist_cnv", "seed": 0, "weights_sha256": float_record.weights_sha256}
    assert record.float_start == expected
    assert "brevitas" in record.versions
    # of a learning rate that moves nothing: all filters but the first, which takes up the normalisation
    started, given = load_file(tmp_path / "weights.safetensors"), load_file(weights)
    torch.testing.assert_close(started["classifier.0.weight"], given["classifier.0.weight"])
    torch.testing.assert_close(started["features.0.weight"], given["features.0.weight"] / 0.3081)


def test_a_deep_resnet_starts_from_the_weights_of_a_shallower_one(tmp_path: Path, uncompiled: None) -> None:
    """Of a learning rate that moves nothing: the blocks that are new, and return their input, change no class."""
    torch.manual_seed(0)
    weights = tmp_path / "resnet20.safetensors"
    save_file(build_model("resnet20", in_chans=1).state_dict(), weights)
    still = {"model": "resnet32", "name": "mnist_resnet32", "float_start": "mnist_resnet20", "optimizer": {"lr": 1e-12}}
    for seed in (0, 1):
        record = run(recipe(**still), tmp_path / f"{seed}", seed=seed, epochs=1, float_start=weights)
        assert record.float_start == {"entry": "mnist_resnet20", "seed": 0, "weights_sha256": sha256_of(weights)}
    given = load_file(weights)
    first, second = (load_file(tmp_path / f"{seed}" / "weights.safetensors") for seed in (0, 1))
    for old, new in enumerate((0, 1, 3)):
        found = first[f"stages.1.{new}.conv2.weight"]
        torch.testing.assert_close(found, given[f"stages.1.{old}.conv2.weight"])
    assert first["stages.1.2.norm2.weight"].abs().max() < 1e-9
    assert not torch.equal(first["stages.1.2.conv1.weight"], second["stages.1.2.conv1.weight"])  # drawn from the seed


def test_the_float_weights_are_part_of_the_identity_of_a_run(
    float_run: tuple[Path, RunRecord], tmp_path: Path, each_step: StepHook, uncompiled: None
) -> None:
    weights, _ = float_run
    other = tmp_path / "other.safetensors"
    save_file({name: t * 2 if t.is_floating_point() else t for name, t in load_file(weights).items()}, other)
    interrupted(recipe(**FLOAT_START), tmp_path / "run", each_step, float_start=weights)
    with pytest.raises(RunInterrupted) as caught:
        run(recipe(**FLOAT_START), tmp_path / "run", float_start=other, deadline=time.monotonic())
    assert caught.value.step == 0
    assert len(list((tmp_path / "run").glob("state-*.safetensors"))) == 1


# --- weights that a run needs, as its float start or its teacher

NEEDS: dict[str, dict[str, Any]] = {"float_start": FLOAT_START, "teacher": {"teacher": "mnist_resnet14"}}


@pytest.mark.parametrize("given", [None, "nowhere.safetensors"])
@pytest.mark.parametrize(
    ("purpose", "says"),
    [
        ("float_start", "mnist_quant_cnv_w2a2 starts from the weights of mnist_cnv, seed 0"),
        ("teacher", "mnist_resnet8 learns from the weights of mnist_resnet14, seed 0"),
    ],
)
def test_missing_weights_are_refused_with_the_entry_to_train(
    tmp_path: Path, given: str | None, purpose: str, says: str
) -> None:
    path = given and tmp_path / given
    weights: dict[str, Any] = {purpose: path}
    with pytest.raises(RunError, match="train that entry first and give its weights") as caught:
        run(recipe(**NEEDS[purpose]), tmp_path, seed=2, **weights)
    assert says in str(caught.value)
    assert str(path or "no file") in str(caught.value)


@pytest.mark.parametrize("purpose", NEEDS)
def test_weights_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, purpose: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    damaged(tmp_path / "weights.safetensors")  # found, and refused when it is read
    weights: dict[str, Any] = {purpose: "~/weights.safetensors"}
    with pytest.raises(
        RunError, match=f"^{NEEDS[purpose].get('name', 'mnist_resnet8')}: {tmp_path}/weights.safetensors: "
    ):
        run(recipe(**NEEDS[purpose]), tmp_path / "run", **weights)


def weights_of(model: str, **arguments: Any) -> dict[str, torch.Tensor]:
    return {name: t.contiguous() for name, t in build_model(model, **arguments).state_dict().items()}


def damaged(path: Path) -> None:
    path.write_bytes(b"half a file")


@pytest.mark.parametrize(
    ("purpose", "write", "says"),
    [
        (
            "float_start",
            lambda path: save_file(weights_of("resnet8", in_chans=1), path),
            r"not the weights of mnist_cnv: features\.0\.weight is missing and not \[64, 1, 3, 3\] and \d+ other "
            "tensors: give the weights of mnist_cnv$",
        ),
        (
            "float_start",
            lambda path: save_file(weights_of("cnv", in_chans=3), path),
            r"features\.0\.weight is \[64, 3, 3, 3\] and not \[64, 1, 3, 3\]: give the weights of mnist_cnv$",
        ),
        ("float_start", damaged, "not a complete safetensors file: .*: give the weights of mnist_cnv$"),
        (
            "teacher",
            lambda path: save_file(weights_of("resnet8", in_chans=1), path),
            r"not the weights of mnist_resnet14: stages\.\S+ is missing and not \[.*\] and \d+ other tensors: give",
        ),
        (
            "teacher",
            lambda path: save_file(weights_of("resnet14", in_chans=3), path),
            r"conv\.weight is \[16, 3, 3, 3\] and not \[16, 1, 3, 3\]: give the weights of mnist_resnet14$",
        ),
        ("teacher", damaged, "not a complete safetensors file: .*: give the weights of mnist_resnet14$"),
    ],
    ids=[f"{purpose}-{what}" for purpose in NEEDS for what in ("another model", "another dataset", "damaged")],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, purpose: str, write: Callable[[Path], object], says: str
) -> None:
    path = tmp_path / "weights.safetensors"
    weights: dict[str, Any] = {purpose: path}
    write(path)
    wanted = recipe(**NEEDS[purpose])
    with pytest.raises(RunError, match=says) as caught:
        run(wanted, tmp_path / "run", **weights)
    assert str(path) in str(caught.value)
    assert wanted.name in str(caught.value)


# --- what goes wrong


def test_a_loss_that_is_no_number_stops_the_run_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged) as caught:
        run(recipe(optimizer={"lr": 1e30}, schedule={"warmup_epochs": 0.0}), tmp_path, seed=4)
    said = str(caught.value)
    assert said.startswith("mnist_resnet8, seed 4: the training loss is ")
    assert "in epoch 1: lower optimizer.lr (1e+30) or lengthen schedule.warmup_epochs" in said
    assert not (tmp_path / "record.json").exists()


NO_WARM_UP = {"warmup_epochs": 0.0}


@pytest.mark.parametrize("bits", [2, 8])
def test_weights_beyond_a_million_stop_the_run_though_the_loss_is_finite(
    bits: int, tmp_path: Path, uncompiled: None
) -> None:
    wanted = recipe(**CNV_BITS | {"w_bits": bits, "a_bits": bits}, optimizer={"lr": 1e6}, schedule=NO_WARM_UP)
    with pytest.raises(TrainingDiverged) as caught:
        run(wanted, tmp_path)
    said = str(caught.value)
    assert re.match(r"^mnist_resnet8, seed 0: \w+\.\d+\.\w+ has grown to \d\.?\d*e\+\d+ in epoch 1: lower", said), said
    assert said.endswith("optimizer.lr (1000000.0) or lengthen schedule.warmup_epochs")
    assert not (tmp_path / "record.json").exists()


DAMAGES: dict[str, tuple[str, Callable[[torch.nn.Module], torch.Tensor], float]] = {
    "parameter": ("fc.weight has values that are not finite", lambda m: m.get_parameter("fc.weight"), float("nan")),
    "infinite": ("fc.weight has values that are not finite", lambda m: m.get_parameter("fc.weight"), float("-inf")),
    "buffer": ("norm.running_var has values that are", lambda m: m.get_buffer("norm.running_var"), float("inf")),
    "large": ("fc.bias has grown to 1.1e+06", lambda m: m.get_parameter("fc.bias"), -1.1e6),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_last_step_that_breaks_weights_stops_the_run_and_leaves_its_state(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of all steps are finite: each is that of the weights before the step."""
    says, tensor, value = DAMAGES[damage]
    take = Trainer.take_step

    def take_and_break(trainer: Trainer) -> None:
        take(trainer)
        if trainer.step == trainer.total_steps:
            tensor(trainer.model).data.view(-1)[3] = value

    monkeypatch.setattr(Trainer, "take_step", take_and_break)
    with pytest.raises(TrainingDiverged, match=re.escape(f"mnist_resnet8, seed 0: {says}")) as caught:
        run(recipe(), tmp_path, save_every=0)
    assert "in epoch 2: lower optimizer.lr (0.05)" in str(caught.value)
    assert not (tmp_path / "record.json").exists()
    assert load_checked(tmp_path / "state.safetensors")[1]["values"]["step"] == STEPS - 1


def test_biases_that_break_when_they_are_quantized_are_not_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(model: torch.nn.Module) -> None:
        next(model.parameters()).data.fill_(float("inf"))

    monkeypatch.setattr("cnvzoo.models.integers.quantize_bias", spoil)
    with pytest.raises(TrainingDiverged, match="has values that are not finite at the end: lower"):
        run(recipe(**CNV_BITS, quantize_bias=True), tmp_path, epochs=1)
    assert not (tmp_path / "record.json").exists()


@pytest.mark.parametrize("loss", [float("inf"), float("-inf"), float("nan")])
def test_a_loss_of_either_infinity_stops_the_run(loss: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = Trainer.take_step

    def take_and_spoil(trainer: Trainer) -> None:
        take(trainer)
        trainer.state()[0]["loss_sum"].fill_(loss)

    monkeypatch.setattr(Trainer, "take_step", take_and_spoil)
    with pytest.raises(TrainingDiverged, match=f"the training loss is {loss} in epoch 1"):
        run(recipe(), tmp_path)


def test_bits_of_a_layer_that_the_model_lacks_are_refused_with_the_recipe(tmp_path: Path) -> None:
    wanted = recipe(**CNV_BITS, bits={"nolayer": [2, 2]})
    says = r"^mnist_resnet8: bits: 'nolayer' names no layer whose bit width can be chosen: .*Choices: features\.0, .*$"
    with pytest.raises(RunError, match=says):
        run(wanted, tmp_path)


def test_a_batch_larger_than_the_training_set_is_refused(tmp_path: Path) -> None:
    says = "mnist_resnet8: batch_size: 49: must be at most 48, the training images of mnist"
    with pytest.raises(RecipeError, match=f"^{says}$"):
        run(recipe(batch_size=49), tmp_path)
    with pytest.raises(RunError, match=r"^mnist_resnet8, seed 0: batch_size must be 1 to 40[^\n]*$"):
        run(recipe(batch_size=48), tmp_path, holdout=8)


@pytest.mark.parametrize("seed", [-3, 2**63, 2**64, True, 1.0, "1"])
@pytest.mark.parametrize("place", ["argument", "recipe"])
def test_an_impossible_seed_is_refused_before_anything_is_made(tmp_path: Path, seed: Any, place: str) -> None:
    wanted = recipe().model_copy(update={"seed": seed}) if place == "recipe" else recipe()
    says = f"mnist_resnet8: seed={seed!r}: a seed is a whole number from 0 to 9223372036854775807 (2**63 - 1)"
    with pytest.raises(RunError, match=f"^{re.escape(says)}$"):
        run(wanted, tmp_path / "run", **({"seed": seed} if place == "argument" else {}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("epochs", 1.5, "a run has at least 1"),
        ("epochs", True, "a run has at least 1"),
        ("epochs", 0, "a run has at least 1"),
        ("holdout", 8.0, "a number of training images, 0 for none"),
        ("validate", "3", "a number of held-out images, 0 for no validation"),
    ],
)
def test_an_impossible_count_is_refused_before_anything_is_made(
    tmp_path: Path, argument: str, value: Any, says: str
) -> None:
    with pytest.raises(RunError, match=f"^mnist_resnet8: {argument}={value!r}: {says}$"):
        run(recipe(), tmp_path / "run", **{argument: value})
    assert not (tmp_path / "run").exists()


def test_counts_of_numpy_are_those_of_python(tmp_path: Path) -> None:
    counts: dict[str, Any] = {
        "seed": np.int64(1), "epochs": np.int64(1), "holdout": np.uint8(8), "validate": np.int32(4)
    }  # fmt: skip
    record = run(recipe(), tmp_path / "numpy", **counts)
    assert record == run(recipe(), tmp_path / "numpy", seed=1, epochs=1, holdout=8, validate=4)


def test_images_that_the_recipe_does_not_fit_are_refused(tmp_path: Path) -> None:
    images = torch.zeros(48, 16, 16, 1, dtype=torch.uint8)
    small = Dataset.from_arrays(images, [0, 1] * 24, ["a", "b"], test_images=images, test_labels=[0, 1] * 24)
    with pytest.raises(RecipeError, match=r"^mnist_resnet8: early_crops\.side: 24: must be 8 to 15 for resnet8$"):
        run(recipe(early_crops={"side": 24, "epochs": 1}), tmp_path / "run", small)


def test_the_largest_seed_trains(tmp_path: Path) -> None:
    assert run(recipe(), tmp_path, seed=2**63 - 1, epochs=1).seed == 2**63 - 1


def test_an_unknown_device_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(CnvzooError, match="use auto, cpu or cuda"):
        run(recipe(), tmp_path / "run", device="tpu")
    assert not (tmp_path / "run").exists()


def test_a_state_names_its_run_in_plain_json(tmp_path: Path, each_step: StepHook) -> None:
    """So that a person can tell which run a file belongs to."""
    state = interrupted(recipe(), tmp_path, each_step, holdout=8)
    size = int.from_bytes(state.read_bytes()[:8], "little")
    metadata = json.loads(state.read_bytes()[8 : 8 + size])["__metadata__"]
    identity = json.loads(metadata["identity"])
    assert identity == {
        "recipe": recipe().fingerprint(),
        "seed": 0,
        "epochs": 2,
        "holdout": 8,
        "numerics": NUMERICS,
        "data": noise().sha256,
        "float_start": None,
        "teacher": None,
        "start": None,
    }
