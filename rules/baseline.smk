# CE student -> timing -> the teacher's budget.
localrules:
    ce_baseline,
    budget,


rule ce_baseline:
    input:
        summaries("ce"),
    output:
        f"{RESULTS}/ce/timing.csv",
    log:
        f"{RESULTS}/logs/ce_baseline.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        runs=run_flags("ce"),
        code=code("ce_baseline"),
    shell:
        "python workflow/scripts/ce_baseline.py {params.runs} --out {output} > {log} 2>&1"


rule budget:
    input:
        f"{RESULTS}/ce/timing.csv",
    output:
        f"{RESULTS}/budget.json",
    log:
        f"{RESULTS}/logs/budget.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        fraction=CAMPAIGN.budget.fraction,
        code=code("budget"),
    shell:
        "python workflow/scripts/budget.py --timing {input} --fraction {params.fraction} --out {output} > {log} 2>&1"
