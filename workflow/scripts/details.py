"""Write the tables that only the report reads: headline, traces, horizons, configs, warnings."""

from kdclimb.analysis import details
from kdclimb.analysis.tables import run_script

INPUTS = "budget selected compare tests verdict".split()
OUTPUTS = [f"out_{name}" for name in details.OUTPUTS]

if __name__ == "__main__":
    raise SystemExit(run_script(__doc__, details.details, *INPUTS, *OUTPUTS, runs=True, confidence=float))
