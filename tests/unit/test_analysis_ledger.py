"""The ledger's columns, modes and order."""

import pytest
from test_analysis_synthetic import make_config, read_rows, run_folder

from kdclimb.analysis import ledger, tables
from kdclimb.artifacts import write_json

TARGET = {"value": 5.0, "consecutive": 2, "source": "teacher_final_val", "reason": "of a test", "fixed": []}
HEADER = (
    "run_id,mode,teacher_params_m,teacher_steps,teacher_train_time_ms,alpha,temp,kd_lr_boost,student_steps,best_val,"
    "final_val,steps_to_target,status,artifact_dir,seed,tokens,active_flops,val_instability,clock,device,code_hash,"
    "data_hash,enters_claims,kd_cache_ms,kd_cache_ms_amortised,anchor_before_ms,anchor_after_ms"
)
VAL = [(0, 7.0), (25, 6.0), (50, 4.9), (75, 4.8), (100, 4.85)]


def write(tmp_path, *arms):
    teacher = run_folder(tmp_path / "runs", "teacher", "A", make_config(50), val=VAL[:3], params_stored=1500000)
    boost = (1.5, 0.15, 0.35)
    configs = {
        "ce": make_config(),
        "probe": make_config(50, stop_step=10),
        "isolate": make_config(stop_step=20, kd={"teacher": teacher.run_id, "infer_only": True}),
        "screen": make_config(kd={"teacher": teacher.run_id, "temperature": 2.0, "alpha": 0.25}),
        "kd": make_config(seed=1, kd={"teacher": teacher.run_id}, boost=boost),
        "control_boost": make_config(boost=boost),
        "control_random": make_config(kd={"teacher": teacher.run_id, "random_teacher": True}, boost=boost),
    }
    runs = [teacher]
    for arm in arms:
        stop = configs[arm].schedule.stop_step
        val = [row for row in VAL if row[0] <= stop]
        runs.append(run_folder(tmp_path / "runs", arm, "X", configs[arm], val=val))
    write_json(tmp_path / "target.json", TARGET)
    ledger.ledger(runs, tmp_path / "target.json", False, tmp_path / "ledger.csv")
    return runs, {row["mode"]: row for row in read_rows(tmp_path / "ledger.csv")}


def test_header_modes_and_order_of_arms(tmp_path):
    _, rows = write(tmp_path, "control_random", "screen", "isolate", "probe", "ce", "control_boost", "kd")
    assert (tmp_path / "ledger.csv").read_text().splitlines()[0] == HEADER
    modes = "ce_baseline teacher_probe teacher kd_isolate kd_screen kd_full ce_lr_policy kd_random_teacher"
    assert list(rows) == modes.split()


def test_cells(tmp_path):
    runs, rows = write(tmp_path, "ce", "isolate", "screen", "kd", "control_boost", "control_random")
    columns = (
        "teacher_params_m teacher_steps teacher_train_time_ms alpha temp kd_lr_boost student_steps steps_to_target"
    )
    cells = {mode: [row[column] for column in columns.split()] for mode, row in rows.items()}
    assert cells == {
        "ce_baseline": ["-", "-", "-", "-", "-", "-", "100", "50"],
        "teacher": ["1.5", "50", "500.0", "-", "-", "-", "-", "-"],
        "kd_isolate": ["1.5", "50", "500.0", "-", "-", "-", "20", "-"],
        "kd_screen": ["1.5", "50", "500.0", "0.25", "2.0", "1.0", "100", "50"],
        "kd_full": ["1.5", "50", "500.0", "0.5", "1.0", "1.5", "100", "50"],
        "ce_lr_policy": ["-", "-", "-", "-", "-", "1.5", "100", "50"],
        "kd_random_teacher": ["1.5", "-", "-", "0.5", "1.0", "1.5", "100", "50"],
    }
    kd = rows["kd_full"]
    assert (kd["best_val"], kd["final_val"], kd["status"]) == ("4.8", "4.85", "ok")
    assert kd["artifact_dir"] == str(runs[4].folder) and kd["run_id"] == runs[4].run_id


def test_run_shared_by_arms_counts_once_for_the_first(tmp_path):
    config = make_config(kd={})
    kd = run_folder(tmp_path / "runs", "kd", "T1", config, val=VAL)
    screen = tables.RunFolder.read(f"screen|T1|{kd.folder}")
    write_json(tmp_path / "target.json", TARGET)
    ledger.ledger([kd, screen], tmp_path / "target.json", False, tmp_path / "ledger.csv")
    assert [row["mode"] for row in read_rows(tmp_path / "ledger.csv")] == ["kd_screen"]


def test_misses_and_failures(tmp_path):
    failed = run_folder(tmp_path / "runs", "kd", "T1", make_config(kd={}), status="oom", reason="9 GiB")
    never = run_folder(tmp_path / "runs", "ce", "CE", make_config(), val=VAL[:2])
    write_json(tmp_path / "target.json", TARGET)
    ledger.ledger([failed, never], tmp_path / "target.json", False, tmp_path / "ledger.csv")
    ce, kd = read_rows(tmp_path / "ledger.csv")
    assert (ce["steps_to_target"], ce["status"]) == ("never", "ok")
    assert (kd["steps_to_target"], kd["status"], kd["final_val"], kd["teacher_steps"]) == ("never", "oom", "-", "-")


def test_our_columns(tmp_path):
    _, rows = write(tmp_path, "ce", "probe", "kd", "screen")
    ce = rows["ce_baseline"]
    assert (ce["seed"], ce["tokens"], ce["active_flops"]) == ("0", "100000", "600000000000.0")
    assert float(ce["val_instability"]) == pytest.approx(0.05) and ce["clock"] == "measured"
    assert (ce["device"], ce["code_hash"], ce["data_hash"]) == ("cpu", "c0de00000000", "0123")
    claims = {mode: row["enters_claims"] for mode, row in rows.items()}
    assert claims == {
        "ce_baseline": "yes",
        "teacher_probe": "no: a part of a run",
        "teacher": "yes",
        "kd_screen": "no: it chose, and does not judge",
        "kd_full": "yes",
    }


def test_teachers_flops_count_where_kd_was_on(tmp_path):
    run = run_folder(tmp_path, "kd", "T1", make_config(kd={}), val=VAL, shares=[0.5] * 40, teacher_flops_per_token=2e6)
    assert ledger.active_flops(run) == 100_000 * 6e6 + 40_000 * 2e6


@pytest.mark.parametrize(
    ("values", "exploratory", "why"),
    [
        ({}, True, "exploratory"),
        ({"config": make_config(clock="modelled")}, False, "modelled time"),
        ({"status": "oom", "reason": "9 GiB"}, False, "oom"),
    ],
)
def test_what_bars_a_run_from_claims(tmp_path, values, exploratory, why):
    config = values.pop("config", make_config())
    assert ledger.barred(run_folder(tmp_path, "ce", "CE", config, **values), exploratory) == why
