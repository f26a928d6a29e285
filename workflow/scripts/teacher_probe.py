"""Project each teacher candidate's training time from its probe."""

from kdclimb.analysis import selection
from kdclimb.analysis.tables import run_script

if __name__ == "__main__":
    raise SystemExit(run_script(__doc__, selection.teacher_probe, "out", runs=True))
