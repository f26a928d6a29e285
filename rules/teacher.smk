# Teacher candidates -> probe -> filter -> training -> filter -> the teacher, and the target it sets.
localrules:
    teacher_probe,
    filter_projected,
    teacher_train,
    filter_measured,
    teacher_select,
    target,


# Candidates are probed, and their full time is projected.
rule teacher_probe:
    input:
        summaries("probe"),
    output:
        f"{RESULTS}/teacher/probe.csv",
    log:
        f"{RESULTS}/logs/teacher_probe.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        runs=run_flags("probe"),
        code=code("teacher_probe"),
    shell:
        "python workflow/scripts/teacher_probe.py {params.runs} --out {output} > {log} 2>&1"


# Which candidates to train: those whose projected time is within the budget.
checkpoint filter_projected:
    input:
        probe=f"{RESULTS}/teacher/probe.csv",
        budget=f"{RESULTS}/budget.json",
    output:
        f"{RESULTS}/teacher/projected.json",
    log:
        f"{RESULTS}/logs/filter_projected.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        code=code("filter_projected"),
    shell:
        "python workflow/scripts/filter_projected.py --probe {input.probe} --budget {input.budget} --out {output} > {log} 2>&1"


rule teacher_train:
    input:
        summaries("teacher", "imported", after="filter_projected"),
    output:
        f"{RESULTS}/teacher/trained.csv",
    log:
        f"{RESULTS}/logs/teacher_train.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        runs=run_flags("teacher", "imported"),
        code=code("teacher_train"),
    shell:
        "python workflow/scripts/teacher_train.py {params.runs} --out {output} > {log} 2>&1"


# Which of them to choose from: those that pass the checklist, measured time included.
checkpoint filter_measured:
    input:
        trained=f"{RESULTS}/teacher/trained.csv",
        budget=f"{RESULTS}/budget.json",
    output:
        f"{RESULTS}/teacher/measured.json",
    log:
        f"{RESULTS}/logs/filter_measured.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        code=code("filter_measured"),
    shell:
        "python workflow/scripts/filter_measured.py --trained {input.trained} --budget {input.budget} --out {output} > {log} 2>&1"


# A checkpoint too, since the ids of all KD runs depend on the teacher.
checkpoint teacher_select:
    input:
        trained=f"{RESULTS}/teacher/trained.csv",
        projected=f"{RESULTS}/teacher/projected.json",
        measured=f"{RESULTS}/teacher/measured.json",
        budget=f"{RESULTS}/budget.json",
    output:
        f"{RESULTS}/teacher/selected.json",
    log:
        f"{RESULTS}/logs/teacher_select.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        code=code("teacher_select"),
    shell:
        "python workflow/scripts/teacher_select.py --trained {input.trained} --projected {input.projected}"
        " --measured {input.measured} --budget {input.budget} --out {output} > {log} 2>&1"


rule target:
    input:
        f"{RESULTS}/teacher/selected.json",
    output:
        f"{RESULTS}/target.json",
    log:
        f"{RESULTS}/logs/target.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        fixed=shlex.quote(json.dumps(CAMPAIGN.verdict.targets)),
        code=code("target"),
    shell:
        "python workflow/scripts/target.py --selected {input} --fixed {params.fixed} --out {output} > {log} 2>&1"
