"""Nothing that a stranger's file says is run: no pickle, no YAML tags, no shell made of values."""

import ast
import json
import re
import shlex
import subprocess
import sys
import zipfile

import pytest
from configs import ROOT

from kdclimb.artifacts import Damaged
from kdclimb.campaign import read_decisions

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
