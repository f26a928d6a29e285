# What all rules share: the validated campaign, its runs, and helpers to ask for them. No rules here.
import dataclasses
import functools
import hashlib
import json
import math
import os
import shlex
import shutil
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger

from kdclimb import campaign as campaigns
from kdclimb import expansion
from kdclimb import gpus
from kdclimb import plan
from kdclimb.analysis.tables import AnalysisError, remedy
from kdclimb.artifacts import Damaged, read_sealed
from kdclimb.config import NGRAM_PREFIX, ConfigError, canonical_json
from kdclimb.imported import PREFIX
from kdclimb.jobs import FAILURES, JobErrors, write_batch, write_failures, write_refused
from kdclimb.lease import queued_jobs
from kdclimb.mirror import mirror, not_mirrored
from kdclimb.provenance import source_hash
from kdclimb.schedule import total_tokens
from kdclimb.sources import PREPARED

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
    batch=r"[a-z_]+-\d+of\d+-[0-9a-f]{12}",


def of_profile(name, otherwise):
    """A default resource that slurm/config.yaml sets, as text; `otherwise` without that profile."""
    found = (workflow.resource_settings.default_resources or {}).get(name)
    return otherwise if found is None else str(found.raw)


MINUTES = of_profile("minutes", None)  # None: no cluster
if MINUTES is not None and workflow.is_main_process:
    if config["device"] == "auto":
        raise WorkflowError(
            "config: device: 'auto' is not allowed on a cluster, whose nodes differ; allowed: cpu, cuda"
        )
    width = f"through Slurm, at most {workflow.resource_settings.nodes} jobs at a time"
    print(f"kdclimb: campaign {CAMPAIGN.campaign} on {CAMPAIGN.device}, {width}", file=sys.stderr)
JOB_ERRORS = JobErrors()
logger.addHandler(JOB_ERRORS)
RETRIES = 0 if not workflow.is_main_process else 1 if MINUTES is None else 3
GPU_TYPE = of_profile("gpu_type", "default") if CAMPAIGN.device == "cuda" else "default"
# A timed run holds its whole device, so no other job may take its cores: on one machine all that there are, or where it
# has several GPUs, each of which trains, its share of them.
GPUS = len(gpus.usable()) if CAMPAIGN.device == "cuda" and MINUTES is None and workflow.is_main_process else 0
CORES = max(1, (workflow.resource_settings.cores or 1) // max(1, GPUS))
if GPUS and "gpu" not in workflow.global_resources:  # which --resources may have set
    workflow.global_resources["gpu"] = GPUS  # shares of 8 cores among 3 GPUs are 2, and would let a fourth job start
SIGNAL = of_profile("slurm_signal", "TERM@120")  # NAME@SECONDS, before a job's time limit
LONGEST = max(run.tokens for run in campaigns.token_needs(CAMPAIGN).runs)
# By decisions: the runs, their configs by id, the batches, the batch of each run that is in one, those whose weights
# nobody wants, and the teachers; a wide campaign asks for each, and again. By the stamp of the decisions' files: what they hold.
_expanded, _decided = {}, {}


def decisions():
    try:
        return campaigns.read_decisions(Path(RESULTS))
    except Damaged as error:
        raise WorkflowError(str(error))


decisions()  # here too: an error of an input function comes with a traceback


def expand_runs():
    """All runs of the campaign, as far as the decisions taken so far name them; on a cluster, the plan at each news."""
    stamp = campaigns.decisions_stamp(Path(RESULTS))
    if stamp not in _decided:
        _decided[stamp] = canonical_json(decisions())
    key = _decided[stamp]
    if key not in _expanded:
        found = expansion.expand(CAMPAIGN, json.loads(key), Path(DATA).name)
        shared = expansion.shared_jobs(CAMPAIGN, found)
        _expanded[key] = (
            found,
            {run.run_id: run.config for run in found},
            {batch: [run.config for run in members] for batch, members in shared.items()},
            {run.run_id: batch for batch, members in shared.items() for run in members},
            expansion.without_weights(CAMPAIGN, found),
            {run.run_id for run in found if run.arm == "teacher"},
        )
        if MINUTES is not None and workflow.is_main_process:
            print(plan_on_cluster(), file=sys.stderr)
    return _expanded[key]


def plan_on_cluster():
    try:
        return plan.on_cluster(CAMPAIGN, ROOT, Path("results"), workflow.resource_settings.nodes)
    except AnalysisError as error:
        return f"kdclimb: no plan: {error}"


def runs(*arms):
    """The campaign's runs of these arms, as far as the decisions taken so far name them; counted teachers too."""
    everything = expand_runs()[0] + expansion.tables(CAMPAIGN, Path(DATA).name)
    return [run for run in everything if run.arm in arms]


def asked_run(wildcards):
    """The run that a folder name stands for."""
    found = expand_runs()[1].get(wildcards.run)
    if found is None:
        raise WorkflowError(f"results/runs/{wildcards.run}: no run of campaign {CAMPAIGN.campaign} has this name")
    return found


def asked_batch(wildcards):
    """The configs of the runs that a job trains together."""
    found = expand_runs()[2].get(wildcards.batch)
    if found is None:
        raise WorkflowError(f"{RESULTS}/batches/{wildcards.batch}.csv: campaign {CAMPAIGN.campaign} has no such batch")
    return found


def made_by(run_id, file="status.json"):
    """The file of a run to wait for, or that of the batch that it is in: Snakemake would train it alone for its own."""
    batch = expand_runs()[3].get(run_id)
    return f"{RESULTS}/batches/{batch}.csv" if batch else f"results/runs/{run_id}/{file}"


def runtime(configs, attempt):
    """Minutes that a job of these runs may take: their share of `minutes` by tokens, a tenth of it for each start, and
    those between warning and limit.
    """
    if MINUTES is None:
        return 0
    tokens = [total_tokens(config.schedule, config.schedule.stop_step) for config in configs]
    share = 0.1 * len(tokens) + 0.9 * sum(tokens) / LONGEST
    return attempt * max(1, math.ceil(int(MINUTES) * share)) + math.ceil(int(SIGNAL.split("@")[1]) / 60)


def longest_runtime(attempt):
    """Minutes of a job that takes less than the longest run."""
    return 0 if MINUTES is None else attempt * int(MINUTES)


def sbatch_options(name):
    """The warning before the time limit; and where a master that is gone left a job for the same, to wait for that."""
    if MINUTES is None:
        return ""
    options = f"--signal={SIGNAL}"
    if workflow.is_main_process and (left := queued_jobs(Path.cwd(), name)):
        options += f" --dependency=afterany:{':'.join(left)}"
    return options


def asked_table(wildcards):
    """The n-gram teacher that a folder name stands for."""
    for run in expansion.tables(CAMPAIGN, Path(DATA).name):
        if run.run_id == wildcards.table:
            return run.config
    raise WorkflowError(f"results/runs/{wildcards.table}: no teacher of campaign {CAMPAIGN.campaign} has this name")


def asked_cache(wildcards):
    """The cache of teacher targets that a folder name stands for."""
    known = expansion.caches(CAMPAIGN, decisions(), Path(DATA).name)
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


DECIDING = ("filter_projected", "filter_measured", "teacher_select", "kd_promote")  # the checkpoints, in their order


def decided_by(last):
    """The decision file of a checkpoint, once it and all before it have decided.

    Each is asked for in turn. Snakemake asks an input function again when the checkpoint that it waits for has run; one
    that drops out of the plan instead, since those before it decided as they had, is found only from the one before.
    """
    for name in DECIDING[: DECIDING.index(last) + 1]:
        decision = getattr(checkpoints, name).get().output[0]
    return decision


def summaries(*arms, after=None):
    """Input function: the results of all runs of these arms, known once the checkpoint `after` has decided.

    Its decision is an input too: without, Snakemake would not ask again which runs they are where a decision that is
    there already is taken anew.
    """

    def function(wildcards):
        ids = imported_runs(arms)  # first, so that a mistake stops everything before anything is trained
        decided = [decided_by(after)] if after else []
        ids = [*(run.run_id for run in runs(*arms)), *ids, *logged_runs(arms)]
        return [*dict.fromkeys(map(made_by, ids)), *decided]

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


@functools.cache
def code_hash(rule):
    """Of a rule's script and all it imports: Snakemake doesn't look inside packages."""
    return source_hash(f"workflow/scripts/{rule}.py")


def code(rule):
    """Params function: that hash, so that the parse in a job asks for the job's own alone."""
    return lambda wildcards: code_hash(rule)


def assets_hash():
    """Of the report's style and script, which are no Python that `code` could see."""
    files = sorted((ROOT / "kdclimb/analysis/report").glob("page.*"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def file_hash(path):
    """Of a file that a rule reads if it is there; empty where it is not."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12] if Path(path).is_file() else ""


def teacher_checkpoints(*configs):
    ids = {config.grown_from if config.kd is None else config.kd.teacher for config in configs} - {None}
    return [f"results/runs/{run_id}/checkpoints" for run_id in sorted(ids)]


def target_cache(config):
    return [] if config.kd is None or config.kd.cache is None else f"results/caches/{config.kd.cache}"


def of_isolates(wildcards):
    """The teacher and the caches that the isolates need, known once a teacher is selected."""
    decided_by("teacher_select")
    configs = [run.config for run in runs("isolate")]
    return teacher_checkpoints(*configs) + sorted({target_cache(config) for config in configs if target_cache(config)})


def policy_runs(*configs):
    """What to wait for where a run follows the LR policy of another."""
    followed = dict.fromkeys(config.lr_policy.run for config in configs if config.lr_policy)
    return [*dict.fromkeys(made_by(run_id, "summary.csv") for run_id in followed)]


def weights_flag(config):
    """Without a flag, a finished run that kept none is trained again: a teacher alone, whose weights are needed."""
    if config.run_id in expand_runs()[4]:
        return "--no-weights"
    return "" if config.run_id in expand_runs()[5] else "--any-weights"


def weights_flags(configs):
    ids = [config.run_id for config in configs if config.run_id in expand_runs()[4]]
    return " ".join(["--no-weights", *ids]) if ids else ""


def policy_flag(config):
    return f"--policy results/runs/{config.lr_policy.run}/summary.csv" if config.lr_policy else ""


def frozen_code(rule, file, key, otherwise, **how):
    """A rule's hash; under `code: frozen`, that by which what is there was made, so that nothing counts as changed.

    `file` names it by `key`; `otherwise`: what to do where it is damaged.
    """
    if CAMPAIGN.code == "frozen" and file.is_file():
        return read_sealed(file, otherwise, **how).get(key, code_hash(rule))  # caches had none before
    return code_hash(rule)


def run_code(rule, run_id):
    status = Path(f"results/runs/{run_id}/status.json")
    return frozen_code(rule, status, "code_hash", remedy(status.parent), or_plain=True)


def cache_code(cache):
    folder = Path(f"results/caches/{cache}")
    return frozen_code("kd_cache", folder / "cache.json", "code", f"delete {folder}, and ./run makes it again")


def data_code():
    return frozen_code("data", Path(DATA, PREPARED), "code", "delete it, and ./run prepares the data again")


def compile_cache():
    """Words for `env` that send what torch.compile and Triton make to the node's own disk."""
    folder = CAMPAIGN.cluster.compile_cache
    return "" if folder is None else f'TORCHINDUCTOR_CACHE_DIR="{folder}/inductor" TRITON_CACHE_DIR="{folder}/triton"'


def runs_of(failure):
    """The configs of the runs that a failed job was to train, as far as the decisions since then still name them."""
    made, (_, by_id, batched, *_) = Path(failure.made), expand_runs()
    one = [by_id[made.parent.name]] if made.parent.name in by_id else []
    return {"train": one, "train_batch": batched.get(made.stem, [])}.get(failure.rule, [])


def still_asked(made):
    """Whether the campaign, as it is now and as far as it is decided, asks for this file, folder or batch of runs."""
    place = Path(made).parts
    if place[:2] == ("results", "runs"):
        return place[2] in {run.run_id for run in runs(*ALL_ARMS)}
    if place[:2] == ("results", "data"):
        return place[2] == Path(DATA).name
    if place[:2] == ("results", "caches"):
        return place[2] in expansion.caches(CAMPAIGN, decisions(), Path(DATA).name)
    if Path(made).parent == Path(RESULTS, "batches"):
        return Path(made).stem in expand_runs()[2]
    return True


def make_refused(failure, folders):
    """Write the results of the runs, by their folders, of a job that Slurm refused, and its list of them."""
    for folder, config in folders.items():
        if write_refused(config, folder, failure.refusal, failure.at_once):
            retry = "python -m kdclimb retry --status refused"
            print(f"kdclimb: {folder.name}: {failure.reason}. To ask again: {retry}", file=sys.stderr)
    ended = [(folder / "status.json").is_file() for folder in folders]
    shared = failure.rule == "train_batch"
    if shared and ended and all(ended):
        write_batch(Path(failure.made), folders)


def tell_failed():
    """Say which jobs left no result, and why, and keep that for status and report.

    Runs that Slurm did not take get one, so that the next start goes on without them.
    """
    if not workflow.is_main_process:
        return
    rows = []
    for failure in JOB_ERRORS.failed.values():
        folders = {Path("results/runs", config.run_id): config for config in runs_of(failure)}
        try:
            if failure.refusal:
                make_refused(failure, folders)
        except OSError as error:
            print(f"kdclimb: {failure.made}: the refusal is not written: {error}", file=sys.stderr)
        rows.append(failure.row(folder.name for folder in folders))
    for row in write_failures(Path(RESULTS, FAILURES), rows, still_asked):
        tail = "".join(f"\n    {line}" for line in row["log_tail"].splitlines())
        print(f"kdclimb: {row['rule']} left no {row['made']}: {row['reason']}{tail}", file=sys.stderr)


def forget_kept_caches():
    """What the writers of caches keep in case their ends are not seen: at its end the workflow has seen them."""
    for kept in Path("results/caches").glob(".*"):
        if workflow.is_main_process and kept.with_name(kept.name[1:]).is_dir():
            shutil.rmtree(kept)


def copy_to_mirror():
    """At the end of any run of the workflow, whatever was asked for and however it ended."""
    if MIRROR is None:
        return
    try:
        ids = [*(run.run_id for run in runs(*ALL_ARMS)), *CAMPAIGN.teacher.imported, *CAMPAIGN.baseline.imports]
        mirror(Path("results"), Path(RESULTS), ids, MIRROR)
    except OSError as error:
        print(not_mirrored(error, MIRROR), file=sys.stderr)
