"""Forget results, so that the next ./run makes them again.

python -m kdclimb retry --status oom                # every run that ended out of memory
python -m kdclimb retry --run ce-3x128-100-s0-...   # this run, however it ended
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

STATUSES = ("ok", "diverged", "oom", "failed", "interrupted")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kdclimb", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    retry = commands.add_parser("retry", help="forget results, so that the next ./run makes them again")
    which = retry.add_mutually_exclusive_group(required=True)
    which.add_argument("--status", choices=STATUSES, help="every run that ended so")
    which.add_argument("--run", metavar="RUN_ID", help="one run")
    retry.add_argument("--results", type=Path, default=Path("results"), help="the results folder (default: results)")
    args = parser.parse_args(argv)
    return forget(args.results, args.status, args.run)


def forget(results: Path, status: str | None, run_id: str | None) -> int:
    """Delete the folders of the runs with this status or id; 1, with a word on stderr, if there is none.

    With them go the campaigns' tables that name such a run, and those campaigns' report pages: Snakemake makes a
    missing file again only if something that it was asked for is missing too.
    """
    folders = [file.parent for file in sorted(results.glob("runs/*/status.json")) if _matches(file, status, run_id)]
    if not folders:
        asked = f"status {status}" if status else f"id {run_id}"
        print(f"kdclimb retry: no run with {asked} under {results}/runs", file=sys.stderr)
        return 1
    names = [folder.name for folder in folders]
    for campaign in results.iterdir():
        tables = list(campaign.rglob("*.csv")) if campaign.name not in ("runs", "data") else []
        naming = [table for table in tables if any(name in table.read_text() for name in names)]
        for file in (*naming, *([campaign / "report/index.html"] if naming else [])):
            file.unlink(missing_ok=True)
    for folder in folders:
        shutil.rmtree(folder)
        print(f"forgotten: {folder}")
    print("the next ./run makes them again")
    return 0


def _matches(file: Path, status: str | None, run_id: str | None) -> bool:
    return file.parent.name == run_id if run_id else json.loads(file.read_text())["status"] == status


if __name__ == "__main__":
    sys.exit(main())
