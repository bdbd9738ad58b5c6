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
        mem_mb=lambda wildcards, attempt: (
            attempt * (16000 * max(1, GPUS) if CUDA else 4000)
        ),
        runtime=240,
        gpu=int(CUDA),
        batch_size=EXECUTION["batch_size"],
        device=EXECUTION["device"].split(",")[0],
    params:
        version=version("latents"),
    shell:
        "OMP_NUM_THREADS={threads} python -m mia latents --selection {input.selection} --images {input.images}"
        " --target {input.target} --device {resources.device}"
        " --batch-size {resources.batch_size} --output {output.latents} --texts-output {output.texts} 2>&1 | tee {log}"


rule features:
    input:
        latents=lambda wildcards: f"{RESULTS}/latents/{encoders_of(wildcards.target)}/{wildcards.shard}.parquet",
        texts=lambda wildcards: f"{RESULTS}/latents/{encoders_of(wildcards.target)}/{wildcards.shard}.texts.parquet",
        images=rules.images.output,
        selection=captions_of,
        target=rules.target.output,
    output:
        f"{RESULTS}/features/{{target}}/{{block}}/{{shard}}.parquet",
    log:
        f"{LOGS}/features/{{target}}/{{block}}/{{shard}}.log",
    benchmark:
        f"{LOGS}/features/{{target}}/{{block}}/{{shard}}.tsv"
    retries: 0 if config["features"].get("service") else 1  # a service is not paid twice
    conda:
        MODEL_ENV
    resources:
        mem_mb=lambda wildcards, attempt: (
            attempt * (16000 * max(1, GPUS) if CUDA else 4000)
        ),
        runtime=1440,
        gpu=GPUS,
        batch_size=EXECUTION["batch_size"],
        device=EXECUTION["device"],
        compile="--compile" if EXECUTION["compile"] else "--no-compile",
    params:
        version=version("features"),
        seed=SEED,
        options=lambda wildcards: flags(
            "features",
            dataclasses.asdict(jobs_of(wildcards.target)[wildcards.block]),
        ),
        encoder=lambda wildcards: (
            config["embeddings"]["model"] if wildcards.block == "generations" else ""
        ),
        selection=lambda wildcards, input: repeated(
            "--selection", [input.selection] if input.selection else []
        ),
    shell:
        "OMP_NUM_THREADS={threads} python -m mia features --latents {input.latents} --texts {input.texts}"
        " --images {input.images} {params.selection} --target {input.target} --block {wildcards.block} {params.options}"
        " --encoder={params.encoder:q} --seed {params.seed} --device {resources.device} {resources.compile}"
        " --batch-size {resources.batch_size} --output {output} 2>&1 | tee {log}"
