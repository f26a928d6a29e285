"""Set the targets: the selected teacher's final validation loss, and those that the config fixes."""

import json

from kdclimb.analysis import targets
from kdclimb.analysis.tables import run_script

if __name__ == "__main__":
    raise SystemExit(run_script(__doc__, targets.set_target, "selected", "out", fixed=json.loads))
