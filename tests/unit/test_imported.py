"""An imported teacher in the sweep: its folder as the analysis reads it, its place in the tables, what it forbids."""

import dataclasses
import hashlib
import json

import pytest
from configs import ROOT, merged
from test_analysis_selection import BUDGET, FALLING, candidates, select
from test_analysis_synthetic import SyntheticCampaign, make_config, read_rows

from kdclimb import __main__ as cli
from kdclimb import campaign as campaigns
from kdclimb import expansion
from kdclimb.analysis import selection
from kdclimb.analysis.tables import RunFolder, write_csv
from kdclimb.artifacts import STEP_COLUMNS, SUMMARY_COLUMNS, VAL_COLUMNS, write_json
from kdclimb.config import AttentionConfig, ConfigError
from kdclimb.imported import ImportedConfig, Origin, read_config


def make_imported(cost_ms=500.0, data="text-512-000000000000", **changes):
    run = make_config()
    config = ImportedConfig(
        imported_from=Origin("state_best.pt", "0" * 64, 250, 4.069),
        name="seed",
        cost_ms=cost_ms,
        model=run.model,
        windows=(128, 384),
        long_windows=(384,),
        data=dataclasses.replace(run.data, id=data),
        val_tokens=8192,
        micro_batch_tokens=1024,
        max_doc_tokens=256,
        device="cpu",
        attention=AttentionConfig("auto", False),
    )
    return dataclasses.replace(config, **changes)


def write_imported(runs, config, final_val=4.5):
    """The folder that import-teacher leaves."""
    folder = runs / config.run_id
    for name in ("train.log", "val_loss.png", "step_time.png", "model.safetensors", "model.json"):
        file = folder / ("checkpoints" if name.startswith("model") else "") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    write_json(folder / "config.json", dataclasses.asdict(config))
    write_json(folder / "checkpoints/model.json", {"weights_sha256": hashlib.sha256(b"x").hexdigest()})
    status = {"status": "ok", "reason": "imported from state_best.pt", "code_hash": "0123456789ab"}
    write_json(folder / "status.json", status)
    nothing = dict.fromkeys(SUMMARY_COLUMNS)
    row = {"run_id": config.run_id, "arm": "imported", "status": "ok", "steps": 250, "train_time_ms": config.cost_ms}
    row |= {"best_val": final_val, "final_val": final_val, "params_stored": 3e6, "flops_per_token": 6e6}
    write_csv(folder / "summary.csv", SUMMARY_COLUMNS, [nothing | row | {"clock": "declared", "data_hash": "0123"}])
    write_csv(folder / "steps.csv", STEP_COLUMNS, [])
    val = {"step": 250, "train_time_ms": config.cost_ms, "val_loss": final_val}
    write_csv(folder / "val.csv", VAL_COLUMNS, [dict.fromkeys(VAL_COLUMNS) | val])
    return RunFolder.read(f"imported|{config.run_id}|{folder}")


# ---- its config -----------------------------------------------------------------------------------


def test_everything_that_decides_it_is_in_its_id():
    config = make_imported()
    assert (
        config.run_id.startswith("imported-seed-")
        and read_config(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    )
    changes = [{"cost_ms": 501.0}, {"long_windows": (384, 896)}, {"windows": (128, 896)}, {"val_tokens": 1}]
    changes += [{"imported_from": Origin("state_best.pt", "1" * 64, 250, 4.069)}, {"device": "cuda"}]
    changes += [{"attention": AttentionConfig("reference", False)}]
    assert len({config.run_id, *(make_imported(**change).run_id for change in changes)}) == 1 + len(changes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cost_ms": 0.0}, "--cost-ms: 0.0 is not allowed"),
        ({"cost_ms": float("nan")}, "--cost-ms: nan is not allowed"),
        ({"cost_ms": float("inf")}, "--cost-ms: inf is not allowed"),
        ({"name": "a b"}, "--name: 'a b' is not allowed"),
        ({"name": "../x"}, "--name: "),
        ({"windows": (512, 384)}, "--windows: "),
        ({"long_windows": ()}, "--long-windows: "),
        ({"long_windows": (384, -1)}, "--long-windows: "),
    ],
)
def test_what_cant_be_imported(change, said):
    with pytest.raises(ConfigError, match=said):
        make_imported(**change)


# ---- in the sweep ---------------------------------------------------------------------------------


@pytest.fixture
def budget(tmp_path):
    write_json(tmp_path / "budget.json", BUDGET)
    return tmp_path / "budget.json"


def sweep(tmp_path, budget, cost_ms=500.0, final_val=4.5):
    """Two trained candidates, of 4.9 nats and 1000 ms and of one that is over the budget, and an imported teacher."""
    runs = candidates(tmp_path, "teacher", A={"val": FALLING}, B={"val": FALLING, "step_ms": 11.0})
    runs.append(write_imported(tmp_path / "runs", make_imported(cost_ms), final_val))
    selection.teacher_train(runs, tmp_path / "trained.csv")
    selection.filter_measured(tmp_path / "trained.csv", budget, tmp_path / "measured.json")
    return runs[-1].run_id, json.loads((tmp_path / "measured.json").read_text())


def test_declared_cost_within_the_budget_makes_it_a_candidate(tmp_path, budget):
    run_id, decision = sweep(tmp_path, budget)
    assert decision["survivors"] == ["A", run_id] and list(decision["rejected"]) == ["B"]
    row = read_rows(tmp_path / "trained.csv")[-1]
    assert (row["candidate"], row["imported"], row["kind"], row["clock"]) == (run_id, "1", "imported", "declared")
    assert (row["train_time_ms"], row["final_val"], row["device"]) == ("500.0", "4.5", "")
    assert [row["imported"] for row in read_rows(tmp_path / "trained.csv")] == ["0", "0", "1"]
    selected = select(tmp_path, budget)
    assert (selected["run_id"], selected["imported"], selected["train_time_ms"]) == (run_id, True, 500.0)
    assert "imported: its time is declared, not measured" in selected["reason"]


def test_it_is_chosen_by_its_loss_like_any_other(tmp_path, budget):
    sweep(tmp_path, budget, final_val=5.5)
    selected = select(tmp_path, budget)
    assert (selected["candidate"], selected["imported"]) == ("A", False) and "declared" not in selected["reason"]


def test_declared_cost_over_the_budget_is_rejected(tmp_path, budget):
    run_id, decision = sweep(tmp_path, budget, cost_ms=1000.5)
    assert decision["rejected"][run_id] == "imported: declared time 1,000.5 ms is over the budget of 1,000.0 ms"


def test_missing_weights_are_a_reason(tmp_path, budget):
    run = write_imported(tmp_path / "runs", make_imported())
    (run.folder / "checkpoints/model.safetensors").unlink()
    selection.teacher_train([run], tmp_path / "trained.csv")
    selection.filter_measured(tmp_path / "trained.csv", budget, tmp_path / "measured.json")
    rejected = json.loads((tmp_path / "measured.json").read_text())["rejected"]
    assert rejected == {run.run_id: "artifacts missing: checkpoints/model.safetensors"}


class WithImported(SyntheticCampaign):
    """The synthetic campaign, whose runs set a target near 4.2 nats, with an imported teacher."""

    def __init__(self, folder, final_val):
        super().__init__(folder)
        data, config = campaigns.data_id(self.campaign, ROOT), self.campaign
        self.imported = make_imported(
            250.0, data, val_tokens=config.validation.tokens, micro_batch_tokens=config.train.micro_batch_tokens
        )
        self.runs.mkdir(parents=True)
        write_imported(self.runs, self.imported, final_val)
        teacher = dataclasses.replace(config.teacher, imported=(self.imported.run_id,))
        self.campaign = dataclasses.replace(config, teacher=teacher)

    def flags(self, *arms):
        run_id = self.imported.run_id
        more = ["--run", f"imported|{run_id}|{self.runs / run_id}"] if not arms or "teacher" in arms else []
        return super().flags(*arms) + more


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A synthetic campaign from end to end that the imported teacher won."""
    campaign = WithImported(tmp_path_factory.mktemp("taught"), final_val=4.1)
    campaign.run_all()
    return campaign


def test_kd_learns_from_the_imported_teacher(taught):
    run_id = taught.imported.run_id
    assert taught.json("teacher/selected.json")["run_id"] == run_id
    kd = [run.config.kd for run in taught.expanded("screen", "kd")]
    assert kd and {config.teacher for config in kd} == {run_id}
    assert taught.json("target.json")["value"] == 4.1


def test_the_verdict_says_that_its_time_is_declared_and_claims_nothing(taught):
    verdict = taught.json("verdict.json")
    assert verdict["teacher_imported"] is True and verdict["claimable"] is False
    assert [text for text in verdict["not_claimable_because"] if "imported" in text] == [
        "the teacher was imported: its time is declared, not measured, and so is its place in the budget"
    ]
    assert "the imported teacher's final validation loss" in verdict["sentence"]
    assert "the teacher's 250 ms of declared training counted" in verdict["sentence"]
    assert verdict["kd_pays_time_with_teacher"] is None and verdict["kd_pays_steps"] is True


def test_all_tables_and_the_page_mark_it(taught):
    run_id = taught.imported.run_id
    teachers = read_rows(taught.path("tables/teachers.csv"))
    assert [row["candidate"] for row in teachers if row["imported"] == "1"] == [run_id] == [teachers[-1]["candidate"]]
    assert (teachers[-1]["verdict"], teachers[-1]["projected_ms"]) == ("selected", "")
    (row,) = (row for row in read_rows(taught.path("tables/ledger.csv")) if row["run_id"] == run_id)
    assert (row["mode"], row["teacher_steps"], row["teacher_train_time_ms"]) == ("teacher_imported", "250", "250.0")
    taught_rows = [row for row in read_rows(taught.path("tables/ledger.csv")) if row["mode"] == "kd_full"]
    assert {row["teacher_train_time_ms"] for row in taught_rows} == {"250.0"}
    page = taught.path("report/index.html").read_text()
    assert "imported; time declared" in page and f"Imported teacher <b>{run_id}</b> is declared to have taken" in page
    assert "selected, imported" in taught.path("figures/teachers.svg").read_text()


def test_an_imported_teacher_that_lost_leaves_the_verdict_alone(tmp_path):
    campaign = WithImported(tmp_path, final_val=7.0)
    campaign.run_all()
    verdict = campaign.json("verdict.json")
    assert verdict["teacher_imported"] is False and "imported" not in str(verdict["not_claimable_because"])
    assert "imported" not in verdict["sentence"]


# ---- in the config --------------------------------------------------------------------------------


def campaign_with(*run_ids):
    return campaigns.load(merged({"device": "cpu", "teacher": {"imported": list(run_ids)}}), ROOT)


def test_only_imported_runs_may_be_named():
    with pytest.raises(ConfigError, match=r"teacher.imported\[0\]: 'ce-3x128' is not allowed"):
        campaign_with("ce-3x128")


def test_expand_stays_pure_and_takes_it_as_the_teacher():
    config = campaign_with("imported-x-0123456789ab")
    decided = {"projected": {"survivors": []}, "selected": {"run_id": "imported-x-0123456789ab"}}
    runs = expansion.expand(config, decided)
    assert {run.arm for run in runs} == {"ce", "ce_screen", "probe", "isolate", "screen"}
    assert {run.config.kd.teacher for run in runs if run.arm == "screen"} == {"imported-x-0123456789ab"}
    decided["selected"] = {"run_id": "imported-gone-0123456789ab"}
    assert {run.arm for run in expansion.expand(config, decided)} == {"ce", "ce_screen", "probe"}


def test_a_missing_or_unfit_import_is_named_with_its_remedy(tmp_path):
    config = make_imported()
    campaign = campaign_with(config.run_id)
    with pytest.raises(ConfigError, match=f"{config.run_id} holds no finished import; .*import-teacher FILE --layers"):
        campaigns.check_imported(campaign, config.data.id, tmp_path)
    write_imported(tmp_path / "runs", config)
    campaigns.check_imported(campaign, config.data.id, tmp_path)
    with pytest.raises(ConfigError, match="measured with data text-512-000000000000, but this campaign has text-9"):
        campaigns.check_imported(campaign, "text-9", tmp_path)
    with pytest.raises(ConfigError, match="measured with device cpu, but this campaign has cuda"):
        campaigns.check_imported(dataclasses.replace(campaign, device="cuda"), config.data.id, tmp_path)
    longer = dataclasses.replace(campaign, validation=dataclasses.replace(campaign.validation, tokens=32768))
    with pytest.raises(ConfigError, match="measured with validation.tokens 8192, but this campaign has 32768"):
        campaigns.check_imported(longer, config.data.id, tmp_path)


def test_plan_knows_that_kd_may_follow_an_imported_teacher(tmp_path, monkeypatch, capsys):
    config = make_imported()
    write_imported(tmp_path / "runs", config)
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(json.dumps({"device": "cpu", "teacher": {"imported": [config.run_id]}}))
    decided = tmp_path / "default/teacher"
    names = [candidate.name for candidate in campaign_with().teacher.candidates]
    write_json(decided / "projected.json", {"survivors": [], "rejected": dict.fromkeys(names, "too slow")})
    write_json(decided / "selected.json", {"run_id": config.run_id, "train_time_ms": 500.0, "budget_ms": 500.0})
    assert cli.main(["plan", "--configfile", str(overlay), "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "screen" in said and "left out" not in said and "(0 finished)" in said


def test_retry_leaves_it_alone(tmp_path, capsys):
    run = write_imported(tmp_path / "runs", make_imported())
    assert cli.main(["retry", "--status", "ok", "--results", str(tmp_path)]) == 1
    assert cli.main(["retry", "--run", run.run_id, "--results", str(tmp_path)]) == 1
    assert "was imported, not trained: import-teacher" in capsys.readouterr().err and run.folder.is_dir()
    assert cli.main(["retry", "--run", "imported-log-a-0123", "--results", str(tmp_path)]) == 1
    assert "was imported, not trained: import makes it again" in capsys.readouterr().err


def test_it_travels_in_a_bundle_whatever_code_imported_it(tmp_path, capsys):
    run = write_imported(tmp_path / "here/runs", make_imported())
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(json.dumps({"device": "cpu", "teacher": {"imported": [run.run_id]}}))
    data = campaigns.data_id(campaign_with(), ROOT)
    write_json(tmp_path / f"here/data/{data}/manifest.json", {"data_hash": "0123", "train": [{"file": "a.bin"}]})
    (tmp_path / "here/default").mkdir()
    where = ["--configfile", str(overlay), "--results", str(tmp_path / "here")]
    assert cli.main(["bundle", "export", str(tmp_path / "x.zip"), "--weights", *where]) == 0
    assert cli.main(["bundle", "import", str(tmp_path / "x.zip"), "--results", str(tmp_path / "there")]) == 0
    found = RunFolder.read(f"imported|seed|{tmp_path / 'there/runs' / run.run_id}")
    assert found.imported and (found.folder / "checkpoints/model.safetensors").read_text() == "x"
