"""Set the teacher's budget from the CE training time at the longest horizon, or as projected to a longer one."""

from kdclimb.analysis import budget
from kdclimb.analysis.tables import run_script

if __name__ == "__main__":
    raise SystemExit(run_script(__doc__, budget.set_budget, "timing", "out", runs=True, fraction=float, horizon=int))
