# The hill climb, from text to report. Start it with ./run, or in a prepared environment with
# snakemake --cores all. What it does is drawn in README.md; where things lie, in docs/DESIGN.md.
from snakemake.utils import min_version

min_version("9.0")


configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "rules/common.smk"
include: "rules/data.smk"
include: "rules/train.smk"
include: "rules/baseline.smk"
include: "rules/teacher.smk"
include: "rules/kd.smk"
include: "rules/compare.smk"
include: "rules/report.smk"


localrules:
    all,


rule all:
    default_target: True
    input:
        f"{RESULTS}/report/index.html",
        # All that stands behind it, since Snakemake makes what is missing again only where it is asked for.
        rules.report.input,
        expand(f"{RESULTS}/teacher/{{name}}", name=["probe.csv", "projected.json", "trained.csv", "measured.json"]),
        summaries(*ALL_ARMS, after="kd_promote"),
        f"{RESULTS}/logs/mirrored.json" if MIRROR else [],


onstart:
    print(f"kdclimb: campaign {CAMPAIGN.campaign} on {CAMPAIGN.device}, results in {RESULTS}/")


onsuccess:
    tell_failed()
    forget_kept_caches()
    copy_to_mirror()
    page = f"{RESULTS}/report/index.html"
    there = f"open {page}" if Path(page).is_file() else f"{RESULTS}/ has what was asked for, no report yet"
    print(f"kdclimb: done; {there}")


onerror:
    tell_failed()
    forget_kept_caches()
    copy_to_mirror()
    print("kdclimb: stopped by an error (above). Starting it again goes on from what is done.")
