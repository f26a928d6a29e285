"""What a config means and what it would run; and forgetting results, so that the next ./run makes them again.

python -m kdclimb explain kd.stop_margin              # one key; a section lists its keys
python -m kdclimb plan --configfile config/h100.yaml  # runs, tokens and time, before anything runs
python -m kdclimb retry --status oom                  # every run that ended out of memory
python -m kdclimb retry --run ce-3x128-100-s0-...     # this run, however it ended
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from kdclimb import explain, plan
from kdclimb.analysis.tables import AnalysisError
from kdclimb.artifacts import write_text
from kdclimb.campaign import load, schema_path
from kdclimb.config import ConfigError

STATUSES = ("ok", "diverged", "oom", "failed", "interrupted")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kdclimb", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument(
        "--configfile", type=Path, nargs="+", default=[], metavar="FILE", help="overlays, as for ./run --configfile"
    )
    results = argparse.ArgumentParser(add_help=False)
    results.add_argument("--results", type=Path, default=Path("results"), help="the results folder (default: results)")
    about = commands.add_parser("explain", help="what a key means, and its value", parents=[config])
    what = about.add_mutually_exclusive_group()
    what.add_argument("key", metavar="KEY", nargs="?", default="", help="such as kd.alpha, or a section (default: all)")
    what.add_argument("--write", action="store_true", help="write config/README.md anew from config/schema.yaml")
    commands.add_parser("plan", help="what a config would run, before anything runs", parents=[config, results])
    retry = commands.add_parser(
        "retry", help="forget results, so that the next ./run makes them again", parents=[results]
    )
    which = retry.add_mutually_exclusive_group(required=True)
    which.add_argument("--status", choices=STATUSES, help="every run that ended so")
    which.add_argument("--run", metavar="RUN_ID", help="one run")
    args = parser.parse_args(argv)
    if args.command == "retry":
        return forget(args.results, args.status, args.run)
    try:
        print(tell(args) if args.command == "explain" else foresee(args.configfile, args.results))
    except (ConfigError, AnalysisError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def tell(args: argparse.Namespace) -> str:
    """What `explain` prints, and with --write the new config/README.md. Raises ConfigError for an unknown key."""
    if args.write:
        write_text(explain.readme_path(), explain.readme())
        return f"written: {explain.readme_path()}"
    return explain.explain(args.key, explain.read_config(args.configfile))


def foresee(files: list[Path], results: Path) -> str:
    """What `plan` prints. Raises ConfigError for a wrong config, AnalysisError for a result that can't be read."""
    root = schema_path().parent.parent
    return plan.plan(load(explain.read_config(files), root), root, results)


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
