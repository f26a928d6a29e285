"""Training logs: variants of their lines, torn and cut ones, the budget they give, their place in a campaign."""

import csv
import json

import pytest
from test_analysis_synthetic import SyntheticCampaign, make_config, read_rows, run_folder, run_script

from kdclimb import logs
from kdclimb.__main__ import main
from kdclimb.analysis.tables import RunFolder

SOURCE = """import os
print0(f"step:{step}/{train_steps} val_loss:{val_loss:.4f} train_time:{training_time_ms:.0f}ms", console=True)
====================================================================================================
|   0  NVIDIA H100 80GB HBM3          On  |   00000000:61:00.0 Off |                    0 |
Student model config: layers=11 heads=6 head_dim=128 model_dim=768 params=543,818,890 (543.819M)
"""
END = "step:1555/1555 val_loss:3.2783 train_time:694015ms step_avg:446.31ms"
CE = f"""step:0/1555 val_loss:10.8300 train_time:0ms step_avg:0.02ms
step:1/1555 train_time:300ms step_avg:300.00ms
step:750/1555 val_loss:3.9000 train_time:330000ms step_avg:440.00ms
step:1500/1555 val_loss:3.3000 train_time:665000ms step_avg:443.33ms
{END}
peak memory allocated: 36000 MiB reserved: 40960 MiB
"""
REAL = "kd_mode:real_teacher"
KD = f"""step:0/155 val_loss:10.8300 train_time:0ms step_avg:nanms {REAL} teacher_val_loss:4.0690 kd_active:True \
kd_stop_step:None
step:12/155 train_time:3100ms step_avg:258.33ms train_total_loss:139000.1 train_hard_loss:308000.2 {REAL} \
kd_teacher_bench_only:False train_soft_loss:10.1 distill_alpha:0.4500 kd_active:True kd_step_active:True \
kd_micro_frac:0.125 kd_lr_mult:2.0000 kd_post_drop_active:False
step:155/155 val_loss:4.0861 train_time:442054ms step_avg:2851.96ms {REAL} teacher_val_loss:4.0690 kd_active:False \
kd_stop_step:125 early_stop_target_val:4.0700 early_stop_streak:0 early_stop_hit:False
"""
FORK = """Total parameters: 140,967,972 (141.0M)
step:25/400 val_loss:6.8259 train_time:3632ms step_avg:145.28ms lr_mul:0.9996 muon_lr:0.022991 adam_lr:0.007997
step:400/400 val_loss:4.2227 train_time:58112ms step_avg:145.28ms lr_mul:0.1000 muon_lr:0.002300 adam_lr:0.000800
"""


def read(tmp_path, text, name="a b.txt"):
    (tmp_path / name).write_text(text)
    return logs.read_log(tmp_path / name)


@pytest.mark.parametrize("before", ["", SOURCE])
def test_a_whole_log_with_and_without_its_source(tmp_path, before):
    log = read(tmp_path, before + CE)
    assert (log.status, log.total, log.last, log.train_time_ms) == ("imported", 1555, 1555, 694015.0)
    assert [row["val_loss"] for row in log.vals] == [10.83, 3.9, 3.3, 3.2783] and len(log.steps) == 1
    row = logs.summary(log)
    assert (row["final_val"], row["steps"], row["clock"], row["peak_reserved_gib"]) == (3.2783, 1555, "logged", 40.0)
    assert row["device"] == ("NVIDIA H100 80GB HBM3" if before else "not said")
    assert row["params_stored"] == (543818890 if before else None)


def test_kd_fields(tmp_path):
    log = read(tmp_path, KD)
    assert (log.status, logs.log_config(log).kind, log.kd["kd_mode"]) == ("imported", "kd", "real_teacher")
    assert [row["kd_active"] for row in log.vals] == [1, 0] and log.steps[0]["lr_mult"] == 2.0
    assert "loss_hard" not in log.steps[0]  # a sum there
    assert logs.summary(log)["kd_stop_step"] == 125


def test_the_forks_lines(tmp_path):
    log = read(tmp_path, FORK)
    assert (log.status, log.train_time_ms, logs.summary(log)["params_stored"]) == ("imported", 58112.0, 140967972)


def test_the_first_trainers_lines_have_no_time_and_no_end(tmp_path):
    log = read(tmp_path, "s:0 tel:10.9\ns:100 trl:6.2\ns:128 tel:6.1\n")
    assert [(row["step"], row["val_loss"]) for row in log.vals] == [(0, 10.9), (128, 6.1)]
    assert log.status == "provisional" and "number of steps of its schedule is not in it" in log.problems[0]
    assert "its last step has no train_time" in log.problems


def test_a_cut_log_keeps_what_was_read_and_says_what_is_missing(tmp_path):
    log = read(tmp_path, CE[: CE.index("step:1500")] + "step:1500/1555 val_lo")
    assert log.last == 750 and len(log.vals) == 2
    assert log.problems == ["line 4: step 1500 has neither val_loss nor train_time", "it ends at step 750 of 1555"]
    torn = read(tmp_path, CE.replace("val_loss:3.9000", "val_loss:3.9x"))
    assert torn.problems == ["line 3: val_loss '3.9x' is not a number"] and torn.vals[-1]["val_loss"] == 3.2783


def test_a_second_run_in_one_file_is_left_out_and_said(tmp_path):
    log = read(tmp_path, CE + CE)
    assert len(log.vals) == 4 and log.status == "provisional"
    assert log.problems[0].endswith("step 0 after step 1555: of another run, and left out")
    assert log.problems[3] == "and 2 more such lines"


def test_an_early_stop_is_an_end(tmp_path):
    cut = CE.replace(END + "\n", "Early stop triggered at step:1500\n")
    assert read(tmp_path, cut).status == "imported"


def test_step_times_are_of_single_steps_after_the_first(tmp_path):
    lines = [f"step:{i}/60 train_time:{1000 * min(i, 10) + 10 * i}ms step_avg:1ms" for i in range(1, 61)]
    log = read(tmp_path, "\n".join([*lines, "step:60/60 val_loss:5.0 train_time:10600ms step_avg:1ms"]))
    assert logs.summary(log)["step_ms_median"] == logs.summary(log)["step_ms_p90"] == 10.0


def test_the_seeds_figure_of_the_budget(tmp_path):
    read(tmp_path, SOURCE + CE, "ce.txt")
    timing, budget = tmp_path / "timing.csv", tmp_path / "budget.json"
    assert run_script("ce_baseline", "--log", tmp_path / "ce.txt", "--out", timing) == 0
    assert run_script("budget", "--timing", timing, "--fraction", "0.1", "--horizon", "0", "--out", budget) == 0
    found = json.loads(budget.read_text())
    assert round(found["budget_ms"]) == 69402 and found["ce_train_time_ms"] == 694015.0
    assert (found["horizon"], found["clock"], found["device"]) == (1555, "logged", "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(
    ("text", "said"), [(CE[: CE.index(END)], "it ends at step 1500 of 1555"), (KD, "it is a KD run's")]
)
def test_a_log_that_is_no_whole_ce_run_sets_no_budget(tmp_path, capsys, text, said):
    read(tmp_path, text, "x.txt")
    assert run_script("ce_baseline", "--log", tmp_path / "x.txt", "--out", tmp_path / "t.csv") == 1
    assert said in capsys.readouterr().err and not (tmp_path / "t.csv").exists()


def test_the_command_imports_what_it_can(tmp_path, capsys):
    for name, text in {"a.txt": SOURCE + CE, "cut.txt": CE[: CE.index(END)], "no.txt": "hello"}.items():
        (tmp_path / name).write_text(text)
    code = main(["import", *(str(tmp_path / name) for name in ("a.txt", "cut.txt", "no.txt")), "--out", str(tmp_path)])
    out, err = capsys.readouterr()
    assert code == 1 and "no.txt: no line like" in err
    assert "train_time 694015 ms; as a CE baseline it gives a teacher 69402 ms (10%)" in out
    assert "missing: it ends at step 1500 of 1555" in out
    folders = sorted((tmp_path / "runs").iterdir())
    runs = [RunFolder.read(f"log|{folder.name}|{folder}") for folder in folders]
    assert [(run.status, run.ok, run.horizon) for run in runs] == [
        ("imported", True, 1555),
        ("provisional", False, 1555),
    ]
    assert runs[0].val[-1]["val_loss"] == 3.2783 and runs[0].val[-1]["tokens"] is None
    assert (folders[0] / "train.log").read_text() == SOURCE + CE and (folders[0] / "val_loss.png").stat().st_size > 0


def test_logs_in_a_campaign_enter_its_tables_and_no_claim(tmp_path):
    campaign = SyntheticCampaign(tmp_path / "c")
    lines = [
        f"step:{s}/300 val_loss:{6.0 - 0.02 * s:.4f} train_time:{s * 5}ms step_avg:5.0ms" for s in range(0, 301, 25)
    ]
    for name, text in {"fast": "\n".join(lines), "cut": "\n".join(lines[:3])}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    folders = [logs.import_log(tmp_path / f"{name}.txt", tmp_path / "c")[0] for name in ("fast", "cut")]
    known = campaign.flags

    def flags(*arms):
        return known(*arms) + ([] if arms else [f"--run=log|{f.name}|{f}" for f in folders])

    campaign.flags = flags
    campaign.run_all()
    ledger = {row["run_id"]: row for row in read_rows(campaign.path("tables/ledger.csv"))}
    fast, cut = (ledger[folder.name] for folder in folders)
    assert (fast["mode"], fast["status"], fast["steps_to_target"]) == ("imported_log", "imported", "75")
    assert (cut["status"], cut["steps_to_target"]) == ("provisional", "never")
    compared = [row for row in read_rows(campaign.path("tables/compare.csv")) if row["arm"] == "log"]
    assert len(compared) == 2 and {row["steps_saved"] for row in compared} == {""}
    tested = list(csv.DictReader(campaign.path("tables/verdict.csv").open()))
    assert tested and "log" not in {row[key] for row in tested for key in ("arm", "against")}
    assert campaign.json("verdict.json")["claimable"]
    assert "imported log" in campaign.path("figures/val_loss_steps.svg").read_text()


def test_a_logs_budget_is_never_a_claim(tmp_path):
    campaign = SyntheticCampaign(tmp_path / "c")
    (tmp_path / "ce.txt").write_text("step:300/300 val_loss:3.0 train_time:3000ms step_avg:10ms\n")
    campaign.baseline = lambda: (
        campaign.script("ce_baseline", "--log", tmp_path / "ce.txt", "--out", campaign.path("ce/timing.csv")),
        campaign.script(
            *("budget", "--timing", campaign.path("ce/timing.csv"), "--fraction", "0.1"),
            *("--horizon", 0, "--out", campaign.path("budget.json")),
        ),
    )
    campaign.run_all()
    verdict = campaign.json("verdict.json")
    assert campaign.json("teacher/selected.json")["run_id"] and not verdict["claimable"]
    assert "the budget comes from a training log" in verdict["not_claimable_because"][0]


def test_two_runs_that_are_read_from_a_log_and_made_here_differ_in_their_clock(tmp_path):
    ours = run_folder(tmp_path, "ce", "CE", make_config(), val=[(0, 7.0), (100, 5.0)])
    folder, _ = logs.import_log(_write(tmp_path / "x.txt", CE), tmp_path)
    assert (ours.row()["clock"], RunFolder.read(f"log|x|{folder}").row()["clock"]) == ("measured", "logged")


def _write(path, text):
    path.write_text(text)
    return path
