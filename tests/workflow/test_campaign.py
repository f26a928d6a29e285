"""The real workflow on the tiny campaign, through ./run: what it makes, what it remakes, how it ends."""

import csv
import json
import os
import re
import shutil
import subprocess
import time

import pytest
import seed_checkpoints
import torch
import yaml
from checkouts import ROOT, SMALL, TINY, Checkout, jobs, overlay, trains
from configs import merged

from kdclimb import expansion
from kdclimb.artifacts import publish
from kdclimb.campaign import data_id, load

pytestmark = pytest.mark.slow

LEDGER = (
    "run_id mode teacher_params_m teacher_steps teacher_train_time_ms alpha temp kd_lr_boost student_steps best_val "
    "final_val steps_to_target status artifact_dir"
).split()  # the seed's columns, which stand first


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---- what a campaign makes


def test_first_line_names_campaign_and_device(finished):
    assert finished.output.splitlines()[0].startswith("kdclimb: campaign tiny on cpu")


def test_every_stage_leaves_its_result(finished):
    results = finished.path / "results/tiny"
    expected = """ce/timing.csv budget.json teacher/probe.csv teacher/projected.json teacher/trained.csv
        teacher/measured.json teacher/selected.json target.json kd/isolates.csv kd/screen.csv kd/promoted.json
        kd/full.csv controls.csv tables/curves.csv tables/runs.csv tables/compare.csv tables/teachers.csv
        tables/reached.csv tables/verdict.csv tables/steps_saved_trend.csv tables/break_even.csv
        tables/stop_conditions.csv tables/teacher_budget10_summary.csv tables/ledger.csv verdict.json
        ce/screen.csv tables/tuning.csv tables/advice.csv tables/headline.csv report/index.html
        figures/val_loss_steps.svg""".split()
    assert [name for name in expected if not (results / name).is_file()] == []
    runs = rows(results / "tables/runs.csv")
    assert {r["arm"] for r in runs} == {
        *("ce", "ce_screen", "probe", "teacher", "isolate", "screen", "kd"),
        *("control_boost", "control_random", "control_tuned", "control_smooth", "control_extra"),
    }
    assert {r["status"] for r in runs} == {"ok"}
    kept = {
        r["run_id"] for r in runs if (finished.path / f"results/runs/{r['run_id']}/checkpoints/model.json").is_file()
    }
    short = ("ce_screen", "probe", "isolate", "screen", "control_random")
    assert kept == {r["run_id"] for r in runs if r["arm"] not in short}  # weights: full


def test_the_budget_is_a_tenth_of_the_median_ce_time_at_the_longest_horizon(finished):
    results = finished.path / "results/tiny"
    times = [float(r["train_time_ms"]) for r in rows(results / "ce/timing.csv") if r["horizon"] == "75"]
    budget = json.loads((results / "budget.json").read_text())
    assert len(times) == 2 and budget["budget_ms"] == pytest.approx(0.1 * sum(times) / 2)
    selected = json.loads((results / "teacher/selected.json").read_text())
    assert 0 < selected["train_time_ms"] <= budget["budget_ms"]
    rejected = json.loads((results / "teacher/projected.json").read_text())["rejected"]
    assert list(rejected) == ["L2-H2-D16-75"] and "budget" in rejected["L2-H2-D16-75"]
    assert "L2-H2-D16-75" not in {r["candidate"] for r in rows(results / "teacher/trained.csv")}


def test_the_ledger_has_the_seeds_columns_and_every_run_once(finished):
    ledger = rows(finished.path / "results/tiny/tables/ledger.csv")
    assert list(ledger[0])[: len(LEDGER)] == LEDGER
    folders = {f.name for f in (finished.path / "results/runs").iterdir()}
    assert len(ledger) == len(folders) and {r["run_id"] for r in ledger} == folders


def test_the_report_is_one_file_that_needs_no_network(finished):
    page = (finished.path / "results/tiny/report/index.html").read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", page)
    assert "<script src" not in page and "@import" not in page
    verdict = json.loads((finished.path / "results/tiny/verdict.json").read_text())
    assert verdict["claimable"] is False and "modelled" in " ".join(verdict["not_claimable_because"])
    for text in (verdict["sentence"].split(":")[0], "L2-H2-D16-75", "modelled"):
        assert text in page


def test_snakemakes_own_report_has_every_stage_its_figures_tables_and_captions(finished):
    finished.run("--report", "snakemake-report.html", *TINY)
    page = (finished.path / "snakemake-report.html").read_text()
    assert len(page) < 10 * 2**20
    for category in ("Verdict", "Comparison", "Teachers", "KD sweep", "Cost of a step", "Ledger"):
        assert f'"{category}"' in page, category
    for name in (
        "verdict.json headline.csv advice.csv warnings.csv compare.csv teachers.csv ledger.csv val_loss_steps.svg "
        "val_loss_time.svg teachers.svg horizon_curve.svg break_even.svg sweep_parallel.svg isolates.svg step_parts.svg"
    ).split():
        assert name in page, name
    for caption in ("one line each", "What to try next in campaign tiny", "the monotone fit through the means"):
        assert caption in page, caption


def test_a_profile_is_made_when_asked_for_and_then_shown(changed):
    profile = changed.path / "results/tiny/kd/profile.csv"
    assert not profile.exists()
    assert "kd_profile" in jobs(changed.run("results/tiny/kd/profile.csv", *TINY)) and profile.is_file()
    output = changed.run(*TINY)
    assert "report" in jobs(output) and not {"kd_profile", "compare"} & set(jobs(output)) and not trains(output)
    page = (changed.path / "results/tiny/report/index.html").read_text()
    assert 'data-chart="step_parts"' in page and "The largest part of a step: CE only" in page
    profile.unlink()
    made = jobs(changed.run(*TINY))
    assert "report" in made and "kd_profile" not in made


# ---- what is made again


def test_a_finished_campaign_has_nothing_to_do(finished):
    assert "Nothing to be done" in finished.run("-n", *TINY)


def test_one_temperature_trains_its_point_and_what_follows(changed):
    before = changed.attempts()
    arguments = overlay(changed, "t", kd={"grid": {"temperature": [1.0, 3.0]}})
    changed.run(*arguments)
    after = changed.attempts()
    assert {k: after[k] for k in before} == before
    new = [name for name in after if name not in before]
    screened = [name for name in new if "-50-t3-" in name]
    promoted = json.loads((changed.path / "results/tiny/kd/promoted.json").read_text())["points"]
    follows = [name for name in new if promoted == ["T3-boost1.5-hold0.15-drop0.35"] and "-t3-" in name]
    assert len(screened) == (4 if follows else 1)  # the point; if promoted, its random teacher and two seeds there too
    policies = [name for name in new if name.startswith("celr-")]  # CE with the LR of the runs that follow
    assert set(new) == {*screened, *follows, *policies} and bool(policies) == bool(follows)


def test_kd_from_ngrams_is_an_arm_beside_the_sweep(changed):
    before = changed.attempts()
    ngram = {"orders": [3], "token_frac": [0.2], "entries": 16, "contexts": 300}
    arguments = overlay(changed, "ngram", kd={"ngram": ngram})
    changed.run(*arguments)
    new = {name for name in changed.attempts() if name not in before}
    compared = [row for row in rows(changed.path / "results/tiny/tables/compare.csv") if row["arm"] == "ngram"]
    assert len(compared) == 2 and {row["run_id"] for row in compared} == new
    (table,) = changed.path.glob("results/runs/ngram-*")
    (cost,) = (float(row["train_time_ms"]) for row in rows(table / "summary.csv"))
    for row in compared:
        reached = [float(row[key]) for key in ("time_to_target_ms", "time_to_target_with_teacher_ms")]
        assert cost > 0 and reached[1] == pytest.approx(reached[0] + cost)
    ledger = {row["run_id"]: row for row in rows(changed.path / "results/tiny/tables/ledger.csv")}
    assert ledger[table.name]["mode"] == "teacher_ngram"
    assert {ledger[name]["teacher_train_time_ms"] for name in new} == {repr(cost)}
    assert "Nothing to be done" in changed.run("-n", *arguments)


def test_kd_from_a_cache_that_its_runs_share(changed, tmp_path):
    changed.run(*(arguments := overlay(changed, "cache", kd={"cache": "hidden"}, **SMALL)))
    caches = {folder.name for folder in changed.path.glob("results/caches/*/")}
    ledger = rows(changed.path / "results/tiny/tables/ledger.csv")
    cells = {mode: [row for row in ledger if row["mode"] == mode] for mode in ("kd_screen", "kd_full", "kd_isolate")}
    assert all(row["status"] == "ok" for row in ledger)
    assert len(caches) == 3  # the screen's, and those of a seed at two horizons
    for row in cells["kd_screen"]:  # two points share one
        assert float(row["kd_cache_ms_amortised"]) == pytest.approx(float(row["kd_cache_ms"]) / 2)
    alone = [row for row in cells["kd_full"] if row["kd_cache_ms"] == row["kd_cache_ms_amortised"] != "-"]
    assert len(cells["kd_full"]) == 2 and len(alone) == 1  # the isolate shares that of its seed at the first horizon
    assert sorted(row["kd_cache_ms"] == "-" for row in cells["kd_isolate"]) == [False, True, True, True]
    assert "Nothing to be done" in changed.run("-n", *arguments)
    shutil.rmtree(changed.path / "results/caches")  # nothing trains from them any more
    assert "Nothing to be done" in changed.run("-n", *arguments)
    changed.kdclimb("bundle", "export", tmp_path / "bundle.zip", *arguments)
    there = Checkout(tmp_path / "there")
    assert f"not here: {len(caches)}; to train" in there.kdclimb("bundle", "import", tmp_path / "bundle.zip")
    again = overlay(there, "again", campaign="again", kd={"cache": "hidden"}, **SMALL)  # lists its runs anew
    there.run("results/again/kd/full.csv", *again)
    assert there.attempts() == {} and not list(there.path.glob("results/caches/*/cache.json"))
    assert there.tables("again")["kd/full.csv"] == changed.tables()["kd/full.csv"]


def test_points_share_a_job_and_trained_ones_come_back(changed):
    before = changed.attempts()
    grid = {"temperature": [1.0, 2.0, 3.0]}
    arguments = overlay(changed, "batch", kd={"grid": grid}, cluster={"points_per_job": 2})
    output = changed.run("results/tiny/kd/screen.csv", *arguments)
    assert jobs(output).count("train_batch") == 2 and "train" not in jobs(output)
    assert {name: n for name, n in changed.attempts().items() if "-50-t3-" not in name} == before
    batches = [rows(file) for file in sorted(changed.path.glob("results/tiny/batches/screen-*of2-*.csv"))]
    assert [[r["status"] for r in batch] for batch in batches] == [["ok", "ok"], ["ok"]]
    screened = {r["run_id"] for r in rows(changed.path / "results/tiny/kd/screen.csv")}
    assert {r["run_id"] for batch in batches for r in batch} == screened and len(screened) == 3
    (new,) = (name for name in screened if "-50-t3-" in name)
    changed.kdclimb("retry", "--run", new)
    assert jobs(changed.run("-n", "results/tiny/kd/screen.csv", *arguments)).count("train_batch") == 1


def test_runs_of_a_stage_share_a_job_and_come_back_from_their_folders(finished, changed):
    stages = "ce control_boost controls isolate kd probe screen".split()
    made, batches = jobs(finished.output), sorted(finished.path.glob("results/tiny/batches/*.csv"))
    assert [file.stem.rpartition("-")[0] for file in batches] == [f"{stage}-1of1" for stage in stages]
    assert made.count("train_batch") == len(stages)
    assert made.count("train") == 2 + 1  # teachers; CE's screen has but one
    assert all(row["status"] == "ok" for file in batches for row in rows(file))
    assert re.search(r"^ce-\S+: step 75/75 val_loss", finished.output, flags=re.MULTILINE)  # as each run alone says
    before, tables = changed.attempts(), changed.tables()
    (batch,) = changed.path.glob("results/tiny/batches/kd-1of1-*.csv")
    batch.unlink()
    again = jobs(changed.run(str(batch.relative_to(changed.path)), *TINY))
    assert again == ["train_batch"] and changed.attempts() == before  # all came back, untouched
    assert "Nothing to be done" in changed.run("-n", *TINY)
    (run_id,) = {row["run_id"] for row in rows(batches[0])[:1]}
    changed.kdclimb("retry", "--run", run_id)
    alone = jobs(changed.run(f"results/runs/{run_id}/status.json", *TINY))
    assert alone == ["train"] and changed.attempts()[run_id] == 1
    changed.run("results/tiny/ce/timing.csv", *TINY)
    assert changed.attempts()[run_id] == 1 and changed.tables()["ce/timing.csv"] == tables["ce/timing.csv"]


def test_finished_runs_stand_when_weights_wants_more(checkout):
    """In the job of another that is made anew, and in one of their own, where Snakemake deleted what it makes."""
    target, alone = "results/tiny/teacher/probe.csv", {"cluster": {"tokens_per_job": 0}}
    checkout.run(target, *TINY)
    first, second, third = (checkout.path / "results/runs" / run_id for run_id in sorted(checkout.attempts()))
    made = {file: file.stat().st_mtime_ns for file in (*second.glob("*.csv"), *third.glob("*.csv"))}
    checkout.kdclimb("retry", "--run", first.name)
    assert jobs(checkout.run(target, *overlay(checkout, "all", weights="all"))) == ["train_batch", "teacher_probe"]
    assert [len([*(folder / "checkpoints").iterdir()]) for folder in (first, second, third)] == [2, 0, 0]
    assert {file: file.stat().st_mtime_ns for file in made} == made
    (second / "summary.csv").unlink()
    wanted = overlay(checkout, "alone", weights="all", **alone)
    assert jobs(checkout.run(f"results/runs/{second.name}/summary.csv", *wanted)) == ["train"]
    assert checkout.attempts() == {folder.name: 1 for folder in (first, second, third)}


def test_a_job_for_each_run_has_the_tables_of_shared_ones_and_a_thousand_are_planned_in_seconds(small, checkout):
    alone = {"cluster": {"tokens_per_job": 0}}
    output = checkout.run(*overlay(checkout, "alone", **SMALL, **alone))
    assert "train_batch" not in jobs(output) and jobs(output).count("train") == len(checkout.attempts()) > 10
    expected, tables = small.tables(), checkout.tables()
    assert expected.keys() == tables.keys()
    assert [name for name in expected if expected[name] != tables[name]] == []
    grid = {"temperature": [1 + i / 20 for i in range(20)], "lr_boost": [1.01 + i / 100 for i in range(50)]}
    wide = overlay(checkout, "wide", kd={"grid": grid}, **SMALL, **alone)
    with (checkout.path / "output").open("w+") as file:
        process = subprocess.Popen(
            [".venv/bin/snakemake", "--cores", "2", "-n", *wide], cwd=checkout.path, stdout=file, stderr=file
        )
        _, code, used = os.wait4(process.pid, 0)
        file.seek(0)
        text = file.read()
    assert code == 0 and "\ntrain           999\n" in text, text[-3000:]  # one is there already
    assert used.ru_utime + used.ru_stime < 10 and used.ru_maxrss < 2**20  # CPU time, as other tests run beside it


def test_a_thousand_points_share_jobs(changed):
    grid = {"temperature": [1 + i / 10 for i in range(10)], "lr_boost": [1.1 + i / 10 for i in range(10)]}
    grid |= {"hold_frac": [0.1, 0.12, 0.14, 0.16, 0.18], "drop_frac": [0.3, 0.35]}
    for points, count in ((1, 42), (20, 50)):  # of 24 runs at most
        arguments = overlay(changed, "wide", kd={"grid": grid}, cluster={"points_per_job": points})
        assert jobs(changed.run("-n", *arguments)).count("train_batch") == count


def test_editing_the_analysis_trains_nothing(changed):
    before = changed.attempts()
    changed.edit("kdclimb/analysis/targets.py", "def read_target(", "EDITED = 1\n\n\ndef read_target(")
    output = changed.run(*TINY)
    assert not trains(output) and {"kd_screen", "compare", "report"} <= set(jobs(output))
    assert changed.attempts() == before


def test_editing_a_comment_makes_nothing_again(changed):
    changed.edit("kdclimb/train.py", "# ---- resuming", "# ---- going on")
    changed.edit("kdclimb/analysis/targets.py", "def read_target(", "# a reason\ndef read_target(")
    assert "Nothing to be done" in changed.run("-n", *TINY)


def test_editing_the_loss_trains_again_unless_code_is_frozen(changed):
    changed.edit("kdclimb/kernels/chunked.py", "def chunk_tokens(", "EDITED = 1\n\n\ndef chunk_tokens(")
    planned = jobs(changed.run("-n", *TINY))
    assert planned.count("train_batch") >= 2 and planned.count("train") >= 1  # CE and probes; CE's screen
    assert not trains(changed.run("-n", *overlay(changed, "frozen", code="frozen")))


def test_frozen_code_keeps_the_data_n_gram_teachers_and_caches_too(checkout):
    kd = {"cache": "hidden", "grid": {"temperature": [1.0], "lr_boost": [1.0]}, "ngram": {"orders": [2], "entries": 16}}
    small = SMALL | {"kd": kd, "train": {"horizons": [50], "seeds": [0]}, "controls": {"ce_grid": {"lr_mult": [1.0]}}}
    arguments = overlay(checkout, "kept", **small)
    loaded = load(merged("tests/tiny.yaml", small), ROOT)
    (table,) = expansion.tables(loaded, data_id(loaded, ROOT))
    counted = f"results/runs/{table.run_id}/status.json"
    checkout.run("results/tiny/kd/screen.csv", counted, *arguments)
    (cache,) = (checkout.path / "results/caches").glob("hidden-*/")
    asked = [counted, f"results/caches/{cache.name}"]
    checkout.edit("kdclimb/waiting.py", "EVERY = 30.0", "EDITED = 1\nEVERY = 30.0")
    assert {"data", "train", "ngram", "kd_cache"} == set(jobs(checkout.run("-n", *asked, *arguments)))
    assert "Nothing to be done" in checkout.run("-n", *asked, *overlay(checkout, "frozen", code="frozen", **small))


def test_forgotten_results_are_made_again_in_one_go(changed):
    """A CE run and the teacher: what they decide is decided again, and comes out as it was.

    Beside it another campaign is refused, and a report is made of what is there.
    """
    before, tables = changed.attempts(), changed.tables()
    selected = json.loads((changed.path / "results/tiny/teacher/selected.json").read_text())["run_id"]
    for run_id in (rows(changed.path / "results/tiny/ce/timing.csv")[0]["run_id"], selected):
        changed.kdclimb("retry", "--run", run_id)
        assert not (changed.path / "results/runs" / run_id).exists()
    first = changed.start(*TINY)
    while not any(changed.path.glob("results/runs/ce-*/.state/resume.safetensors")):  # one of the two is in training
        assert first.poll() is None
        time.sleep(0.05)
    assert "another ./run works in this folder" in changed.run(*overlay(changed, "other", campaign="other"), code=1)
    changed.kdclimb("report", *TINY)
    assert first.poll() is None and "So far." in (changed.path / "results/tiny/so_far/report/index.html").read_text()
    shutil.rmtree(changed.path / "results/tiny/so_far")
    output, _ = first.communicate(timeout=400)
    assert first.returncode == 0, output
    assert "<TBD>" not in output.split("Updating checkpoint dependencies.")[-1]
    assert changed.attempts() == before  # its count starts again, and no other run was started
    assert changed.tables() == tables
    assert "Nothing to be done" in changed.run("-n", *TINY)


def test_what_is_damaged_or_missing_behind_a_finished_report_is_named_and_made_again(changed):
    before, tables, folder = changed.attempts(), changed.tables(), changed.path / "results/tiny"
    for name in ("kd/promoted.json", "tables/compare.csv"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole.replace(b"4", b"5", 1))
        said = changed.run(*TINY, code=1)
        assert f"results/tiny/{name}: damaged" in said and "delete it" in said and "Traceback" not in said
        (folder / name).unlink()
    (folder / "teacher/probe.csv").unlink()
    changed.run(*TINY)
    assert changed.tables() == tables and changed.attempts() == before


def test_one_target_alone(checkout):
    planned = jobs(checkout.run("-n", "results/tiny/budget.json", *TINY))
    assert sorted(planned) == ["budget", "ce_baseline", "data", "train_batch"]


# ---- how it ends when things go wrong


def test_killed_at_any_moment_it_ends_with_the_same_tables(small, checkout):
    """SIGKILL to ./run alone, again and again, at moments spread over the whole campaign."""
    arguments = overlay(checkout, "small", **SMALL)
    for seconds in (3, 6, 9, 13, 17, 22):
        if not checkout.run_and_kill(seconds, *arguments):
            break
    checkout.run(*arguments)
    whole, cut = small.tables(), checkout.tables()
    assert whole.keys() == cut.keys()
    assert [name for name in whole if whole[name] != cut[name]] == []


def test_a_completed_timing_is_never_taken_again(checkout):
    """Measured clock: what a run measured before a kill is what the table holds after it."""
    changes = {"train": {"seeds": [0]}, "anchor": {"steps": 2}, "budget": {"clock": "measured"}}
    arguments = ["results/tiny/ce/timing.csv", *overlay(checkout, "m", **changes)]
    kept = {}
    for seconds in (7, 10, 15, 25, 40):  # on a slow machine nothing is complete after ten
        ended = not checkout.run_and_kill(seconds, *arguments)
        for file in checkout.path.glob("results/runs/*/.state/complete/steps.csv"):
            assert kept.setdefault(file, file.read_bytes()) == file.read_bytes()
        if ended or (kept and seconds >= 10):
            break
    checkout.run(*arguments)
    assert kept
    for file, content in kept.items():
        assert (file.parent.parent.parent / "steps.csv").read_bytes() == content
    assert "Nothing to be done" in checkout.run("-n", *arguments)


def test_without_a_teacher_in_the_budget_it_ends_well_and_says_so(changed):
    before = changed.attempts()
    changed.run(*overlay(changed, "poor", campaign="poor", budget={"fraction": 0.001}))
    assert changed.attempts() == before  # its shared jobs find all runs done
    results = changed.path / "results/poor"
    selected = json.loads((results / "teacher/selected.json").read_text())
    assert selected["run_id"] is None and "L1-H2-D8-26" in selected["reason"]
    verdict = json.loads((results / "verdict.json").read_text())
    assert (
        "none of the 3 teacher candidates meets the budget" in verdict["sentence"]
        and verdict["steps_saved_mean"] is None
    )
    assert verdict["sentence"].split(":")[0] in (results / "report/index.html").read_text()


def test_a_projected_budget_is_set_from_the_runs_that_are_there(changed):
    """Of 150 steps, from two runs of 75 and their two stages."""
    arguments = ["results/longer/budget.json", *overlay(changed, "longer", campaign="longer", budget={"horizon": 150})]
    before = changed.attempts()
    assert "kdclimb: done; results/longer/ has what was asked for, no report yet" in changed.run(*arguments)
    assert changed.attempts() == before
    measured, found = (json.loads((changed.path / f"results/{c}/budget.json").read_text()) for c in ("tiny", "longer"))
    assert (measured["horizon"], measured["projected_from"]) == (75, None)
    assert (found["horizon"], found["projected_from"], found["ce_run_ids"]) == (150, 75, measured["ce_run_ids"])
    assert found["budget_ms"] == pytest.approx(2 * measured["budget_ms"], rel=0.02)
    assert "Nothing to be done" in changed.run("-n", *arguments)


def test_a_diverged_ce_baseline_stops_the_campaign_with_a_clear_word(checkout):
    arguments = overlay(checkout, "hot", train={"horizons": [50], "seeds": [0]}, optim={"adam": {"lr": 1e30}})
    output = checkout.run("results/tiny/budget.json", *arguments, code=None)
    assert "diverged" in output and "kdclimb retry" in output and "Traceback" not in output
    assert not (checkout.path / "results/tiny/budget.json").exists()


def test_a_log_sets_the_budget_before_anything_is_trained(checkout):
    (checkout.path / "ce.txt").write_text("step:75/75 val_loss:4.0 train_time:694015ms step_avg:9253.5ms\n")
    baseline = {"source": "log", "log": "ce.txt"}
    arguments = overlay(checkout, "log", baseline=baseline, controls={"extra_steps": False})
    output = checkout.run("results/tiny/budget.json", *arguments)
    assert not trains(output)
    assert json.loads((checkout.path / "results/tiny/budget.json").read_text())["budget_ms"] == pytest.approx(69401.5)
    refused = checkout.run("-n", *overlay(checkout, "both", baseline=baseline), code=None)
    assert "controls.extra_steps: True is not allowed" in refused


def test_a_failed_candidate_is_rejected_with_its_reason(changed):
    """As an out-of-memory candidate would leave it: a result, exit code 0, no weights."""
    run_id = next(
        r for r in rows(changed.path / "results/tiny/teacher/trained.csv") if r["candidate"] == "L1-H2-D4-50"
    )["run_id"]
    folder = changed.path / "results/runs" / run_id
    status = json.loads((folder / "status.json").read_text())
    summary = (folder / "summary.csv").read_text().replace(",ok,", ",oom,")
    (folder / "summary.csv").write_text(summary)
    (folder / "checkpoints/model.safetensors").unlink()
    publish(folder, status | {"status": "oom", "reason": "out of memory"})
    changed.run("results/tiny/teacher/selected.json", *TINY)
    measured = json.loads((changed.path / "results/tiny/teacher/measured.json").read_text())
    assert measured["survivors"] == ["L1-H2-D8-26"] and "out of memory" in measured["rejected"]["L1-H2-D4-50"]


def test_a_teacher_from_elsewhere_is_chosen_and_taught_from(changed):
    torch.save(seed_checkpoints.checkpoint(seed_checkpoints.L3), changed.path / "state_best.pt")
    command = ".venv/bin/python -m kdclimb import-teacher state_best.pt --layers 3 --heads 2 --head-dim 16"
    command += " --vocab-size 384 --bigram-vocab-size 2 --long-windows 12 24 --windows 8 24 --cost-ms 5"
    command += " --configfile tests/tiny.yaml"
    done = subprocess.run(command.split(), cwd=changed.path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run_id,) = (folder.name for folder in changed.path.glob("results/runs/imported-*"))
    poor = {"campaign": "poor", "budget": {"fraction": 0.001}}  # no candidate meets it
    arguments = ["results/poor/kd/screen.csv", *overlay(changed, "poor", teacher={"imported": [run_id]}, **poor)]
    changed.run(*arguments)
    selected = json.loads((changed.path / "results/poor/teacher/selected.json").read_text())
    assert (selected["run_id"], selected["imported"], selected["train_time_ms"]) == (run_id, True, 5.0)
    screened = rows(changed.path / "results/poor/kd/screen.csv")
    configs = [json.loads((changed.path / "results/runs" / r["run_id"] / "config.json").read_text()) for r in screened]
    assert len(configs) == 2 and {config["kd"]["teacher"] for config in configs} == {run_id}
    assert {r["status"] for r in screened} == {"ok"}
    assert "Nothing to be done" in changed.run("-n", *arguments)


def test_another_teacher_remakes_all_that_follows_in_one_go(changed):
    teachers = rows(changed.path / "results/tiny/teacher/trained.csv")
    selected = json.loads((changed.path / "results/tiny/teacher/selected.json").read_text())["run_id"]
    other = next(r for r in teachers if r["run_id"] != selected)
    shapes = yaml.safe_load((ROOT / "tests/tiny.yaml").read_text())["teacher"]["candidates"]
    kept = [shape for shape in shapes if other["candidate"].endswith(f"-D{shape['head_dim']}-{shape['steps']}")]
    tables = ("results/tiny/kd/isolates.csv", "results/tiny/kd/screen.csv")
    arguments = [*tables, *overlay(changed, "other", teacher={"candidates": kept})]
    changed.run(*arguments)
    for table in tables:
        for r in rows(changed.path / table):
            kd = json.loads((changed.path / "results/runs" / r["run_id"] / "config.json").read_text())["kd"]
            assert kd is None or kd["teacher"] == other["run_id"], table
    assert "Nothing to be done" in changed.run("-n", *arguments)


def test_an_import_that_is_missing_stops_before_any_job(finished, checkout):
    for place in (finished, checkout):  # with results that a wrong config must not hide behind, and without any
        lost = overlay(checkout, "lost", teacher={"imported": ["imported-lost-0123456789ab"]})
        lost = [*lost[:-1], str(checkout.path / lost[-1])]
        output = place.run("-n", *lost, code=None)
        assert "imported-lost-0123456789ab holds no finished import" in output and "Traceback (most" not in output
    assert "MissingRule" in checkout.run("-n", "results/runs/imported-lost-0123456789ab/status.json", *TINY, code=None)
    (data,) = (folder.name for folder in finished.path.glob("results/data/*"))
    assert set(jobs(checkout.run("-n", f"results/data/{data}/manifest.json", *lost))) == {"data"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kd": {"alpa": 1}}, "kd.alpa: unknown key"),
        ({"validation": {"every": 50}}, "validation.every: 50"),
        ({"student": {"num_heads": 3}}, "student.num_heads: 3"),
    ],
)
def test_a_bad_config_stops_before_any_job(checkout, changes, said):
    output = checkout.run(*overlay(checkout, "bad", **changes), code=None)
    assert said in output and "Traceback" not in output
    assert not any((checkout.path / "results").glob("[!.]*"))


def test_the_slurm_profile_dry_runs_anywhere_and_takes_no_device_of_the_head_node(finished):
    command = [".venv/bin/snakemake", "--cores", "8", "--profile", "slurm", "-n"]
    options = {"cwd": finished.path, "capture_output": True, "text": True}
    done = subprocess.run([*command, *TINY], **options)
    assert done.returncode == 0 and "Nothing to be done" in done.stdout + done.stderr
    assert "kdclimb: campaign tiny on cpu, through Slurm, at most 8 jobs at a time" in done.stderr.splitlines()
    done = subprocess.run([*command, *TINY, "--config", "device=auto"], **options)
    assert done.returncode != 0 and "config: device: 'auto' is not allowed on a cluster" in done.stdout + done.stderr


def test_missing_shards_say_how_to_get_them(checkout):
    output = checkout.run(*overlay(checkout, "shards", data={"source": "shards"}), code=None)
    assert "data.shards.train" in output and "fineweb" in output and "Traceback" not in output


@pytest.mark.parametrize(("config", "points", "probes"), [("config/h100.yaml", 84, 7), ("config/seed155.yaml", 4, 8)])
def test_shipped_campaigns_dry_run(checkout, config, points, probes):
    output = checkout.run("-n", "--configfile", config)
    campaign = yaml.safe_load((ROOT / config).read_text())["campaign"]
    assert output.splitlines()[0].startswith(f"kdclimb: campaign {campaign} on cuda")
    planned = jobs(output)
    assert planned.count("train") == 3 * 3 + points + probes  # CE; its screen, one of which is CE itself; probes
    assert {"data", "kd_screen", "compare", "ledger", "report"} <= set(planned)


@pytest.mark.parametrize("visible, threads", [(None, 4), ("1", 8)])
def test_each_gpu_of_a_machine_has_a_training_job_with_its_share_of_the_cores(checkout, tmp_path, visible, threads):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf 'GPU-aa, NVIDIA H200\\nGPU-bb, NVIDIA H200\\n'\n")
    smi.chmod(0o755)
    env = checkout.environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    command = [".venv/bin/snakemake", "--cores", "8", "-n", "--configfile", "config/seed155.yaml"]
    done = subprocess.run(command, cwd=checkout.path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    training = (done.stdout + done.stderr).split("\nrule train:\n")[1:]
    assert len(training) > 10
    assert all(f"threads: {threads}\n" in job.partition("\nrule ")[0] for job in training)


@pytest.mark.parametrize("options, most", [([], 3), (["--resources", "gpu=2"], 2)])
def test_no_more_training_jobs_run_than_there_are_gpus(options, most, checkout, tmp_path):
    """Also where the cores that their shares leave over would be enough for one more."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf 'GPU-aa, NVIDIA H200\\nGPU-bb, NVIDIA H200\\nGPU-cc, NVIDIA H200\\n'\n")
    smi.chmod(0o755)
    (checkout.path / "workflow/scripts/train.py").write_text('import sys\n\nsys.exit("no GPU here")\n')
    env = checkout.environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env.pop("CUDA_VISIBLE_DEVICES", None)
    command = [".venv/bin/snakemake", "--cores", "8", *options]
    command += overlay(checkout, "each_alone", device="cuda", cluster={"tokens_per_job": 0})
    done = subprocess.run(command, cwd=checkout.path, env=env, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 1 and "threads: 2\n" in output and "no GPU here" in output
    started = [int(jobs) for jobs in re.findall(r"^Execute (\d+) jobs\.\.\.$", output, re.MULTILINE)]
    assert started[:2] == [1, most]  # the data; then as many as there is room for


def test_jobs_that_are_interrupted_are_told_as_such(checkout):
    (checkout.path / "workflow/scripts/train_batch.py").write_text("import sys\n\nsys.exit(75)\n")
    output = checkout.run("results/tiny/ce/timing.csv", *TINY, code=1)
    (batch,) = re.findall(
        r"^kdclimb: train_batch left no (\S+): interrupted; the next start goes on", output, re.MULTILINE
    )
    assert [row["made"] for row in rows(checkout.path / "results/tiny/logs/failed_jobs.csv")] == [batch]


def test_an_end_that_cant_keep_its_failed_jobs_goes_on_to_the_mirror(checkout, tmp_path):
    """As on a full disk."""
    (checkout.path / "workflow/scripts/train_batch.py").write_text("import sys\n\nsys.exit(1)\n")
    (checkout.path / "results/tiny/logs/failed_jobs.csv").mkdir(parents=True)
    (checkout.path / "results/tiny/seen.txt").touch()
    mirrored = overlay(checkout, "mirrored", paths={"mirror": str(tmp_path / "mirror")})
    output = checkout.run("results/tiny/ce/timing.csv", *mirrored, code=1)
    assert "kdclimb: results/tiny/logs/failed_jobs.csv: status and report won't know of" in output
    assert "kdclimb: train_batch left no results/tiny/batches/ce-" in output and "Traceback" not in output
    assert "kdclimb: stopped by an error (above)" in output and (tmp_path / "mirror/results/tiny/seen.txt").is_file()


def test_plain_snakemake_works_in_a_prepared_environment(finished):
    command = [".venv/bin/snakemake", "--cores", "8", "-n", *TINY]
    output = subprocess.run(command, cwd=finished.path, capture_output=True, text=True)
    assert output.returncode == 0 and "Nothing to be done" in output.stdout + output.stderr
