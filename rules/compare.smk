# All runs -> tidy tables, the verdict, the ledger.
ALL_ARMS = (
    "ce",
    "probe",
    "teacher",
    "imported",
    "isolate",
    "screen",
    "kd",
    "control_boost",
    "control_random",
)


localrules:
    compare,
    ledger,


rule compare:
    input:
        runs=summaries(*ALL_ARMS, after=["kd_promote"]),
        budget=f"{RESULTS}/budget.json",
        probe=f"{RESULTS}/teacher/probe.csv",
        projected=f"{RESULTS}/teacher/projected.json",
        trained=f"{RESULTS}/teacher/trained.csv",
        measured=f"{RESULTS}/teacher/measured.json",
        selected=f"{RESULTS}/teacher/selected.json",
        target=f"{RESULTS}/target.json",
        promoted=f"{RESULTS}/kd/promoted.json",
    output:
        curves=f"{RESULTS}/tables/curves.csv",
        runs=f"{RESULTS}/tables/runs.csv",
        compare=report(
            f"{RESULTS}/tables/compare.csv",
            caption="../workflow/report/compare.rst",
            category="Comparison",
        ),
        teachers=f"{RESULTS}/tables/teachers.csv",
        verdict=report(
            f"{RESULTS}/verdict.json",
            caption="../workflow/report/verdict.rst",
            category="Verdict",
        ),
    log:
        f"{RESULTS}/logs/compare.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        runs=run_flags(*ALL_ARMS),
        clock=CAMPAIGN.budget.clock,
        exploratory="--exploratory" if CAMPAIGN.exploratory else "",
        code=code("compare"),
    shell:
        "python workflow/scripts/compare.py {params.runs} --budget {input.budget} --probe {input.probe} --projected {input.projected}"
        " --trained {input.trained} --measured {input.measured} --selected {input.selected}"
        " --target {input.target} --promoted {input.promoted} --clock {params.clock} {params.exploratory}"
        " --out-curves {output.curves} --out-runs {output.runs} --out-compare {output.compare}"
        " --out-teachers {output.teachers} --out-verdict {output.verdict} > {log} 2>&1"


rule ledger:
    input:
        runs=summaries(*ALL_ARMS, after=["kd_promote"]),
        target=f"{RESULTS}/target.json",
    output:
        report(
            f"{RESULTS}/tables/ledger.csv",
            caption="../workflow/report/ledger.rst",
            category="Ledger",
        ),
    log:
        f"{RESULTS}/logs/ledger.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        runs=run_flags(*ALL_ARMS),
        code=code("ledger"),
    shell:
        "python workflow/scripts/ledger.py {params.runs} --target {input.target} --out {output} > {log} 2>&1"
