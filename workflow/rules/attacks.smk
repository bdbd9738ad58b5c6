rule scores:
    input:
        features=features_of,
        dataset=ATTACKED,
    output:
        f"{RESULTS}/scores/{{target}}.parquet",
    log:
        f"{LOGS}/scores/{{target}}.log",
    benchmark:
        f"{LOGS}/scores/{{target}}.tsv"
    conda:
        CPU_ENV
    resources:
        mem_mb=2000,
        runtime=240,
    params:
        version=version("scores"),
        seed=SEED,
        settings=lambda wildcards: listed(settings_of(wildcards.target)),
        options=lambda wildcards: options_of("scores", wildcards.target),
        features=lambda wildcards, input: repeated("--features", input.features),
    shell:
        "OMP_NUM_THREADS=1 python -m mia scores {params.features} --dataset {input.dataset}"
        " --settings={params.settings:q} {params.options} --seed {params.seed} --workers {threads} --output {output} 2>&1 | tee {log}"


rule evaluation:
    input:
        scores=rules.scores.output,
        dataset=ATTACKED,
        blind=f"{RESULTS}/audit/attacked.scores.parquet",
        controls=lambda wildcards: [
            f"{RESULTS}/scores/{control}.parquet"
            for control in CONTROLS
            if control != wildcards.target
        ],
    output:
        f"{RESULTS}/evaluation/{{target}}.parquet",
    log:
        f"{LOGS}/evaluation/{{target}}.log",
    benchmark:
        f"{LOGS}/evaluation/{{target}}.tsv"
    conda:
        CPU_ENV
    resources:
        mem_mb=2000,
        runtime=120,
    params:
        version=version("evaluation"),
        seed=SEED,
        options=flags("evaluation", config["evaluation"]),
        controls=lambda wildcards, input: repeated("--control", input.controls),
    shell:
        "OMP_NUM_THREADS={threads} python -m mia evaluate --scores {input.scores} --dataset {input.dataset}"
        " --blind {input.blind} {params.controls} {params.options} --seed {params.seed} --output {output} 2>&1 | tee {log}"
