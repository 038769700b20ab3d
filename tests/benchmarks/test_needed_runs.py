"""The runs that others need, as float start or teacher, are trained before them."""

from __future__ import annotations

import json

import pytest
from workbench import FLOAT, QUANTIZED, FakeTraining

from cnvzoo.files import sha256_of
from cnvzoo.training import RunRecord

pytestmark = pytest.mark.usefixtures("no_checkpoints")


class TestFloatStart:
    def test_is_trained_with_seed_0_before_the_runs_that_need_it(self, float_and_quantized):
        assert float_and_quantized.run("--table", "cifar10", "--entry", QUANTIZED, "--seeds", "1", "2") == 0
        assert float_and_quantized.training.calls == [(FLOAT, 0), (QUANTIZED, 1), (QUANTIZED, 2)]
        weights = float_and_quantized.runs / FLOAT / "seed0" / "weights.safetensors"
        assert [options["float_start"] for options in float_and_quantized.training.options] == [None, weights, weights]
        assert float_and_quantized.result(FLOAT, 0).exists()

    def test_of_seed_0_is_not_trained_again_when_another_seed_is_retrained(self, float_and_quantized):
        float_and_quantized.run("--table", "cifar10", "--seeds", "0", "1")
        float_and_quantized.training.calls.clear()
        assert float_and_quantized.run("--table", "cifar10", "--seeds", "1", "--retrain") == 0
        assert float_and_quantized.training.calls == [(FLOAT, 1), (QUANTIZED, 1)]

    def test_is_trained_when_its_record_exists_but_its_weights_are_missing(self, float_and_quantized, tmp_path, capsys):
        record = FakeTraining()(float_and_quantized.entry(FLOAT).recipe, run_dir=tmp_path, seed=0, epochs=None)
        record.write(float_and_quantized.result(FLOAT))
        assert float_and_quantized.run("--table", "cifar10", "--seeds", "0") == 0
        assert float_and_quantized.training.calls == [(FLOAT, 0), (QUANTIZED, 0)]
        assert f"{QUANTIZED} needs its weights, which are not under" in capsys.readouterr().err

    def test_with_other_weights_than_those_of_its_record_is_not_used(self, float_and_quantized, capsys):
        """As when the record came from another kind of machine: a run from these weights would not be valid."""
        kept = float_and_quantized.put(FLOAT, accuracy=91.5)
        for calls in ([(FLOAT, 0)], []):  # it is not trained again
            assert float_and_quantized.run("--table", "cifar10", "--seeds", "0") == 1
            assert float_and_quantized.training.calls == calls
            float_and_quantized.training.calls.clear()
            message = capsys.readouterr().err
            assert ("its weights differ from those of" in message) == bool(calls)
            assert f"{QUANTIZED} seed 0 failed: it needs the weights of {FLOAT} seed 0 of " in message
            assert f"weights.safetensors are others: restore {float_and_quantized.hub / 'cnv.cifar10'}, or" in message
        assert RunRecord.read(float_and_quantized.result(FLOAT)) == kept
        assert not float_and_quantized.result(QUANTIZED).exists()
        assert float_and_quantized.run("--table", "cifar10", "--seeds", "0", "--retrain", "--entry", FLOAT) == 0
        assert float_and_quantized.run("--table", "cifar10", "--seeds", "0") == 0

    def test_is_not_trained_for_a_run_that_is_finished(self, float_and_quantized):
        float_and_quantized.put(FLOAT)
        float_and_quantized.put(QUANTIZED)
        assert float_and_quantized.run("--table", "cifar10", "--seeds", "0") == 0
        assert float_and_quantized.training.calls == []

    def test_is_trained_again_when_its_weights_differ_from_its_record(self, float_and_quantized):
        float_and_quantized.run("--table", "cifar10", "--entry", FLOAT, "--seeds", "0")
        (float_and_quantized.runs / FLOAT / "seed0" / "weights.safetensors").write_text("half of i")
        assert float_and_quantized.run("--table", "cifar10", "--seeds", "0") == 0
        assert float_and_quantized.training.calls == [(FLOAT, 0), (FLOAT, 0), (QUANTIZED, 0)]

    def test_is_trained_again_when_its_recipe_changed(self, float_and_quantized):
        float_and_quantized.run("--table", "cifar10", "--entry", FLOAT, "--seeds", "0")
        float_and_quantized.recipe(FLOAT, epochs=11)
        float_and_quantized.run("--table", "cifar10", "--entry", QUANTIZED, "--seeds", "0")
        assert float_and_quantized.training.calls == [(FLOAT, 0), (FLOAT, 0), (QUANTIZED, 0)]

    def publish(self, bench, weights: str, config: object) -> None:
        folder = bench.hub / "cnv.cifar10"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(weights)
        (folder / "config.json").write_text(json.dumps(config))

    def test_published_weights_that_match_the_record_are_used(self, float_and_quantized, tmp_path):
        (tmp_path / "weights").write_text("published")
        digest = sha256_of(tmp_path / "weights")
        float_and_quantized.put(FLOAT, weights_sha256=digest)
        self.publish(float_and_quantized, "published", {"weights_sha256": digest})
        assert float_and_quantized.run("--table", "cifar10", "--seeds", "0") == 0
        assert float_and_quantized.training.calls == [(QUANTIZED, 0)]
        assert (
            float_and_quantized.training.options[0]["float_start"]
            == float_and_quantized.hub / "cnv.cifar10" / "model.safetensors"
        )

    @pytest.mark.parametrize("config", [{"weights_sha256": "f" * 64}, {}, [], {"weights_sha256": "RECORD"}])
    def test_published_weights_that_do_not_match_the_record_are_not_used(self, float_and_quantized, config):
        record = float_and_quantized.put(FLOAT)
        if config == {"weights_sha256": "RECORD"}:  # the config has the right checksum, but the weights file is another
            config = {"weights_sha256": record.weights_sha256}
        self.publish(float_and_quantized, "published", config)
        assert float_and_quantized.run("--table", "cifar10", "--seeds", "0") == 1
        assert float_and_quantized.training.calls == [(FLOAT, 0)]


class TestTeacher:
    @pytest.fixture
    def teacher_and_students(self, bench):
        """A quantized student with a float start, and a float student whose teacher is itself a student."""
        bench.recipe("cifar10_cnv", teacher="cifar10_resnet20")
        bench.recipe("cifar10_resnet20", teacher="cifar10_resnet56")
        bench.recipe("cifar10_resnet56")
        bench.recipe(QUANTIZED, float_start="cifar10_cnv", teacher="cifar10_resnet56")
        return bench

    def test_is_trained_with_seed_0_before_its_students(self, teacher_and_students):
        assert teacher_and_students.run("--table", "cifar10", "--entry", QUANTIZED, "--seeds", "2") == 0
        names = ["cifar10_resnet56", "cifar10_resnet20", "cifar10_cnv", QUANTIZED]
        assert teacher_and_students.training.calls == [*((name, 0) for name in names[:3]), (QUANTIZED, 2)]
        weights = {name: teacher_and_students.runs / name / "seed0" / "weights.safetensors" for name in names}
        given = [(options["float_start"], options["teacher"]) for options in teacher_and_students.training.options]
        resnet56, resnet20, cnv, _ = weights.values()
        assert given == [(None, None), (None, [resnet56]), (None, [resnet20]), (cnv, [resnet56])]

    def test_a_student_of_several_teachers_starts_after_all_of_them(self, teacher_and_students):
        teacher_and_students.recipe(QUANTIZED, float_start="cifar10_cnv", teacher=["cifar10_resnet20", "cifar10_cnv"])
        assert (
            teacher_and_students.run("--table", "cifar10", "--entry", QUANTIZED, "--seeds", "1", "--at-once", "4") == 0
        )
        order = [name for name, _ in teacher_and_students.training.calls]
        assert order == ["cifar10_resnet56", "cifar10_resnet20", "cifar10_cnv", QUANTIZED]
        weights = [
            teacher_and_students.runs / f"cifar10_{name}" / "seed0" / "weights.safetensors"
            for name in ("resnet20", "cnv")
        ]
        assert teacher_and_students.training.options[-1]["teacher"] == weights

    def test_a_student_starts_after_its_teacher_with_parallel_runs(self, teacher_and_students):
        assert teacher_and_students.run("--table", "cifar10", "--seeds", "0", "--at-once", "4") == 0
        order = [name for name, _ in teacher_and_students.training.calls]
        assert order == ["cifar10_resnet56", "cifar10_resnet20", "cifar10_cnv", QUANTIZED]

    def test_when_a_teacher_fails_its_students_are_not_trained(self, teacher_and_students, capsys):
        teacher_and_students.training.fail_at.add(("cifar10_resnet56", 0))
        assert teacher_and_students.run("--table", "cifar10", "--seeds", "0") == 1
        assert [name for name, _ in teacher_and_students.training.calls] == ["cifar10_resnet56"]
        assert "it needs the weights of cifar10_resnet20 seed 0, which are missing" in capsys.readouterr().err

    def test_when_the_recipe_of_a_teacher_changes_its_students_are_trained_again(self, teacher_and_students):
        assert teacher_and_students.run("--table", "cifar10", "--seeds", "0") == 0
        teacher_and_students.training.calls.clear()
        teacher_and_students.recipe("cifar10_resnet56", epochs=12)
        assert teacher_and_students.run("--table", "cifar10", "--seeds", "0") == 0
        assert len(teacher_and_students.training.calls) == 4
