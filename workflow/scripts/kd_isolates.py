"""Collect the timing isolates: a step of CE, of CE with teacher inference, of KD."""

from kdclimb.analysis import budget
from kdclimb.analysis.tables import run_script

if __name__ == "__main__":
    raise SystemExit(run_script(__doc__, budget.kd_isolates, "out", runs=True))
