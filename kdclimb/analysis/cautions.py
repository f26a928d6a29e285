"""What a reader of the report must be warned of, each warning with its place on the page and the runs it is about."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from kdclimb.analysis.paired import MIN_PAIRS
from kdclimb.analysis.tables import RunFolder, read_json
from kdclimb.config import RunConfig

WARNING_COLUMNS = ("place", "kind", "warning", "run_ids")
ON_EDGE = r"(\w+)'s choice is on the edge of its grid: (.+?)\.(?= [A-Z]|$)"  # as analysis.tuning says it
CONTROLS = {
    "control_boost": "CE with KD's LR",
    "control_tuned": "CE tuned like KD",
    "control_random": "KD from a random teacher",
    "control_smooth": "CE with label smoothing",
    "control_batch": "CE in smaller batches",
    "control_extra": "CE with the teacher's time in steps",
}
JUDGED = ("ce", "kd", *CONTROLS)


def warning_rows(runs: Sequence[RunFolder], verdict: dict | None) -> list[dict]:
    """Rows of WARNING_COLUMNS, from the campaign's distinct runs and, once it is there, verdict.json."""
    rows = [*_of_runs(runs), *_of_text(runs), *_of_teachers(runs), *_of_caches(runs), *_of_machines(runs)]
    return rows if verdict is None else rows + _of_verdict(runs, verdict)


def job_warning(job: dict) -> dict:
    """Of a job that left no result: a row of the table of failed jobs."""
    tail = f"; its log ends: {' / '.join(job['log_tail'].splitlines())}" if job["log_tail"] else ""
    words = f"the job {job['rule']} left no {job['made']}: {job['reason']}{tail}"
    return {"place": "runs", "kind": "job", "warning": words, "run_ids": job["run_ids"]}


def _row(place: str, kind: str, warning: str, runs: Iterable[RunFolder] = ()) -> dict:
    return {"place": place, "kind": kind, "warning": warning, "run_ids": " ".join(run.run_id for run in runs)}


def _count(runs: list, what: str = "run") -> str:
    return f"{len(runs)} {what}{'s' * (len(runs) != 1)}"


def _of_runs(runs: Sequence[RunFolder]) -> list[dict]:
    rows = []
    if found := [run for run in runs if run.status == "provisional"]:
        rows.append(_row("ledger", "provisional", f"{_count(found)} provisional: the log is not whole", found))
    if found := [run for run in runs if run.arm == "imported"]:
        rows.append(_row("teachers", "imported", "an imported teacher's time is declared, not measured", found))
    if found := [run for run in runs if run.config.clock == "measured" and run.summary["broken"]]:
        words = f"{_count(found)} broken off and resumed: their times are of several processes"
        rows.append(_row("curves", "resumed", words, found))
    for arm in JUDGED:
        if found := [run for run in runs if run.arm == arm and not run.ok and not run.imported]:
            reasons = "; ".join(sorted({run.status for run in found}))
            place = "controls" if arm in CONTROLS else "compare"
            rows.append(_row(place, "failed", f"{_count(found)} of {CONTROLS.get(arm, arm.upper())}: {reasons}", found))
    if found := [run for run in runs if run.arm == "screen" and not run.ok]:
        rows.append(_row("screen", "failed", f"{_count(found, 'point')} did not end well", found))
    return rows


def _of_text(runs: Sequence[RunFolder]) -> list[dict]:
    """Of text that ran out, by the tokens' manifest, where that is there: sooner yet, where documents are cut."""
    passes: dict[str, tuple[float, list[RunFolder]]] = {}
    for run in (run for run in runs if run.ok and not run.imported):
        manifest = run.folder.parent.parent / "data" / run.config.data.id / "manifest.json"
        if not manifest.is_file():
            continue
        share = run.summary["tokens"] / sum(shard["tokens"] for shard in read_json(manifest, ["train"])["train"])
        if share > 1:
            most, found = passes.get(run.arm, (0.0, []))
            passes[run.arm] = max(most, share), [*found, run]
    rows = []
    for arm, (most, found) in passes.items():
        place, name = ("controls", CONTROLS[arm]) if arm in CONTROLS else ("curves", arm)
        words = (
            f"{_count(found)} of {name} took {most:.2f} times the training text: repeated text teaches less, or harms"
        )
        rows.append(_row(place, "passes", words, found))
    return rows


def _of_teachers(runs: Sequence[RunFolder]) -> list[dict]:
    """Of teachers that were trained several times, as in a campaign that was run in parts."""
    taught: dict[str, list[RunFolder]] = {}
    for run in (run for run in runs if run.teacher_sha256):
        taught.setdefault(run.config.kd.teacher if run.config.kd else run.config.grown_from, []).append(run)
    rows = []
    for teacher, found in taught.items():
        if (trainings := len({run.teacher_sha256 for run in found})) > 1:
            words = f"{trainings} trainings of teacher {teacher} taught these runs; its score and time are those of one"
            rows.append(_row("compare", "teacher", words, found))
    return rows


def _of_caches(runs: Sequence[RunFolder]) -> list[dict]:
    """Of caches whose writing was timed badly, by their descriptions, where these are there."""
    doubts = {"shared_device": "on a device that was shared", "broken": "by several processes, one after the other"}
    rows, read = [], {}
    for run in (run for run in runs if isinstance(run.config, RunConfig) and run.config.kd and run.config.kd.cache):
        described = run.folder.parent.parent / "caches" / run.config.kd.cache / "cache.json"
        if run.config.clock == "measured" and described.is_file():
            read.setdefault(described, []).append(run)
    for described, readers in read.items():
        facts = read_json(described, ["cost_ms"])
        if said := [words for key, words in doubts.items() if facts.get(key)]:
            words = f"cache {described.parent.name} was written {' and '.join(said)}: what it took is in doubt"
            rows.append(_row("compare", "cache", words, readers))
    return rows


def _of_machines(runs: Sequence[RunFolder]) -> list[dict]:
    """Of what the runs ran on and from. A modelled time is the same on every machine."""
    rows = []
    trained = [run for run in runs if not run.imported and run.summary["code_hash"]]
    if len(hashes := sorted({run.summary["code_hash"] for run in trained})) > 1:
        rows.append(_row("verdict", "code", f"the runs come from {len(hashes)} versions of the code", trained))
    timed = [run for run in trained if run.config.clock == "measured" and run.summary["device"]]
    if len(devices := sorted({f"{run.summary['device']}, {run.summary['threads']} threads" for run in timed})) > 1:
        rows.append(_row("curves", "devices", f"the runs were timed on {len(devices)} devices: {'; '.join(devices)}"))
    if found := [run for run in timed if run.summary["shared_device"]]:
        words = f"{_count(found)} shared the device with another run: their times count for nothing"
        rows.append(_row("curves", "shared", words, found))
    if any(run.config.clock == "modelled" for run in trained):
        rows.append(_row("curves", "modelled", "time is modelled from FLOPs, not measured"))
    return rows


def _own_lr(run: RunFolder) -> bool:
    """Whether a KD run's LR is another than CE's: boosted, or lower once KD stopped."""
    return run.config.schedule.lr_boost is not None or run.config.kd.post_stop_lr != 1.0


def _of_verdict(runs: Sequence[RunFolder], verdict: dict) -> list[dict]:
    rows = []
    seeds = verdict["n_seeds"]
    if verdict["point"] and seeds < MIN_PAIRS:
        words = f"KD and CE both reached the target with {seeds} of the {MIN_PAIRS} seeds that a claim needs"
        rows.append(_row("tests", "seeds", words))
    for arm, edges in re.findall(ON_EDGE, verdict["tuning"]):
        words = f"the chosen point of {arm} lies on an edge of the grid ({edges}): a wider one may do"
        rows.append(_row("screen", "edge", words))
    there = {run.arm for run in runs if run.ok}
    if not any(_own_lr(run) for run in runs if run.arm == "kd"):
        there.add("control_boost")  # KD's LR is CE's
    if verdict["point"] and (missing := [name for arm, name in CONTROLS.items() if arm not in there]):
        rows.append(_row("controls", "controls", f"not controlled for: {', '.join(missing)}"))
    return rows
