# Every training run, whatever stage asks for it: CE, probe, teacher, KD or control. One rule, since a
# run is its config alone; the stages (ce_baseline, teacher_train, kd_screen, ...) ask for run ids. No run id here starts
# with "imported-" or "ngram-" (see wildcard_constraints): the one is made by python -m kdclimb import-teacher alone, the
# other by the rule ngram.
rule train:
    input:
        manifest=f"{DATA}/manifest.json",
        teacher=lambda wildcards: teacher_checkpoints(asked_run(wildcards)),
        cache=lambda wildcards: target_cache(asked_run(wildcards)),
        policy=lambda wildcards: policy_runs(asked_run(wildcards)),
    output:
        config="results/runs/{run}/config.json",
        steps="results/runs/{run}/steps.csv",
        val="results/runs/{run}/val.csv",
        summary="results/runs/{run}/summary.csv",
        status="results/runs/{run}/status.json",
        val_loss="results/runs/{run}/val_loss.png",
        step_time="results/runs/{run}/step_time.png",
        checkpoints=directory("results/runs/{run}/checkpoints"),
    log:
        "results/runs/{run}/train.log",
    retries: RETRIES
    conda:
        "../envs/kdclimb.yaml"
    threads: CORES
    resources:
        attempt=lambda wildcards, attempt: attempt,
        runtime=lambda wildcards, attempt: runtime([asked_run(wildcards)], attempt),
        slurm_extra=lambda wildcards: sbatch_options(f"rule_train_wildcards_{wildcards.run}"),
        gpu=int(CAMPAIGN.device == "cuda"),
        gpu_model="" if GPU_TYPE == "default" else GPU_TYPE,
        # None is a param, since changing a param reruns.
        code_policy=CAMPAIGN.code,
        mirror=f"--mirror {shlex.quote(str(MIRROR))}" if MIRROR else "",
        compile_cache=compile_cache(),
        weights=lambda wildcards: weights_flag(asked_run(wildcards)),
    params:
        config=lambda wildcards: shlex.quote(asked_run(wildcards).canonical()),
        teacher=lambda wildcards, input: (f"--teacher {shlex.quote(str(input.teacher))}" if input.teacher else ""),
        cache=lambda wildcards, input: f"--cache {shlex.quote(str(input.cache))}" if input.cache else "",
        policy=lambda wildcards: policy_flag(asked_run(wildcards)),
        code=lambda wildcards: run_code("train", wildcards.run),
    # exec: a signal to all processes of the job must find the trainer, and no shell that dies of it before.
    shell:
        "exec env {resources.compile_cache} python workflow/scripts/train.py --config {params.config}"
        " --out $(dirname {output.status}) --manifest {input.manifest} {params.teacher} {params.cache} {params.policy}"
        " --threads {threads} {resources.weights}"
        " --code {resources.code_policy} --attempt {resources.attempt} --attempts 2 {resources.mirror}"


# Several runs of a stage in one job. Their folders are those of `train`, which brings back a run from there if it is
# asked for by name.
rule train_batch:
    input:
        manifest=f"{DATA}/manifest.json",
        teacher=lambda wildcards: teacher_checkpoints(*asked_batch(wildcards)),
        caches=lambda wildcards: sorted({target_cache(c) for c in asked_batch(wildcards) if target_cache(c)}),
        policies=lambda wildcards: policy_runs(*asked_batch(wildcards)),
    output:
        f"{RESULTS}/batches/{{batch}}.csv",
    log:
        f"{RESULTS}/logs/train_batch/{{batch}}.log",
    retries: RETRIES
    conda:
        "../envs/kdclimb.yaml"
    threads: CORES
    resources:
        attempt=lambda wildcards, attempt: attempt,
        runtime=lambda wildcards, attempt: runtime(asked_batch(wildcards), attempt),
        slurm_extra=lambda wildcards: sbatch_options(f"rule_train_batch_wildcards_{wildcards.batch}"),
        gpu=int(CAMPAIGN.device == "cuda"),
        gpu_model="" if GPU_TYPE == "default" else GPU_TYPE,
        code_policy=CAMPAIGN.code,
        mirror=f"--mirror {shlex.quote(str(MIRROR))}" if MIRROR else "",
        compile_cache=compile_cache(),
        weights=lambda wildcards: weights_flags(asked_batch(wildcards)),
    params:
        configs=lambda wildcards: " ".join(shlex.quote(config.canonical()) for config in asked_batch(wildcards)),
        code=lambda wildcards: [run_code("train", config.run_id) for config in asked_batch(wildcards)],
    shell:
        "exec env {resources.compile_cache} python workflow/scripts/train_batch.py --configs {params.configs}"
        " --manifest {input.manifest} --threads {threads} {resources.weights}"
        " --code {resources.code_policy} --attempt {resources.attempt} --attempts 2 {resources.mirror}"
        " --out {output} --log {log}"
