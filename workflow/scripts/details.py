"""Write the tables that only the report reads: headline, traces, horizons, configs, warnings, advice."""

from kdclimb.analysis import details
from kdclimb.analysis.tables import run_script

INPUTS = "budget selected target compare tests verdict tuning break_even trend teachers".split()
OUTPUTS = [f"out_{name}" for name in details.OUTPUTS]

if __name__ == "__main__":
    raise SystemExit(run_script(__doc__, details.details, *INPUTS, *OUTPUTS, runs=True, confidence=float))
