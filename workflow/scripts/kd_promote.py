"""Promote the best screened KD points to the last horizon."""

from kdclimb.analysis import selection
from kdclimb.analysis.tables import run_script

if __name__ == "__main__":
    raise SystemExit(run_script(__doc__, selection.kd_promote, "screen", "ce_screen", "out", promote=int))
