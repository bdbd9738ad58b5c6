rule latents:
    input:
        selection=f"{RESULTS}/attacked/{SPLIT}.selection.parquet",
        images=rules.images.output,
        target=rules.target.output,
    output:
        latents=f"{RESULTS}/latents/{{target}}/{{shard}}.parquet",
        texts=f"{RESULTS}/latents/{{target}}/{{shard}}.texts.parquet",
    log:
        f"{LOGS}/latents/{{target}}/{{shard}}.log",
    benchmark:
        f"{LOGS}/latents/{{target}}/{{shard}}.tsv"
    conda:
        MODEL_ENV
    resources:
        mem_mb=4000,
        runtime=240,
        gpu=int(CUDA),
        batch_size=EXECUTION["batch_size"],
    params:
        version=version("latents"),
    shell:
        "OMP_NUM_THREADS={threads} python -m mia latents --selection {input.selection} --images {input.images}"
        f" --target {{input.target}} --device {EXECUTION['device']}"
        " --batch-size {resources.batch_size} --output {output.latents} --texts-output {output.texts} 2>&1 | tee {log}"


rule features:
    input:
        latents=lambda wildcards: f"{RESULTS}/latents/{encoders_of(wildcards.target)}/{wildcards.shard}.parquet",
        texts=lambda wildcards: f"{RESULTS}/latents/{encoders_of(wildcards.target)}/{wildcards.shard}.texts.parquet",
        images=rules.images.output,
        target=rules.target.output,
    output:
        f"{RESULTS}/features/{{target}}/{{block}}/{{shard}}.parquet",
    log:
        f"{LOGS}/features/{{target}}/{{block}}/{{shard}}.log",
    benchmark:
        f"{LOGS}/features/{{target}}/{{block}}/{{shard}}.tsv"
    retries: 1
    conda:
        MODEL_ENV
    resources:
        mem_mb=4000,
        runtime=1440,
        gpu=int(CUDA),
        batch_size=EXECUTION["batch_size"],
    params:
        version=version("features"),
        seed=SEED,
        options=lambda wildcards: options_of(
            "features",
            wildcards.target,
            settings=settings_of(wildcards.target, wildcards.block),
        ),
    shell:
        "OMP_NUM_THREADS={threads} python -m mia features --latents {input.latents} --texts {input.texts}"
        " --images {input.images} --target {input.target} --block {wildcards.block} {params.options}"
        f" --seed {{params.seed}} --device {EXECUTION['device']}"
        " --batch-size {resources.batch_size} --output {output} 2>&1 | tee {log}"
