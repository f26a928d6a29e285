# What all rules share: the validated campaign, its runs, and helpers to ask for them. No rules here.
import dataclasses
import json
import os
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from kdclimb import campaign as campaigns
from kdclimb.config import NGRAM_PREFIX, ConfigError, canonical_json
from kdclimb.imported import PREFIX
from kdclimb.mirror import mirror, not_mirrored
from kdclimb.provenance import source_hash

ROOT = Path(workflow.basedir)
try:
    CAMPAIGN = campaigns.load(config, ROOT)
    DATA = f"results/data/{campaigns.data_id(CAMPAIGN, ROOT)}"
    if not any(argument.startswith("fetch_shards") for argument in sys.argv):  # which mends what is missing
        campaigns.check_tokens(CAMPAIGN, ROOT, Path("results"))
except (ValueError, OSError) as error:  # OSError: a file of the data that can't be read
    raise WorkflowError(f"config: {error}")

RESULTS = CAMPAIGN.results
MIRROR = campaigns.mirror_root(CAMPAIGN, ROOT)

# Jobs run this Python and this package, whatever the caller's shell would find first.
os.environ.update(
    PATH=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()]),
    PYTHONPATH=str(ROOT),
)


wildcard_constraints:
    run=rf"(?!{PREFIX}|{NGRAM_PREFIX})[A-Za-z0-9.-]+",
    cache=r"[a-z_]+-[0-9a-f]+",
    table=rf"{NGRAM_PREFIX}[A-Za-z0-9.-]+",


def runs(*arms):
    """The campaign's runs of these arms, as far as the decisions taken so far name them; counted teachers too."""
    decisions = campaigns.read_decisions(Path(RESULTS))
    everything = campaigns.expand(CAMPAIGN, decisions, Path(DATA).name)
    everything += campaigns.tables(CAMPAIGN, Path(DATA).name)
    return [run for run in everything if run.arm in arms]


def asked_run(wildcards):
    """The run that a folder name stands for."""
    decisions = campaigns.read_decisions(Path(RESULTS))
    for run in campaigns.expand(CAMPAIGN, decisions, Path(DATA).name):
        if run.run_id == wildcards.run:
            return run.config
    raise WorkflowError(f"results/runs/{wildcards.run}: no run of campaign {CAMPAIGN.campaign} has this name")


def asked_table(wildcards):
    """The n-gram teacher that a folder name stands for."""
    for run in campaigns.tables(CAMPAIGN, Path(DATA).name):
        if run.run_id == wildcards.table:
            return run.config
    raise WorkflowError(f"results/runs/{wildcards.table}: no teacher of campaign {CAMPAIGN.campaign} has this name")


def asked_cache(wildcards):
    """The cache of teacher targets that a folder name stands for."""
    decisions = campaigns.read_decisions(Path(RESULTS))
    known = campaigns.caches(CAMPAIGN, decisions, Path(DATA).name)
    if wildcards.cache not in known:
        raise WorkflowError(f"results/caches/{wildcards.cache}: no run of campaign {CAMPAIGN.campaign} reads it")
    return known[wildcards.cache]


def imported_runs(arms):
    """Ids of the imported teachers, if they are among these arms; an error if one isn't there, or doesn't fit."""
    if "imported" not in arms:
        return []
    try:
        campaigns.check_imported(CAMPAIGN, Path(DATA).name, Path("results"))
    except ConfigError as error:
        raise WorkflowError(f"config: {error}")
    return CAMPAIGN.teacher.imported


def logged_runs(arms):
    """Ids of the imported logs, if they are among these arms; an error if one isn't there."""
    if "log" not in arms:
        return ()
    try:
        campaigns.check_logs(CAMPAIGN, Path("results"))
    except ConfigError as error:
        raise WorkflowError(f"config: {error}")
    return CAMPAIGN.baseline.imports


logged_runs(["log"])  # here too, for the same reason as below
if Path(DATA, "manifest.json").is_file():  # without data nothing can be imported, and data is made by this workflow
    imported_runs(["imported"])  # here, since Snakemake drops an input function's error if the rule's output is there


def summaries(*arms, after=()):
    """Input function: the results of all runs of these arms, known once the checkpoints in `after` have decided.

    Their decisions are inputs too: without, Snakemake would not ask again which runs they are where a decision that is
    there already is taken anew.
    """

    def function(wildcards):
        ids = imported_runs(arms)  # first, so that a mistake stops everything before anything is trained
        decided = [getattr(checkpoints, name).get().output[0] for name in after]
        ids = [*(run.run_id for run in runs(*arms)), *ids, *logged_runs(arms)]
        return [f"results/runs/{run_id}/status.json" for run_id in ids] + decided

    return function


def run_flags(*arms):
    """Params function: these runs as --run flags, each 'ARM|LABEL|FOLDER'."""

    def function(wildcards):
        named = [(run.arm, run.label, run.run_id) for run in runs(*arms)]
        named += [("imported", run_id, run_id) for run_id in imported_runs(arms)]
        named += [("log", run_id, run_id) for run_id in logged_runs(arms)]
        flags = [f"{arm}|{label}|results/runs/{run_id}" for arm, label, run_id in named]
        return " ".join(f"--run {shlex.quote(flag)}" for flag in flags)

    return function


def code(rule):
    """The hash of a rule's script and all it imports: Snakemake doesn't look inside packages."""
    return source_hash(f"workflow/scripts/{rule}.py")


def teacher_checkpoints(wildcards):
    kd = asked_run(wildcards).kd
    return [] if kd is None else f"results/runs/{kd.teacher}/checkpoints"


def target_cache(wildcards):
    kd = asked_run(wildcards).kd
    return [] if kd is None or kd.cache is None else f"results/caches/{kd.cache}"


def train_code(wildcards):
    """The trainer's hash; under `code: frozen`, that of the finished run, so that nothing counts as changed."""
    status = Path(f"results/runs/{wildcards.run}/status.json")
    if CAMPAIGN.code == "frozen" and status.is_file():
        return json.loads(status.read_text())["code_hash"]
    return code("train")


def copy_to_mirror():
    """At the end of any run of the workflow, whatever was asked for and however it ended."""
    if MIRROR is None:
        return
    try:
        ids = [*(run.run_id for run in runs(*ALL_ARMS)), *CAMPAIGN.teacher.imported, *CAMPAIGN.baseline.imports]
        mirror(Path("results"), Path(RESULTS), ids, MIRROR)
    except OSError as error:
        print(not_mirrored(error, MIRROR), file=sys.stderr)
