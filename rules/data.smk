# Text or shards -> tokens and a manifest. Shared by all campaigns on the same data.
rule data:
    output:
        manifest=f"{DATA}/manifest.json",
    log:
        f"{DATA}/data.log",
    conda:
        "../envs/kdclimb.yaml"
    resources:
        needs=canonical_json(dataclasses.asdict(campaigns.token_needs(CAMPAIGN))),  # a param would remake the data
    params:
        spec=shlex.quote(canonical_json(campaigns.data_spec(CAMPAIGN, ROOT))),
        code=lambda wildcards: data_code(),
    shell:
        "python workflow/scripts/data.py --spec {params.spec} --needs {resources.needs:q} --code {params.code}"
        " --out $(dirname {output.manifest}) --log {log}"


localrules:
    fetch_shards,


# Asked for by name: ./run fetch_shards. What is there and whole is not downloaded again.
rule fetch_shards:
    log:
        "results/data/fetch_shards.log",
    conda:
        "../envs/kdclimb.yaml"
    params:
        shards=shlex.quote(canonical_json(dataclasses.asdict(CAMPAIGN.data.shards))),
        vocab_size=CAMPAIGN.data.vocab_size,
    shell:
        "python workflow/scripts/fetch_shards.py --shards {params.shards} --vocab-size {params.vocab_size} --log {log}"
