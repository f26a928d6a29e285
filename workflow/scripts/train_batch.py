"""Train several runs, one after the other, each in its own process. Exit code 0: all have results; 75: interrupted."""

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

from kdclimb.config import RunConfig
from kdclimb.jobs import write_batch
from kdclimb.stop import EXIT_INTERRUPTED

PASSED_ON = ("teacher", "threads", "code", "attempt", "attempts", "mirror")

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--configs", nargs="+", required=True, help="the runs' configs, as JSON")
parser.add_argument("--manifest", required=True, help="these flags as for train.py")
for flag in PASSED_ON:
    parser.add_argument(f"--{flag}")
parser.add_argument("--out", type=Path, required=True, help="CSV of the runs and how they ended")
parser.add_argument("--log", type=Path, required=True)


def train(config: str, args: argparse.Namespace, log) -> tuple[Path, int]:
    """The run's folder and train.py's exit code. A run that a bundle brought has a result, but no state of its own."""
    run = RunConfig.from_dict(json.loads(config))
    folder = Path("results/runs", run.run_id)
    if (folder / "status.json").is_file() and not (folder / ".state").is_dir():
        return folder, 0
    command = [sys.executable, "workflow/scripts/train.py", "--config", config, "--out", folder]
    command += ["--manifest", args.manifest]
    if run.kd is not None and run.kd.cache is not None:
        command += ["--cache", f"results/caches/{run.kd.cache}"]
    for flag in PASSED_ON:
        if (value := getattr(args, flag)) is not None:
            command += [f"--{flag}", value]
    return folder, subprocess.run(command, stderr=log).returncode


def main() -> int:
    args = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)  # the run that goes on gets it too, keeps its state, and ends
    folders, failed = [], 0
    with args.log.open("a") as log:
        for config in args.configs:
            folder, code = train(config, args, log)
            if code == EXIT_INTERRUPTED:
                return code
            failed = failed or code
            folders.append(folder)
    if not failed:
        write_batch(args.out, folders)
    return failed


if __name__ == "__main__":
    sys.exit(main())
