"""The parts of a step: all of its time, in the order of the loop, and apart from the timed run."""

import csv
import dataclasses
import time

import pytest

from kdclimb import profile
from kdclimb.config import ConfigError
from kdclimb.data import Dataset
from kdclimb.train import Trainer


@pytest.fixture(scope="module")
def isolates(tiny_runs):
    return {run.label: run.config for run in tiny_runs if run.arm == "isolate"}


def test_the_parts_make_up_the_step_and_a_slow_one_is_told_by_its_name(isolates, manifest, teacher_folder, monkeypatch):
    config = isolates["CE + KD"]
    times = {}
    for pause in (0.0, 0.05):

        class Slow(Trainer):
            def reset(self, pause=pause):
                super().reset()
                of_teacher = self.kd.target
                self.kd.target = lambda *a: (time.sleep(pause), of_teacher(*a))[1]

        monkeypatch.setattr(profile, "Trainer", Slow)
        times[pause], peaks = profile.profile(config, Dataset(manifest), teacher_folder, None)
    assert peaks == {} and set(times[0.05]) == {*profile.PARTS, "step"}
    micro_batches = config.schedule.batch_tokens[0] // config.schedule.micro_batch_tokens
    for parts in times.values():
        assert all(len(ms) == config.schedule.stop_step for ms in parts.values())
        for i, step in enumerate(parts["step"]):
            assert sum(parts[name][i] for name in profile.PARTS) == pytest.approx(step)
            assert all(parts[name][i] > 0 for name in profile.PARTS)
    assert min(times[0.05]["teacher"]) >= 50 * micro_batches > max(times[0.0]["teacher"])


def test_a_run_in_parts_trains_as_one_without(isolates, manifest, teacher_folder):
    plain, timed = (Trainer(isolates["CE + KD"], Dataset(manifest), teacher_folder, "reference") for _ in range(2))
    timed.region = profile.Regions("cpu")
    assert [plain.train_step() for _ in range(2)] == [timed.train_step() for _ in range(2)]
    assert set(timed.region.collect()) == set(profile.PARTS) and timed.region.marks == []


def test_the_table_has_a_row_for_each_part_of_each_isolate(isolates, manifest, teacher_folder, tmp_path):
    short = {
        label: dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, stop_step=3))
        for label, config in isolates.items()
    }
    runs = [(label, config, config.kd and teacher_folder, None) for label, config in short.items()]
    profile.write(runs, manifest, tmp_path / "profile.csv", 1)
    with (tmp_path / "profile.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["part"]) for row in rows] == [(label, part) for label in short for part in profile.PARTS]
    teacher = {row["label"]: float(row["ms_median"]) for row in rows if row["part"] == "teacher"}
    assert teacher["CE only"] == 0 < min(teacher["CE + teacher inference"], teacher["CE + KD"])
    for label in short:
        of_label = [row for row in rows if row["label"] == label]
        assert sum(float(row["share_of_step"]) for row in of_label) == pytest.approx(1.0)
        assert {row["steps"] for row in of_label} == {"1"}


def test_the_steps_are_those_that_have_kd_in_all_isolates(isolates):
    config = isolates["CE + KD"]
    assert set(profile.compared_steps(list(isolates.values()))) <= set(range(2, config.schedule.stop_step))
    early = dataclasses.replace(config, kd=dataclasses.replace(config.kd, stop_mode="step", stop_frac=0.06))
    assert profile.compared_steps([config]) == [2, 3] and profile.compared_steps([config, early]) == [2]  # of 50 steps
    never = dataclasses.replace(config, kd=dataclasses.replace(config.kd, every=config.schedule.stop_step))
    with pytest.raises(ConfigError, match="kd.isolate_steps"):
        profile.compared_steps([config, never])
