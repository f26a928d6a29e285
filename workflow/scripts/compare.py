"""Compare KD with CE: tidy tables of the whole campaign, and the verdict."""

from kdclimb.analysis import compare
from kdclimb.analysis.tables import run_script

INPUTS = "budget probe projected trained measured selected target promoted".split()
OUTPUTS = "out_curves out_runs out_compare out_teachers out_verdict".split()

if __name__ == "__main__":
    raise SystemExit(run_script(__doc__, compare.compare, *INPUTS, *OUTPUTS, runs=True, clock=str, exploratory=bool))
