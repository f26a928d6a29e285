# All runs -> tidy tables, the verdict, the ledger.
ALL_ARMS = (
    "ce",
    "ce_screen",
    "probe",
    "teacher",
    "imported",
    "ngram_teacher",
    "ngram",
    "isolate",
    "screen",
    "kd",
    "control_boost",
    "control_random",
    "control_tuned",
    "control_smooth",
    "control_batch",
    "control_extra",
    "control_growth",
    "log",
)


localrules:
    compare,
    details,
    ledger,


rule compare:
    input:
        runs=summaries(*ALL_ARMS, after="kd_promote"),
        budget=f"{RESULTS}/budget.json",
        probe=f"{RESULTS}/teacher/probe.csv",
        projected=f"{RESULTS}/teacher/projected.json",
        trained=f"{RESULTS}/teacher/trained.csv",
        measured=f"{RESULTS}/teacher/measured.json",
        selected=f"{RESULTS}/teacher/selected.json",
        target=f"{RESULTS}/target.json",
        screen=f"{RESULTS}/kd/screen.csv",
        ce_screen=f"{RESULTS}/ce/screen.csv",
        promoted=f"{RESULTS}/kd/promoted.json",
    output:
        curves=f"{RESULTS}/tables/curves.csv",
        runs=f"{RESULTS}/tables/runs.csv",
        compare=report(
            f"{RESULTS}/tables/compare.csv",
            caption="../workflow/report/compare.rst",
            category="Comparison",
        ),
        teachers=report(
            f"{RESULTS}/tables/teachers.csv",
            caption="../workflow/report/teachers.rst",
            category="Teachers",
        ),
        reached=f"{RESULTS}/tables/reached.csv",
        tests=report(
            f"{RESULTS}/tables/verdict.csv",
            caption="../workflow/report/tests.rst",
            category="Verdict",
        ),
        trend=f"{RESULTS}/tables/steps_saved_trend.csv",
        break_even=f"{RESULTS}/tables/break_even.csv",
        stop=f"{RESULTS}/tables/stop_conditions.csv",
        tuning=f"{RESULTS}/tables/tuning.csv",
        summary=f"{RESULTS}/tables/teacher_budget10_summary.csv",
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
        rules=shlex.quote(json.dumps(dataclasses.asdict(CAMPAIGN.verdict) | {"max_drift": CAMPAIGN.anchor.max_drift})),
        clock=CAMPAIGN.budget.clock,
        exploratory="--exploratory" if CAMPAIGN.exploratory else "",
        code=code("compare"),
    shell:
        "python workflow/scripts/compare.py {params.runs} --budget {input.budget} --probe {input.probe} --projected {input.projected}"
        " --trained {input.trained} --measured {input.measured} --selected {input.selected}"
        " --target {input.target} --screen {input.screen} --ce-screen {input.ce_screen} --promoted {input.promoted} --clock {params.clock} {params.exploratory}"
        " --rules {params.rules} --out-reached {output.reached} --out-tests {output.tests} --out-trend {output.trend}"
        " --out-break-even {output.break_even} --out-stop {output.stop} --out-tuning {output.tuning} --out-summary {output.summary}"
        " --out-curves {output.curves} --out-runs {output.runs} --out-compare {output.compare}"
        " --out-teachers {output.teachers} --out-verdict {output.verdict} > {log} 2>&1"


# What only the page reads: steps, horizons, configs, warnings and advice. It shows them, and computes nothing.
rule details:
    input:
        runs=summaries(*ALL_ARMS, after="kd_promote"),
        budget=f"{RESULTS}/budget.json",
        selected=f"{RESULTS}/teacher/selected.json",
        target=f"{RESULTS}/target.json",
        compare=f"{RESULTS}/tables/compare.csv",
        tests=f"{RESULTS}/tables/verdict.csv",
        verdict=f"{RESULTS}/verdict.json",
        tuning=f"{RESULTS}/tables/tuning.csv",
        break_even=f"{RESULTS}/tables/break_even.csv",
        trend=f"{RESULTS}/tables/steps_saved_trend.csv",
        teachers=f"{RESULTS}/tables/teachers.csv",
    output:
        traces=f"{RESULTS}/tables/traces.csv",
        horizon_curve=f"{RESULTS}/tables/horizon_curve.csv",
        run_pages=f"{RESULTS}/tables/run_pages.csv",
        run_configs=f"{RESULTS}/tables/run_configs.csv",
        warnings=report(
            f"{RESULTS}/tables/warnings.csv",
            caption="../workflow/report/warnings.rst",
            category="Verdict",
        ),
        headline=report(
            f"{RESULTS}/tables/headline.csv",
            caption="../workflow/report/headline.rst",
            category="Verdict",
        ),
        advice=report(
            f"{RESULTS}/tables/advice.csv",
            caption="../workflow/report/advice.rst",
            category="Verdict",
        ),
    log:
        f"{RESULTS}/logs/details.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        runs=run_flags(*ALL_ARMS),
        confidence=CAMPAIGN.verdict.confidence,
        code=code("details"),
    shell:
        "python workflow/scripts/details.py {params.runs} --budget {input.budget} --selected {input.selected}"
        " --target {input.target} --tuning {input.tuning} --break-even {input.break_even} --trend {input.trend}"
        " --teachers {input.teachers}"
        " --compare {input.compare} --tests {input.tests} --verdict {input.verdict} --confidence {params.confidence}"
        " --out-traces {output.traces} --out-horizon-curve {output.horizon_curve} --out-run-pages {output.run_pages}"
        " --out-run-configs {output.run_configs} --out-warnings {output.warnings} --out-headline {output.headline}"
        " --out-advice {output.advice} > {log} 2>&1"


rule ledger:
    input:
        runs=summaries(*ALL_ARMS, after="kd_promote"),
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
        exploratory="--exploratory" if CAMPAIGN.exploratory else "",
        code=code("ledger"),
    shell:
        "python workflow/scripts/ledger.py {params.runs} --target {input.target} {params.exploratory} --out {output} > {log} 2>&1"
