"""Profile the timing isolates: where the time of their steps goes."""

import argparse
import json
import sys
from pathlib import Path

from kdclimb import gpus
from kdclimb.config import RunConfig
from kdclimb.profile import write

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--run", action="append", required=True, metavar="LABEL|CONFIG", help="a run's config as JSON")
parser.add_argument("--manifest", type=Path, required=True, help="manifest.json of the prepared data")
parser.add_argument("--results", type=Path, required=True, help="folder of runs/ and caches/")
parser.add_argument("--threads", type=int, required=True)
parser.add_argument("--out", type=Path, required=True)


def with_folders(run: str, results: Path) -> tuple[str, RunConfig, Path | None, Path | None]:
    label, text = run.split("|", 1)
    config = RunConfig.from_dict(json.loads(text))
    teacher = config.kd and results / "runs" / config.kd.teacher / "checkpoints"
    cache = results / "caches" / config.kd.cache if config.kd and config.kd.cache else None
    return label, config, teacher, cache


if __name__ == "__main__":
    args = parser.parse_args()
    try:
        runs = [with_folders(run, args.results) for run in args.run]
        gpus.take_one(runs[0][1].device)
        write(runs, args.manifest, args.out, args.threads)
    except ValueError as error:
        sys.exit(f"kd_profile: {error}")
