"""Collect the control runs: what could explain a gain without the teacher's knowledge."""

from kdclimb.analysis import targets
from kdclimb.analysis.tables import run_script

if __name__ == "__main__":
    raise SystemExit(run_script(__doc__, targets.collect, "target", "out", runs=True))
