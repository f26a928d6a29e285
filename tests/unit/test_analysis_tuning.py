"""What tuning each arm was given, in numbers."""

from test_analysis_synthetic import make_config, run_folder

from kdclimb.analysis import targets, tuning

VAL = [(0, 6.0), (25, 5.0)]


def screened(*points):
    nothing = dict.fromkeys(targets.SCREEN_COLUMNS)
    return [nothing | {"label": label, "adam_lr": lr, "lr_boost_mult": 1.0, "final_val": 4.0} for label, lr in points]


def rows(tmp_path, ce, kd, ce_point, point):
    runs = [
        run_folder(tmp_path, "ce", "CE", make_config(horizon=25, seed=100), val=VAL, final_val=4.5),
        run_folder(tmp_path, "ce_screen", "A", make_config(horizon=25, seed=100, boost=(2.0, 0.1, 0.2)), val=VAL),
        run_folder(tmp_path, "screen", "T1", make_config(horizon=25, seed=100, kd={}), val=VAL, step_ms=20.0),
    ]
    return tuning.tuning_rows({"ce": ce, "kd": kd}, runs, point, ce_point)


def test_points_and_time_of_each_arm_and_what_lies_on_an_edge(tmp_path):
    grid = screened(("A", 0.02), ("B", 0.03), ("C", 0.04))
    ce, kd = rows(tmp_path, grid, grid, "B", "C")
    assert (ce["n_points"], ce["train_steps"], ce["train_time_ms"]) == (3, 25, 250.0)
    assert (kd["train_time_ms"], kd["untuned_final_val"]) == (500.0, 4.5)
    assert (ce["chosen"], ce["edge"], kd["edge"]) == ("B", "", "adam_lr 0.04 of 0.02, 0.03, 0.04")
    words = tuning.tuning([ce, kd])
    assert "CE 3 points, 250 ms; KD 3 points, 500 ms" in words and "KD's choice is on the edge" in words
    assert "not tuned equally" not in words


def test_all_of_the_tokens_are_no_edge(tmp_path):
    grid = [row | {"kd_token_frac": share} for row, share in zip(screened(("A", 0.1), ("B", 0.1)), (0.5, 1.0))]
    edges = [rows(tmp_path / point, [], grid, None, point)[1]["edge"] for point in "AB"]
    assert edges == ["kd_token_frac 0.5 of 0.5, 1", ""]


def test_unequal_tuning_is_said(tmp_path):
    assert "not tuned equally" in tuning.tuning(rows(tmp_path, [], screened(("C", 0.04)), None, "C"))
