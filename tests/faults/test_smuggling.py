"""Nothing that a stranger's file says is run: no pickle, no YAML tags, no shell made of values."""

import ast
import csv
import json
import re
import shlex
import subprocess
import sys
import zipfile
from html.parser import HTMLParser

import pytest
from checkouts import TINY, Checkout
from configs import ROOT
from test_analysis_synthetic import SyntheticCampaign

from kdclimb.__main__ import main
from kdclimb.analysis.report import TABLES, TEXT, WORDS, report
from kdclimb.artifacts import Damaged
from kdclimb.campaign import read_decisions
from kdclimb.logs import import_log

FILES = [file for folder in ("kdclimb", "workflow", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))]
REFUSED = {
    "eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "pickle.load", "pickle.loads", "torch.load",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "joblib.load", "numpy.load", "np.load",
}  # fmt: skip


def calls(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


def test_no_call_runs_what_it_reads():
    found = {}
    for file in FILES:
        for name, words in calls(file):
            if name in REFUSED or words.get("shell") == "True":
                found[file.relative_to(ROOT).as_posix(), name] = words
    assert list(found) == [("kdclimb/unpickle.py", "torch.load")]
    assert found["kdclimb/unpickle.py", "torch.load"]["weights_only"] == "True"


@pytest.mark.parametrize("arguments", [[], ["-n"], ["--lint"]])
def test_a_config_file_that_is_a_template_runs_nothing(arguments, tmp_path):
    checkout = Checkout(tmp_path / "kdclimb")
    gone = tmp_path / "gone"
    text = f"__use_yte__: true\ncampaign: ?open({str(gone)!r}, 'w').name and 'tiny'\n"
    (checkout.path / "bad.yaml").write_text(text)
    said = checkout.run(*TINY, "bad.yaml", *arguments, code=1)
    assert "kdclimb: error: bad.yaml: is a template" in said and "Traceback" not in said
    assert not gone.exists()


def test_free_text_of_a_config_reaches_a_shell_quoted():
    """Params that hold text which the schema bounds by no pattern go through shlex.quote."""
    rules = "\n".join(file.read_text() for file in sorted((ROOT / "rules").glob("*.smk")))
    made = re.findall(r"^ {8}\w+=.*(?:canonical\w*\(|json\.dumps|MIRROR\)|Path\().*$", rules, flags=re.MULTILINE)
    assert len(made) > 6
    assert [line for line in made if "shlex.quote" not in line and not line.startswith("        needs=")] == []
    assert "{resources.needs:q}" in rules


NAMES = ["; touch gone", "$(touch gone)", "`touch gone`", "a' ; touch gone '", "a\ntouch gone"]


@pytest.mark.parametrize("name", NAMES)
def test_a_quoted_flag_is_one_word_to_a_shell(name, tmp_path):
    flag = f"screen|{name}|results/runs/x"
    command = ["bash", "-c", f"printf %s {shlex.quote(flag)}"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout == flag
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("run_id", ["../../x", "a b", "x; rm -rf ~", "$(id)", "x\n", 7, ["x"]])
def test_a_decision_names_a_run_and_nothing_else(run_id, tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/selected.json").write_text(json.dumps({"run_id": run_id}))
    with pytest.raises(Damaged, match="selected.json"):
        read_decisions(tmp_path)


def test_set_up_refuses_a_package_that_is_not_the_locked_one(tmp_path):
    """A wheel of the right name and version, but of another content, where pip looks."""
    line = re.search(r"^numpy==(\S+).*(?:\n .*)*", (ROOT / "envs/locked.txt").read_text(), flags=re.MULTILINE)
    info = f"numpy-{line[1]}.dist-info"
    with zipfile.ZipFile(tmp_path / f"numpy-{line[1]}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("numpy.py", "print('anything')")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: numpy\nVersion: {line[1]}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    options = ["--isolated", "--no-index", f"--find-links={tmp_path}", "--dry-run", "--ignore-installed", "--no-deps"]
    said = {}
    for name, text in {"locked": line[0], "by name": line[0].split()[0]}.items():
        (tmp_path / "wanted.txt").write_text(text)
        command = [sys.executable, "-m", "pip", "install", *options, "-r", str(tmp_path / "wanted.txt")]
        said[name] = subprocess.run(command, capture_output=True, text=True)
    assert said["by name"].returncode == 0, said["by name"].stderr
    assert said["locked"].returncode != 0 and "DO NOT MATCH THE HASHES" in said["locked"].stderr, said["locked"].stderr


# ---- pages ------------------------------------------------------------------------------------------

EVIL = "\"'></script><img src=x onerror=x>{x}"
WORDS_OF_OURS = (
    "arm against kind status clock measure target phase place figure cost source promoted verdict artifact_dir".split()
)


class Elements(HTMLParser):
    """The elements of a page that could run something, and what it shows as text."""

    def __init__(self, page: str):
        super().__init__()
        self.active, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag in ("script", "img", "iframe") or any(name.startswith("on") for name, _ in attributes):
            self.active.append((tag, *(name for name, _ in attributes)))

    def handle_data(self, data):
        self.text.append(data)


def spoil(path, columns) -> None:
    """Let the cells of these columns end in markup, each in the same way in all tables, so that rows still meet."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows, header = list(reader), reader.fieldnames
    for row in rows:
        row |= {column: f"{row[column]}{EVIL}" for column in columns if row.get(column)}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    path.with_name(f".{path.name}.sha256").unlink(missing_ok=True)


def test_no_text_of_any_table_becomes_a_part_of_the_page(tmp_path):
    """Names, reasons, ends of logs, notes, values of configs: all that is not a word of our own."""
    campaign = SyntheticCampaign(tmp_path)
    failed = {"status": "failed", "reason": "some", "val": [], "step_ms": [], "shares": []}
    campaign.edit = lambda run: failed if run.arm == "control_smooth" else {}
    campaign.run_all()
    whole, spoilt = campaign.path("report/index.html"), 0
    files = campaign.report_files()
    for name, columns in TABLES.items():
        text = set(columns) - set(WORDS[name]) if name in WORDS else set(columns) & TEXT
        if name != "ledger" and files[name].is_file():  # its columns are figures as text; one table may not be there
            spoil(files[name], text - set(WORDS_OF_OURS))
            spoilt += 1
    out = tmp_path / "spoilt.html"
    report("tiny", tmp_path / "figures", out, **files)
    found, before = Elements(out.read_text()), Elements(whole.read_text())
    assert found.active == before.active and len(before.active) == 3
    assert sum(text.count("<img src=x onerror=x>{x}") for text in found.text) > spoilt > 15


def test_no_text_of_published_numbers_becomes_a_part_of_their_page(tmp_path):
    folder = tmp_path / EVIL.replace("/", "")
    folder.mkdir()
    for name, columns in {"runs.csv": ("run_id", "series", "label", "note"), "claims.csv": ("claim", "run_id")}.items():
        (folder / name).write_bytes((ROOT / "examples/seed" / name).read_bytes())
        spoil(folder / name, columns)
    spoil(folder / "claims.csv", ["against"])
    found, before = (
        Elements((tmp_path / out / "index.html").read_text())
        for source, out in ((folder, "out"), (ROOT / "examples/seed", "whole"))
        if main(["reread", str(source), "--out", str(tmp_path / out)]) == 0
    )
    assert found.active == before.active and sum("onerror=x" in text for text in found.text) > 20


# ---- paths ------------------------------------------------------------------------------------------

STEM = "step:25/25 val_loss:4.5 train_time:450ms kd_mode:<script>alert(1)</script> kd_active:True\n"


@pytest.mark.parametrize(
    "name", ["...txt", "..%2f..%2fx.txt", "-rf.txt", "; rm -rf ~.txt", "$(id)", "a\nb", f"{EVIL}.txt"]
)
def test_a_logs_name_stays_in_its_folder(name, tmp_path):
    path = tmp_path / name.replace("/", "")
    path.write_text(STEM)
    folder, _ = import_log(path, tmp_path / "results")
    assert folder.resolve().parent == (tmp_path / "results/runs").resolve()
    assert re.fullmatch(r"imported-log-[A-Za-z0-9][A-Za-z0-9.-]*", folder.name)
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "results"}


@pytest.mark.parametrize("run_id", ["../../kept", "..", ".", "*", "../runs/x"])
def test_retry_deletes_runs_and_nothing_else(run_id, tmp_path, capsys):
    for folder in ("results/runs/x", "kept"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "status.json").write_text("{}")
    assert main(["retry", "--run", run_id, "--results", str(tmp_path / "results")]) == 1
    assert "no run with id" in capsys.readouterr().err
    assert (tmp_path / "kept/status.json").is_file() and (tmp_path / "results/runs/x/status.json").is_file()
