"""Bundles: what goes in comes out, and anything amiss is refused as a whole, in one line that names the file."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import stat
import tarfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from configs import ROOT, merged
from test_analysis_synthetic import write_run

from kdclimb import bundle as bundles
from kdclimb import campaign, expansion, logs
from kdclimb.__main__ import main
from kdclimb.artifacts import RunFolder, publish, write_json
from kdclimb.bundle import BundleError
from kdclimb.bundle import _check_code as check_code
from kdclimb.provenance import source_hash

TINY = ["--configfile", str(ROOT / "tests/tiny.yaml")]
CAMPAIGN = campaign.load(merged("tests/tiny.yaml"), ROOT)
DATA = campaign.data_id(CAMPAIGN, ROOT)
RUNS = {run.run_id: run.config for run in expansion.expand(CAMPAIGN, {}, DATA) if run.arm == "ce"}
RUN = f"runs/{next(iter(RUNS))}"


@pytest.fixture
def results(tmp_path):
    """Finished CE runs of the tiny campaign, the last one a failure, and a table made of them."""
    results = tmp_path / "there"
    for number, config in enumerate(RUNS.values()):
        status = "oom" if number == len(RUNS) - 1 else "ok"
        folder = write_run(results / "runs", config, status=status)
        write_json(folder / "status.json", {"status": status, "code_hash": trainer()})
        weights = folder / "checkpoints/model.safetensors"
        weights.write_text(config.run_id)
        write_json(folder / "checkpoints/model.json", {"weights_sha256": sha256(weights.read_bytes())})
        if status == "oom":
            weights.unlink()
            (folder / "checkpoints/model.json").unlink()
    shards = {part: [{"file": f"{part}.bin"}] for part in ("train", "val")}
    write_json(results / f"data/{DATA}/manifest.json", {"data_hash": "0123", **shards})
    (results / "tiny/ce").mkdir(parents=True)
    (results / "tiny/ce/timing.csv").write_text("run_id\n")
    (results / "tiny/batches").mkdir()
    (results / "tiny/batches/ce-1of1.csv").write_text("run_id,status\n")
    (results / "tiny/logs").mkdir()
    (results / "tiny/logs/compare.log").touch()
    return results


def trainer() -> str:
    return source_hash("workflow/scripts/train.py")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def call(capsys, *argv) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of python -m kdclimb bundle."""
    code = main(["bundle", *map(str, argv)])
    return code, *capsys.readouterr()


def files(folder) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def bundle(results, tmp_path, capsys):
    """bundle(ending, *options) -> the exported file."""

    def export(ending=".zip", *options):
        out = tmp_path / f"bundle{ending}"
        code, _, error = call(capsys, "export", out, "--results", results, *TINY, *options)
        assert code == 0, error
        return out

    return export


def take(capsys, file, into, *options):
    return call(capsys, "import", file, "--results", into, *options)


def refused(capsys, file, into, *said):
    """The import fails in one line that holds these words, and writes nothing."""
    before = files(into) if into.exists() else None
    code, _, error = take(capsys, file, into)
    assert code == 1 and error.count("\n") == 1 and "Traceback" not in error
    assert [word for word in said if word not in error] == [], error
    assert (files(into) if into.exists() else None) == before


def unpacked(file) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(file, members: dict[str, bytes], index: dict | None = None) -> None:
    """Write a zip; `index`: with an index of these keys that agrees with the members."""
    if index is not None:
        entries = [
            {"path": name, "size": len(content), "sha256": sha256(content), "mtime_ns": 10**18}
            for name, content in members.items()
            if name != "index.json"
        ]
        members = {"index.json": json.dumps(index | {"files": entries}).encode()} | members
        members["index.json"] = json.dumps(index | {"files": entries}).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def edited(file, name: str, content: bytes | None) -> None:
    """The same bundle with one file changed, added or (None) taken out, and an index that agrees."""
    members = unpacked(file)
    index = json.loads(members["index.json"])
    members.pop(name, None)
    packed(file, members | ({} if content is None else {name: content}), index)


# ---- what goes in comes out ---------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".zip", ".tar.gz"])
@pytest.mark.parametrize("weights", [False, True])
def test_what_goes_in_comes_out(bundle, results, tmp_path, capsys, ending, weights):
    code, told, _ = take(capsys, bundle(ending, *["--weights"] * weights), tmp_path / "here")
    found, there = files(tmp_path / "here"), files(results)
    here = {name: content for name, content in found.items() if "/.state/" not in name}
    for run_id in RUNS:  # what brings each back
        of_run, kept = f"runs/{run_id}/", f"runs/{run_id}/.state/complete/"
        assert {name.removeprefix(of_run) for name in here if name.startswith(of_run)} == {
            name.removeprefix(kept) for name in found if name.startswith(kept)
        } - {"key.json"}
    left = {name for name in there if "/logs/" in name or (name.endswith(".safetensors") and not weights)}
    marks = {name for name in here if name.endswith(".elsewhere")}
    assert code == 0 and {name: here[name] for name in here.keys() - marks} == {
        k: there[k] for k in there.keys() - left
    }
    assert len(marks) == (0 if weights else len(RUNS) - 1) and ("no weights here" in told) is not weights
    manifest = tmp_path / f"here/data/{DATA}/manifest.json"
    assert "no tokens are here" in told and f"./run --force {manifest} --configfile CONFIG && touch -d @" in told
    assert all((tmp_path / "here/runs" / run_id / "checkpoints").is_dir() for run_id in RUNS)  # the failed one too


def test_imported_files_are_in_order_of_age(bundle, results, tmp_path, capsys):
    ahead = time.time() + 3600  # the other machine's clock
    for file in results.rglob("*.*"):
        os.utime(file, (ahead, ahead - 60 * file.name.startswith("manifest")))
    take(capsys, bundle(), tmp_path / "here")
    here = tmp_path / "here"
    manifest, run, table = (here / name for name in (f"data/{DATA}/manifest.json", RUN, "tiny/ce/timing.csv"))
    job = here / "tiny/batches/ce-1of1.csv"  # its runs would be trained again
    age = {path: path.stat().st_mtime for path in (manifest, run / "status.json", run / "checkpoints", table, job)}
    assert age[table] < age[manifest] < age[run / "checkpoints"] == age[run / "status.json"] <= time.time()
    assert age[manifest] < age[job] <= time.time()


@pytest.mark.parametrize(("cache", "said"), [("samples-0123456789ab", None), ("../../evil", "kd.cache: '../../evil'")])
def test_a_cache_that_runs_read_has_a_folder_as_old_as_they_are(bundle, tmp_path, capsys, cache, said):
    file, there = bundle(), tmp_path / "here/caches"
    kd = dataclasses.replace(expansion.Expansion(CAMPAIGN, DATA).kd("ce-1x8-30-s0-0", 1.0), cache=cache)
    config = dataclasses.replace(RUNS[Path(RUN).name], kd=kd)
    reader, members = f"runs/{config.run_id}", unpacked(file)
    moved = {name.replace(RUN, reader): content for name, content in members.items()}
    moved[f"{reader}/config.json"] = json.dumps(dataclasses.asdict(config)).encode()
    packed(file, moved, json.loads(members["index.json"]))
    if said:
        refused(capsys, file, tmp_path / "here", f"{reader}/config.json", said)
        return
    code, told, _ = take(capsys, file, tmp_path / "here")
    assert code == 0 and "not here: 1;" in told
    assert [path.name for path in there.iterdir()] == [cache]
    assert [path.name for path in (there / cache).iterdir()] == ["elsewhere"]
    assert (there / cache).stat().st_mtime_ns == (tmp_path / "here" / reader / "config.json").stat().st_mtime_ns


def test_data_prepared_here_is_kept_and_dated_back(bundle, results, tmp_path, capsys):
    manifest = tmp_path / f"here/data/{DATA}/manifest.json"
    write_json(manifest, {"data_hash": "0123", "train": [], "prepared": "here"})
    assert take(capsys, bundle(), tmp_path / "here")[0] == 0
    assert "here" in manifest.read_text()
    assert manifest.stat().st_mtime_ns == (results / f"data/{DATA}/manifest.json").stat().st_mtime_ns
    write_json(manifest, {"data_hash": "other"})
    refused(capsys, bundle(), tmp_path / "here", "manifest.json: another result")


def test_an_import_can_be_repeated_and_the_weights_brought_later(bundle, results, tmp_path, capsys):
    bare, whole = bundle(), bundle(".tar.gz", "--weights")
    take(capsys, bare, tmp_path / "here")
    shutil.rmtree(tmp_path / "here" / RUN / ".state")  # as an earlier version's import left it
    assert "; 0 of " in take(capsys, bare, tmp_path / "here")[1]
    assert RunFolder(tmp_path / "here" / RUN).restore_imported()
    age = (tmp_path / "here" / RUN / "checkpoints").stat().st_mtime_ns
    code, told, _ = take(capsys, whole, tmp_path / "here")
    assert code == 0 and f"; {len(RUNS) - 1} of " in told and "no weights" not in told
    assert not list((tmp_path / "here").rglob("*.elsewhere"))
    assert (tmp_path / "here" / RUN / "checkpoints").stat().st_mtime_ns == age


def test_an_import_that_was_interrupted_is_mended_by_repeating_it(bundle, tmp_path, capsys, monkeypatch):
    """Killed after the runs, while the campaign's files were being written."""
    file, here = bundle(), tmp_path / "here"
    take(capsys, file, tmp_path / "unbroken")

    def killed(archive, entry, *rest):
        if entry.path.startswith("tiny/"):
            raise KeyboardInterrupt
        write(archive, entry, *rest)

    with monkeypatch.context() as patch:
        write = bundles._write
        patch.setattr(bundles, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            take(capsys, file, here)
    assert (here / RUN / "status.json").is_file() and not (here / "tiny").exists()
    code, told, _ = take(capsys, file, here)
    assert code == 0 and f"{len(RUNS) - 1} of the runs have no weights here" in told
    assert files(here) == files(tmp_path / "unbroken")  # the marks too
    for folder in (f"runs/{run_id}/checkpoints" for run_id in RUNS):
        assert (here / folder).stat().st_mtime_ns == (tmp_path / "unbroken" / folder).stat().st_mtime_ns


def test_logs_that_the_campaign_names_come_along(results, bundle, tmp_path, capsys):
    (tmp_path / "fast.txt").write_text("step:30/30 val_loss:4.0 train_time:300ms step_avg:10.00ms\n")
    folder, _ = logs.import_log(tmp_path / "fast.txt", results)
    named = {"baseline": {"imports": [folder.name]}}
    (tmp_path / "log.yaml").write_text(json.dumps(named))
    file, here = bundle(".zip", str(tmp_path / "log.yaml")), tmp_path / "here"
    code, _, error = take(capsys, file, here)
    assert code == 0, error
    assert (
        files(here / "runs" / folder.name) == files(folder) and (here / "runs" / folder.name / "checkpoints").is_dir()
    )
    campaign.check_logs(campaign.load(merged("tests/tiny.yaml", named), ROOT), here)  # as the Snakefile does
    edited(file, f"runs/{folder.name}/status.json", b"{}")
    refused(capsys, file, tmp_path / "new", f"runs/{folder.name}/status.json: lacks status")


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out", "out.tar", "out.zip.txt"])
def test_export_refuses_other_endings(results, tmp_path, capsys, name):
    code, _, error = call(capsys, "export", tmp_path / name, "--results", results, *TINY)
    assert code == 1 and ".zip or .tar.gz" in error and not (tmp_path / name).exists()


def test_export_with_nothing_finished_says_so(tmp_path, capsys):
    code, _, error = call(capsys, "export", tmp_path / "b.zip", "--results", tmp_path / "none", *TINY)
    assert code == 1 and "no finished run of campaign tiny" in error and not (tmp_path / "b.zip").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("val_loss.png", None, "missing"),
        ("steps.csv", b"other", "damaged"),
        ("status.json", b'{"status": "ok", "files": {}}', "damaged"),
        ("checkpoints/model.json", None, "missing"),
        ("checkpoints/model.safetensors", b"other", "damaged"),
        ("checkpoints/model.safetensors", None, "missing"),
    ],
)
def test_export_refuses_a_run_that_is_not_as_it_was_written(results, tmp_path, capsys, name, content, said):
    out, folder, weights = tmp_path / "b.zip", results / RUN, ["--weights"] * ("safetensors" in name)
    publish(folder, {"status": "ok", "code_hash": trainer()})
    assert call(capsys, "export", out, "--results", results, *TINY, *weights)[0] == 0
    out.unlink()
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    code, _, error = call(capsys, "export", out, "--results", results, *TINY, *weights)
    remedy = f"make the run again: python -m kdclimb retry --run {folder.name}, then ./run"
    assert code == 1 and error.startswith(f"{folder / name}: {said}") and error.endswith(f"{remedy}\n")
    assert list(tmp_path.glob("*.zip*")) == []
    if weights:  # they stay here
        assert call(capsys, "export", out, "--results", results, *TINY)[0] == 0
    else:
        assert main(["retry", "--run", folder.name, "--results", str(results)]) == 0
        assert call(capsys, "export", out, "--results", results, *TINY)[0] == 0


def test_export_refuses_what_an_import_would(results, tmp_path, capsys):
    write_json(results / RUN / "status.json", {"status": "ok"})  # unsealed, as an early version's
    code, _, error = call(capsys, "export", tmp_path / "b.zip", "--results", results, *TINY)
    assert code == 1 and f"b.zip: {RUN}/status.json: lacks code_hash" in error
    assert list(tmp_path.glob("*.zip*")) == []


def test_export_takes_runs_whose_weights_are_elsewhere(results, bundle, tmp_path, capsys):
    publish(results / RUN, {"status": "ok", "code_hash": trainer()})
    assert take(capsys, bundle(), tmp_path / "here")[0] == 0
    code, _, error = call(capsys, "export", tmp_path / "b.zip", "--weights", "--results", tmp_path / "here", *TINY)
    assert code == 0, error
    assert take(capsys, tmp_path / "b.zip", tmp_path / "further")[0] == 0
    assert files(tmp_path / "further") == files(tmp_path / "here")


def test_another_result_is_never_overwritten(bundle, tmp_path, capsys):
    file = bundle()
    take(capsys, file, tmp_path / "here")
    (tmp_path / "here" / RUN / "val.csv").write_text("other")
    refused(capsys, file, tmp_path / "here", f"{RUN}/val.csv: another result")
    (tmp_path / "here" / RUN / "val.csv").unlink()
    (tmp_path / "here" / RUN / "val.csv").symlink_to("/nowhere")
    refused(capsys, file, tmp_path / "here", f"{RUN}/val.csv: another result")


def test_what_is_here_with_another_content_can_stay(bundle, results, tmp_path, capsys):
    """A campaign in parts, each with a training of its own of one run: the first to be imported stays."""
    file, here = bundle(), tmp_path / "here"
    there = files(results)
    take(capsys, file, here)
    for name in there:
        if not name.startswith((RUN, "tiny/ce")):
            (here / name).unlink(missing_ok=True)
    (here / RUN / "val.csv").write_text("other")
    (here / "tiny/ce/timing.csv").write_text("other")
    shutil.rmtree(here / RUN / ".state")  # which is another's where it was trained:
    (here / RUN / ".state/complete").mkdir(parents=True)
    (here / RUN / ".state/complete/val.csv").hardlink_to(here / RUN / "val.csv")
    late = 10**11
    for path in (here / RUN).rglob("*"):
        times = path.stat()
        if path.parent.name != "complete":
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + late))
    before = {path: path.stat().st_mtime_ns - late for path in (here / RUN).rglob("*")}
    refused(capsys, file, here, "another result", "--keep")
    code, told, error = take(capsys, file, here, "--keep")
    assert code == 0, error
    assert f"here with another content, which stays: {RUN}, tiny/ce/timing.csv" in told
    found = files(here)
    assert found[f"{RUN}/val.csv"] == found["tiny/ce/timing.csv"] == b"other"
    others = [name for name in there if not name.startswith((RUN, "tiny/")) and not name.endswith(".safetensors")]
    assert len(others) > 20 and all(found[name] == there[name] for name in others)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # as old as the bundle's


def test_what_is_no_finished_run_can_not_stay(bundle, tmp_path, capsys):
    file, here = bundle(), tmp_path / "here"
    take(capsys, file, here)
    (here / RUN / "val.csv").write_text("other")
    (here / RUN / "status.json").unlink()
    code, _, error = take(capsys, file, here, "--keep")
    assert code == 1 and "another result" in error and not (here / RUN / "status.json").exists()


def test_runs_of_other_code_need_a_word(bundle, results, tmp_path, capsys):
    write_json(results / RUN / "status.json", {"status": "ok", "code_hash": "0" * 12})
    file = bundle()
    refused(capsys, file, tmp_path / "here", f"{RUN}: trained by other code", "--any-code")
    assert take(capsys, file, tmp_path / "here", "--any-code")[0] == 0


def test_a_counted_teacher_goes_by_the_code_that_counts(tmp_path):
    index, run_id = SimpleNamespace(kdclimb_commit="x"), "ngram-2-0123456789ab"
    check_code(tmp_path, index, {run_id: {"code_hash": source_hash("workflow/scripts/ngram.py")}})
    with pytest.raises(BundleError, match=run_id):
        check_code(tmp_path, index, {run_id: {"code_hash": trainer()}})


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../escape.csv",
        "tiny/../../escape.csv",
        "tiny\\..\\escape.csv",
        "C:/escape.csv",
        "tiny/.hidden",
        "tiny//a.csv",
        "other/tables/runs.csv",
        "runs/a/b/c.csv",
        "data/text/train_000000.bin",
        f"{RUN}/.state/key.json",
    ],
)
def test_paths_where_no_result_may_lie_are_refused(bundle, tmp_path, capsys, path):
    file = bundle()
    edited(file, path, b"x")
    refused(capsys, file, tmp_path / "here", repr(path)[1:-1], "not a path of a result")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            f"{RUN}/config.json",
            next(c.canonical() for i, c in enumerate(RUNS.values()) if i),
            "the config of another run",
        ),
        (f"{RUN}/config.json", "{}", "this key is missing"),
        (f"{RUN}/config.json", "[" * 100000, "not JSON"),
        (f"{RUN}/status.json", "{}", "lacks status, code_hash"),
        (f"{RUN}/summary.csv", None, "missing"),
        (f"{RUN}/status.json", None, "missing"),
        (f"{RUN}/checkpoints/model.json", None, "missing"),
        (f"{RUN}/checkpoints/model.json", '{"weights_sha256": "00"}', None),
        (f"{RUN}/checkpoints/model.safetensors", "other weights", "not the weights that model.json describes"),
        (f"data/{DATA}/manifest.json", "[]", "lacks data_hash"),
    ],
)
def test_a_run_that_is_not_whole_or_not_itself_is_refused(bundle, tmp_path, capsys, name, content, said):
    file = bundle()
    edited(file, name, None if content is None else content.encode())
    if said is None:
        assert take(capsys, file, tmp_path / "here")[0] == 0
    else:
        refused(capsys, file, tmp_path / "here", name, said)


def test_a_file_that_is_not_as_the_index_says_is_refused(bundle, tmp_path, capsys):
    file, name = bundle(), f"{RUN}/val.csv"
    members = unpacked(file)
    for content in (members[name][:-1], members[name] + b"x", members[name][:-1] + b"x"):
        packed(file, members | {name: content})
        refused(capsys, file, tmp_path / "here", name, "index.json describes")
    packed(file, {k: v for k, v in members.items() if k != name})
    refused(capsys, file, tmp_path / "here", name, "not in both")
    packed(file, members | {"tiny/extra.csv": b"x"})
    refused(capsys, file, tmp_path / "here", "tiny/extra.csv", "not in both")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({"format": 2}, "format 2"),
        ({"campaign": "runs"}, "'runs' is no name"),
        ({"campaign": "../x"}, "'../x' is no name"),
        ({"kdclimb_commit": 7}, "kdclimb_commit"),
        ({"files": [{"path": "tiny/a.csv", "size": -1, "sha256": "", "mtime_ns": 0}]}, "out of range"),
        ({"more": 1}, "more: unknown key"),
    ],
)
def test_a_wrong_index_is_refused(bundle, tmp_path, capsys, index, said):
    file = bundle()
    members = unpacked(file)
    packed(file, members | {"index.json": json.dumps(json.loads(members["index.json"]) | index).encode()})
    refused(capsys, file, tmp_path / "here", "index.json", said)


def test_links_are_refused_in_a_zip(bundle, tmp_path, capsys):
    file = bundle()
    with zipfile.ZipFile(file, "a") as archive:
        link = zipfile.ZipInfo("tiny/link.csv")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    refused(capsys, file, tmp_path / "here", "tiny/link.csv", "not a plain file")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused_in_a_tar(tmp_path, capsys, kind):
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("tiny/link.csv")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    refused(capsys, tmp_path / "b.tar.gz", tmp_path / "here", "tiny/link.csv", "not a plain file")


def test_two_files_of_one_name_are_refused(tmp_path, capsys):
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("index.json"), io.BytesIO())
    refused(capsys, tmp_path / "b.tar.gz", tmp_path / "here", "two files of one name")


@pytest.mark.parametrize("ending", [".zip", ".tar.gz"])
def test_a_cut_or_damaged_bundle_is_refused(bundle, tmp_path, capsys, ending):
    file = bundle(ending)
    whole = file.read_bytes()
    middle = len(whole) // 2
    for content in (whole[:middle], whole[:middle] + bytes(64) + whole[middle + 64 :]):
        file.write_bytes(content)
        refused(capsys, file, tmp_path / "here", file.name)


@pytest.mark.parametrize("content", [b"", b"PK", b"\x1f\x8b", b"plain text"])
def test_what_is_no_bundle_is_refused(tmp_path, capsys, content):
    (tmp_path / "b.zip").write_bytes(content)
    refused(capsys, tmp_path / "b.zip", tmp_path / "here", "b.zip")
    refused(capsys, tmp_path / "missing.zip", tmp_path / "here", "missing.zip")
