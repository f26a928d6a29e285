"""Select the survivor of lowest final validation loss, or say why there is none."""

from kdclimb.analysis import selection
from kdclimb.analysis.tables import run_script

if __name__ == "__main__":
    raise SystemExit(run_script(__doc__, selection.teacher_select, "trained", "projected", "measured", "budget", "out"))
