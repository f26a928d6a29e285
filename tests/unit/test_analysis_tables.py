"""File formats: typed cells, atomic writes, and errors that name the file."""

import json

import pytest
from test_analysis_synthetic import make_config, run_folder, run_script, write_run

from kdclimb.analysis import tables
from kdclimb.analysis.tables import AnalysisError, RunFolder


def test_csv_round_trip_keeps_types(tmp_path):
    path = tmp_path / "deep" / "t.csv"
    row = {"label": "12", "code_hash": "0012e4567890", "seed": 0, "final_val": 0.1 + 0.2, "broken": None}
    tables.write_csv(path, list(row), [row])
    assert path.read_text() == "label,code_hash,seed,final_val,broken\n12,0012e4567890,0,0.30000000000000004,\n"
    assert tables.read_csv(path, list(row)) == [row]


def test_text_with_commas_quotes_and_newlines_survives(tmp_path):
    rows = [{"reason": 'a, "b"\nc'}]
    tables.write_csv(tmp_path / "t.csv", ["reason"], rows)
    assert tables.read_csv(tmp_path / "t.csv", ["reason"]) == rows


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("step\n1\n", "lacks the columns tokens"),
        ("step,tokens\n1,x\n", "line 2, column tokens: 'x' is not a number"),
        ("step,tokens\n1\n", "line 2 has not as many cells"),
        ("step,tokens\n1,2,3\n", "line 2 has not as many cells"),
        ("", "lacks the columns step, tokens"),
    ],
)
def test_malformed_csv_is_named(tmp_path, content, complaint):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(AnalysisError, match=complaint) as error:
        tables.read_csv(path, ["step", "tokens"])
    assert str(path) in str(error.value)


def test_missing_and_malformed_json_are_named(tmp_path):
    with pytest.raises(AnalysisError, match=r"no\.json"):
        tables.read_json(tmp_path / "no.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(AnalysisError, match=r"bad\.json: not JSON"):
        tables.read_json(tmp_path / "bad.json")
    (tmp_path / "short.json").write_text("{}")
    with pytest.raises(AnalysisError, match=r"short\.json: lacks value"):
        tables.read_json(tmp_path / "short.json", ["value"])


def test_row_that_lacks_a_column_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(KeyError):
        tables.write_csv(tmp_path / "t.csv", ["step", "tokens"], [{"step": 1}])
    assert list(tmp_path.iterdir()) == []


def test_folder_of_another_run_is_refused(tmp_path):
    folder = write_run(tmp_path, make_config(seed=0))
    other = folder.rename(tmp_path / make_config(seed=1).run_id)
    with pytest.raises(AnalysisError, match="this is the config of run"):
        RunFolder.read(f"ce|CE 100|{other}")


def test_bad_run_flags_and_folders_are_named(tmp_path):
    with pytest.raises(AnalysisError, match="ARM"):
        RunFolder.read("ce|CE 100")
    with pytest.raises(AnalysisError, match=r"gone/status\.json"):
        RunFolder.read(f"ce|CE 100|{tmp_path / 'gone'}")
    folder = write_run(tmp_path, make_config())
    (folder / "status.json").write_text('{"status": "ok"}')
    with pytest.raises(AnalysisError, match=r"status\.json: lacks reason"):
        RunFolder.read(f"ce|CE 100|{folder}")


def test_steps_must_ascend(tmp_path):
    run = run_folder(tmp_path, "ce", "CE", make_config(), val=[(0, 6.0), (50, 5.0), (25, 5.5)])
    with pytest.raises(AnalysisError, match=r"val\.csv: row 3: the steps do not ascend"):
        _ = run.val


def test_durations_drop_the_first_two_steps(tmp_path):
    run = run_folder(tmp_path, "probe", "A", make_config(stop_step=5), step_ms=[90.0, 50.0, 10.0, 30.0, 20.0])
    assert run.durations() == [10.0, 30.0, 20.0]
    assert run.step_ms() == 20.0
    assert run.durations(per_token=True) == [0.01, 0.03, 0.02]
    short = run_folder(tmp_path, "probe", "B", make_config(stop_step=2), step_ms=[90.0, 50.0])
    assert short.durations() == [50.0]


def test_where_a_run_ran_is_told_if_it_did_not_end_well(tmp_path):
    """A good run's row is the same wherever it ran."""
    for status, told in (("ok", ("", "")), ("oom", ("12", "step 3\nout of memory"))):
        folder = write_run(tmp_path / status, make_config(), status=status)
        file = folder / "status.json"
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"slurm_job": "12", "log_tail": "step 3\nout of memory"})
        )
        row = RunFolder.read(f"ce|CE|{folder}").row()
        tables.write_csv(tmp_path / "runs.csv", tables.RUN_COLUMNS, [row])
        (read,) = tables.read_csv(tmp_path / "runs.csv", tables.RUN_COLUMNS)
        assert (read["slurm_job"], read["log_tail"]) == told


def test_resumes_count_under_the_measured_clock_only(tmp_path):
    for clock, expected in (("measured", 1), ("modelled", None)):
        run = run_folder(tmp_path, "ce", "CE", make_config(clock=clock), broken=1)
        assert run.row()["broken"] == expected


@pytest.mark.parametrize(
    ("ms", "text"),
    [(61.44, "61.4 ms"), (999.4, "999 ms"), (999.9, "1.00 s"), (6144.0, "6.14 s"), (69402.0, "69.4 s")],
)
def test_times_in_words(ms, text):
    assert tables.show_ms(ms) == text


def test_numbers_in_words():
    assert [tables.show_number(v) for v in (50.0, 37.5, 1234567, -0.01)] == ["50", "37.5", "1,234,567", "0"]


def test_scripts_turn_analysis_errors_into_a_message_and_exit_1(tmp_path, capsys):
    assert (
        run_script("target", "--selected", tmp_path / "gone.json", "--fixed", "[]", "--out", tmp_path / "t.json") == 1
    )
    message = capsys.readouterr().err
    assert message.startswith("target: ") and "gone.json" in message
    assert run_script("target", "--out", tmp_path / "t.json") == 2  # argparse: a flag is missing
