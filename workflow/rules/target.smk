rule train:
    input:
        metadata=rules.metadata.output.table,
        images=all_shards("images/{shard}.parquet"),
        duplicates=rules.dedup.output,
    output:
        directory(f"{RESULTS}/models/{{model}}"),
    log:
        f"{LOGS}/train/{{model}}.log",
    benchmark:
        f"{LOGS}/train/{{model}}.tsv"
    conda:
        CPU_ENV
    resources:
        mem_mb=3000,
        runtime=240,
    params:
        version=version("train"),
        seed=SEED,
        options=lambda wildcards: flags("train", MODELS[wildcards.model]),
        images=lambda wildcards, input: repeated("--images", input.images),
        text_tower=config.get("train", {}).get("text_tower"),
        vae=config.get("train", {}).get("vae"),
    shell:
        "OMP_NUM_THREADS={threads} python -m mia train --metadata {input.metadata} {params.images}"
        " --duplicates {input.duplicates} --text-tower {params.text_tower} --vae {params.vae} {params.options}"
        " --seed {params.seed} --output-dir {output} 2>&1 | tee {log}"


rule target:
    input:
        trained_folder,
    output:
        f"{RESULTS}/targets/{{target}}.json",
    log:
        f"{LOGS}/target/{{target}}.log",
    benchmark:
        f"{LOGS}/target/{{target}}.tsv"
    retries: 2
    conda:
        MODEL_ENV
    resources:
        mem_mb=2000,
        runtime=240,
    params:
        version=version("target"),
        source=lambda wildcards: TARGETS[wildcards.target]["source"],
        revision=lambda wildcards: TARGETS[wildcards.target].get("revision", ""),
        unet=lambda wildcards: TARGETS[wildcards.target].get("unet", ""),
        lora=lambda wildcards: TARGETS[wildcards.target].get("lora", ""),
    shell:
        "python -m mia target --source {params.source:q} --revision={params.revision:q} --unet={params.unet:q}"
        " --lora={params.lora:q} --output {output} 2>&1 | tee {log}"
