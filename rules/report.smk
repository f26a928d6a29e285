# Tables -> the page and its figures. Computes nothing.
localrules:
    report,
    mirror,


FIGURES = (
    "val_loss_steps val_loss_time teachers kd_alive isolates steps_saved_trend step_deltas lr_phases horizon_curve break_even"
    " sweep_parallel sweep_knobs step_parts"
).split()
PROFILE = f"{RESULTS}/kd/profile.csv"


rule report:
    input:
        curves=f"{RESULTS}/tables/curves.csv",
        runs=f"{RESULTS}/tables/runs.csv",
        compare=f"{RESULTS}/tables/compare.csv",
        teachers=f"{RESULTS}/tables/teachers.csv",
        timing=f"{RESULTS}/ce/timing.csv",
        screen=f"{RESULTS}/kd/screen.csv",
        ce_screen=f"{RESULTS}/ce/screen.csv",
        tuning=f"{RESULTS}/tables/tuning.csv",
        isolates=f"{RESULTS}/kd/isolates.csv",
        full=f"{RESULTS}/kd/full.csv",
        controls=f"{RESULTS}/controls.csv",
        ledger=f"{RESULTS}/tables/ledger.csv",
        reached=f"{RESULTS}/tables/reached.csv",
        tests=f"{RESULTS}/tables/verdict.csv",
        trend=f"{RESULTS}/tables/steps_saved_trend.csv",
        break_even=f"{RESULTS}/tables/break_even.csv",
        stop=f"{RESULTS}/tables/stop_conditions.csv",
        summary=f"{RESULTS}/tables/teacher_budget10_summary.csv",
        traces=f"{RESULTS}/tables/traces.csv",
        horizon_curve=f"{RESULTS}/tables/horizon_curve.csv",
        run_pages=f"{RESULTS}/tables/run_pages.csv",
        run_configs=f"{RESULTS}/tables/run_configs.csv",
        warnings=f"{RESULTS}/tables/warnings.csv",
        headline=f"{RESULTS}/tables/headline.csv",
        advice=f"{RESULTS}/tables/advice.csv",
        budget=f"{RESULTS}/budget.json",
        selected=f"{RESULTS}/teacher/selected.json",
        target=f"{RESULTS}/target.json",
        verdict=f"{RESULTS}/verdict.json",
    output:
        page=f"{RESULTS}/report/index.html",
        steps=report(
            f"{RESULTS}/figures/val_loss_steps.svg",
            caption="../workflow/report/curves.rst",
            category="Comparison",
        ),
        time=report(
            f"{RESULTS}/figures/val_loss_time.svg",
            caption="../workflow/report/curves.rst",
            category="Comparison",
        ),
        teachers=report(
            f"{RESULTS}/figures/teachers.svg",
            caption="../workflow/report/teachers.rst",
            category="Teachers",
        ),
        horizons=report(
            f"{RESULTS}/figures/horizon_curve.svg",
            caption="../workflow/report/horizons.rst",
            category="Comparison",
        ),
        break_even=report(
            f"{RESULTS}/figures/break_even.svg",
            caption="../workflow/report/break_even.rst",
            category="Comparison",
        ),
        sweep=report(
            multiext(f"{RESULTS}/figures/sweep", "_parallel.svg", "_knobs.svg"),
            caption="../workflow/report/sweep.rst",
            category="KD sweep",
        ),
        isolates=report(
            multiext(f"{RESULTS}/figures/", "isolates.svg", "step_parts.svg"),
            caption="../workflow/report/isolates.rst",
            category="Cost of a step",
        ),
        others=expand(
            f"{RESULTS}/figures/{{name}}.svg", name=["kd_alive", "steps_saved_trend", "step_deltas", "lr_phases"]
        ),
        pngs=expand(f"{RESULTS}/figures/{{name}}.png", name=FIGURES),
    log:
        f"{RESULTS}/logs/report.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        campaign=CAMPAIGN.campaign,
        code=code("report"),
        assets=assets_hash(),
        # Shown if it is there, but no input: then every campaign would have to profile.
        profile=PROFILE,
        profiled=lambda wildcards: file_hash(PROFILE),
    shell:
        "python workflow/scripts/report.py --curves {input.curves} --runs {input.runs} --compare {input.compare}"
        " --teachers {input.teachers} --timing {input.timing} --screen {input.screen}"
        " --ce-screen {input.ce_screen} --tuning {input.tuning}"
        " --isolates {input.isolates} --full {input.full} --controls {input.controls}"
        " --reached {input.reached} --tests {input.tests} --trend {input.trend} --break-even {input.break_even}"
        " --stop {input.stop} --summary {input.summary} --traces {input.traces} --horizon-curve {input.horizon_curve}"
        " --run-pages {input.run_pages} --run-configs {input.run_configs} --warnings {input.warnings}"
        " --headline {input.headline} --advice {input.advice} --profile {params.profile}"
        " --ledger {input.ledger} --budget {input.budget} --selected {input.selected}"
        " --target {input.target} --verdict {input.verdict} --campaign {params.campaign}"
        " --figures $(dirname {output.steps}) --out {output.page} > {log} 2>&1"


# Runs are copied as they finish; this makes sure of them all, and adds the campaign's files. Asked for if paths.mirror
# is set. If the mirror can't be written, this fails, and nothing else.
rule mirror:
    input:
        page=f"{RESULTS}/report/index.html",
        ledger=f"{RESULTS}/tables/ledger.csv",
    output:
        f"{RESULTS}/logs/mirrored.json",
    log:
        f"{RESULTS}/logs/mirror.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        root=shlex.quote(str(MIRROR)),
    shell:
        "python workflow/scripts/mirror.py --root {params.root} --ledger {input.ledger} --out {output} > {log} 2>&1"
