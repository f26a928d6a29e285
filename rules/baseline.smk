# CE student -> timing -> the teacher's budget.
localrules:
    ce_baseline,
    budget,


LOG = CAMPAIGN.baseline.log if CAMPAIGN.baseline.source == "log" else None


rule ce_baseline:
    input:
        str(ROOT / Path(LOG).expanduser()) if LOG else summaries("ce"),
    output:
        f"{RESULTS}/ce/timing.csv",
    log:
        f"{RESULTS}/logs/ce_baseline.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        runs="" if LOG else run_flags("ce"),
        baseline=shlex.quote(str(ROOT / Path(LOG).expanduser()) if LOG else ""),
        code=code("ce_baseline"),
    shell:
        "python workflow/scripts/ce_baseline.py {params.runs} --log {params.baseline} --out {output} > {log} 2>&1"


rule budget:
    input:
        timing=f"{RESULTS}/ce/timing.csv",
        runs=summaries("ce") if CAMPAIGN.budget.horizon else [],
    output:
        f"{RESULTS}/budget.json",
    log:
        f"{RESULTS}/logs/budget.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        runs=run_flags("ce") if CAMPAIGN.budget.horizon else "",
        fraction=CAMPAIGN.budget.fraction,
        horizon=CAMPAIGN.budget.horizon or 0,
        code=code("budget"),
    shell:
        "python workflow/scripts/budget.py {params.runs} --timing {input.timing} --fraction {params.fraction}"
        " --horizon {params.horizon} --out {output} > {log} 2>&1"
