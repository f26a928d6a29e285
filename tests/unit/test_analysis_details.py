"""The tables that only the report reads: traces, the horizon curve, configs, warnings, the headline."""

import dataclasses
import json
import statistics

import pytest
from test_analysis_synthetic import SyntheticCampaign, make_config, read_rows, run_folder

from kdclimb.analysis.cautions import warning_rows
from kdclimb.analysis.details import COSTS, FACTS
from kdclimb.analysis.tables import RunFolder
from kdclimb.analysis.traces import BLOCKS, config_rows, flatten, horizon_rows, page_rows, trace_rows
from kdclimb.config import RunConfig

TEACHER = {"run_id": "teacher", "train_time_ms": 75.0}
VERDICT = {"point": "T1", "n_seeds": 3, "tuning": "Tuning: KD had 4 trials. No choice lies on an edge."}
KD_BLEND = 10  # post_stop_blend_steps of make_config


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    campaign = SyntheticCampaign(tmp_path_factory.mktemp("campaign"))
    campaign.run_all()
    return campaign


def whole(horizon):
    return [(0, 6.0), (horizon, 4.5)]


def test_a_trace_is_blocks_of_steps_with_their_median_and_longest_step(tmp_path):
    times = [10.0] * 300
    times[100] = 50.0
    run = run_folder(tmp_path, "ce", "CE 300", make_config(horizon=300), val=whole(300), step_ms=times)
    rows = trace_rows(run, TEACHER)
    assert len(rows) == BLOCKS and [row["step"] for row in rows[:2]] == [5, 10]
    assert [row["step"] for row in rows if row["spike"]] == [105]  # the block that has step 101
    spike = next(row for row in rows if row["spike"])
    assert (spike["step_ms"], spike["step_ms_max"]) == (10.0, 50.0)
    assert {row["phase"] for row in rows} == {""} and rows[-1]["time_with_teacher_ms"] == sum(times)


def test_the_slow_first_steps_are_no_spike(tmp_path):
    times = [500.0, 400.0] + [10.0] * 48
    run = run_folder(tmp_path, "ce", "CE 50", make_config(horizon=50), val=whole(50), step_ms=times)
    rows = trace_rows(run, TEACHER)
    assert [row["step_ms"] for row in rows[:3]] == [None, None, 10.0] and not any(row["spike"] for row in rows)


def test_kds_phases_and_its_teachers_time(tmp_path):
    shares = {"shares": [0.5] * 20, "kd_stop_step": 50}
    run = run_folder(tmp_path, "kd", "T1", make_config(kd={}), val=whole(100), **shares)
    rows = trace_rows(run, TEACHER)
    phases = {row["step"]: row["phase"] for row in rows}
    assert phases[50] == "A" and phases[50 + KD_BLEND] == "B" and phases[50 + KD_BLEND + 2] == "C"
    assert {row["time_with_teacher_ms"] - row["train_time_ms"] for row in rows} == {75.0}
    assert rows[4]["kd_share"] == 0.5 and rows[-1]["kd_share"] is None


def test_the_hard_loss_is_normalised_by_its_multi_token_weights(tmp_path):
    config = make_config(horizon=50)
    heavy = type(config).from_dict(
        config.to_dict() | {"schedule": config.to_dict()["schedule"] | {"mtp_weights": [[1.0, 1.0]]}}
    )
    loss = [
        trace_rows(run_folder(tmp_path, "ce", "CE", c, val=whole(50)), TEACHER)[0]["train_loss"]
        for c in (config, heavy)
    ]
    assert loss == [5.0, 2.5]  # write_run's loss_hard is 5


def test_the_horizon_curve_fits_the_means_and_has_an_interval(tmp_path):
    ends = {50: (5.0, 5.1, 5.2), 100: (4.6, 4.8, 4.7), 200: (4.9, 4.7, 4.8)}  # the last is no lower: the fit is level
    runs = [
        run_folder(tmp_path, "ce", f"CE {h}", make_config(horizon=h, seed=seed), val=[(0, 6.0), (h, loss)])
        for h, losses in ends.items()
        for seed, loss in enumerate(losses)
    ]
    runs.append(run_folder(tmp_path, "ce", "CE 50", make_config(horizon=50, seed=100), val=[(0, 6.0), (50, 9.0)]))
    rows = horizon_rows(runs, 0.95)
    means = [row for row in rows if row["seed"] is None]
    assert [row["final_val"] for row in means] == pytest.approx([5.1, 4.7, 4.8])  # without the screen's seed
    assert [row["fitted"] for row in means] == pytest.approx([5.1, 4.75, 4.75])
    half = 4.302652729911275 * statistics.stdev(ends[50]) / 3**0.5  # t of 2 degrees of freedom at 97.5 %
    assert (means[0]["low"], means[0]["high"]) == pytest.approx((5.1 - half, 5.1 + half))


def test_a_run_is_held_against_ce_of_its_horizon_and_seed(tmp_path):
    runs = [run_folder(tmp_path, "ce", "CE 50", make_config(horizon=50, seed=seed), val=whole(50)) for seed in (0, 1)]
    runs.append(run_folder(tmp_path, "kd", "T1", make_config(horizon=50, seed=1, kd={}), val=whole(50)))
    rows = page_rows(runs)
    assert [row["base_run_id"] for row in rows] == [runs[0].run_id, runs[0].run_id, runs[1].run_id]
    assert rows[0]["command"] == "x" and "steps.csv" in rows[0]["files"].split()
    differing = {r["key"] for r in config_rows(runs[:1])} ^ {r["key"] for r in config_rows(runs[2:])}
    assert "kd.alpha" in differing and "schedule.horizon" not in differing


def test_flatten_keeps_lists_whole():
    assert flatten({"a": {"b": 1, "c": [1, {"d": 2}]}, "e": None}) == [
        ("a.b", "1"),
        ("a.c", "[1, {'d': 2}]"),
        ("e", "none"),
    ]


def kinds(runs, verdict=VERDICT):
    return {(row["place"], row["kind"]) for row in warning_rows(runs, verdict)}


def test_a_clean_run_has_no_warning_of_its_own(tmp_path):
    run = run_folder(tmp_path, "ce", "CE 50", make_config(horizon=50), val=whole(50))
    assert kinds([run], None) == set()


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"broken": 1}, ("curves", "resumed")),
        ({"shared_device": 1}, ("curves", "shared")),
        ({"code_hash": "another"}, ("verdict", "code")),
        ({"device": "another"}, ("curves", "devices")),
        ({"threads": 7}, ("curves", "devices")),
    ],
)
def test_what_one_run_warns_of(tmp_path, changes, expected):
    clean = run_folder(tmp_path, "ce", "CE 50", make_config(horizon=50), val=whole(50))
    other = run_folder(tmp_path, "ce", "CE 50", make_config(horizon=50, seed=1), val=whole(50), **changes)
    assert kinds([clean, other], None) == {expected}


@pytest.mark.parametrize("weights, expected", [("aa", set()), ("ab", {("compare", "teacher")})])
def test_students_of_several_trainings_of_one_teacher(tmp_path, weights, expected):
    runs = []
    for seed, sha256 in enumerate(weights):
        run = run_folder(tmp_path, "kd", "T1", make_config(seed=seed, kd={}), val=whole(100))
        status = json.loads((run.folder / "status.json").read_text()) | {"teacher_sha256": sha256}
        (run.folder / "status.json").write_text(json.dumps(status))
        runs.append(RunFolder.read(f"kd|T1|{run.folder}"))
    grown = RunConfig.from_dict(make_config(seed=2).to_dict() | {"grown_from": runs[0].config.kd.teacher})
    runs.append(run_folder(tmp_path, "control_growth", "grown", grown, val=whole(100)))
    runs[-1] = dataclasses.replace(runs[-1], teacher_sha256=weights[-1])
    assert kinds(runs, None) == expected
    for row in warning_rows(runs, None):
        assert row["warning"].startswith(f"2 trainings of teacher {runs[0].config.kd.teacher} taught")
        assert row["run_ids"].split() == [run.run_id for run in runs]


def test_what_failed_and_what_was_not_controlled_for(tmp_path):
    oom = {"status": "oom", "reason": "9 GiB", "step_ms": []}
    failed = run_folder(tmp_path, "kd", "T1", make_config(kd={}), **oom)
    assert {("compare", "failed"), ("controls", "controls")} == kinds([failed])
    (row,) = (row for row in warning_rows([failed], VERDICT) if row["kind"] == "failed")
    assert row["run_ids"] == failed.run_id and "oom" in row["warning"]


@pytest.mark.parametrize("there, expected", [(99, {("controls", "passes")}), (100, set()), (None, set())])
def test_text_that_ran_out(tmp_path, there, expected):
    runs = [
        run_folder(tmp_path / "runs", "ce", "CE 50", make_config(horizon=50), val=whole(50), tokens=50),
        run_folder(tmp_path / "runs", "control_extra", "50 more", make_config(), val=whole(100), tokens=100),
    ]
    folder = tmp_path / "data" / runs[0].config.data.id
    folder.mkdir(parents=True)
    if there:
        shards = [{"tokens": 60}, {"tokens": there - 60}]
        (folder / "manifest.json").write_text(json.dumps({"train": shards}))
    assert kinds(runs, None) == expected
    for row in warning_rows(runs, None):
        assert row["run_ids"] == runs[1].run_id and "took 1.01 times" in row["warning"]


@pytest.mark.parametrize("clock", ["measured", "modelled"])
@pytest.mark.parametrize("facts", [{"shared_device": True}, {"broken": 2}, {"shared_device": False, "broken": 0}, None])
def test_a_cache_that_was_timed_badly(tmp_path, facts, clock):
    configs = [make_config(seed=seed, kd={"cache": "hidden-0"}, clock=clock) for seed in (0, 1)]
    runs = [run_folder(tmp_path / "runs", "kd", "T1", config, val=whole(100)) for config in configs]
    runs.append(run_folder(tmp_path / "runs", "ce", "CE", make_config(clock=clock), val=whole(100)))
    if facts is not None:
        (tmp_path / "caches/hidden-0").mkdir(parents=True)
        (tmp_path / "caches/hidden-0/cache.json").write_text(json.dumps({"cost_ms": 1.0} | facts))
    doubted = clock == "measured" and any((facts or {}).values())
    found = [row for row in warning_rows(runs, None) if row["kind"] == "cache"]
    assert [row["run_ids"].split() for row in found] == [[run.run_id for run in runs[:2]]] * doubted


@pytest.mark.parametrize("tail, boost, missing", [(1.0, None, False), (0.35, None, True), (1.0, (2.0, 0.1, 0.2), True)])
def test_a_control_of_kds_lr_is_missed_only_where_that_is_not_ces(tmp_path, tail, boost, missing):
    run = run_folder(tmp_path, "kd", "T1", make_config(kd={"post_stop_lr": tail}, boost=boost))
    (row,) = (row for row in warning_rows([run], VERDICT) if row["kind"] == "controls")
    assert ("CE with KD's LR" in row["warning"]) == missing


def test_too_few_seeds_and_an_edge_of_the_grid(tmp_path):
    run = run_folder(tmp_path, "ce", "CE 50", make_config(horizon=50), val=whole(50))
    edge = VERDICT | {
        "n_seeds": 2,
        "tuning": "Tuning: ... KD's choice is on the edge of its grid: temperature 1 of 1, 2.",
    }
    assert kinds([run], edge) == {("tests", "seeds"), ("screen", "edge"), ("controls", "controls")}


def test_the_headline_holds_the_verdicts_figures(campaign):
    rows = {row["figure"]: row for row in read_rows(campaign.path("tables/headline.csv"))}
    verdict = json.loads(campaign.path("verdict.json").read_text())
    assert float(rows["steps_saved"]["value"]) == verdict["steps_saved_mean"] == 50.0
    assert (rows["steps_saved"]["low"], rows["steps_saved"]["high"], rows["steps_saved"]["n_seeds"]) == (
        "50",
        "50",
        "3",
    )
    assert (rows["teacher_ms"]["value"], rows["budget_ms"]["value"]) == ("75.0", "300.0")
    tested = next(
        row
        for row in read_rows(campaign.path("tables/verdict.csv"))
        if (row["measure"], row["arm"], row["against"], row["cost"]) == ("crossing", "kd", "ce", "steps")
    )
    assert rows["steps_saved"]["saved_share"] == tested["saved_share"]
    assert float(tested["saved_share"]) == 1 - float(tested["ratio"])


def test_each_figure_of_the_headline_is_in_the_decision_that_it_names(campaign):
    files = {"selected": "teacher/selected.json"}
    seen = set()
    for row in read_rows(campaign.path("tables/headline.csv")):
        name, keys = row["source"].split(": ")
        found = campaign.json(files.get(name.removesuffix(".json"), name))
        for key in keys.split("."):
            found = found[key]
        values = found if isinstance(found, list) else [found]
        assert (float(row["value"]) if row["value"] else None) in values, row
        seen.add(row["figure"])
    assert seen == {*COSTS, *FACTS}


def test_every_run_of_the_campaign_has_a_page(campaign):
    ids = {run.run_id for run in campaign.expanded()}
    for table in ("run_pages", "run_configs", "traces"):
        assert {row["run_id"] for row in read_rows(campaign.path(f"tables/{table}.csv"))} == ids, table
