rule scores:
    input:
        features=features_of,
        dataset=f"{RESULTS}/dataset/{SPLIT}.parquet",
    output:
        f"{RESULTS}/scores/{{target}}.parquet",
    params:
        version=version("scores"),
        seed=SEED,
        settings=lambda wildcards: listed(settings_of(wildcards.target)),
        options=lambda wildcards: flags(
            "scores",
            config["scores"] | {k: v for k, v in TARGETS[wildcards.target].items() if k == "attacks"},
        ),
        features=lambda wildcards, input: " ".join(f"--features {path}" for path in input.features),
    log:
        f"{LOGS}/scores/{{target}}.log",
    benchmark:
        f"{LOGS}/scores/{{target}}.tsv"
    resources:
        mem_mb=2000,
        runtime=240,
    conda:
        CPU_ENV
    shell:
        "OMP_NUM_THREADS={threads} python -m mia scores {params.features} --dataset {input.dataset}"
        " --settings {params.settings} {params.options} --seed {params.seed} --output {output} 2>&1 | tee {log}"


rule evaluation:
    input:
        scores=rules.scores.output,
        dataset=f"{RESULTS}/dataset/{SPLIT}.parquet",
    output:
        f"{RESULTS}/evaluation/{{target}}.parquet",
    params:
        version=version("evaluation"),
        seed=SEED,
        options=flags("evaluation", config["evaluation"]),
    log:
        f"{LOGS}/evaluation/{{target}}.log",
    benchmark:
        f"{LOGS}/evaluation/{{target}}.tsv"
    resources:
        mem_mb=2000,
        runtime=120,
    conda:
        CPU_ENV
    shell:
        "OMP_NUM_THREADS={threads} python -m mia evaluate --scores {input.scores} --dataset {input.dataset} {params.options}"
        " --seed {params.seed} --output {output} 2>&1 | tee {log}"


use rule evaluation as evaluation_blind with:
    input:
        scores=rules.audit.output,
        dataset=rules.sanitize.output.dataset,
    output:
        f"{RESULTS}/audit/{{split}}.parquet",
    log:
        f"{LOGS}/audit/{{split}}.evaluation.log",
    benchmark:
        f"{LOGS}/audit/{{split}}.evaluation.tsv"
