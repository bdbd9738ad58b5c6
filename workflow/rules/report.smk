import json

REPORT_VERSION = 6  # raise it when the report changes for the same tables
REPORT_FIGURES = {
    "roc": "Attacks",
    "controls": "Attacks",
    "costs": "Attacks",
    "tpr_by_timestep": "Attacks",
    "tpr_by_step": "Attacks",
    "distances": "Dataset",
    "embedding_scatter": "Dataset",
    "dedup_distances": "Near-duplicates",
}
REPORT_TABLES = {
    "attacks": "Attacks",
    "lineup": "Attacks",
    "comparison": "Attacks",
    "protocols": "Attacks",
    "all_metrics": "Attacks",
    "blind_audits": "Dataset",
    "distances": "Dataset",
    "telling": "Dataset",
    "attrition": "Dataset",
    "dropped": "Dataset",
    "sanitization_rounds": "Dataset",
    "dedup_recall": "Near-duplicates",
    "dedup_methods": "Near-duplicates",
    "dedup_thresholds": "Near-duplicates",
    "dedup_checked_bins": "Near-duplicates",
    "targets": "Provenance",
    "settings": "Provenance",
    "provenance": "Provenance",
}
# What every caption in workflow/report says of the run; options that the configuration leaves out are filled in.
CUT, RATES, NEAR, READ, BLIND, APART = (
    STAGES[stage](**config.get(stage, {}))
    for stage in ("sanitize", "evaluation", "dedup", "features", "audit", "distance")
)
SIDE = f"at most {CUT.max_per_side}" if CUT.max_per_side else "all remaining"
ABOVE = f", a member stays above {CUT.keep_above}"
KEPT = {
    "matched": f", pairs within {CUT.caliper} log-odds or what keeps {100 * CUT.min_keep:g} %",
    "crossfitted": ABOVE,
    "paper": ABOVE,
    "none": "",
}
REPORT_WORDS = {
    "model": f"{MAIN} ({TARGETS[MAIN]['source']}, revision {TARGETS[MAIN].get('revision') or 'not fixed'})",
    "controls": ", ".join(name for name in COMPARED if name != MAIN) or "none",
    "n": f"{SIDE} members and {SIDE} non-members, {100 - 100 * CUT.calibration_fraction:g} % of them in the test part",
    "fpr": f"{100 * RATES.fpr_targets[0]:g} % FPR",
    "all_fpr": " and ".join(f"{100 * rate:g} %" for rate in RATES.fpr_targets) + " FPR",
    "intervals": f"{100 * RATES.confidence:g} % intervals from {RATES.bootstrap} Bayesian bootstrap resamples of whole groups",
    "draws": READ.draws,
    "steps": ", ".join(
        f"{name} {target['step']}"
        for name, target in TARGETS.items()
        if "step" in target
    )
    or "none",
    "blind": ", ".join(BLIND.features),
    "sanitize": f"method {CUT.method}{KEPT[CUT.method]}",
    "dedup": f"L2 distance below {NEAR.max_distance}, or at most {NEAR.max_hamming} of 64 hash bits",
    "planted": config["report"]["planted"] or "none",
    "shuffles": APART.permutations,
    "measured": (
        f"{APART.max_rows:,} samples at most, whole near-duplicate groups at random"
        if APART.max_rows
        else "all samples"
    ),
    "encoder": config["embeddings"]["model"],
}


rule report:
    input:
        evaluation=expand(f"{RESULTS}/evaluation/{{target}}.parquet", target=TARGETS),
        scores=expand(f"{RESULTS}/scores/{{target}}.parquet", target=COMPARED),
        targets=expand(f"{RESULTS}/targets/{{target}}.json", target=TARGETS),
        features=expand(
            f"{RESULTS}/features/{MAIN}/{{block}}/{SHARDS[0]}.parquet",
            block=jobs_of(MAIN),
        ),
        dataset=expand(
            f"{RESULTS}/dataset/{{split}}.parquet", split=["sanitized", "unsanitized"]
        ),
        attacked=ATTACKED,
        rounds=f"{RESULTS}/dataset/{SPLIT}.json",
        audit=expand(
            f"{RESULTS}/audit/{{split}}.parquet",
            split=["sanitized", "unsanitized", "attacked"],
        ),
        blind_scores=f"{RESULTS}/audit/attacked.scores.parquet",
        telling=f"{RESULTS}/audit/attacked.telling.parquet",
        distance=expand(
            f"{RESULTS}/distance/{{split}}.parquet",
            split=["collected", "sanitized", "unsanitized"],
        ),
        embeddings=all_shards("embeddings/{shard}.parquet"),
        duplicates=rules.dedup.output,
        attrition=rules.attrition.output,
        metadata=rules.metadata.output.table,
        dropped=[rules.metadata.output.dropped, f"{RESULTS}/dropped/{SPLIT}.parquet"],
        planted=config["report"]["planted"] or [],
    output:
        html=report(
            f"{RESULTS}/report.html", caption="../report/report.rst", category="Report"
        ),
        figures=[
            report(
                f"{RESULTS}/figures/{name}.svg",
                caption=f"../report/{name}.rst",
                category=category,
            )
            for name, category in REPORT_FIGURES.items()
        ],
        pdfs=expand(f"{RESULTS}/figures/{{name}}.pdf", name=REPORT_FIGURES),
        tables=[
            report(
                f"{RESULTS}/tables/{name}.csv",
                caption=f"../report/{name}.rst",
                category=category,
            )
            for name, category in REPORT_TABLES.items()
        ],
    log:
        f"{LOGS}/report.log",
    benchmark:
        f"{LOGS}/report.tsv"
    conda:
        CPU_ENV
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        version=REPORT_VERSION,
        results=lambda wildcards, output: pathlib.PurePath(output.html).parent,
        targets=json.dumps(TARGETS),
        planted=lambda wildcards, input: (
            f"--planted {input.planted}" if input.planted else ""
        ),
        words=REPORT_WORDS,
    shell:
        "OMP_NUM_THREADS={threads} python -m mia report --results {params.results} --targets {params.targets:q}"
        " {params.planted} --output {output.html} 2>&1 | tee {log}"
