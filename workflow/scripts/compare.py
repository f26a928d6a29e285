"""Compare KD with CE: tidy tables of the whole campaign, and the verdict."""

import json

from kdclimb.analysis import compare
from kdclimb.analysis.tables import run_script

INPUTS = "budget probe projected trained measured selected target screen ce_screen promoted".split()
OUTPUTS = [
    f"out_{name}"
    for name in "curves runs compare teachers reached tests trend break_even stop tuning summary verdict".split()
]
OPTIONS = {"rules": json.loads, "clock": str, "exploratory": bool}

if __name__ == "__main__":
    raise SystemExit(run_script(__doc__, compare.compare, *INPUTS, *OUTPUTS, runs=True, **OPTIONS))
