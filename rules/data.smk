# Text or shards -> tokens and a manifest. Shared by all campaigns on the same data.
rule data:
    output:
        manifest=f"{DATA}/manifest.json",
    log:
        f"{DATA}/data.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        spec=shlex.quote(canonical_json(campaigns.data_spec(CAMPAIGN, ROOT))),
        code=code("data"),
    shell:
        "python workflow/scripts/data.py --spec {params.spec} --out $(dirname {output.manifest}) > {log} 2>&1"
