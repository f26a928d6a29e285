"""The code's form: lint of the workflow, format of rules and Python."""

import os
import subprocess
import sys
from pathlib import Path

from checkouts import ROOT

BIN = Path(sys.executable).parent


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


def test_snakefile_is_short():
    assert len((ROOT / "Snakefile").read_text().splitlines()) < 60
