"""Keep the trained teachers that pass the checklist: time, status, early improvement, artifacts."""

from kdclimb.analysis import selection
from kdclimb.analysis.tables import run_script

if __name__ == "__main__":
    raise SystemExit(run_script(__doc__, selection.filter_measured, "trained", "budget", "out"))
