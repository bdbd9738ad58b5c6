from snakemake.utils import min_version

min_version("9.0")


# A complete configuration given by --configfile stands alone; merged with the example's, it would inherit its targets.
if "name" not in config:

    configfile: "config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/dataset.smk"
include: "workflow/rules/target.smk"
include: "workflow/rules/features.smk"
include: "workflow/rules/attacks.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        rules.report.output,
