"""Collect the control runs: the LR boost without KD, and KD from a random teacher."""

from kdclimb.analysis import targets
from kdclimb.analysis.tables import run_script

if __name__ == "__main__":
    raise SystemExit(run_script(__doc__, targets.collect, "target", "out", runs=True))
