# The teacher -> timing isolates, KD sweep, promotion, full runs and controls.
localrules:
    kd_isolates,
    kd_screen,
    ce_screen,
    kd_promote,
    kd_full,
    controls,


# An n-gram teacher: counted, not trained, and a run like any other to what learns from it.
rule ngram:
    input:
        manifest=f"{DATA}/manifest.json",
    output:
        config="results/runs/{table}/config.json",
        steps="results/runs/{table}/steps.csv",
        val="results/runs/{table}/val.csv",
        summary="results/runs/{table}/summary.csv",
        status="results/runs/{table}/status.json",
        val_loss="results/runs/{table}/val_loss.png",
        step_time="results/runs/{table}/step_time.png",
        checkpoints=directory("results/runs/{table}/checkpoints"),
    log:
        "results/runs/{table}/train.log",
    retries: RETRIES
    conda:
        "../envs/kdclimb.yaml"
    threads: CORES
    resources:
        runtime=lambda wildcards, attempt: longest_runtime(attempt),
        slurm_extra=lambda wildcards: sbatch_options(f"rule_ngram_wildcards_{wildcards.table}"),
        gpu=int(CAMPAIGN.device == "cuda"),
        gpu_model="" if GPU_TYPE == "default" else GPU_TYPE,
        code_policy=CAMPAIGN.code,
    params:
        config=lambda wildcards: shlex.quote(canonical_json(dataclasses.asdict(asked_table(wildcards)))),
        code=lambda wildcards: run_code("ngram", wildcards.table),
    shell:
        "python workflow/scripts/ngram.py --config {params.config} --out $(dirname {output.status})"
        " --manifest {input.manifest} --threads {threads} --code {resources.code_policy}"


# One pass of the teacher over the exact tokens of the runs of one horizon and seed, for all of them to read. A cache can
# be large: when nothing trains from it any more, it may be deleted.
rule kd_cache:
    input:
        manifest=f"{DATA}/manifest.json",
        teacher=lambda wildcards: f"results/runs/{asked_cache(wildcards).teacher}/checkpoints",
    output:
        directory("results/caches/{cache}"),
    log:
        "results/caches/{cache}.log",
    retries: RETRIES
    conda:
        "../envs/kdclimb.yaml"
    threads: CORES
    resources:
        runtime=lambda wildcards, attempt: longest_runtime(attempt),
        slurm_extra=lambda wildcards: sbatch_options(f"rule_kd_cache_wildcards_{wildcards.cache}"),
        gpu=int(CAMPAIGN.device == "cuda"),
        gpu_model="" if GPU_TYPE == "default" else GPU_TYPE,
    params:
        config=lambda wildcards: shlex.quote(canonical_json(dataclasses.asdict(asked_cache(wildcards)))),
        code=lambda wildcards: cache_code(wildcards.cache),
    # exec: as in `train`, a signal to all processes of the job must find the writer.
    shell:
        "exec python workflow/scripts/kd_cache.py --config {params.config} --out {output} --manifest {input.manifest}"
        " --teacher {input.teacher} --threads {threads} > {log} 2>&1"


# What KD costs a step: CE alone, with the teacher's forward pass, with the KD loss.
rule kd_isolates:
    input:
        summaries("isolate", after="teacher_select"),
    output:
        f"{RESULTS}/kd/isolates.csv",
    log:
        f"{RESULTS}/logs/kd_isolates.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        runs=run_flags("isolate"),
        code=code("kd_isolates"),
    shell:
        "python workflow/scripts/kd_isolates.py {params.runs} --out {output} > {log} 2>&1"


# The same once more with their parts timed, after the timed ones: ./run results/<campaign>/kd/profile.csv
rule kd_profile:
    input:
        manifest=f"{DATA}/manifest.json",
        timed=f"{RESULTS}/kd/isolates.csv",
        needed=of_isolates,
    output:
        f"{RESULTS}/kd/profile.csv",
    log:
        f"{RESULTS}/logs/kd_profile.log",
    retries: RETRIES
    conda:
        "../envs/kdclimb.yaml"
    threads: CORES
    resources:
        runtime=lambda wildcards, attempt: longest_runtime(attempt),
        gpu=int(CAMPAIGN.device == "cuda"),
        gpu_model="" if GPU_TYPE == "default" else GPU_TYPE,
        compile_cache=compile_cache(),
    params:
        runs=lambda wildcards: shlex.join(
            word for run in runs("isolate") for word in ("--run", f"{run.label}|{run.config.canonical()}")
        ),
        code=code("kd_profile"),
    shell:
        "env {resources.compile_cache} python workflow/scripts/kd_profile.py {params.runs} --manifest {input.manifest}"
        " --results results --threads {threads} --out {output} > {log} 2>&1"


rule kd_screen:
    input:
        runs=summaries("screen", after="teacher_select"),
        target=f"{RESULTS}/target.json",
    output:
        f"{RESULTS}/kd/screen.csv",
    log:
        f"{RESULTS}/logs/kd_screen.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        runs=run_flags("screen"),
        code=code("kd_screen"),
    shell:
        "python workflow/scripts/kd_screen.py {params.runs} --target {input.target} --out {output} > {log} 2>&1"


# CE is screened as KD is, for as many points.
rule ce_screen:
    input:
        runs=summaries("ce_screen"),
        target=f"{RESULTS}/target.json",
    output:
        f"{RESULTS}/ce/screen.csv",
    log:
        f"{RESULTS}/logs/ce_screen.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        runs=run_flags("ce_screen"),
        code=code("kd_screen"),
    shell:
        "python workflow/scripts/kd_screen.py {params.runs} --target {input.target} --out {output} > {log} 2>&1"


# Which points of the grid go on to all horizons, and with them the best one of CE's.
checkpoint kd_promote:
    input:
        screen=f"{RESULTS}/kd/screen.csv",
        ce_screen=f"{RESULTS}/ce/screen.csv",
    output:
        f"{RESULTS}/kd/promoted.json",
    log:
        f"{RESULTS}/logs/kd_promote.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        promote=CAMPAIGN.kd.promote,
        code=code("kd_promote"),
    shell:
        "python workflow/scripts/kd_promote.py --screen {input.screen} --ce-screen {input.ce_screen} --promote {params.promote} --out {output} > {log} 2>&1"


rule kd_full:
    input:
        runs=summaries("kd", after="kd_promote"),
        target=f"{RESULTS}/target.json",
    output:
        f"{RESULTS}/kd/full.csv",
    log:
        f"{RESULTS}/logs/kd_full.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        runs=run_flags("kd"),
        code=code("kd_full"),
    shell:
        "python workflow/scripts/kd_full.py {params.runs} --target {input.target} --out {output} > {log} 2>&1"


CONTROLS = (
    "control_boost",
    "control_random",
    "control_tuned",
    "control_smooth",
    "control_batch",
    "control_extra",
    "control_growth",
)


rule controls:
    input:
        runs=summaries(*CONTROLS, after="kd_promote"),
        target=f"{RESULTS}/target.json",
    output:
        f"{RESULTS}/controls.csv",
    log:
        f"{RESULTS}/logs/controls.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        runs=run_flags(*CONTROLS),
        code=code("controls"),
    shell:
        "python workflow/scripts/controls.py {params.runs} --target {input.target} --out {output} > {log} 2>&1"
