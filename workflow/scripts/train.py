"""Train one run into its folder. Exit code 0: a result is there; 75: interrupted, start it again."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from kdclimb import gpus
from kdclimb.config import RunConfig
from kdclimb.run import run

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--config", required=True, help="the run's config: a JSON file, or the JSON itself")
parser.add_argument("--out", type=Path, required=True, help="results/runs/<run_id>")
parser.add_argument("--manifest", type=Path, required=True, help="manifest.json of the prepared data")
parser.add_argument("--teacher", type=Path, help="checkpoints/ folder of the teacher's run")
parser.add_argument("--cache", type=Path, help="folder of the cache of the teacher's targets, with kd.cache")
parser.add_argument("--policy", type=Path, help="summary.csv of the run that lr_policy names")
parser.add_argument("--threads", type=int, required=True)
parser.add_argument("--code", choices=("track", "frozen"), default="track", help="frozen: keep a run of any code")
parser.add_argument("--attempt", type=int, default=1, help="which attempt this is, of --attempts")
parser.add_argument("--attempts", type=int, default=1, help="an unexpected failure is a result only on the last one")
parser.add_argument("--no-weights", action="store_true", help="keep none: nothing starts or learns from this run")
parser.add_argument("--any-weights", action="store_true", help="a finished run that kept none is not trained again")
parser.add_argument("--mirror", metavar="ROOT", help="a second root, where a finished run is copied to")


def main(arguments: list[str] | None = None) -> int | str:
    """Train as these flags say, by default the command's; the exit code, or what is wrong with what was given."""
    args = parser.parse_args(arguments)
    text = args.config if args.config.startswith("{") else Path(args.config).read_text()
    try:
        config = RunConfig.from_dict(json.loads(text))
        gpus.take_one(config.device)
        code = run(
            config,
            args.out,
            args.manifest,
            args.teacher,
            threads=args.threads,
            any_code=args.code == "frozen",
            last_attempt=args.attempt >= args.attempts,
            cache=args.cache,
            policy=args.policy,
            give_up=args.attempt > args.attempts,
            weights=not args.no_weights,
            any_weights=args.any_weights,
        )
    except (ValueError, OSError) as error:
        return f"train: {error}"
    if code == 0 and args.mirror:  # a program of its own: an import would make mirroring a part of the trainer's hash
        copy = [sys.executable, "workflow/scripts/mirror.py", "--root", args.mirror, "--run", args.out]
        subprocess.run(copy)  # says what fails; the run has its result all the same
    return code


if __name__ == "__main__":
    sys.exit(main())
