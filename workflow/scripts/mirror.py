"""Copy a finished run, or a campaign with its runs, to a second root. Exit code 1: it can't be written."""

import argparse
import csv
import sys
from pathlib import Path

from kdclimb.artifacts import write_json
from kdclimb.mirror import mirror, not_mirrored

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--root", type=Path, required=True, help="what paths.mirror names; copies go to results/ there")
what = parser.add_mutually_exclusive_group(required=True)
what.add_argument("--run", type=Path, help="results/runs/<run_id>")
what.add_argument("--ledger", type=Path, help="results/<campaign>/tables/ledger.csv, which names the runs")
parser.add_argument("--out", type=Path, help="JSON of what was done")

if __name__ == "__main__":
    args = parser.parse_args()
    run_ids, campaign = [args.run.name] if args.run else [], None
    if args.ledger:
        campaign = args.ledger.parent.parent
        with args.ledger.open(newline="") as file:
            run_ids = [row["run_id"] for row in csv.DictReader(file)]
    try:
        copied = mirror((campaign or args.run.parent).parent, campaign, run_ids, args.root)
    except OSError as error:
        sys.exit(not_mirrored(error, args.root))
    if args.out:
        write_json(args.out, {"root": str(args.root), "runs": len(run_ids), "files_copied": copied})
