"""Train several runs, one after the other, each in its own process. Exit code 0: all have results; 75: interrupted."""

import argparse
import json
import multiprocessing
import signal
import sys
import traceback
from pathlib import Path

import train

from kdclimb.artifacts import rehearse_plots
from kdclimb.config import RunConfig
from kdclimb.jobs import write_batch
from kdclimb.provenance import source_hash
from kdclimb.run import ENTRY
from kdclimb.stop import EXIT_INTERRUPTED, SIGNALS, StopRequests

PASSED_ON = ("manifest", "threads", "code", "attempt", "attempts", "mirror")
FORK = multiprocessing.get_context("fork")  # of a process that has imported all that a run needs, and computed nothing

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--configs", nargs="+", required=True, help="the runs' configs, as JSON")
for flag in PASSED_ON:
    parser.add_argument(f"--{flag}", help="as for train.py")
parser.add_argument("--no-weights", nargs="+", default=[], metavar="RUN", help="ids of those runs that keep none")
parser.add_argument("--out", type=Path, required=True, help="CSV of the runs and how they ended")
parser.add_argument("--log", type=Path, required=True, help="which runs were begun, and errors")


def flags(config: RunConfig, text: str, args: argparse.Namespace) -> list[str]:
    """Those of train.py for one run: what it reads lies where the workflow has it."""
    runs = Path("results/runs")
    given = {"config": text, "out": runs / config.run_id} | {name: getattr(args, name) for name in PASSED_ON}
    teacher = config.grown_from if config.kd is None else config.kd.teacher
    if teacher is not None:
        given["teacher"] = runs / teacher / "checkpoints"
    if config.kd is not None and config.kd.cache is not None:
        given["cache"] = f"results/caches/{config.kd.cache}"
    if config.lr_policy is not None:
        given["policy"] = runs / config.lr_policy.run / "summary.csv"
    words = [str(word) for name, value in given.items() if value is not None for word in (f"--{name}", value)]
    words += ["--no-weights"] * (config.run_id in args.no_weights)
    return [*words, "--any-weights"]  # what others start or learn from, a teacher, has a job of its own


def child(arguments: list[str], name: str, log: Path) -> None:
    """One run, in a process of its own; what went wrong is told at the terminal and kept in the log."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # until the run minds them itself
    try:
        ended = train.main(arguments)
    except Exception:
        ended = traceback.format_exc()
    if isinstance(ended, str):
        note(log, f"{name}: {ended}")
    sys.exit(ended)


def note(log: Path, line: str) -> None:
    with log.open("a") as file:
        print(line, file=file)


def interrupted(log: Path) -> int:
    note(log, "interrupted; start it again to go on")
    return EXIT_INTERRUPTED


def main() -> int:
    args = parser.parse_args()
    stop = StopRequests()
    source_hash(ENTRY)  # of what is imported here, should it be edited before the last run
    rehearse_plots()
    folders, failed = [], 0
    for text in args.configs:
        if stop.asked():
            return interrupted(args.log)
        config = RunConfig.from_dict(json.loads(text))
        folders.append(Path("results/runs", config.run_id))
        if (folders[-1] / "status.json").is_file() and not (folders[-1] / ".state").is_dir():
            continue  # a bundle brought it, for a version that left no state of its own to bring it back from
        # Also since Snakemake shows no log behind an empty one, such as Slurm's of a job that was killed.
        note(args.log, f"{config.run_id}: begun; its log is {folders[-1] / 'train.log'}")
        process = FORK.Process(target=child, args=(flags(config, text, args), config.run_id, args.log))
        process.start()
        process.join()
        if process.exitcode == EXIT_INTERRUPTED or (process.exitcode and stop.asked()):
            return interrupted(args.log)
        if process.exitcode:
            failed = 1
            note(args.log, f"{config.run_id}: ended with exit code {process.exitcode}")
    if not failed:
        write_batch(args.out, folders)
    return failed


if __name__ == "__main__":
    sys.exit(main())
