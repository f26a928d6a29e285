# Every training run, whatever stage asks for it: CE, probe, teacher, KD or control. One rule, since a
# run is its config alone; the stages (ce_baseline, teacher_train, kd_screen, ...) ask for run ids. No run id here starts
# with "imported-" or "ngram-" (see wildcard_constraints): the one is made by python -m kdclimb import-teacher alone, the
# other by the rule ngram.
rule train:
    input:
        manifest=f"{DATA}/manifest.json",
        teacher=teacher_checkpoints,
        cache=target_cache,
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
    retries: 1
    conda:
        "../envs/kdclimb.yaml"
    # A timed run holds the whole device: no other job may take its cores.
    threads: workflow.resource_settings.cores or 1
    resources:
        attempt=lambda wildcards, attempt: attempt,
        gpu=int(CAMPAIGN.device == "cuda"),
        # Neither is a param, since changing a param reruns.
        code_policy=CAMPAIGN.code,
        mirror=f"--mirror {shlex.quote(str(MIRROR))}" if MIRROR else "",
    params:
        config=lambda wildcards: shlex.quote(asked_run(wildcards).canonical()),
        teacher=lambda wildcards, input: (f"--teacher {input.teacher}" if input.teacher else ""),
        cache=lambda wildcards, input: f"--cache {input.cache}" if input.cache else "",
        code=train_code,
    shell:
        "python workflow/scripts/train.py --config {params.config} --out $(dirname {output.status})"
        " --manifest {input.manifest} {params.teacher} {params.cache} --threads {threads}"
        " --code {resources.code_policy} --attempt {resources.attempt} --attempts 2 {resources.mirror}"
