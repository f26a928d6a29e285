"""Collect the KD runs at the last horizon."""

from kdclimb.analysis import targets
from kdclimb.analysis.tables import run_script

if __name__ == "__main__":
    raise SystemExit(run_script(__doc__, targets.collect, "target", "out", runs=True))
