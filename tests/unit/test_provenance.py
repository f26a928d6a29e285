"""The code hash follows what a script runs, and nothing else; devices; `kdclimb retry` forgets results."""

import json
from types import SimpleNamespace

import pytest
import torch

from kdclimb import provenance
from kdclimb.__main__ import main


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A small project: script -> kdclimb.a -> (inside a function) kdclimb.sub.b; kdclimb.c is not imported."""
    files = {
        "workflow/scripts/s.py": "from kdclimb import a\na.f()\n",
        "kdclimb/__init__.py": "",
        "kdclimb/a.py": '"""doc"""\ndef f():\n    from kdclimb.sub.b import g\n    return g()\n',
        "kdclimb/sub/__init__.py": "",
        "kdclimb/sub/b.py": "def g():\n    return 1  # one\n",
        "kdclimb/c.py": "x = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)

    def hash_after(name=None, text=None):
        if name:
            (tmp_path / name).write_text(text)
        provenance._read.cache_clear()
        return provenance.source_hash("workflow/scripts/s.py")

    yield hash_after
    provenance._read.cache_clear()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "kdclimb/a.py",
            '"""other words"""\ndef f():\n    "why"\n    # reason\n    from kdclimb.sub.b import g\n\n    return g()\n',
        ),
        ("kdclimb/c.py", "x = 2\n"),
    ],
)
def test_comments_docstrings_layout_and_strangers_do_not_count(tree, name, text):
    assert tree() == tree(name, text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("workflow/scripts/s.py", "from kdclimb import a\na.f(), 1\n"),
        ("kdclimb/__init__.py", "y = 1\n"),
        ("kdclimb/sub/__init__.py", "y = 1\n"),
        ("kdclimb/sub/b.py", "def g():\n    return 2\n"),
    ],
)
def test_code_counts_however_deep(tree, name, text):
    assert tree() != tree(name, text)


SEEN_OTHERWISE = """from dataclasses import dataclass


@dataclass
class Size:
    name: str = ""


def told(sizes, digits=None):
    return [f"{size.name or 'none'}: {len(sizes):>{digits}}{{}}" for size in sizes] or f'it\\'s {digits!r}'
"""


def test_the_hash_is_the_same_from_each_python(tree):
    """Python 3.11, 3.12 and 3.13 read the f-strings and the function here as three different trees."""
    assert tree("kdclimb/a.py", SEEN_OTHERWISE) == "fab8396a1b20"


@pytest.mark.parametrize(("before", "after"), [('x = [""]', "x = []"), ("f(None)", "f()"), ("x = 1", "x = 1.0")])
def test_small_changes_count(tree, before, after):
    assert tree("kdclimb/a.py", before) != tree("kdclimb/a.py", after)


def test_the_trainers_closure_is_what_it_runs_and_analysis_is_not_in_it():
    entry = provenance.ROOT / "workflow/scripts/train.py"
    closure, todo = set(), [entry]
    while todo:
        path = todo.pop()
        if path not in closure:
            closure.add(path)
            todo += provenance._read(path)[1]
    names = {str(p.relative_to(provenance.ROOT)) for p in closure}
    assert {
        "kdclimb/kernels/chunked.py",
        "kdclimb/train.py",
        "kdclimb/run.py",
        "kdclimb/optim.py",
        "kdclimb/data.py",
    } <= names
    others = ("analysis", "campaign", "mirror", "bundle")
    assert not any(other in name for name in names for other in others)


def test_retry_forgets_by_status_or_id_and_says_when_there_is_none(tmp_path, capsys):
    for name, status in (("a", "oom"), ("b", "ok"), ("c", "oom")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "status.json").write_text(json.dumps({"status": status}))
    (tmp_path / "c1").mkdir()
    for name, text in (("with.csv", "run_id\na\n"), ("without.csv", "run_id\nb\n")):
        (tmp_path / "c1" / name).write_text(text)
    arguments = ["retry", "--results", str(tmp_path)]
    assert main([*arguments, "--status", "oom"]) == 0
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["b"]
    assert [p.name for p in (tmp_path / "c1").iterdir()] == ["without.csv"]  # Snakemake must miss the tables too
    assert main([*arguments, "--status", "oom"]) == 1 and "no run with status oom" in capsys.readouterr().err
    assert main([*arguments, "--run", "b"]) == 0 and not list((tmp_path / "runs").iterdir())


def test_retry_by_id_forgets_a_run_whose_folder_is_gone(tmp_path, capsys):
    """Its tables and its job's would else say for ever that it is made."""
    for place in ("c1/batches/ce-1of1.csv", "c1/ce/timing.csv", "c1/tables/other.csv", "c1/report/index.html"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("run_id\n" + ("b" if "other" in place else "gone") + "\n")
    for part in ("on", "gon", "g"):  # of an id: nothing of that name is lost
        assert main(["retry", "--results", str(tmp_path), "--run", part]) == 1 and len(list(tmp_path.rglob("*.*"))) == 4
    assert main(["retry", "--results", str(tmp_path), "--run", "gone"]) == 0
    assert [p.name for p in tmp_path.rglob("*.*")] == ["other.csv"]
    assert main(["retry", "--results", str(tmp_path), "--run", "gone"]) == 1
    assert "no run with id gone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "names_it"),
    [("kd-t1-b1.5-ab12", False), ("kd-t1-b1-ab12", False), ("x-kd-t1-b1", False), ("kd-t1-b1.", True)],
)
def test_retry_by_id_wants_the_whole_id(tmp_path, text, names_it):
    (tmp_path / "c1").mkdir()
    (tmp_path / "c1/a.csv").write_text(f"reason\nresults/runs/{text}\n")
    assert main(["retry", "--results", str(tmp_path), "--run", "kd-t1-b1"]) == (0 if names_it else 1)
    assert (tmp_path / "c1/a.csv").exists() is not names_it


def test_gpus_of_one_node_are_told_apart(monkeypatch):
    """Jobs beside each other on a node's GPUs share no device, though the GPUs have one name."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"GPU-{number}"))
    found = set()
    for number in range(2):
        monkeypatch.setattr(torch.cuda, "current_device", lambda number=number: number)
        found.add(provenance.device_identity("cuda"))
    assert found == {"NVIDIA H100 GPU-0", "NVIDIA H100 GPU-1"}
    assert provenance.device_identity("cpu") == provenance.device_kind("cpu")
