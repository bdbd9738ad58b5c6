"""A finished split as an ordinary Hugging Face dataset: one Parquet file for each part and a card that says what it is.

The card holds counts, hashes, how the split was made and what the blind audit found. No image bytes unless asked for:
ids and hashes let others check that they fetched the same pictures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mia.config import UNTUNED
from mia.errors import UserError
from mia.tables import PARTS, SCHEMAS

VERSION = UNTUNED["card"]
COLUMNS = ("sample_id", "url", "caption", "sha256", "member", "group", "part")
IMAGE = pa.field("image", pa.struct([("bytes", pa.large_binary()), ("path", pa.string())]))
AUDIT_METRICS = ("auc", "tpr")
AUDIT_METHODS = ("holdout", "crossfit", "as_is")  # the first of these that a table has is shown


@dataclasses.dataclass(frozen=True)
class Source:
    """A table the card rests on: its name, the SHA-256 of its file, what it says of its making, and its rows."""

    name: str
    sha256: str
    made: dict[str, Any]
    table: pa.Table


@dataclasses.dataclass(frozen=True)
class Words:
    """What no table knows: the dataset's title and its licence, as the Hugging Face hub spells it."""

    title: str = "Membership-inference split"
    licence: str = "other"


def schema(dataset: pa.Table, with_images: bool) -> pa.Schema:
    """Columns of the written files: those of `COLUMNS`, `weight` if some weight is not 1, `image` if asked for."""
    fields = [SCHEMAS["dataset"].field(name) for name in COLUMNS]
    if not pc.all(pc.equal(dataset["weight"], 1.0)).as_py():
        fields.append(SCHEMAS["dataset"].field("weight"))
    return pa.schema(fields + ([IMAGE] if with_images else []))


def rows_of(dataset: pa.Table, part: str) -> pa.Table:
    """Rows of one part, by sample id.

    Raises:
        UserError: the part lacks members or non-members.
    """
    rows = dataset.filter(pc.equal(dataset["part"], part)).sort_by("sample_id")
    for side, name in ((True, "members"), (False, "non-members")):
        if not pc.any(pc.equal(rows["member"], side)).as_py():
            raise UserError(f"part '{part}' has no {name}", "dataset", "a split needs both sides in both parts")
    return rows


def with_images(rows: pa.Table, found: Mapping[str, bytes]) -> pa.Table:
    """`rows` with a column `image`, their original bytes by sample id.

    Raises:
        UserError: bytes that are not those the dataset has the hash of.
    """
    contents = []
    for name, wanted in zip(rows["sample_id"].to_pylist(), rows["sha256"].to_pylist(), strict=True):
        if hashlib.sha256(found[name]).hexdigest() != wanted:
            raise UserError("an image is not the one the dataset names by its sha256", name, "give that run's shards")
        contents.append({"bytes": found[name], "path": None})
    return rows.append_column(IMAGE, pa.array(contents, IMAGE.type))


def counts(dataset: pa.Table) -> list[dict[str, Any]]:
    """For each part: members, non-members, near-duplicate groups, distinct captions, distinct images."""
    found = []
    for part in PARTS:
        rows = rows_of(dataset, part)
        members = pc.sum(rows["member"]).as_py()
        distinct = {name: pc.count_distinct(rows[name]).as_py() for name in ("group", "caption", "sha256")}
        found.append({"part": part, "members": members, "nonmembers": len(rows) - members, **distinct})
    return found


def size_category(rows: int) -> str:
    """The hub's word for a dataset of so many rows, such as `1K<n<10K`."""
    limits = [(10 ** (3 + i), f"{10 ** (i % 3)}{'KMBT'[i // 3]}") for i in range(10)]
    for (limit, name), lower in zip(limits, [None, *limits[:-1]], strict=True):
        if rows < limit:
            return f"{lower[1]}<n<{name}" if lower else "n<1K"
    return "n>1T"


def audit_rows(metrics: pa.Table) -> list[dict[str, Any]]:
    """AUC and TPR of a metrics table by its best protocol, on test or on all samples: value, interval, or why none."""
    rows = metrics.to_pylist()
    method = next((m for m in AUDIT_METHODS if any(row["method"] == m for row in rows)), None)
    return [
        row
        for row in rows
        if row["method"] == method and row["metric"] in AUDIT_METRICS and row["part"] != "calibration"
    ]


def readme(
    dataset: Source,
    files: Mapping[str, str],
    schema: pa.Schema,
    words: Words,
    audits: Sequence[Source] = (),
    dropped: Sequence[Source] = (),
) -> str:
    """The card, README.md, with the YAML header that the hub and `datasets` read.

    Args:
        files: SHA-256 of each data file by its path in the folder.
        schema: of the data files.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mia", "templates"), autoescape=False, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"cell": cell, "number": number, "plain": plain, "count": lambda n: f"{n:,}"}
    found = counts(dataset.table)
    context = {
        "header": header(words, schema, dataset.table.num_rows), "words": words, "dataset": dataset, "files": files,
        "schema": schema, "counts": found, "test": next(row for row in found if row["part"] == "test"),
        "audits": [(source, audit_rows(source.table)) for source in audits],
        "dropped": [row for source in dropped for row in source.table.to_pylist()],
        "sources": [dataset, *audits, *dropped], "method": dataset.made.get("options", {}).get("method", ""),
    }  # fmt: skip
    return environment.get_template("dataset_card.md.j2").render(context)


def header(words: Words, schema: pa.Schema, rows: int) -> str:
    """The card's YAML: title, licence, size, one configuration with a split for each part, and the columns' types."""
    import yaml

    splits = [{"split": part, "path": f"data/{part}.parquet"} for part in PARTS]
    content = {
        "pretty_name": words.title, "license": words.licence,
        "tags": ["membership-inference", "diffusion", "privacy"], "size_categories": [size_category(rows)],
        "configs": [{"config_name": "default", "data_files": splits}],
        "dataset_info": {"features": [{"name": field.name, "dtype": _dtype(field)} for field in schema]},
    }  # fmt: skip
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _dtype(field: pa.Field) -> str:
    return "image" if field.name == IMAGE.name else {"double": "float64"}.get(str(field.type), str(field.type))


def cell(value: object) -> str:
    """Text that cannot break out of a Markdown table's cell."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def number(value: float | None) -> str:
    """Three decimals, or a dash."""
    return "-" if value is None or not np.isfinite(value) else f"{value:.3f}"


def plain(value: object) -> str:
    """A value as JSON on one line."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
