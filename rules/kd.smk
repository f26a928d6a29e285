# The teacher -> timing isolates, KD sweep, promotion, full runs and controls.
localrules:
    kd_isolates,
    kd_screen,
    kd_promote,
    kd_full,
    controls,


# What KD costs a step: CE alone, with the teacher's forward pass, with the KD loss.
rule kd_isolates:
    input:
        summaries("isolate", after=["teacher_select"]),
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


rule kd_screen:
    input:
        runs=summaries("screen", after=["teacher_select"]),
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


# Which points of the grid go on to the last horizon.
checkpoint kd_promote:
    input:
        f"{RESULTS}/kd/screen.csv",
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
        "python workflow/scripts/kd_promote.py --screen {input} --promote {params.promote} --out {output} > {log} 2>&1"


rule kd_full:
    input:
        runs=summaries("kd", after=["kd_promote"]),
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


rule controls:
    input:
        runs=summaries("control_boost", "control_random", after=["kd_promote"]),
        target=f"{RESULTS}/target.json",
    output:
        f"{RESULTS}/controls.csv",
    log:
        f"{RESULTS}/logs/controls.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        runs=run_flags("control_boost", "control_random"),
        code=code("controls"),
    shell:
        "python workflow/scripts/controls.py {params.runs} --target {input.target} --out {output} > {log} 2>&1"
