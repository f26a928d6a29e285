"""The report of a campaign of hundreds of runs: its size, and the memory it takes. Its time is printed."""

import json
import subprocess
import sys

import pytest
from test_analysis_synthetic import ROOT, SyntheticCampaign

MIB = 2**20
# VmHWM, since ru_maxrss would have the memory of the process that started this one.
BUILD = r"""
import json, re, sys, time
from pathlib import Path
start = time.monotonic()
from kdclimb.analysis.report import report
files, out = json.loads(sys.argv[1]), Path(sys.argv[2])
report("many", out / "figures", out / "index.html", **{name: Path(path) for name, path in files.items()})
peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
print(json.dumps([time.monotonic() - start, int(peak) / 1024]))
"""


GRID = {
    "temperature": [1 + i / 20 for i in range(20)],
    "alpha": [],
    "token_frac": [],
    "lr_boost": [1.0, 1.25, 1.5, 2.0, 3.0],
    "hold_frac": [0.1, 0.15],
    "drop_frac": [0.35, 0.5],
}


@pytest.mark.slow
def test_a_report_of_many_runs_is_small(tmp_path):
    campaign = SyntheticCampaign(tmp_path, kd={"grid": GRID}, train={"seeds": list(range(16))})
    campaign.run_all()
    runs = len(list(campaign.runs.iterdir()))
    assert runs >= 500
    files = json.dumps({name: str(path) for name, path in campaign.report_files().items()})
    command = [sys.executable, "-c", BUILD, files, str(tmp_path / "built")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, mib = json.loads(done.stdout)
    size = (tmp_path / "built/index.html").stat().st_size / MIB
    print(f"{runs} runs: {size:.2f} MiB, built in {seconds:.1f} s with {mib:.0f} MiB")
    assert size < 5 and mib < 1024
