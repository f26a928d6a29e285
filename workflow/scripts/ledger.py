"""Write the ledger: every run of the campaign on one line."""

from kdclimb.analysis import ledger
from kdclimb.analysis.tables import run_script

if __name__ == "__main__":
    raise SystemExit(run_script(__doc__, ledger.ledger, "target", "out", runs=True, exploratory=bool))
