"""Runs that are stopped and resumed, and what is in their folder already."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file
from synthetic import STEPS, StepHook, interrupted, noise, recipe, run

import cnvzoo
from cnvzoo.data import published_sha256
from cnvzoo.files import FileError, sha256_of
from cnvzoo.models.compiled import compiles
from cnvzoo.training import (
    RunError,
    RunInterrupted,
    RunRecord,
    RunUnderWay,
    Trainer,
)
from cnvzoo.training.state import caught_signals


def fail(_: Trainer) -> None:
    raise AssertionError("this run must not train")


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


def test_a_signal_that_code_outside_python_handles_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    handler, current = signal.getsignal(signal.SIGINT), signal.getsignal
    set_for: list[int] = []
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGTERM else current(number))
    monkeypatch.setattr(signal, "signal", lambda number, _: set_for.append(number) or current(number))
    with caught_signals():
        pass
    assert set_for == [signal.SIGINT, signal.SIGINT]
    assert current(signal.SIGINT) is handler


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
