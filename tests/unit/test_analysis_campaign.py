"""Whole campaigns through every script, from made-up runs to the report."""

import base64
import gzip
import hashlib
import itertools
import json
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from test_analysis_synthetic import SyntheticCampaign, read_rows

from kdclimb.analysis import figures
from kdclimb.analysis.report.parts import Page
from kdclimb.analysis.report.sections import isolates_section

FIGURES = (
    "break_even horizon_curve isolates kd_alive lr_phases step_deltas step_parts steps_saved_trend sweep_knobs "
    "sweep_parallel teachers val_loss_steps val_loss_time"
).split()
POINT = "T1-boost1.5-hold0.15-drop0.35"


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    campaign = SyntheticCampaign(tmp_path_factory.mktemp("campaign"))
    campaign.run_all()
    return campaign


def page_of(campaign):
    return campaign.path("report/index.html").read_text()


def words_of(page):
    """The text of the page without markup and script, in one line."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.split("<body>")[1].split("<script")[0]))


def test_decisions(campaign):
    assert campaign.json("budget.json")["budget_ms"] == 300.0  # a tenth of 300 steps of 10 ms
    projected = campaign.json("teacher/projected.json")
    assert projected["rejected"] == {"L4-H4-D32-150": "projected time 750.0 ms is over the budget of 300.0 ms"}
    selected = campaign.json("teacher/selected.json")  # 6 - 0.02 * 75, as cheap as the other one of its loss
    assert (selected["candidate"], selected["final_val"], selected["train_time_ms"]) == ("L2-H2-D32-75", 4.5, 75.0)
    assert campaign.json("kd/promoted.json")["points"] == [POINT]


def test_verdict(campaign):
    verdict = campaign.json("verdict.json")
    # KD falls 0.016 a step and so passes 4.5 at 93.75, seen at 100; CE falls 0.01 and reaches it at 150.
    assert (verdict["steps_saved_mean"], verdict["tokens_saved_mean"]) == (50.0, 50 * 2048.0)
    assert (verdict["time_saved_ms_mean"], verdict["time_saved_with_teacher_ms_mean"]) == (300.0, 225.0)
    assert verdict["claimable"] and verdict["kd_pays_time_with_teacher"]
    assert verdict["control_boost_steps_saved_mean"] == 0.0  # passes 4.5 at 136.4, seen at 150
    alive = verdict["kd_alive"]
    assert (alive["first_val_kd"], alive["first_val_ce"], alive["first_val_random"]) == (5.6, 5.75, 5.9)


def test_nothing_that_is_decided_depends_on_the_speed_of_the_machine(campaign, tmp_path):
    """The same runs, each on a machine of another speed, which its anchor shows."""

    def edit(run):
        factor = 0.5 + int(run.run_id[-4:], 16) / 2**15  # 0.5 to 2.5
        own, anchors = other.synthetic(run), dict.fromkeys(("anchor_before_ms", "anchor_after_ms"), 10.0 * factor)
        return anchors | {"step_ms": own["step_ms"] * factor}

    other = SyntheticCampaign(tmp_path)
    other.edit = edit
    other.run_all()
    for name in ("projected", "measured"):
        ours, found = (c.json(f"teacher/{name}.json") for c in (campaign, other))
        assert found["survivors"] == ours["survivors"] and found["rejected"].keys() == ours["rejected"].keys()
        assert found["budget_ms"] == pytest.approx(ours["budget_ms"] * other.json("budget.json")["anchor_ms"] / 10.0)
    assert other.json("teacher/selected.json")["run_id"] == campaign.json("teacher/selected.json")["run_id"]
    ours, found = (c.json("verdict.json") for c in (campaign, other))
    assert found["budget_share"] == pytest.approx(ours["budget_share"])
    assert found["claimable"] and found["kd_pays_time_with_teacher"] == ours["kd_pays_time_with_teacher"]
    assert other.expanded("control_extra") == campaign.expanded("control_extra")
    saved = "time_saved_with_teacher_ms_mean"
    assert found[saved] / found["budget_ms"] == pytest.approx(ours[saved] / ours["budget_ms"])


def test_the_teachers_share_of_ces_time(campaign):
    """75 ms, of the 3 s of 300 steps and of the 1.5 s in which CE reaches the target."""
    verdict, words = campaign.json("verdict.json"), words_of(page_of(campaign))
    assert (verdict["teacher_share_of_ce"], verdict["within_of_ce"]) == (0.025, True)
    assert (verdict["ce_time_to_target_ms"], verdict["teacher_share_to_target"]) == pytest.approx((1500.0, 0.05))
    assert verdict["within_to_target"] and "projected from" not in words
    assert "300 steps, as the budget has it 3.00 s 75 ms 2.5% yes" in words
    assert "to the target, the mean of its seeds; stricter 1.50 s 75 ms 5.0% yes" in words


def test_a_projected_budget_is_called_so_wherever_it_is_said(campaign, tmp_path):
    """600 steps, twice the longest horizon."""
    other = SyntheticCampaign(tmp_path, budget={"horizon": 600})
    other.run_all()
    budget, verdict, measured = other.json("budget.json"), other.json("verdict.json"), campaign.json("verdict.json")
    assert (budget["budget_ms"], budget["horizon"], budget["projected_from"]) == (600.0, 600, 300)
    words = "The teacher's budget of 600 ms is 10% of CE's time over 600 steps, projected from 300-step runs."
    assert verdict["sentence"] == f"{measured['sentence']} {words}"
    assert verdict["claimable"] and verdict["horizon"] == measured["horizon"] == 300
    assert other.expanded("control_extra") == campaign.expanded("control_extra")
    rejected = other.json("teacher/projected.json")["rejected"]["L4-H4-D32-150"]
    assert rejected == "projected time 750.0 ms is over the budget of 600.0 ms (projected from 300-step runs)"
    page = words_of(page_of(other))
    for text in (
        "of its budget of 600 ms (projected from 300-step runs), 12%",
        "CE takes 6.00 s (projected from 300-step runs) over 600 steps (median of its seeds",
        "600 steps (projected from 300-step runs), as the budget has it 6.00 s 75 ms 1.2% yes",
        "75 ms of a budget of 600 ms (projected from 300-step runs), 4.5000 nats",
    ):
        assert text in page, text


def test_ce_in_smaller_batches_is_compared_by_its_end(campaign, tmp_path):
    """600 steps of 0.006 nats each in place of 300, so that it ends at 2.4."""
    other = SyntheticCampaign(tmp_path, controls={"smaller_batches": 0.5})
    other.run_all()
    batch = [row for row in read_rows(other.path("tables/compare.csv")) if row["arm"] == "control_batch"]
    assert [(row["horizon"], float(row["final_val"])) for row in batch] == [("600", pytest.approx(2.4))] * 3
    tested = [row for row in read_rows(other.path("tables/verdict.csv")) if row["against"] == "control_batch"]
    assert {(row["arm"], row["measure"]) for row in tested} == {("kd", "final")}
    ours, found = (c.json("verdict.json") for c in (campaign, other))
    words = "At the end KD is 1.2000 nats below CE in smaller batches on as many tokens"
    assert words in found["sentence"] and "smaller batches" not in ours["sentence"]
    assert found | {"sentence": ""} == ours | {"sentence": ""}  # it explains no steps saved
    assert "CE, smaller batches" in page_of(other) and "ce_smaller_batches" in words_of(page_of(other))


def test_tables_cover_every_run_of_every_arm(campaign):
    runs = read_rows(campaign.path("tables/runs.csv"))
    assert [(row["arm"], row["label"], row["run_id"]) for row in runs] == [
        (run.arm, run.label, run.run_id) for run in campaign.expanded()
    ]
    curves = read_rows(campaign.path("tables/curves.csv"))
    assert {row["run_id"] for row in curves} == {row["run_id"] for row in runs}
    kd = [
        row
        for row in curves
        if row["arm"] == "kd" and row["seed"] == "0" and row["step"] == "25" and row["horizon"] == "300"
    ]
    assert [(row["train_time_ms"], row["time_with_teacher_ms"]) for row in kd] == [("300.0", "375.0")]
    assert len(read_rows(campaign.path("tables/ledger.csv"))) == len({run.run_id for run in campaign.expanded()})
    compared = read_rows(campaign.path("tables/compare.csv"))
    arms = {"ce": 10, "kd": 9, "control_boost": 3, "control_smooth": 3, "control_extra": 3, "screen": 4}
    assert [row["arm"] for row in compared] == [a for a, n in (arms | {"control_random": 1}).items() for _ in range(n)]


def test_teachers_table_says_what_became_of_each(campaign):
    rows = {row["candidate"]: row for row in read_rows(campaign.path("tables/teachers.csv"))}
    assert list(rows) == [c.name for c in campaign.campaign.teacher.candidates]
    verdicts = [row["verdict"] for row in rows.values()]
    assert verdicts == ["survivor", "survivor", "survivor", "selected", "survivor", "rejected"]
    assert rows["L4-H4-D32-150"]["train_time_ms"] == "" and rows["L4-H4-D32-150"]["projected_ms"] == "750.0"
    assert rows["L1-H2-D32-75"]["final_val"] == "4.875"


def test_report_is_self_contained_and_its_links_lead_somewhere(campaign):
    page = page_of(campaign)
    assert not re.search(r'(?:src|href)="(?:https?:)?//|@import|<script src|<img|<iframe', page)
    links = {link for link in re.findall(r'<a [^>]*?href="([^"]+)"', page) if not link.startswith("#")}
    for link in links:
        assert (campaign.path("report") / link).exists(), link
    linked = {Path(link).name for link in links}
    assert {f"{name}.csv" for name in ("compare", "traces", "headline", "horizon_curve", "screen", "runs")} <= linked
    assert {row["run_id"] for row in read_rows(campaign.path("tables/runs.csv"))} <= linked


def test_only_the_pages_own_scripts_may_run(campaign):
    page = page_of(campaign)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy and "connect-src" not in policy
    script = page.split("<script>")[1].split("</script>")[0]
    hashed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{hashed}'" in policy and page.count("<script") == 3


def test_nothing_of_a_table_can_become_markup(tmp_path):
    campaign = SyntheticCampaign(tmp_path)
    bad = "</script><img src=x onerror=alert(1)>"
    failed = {"status": "failed", "reason": bad, "val": [], "step_ms": [], "shares": []}
    campaign.edit = lambda run: failed if run.arm == "screen" else {}
    campaign.run_all()
    page = page_of(campaign)
    assert bad not in page and "&lt;img src=x" in page


def test_the_page_shows_cells_and_the_script_draws_from_them(campaign):
    page = page_of(campaign)
    carried = page.split('id="data">')[1].split("<")[0]
    data = json.loads(gzip.decompress(base64.b64decode(carried)))
    rows = read_rows(campaign.path("tables/curves.csv"))
    assert data["tables"]["curves"]["val_loss"] == [float(f"{float(row['val_loss']):.6g}") for row in rows]
    assert data["target"] == 4.5 and len(data["configs"]["runs"]) == len({row["run_id"] for row in rows})


def test_report_has_unique_ids_and_no_dangling_reference(campaign):
    page = page_of(campaign)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'(?:href="#|url\(#)(?!run=)([^")]+)', page)) <= set(ids)
    shown = {row["run_id"] for row in read_rows(campaign.path("tables/runs.csv"))}
    assert set(re.findall(r'href="#run=([^"]+)"', page)) == shown


def test_report_shows_what_the_files_say(campaign):
    words = words_of(page_of(campaign))
    for text in (
        "CLAIMABLE",
        "+50",
        "+102,400",
        "+300 ms",
        "+225 ms",
        "25% of its budget",
        POINT,
        "5.6000",
        "projected time",
    ):
        assert text in words, text
    assert 'class="badge no"' not in page_of(campaign)
    assert "Nothing to draw" not in words and "Not there yet" not in words
    assert "The parts of a step are not measured: ./run results/default/kd/profile.csv" in words


def test_names_of_points_lie_apart_and_one_without_room_is_left_out():
    figure = Figure(figsize=(5.4, 3.5), layout="constrained")
    axes = figure.add_subplot()
    points = [(f"L3-H6-D128-{steps}", 40 + steps / 100, 4.0) for steps in range(6)]
    points += [("alone", 5.0, 6.0), ("without room " * 9, 20.0, 5.0)]
    axes.plot(*zip(*(point[1:] for point in points), strict=True), "o")
    figures._name_points(axes, points)
    figure.draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts if text.get_text()}
    assert boxes.keys() == {name for name, *_ in points[:-1]}
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes.values(), 2))
    inside = axes.get_window_extent().padded(1)
    assert all(inside.contains(*box.min) and inside.contains(*box.max) for box in boxes.values())


@pytest.mark.parametrize("shared", [0, 1])
def test_parts_that_were_timed_on_a_shared_device_are_marked(shared):
    data = {"isolates": [], "profile": [{"run_id": "a", "shared_device": shared}], "runs": None}
    page = Page("default", data, {"isolates": "isolates.csv", "profile": "profile.csv"}, drawn={}, alts={})
    assert ("The device was shared" in isolates_section(page)) == bool(shared)


def test_figures_are_written_as_png_and_svg(campaign):
    names = sorted(path.name for path in campaign.path("figures").iterdir())
    assert names == [f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")]
    assert campaign.path("figures/isolates.png").read_bytes().startswith(b"\x89PNG")
    assert "11 ms  (1.00x CE)" in campaign.path("figures/isolates.svg").read_text()


def test_same_input_gives_the_same_bytes(campaign):
    outputs = [path for path in campaign.out.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in outputs}
    campaign.run_all()
    changed = [str(path.relative_to(campaign.out)) for path in outputs if path.read_bytes() != before[path]]
    assert changed == []
    assert len(outputs) == len([path for path in campaign.out.rglob("*") if path.is_file()])


def test_campaign_without_a_teacher_ends_in_words(tmp_path):
    campaign = SyntheticCampaign(tmp_path)
    campaign.edit = lambda run: {"step_ms": 50.0} if run.arm == "probe" else {}
    campaign.run_all()
    verdict = campaign.json("verdict.json")
    assert verdict["sentence"] == (
        "KD was not tried: none of the 6 teacher candidates meets the budget of 300 ms. The one projected to be "
        "fastest, L1-H4-D32-50, was rejected: projected time 2,500.0 ms is over the budget of 300.0 ms."
    )
    assert not verdict["claimable"] and verdict["budget_share"] is None
    words = words_of(page_of(campaign))
    for text in (
        "NOT A CLAIM",
        "Nothing to draw",
        "no teacher meets the budget",
        "nothing was screened",
        "no control was run",
    ):
        assert text in words, text


def test_campaign_whose_kd_runs_all_fail_ends_in_words(tmp_path):
    campaign = SyntheticCampaign(tmp_path)
    oom = {"status": "oom", "reason": "9 GiB", "val": [], "step_ms": [], "shares": [], "kd_stop_step": ""}
    campaign.edit = lambda run: oom if run.config.kd else {}
    campaign.run_all()
    verdict = campaign.json("verdict.json")
    assert verdict["sentence"].startswith("KD was not compared with CE at the full horizon: every screened run failed")
    words = words_of(page_of(campaign))
    assert "oom: 9 GiB" in words and "CE + KD: oom: 9 GiB" in words


def test_modelled_clock_is_never_a_claim(tmp_path):
    campaign = SyntheticCampaign(tmp_path, clock="modelled")
    campaign.edit = lambda run: {"broken": 1}
    campaign.run_all()
    verdict = campaign.json("verdict.json")
    assert verdict["not_claimable_because"] == ["time is modelled from FLOPs, not measured"]
    assert "of modelled training" in verdict["sentence"]
    assert {row["broken"] for row in read_rows(campaign.path("tables/runs.csv"))} == {""}
    assert "modelled training time (s)" in campaign.path("figures/val_loss_time.svg").read_text()


def test_analysis_imports_neither_torch_nor_snakemake():
    root = Path(__file__).resolve().parents[2]
    files = [*(root / "kdclimb" / "analysis").rglob("*.py")]
    assert len(files) >= 8
    for path in files:
        assert not re.search(r"^\s*(?:import|from)\s+(?:torch|snakemake)", path.read_text(), re.MULTILINE), path
