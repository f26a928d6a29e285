"""Keep the teacher candidates whose projected time is within the budget."""

from kdclimb.analysis import selection
from kdclimb.analysis.tables import run_script

if __name__ == "__main__":
    raise SystemExit(run_script(__doc__, selection.filter_projected, "probe", "budget", "out"))
