"""What a config means and what it would run; forgetting results, so that the next ./run makes them again; moving them
between machines; and teachers and runs from elsewhere.

python -m kdclimb explain kd.stop_margin              # one key; a section lists its keys
python -m kdclimb plan --configfile config/h100.yaml  # runs, tokens and time, before anything runs
python -m kdclimb status                              # how far the campaign is, as it goes on
python -m kdclimb report                              # the report of what is there, at any moment
python -m kdclimb retry --status oom                  # every run that ended out of memory
python -m kdclimb retry --run ce-3x128-100-s0-...     # this run, however it ended
python -m kdclimb bundle export tiny.zip              # a campaign's finished runs and files
python -m kdclimb bundle import tiny.zip              # the same, on another machine
python -m kdclimb import logs/*.txt                   # run folders of training logs
python -m kdclimb reread examples/seed                # the seed's claims, judged
python -m kdclimb import-teacher state_best.pt --layers 3 --heads 6 --windows-passed 3 --cost-ms 56600  # the seed's
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import shutil
import sys
from pathlib import Path

from kdclimb import bundle, explain, logs, plan
from kdclimb.analysis.tables import remedy
from kdclimb.artifacts import read_sealed, write_text
from kdclimb.campaign import LOCKED_BUDGET_FRACTION, load, schema_path
from kdclimb.configfiles import read_config
from kdclimb.imported import PREFIX

STATUSES = ("ok", "diverged", "oom", "failed", "refused", "interrupted")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv, argparse.Namespace(argv=argv))
    try:
        print(args.call(args))
    except (ValueError, OSError) as error:  # ConfigError, AnalysisError and BundleError are ValueErrors
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
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
    _add_explain(commands, config)
    plan_ = commands.add_parser("plan", help="what a config would run, before anything runs", parents=[config, results])
    plan_.set_defaults(call=foresee)
    _add_state(commands, config, results)
    _add_retry(commands, results)
    _add_bundle(commands, config, results)
    _add_import(commands, config, results)
    about = "make run folders of training logs in the speedrun's text format, as far as they can be read"
    take = commands.add_parser("import", help=about, description=about)
    take.add_argument("logs", metavar="LOG", nargs="+", type=Path)
    take.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="(default: results)")
    take.set_defaults(call=take_logs)
    about = "judge the claims of a folder with runs.csv and claims.csv, such as examples/seed"
    again = commands.add_parser("reread", help=about, description=about)
    again.add_argument("folder", metavar="FOLDER", type=Path)
    again.add_argument("--out", type=Path, default=Path("results/seed"), metavar="DIR", help="(default: results/seed)")
    again.set_defaults(call=read_again)
    return parser


def _add_explain(commands, config) -> None:
    about = commands.add_parser("explain", help="what a key means, and its value", parents=[config])
    about.set_defaults(call=tell)
    what = about.add_mutually_exclusive_group()
    what.add_argument("key", metavar="KEY", nargs="?", default="", help="such as kd.alpha, or a section (default: all)")
    what.add_argument("--write", action="store_true", help="write config/README.md anew from config/schema.yaml")


def _add_state(commands, config, results) -> None:
    about = "how far a campaign is: on a terminal until its last run ends or Ctrl-C, else once"
    status = commands.add_parser("status", help=about, description=about, parents=[config, results])
    status.set_defaults(call=tell_status)
    status.add_argument("--once", action="store_true", help="print it once, on a terminal too")
    every = "read it again so often (default: 5)"
    status.add_argument("--every", type=_positive, default=5.0, metavar="SECONDS", help=every)
    about = "the report of an unfinished campaign, or of a record, from what is there, in its folder so_far/"
    page = commands.add_parser("report", help=about, description=about, parents=[config, results])
    page.set_defaults(call=report_so_far)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return value


def _add_retry(commands, results) -> None:
    retry = commands.add_parser(
        "retry", help="forget results, so that the next ./run makes them again", parents=[results]
    )
    retry.set_defaults(call=forget)
    which = retry.add_mutually_exclusive_group(required=True)
    which.add_argument("--status", choices=STATUSES, help="every run that ended so")
    which.add_argument("--run", metavar="RUN_ID", help="one run")


def _add_bundle(commands, config, results) -> None:
    about = "move finished runs and a campaign's files between machines"
    ways = commands.add_parser("bundle", help=about).add_subparsers(dest="way", required=True)
    out = ways.add_parser("export", help="write a campaign's bundle", parents=[config, results])
    out.add_argument("out", type=Path, metavar="OUT", help="a .zip or .tar.gz")
    out.add_argument("--weights", action="store_true", help="take the runs' weights along")
    out.set_defaults(call=export_bundle)
    into = ways.add_parser("import", help="take a bundle; refused as a whole if anything is amiss", parents=[results])
    into.add_argument("file", type=Path, metavar="FILE", help="what bundle export wrote")
    into.add_argument("--any-code", action="store_true", help="also results of other code than this checkout's")
    into.add_argument("--keep", action="store_true", help="runs and files that are here with another content stay")
    into.set_defaults(call=lambda args: bundle.import_(args.file, args.results, args.any_code, args.keep))


def _add_import(commands, config, results) -> None:
    """The flags of import-teacher: the checkpoint holds no architecture, no windows and no cost, so they are named."""
    about = "make a teacher of a checkpoint that the seed's trainer saved; --configfile names the data to measure it on"
    parser = commands.add_parser("import-teacher", help=about, description=about, parents=[config, results])
    parser.set_defaults(call=bring)
    parser.add_argument("file", metavar="FILE", type=Path, help="such as state_best.pt")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--heads", type=int, required=True)
    parser.add_argument("--head-dim", type=int, default=128, help="(default: 128)")
    parser.add_argument("--vocab-size", type=int, default=50304, help="padded (default: 50304)")
    parser.add_argument("--bigram-vocab-size", type=int, default=251520, help="BIGRAM_VOCAB_SIZE (default: 251520)")
    trained = parser.add_mutually_exclusive_group(required=True)
    passed = "how many of the long windows 384, 896, 1408, 1664 (three stages, extension) it was trained through"
    trained.add_argument("--windows-passed", type=int, choices=(1, 2, 3, 4), metavar="N", help=passed)
    trained.add_argument("--long-windows", type=int, nargs="+", metavar="TOKENS", help="these instead, in order")
    used = "windows to run it with, such as 768 2560 (default: the last that it was trained with)"
    parser.add_argument("--windows", type=int, nargs=2, metavar=("SHORT", "LONG"), help=used)
    parser.add_argument("--cost-ms", type=float, required=True, metavar="MS", help="training time it is charged with")
    parser.add_argument("--name", help="for its run id (default: from the file's name)")


def tell(args: argparse.Namespace) -> str:
    """What `explain` prints, and with --write the new config/README.md. Raises ConfigError for an unknown key."""
    if args.write:
        write_text(explain.readme_path(), explain.readme())
        return f"written: {explain.readme_path()}"
    return explain.explain(args.key, read_config(args.configfile))


def foresee(args: argparse.Namespace) -> str:
    """What `plan` prints. Raises ConfigError for a wrong config, AnalysisError for a result that can't be read."""
    root = schema_path().parent.parent
    return plan.plan(load(read_config(args.configfile), root), root, args.results)


def tell_status(args: argparse.Namespace) -> str:
    """What `status` prints. Raises ConfigError for a wrong config, AnalysisError for a run that can't be read."""
    from rich.console import Console  # here, as below: other commands need none of it

    from kdclimb import status

    root, console = schema_path().parent.parent, Console()
    reader = status.Reader(load(read_config(args.configfile), root), root, args.results)
    lasting = console.is_terminal and not args.once
    found = status.watch(reader, console, args.every) if lasting else reader.read()
    with console.capture() as captured:
        console.print(status.view(found))
    return captured.get().rstrip()


def report_so_far(args: argparse.Namespace) -> str:
    """What `report` prints. Raises ConfigError for a wrong config, AnalysisError for a file that can't be read."""
    from kdclimb import status
    from kdclimb.analysis import so_far

    root = schema_path().parent.parent
    campaign = load(read_config(args.configfile), root)
    found, folder = status.Reader(campaign, root, args.results).read(), args.results / campaign.campaign
    page = so_far.report_so_far(campaign, found.planned.named, folder, args.results / "runs", found.words)
    return f"{found.words}\nwritten: {page}"


def export_bundle(args: argparse.Namespace) -> str:
    """What `bundle export` prints. Raises ConfigError for a wrong config, BundleError if there is nothing to export."""
    root = schema_path().parent.parent
    campaign = load(read_config(args.configfile), root)
    return bundle.export(campaign, root, args.results, args.out, args.weights)


def take_logs(args: argparse.Namespace) -> str:
    """What `import` prints. What can be read is imported; raises ValueError at the end if a file is no log at all."""
    texts, unreadable, ids = [], [], []
    for path in args.logs:
        try:
            folder, log = logs.import_log(path, args.out)
        except ValueError as error:
            unreadable.append(str(error))
        else:
            texts.append(logs.describe(folder, log, LOCKED_BUDGET_FRACTION))
            ids.append(folder.name)
    if ids:
        texts.append(f"to have them in a campaign: baseline: {{imports: [{', '.join(ids)}]}}")
    if unreadable:
        print("\n".join(texts))
        raise ValueError("\n".join(unreadable))
    return "\n".join(texts)


def read_again(args: argparse.Namespace) -> str:
    """What `reread` prints. Raises AnalysisError for a malformed table."""
    from kdclimb.analysis import reread  # here, since matplotlib takes a second

    return reread.reread(args.folder, args.out, LOCKED_BUDGET_FRACTION)


def bring(args: argparse.Namespace) -> str:
    """What `import-teacher` prints. Raises ValueError that names the file, key or flag at fault."""
    from kdclimb import import_teacher as importing  # here, since torch takes seconds

    root = schema_path().parent.parent
    long_windows, windows = importing.choose_windows(args.windows_passed, args.long_windows, args.windows)
    folder = importing.import_teacher(
        args.file,
        importing.Shape(args.layers, args.heads, args.head_dim, args.vocab_size, args.bigram_vocab_size),
        load(read_config(args.configfile), root),
        root,
        args.results,
        name=args.name or importing.slug(args.file),
        cost_ms=args.cost_ms,
        long_windows=long_windows,
        windows=windows,
        command=f"PYTHONPATH=. python -m kdclimb {shlex.join(args.argv)}",
        configfiles=" ".join(map(str, args.configfile)),
        report=lambda text: print(text, file=sys.stderr),
    )
    return f"imported: {folder}\nto let it stand for teacher: teacher: {{imported: [{folder.name}]}}"


def forget(args: argparse.Namespace) -> str:
    """Delete the folders of the runs with this status or id, and say which. Raises ValueError if there is none, and no
    table names the id either.

    With them go the campaigns' tables that name such a run, and those campaigns' report pages: Snakemake makes a
    missing file again only if something that it was asked for is missing too. Imported teachers stay, since no ./run
    makes them again.
    """
    results = args.results
    if args.run and args.run.startswith(PREFIX):
        command = "import" if args.run.startswith(f"{PREFIX}log-") else "import-teacher"
        raise ValueError(f"kdclimb retry: {args.run} was imported, not trained: {command} makes it again")
    folders = [f.parent for f in sorted(results.glob("runs/*/status.json")) if _matches(f, args.status, args.run)]
    names = [folder.name for folder in folders] or [args.run] * bool(args.run)  # whose folder may be gone
    whole = re.compile("|".join(rf"(?<![\w.-]){re.escape(name)}(?![\w-]|\.\w)" for name in names) or r"(?!)")
    found = bool(folders)
    for campaign in results.iterdir() if results.is_dir() else ():
        tables = list(campaign.rglob("*.csv")) if campaign.name not in ("runs", "data", "caches") else []
        naming = [table for table in tables if whole.search(table.read_text(errors="replace"))]
        for file in (*naming, *([campaign / "report/index.html"] if naming else [])):
            file.unlink(missing_ok=True)
        found |= bool(naming)
    if not found:
        asked = f"status {args.status}" if args.status else f"id {args.run}"
        raise ValueError(f"kdclimb retry: no run with {asked} under {results}/runs")
    for folder in folders:
        shutil.rmtree(folder)
    said = [f"forgotten: {folder}" for folder in folders] or [f"forgotten: {args.run}, which has no result here"]
    return "\n".join([*said, "the next ./run makes them again"])


def _matches(file: Path, status: str | None, run_id: str | None) -> bool:
    if run_id:
        return file.parent.name == run_id
    return not file.parent.name.startswith(PREFIX) and _ended(file) == status


def _ended(file: Path) -> str:
    return read_sealed(file, remedy(file.parent), or_plain=True)["status"]


if __name__ == "__main__":
    sys.exit(main())
