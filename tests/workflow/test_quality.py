"""Form: lint of the workflow, format of rules and Python, pages whose paths exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from checkouts import ROOT

BIN = Path(sys.executable).parent
PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))


def check(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_snakemake_lint():
    assert "good condition" in check(BIN / "snakemake", "--lint")


def test_snakefmt():
    check(BIN / "snakefmt", "--check", "Snakefile", "rules")


def test_ruff_check():
    check(BIN / "ruff", "check", ".")


def test_ruff_format():
    check(BIN / "ruff", "format", "--check", ".")


def test_the_slurm_profile_gives_each_of_its_rules_memory_and_cores():
    """Without, a job has Snakemake's 1 GB, and all of --cores."""
    text = "\n".join(file.read_text() for file in [ROOT / "Snakefile", *(ROOT / "rules").glob("*.smk")])
    local = {
        name
        for block in re.findall(r"^localrules:\n((?: {4}\w+,\n)+)", text, re.MULTILINE)
        for name in re.findall(r"\w+", block)
    }
    submitted = set(re.findall(r"^(?:rule|checkpoint) (\w+):$", text, re.MULTILINE)) - local
    profile = yaml.safe_load((ROOT / "slurm/config.yaml").read_text())
    assert {"train", "data"} < submitted and "compare" in local
    assert {name for name, given in profile["set-resources"].items() if "mem_mb" in given} == submitted
    assert profile["set-threads"].keys() == submitted


def test_snakefile_is_short():
    assert len((ROOT / "Snakefile").read_text().splitlines()) < 60


@pytest.mark.parametrize(
    "page",
    ["README.md", *(f"docs/{name}.md" for name in PAGES), "data/README.md", "results/README.md", "CONTRIBUTING.md"],
)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    assert [link for link in links if "://" not in link and not ((ROOT / page).parent / link).exists()] == []


def test_the_readme_names_every_module_and_rule_file():
    tree = (ROOT / "README.md").read_text().split("## What is where")[1]
    modules = [*(ROOT / "kdclimb").rglob("*.py"), *(ROOT / "rules").glob("*.smk"), *(ROOT / "config").glob("*.yaml")]
    named = {file.name for file in modules if file.name != "__init__.py"}
    assert [name for name in sorted(named) if name not in tree] == []
