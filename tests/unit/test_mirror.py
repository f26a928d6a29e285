"""The mirror: only finished runs, only what has changed, each file whole, status.json last."""

import shutil

import pytest
from configs import ROOT, merged
from test_analysis_synthetic import make_config, run_script, write_run

from kdclimb import campaign, expansion, mirror
from kdclimb.config import ConfigError


@pytest.fixture
def results(tmp_path):
    """A results folder with one finished run, and a campaign's table, log and half-written file."""
    write_run(tmp_path / "results/runs", make_config(), val=[(0, 6.0), (25, 5.0)])
    folder = tmp_path / "results/c"
    for name in ("tables/runs.csv", "logs/compare.log", "tables/.runs.csv.7.tmp"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return tmp_path / "results"


def copied(root):
    return {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}


def copy(results, root):
    return mirror.mirror(results, results / "c", [make_config().run_id], root)


def test_finished_artifacts_and_nothing_else(results, tmp_path):
    run = results / "runs" / make_config().run_id
    (run / ".state").mkdir()
    (run / ".state/attempts").write_text("1")
    unfinished = write_run(results / "runs", make_config(seed=1))
    (unfinished / "status.json").unlink()
    number = mirror.mirror(results, results / "c", [run.name, unfinished.name, "never-started"], tmp_path / "m")
    names = "config.json steps.csv val.csv summary.csv status.json train.log val_loss.png step_time.png".split()
    names += ["checkpoints/model.json", "checkpoints/model.safetensors"]
    expected = {f"results/runs/{run.name}/{name}" for name in names} | {"results/c/tables/runs.csv"}
    assert copied(tmp_path / "m") == expected and number == len(expected)


def test_unchanged_files_are_not_copied_again_and_changed_ones_are(results, tmp_path):
    copy(results, tmp_path / "m")
    assert copy(results, tmp_path / "m") == 0
    (results / "c/tables/runs.csv").write_text("tables/runs.CSV")  # as long as before
    assert copy(results, tmp_path / "m") == 1
    assert (tmp_path / "m/results/c/tables/runs.csv").read_text() == "tables/runs.CSV"


def test_a_run_made_again_is_never_mixed_with_the_one_before(results, tmp_path, monkeypatch):
    copy(results, tmp_path / "m")
    run, there = results / "runs" / make_config().run_id, tmp_path / "m/results/runs" / make_config().run_id
    (run / "val.csv").write_text("other")
    shutil.rmtree(run / "checkpoints")
    real, seen = mirror._copy, []

    def watched(source, target):
        seen.append((target.name, (there / "status.json").exists()))
        return real(source, target)

    monkeypatch.setattr(mirror, "_copy", watched)
    copy(results, tmp_path / "m")
    of_the_run = seen[: [name for name, _ in seen].index("status.json") + 1]
    assert not any(finished for _, finished in of_the_run) and len(of_the_run) == 8
    assert (there / "status.json").is_file() and not list((there / "checkpoints").iterdir())


def test_a_mirror_that_cant_be_written_is_one_line_and_exit_code_1(results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    said = run_script("mirror", "--root", "file/m", "--run", f"results/runs/{make_config().run_id}")
    assert said.startswith("kdclimb: paths.mirror: no copy at file/m") and "\n" not in said


@pytest.mark.parametrize("where", ["results", "results/copy", ".", "", "config/config.yaml"])
def test_a_mirror_in_results_or_on_them_is_refused(where):
    with pytest.raises(ConfigError, match="paths.mirror: .* is not allowed"):
        campaign.load(merged({"paths": {"mirror": where}}), ROOT)


def test_no_run_depends_on_the_mirror():
    one, other = (campaign.load(merged({"paths": {"mirror": where}}), ROOT) for where in (None, "/mnt/disk"))
    assert campaign.mirror_root(one, ROOT) is None and str(campaign.mirror_root(other, ROOT)) == "/mnt/disk"
    assert expansion.expand(one, {}) == expansion.expand(other, {})
    assert campaign.data_id(one, ROOT) == campaign.data_id(other, ROOT)
