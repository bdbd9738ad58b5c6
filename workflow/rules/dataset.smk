rule select:
    input:
        local_source_of,
    output:
        table=f"{RESULTS}/selected/{{pool}}/{{number}}.parquet",
        dropped=f"{RESULTS}/dropped/select/{{pool}}/{{number}}.parquet",
    log:
        f"{LOGS}/select/{{pool}}/{{number}}.log",
    benchmark:
        f"{LOGS}/select/{{pool}}/{{number}}.tsv"
    retries: 2
    conda:
        CPU_ENV
    resources:
        mem_mb=1000,
        runtime=240,
    params:
        version=version("select"),
        options=flags("select", config.get("select", {})),
        source=lambda wildcards: source_of(wildcards)["file"],
        columns=lambda wildcards: column_flags(source_of(wildcards)["columns"]),
    shell:
        "python -m mia select --source {params.source:q} {params.columns} {params.options} --pool {wildcards.pool}"
        " --output {output.table} --dropped-output {output.dropped} 2>&1 | tee {log}"


rule metadata:
    input:
        member=pool_files("member"),
        candidate=pool_files("candidate"),
        control=pool_files("control"),
        dropped=[
            path
            for pool in SOURCES
            for path in pool_files(pool, "dropped/select/{pool}/{number}.parquet")
        ],
    output:
        table=f"{RESULTS}/metadata.parquet",
        dropped=f"{RESULTS}/dropped/metadata.parquet",
    log:
        f"{LOGS}/metadata.log",
    benchmark:
        f"{LOGS}/metadata.tsv"
    conda:
        CPU_ENV
    resources:
        mem_mb=lambda wildcards, input: max(1000, 20 * input.size_mb),
        runtime=60,
    params:
        version=version("metadata"),
        options=flags("metadata", config["metadata"]),
        sources=lambda wildcards, input: " ".join(
            repeated(f"--{flag}", getattr(input, flag))
            for flag in ("member", "candidate", "control", "dropped")
        ),
        columns=column_flags(config["metadata"]["columns"]),
    shell:
        "python -m mia metadata {params.sources} {params.columns} {params.options}"
        " --output {output.table} --dropped-output {output.dropped} 2>&1 | tee {log}"


rule probe:
    input:
        metadata=rules.metadata.output.table,
    output:
        f"{RESULTS}/probe.json",
    log:
        f"{LOGS}/probe.log",
    benchmark:
        f"{LOGS}/probe.tsv"
    conda:
        CPU_ENV
    resources:
        mem_mb=1000,
        runtime=15,
        timeout_s=EXECUTION["timeout_s"],
    params:
        version=version("images"),
        options=flags("images", config["images"]),
    shell:
        "python -m mia probe --metadata {input.metadata} {params.options} --timeout-s {resources.timeout_s}"
        " --output {output} 2>&1 | tee {log}"


rule images:
    input:
        metadata=rules.metadata.output.table,
        probe=rules.probe.output,
        previous=earlier_images,
    output:
        f"{RESULTS}/images/{{shard}}.parquet",
    log:
        f"{LOGS}/images/{{shard}}.log",
    benchmark:
        f"{LOGS}/images/{{shard}}.tsv"
    retries: 2
    conda:
        CPU_ENV
    resources:
        mem_mb=2000,
        runtime=720,
        concurrency=EXECUTION["concurrency"],
        timeout_s=EXECUTION["timeout_s"],
        deadline_s=EXECUTION["deadline_s"],
        per_host=EXECUTION["per_host"],
        host_delay_s=EXECUTION["host_delay_s"],
    params:
        version=version("images"),
        options=flags("images", config["images"]),
        shards=config["shards"],
        previous=lambda wildcards, input: repeated("--previous", input.previous),
    shell:
        "python -m mia images --metadata {input.metadata} --shard {wildcards.shard} --shards {params.shards} {params.options}"
        " {params.previous} --concurrency {resources.concurrency} --timeout-s {resources.timeout_s}"
        " --deadline-s {resources.deadline_s} --per-host {resources.per_host} --host-delay-s {resources.host_delay_s}"
        " --output {output} 2>&1 | tee {log}"


rule attrition:
    input:
        metadata=rules.metadata.output.table,
        images=all_shards("images/{shard}.parquet"),
    output:
        table=f"{RESULTS}/attrition.parquet",
        report=f"{RESULTS}/attrition.json",
    log:
        f"{LOGS}/attrition.log",
    benchmark:
        f"{LOGS}/attrition.tsv"
    conda:
        CPU_ENV
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        version=version("attrition"),
        images=lambda wildcards, input: repeated("--images", input.images),
    shell:
        "python -m mia attrition --metadata {input.metadata} {params.images} --output {output.table}"
        " --report-output {output.report} 2>&1 | tee {log}"


rule embeddings:
    input:
        metadata=rules.metadata.output.table,
        images=rules.images.output,
    output:
        f"{RESULTS}/embeddings/{{shard}}.parquet",
    log:
        f"{LOGS}/embeddings/{{shard}}.log",
    benchmark:
        f"{LOGS}/embeddings/{{shard}}.tsv"
    conda:
        MODEL_ENV
    resources:
        mem_mb=4000,
        runtime=240,
        gpu=int(CUDA),
        batch_size=EXECUTION["batch_size"],
        device=EXECUTION["device"].split(",")[0],
    params:
        version=version("embeddings"),
        options=flags("embeddings", config["embeddings"]),
    shell:
        "OMP_NUM_THREADS={threads} python -m mia embeddings --metadata {input.metadata} --images {input.images} {params.options}"
        " --device {resources.device} --batch-size {resources.batch_size} --output {output} 2>&1 | tee {log}"


rule neighbours:
    input:
        metadata=rules.metadata.output.table,
        embeddings=all_shards("embeddings/{shard}.parquet"),
        own=rules.embeddings.output,
        references=references_of,
        reference_metadata=reference_metadata_of,
    output:
        f"{RESULTS}/neighbours/{{shard}}.parquet",
    log:
        f"{LOGS}/neighbours/{{shard}}.log",
    benchmark:
        f"{LOGS}/neighbours/{{shard}}.tsv"
    conda:
        CPU_ENV
    resources:
        mem_mb=4000,
        runtime=1440,
    params:
        version=version("neighbours"),
        options=flags("neighbours", config["neighbours"]),
        embeddings=lambda wildcards, input: repeated("--embeddings", input.embeddings),
        references=lambda wildcards, input: repeated("--reference", input.references),
        metadata=repeated(
            "--reference-metadata",
            filter(None, [config["neighbours"].get("reference_metadata")]),
        ),
    shell:
        "OMP_NUM_THREADS={threads} OPENBLAS_NUM_THREADS={threads} python -m mia neighbours --metadata {input.metadata}"
        " {params.embeddings} --own {input.own} {params.references} {params.metadata} {params.options}"
        " --output {output} 2>&1 | tee {log}"


rule matches:
    input:
        metadata=rules.metadata.output.table,
        images=all_shards("images/{shard}.parquet"),
        embeddings=all_shards("embeddings/{shard}.parquet"),
        neighbours=all_shards("neighbours/{shard}.parquet"),
    output:
        f"{RESULTS}/matches.parquet",
    log:
        f"{LOGS}/matches.log",
    benchmark:
        f"{LOGS}/matches.tsv"
    conda:
        CPU_ENV
    resources:
        mem_mb=4000,
        runtime=240,
    params:
        version=version("dedup"),
        options=flags("dedup", config["dedup"]),
        images=lambda wildcards, input: repeated("--images", input.images),
        embeddings=lambda wildcards, input: repeated("--embeddings", input.embeddings),
        neighbours=lambda wildcards, input: repeated("--neighbours", input.neighbours),
    shell:
        "OMP_NUM_THREADS={threads} OPENBLAS_NUM_THREADS={threads} python -m mia matches --metadata {input.metadata}"
        " {params.images} {params.embeddings} {params.neighbours} {params.options} --output {output} 2>&1 | tee {log}"


rule links:
    input:
        matches=rules.matches.output,
        own=rules.embeddings.output,
        others=shards_to_meet,
    output:
        f"{RESULTS}/links/{{shard}}.parquet",
    log:
        f"{LOGS}/links/{{shard}}.log",
    benchmark:
        f"{LOGS}/links/{{shard}}.tsv"
    conda:
        CPU_ENV
    resources:
        mem_mb=4000,
        runtime=1440,
    params:
        version=version("dedup"),
        options=flags("dedup", config["dedup"]),
        others=lambda wildcards, input: repeated("--other", input.others),
    shell:
        "OMP_NUM_THREADS={threads} OPENBLAS_NUM_THREADS={threads} python -m mia links --matches {input.matches}"
        " --own {input.own} {params.others} {params.options} --output {output} 2>&1 | tee {log}"


rule dedup:
    input:
        metadata=rules.metadata.output.table,
        matches=rules.matches.output,
        links=all_shards("links/{shard}.parquet"),
    output:
        f"{RESULTS}/duplicates.parquet",
    log:
        f"{LOGS}/dedup.log",
    benchmark:
        f"{LOGS}/dedup.tsv"
    conda:
        CPU_ENV
    resources:
        mem_mb=4000,
        runtime=240,
    params:
        version=version("dedup"),
        options=flags("dedup", config["dedup"]),
        links=lambda wildcards, input: repeated("--links", input.links),
    shell:
        "python -m mia dedup --metadata {input.metadata} --matches {input.matches} {params.links} {params.options}"
        " --output {output} 2>&1 | tee {log}"


rule sanitize:
    input:
        metadata=rules.metadata.output.table,
        images=all_shards("images/{shard}.parquet"),
        duplicates=rules.dedup.output,
        target=text_encoder_of,
    output:
        dataset=f"{RESULTS}/dataset/{{split}}.parquet",
        attacked=f"{RESULTS}/attacked/{{split}}.parquet",
        selection=f"{RESULTS}/attacked/{{split}}.selection.parquet",
        dropped=f"{RESULTS}/dropped/{{split}}.parquet",
        report=f"{RESULTS}/dataset/{{split}}.json",
    log:
        f"{LOGS}/sanitize/{{split}}.log",
    benchmark:
        f"{LOGS}/sanitize/{{split}}.tsv"
    conda:
        MODEL_ENV
    resources:
        mem_mb=4000,
        runtime=720,
        batch_size=EXECUTION["batch_size"],
        device=EXECUTION["device"].split(",")[0],
    params:
        version=version("sanitize"),
        seed=SEED,
        options=lambda wildcards: flags(
            "sanitize",
            config["sanitize"]
            | ({} if wildcards.split == SPLIT else {"method": "none"}),
        ),
        target=lambda wildcards, input: repeated("--target", input.target),
        rounds=f"{RESULTS}/rounds/{{split}}",  # no output: a retry goes on after the last finished round
        images=lambda wildcards, input: repeated("--images", input.images),
    shell:
        "OMP_NUM_THREADS={threads} python -m mia sanitize --metadata {input.metadata} {params.images}"
        " --duplicates {input.duplicates} {params.target} {params.options} --seed {params.seed}"
        " --batch-size {resources.batch_size} --output {output.dataset} --attacked-output {output.attacked}"
        " --selection-output {output.selection} --dropped-output {output.dropped} --report-output {output.report}"
        " --device {resources.device} --rounds-folder {params.rounds} 2>&1 | tee {log}"


rule distance:
    input:
        rows=measured,
        embeddings=all_shards("embeddings/{shard}.parquet"),
    output:
        f"{RESULTS}/distance/{{split}}.parquet",
    log:
        f"{LOGS}/distance/{{split}}.log",
    benchmark:
        f"{LOGS}/distance/{{split}}.tsv"
    conda:
        CPU_ENV
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        version=version("distance"),
        seed=SEED,
        options=flags("distance", config["distance"]),
        rows=lambda wildcards: (
            "--duplicates" if wildcards.split == "collected" else "--dataset"
        ),
        embeddings=lambda wildcards, input: repeated("--embeddings", input.embeddings),
    shell:
        "OMP_NUM_THREADS={threads} python -m mia distance {params.rows} {input.rows} {params.embeddings} {params.options} --seed {params.seed}"
        " --output {output} 2>&1 | tee {log}"


rule audit:
    input:
        dataset=audited,
        images=all_shards("images/{shard}.parquet"),
        embeddings=all_shards("embeddings/{shard}.parquet"),
    output:
        metrics=f"{RESULTS}/audit/{{split}}.parquet",
        scores=f"{RESULTS}/audit/{{split}}.scores.parquet",
        telling=f"{RESULTS}/audit/{{split}}.telling.parquet",
    log:
        f"{LOGS}/audit/{{split}}.log",
    benchmark:
        f"{LOGS}/audit/{{split}}.tsv"
    conda:
        CPU_ENV
    resources:
        mem_mb=4000,
        runtime=240,
    params:
        version=(version("audit"), version("evaluation")),
        seed=SEED,
        options=flags("audit", config["audit"]),
        rates=flags("evaluation", config["evaluation"]),
        images=lambda wildcards, input: repeated("--images", input.images),
        embeddings=lambda wildcards, input: repeated("--embeddings", input.embeddings),
    shell:
        "OMP_NUM_THREADS={threads} python -m mia audit --dataset {input.dataset} {params.images} {params.embeddings}"
        " {params.options} {params.rates} --seed {params.seed} --output {output.metrics} 2>&1 | tee {log}"


rule card:
    input:
        dataset=f"{RESULTS}/dataset/{SPLIT}.parquet",
        audit=[f"{RESULTS}/audit/{split}.parquet" for split in ("unsanitized", SPLIT)],
        dropped=[
            rules.metadata.output.dropped,
            f"{RESULTS}/dropped/{SPLIT}.parquet",
        ],
        images=(
            all_shards("images/{shard}.parquet")
            if config["card"]["with_images"]
            else []
        ),
    output:
        directory(f"{RESULTS}/card"),
    log:
        f"{LOGS}/card.log",
    benchmark:
        f"{LOGS}/card.tsv"
    conda:
        CPU_ENV
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        version=version("card"),
        options=config["card"],
        tables=lambda wildcards, input: " ".join(
            repeated(flag, values)
            for flag, values in (
                ("--audit", input.audit),
                ("--dropped", input.dropped),
                ("--images", input.images),
            )
        ),
        bytes="--with-images" if config["card"]["with_images"] else "--no-with-images",
    shell:
        "python -m mia card --dataset {input.dataset} {params.tables} {params.bytes}"
        " --title {params.options[title]:q} --licence {params.options[licence]:q} --output {output} 2>&1 | tee {log}"
