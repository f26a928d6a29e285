"""The report of a campaign that is not finished: the tables that its runs allow so far, and the page made of them; or
all of a campaign's tables and its verdict, made again from its runs and decisions, as of a record's.

All goes to `so_far/` in the campaign's folder: what the workflow makes has one writer, the workflow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import asdict
from pathlib import Path

from kdclimb.analysis import compare, ledger
from kdclimb.analysis.budget import BUDGET_KEYS, read_budget
from kdclimb.analysis.cautions import job_warning
from kdclimb.analysis.details import OUTPUTS as DETAILS
from kdclimb.analysis.details import VERDICT_KEYS, details, headline_rows, tables_of
from kdclimb.analysis.report import INPUTS, report
from kdclimb.analysis.selection import SELECTED_KEYS, as_measured
from kdclimb.analysis.tables import RUN_COLUMNS, AnalysisError, RunFolder, read_csv, read_json, write_csv
from kdclimb.analysis.targets import TARGET_KEYS
from kdclimb.analysis.tested import VERDICT_COLUMNS
from kdclimb.analysis.traces import PAGE_COLUMNS
from kdclimb.artifacts import LOG, write_json
from kdclimb.expansion import Run, tables
from kdclimb.jobs import FAILURES, read_failures
from kdclimb.sections import Campaign

MADE_BY_STAGES = {  # where the workflow puts what a stage leaves
    "timing": "ce/timing.csv",
    "budget": "budget.json",
    "probe": "teacher/probe.csv",
    "projected": "teacher/projected.json",
    "trained": "teacher/trained.csv",
    "measured": "teacher/measured.json",
    "selected": "teacher/selected.json",
    "target": "target.json",
    "isolates": "kd/isolates.csv",
    "profile": "kd/profile.csv",
    "screen": "kd/screen.csv",
    "ce_screen": "ce/screen.csv",
    "promoted": "kd/promoted.json",
    "full": "kd/full.csv",
    "controls": "controls.csv",
    "verdict": "verdict.json",
    "tests": "tables/verdict.csv",
    "trend": "tables/steps_saved_trend.csv",
    "stop": "tables/stop_conditions.csv",
    "summary": "tables/teacher_budget10_summary.csv",
}
SWEPT = ("probe", "projected", "trained", "measured")  # of the teachers, before one is selected
DECIDED = (*SWEPT, "budget", "selected", "target", "screen", "ce_screen", "promoted")  # what the comparison reads
COMPARISON = "curves runs compare teachers reached tests trend break_even stop tuning summary verdict".split()
COMPARED = ("compare", "tests", "verdict")  # one without the others is none
NO_TEACHER = {"run_id": None, "candidate": None, "train_time_ms": None, "budget_ms": None, "imported": 0}
FROM_JOBS = ("reason", "slurm_job", "log_tail")
NO_TARGET = {"value": None, "consecutive": 2, "source": "", "reason": "no teacher is selected yet", "fixed": []}


def report_so_far(campaign: Campaign, named: list[Run], folder: Path, runs: Path, words: str) -> Path:
    """Write the page of what is there, and return its path: so_far/report/index.html under the campaign's `folder`.

    `named` are the runs known so far, of which those under `runs` that ended are shown; `words` say how far it is.
    Raises AnalysisError for a malformed file; one that is missing is said on the page.
    """
    out = folder / "so_far"
    found = ended(campaign, named, runs)
    jobs = read_failures(folder / FAILURES)
    files = {name: folder / MADE_BY_STAGES.get(name, f"tables/{name}.csv") for name in INPUTS}
    if not all(files[name].is_file() for name in COMPARED):  # some are of runs that are being made again
        files |= {name: out / files[name].relative_to(folder) for name in COMPARED}  # where nothing is
    decided = {name: folder / MADE_BY_STAGES[name] for name in DECIDED}
    ended_all = {run.run_id for run in named} <= {run.run_id for run in found}
    if ended_all and not jobs and all(map(Path.is_file, decided.values())):
        files |= _compare_again(campaign, found, decided, out)
    else:
        files |= _write_tables(campaign, found, files, out / "tables", _unfinished(named, jobs, runs), jobs)
        files |= _write_teachers([decided[name] for name in SWEPT], files, out / "tables")
    page = out / "report/index.html"
    report(campaign.campaign, out / "figures", page, so_far=words, **files)
    return page


def ended(
    campaign: Campaign, named: list[Run], runs: Path, read: Callable[[str], RunFolder] = RunFolder.read
) -> list[RunFolder]:
    """Those of the named runs that ended here, however, and the counted and imported ones that are there."""
    places = [(run.arm, run.label, run.run_id) for run in (*named, *tables(campaign, _data_of(named)))]
    places += [("imported", run_id, run_id) for run_id in campaign.teacher.imported]
    places += [("log", run_id, run_id) for run_id in campaign.baseline.imports]
    there = [place for place in places if (runs / place[2] / "status.json").is_file()]
    return [read(f"{arm}|{label}|{runs / run_id}") for arm, label, run_id in there]


def _data_of(named: list[Run]) -> str:
    return next((run.config.data.id for run in named), "unprepared")


def _unfinished(named: list[Run], jobs: list[dict], runs: Path) -> list[dict]:
    """Rows of RUN_COLUMNS and PAGE_COLUMNS of runs that have no result, since the job that was to train them failed."""
    rows, nothing = [], dict.fromkeys((*RUN_COLUMNS, *PAGE_COLUMNS))
    for run in named:
        folder = runs / run.run_id
        job = next((job for job in jobs if run.run_id in job["run_ids"].split()), None)
        if job is None or (folder / "status.json").is_file():
            continue
        row = {
            "arm": run.arm,
            "label": run.label,
            "run_id": run.run_id,
            "seed": run.config.seed,
            "status": "unfinished",
        }
        row |= {"horizon": run.config.schedule.horizon, "clock": run.config.clock, "artifact_dir": folder}
        row |= {"files": LOG if (folder / LOG).is_file() else ""} | {key: job[key] for key in FROM_JOBS}
        rows.append(nothing | row)
    return rows


def _compare_again(campaign: Campaign, runs: list[RunFolder], decided: dict[str, Path], out: Path) -> dict[str, Path]:
    """All tables and the verdict of a campaign whose runs have all ended; {name: path}."""
    made = {name: out / MADE_BY_STAGES.get(name, f"tables/{name}.csv") for name in (*COMPARISON, *DETAILS)}
    verdict = campaign.verdict
    compare.compare(
        runs,
        **decided,
        rules=asdict(verdict) | {"max_drift": campaign.anchor.max_drift},
        clock=campaign.budget.clock,
        exploratory=campaign.exploratory,
        **{f"out_{name}": made[name] for name in COMPARISON},
    )
    read = "budget selected target compare tests verdict tuning break_even trend teachers".split()
    details(
        runs,
        **{name: path for name, path in (decided | made).items() if name in read},
        confidence=verdict.confidence,
        **{f"out_{name}": made[name] for name in DETAILS},
    )
    return made | {"ledger": _write_ledger(campaign, runs, decided["target"], out / "tables", [])}


def _write_tables(
    campaign: Campaign, runs: list[RunFolder], files: dict, out: Path, unfinished: list[dict], jobs: list[dict]
) -> dict[str, Path]:
    """The tables that need no comparison, of these runs and of what failed jobs left unfinished; {name: path}."""
    teacher = as_measured(_decision(files["selected"], NO_TEACHER))
    shown = [run for run in runs if _teacher_known(run, teacher)]
    rows = tables_of(shown, teacher, None, campaign.verdict.confidence)
    rows["curves"] = [row for run in shown for row in compare.curve_rows(run, teacher)]
    rows["runs"] = [run.row() for run in runs] + unfinished
    rows["run_pages"] += unfinished
    rows["warnings"] += [job_warning(job) for job in jobs]
    rows["headline"] = _headline(files)
    columns = {"curves": compare.CURVE_COLUMNS, "runs": RUN_COLUMNS} | {
        name: DETAILS[name] for name in DETAILS if name != "advice"
    }
    paths = {name: out / f"{name}.csv" for name in columns}
    for name, path in paths.items():
        write_csv(path, columns[name], rows[name])
    return paths | {"ledger": _write_ledger(campaign, runs, files["target"], out, unfinished)}


def _write_teachers(swept: list[Path], files: dict[str, Path], out: Path) -> dict[str, Path]:
    """The table of all candidates, once one is selected; {name: path}."""
    needed = [*swept, files["budget"], files["selected"]]
    if not all(path.is_file() for path in needed):
        return {}
    selected = read_json(files["selected"], SELECTED_KEYS)
    rows = compare.read_teachers(*swept, read_budget(files["budget"]), selected)
    write_csv(out / "teachers.csv", compare.TEACHER_COLUMNS, rows)
    return {"teachers": out / "teachers.csv"}


def _headline(files: dict[str, Path]) -> list[dict]:
    """The headline of what is decided; with the savings once all of the comparison is there."""
    keys = {"budget": BUDGET_KEYS, "selected": SELECTED_KEYS, "target": TARGET_KEYS, "verdict": VERDICT_KEYS}
    decisions = {name: _decision(files[name], None, needed) for name, needed in keys.items()}
    if decisions["verdict"] is None:
        return headline_rows(decisions, [], [])
    compared = [files["compare"], files["tests"]]
    columns = compare.COMPARE_COLUMNS, VERDICT_COLUMNS
    return headline_rows(decisions, *(read_csv(path, names) for path, names in zip(compared, columns, strict=True)))


def _write_ledger(campaign: Campaign, runs: list[RunFolder], target: Path, out: Path, unfinished: list[dict]) -> Path:
    if not target.is_file():
        target = out / "no_target.json"
        write_json(target, NO_TARGET)
    path = out / "ledger.csv"
    ledger.ledger(runs, target, campaign.exploratory, path, unfinished)
    return path


def _decision(path: Path, otherwise: dict | None, keys: Iterable[str] = ()) -> dict | None:
    """What is in the file, which must have `keys` (another version's may not); `otherwise` where there is none."""
    return read_json(path, keys) if path.is_file() else copy(otherwise)


def _teacher_known(run: RunFolder, teacher: dict) -> bool:
    """Whether what the run's teacher took is known: not of a KD run from before another one was selected."""
    try:
        compare.teacher_cost_ms(run, teacher)
    except AnalysisError:
        return False
    return True
