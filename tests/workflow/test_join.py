"""Results that leave a machine: the mirror, and bundles that another checkout takes."""

import json
import shutil
import subprocess

import pytest
from checkouts import TINY, Checkout, jobs, overlay, trains

pytestmark = pytest.mark.slow


def files(root) -> dict[str, bytes]:
    """What a mirror of `root`/results has to hold, by path: runs but for their state, a campaign but for its logs."""
    found = [file for top in ("runs", "tiny") for file in (root / "results" / top).rglob("*") if file.is_file()]
    paths = {file.relative_to(root) for file in found}
    kept = [path for path in paths if path.parts[2] != "logs" and not any(part.startswith(".") for part in path.parts)]
    return {str(path): (root / path).read_bytes() for path in kept}


def test_a_mirror_set_on_a_finished_campaign_gets_all_and_reruns_nothing(changed, tmp_path):
    arguments = overlay(changed, "mirror", paths={"mirror": "../mir ror"})
    assert jobs(changed.run(*arguments)) == ["mirror", "all"]
    assert files(tmp_path / "mir ror") == files(changed.path)
    assert "Nothing to be done" in changed.run("-n", *arguments)


def test_a_mirror_that_cant_be_written_costs_no_result_and_is_said(changed, tmp_path):
    (tmp_path / "file").touch()
    arguments = overlay(changed, "mirror", paths={"mirror": "../file/mirror"})
    run_id = next(name for name in changed.attempts() if name.startswith("cels"))  # a control, on which little depends
    changed.kdclimb("retry", "--run", run_id)
    output = changed.run(*arguments, code=None)
    assert output.count("paths.mirror: no copy at") >= 2 and "Traceback" not in output  # after the run, and at the end
    assert json.loads((changed.path / f"results/runs/{run_id}/status.json").read_text())["status"] == "ok"
    assert (changed.path / "results/tiny/report/index.html").is_file()
    assert "Nothing to be done" in changed.run("-n", *TINY)  # the campaign itself is finished


def test_a_run_is_mirrored_as_soon_as_it_is_finished(changed, tmp_path):
    arguments = overlay(changed, "mirror", paths={"mirror": str(tmp_path / "mirror")})
    run_id = next(iter(changed.attempts()))
    changed.kdclimb("retry", "--run", run_id)
    changed.run(f"results/runs/{run_id}/status.json", "--no-hooks", *arguments)  # hooks would copy at the end
    copied = files(tmp_path / "mirror")
    assert copied and copied == {
        k: v for k, v in files(changed.path).items() if k.startswith(f"results/runs/{run_id}/")
    }


def test_a_bundle_brings_another_checkout_all_that_the_analysis_needs(finished, checkout, tmp_path):
    finished.kdclimb("bundle", "export", tmp_path / "tiny.zip", *TINY)
    assert "no tokens" in checkout.kdclimb("bundle", "import", tmp_path / "tiny.zip")
    assert not list(checkout.path.rglob("model.safetensors")) and checkout.tables() == finished.tables()
    planned = checkout.run("-n", "results/tiny/report/index.html", *TINY)
    assert {"compare", "report"} <= set(jobs(planned)) and "data" not in jobs(planned) and not trains(planned)
    shutil.rmtree(checkout.path / "results/tiny/tables")
    checkout.run(*TINY)
    assert checkout.tables() == finished.tables() and checkout.attempts() == {}
    assert "Nothing to be done" in checkout.run("-n", *TINY)


def test_an_edit_neither_deletes_nor_trains_what_a_bundle_brought(checkout, tmp_path):
    """Not even where each run is a job of its own, and what Snakemake made here, the data, is made again."""
    target, there = "results/tiny/teacher/probe.csv", Checkout(tmp_path / "there")
    there.run(target, *TINY)
    there.kdclimb("bundle", "export", tmp_path / "tiny.zip", *TINY)
    told = checkout.kdclimb("bundle", "import", tmp_path / "tiny.zip")
    make_tokens = told.splitlines()[-1].replace("CONFIG", "tests/tiny.yaml")
    subprocess.run(["bash", "-c", make_tokens], cwd=checkout.path, check=True, capture_output=True)
    alone = {"cluster": {"tokens_per_job": 0}}
    arguments = [target, *overlay(checkout, "alone", **alone)]
    assert jobs(checkout.run(*arguments)) == ["teacher_probe"]
    before = {name: content for name, content in files(checkout.path).items() if name.startswith("results/runs/")}
    checkout.edit("kdclimb/waiting.py", "EVERY = 30.0", "EDITED = 1\nEVERY = 30.0")
    frozen = checkout.run("-n", target, *overlay(checkout, "frozen", code="frozen", **alone))
    assert jobs(frozen) == ["teacher_probe"]
    made = jobs(checkout.run(*arguments))
    assert made[0] == "data" and made.count("train") == len(there.attempts()) > 1
    found = {name: content for name, content in files(checkout.path).items() if name.startswith("results/runs/")}
    assert len(before) > 20 and found == before and checkout.attempts() == {}
    assert "Nothing to be done" in checkout.run("-n", *arguments)


def test_after_an_import_kd_needs_the_weights_and_the_tokens(finished, checkout, tmp_path):
    finished.kdclimb("bundle", "export", tmp_path / "bare.zip", *TINY)
    finished.kdclimb("bundle", "export", tmp_path / "whole.tar.gz", "--weights", *TINY)
    told = checkout.kdclimb("bundle", "import", tmp_path / "bare.zip")
    hotter = ["results/tiny/kd/screen.csv", *overlay(checkout, "hotter", kd={"grid": {"temperature": [1.0, 3.0]}})]
    teacher = json.loads((checkout.path / "results/tiny/teacher/selected.json").read_text())["run_id"]
    output = checkout.run(*hotter, code=None)
    assert f"train: results/runs/{teacher}/checkpoints: described, but without its weights" in output
    make_tokens = told.splitlines()[-1].replace(" &&", f" {' '.join(TINY)} &&")
    subprocess.run(["bash", "-c", make_tokens], cwd=checkout.path, check=True, capture_output=True)
    assert "imported: " in checkout.kdclimb("bundle", "import", tmp_path / "whole.tar.gz")
    checkout.run(*hotter)
    (trained,) = checkout.attempts()  # nothing imported was trained again
    assert "-t3-" in trained
