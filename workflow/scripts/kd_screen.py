"""Rank the screened KD points."""

from kdclimb.analysis import targets
from kdclimb.analysis.tables import run_script

if __name__ == "__main__":
    raise SystemExit(run_script(__doc__, targets.kd_screen, "target", "out", runs=True))
