"""Collect the CE runs into one table; fail with a remedy where one of them is not fit to set a budget."""

from kdclimb.analysis import budget
from kdclimb.analysis.tables import run_script

if __name__ == "__main__":
    raise SystemExit(run_script(__doc__, budget.ce_baseline, "out", runs=True, log=str))
